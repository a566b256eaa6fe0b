"""Pictures, towers and bundles that see, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from checkpoints import REFERENCE, write_checkpoint

from edge_gemma.benchmarks.dev.bundles import vision_encoder_bundle

encoder_bundle = vision_encoder_bundle

# a MobileNetV5 of narrow blocks: every kind of block of the real one, in its order (timm's
# notation)
TINY_BLOCKS = [
    ["er_r1_k3_s2_e4_c16", "er_r1_k3_s1_e4_c16"],
    ["uir_r1_a3_k5_s2_e6_c32", "uir_r1_a5_k0_s1_e4_c32"],
    [
        "uir_r1_a5_k5_s2_e6_c48",
        "uir_r1_a0_k0_s1_e1_c48",
        "mqa_r1_k3_h3_v2_s1_d16_c48",
        "uir_r1_a0_k0_s1_e2_c48",
    ],
    ["uir_r1_a5_k5_s2_e6_c64", "mqa_r1_k3_h2_s1_d24_c64", "uir_r1_a0_k0_s1_e2_c64"],
]
TINY_EMBED = {
    "model.embed_vision.embedding.weight": [128, 2048],
    "model.embed_vision.hard_embedding_norm.weight": [2048],
    "model.embed_vision.soft_embedding_norm.weight": [2048],
    "model.embed_vision.embedding_projection.weight": [64, 2048],
}


def picture(seed: int, height: int = 480, width: int = 640) -> np.ndarray:
    """The reference picture of a seed: gradients, waves and noise, ``[height, width, 3]`` uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack(
        [255 * x / width, 255 * y / height, 127 + 127 * np.sin((x + y) / 37)], -1
    ) + rng.normal(0, 8, (height, width, 3))
    return values.clip(0, 255).astype(np.uint8)


def squeezed(pixels: np.ndarray, size: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    """What the encoder is given, written out apart from the package: ``[1, 3, size, size]``
    float32.
    """
    from PIL import Image

    small = np.asarray(Image.fromarray(pixels).resize((size, size), Image.BILINEAR)).astype(
        np.float32
    )
    return (small.transpose(2, 0, 1)[None] / 255 - mean) / std


def reference(name: str) -> dict[str, np.ndarray]:
    """NAME-vision.npz: what transformers and timm computed (reference/make_vision.py)."""
    with np.load(REFERENCE / f"{name}-vision.npz") as data:
        return dict(data)


def tower_checkpoint(name: str, folder: Path):
    """The vision tensors of a recipe (g3mm, g3n, or the tiny mnv5) as an opened checkpoint."""
    from edge_gemma.convert.checkpoint import Checkpoint

    recipe = (
        json.loads(str(reference("mnv5")["recipe"]))
        if name == "mnv5"
        else {"g3n": "g3n-vision"}.get(name, name)
    )
    return Checkpoint.open(
        write_checkpoint(
            recipe, folder, keep=lambda tensor: "vision" in tensor or "multi_modal" in tensor
        )
    )
