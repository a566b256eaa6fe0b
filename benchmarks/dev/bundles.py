"""The models that presets name, made with random weights when first asked for.

In: a name (``1b 4b e2b e2b-tied e4b hear-e2b see-e2b siglip-f16 mobilenetv5-int8 270m-bf16 …``) and
a folder to keep them in. Out: a bundle, a folder with a vision encoder, or a checkpoint. ``small``
makes models of a few MB under the same names: they show that a benchmark runs, not what it
measures. What it does not know: benchmarks.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from edge_gemma.benchmarks.dev import models, shapes
from edge_gemma.benchmarks.dev.synthetic import SHAPES, Types, full_gguf, tiny_gguf
from edge_gemma.bundles.folder import Bundle, BundleWriter, file_entry
from edge_gemma.bundles.manifest import (
    MANIFEST,
    AudioPart,
    DecoderPart,
    Manifest,
    Source,
    VisionPart,
)
from edge_gemma.errors import UsageError

if TYPE_CHECKING:
    from edge_gemma.convert.checkpoint import Checkpoint

Note = Callable[[str], None]
AudioPrecision = Literal["f32", "f16", "int8", "int8-block", "int4-block"]
SEPARATE_HEAD = Types(head="q4_0", embed="q8_0")
PRECISIONS = ("f32", "f16", "int8")
# a random decoder's vocabulary need not name the tokens around sound and pictures
START_OF_IMAGE, END_OF_IMAGE, START_OF_AUDIO = 255999, 256000, 256000

SMALL_AUDIO = {
    "hidden_size": 64,
    "conf_num_hidden_layers": 1,
    "conf_num_attention_heads": 2,
    "sscp_conv_channel_size": [8, 4],
}
SMALL_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
}
SMALL_N_SOFT, SMALL_N_EMBD, SMALL_N_VOCAB = 16, 256, 4096


def make(name: str, work: Path, *, small: bool = False, note: Note = lambda text: None) -> Path:
    """The folder of a model, kept in ``work``. Raises UsageError for a name that is not known."""
    return Maker(work / "small" if small else work, small, note).make(name)


class Maker:
    def __init__(self, work: Path, small: bool, note: Note):
        self.work, self.small, self.note = work, small, note
        work.mkdir(parents=True, exist_ok=True)

    def make(self, name: str) -> Path:
        size, _, kind = name.partition("-")
        if size in shapes.TOWER_PX and kind in PRECISIONS:
            return self._encoder(size, kind)
        if size in ("hear", "see") and kind in SHAPES:
            return self._bundle(name, lambda out: self._with_encoder(size, kind, out))
        if name == "270m-bf16":
            return self._checkpoint(name)
        if size in SHAPES and kind in ("", "tied"):
            return self._bundle(name, lambda out: self._import(name, out))
        raise UsageError(
            f"no model {name!r} to make; there are {', '.join(SHAPES)}, any of them with -tied, "
            "hear- or see- before e2b and e4b, siglip- and mobilenetv5- before a precision, "
            "270m-bf16"
        )

    def _bundle(self, name: str, write: Callable[[Path], object]) -> Path:
        folder = self.work / f"{name}-bundle"
        if not (folder / MANIFEST).is_file():
            self.note(f"making {folder}")
            write(folder)
        return folder

    # --- decoders ---

    def gguf(self, name: str) -> Path:
        path = self.work / f"{name}.gguf"
        if path.exists():
            return path
        self.note(f"making {path}")
        size, _, layout = name.partition("-")
        gemma3n = SHAPES[size].family == "gemma3n"
        types = SEPARATE_HEAD if gemma3n and layout != "tied" else Types()
        if self.small:
            n_vocab = SMALL_N_VOCAB
            return tiny_gguf(path, SHAPES[size].family, types=types, n_vocab=n_vocab)
        return full_gguf(path, size, types)

    def _import(self, name: str, out: Path) -> None:
        from edge_gemma.store.importer import import_gguf

        import_gguf(self.gguf(name), out, name=name)

    def _checkpoint(self, name: str) -> Path:
        from edge_gemma.benchmarks.dev.real_checkpoint import write_checkpoint
        from edge_gemma.benchmarks.dev.sample import sample_gguf

        folder = self.work / name
        if not (folder / "tokenizer.model").is_file():
            self.note(f"making {folder}")
            write_checkpoint(self.gguf("270m") if self.small else sample_gguf(), folder)
        return folder

    # --- encoders ---

    def tower(self, kind: str, n_embd: int | None = None) -> Path:
        """The checkpoint of a vision tower, or of the ``audio`` tower."""
        folder = self.work / (f"{kind}-{n_embd}" if n_embd else kind)
        if (folder / "config.json").is_file():
            return folder
        self.note(f"making {folder}")
        if kind == "audio":
            changes = SMALL_AUDIO if self.small else {}
            config = shapes.audio_config(**changes)
            return models.write_audio_tower(folder, config=config, n_embd=n_embd or 2048)
        if not self.small:
            return models.write_vision_tower(kind, folder, n_embd=n_embd)
        config = shapes.vision_config("siglip") | SMALL_SIGLIP
        return models.write_vision_tower(
            "siglip", folder, n_embd=n_embd or SMALL_N_EMBD, config=config, n_soft=SMALL_N_SOFT
        )

    def _encoder(self, kind: str, precision: str) -> Path:
        from edge_gemma.convert.checkpoint import Checkpoint
        from edge_gemma.convert.vision import write_vision_encoder

        folder = self.work / f"{kind}-{precision}"
        if not folder.exists():
            checkpoint = Checkpoint.open(self.tower(kind))
            with tempfile.TemporaryDirectory(dir=self.work) as partial:
                write_vision_encoder(checkpoint, Path(partial), precision)
                shutil.copytree(partial, folder)
        return folder

    def _with_encoder(self, sense: str, size: str, out: Path) -> None:
        decoder = Bundle.open(self.make(size))
        n_embd = decoder.manifest.decoder.n_embd
        if sense == "hear":
            add_audio(decoder, self.tower("audio", n_embd), out)
        else:
            kind = "mobilenetv5" if decoder.manifest.family == "gemma3n" else "siglip"
            add_vision(decoder, self.tower(kind, n_embd), out)


def audio_encoder_bundle(
    checkpoint: Checkpoint, out: Path, precision: AudioPrecision = "f32"
) -> Bundle:
    """A checkpoint's audio encoder; the decoder is only a name, for what never decodes."""
    from edge_gemma.convert.audio import write_audio_encoder

    with BundleWriter(out) as writer:
        part = write_audio_encoder(checkpoint, writer.folder, precision)
        return writer.commit(_encoder_only(writer.folder, part))


