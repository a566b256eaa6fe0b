"""onnxruntime: opening a graph and running it. The only package that imports onnxruntime."""
