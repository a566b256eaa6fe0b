"""Bundles that hear, for tests: the reference Gemma 3n's language and audio tensors, without its
vision tower.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from checkpoints import REFERENCE, write_checkpoint

from edge_gemma.benchmarks.dev.bundles import audio_encoder_bundle
from edge_gemma.bundles.folder import Bundle
from edge_gemma.convert.checkpoint import Checkpoint

encoder_bundle = audio_encoder_bundle


def reference() -> dict[str, np.ndarray]:
    """wave_S, mel_S, audio_soft_S, audio_prompt_S, audio_logits_S for clips of S = 0.9 and 6.3
    seconds, from transformers 5.23.
    """
    with np.load(REFERENCE / "g3n-audio.npz") as data:
        return dict(data)


def audio_checkpoint(folder: Path, **options) -> Checkpoint:
    return Checkpoint.open(
        write_checkpoint("g3n", folder, keep=lambda name: "audio" in name, **options)
    )


def hearing_bundle(folder: Path) -> Bundle:
    """The reference Gemma 3n without vision, whole: F32 decoder and F32 audio encoder."""
    from edge_gemma.convert.pipeline import Conversion, convert

    checkpoint = write_checkpoint(
        "g3n", folder / "checkpoint", keep=lambda name: "vision" not in name
    )
    return convert(
        checkpoint, folder / "bundle", Conversion(quant="f32", audio="f32", verify=False)
    ).bundle