def vision_encoder_bundle(checkpoint: Checkpoint, out: Path, precision: str = "f32") -> Bundle:
    """A checkpoint's vision encoder; the decoder is only a name, for what never decodes."""
    from edge_gemma.convert.vision import write_vision_encoder

    with BundleWriter(out) as writer:
        part = write_vision_encoder(checkpoint, writer.folder, precision)
        return writer.commit(_encoder_only(writer.folder, part))


def _encoder_only(folder: Path, part: AudioPart | VisionPart) -> Manifest:
    stand_in = b"never read"
    (folder / "decoder.gguf").write_bytes(stand_in)
    decoder = DecoderPart(
        file="decoder.gguf",
        kv_layers=("global",),
        header_bytes=len(stand_in),
        header_sha256=hashlib.sha256(stand_in).hexdigest(),
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
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    siglip = isinstance(part, VisionPart) and part.kind == "siglip"
    return Manifest(
        name="encoder-only",
        family="gemma3" if siglip else "gemma3n",
        instruct=False,
        decoder=decoder,
        source=Source(origin="benchmarks/dev"),
        files={path.name: file_entry(path) for path in found},
        audio=part if isinstance(part, AudioPart) else None,
        vision=part if isinstance(part, VisionPart) else None,
    )


def add_audio(decoder: Bundle, tower: Path, out: Path) -> None:
    """A bundle of ``decoder`` (its file is linked) and the audio tower of a checkpoint, as int8."""
    from edge_gemma.convert.audio import write_audio_encoder
    from edge_gemma.convert.checkpoint import Checkpoint

    with BundleWriter(out) as writer:
        part = write_audio_encoder(Checkpoint.open(tower), writer.folder, "int8")
        names = ("end_of_audio", "audio_padding")
        rows = np.random.default_rng(1).standard_normal((2, part.n_embd), np.float32)
        tokens = {"start_of_audio": START_OF_AUDIO}
        writer.commit(_joined(writer.folder, decoder, part, names, rows, tokens))


def add_vision(decoder: Bundle, tower: Path, out: Path) -> None:
    """A bundle of ``decoder`` (its file is linked) and the vision tower of a checkpoint, as f16.
    Raises UsageError when their widths differ.
    """
    from edge_gemma.convert.checkpoint import Checkpoint
    from edge_gemma.convert.special_rows import hard_rows
    from edge_gemma.convert.vision import write_vision_encoder

    checkpoint, embedder = Checkpoint.open(tower), "model.embed_vision."
    with BundleWriter(out) as writer:
        part = write_vision_encoder(checkpoint, writer.folder, "f16")
        if part.n_embd != decoder.manifest.decoder.n_embd:
            raise UsageError(
                f"the tower gives rows {part.n_embd} wide, {decoder.manifest.name} takes "
                f"{decoder.manifest.decoder.n_embd}; write the tower with --n-embd "
                f"{decoder.manifest.decoder.n_embd}"
            )
        names: tuple[str, ...] = ()
        rows = np.zeros((0, part.n_embd), np.float32)
        if embedder + "hard_embedding_norm.weight" in checkpoint.names():
            names = ("end_of_image",)
            rows = hard_rows(checkpoint, embedder, [0]).astype(np.float32)
        elif decoder.manifest.family == "gemma3n":  # small: a SigLIP stands in for its own tower
            names = ("end_of_image",)
            rows = np.random.default_rng(1).standard_normal((1, part.n_embd), np.float32)
        tokens = {"start_of_image": START_OF_IMAGE, "end_of_image": END_OF_IMAGE}
        writer.commit(_joined(writer.folder, decoder, part, names, rows, tokens))


def _joined(
    folder: Path,
    decoder: Bundle,
    part: AudioPart | VisionPart,
    row_names: tuple[str, ...],
    rows: np.ndarray,
    tokens: dict[str, int],
) -> Manifest:
    """The manifest of what lies in ``folder`` after the decoder and the special rows were added."""
    base = decoder.manifest
    target = folder / base.decoder.file
    target.hardlink_to(decoder.decoder_path)
    if row_names:
        np.save(folder / "special_rows.npy", rows)
    last = base.decoder.n_vocab - 1
    tokens = {name: min(id, last) for name, id in tokens.items()} | base.special_tokens
    for name in row_names:
        tokens.pop(name, None)  # a row stands for it
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    senses = "ears" if isinstance(part, AudioPart) else "eyes"
    return msgspec.structs.replace(
        base,
        name=f"{base.name} with {senses}",
        audio=part if isinstance(part, AudioPart) else None,
        vision=part if isinstance(part, VisionPart) else None,
        special_rows=row_names,
        special_tokens=tokens,
        files={path.name: file_entry(path) for path in found},
    )
