"""Checkpoint → bundle in one pass: read, map, quantize, write, verify.

The order of everything ``edge-gemma convert`` does.

In: a checkpoint folder and :class:`Conversion`. Out: a bundle that exists whole or not at all.
:func:`prepare` decides everything without reading a weight (that is also the dry run);
:func:`convert` then does exactly that. A conversion that was killed leaves a hidden folder beside
the output, which the next run for the same output removes.
"""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from edge_gemma.convert.checkpoint import Checkpoint
from edge_gemma.convert.decoder import CHUNK_VALUES, Layout, plan_layout, write_decoder
from edge_gemma.convert.gemma import TOWERS, Mapping, map_tensors, read_dims
from edge_gemma.convert.recipe import Recipe, choose_types, read_recipe
from edge_gemma.convert.vocabulary import Vocabulary, read_vocabulary

from edge_gemma.bundles.description import describe
from edge_gemma.bundles.folder import Bundle, BundleWriter, file_entry
from edge_gemma.bundles.manifest import Manifest, Source
from edge_gemma.errors import CheckpointError, RuntimeFailure, UsageError
from edge_gemma.units import MiB, format_bytes

DECODER = "decoder.gguf"
SPECIAL_ROWS = "special_rows.npy"
# Rows the decoder needs beside the towers' output: (manifest's name, embedder, index in its hard
# table, None = the last)
_HARD_ROWS = (
    ("end_of_image", "model.embed_vision.", 0),
    ("end_of_audio", "model.embed_audio.", 0),
    ("audio_padding", "model.embed_audio.", None),
)
# our names for the ids that config.json gives; the first key that is there counts (Gemma 3 spells
# them …_index)
_CONFIG_TOKENS = {
    "start_of_image": ("boi_token_id", "boi_token_index"),
    "end_of_image": ("eoi_token_id", "eoi_token_index"),
    "image_soft": ("image_token_id", "image_token_index"),
    "start_of_audio": ("boa_token_id",),
    "end_of_audio": ("eoa_token_id",),
    "audio_soft": ("audio_token_id",),
}
_BASE_MEMORY = (
    180 * MiB
)  # Python, numpy and libggml-base, and a vocabulary of 262,144 tokens while it is read


@dataclass(frozen=True)
class Conversion:
    """``audio`` and ``vision``: a precision, "none", or None for the default where the checkpoint
    has the tower.
    """

    quant: str | Recipe = "q4_k_m"  # a recipe's name, a .toml file, or the recipe itself
    imatrix: Path | None = None
    slice: str | None = None  # "e2b" or a .toml file
    merge: tuple[
        tuple[Path, float], ...
    ] = ()  # LoRA adapters folded into the weights, with their scale
    audio: str | None = None
    vision: str | None = None
    name: str | None = None
    overwrite: bool = False
    n_threads: int = 0  # 0: all cores
    verify: bool = True
    check: Path | None = (
        None  # a text: put a quality receipt against the unquantized weights into the manifest
    )
    check_tokens: int = 0  # at most so many; 0: the whole text

    def threads(self) -> int:
        if self.n_threads < 0:
            raise UsageError(f"--threads must be positive, got {self.n_threads}")
        return (
            self.n_threads or len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else self.n_threads or os.cpu_count() or 1
        )


@dataclass(frozen=True)
class Prepared:
    """Everything that is decided before a weight is read."""

    checkpoint: Checkpoint
    tensors: object  # what answers read(name, rows): the checkpoint, or one with adapters merged in
    recipe: Recipe
    mapping: Mapping
    types: dict[str, str]
    vocabulary: Vocabulary
    layout: Layout
    importance: dict[str, np.ndarray]
    notes: tuple[str, ...]
    towers: dict[str, str]  # audio | vision → precision

    @property
    def disk_bytes(self) -> int:
        """What the output will take: exact for the decoder, the towers' weights by their precision."""
        return self.layout.total_bytes + sum(self.tower_bytes(tower) for tower in self.towers)

    def tower_bytes(self, tower: str) -> int:
        per_value = {"f32": 4.0, "f16": 2.0, "int8": 1.05, "int8-block": 1.15, "int4-block": 0.65}[
            self.towers[tower]
        ]
        values = sum(
            np.prod(entry.shape, dtype=np.int64)
            for name, entry in self.checkpoint.entries.items()
            if _tower_of(name) == tower
        )
        return int(values * per_value) + MiB

    def memory_bytes(self, n_threads: int) -> int:
        """An estimate of the peak: what is in flight is a few chunks of float32 rows and what
        becomes of them.
        """
        return _BASE_MEMORY + len(self.layout.header) + (n_threads + 1) * CHUNK_VALUES * 4 * 3


@dataclass(frozen=True)
class Report:
    """What a conversion tells while it runs; every field may be left out."""

    total: Callable[[int], None] = lambda n_bytes: None
    advance: Callable[[int], None] = lambda n_bytes: None
    stage: Callable[[str], None] = lambda text: None
    note: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Result:
    bundle: Bundle
    seconds: float
    notes: tuple[str, ...]
    skipped: dict[str, str]
    sample: str | None = None  # what the new model says when asked for a few tokens
    extra: dict = field(default_factory=dict)


