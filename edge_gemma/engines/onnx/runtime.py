"""Open a graph of a bundle with onnxruntime, and run it. Its errors become ours here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge_gemma.errors import (
    BundleError,
    MissingExtra,
    RuntimeFailure,
    UsageError,
    first_line,
)

_LOG_ERRORS_ONLY = 3
OLDEST_FOR_DECODERS = (1, 31, 1)  # older ones die on layers that share K/V


class GraphValue(Protocol):
    """An input or output of a graph. A free dimension of its shape is a name, or None."""

    name: str
    shape: list[int | str | None]


class Graph(Protocol):
    """What this package asks of an ``onnxruntime.InferenceSession``."""

    def get_inputs(self) -> Sequence[GraphValue]: ...

    def get_outputs(self) -> Sequence[GraphValue]: ...

    def run(self, outputs: list[str] | None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The named outputs (None: all of them). Use :func:`run_onnx`, which turns errors."""
        ...


def open_onnx(
    path: Path,
    *,
    n_threads: int,
    spin: bool = False,
    in_place: bool = False,
    sides: Mapping[str, int] | None = None,
) -> Graph:
    """Load the graph at ``path`` on the CPU.

    Raises BundleError, MissingExtra.

    ``spin`` lets threads wait actively within a run: faster for many short
    products, and a core kept busy. ``in_place`` uses the weights as they lie in the
    mapped file, clean pages the kernel may take back: no packed copies, no
    half-precision weights widened ahead of time, and every activation freed at once
    instead of kept in an arena. It pays where a product has many rows. ``sides``
    fixes free dimensions by name.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("Running an audio or vision encoder", "hear") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    # threads that wait by spinning stop when a run ends
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for name, side in (sides or {}).items():
        options.add_free_dimension_override_by_name(name, side)
    if in_place:
        _use_weights_in_place(options, onnxruntime.GraphOptimizationLevel)
    try:
        return onnxruntime.InferenceSession(
            str(path),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"] if in_place else None,
        )
    except Exception as error:  # onnxruntime raises a class per status code, with no common base
        raise BundleError(f"onnxruntime cannot open {path}: {first_line(error)}") from error


def _use_weights_in_place(options: Any, levels: Any) -> None:
    """``options`` and ``levels`` are onnxruntime's SessionOptions and GraphOptimizationLevel."""
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    # it would make other operators of weights that are stored in 8 bits
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # the level above (all) widens half-precision constants at load (onnxruntime's
    # FuseFp16InitializerToFp32Node); older releases have no level of layouts alone
    if hasattr(levels, "ORT_ENABLE_LAYOUT"):
        options.graph_optimization_level = levels.ORT_ENABLE_LAYOUT
    else:
        options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED


def run_onnx(graph: Graph, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """One run of a graph: the arrays of ``outputs``, in their order. Raises RuntimeFailure."""
    try:
        return graph.run(outputs, feeds)
    except Exception as error:  # see open_onnx
        raise RuntimeFailure(
            f"onnxruntime failed while running an encoder: {first_line(error)}"
        ) from error


class BoundGraph(Protocol):
    """What a context asks of an ``onnxruntime.InferenceSession``."""

    def io_binding(self) -> Any: ...


def version() -> str:
    """``onnxruntime 1.32.0``."""
    return f"onnxruntime {_decoders_runtime().__version__}"


def _decoders_runtime() -> Any:
    """onnxruntime, new enough for a decoder. Raises MissingExtra, UsageError."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("The ONNX engine", "onnx") from None
    found = tuple(int(part) for part in onnxruntime.__version__.split(".")[:3] if part.isdigit())
    if found < OLDEST_FOR_DECODERS:
        oldest = ".".join(map(str, OLDEST_FOR_DECODERS))
        raise UsageError(
            f"onnxruntime {onnxruntime.__version__} is installed; the ONNX engine needs {oldest} "
            f"or newer: pip install -U 'onnxruntime>={oldest}', or load with engine='llama'"
        )
    return onnxruntime


def open_decoder(path: Path, *, n_threads: int, save_packed: Path | None = None) -> BoundGraph:
    """Load a decoder's graph, which was checked (graph_file.py), on the CPU. Activations come
    from an arena, which :func:`run_options` empties behind each run: from the heap they leave gaps
    (an E2B's prefill took 560 MiB of its own, not 200). ``save_packed``: write it with packed
    weights there, its data in a file of the same name and ``.data``. Raises BundleError,
    MissingExtra, UsageError.
    """
    onnxruntime = _decoders_runtime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # a cancelled run is logged as an error
    options.enable_cpu_mem_arena = True
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if save_packed is not None:
        options.optimized_model_filepath = str(save_packed)
        for key, value in (
            ("optimized_model_external_initializers_file_name", f"{save_packed.name}.data"),
            ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
            ("save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(f"session.{key}", value)
    try:
        session: BoundGraph = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # see open_onnx
        raise BundleError(f"onnxruntime cannot open {path}: {first_line(error)}") from error
    return session


def probe_logits(graph: Any) -> np.ndarray:
    """What a decoder's graph answers to one row at the beginning. Raises RuntimeFailure."""
    feeds: dict[str, np.ndarray] = {}
    for value in graph.get_inputs():
        shape = [side if isinstance(side, int) else 1 for side in value.shape]
        if value.name.startswith("past_key_values."):
            shape[2] = 0
        if value.type == "tensor(int64)":
            feeds[value.name] = np.ones(shape, np.int64)
        else:
            feeds[value.name] = np.full(shape, 0.5, np.float32)
    return run_onnx(graph, ["logits"], feeds)[0]


def run_options(*, empties_arena: bool) -> Any:
    """Options of a run; ``terminate = True`` stops one, from any thread. An arena that is emptied
    keeps nothing of what the largest prefill took; behind a single token it is not worth its time.
    """
    options = _decoders_runtime().RunOptions()
    if empties_arena:
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    options.log_severity_level = 4
    return options


def run_bound(graph: Any, binding: Any, options: Any) -> None:
    """One run over bound memory. Raises RuntimeFailure, also where it was stopped."""
    try:
        graph.run_with_iobinding(binding, options)
    except Exception as error:  # see open_onnx
        raise RuntimeFailure(
            f"onnxruntime failed while running the decoder: {first_line(error)}"
        ) from error
