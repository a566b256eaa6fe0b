"""Which engine runs a bundle, and what it refuses.

In: a manifest and a request. Out: "llama" (the GGUF, by llama.cpp) or "onnx" (``decoder.onnx``, by
onnxruntime). What an engine cannot do is refused here by name, before anything is loaded.
"""

from __future__ import annotations

from edge_gemma.bundles.manifest import Manifest, OnnxPart
from edge_gemma.errors import UnsupportedModel, UsageError
from edge_gemma.plan.records import Engine, PlanRequest

ENGINES = ("auto", "llama", "onnx")
ONNX_KV_TYPE = "f32"  # of its cache, by ggml's name in lower case


def engine_for(manifest: Manifest, request: PlanRequest) -> Engine:
    """The engine of a request. ``auto`` is llama.cpp, which does all that is offered; nothing is
    measured for the choice yet. Raises UsageError, UnsupportedModel.
    """
    if request.engine not in ENGINES:
        raise UsageError(
            f"the engine {request.engine!r} is unknown; expected one of {', '.join(ENGINES)}"
        )
    if request.engine != "onnx":
        return "llama"
    _check_onnx(manifest, request)
    return "onnx"


def onnx_part(manifest: Manifest) -> OnnxPart:
    """The bundle's decoder for onnxruntime. Raises UsageError where it has none."""
    if manifest.onnx is None:
        raise UsageError(
            f"{manifest.name} holds no ONNX decoder; convert it with --decoder both, or load with "
            "engine='llama'"
        )
    return manifest.onnx


def _check_onnx(manifest: Manifest, request: PlanRequest) -> None:
    part = onnx_part(manifest)
    if request.n_ctx is not None and request.n_ctx > part.n_positions:
        raise UsageError(
            f"a context of {request.n_ctx} tokens was asked for; the ONNX decoder of "
            f"{manifest.name} takes {part.n_positions}"
        )
    not_here = {
        f"KV cache in {request.kv_type}, its own is in float32": request.kv_type,
        "LoRA files: merge the adapter while converting (--adapter)": request.lora_bytes,
        "layers on a GPU": request.n_gpu_layers,
        "choice of repacked weights: it packs them all": request.repack is not None,
        "scoring candidates again": request.rescore,
        "hearing first: its packed weights cannot be let go": request.encoders == "hear first",
    }
    for name, asked in not_here.items():
        if asked:
            raise UsageError(f"the ONNX engine has no {name}; leave it out or use engine='llama'")
    is_looking = manifest.family == "gemma3" and "vision" in (request.senses or ())
    if is_looking and not part.takes_masks:
        raise UnsupportedModel(
            f"rows of a Gemma 3's picture attend to each other, which {part.file} of "
            f"{manifest.name} cannot: it was written before that was possible, or without the "
            "vision encoder; convert again, or use engine='llama'"
        )
