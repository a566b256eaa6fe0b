"""Features → soft tokens. The only room that imports onnxruntime; its errors become ours here."""

from __future__ import annotations

from pathlib import Path

from .errors import BundleError, MissingExtra


def open_onnx(path: Path, *, n_threads: int, spin: bool = False):
    """An ``onnxruntime.InferenceSession`` on ``path`` for one graph of a bundle. Raises BundleError, MissingExtra."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("Running an audio or vision encoder", "hear") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class per status code, with no common base
        raise BundleError(f"onnxruntime cannot open {path}: {str(error).splitlines()[0]}") from error
