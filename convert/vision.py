"""Vision towers → ``vision_encoder.onnx``, straight from weights: SigLIP
and projector (Gemma 3), or MobileNetV5, fusion and embedder (Gemma 3n).

In: a :class:`~edge_gemma.convert.tensors.TensorReader`. Out: the ONNX files
in a folder and the manifest's
:class:`~edge_gemma.bundles.manifest.VisionPart`. One tensor is in memory at
a time. It never imports torch or timm.

The graph takes ``pixels [1, 3, side, side]`` float32 and gives
``soft_tokens [256, n_embd]`` float32.
"""

from __future__ import annotations

from pathlib import Path

from edge_gemma.bundles.manifest import VisionPart
from edge_gemma.convert import mobilenet, siglip
from edge_gemma.convert.channel_last import PRECISIONS
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.errors import CheckpointError, UsageError

FILE = "vision_encoder.onnx"


def write_vision_encoder(
    tensors: TensorReader, folder: Path, precision: str, *, only: str | None = None
) -> VisionPart:
    """Write ``vision_encoder.onnx`` (+ ``.data``) into ``folder``.

    ``only``: a pattern; weights whose names do not match it stay float32
    (to measure one kind of layer at a time). Raises CheckpointError,
    UsageError.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"unknown precision {precision!r} for a vision encoder; choose one of "
            f"{', '.join(PRECISIONS)}, or none"
        )
    for tower in (mobilenet, siglip):
        if tower.FIRST_WEIGHT in tensors.names():
            return tower.write(tensors, Path(folder) / FILE, precision, only)
    if not isinstance(tensors.config.get("vision_config"), dict):
        raise CheckpointError(
            "config.json has no vision_config: this checkpoint has no vision tower"
        )
    raise CheckpointError(
        "the checkpoint has a vision_config but neither SigLIP nor MobileNetV5 tensors; "
        "download it whole"
    )
