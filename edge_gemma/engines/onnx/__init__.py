"""onnxruntime: encoders' graphs, and the second engine. The only package that imports onnxruntime.

The engine (:mod:`.weights`, :mod:`.decoder`, :mod:`.context`) runs a bundle's ``decoder.onnx``. It
takes the vocabulary and the sampler from the llama.cpp engine, without loading weights there.
"""