def prepare(folder: str | Path, options: Conversion) -> Prepared:
    """Decide and check everything; nothing is written. Raises CheckpointError, UnsupportedModel,
    UsageError.
    """
    recipe = options.quant if isinstance(options.quant, Recipe) else read_recipe(options.quant)
    checkpoint = Checkpoint.open(folder)
    dims = read_dims(checkpoint.config)
    cut = None
    if options.slice:
        from edge_gemma.convert.matformer import read_cut

        cut = read_cut(options.slice, dims)
    mapping = map_tensors(checkpoint, dims, cut, untied=recipe.untied)
    tensors = checkpoint
    if options.merge:
        from edge_gemma.convert.lora import Merged

        tensors = Merged(checkpoint, dims, options.merge)
    importance = {}
    if options.imatrix:
        from edge_gemma.convert.imatrix import read_importance

        importance = read_importance(Path(options.imatrix), mapping)
    types, notes = choose_types(recipe, mapping, has_imatrix=bool(options.imatrix))
    if options.imatrix:
        quantized = [
            source.name
            for source in mapping.sources
            if source.use == "matmul" and types[source.name] not in ("F32", "F16", "BF16")
        ]
        notes += [
            f"{name}: no importance in {Path(options.imatrix).name}, quantized without"
            for name in quantized
            if name not in importance
        ]
    vocabulary = read_vocabulary(checkpoint.folder, checkpoint.config, dims.n_vocab)
    name = options.name or checkpoint.folder.resolve().name
    layout = plan_layout(
        mapping.dims, mapping.sources, types, vocabulary, name=name, file_type=recipe.file_type
    )
    towers = _towers(checkpoint, options)
    return Prepared(
        checkpoint,
        tensors,
        recipe,
        mapping,
        types,
        vocabulary,
        layout,
        importance,
        tuple(notes),
        towers,
    )


def _tower_of(name: str) -> str | None:
    return next((tower for prefix, tower in TOWERS.items() if name.startswith(prefix)), None)


def _towers(checkpoint: Checkpoint, options: Conversion) -> dict[str, str]:
    there = {
        _tower_of(name)
        for name in checkpoint.names()
        if name.startswith(("model.audio_tower.", "model.vision_tower."))
    }
    chosen = {}
    for tower, wanted in (("audio", options.audio), ("vision", options.vision)):
        allowed = {
            "audio": ("f32", "f16", "int8", "int8-block", "int4-block"),
            "vision": ("f32", "f16", "int8"),
        }[tower]
        if wanted not in (None, "none", *allowed):
            expected = ", ".join(("none", *allowed))
            raise UsageError(f"--{tower}-encoder {wanted}: expected one of {expected}")
        if wanted not in (None, "none") and tower not in there:
            what = f"{checkpoint.folder} has no {tower} tower"
            raise UsageError(f"--{tower}-encoder {wanted}: {what}")
        if tower in there and wanted != "none":
            chosen[tower] = wanted or "int8"
    return chosen


def convert(
    folder: str | Path,
    out: str | Path,
    options: Conversion = Conversion(),
    report: Report = Report(),
) -> Result:
    """Convert a checkpoint into the bundle ``out``.

    Raises CheckpointError, UnsupportedModel, UsageError, RuntimeFailure (the disk).

    >>> result = convert(getfixture("tiny_checkpoint"), getfixture("tmp_path") / "bundle", Conversion(quant="q8_0"))
    >>> result.bundle.manifest.family, result.bundle.manifest.recipe["name"]
    ('gemma3', 'q8_0')
    """
    started = time.perf_counter()
    with BundleWriter(
        out, overwrite=options.overwrite
    ) as writer:  # first of all: an output that exists is refused at once
        prepared = prepare(folder, options)
        _check_disk(prepared, writer.folder, options)
        for note in prepared.notes:
            report.note(note)
        report.total(prepared.layout.total_bytes)
        report.stage("decoder")
        path = writer.folder / DECODER
        entry = write_decoder(
            path,
            prepared.layout,
            prepared.tensors,
            importance=prepared.importance,
            n_threads=options.threads(),
            progress=report.advance,
        )
        files = {DECODER: entry}
        special_rows = _write_special_rows(prepared.checkpoint, writer.folder)
        towers = {
            tower: _write_tower(tower, prepared, writer.folder, report) for tower in prepared.towers
        }
        for extra in sorted(writer.folder.iterdir()):
            if extra.name != DECODER and not extra.name.startswith("."):
                files[extra.name] = file_entry(extra)
        report.stage("check")
        quality = _receipt(prepared, options, path, report) if options.check else None
        manifest = _manifest(prepared, options, path, files, special_rows, towers, quality)
        if options.verify:
            from edge_gemma.engines.llama.library import (
                check_loads,  # late: starts a child process with llama.cpp
            )

            check_loads(path)
        bundle = writer.commit(manifest)
    seconds = time.perf_counter() - started
    sample = None
    if options.verify:
        from edge_gemma.convert.quality import try_out

        report.stage("verify")
        bundle.verify()
        sample = try_out(bundle)
    return Result(bundle, seconds, prepared.notes, prepared.mapping.skipped, sample)


