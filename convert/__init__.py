"""Checkpoint → bundle, without PyTorch. The runtime never imports this
package at import time.

Without the packages of the ``convert`` extra, importing it raises
MissingExtra.
"""

from importlib.util import find_spec

from edge_gemma.errors import MissingExtra

if not all(map(find_spec, ("gguf", "ml_dtypes", "onnx", "sentencepiece"))):
    raise MissingExtra("Converting a checkpoint", "convert")
