"""A bundle's weights by the engine that its plan names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edge_gemma.bundles.folder import Bundle
from edge_gemma.engines.engine import Weights
from edge_gemma.engines.llama.weights import Weights as LlamaWeights
from edge_gemma.engines.onnx.weights import Weights as OnnxWeights
from edge_gemma.plan.records import Plan


def open_weights(
    bundle: Bundle,
    plan: Plan,
    lora: Sequence[tuple[str | Path, float]] = (),
    on_progress: Callable[[float], bool | None] | None = None,
) -> Weights:
    """Raises BundleError, HashMismatch, MissingExtra, RuntimeFailure, UsageError."""
    if plan.settings.engine == "llama":
        return LlamaWeights(bundle, plan, lora=lora, on_progress=on_progress)
    return OnnxWeights(bundle, plan, on_progress=on_progress)