def _receipt(prepared: Prepared, options: Conversion, path: Path, report: Report) -> dict:
    """Quality against the same weights in bf16, written beside for the time it takes."""
    from edge_gemma.convert.quality import compare

    reference = path.with_name(".reference.gguf")
    write_decoder(
        reference, _reference_layout(prepared), prepared.tensors, n_threads=options.threads()
    )
    report.stage("receipt")
    receipt = compare(
        reference,
        {"new": path},
        Path(options.check),
        max_tokens=options.check_tokens,
        n_threads=options.threads(),
    )["new"]
    reference.unlink()
    return receipt.table()


def _reference_layout(prepared: Prepared) -> Layout:
    types, _ = choose_types(read_recipe("bf16"), prepared.mapping)
    return plan_layout(
        prepared.mapping.dims,
        prepared.mapping.sources,
        types,
        prepared.vocabulary,
        name="reference",
        file_type=32,
    )


def _check_disk(prepared: Prepared, folder: Path, options: Conversion) -> None:
    free, needed = (
        shutil.disk_usage(folder).free,
        prepared.disk_bytes
        + 16 * MiB
        + (_reference_layout(prepared).total_bytes if options.check else 0),
    )
    if free < needed:
        raise RuntimeFailure(
            f"the bundle needs {format_bytes(needed)} on disk, {folder.parent} has "
            f"{format_bytes(free)} free; choose another folder or a smaller recipe"
        )


def _write_special_rows(checkpoint: Checkpoint, folder: Path) -> tuple[str, ...]:
    """special_rows.npy [n, n_embd] float32: the hard embeddings that the token table does not hold
    right (Gemma 3n only).
    """
    wanted = [
        (name, embedder, index)
        for name, embedder, index in _HARD_ROWS
        if f"{embedder}hard_embedding_norm.weight" in checkpoint
    ]
    if not wanted:
        return ()
    from edge_gemma.convert.audio import hard_rows

    rows = [
        hard_rows(
            checkpoint,
            embedder,
            [checkpoint.shape(f"{embedder}embedding.weight")[0] - 1 if index is None else index],
        )
        for _, embedder, index in wanted
    ]
    np.save(folder / SPECIAL_ROWS, np.concatenate(rows).astype(np.float32))
    return tuple(name for name, _, _ in wanted)


def _write_tower(tower: str, prepared: Prepared, folder: Path, report: Report):
    report.stage(f"{tower} encoder")
    try:
        module = importlib.import_module(f".{tower}", __package__)
    except ImportError as error:
        raise RuntimeFailure(
            f"cannot write the {tower} encoder: {error}. pip install 'edge-gemma[convert]', "
            f"or --{tower}-encoder none"
        ) from None
    return getattr(module, f"write_{tower}_encoder")(
        prepared.checkpoint, folder, prepared.towers[tower]
    )


def _manifest(
    prepared: Prepared,
    options: Conversion,
    path: Path,
    files: dict,
    special_rows: tuple[str, ...],
    towers: dict,
    quality: dict | None,
) -> Manifest:
    description = describe(path)  # what the runtime will read there, by the code that it reads with
    config = prepared.checkpoint.config
    tokens = dict(description.special_tokens)
    for name, keys in _CONFIG_TOKENS.items():
        value = next((config[key] for key in keys if type(config.get(key)) is int), None)
        if value is not None:
            if not 0 <= value < description.decoder.n_vocab:
                raise CheckpointError(
                    f"config.json gives {name} the id {value}, outside the vocabulary of "
                    f"{description.decoder.n_vocab}"
                )
            tokens[name] = value
    recipe = {
        "name": prepared.recipe.name,
        "matrix": prepared.recipe.matrix,
        "head": prepared.recipe.head,
        "kept": prepared.recipe.kept,
    }
    recipe |= {key: value for key in ("lookup", "ple") if (value := getattr(prepared.recipe, key))}
    if options.imatrix:
        recipe["imatrix"] = Path(options.imatrix).name
    if options.slice:
        recipe["slice"] = Path(options.slice).name
    if options.merge:
        recipe["merged"] = ", ".join(
            f"{Path(folder).name} × {scale:g}" for folder, scale in options.merge
        )
    return Manifest(
        name=description.name,
        family=description.family,
        instruct=description.chat_template is not None,
        decoder=description.decoder,
        source=Source(origin=prepared.checkpoint.folder.resolve().name, tool="edge-gemma convert"),
        files=files,
        chat_template=description.chat_template,
        special_tokens=tokens,
        special_rows=special_rows,
        audio=towers.get("audio"),
        vision=towers.get("vision"),
        recipe=recipe,
        quality=quality,
    )
