"""Open a graph of a bundle with onnxruntime, and run it. Its errors become ours here."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_gemma.errors import BundleError, MissingExtra, RuntimeFailure


def open_onnx(
    path: Path,
    *,
    n_threads: int,
    spin: bool = False,
    in_place: bool = False,
    sides: dict[str, int] | None = None,
):
    """An ``onnxruntime.InferenceSession`` on ``path`` for one graph of a bundle.

    Raises BundleError, MissingExtra.

    ``in_place`` uses the weights as they lie in the mapped file, clean pages the kernel may take
    back: no packed copies, no half-precision weights widened ahead of time, and every activation
    freed at once instead of kept in an arena. It pays where a product has many rows. ``sides``
    fixes free dimensions by name.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("Running an audio or vision encoder", "hear") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # threads that wait by spinning stop when a run ends
    for name, side in (sides or {}).items():
        options.add_free_dimension_override_by_name(name, side)
    if in_place:
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry(
            "session.disable_quant_qdq", "1"
        )  # it would make other operators of weights that are stored in 8 bits
        # the level above widens half-precision constants at load (onnxruntime's
        # FuseFp16InitializerToFp32Node)
        options.graph_optimization_level = getattr(
            onnxruntime.GraphOptimizationLevel,
            "ORT_ENABLE_LAYOUT",
            onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        )
    try:
        return onnxruntime.InferenceSession(
            str(path),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"] if in_place else None,
        )
    except Exception as error:  # onnxruntime raises a class per status code, with no common base
        raise BundleError(
            f"onnxruntime cannot open {path}: {str(error).splitlines()[0]}"
        ) from error


def run_onnx(session, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """One run of a graph. Raises RuntimeFailure."""
    try:
        return session.run(outputs, feeds)
    except Exception as error:  # see open_onnx
        raise RuntimeFailure(
            f"onnxruntime failed while running an encoder: {str(error).splitlines()[0]}"
        ) from error
