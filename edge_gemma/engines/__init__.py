"""What decodes: one package per foreign library, behind one interface.

``llama`` is the only package that imports llama_cpp, ``onnx`` the only one that imports
onnxruntime.
"""
