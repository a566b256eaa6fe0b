"""Bundles that hear, for tests: the reference Gemma 3n's language and audio tensors, without its
vision tower.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from checkpoints import REFERENCE, write_checkpoint
from edge_gemma.convert.audio import write_audio_encoder
from edge_gemma.convert.checkpoint import Checkpoint

from edge_gemma.bundles.folder import Bundle, BundleWriter, file_entry
from edge_gemma.bundles.manifest import DecoderPart, Manifest, Source


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


def encoder_bundle(checkpoint: Checkpoint, out: Path, precision: str = "f32") -> Bundle:
    """A bundle with a real audio encoder; its decoder is only a name, for what never decodes."""
    with BundleWriter(out) as writer:
        stand_in = b"not read by these tests"
        part = write_audio_encoder(checkpoint, writer.folder, precision)
        (writer.folder / "decoder.gguf").write_bytes(stand_in)
        dimensions = dict(
            n_layer=1,
            n_embd=part.n_embd,
            n_ff=1,
            n_head=1,
            n_head_kv=1,
            head_dim=1,
            n_vocab=1024,
            n_ctx_train=1024,
            sliding_window=64,
        )
        manifest = Manifest(
            name="encoder-only",
            family="gemma3n",
            instruct=False,
            decoder=DecoderPart(
                file="decoder.gguf",
                kv_layers=("global",),
                header_bytes=len(stand_in),
                header_sha256=hashlib.sha256(stand_in).hexdigest(),
                **dimensions,
            ),
            source=Source(origin="tests"),
            files={
                path.name: file_entry(path)
                for path in writer.folder.iterdir()
                if not path.name.startswith(".")
            },
            audio=part,
        )
        return writer.commit(manifest)


def hearing_bundle(folder: Path) -> Bundle:
    """The reference Gemma 3n without vision, whole: F32 decoder and F32 audio encoder."""
    from edge_gemma.convert.pipeline import Conversion, convert

    checkpoint = write_checkpoint(
        "g3n", folder / "checkpoint", keep=lambda name: "vision" not in name
    )
    return convert(
        checkpoint, folder / "bundle", Conversion(quant="f32", audio="f32", verify=False)
    ).bundle
