"""Checkpoint → bundle in one pass: read, map, quantize, write, verify.

The order of everything ``edge-gemma convert`` does.

In: a checkpoint folder and :class:`Conversion`. Out: a bundle that exists
whole or not at all. :func:`prepare` decides everything without reading a
weight (that is also the dry run; an output head is compared with the token
embedding there); :func:`convert` then does exactly that. A
conversion that was killed leaves a hidden folder beside the output, which
the next run for the same output removes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edge_gemma.bundles.description import describe
from edge_gemma.bundles.folder import Bundle, BundleWriter, file_entry
from edge_gemma.bundles.manifest import (
    AudioPart,
    DecoderPart,
    EmbeddingPart,
    Family,
    File,
    Manifest,
    OnnxPart,
    Source,
    VisionPart,
    VocabularyPart,
)
from edge_gemma.convert.checkpoint import Checkpoint
from edge_gemma.convert.decoder import CHUNK_VALUES, Layout, plan_layout, write_decoder
from edge_gemma.convert.embedding import read_embedding
from edge_gemma.convert.gemma import EMBEDDING, TOWERS, Dims, Mapping, map_tensors, read_dims
from edge_gemma.convert.generation_config import Answers, read_answers
from edge_gemma.convert.head import Head, choose_head
from edge_gemma.convert.lora import Merged
from edge_gemma.convert.recipe import Recipe, choose_types, read_recipe
from edge_gemma.convert.special_rows import write_special_rows
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.convert.vocabulary import Vocabulary, read_vocabulary
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.units import MiB, format_bytes

if TYPE_CHECKING:
    from edge_gemma.convert.onnx_weights import OnnxPlan
    from edge_gemma.convert.trim.choice import Wanted
    from edge_gemma.convert.trim.conversion import Trimmed

DECODER = "decoder.gguf"
DECODERS = ("gguf", "both")
ONNX_RECIPE = "q8_0"
DEFAULT_RECIPE: dict[Family, str] = {
    "gemma3": "q4_k_m",
    "gemma3n": "q4_k_m",
    "gemma-embedding": "q8_0",
}
NOT_RUN = (
    "the encoders were written but not run: onnxruntime is not installed (pip install "
    "'edge-gemma[hear,see]')"
)
# our names for the ids that config.json gives; the first key that is there
# counts (Gemma 3 spells them …_index)
_CONFIG_TOKENS = {
    "start_of_image": ("boi_token_id", "boi_token_index"),
    "end_of_image": ("eoi_token_id", "eoi_token_index"),
    "image_soft": ("image_token_id", "image_token_index"),
    "start_of_audio": ("boa_token_id",),
    "end_of_audio": ("eoa_token_id",),
    "audio_soft": ("audio_token_id",),
}
# What transformers' Gemma3Config and Gemma3nConfig assume
_DEFAULT_TOKENS: dict[Family, dict[str, int]] = {
    "gemma3": {"start_of_image": 255999, "end_of_image": 256000, "image_soft": 262144},
    "gemma3n": {
        "start_of_image": 255999,
        "end_of_image": 262144,
        "image_soft": 262145,
        "start_of_audio": 256000,
        "end_of_audio": 262272,
        "audio_soft": 262273,
    },
    "gemma-embedding": {},
}
# What each tower's encoder may be written as
_PRECISIONS = {
    "audio": ("f32", "f16", "int8", "int8-block", "int4-block"),
    "vision": ("f32", "f16", "int8"),
}
_BYTES_PER_VALUE = {"f32": 4.0, "f16": 2.0, "int8": 1.05, "int8-block": 1.15, "int4-block": 0.65}
# Python, numpy and libggml-base, and a vocabulary of 262,144 tokens while
# it is read
_BASE_MEMORY_BYTES = 180 * MiB
_DISK_MARGIN_BYTES = 16 * MiB  # manifest, special rows, block sizes


@dataclass(frozen=True)
class Conversion:
    """``audio`` and ``vision``: a precision, "none", or None for the
    default where the checkpoint has the tower.
    """

    # a recipe's name, a .toml file, or the recipe itself; None: q4_k_m, for a model that embeds
    # q8_0, because every later distance is measured between its vectors
    quant: str | Recipe | None = None
    imatrix: Path | None = None
    # "both" writes decoder.onnx beside the GGUF, by a recipe of types that its operators have
    decoder: str = "gguf"
    onnx_quant: str | Recipe | None = None
    slice: str | None = None  # "e2b" or a .toml file
    trim: Wanted | None = None  # which tokens stay; None: all of them
    merge: tuple[tuple[Path, float], ...] = ()  # LoRA adapters to fold in, with their scale
    audio: str | None = None
    vision: str | None = None
    name: str | None = None
    overwrite: bool = False
    n_threads: int = 0  # 0: all cores
    verify: bool = True
    # A text: put a quality receipt against the unquantized weights into the
    # manifest
    check: Path | None = None
    check_tokens: int = 0  # at most so many; 0: the whole text

    def threads(self) -> int:
        if self.n_threads < 0:
            raise UsageError(f"--threads must be positive, got {self.n_threads}")
        if self.n_threads:
            return self.n_threads
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1


@dataclass(frozen=True)
class Prepared:
    """Everything that is decided before a weight is read."""

    checkpoint: Checkpoint
    tensors: TensorReader  # the checkpoint, or one with adapters merged in
    recipe: Recipe
    mapping: Mapping
    types: dict[str, str]
    vocabulary: Vocabulary
    layout: Layout
    importance: dict[str, np.ndarray]
    notes: tuple[str, ...]
    towers: dict[str, str]  # audio | vision → precision
    answers: Answers
    special_tokens: dict[str, int]  # of pictures and sound
    skipped: dict[str, str]  # stored name → why nothing is made of it
    embedding: EmbeddingPart | None = None
    onnx: OnnxPlan | None = None
    trimmed: Trimmed | None = None  # a vocabulary that is cut

    @property
    def disk_bytes(self) -> int:
        """What the output takes: exact for the decoder, the towers' weights
        by their precision.
        """
        towers = sum(self.tower_bytes(tower) for tower in self.towers)
        return self.decoder_bytes + towers

    @property
    def decoder_bytes(self) -> int:
        return self.layout.total_bytes + (self.onnx.total_bytes if self.onnx else 0)

    def tower_bytes(self, tower: str) -> int:
        n_values = sum(
            prod(entry.shape)
            for name, entry in self.checkpoint.entries.items()
            if _tower_of(name) == tower
        )
        return int(n_values * _BYTES_PER_VALUE[self.towers[tower]]) + MiB

    def memory_bytes(self, n_threads: int) -> int:
        """An estimate of the peak: what is in flight is a few chunks of
        float32 rows and what becomes of them.
        """
        in_flight = (n_threads + 1) * CHUNK_VALUES * 4 * 3
        return _BASE_MEMORY_BYTES + len(self.layout.header) + in_flight


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


def prepare(folder: str | Path, options: Conversion) -> Prepared:
    """Decide and check everything; nothing is written. Raises
    CheckpointError, UnsupportedModel, UsageError.
    """
    if isinstance(options.quant, str):
        read_recipe(options.quant)  # an unknown name is refused before anything is read
    checkpoint = Checkpoint.open(folder)
    dims = read_dims(checkpoint.config)
    recipe = _recipe(options, dims)
    embedding = None
    if dims.family == "gemma-embedding":
        _check_embedding_options(options)
        embedding = read_embedding(checkpoint, dims.n_embd, dims.n_ctx_train)
        dims = replace(dims, dense=embedding.dense)
    notes = list(checkpoint.notes)
    head = Head(False) if embedding else choose_head(checkpoint, dims)
    notes += head.notes
    own_head, tensors = head.separate, _merged(checkpoint, dims, options, notes)
    if isinstance(tensors, Merged):
        own_head |= tensors.separate_head
    mapping = _map(checkpoint, dims, recipe, options.slice, own_head)
    importance: dict[str, np.ndarray] = {}
    types, type_notes = choose_types(recipe, mapping, has_imatrix=bool(options.imatrix))
    notes += type_notes
    if options.imatrix:
        from edge_gemma.convert.imatrix import read_importance

        importance = read_importance(options.imatrix, mapping)
        notes += _unmeasured(mapping, types, importance, options.imatrix.name)
    vocabulary = read_vocabulary(checkpoint.folder, checkpoint.config, dims.n_vocab)
    answers = read_answers(checkpoint.folder, checkpoint.config, vocabulary)
    towers = _towers(checkpoint, options)
    roles, role_notes = _media_tokens(checkpoint.config, dims, towers)
    notes += [*vocabulary.notes, *answers.notes, *role_notes]
    prepared = Prepared(
        checkpoint=checkpoint,
        tensors=tensors,
        recipe=recipe,
        mapping=mapping,
        types=types,
        vocabulary=vocabulary,
        layout=_layout(
            mapping, types, vocabulary, options.name or checkpoint.name, recipe, embedding
        ),
        importance=importance,
        notes=(),
        towers=towers,
        answers=answers,
        special_tokens=roles,
        skipped=_skipped(mapping, towers),
        embedding=embedding,
    )
    if options.trim is not None:
        prepared = _cut_vocabulary(prepared, options, options.trim, notes)
    onnx = _plan_onnx(options, prepared.mapping)
    notes += onnx.notes if onnx else ()
    return replace(prepared, onnx=onnx, notes=tuple(dict.fromkeys(notes)))


def _layout(
    mapping: Mapping,
    types: dict[str, str],
    vocabulary: Vocabulary,
    name: str,
    recipe: Recipe,
    embedding: EmbeddingPart | None,
) -> Layout:
    return plan_layout(
        mapping.dims,
        mapping.sources,
        types,
        vocabulary,
        name=name,
        file_type=recipe.file_type,
        embedding=embedding,
    )


def _cut_vocabulary(
    prepared: Prepared, options: Conversion, wanted: Wanted, notes: list[str]
) -> Prepared:
    """The same with only the tokens that stay; what is to be said goes to ``notes``."""
    from edge_gemma.convert.trim import rows
    from edge_gemma.convert.trim.conversion import decide

    needed = (*prepared.special_tokens.values(), *prepared.answers.end_tokens)
    trimmed = decide(prepared.mapping, prepared.vocabulary, wanted, needed, prepared.layout)
    notes += trimmed.choice.notes
    kept, ids = trimmed.choice.kept, rows.new_ids(trimmed.choice.kept)
    mapping = rows.cut_mapping(prepared.mapping, kept)
    vocabulary = rows.cut_vocabulary(prepared.vocabulary, kept)
    name, recipe = options.name or prepared.checkpoint.name, prepared.recipe
    return replace(
        prepared,
        mapping=mapping,
        vocabulary=vocabulary,
        layout=_layout(mapping, prepared.types, vocabulary, name, recipe, prepared.embedding),
        answers=replace(
            prepared.answers, end_tokens=rows.renumbered(prepared.answers.end_tokens, ids)
        ),
        special_tokens=rows.renamed(prepared.special_tokens, ids),
        trimmed=trimmed,
    )


def _plan_onnx(options: Conversion, mapping: Mapping) -> OnnxPlan | None:
    """What ``--decoder both`` adds. Raises UsageError, UnsupportedModel."""
    if options.decoder not in DECODERS:
        raise UsageError(f"--decoder {options.decoder}: expected {' or '.join(DECODERS)}")
    if options.decoder == "gguf":
        if options.onnx_quant:
            raise UsageError("--onnx-quant is of an ONNX decoder; add --decoder both")
        return None
    from edge_gemma.convert.onnx_weights import plan_onnx

    wanted = options.onnx_quant or ONNX_RECIPE
    recipe = wanted if isinstance(wanted, Recipe) else read_recipe(wanted)
    return plan_onnx(mapping, recipe, has_imatrix=bool(options.imatrix))


def _recipe(options: Conversion, dims: Dims) -> Recipe:
    if isinstance(options.quant, Recipe):
        return options.quant
    return read_recipe(options.quant or DEFAULT_RECIPE[dims.family])


def _check_embedding_options(options: Conversion) -> None:
    """What measures or needs the next token has no meaning for a model
    that embeds.
    """
    if options.check:
        raise UsageError(
            "--check measures how well text is continued; an embedding model continues none"
        )


def _merged(
    checkpoint: Checkpoint, dims: Dims, options: Conversion, notes: list[str]
) -> TensorReader:
    """The checkpoint with the adapters folded in; what is to be said goes to ``notes``."""
    if not options.merge:
        return checkpoint
    merged = Merged(checkpoint, dims, options.merge)
    notes += merged.notes
    return merged


def _skipped(mapping: Mapping, towers: dict[str, str]) -> dict[str, str]:
    """What no file of the bundle comes from: the decoder's leftovers, less the towers that are
    written.
    """
    return {
        name: reason for name, reason in mapping.skipped.items() if _tower_of(name) not in towers
    }


def _map(
    checkpoint: Checkpoint, dims: Dims, recipe: Recipe, slice: str | None, own_head: bool
) -> Mapping:
    cut = None
    if slice:
        from edge_gemma.convert.matformer import read_cut

        cut = read_cut(slice, dims)
    return map_tensors(checkpoint, dims, cut, untied=recipe.untied, own_head=own_head)


def _unmeasured(
    mapping: Mapping, types: dict[str, str], importance: dict[str, np.ndarray], file: str
) -> list[str]:
    """A note on every quantized matrix that the importance matrix ``file``
    says nothing about.
    """
    return [
        f"{source.name}: no importance in {file}, quantized without"
        for source in mapping.sources
        if source.use == "matmul" and types[source.name] not in ("F32", "F16", "BF16")
        if source.name not in importance
    ]


def _tower_of(name: str) -> str | None:
    return next((tower for prefix, tower in TOWERS.items() if name.startswith(prefix)), None)


def _towers(checkpoint: Checkpoint, options: Conversion) -> dict[str, str]:
    """The towers to write, each with its precision. Raises UsageError."""
    present = {
        _tower_of(name)
        for name in checkpoint.names()
        if name.startswith(("model.audio_tower.", "model.vision_tower."))
    }
    chosen = {}
    for tower, wanted in (("audio", options.audio), ("vision", options.vision)):
        choices = ("none", *_PRECISIONS[tower])
        if wanted is not None and wanted not in choices:
            raise UsageError(f"--{tower}-encoder {wanted}: expected one of {', '.join(choices)}")
        if wanted not in (None, "none") and tower not in present:
            raise UsageError(
                f"--{tower}-encoder {wanted}: {checkpoint.folder} has no {tower} tower"
            )
        if tower in present and wanted != "none":
            chosen[tower] = wanted or "int8"
    return chosen


def convert(
    folder: str | Path,
    out: str | Path,
    options: Conversion = Conversion(),
    report: Report = Report(),
) -> Result:
    """Convert a checkpoint into the bundle ``out``.

    Raises CheckpointError, UnsupportedModel, UsageError, RuntimeFailure
    (the disk).

    >>> out = getfixture("tmp_path") / "bundle"
    >>> result = convert(getfixture("tiny_checkpoint"), out, Conversion(quant="q8_0"))
    >>> result.bundle.manifest.family, result.bundle.manifest.recipe["name"]
    ('gemma3', 'q8_0')
    """
    started = time.perf_counter()
    # An output that exists is refused first of all
    with BundleWriter(out, overwrite=options.overwrite) as writer:
        prepared = prepare(folder, options)
        _check_disk(prepared, writer.folder, options)
        for note in prepared.notes:
            report.note(note)
        manifest = _write(prepared, options, writer.folder, report)
        if options.verify:
            from edge_gemma.engines.llama.library import check_loads

            check_loads(writer.folder / DECODER)
        bundle = writer.commit(manifest)
    seconds = time.perf_counter() - started
    sample, notes = None, prepared.notes
    if options.verify:
        from edge_gemma.convert.trial import try_embedding, try_encoders, try_out

        report.stage("verify")
        bundle.verify()
        if prepared.embedding is None:
            sample = try_out(bundle)
        else:
            try_embedding(bundle)
        if not try_encoders(bundle):
            notes = (*notes, NOT_RUN)
            report.note(NOT_RUN)
    return Result(bundle, seconds, notes, prepared.skipped, sample)


def _write(prepared: Prepared, options: Conversion, folder: Path, report: Report) -> Manifest:
    """Every file but the manifest, into ``folder``."""
    report.total(prepared.decoder_bytes)
    report.stage("decoder")
    decoder = write_decoder(
        folder / DECODER,
        prepared.layout,
        prepared.tensors,
        importance=prepared.importance,
        n_threads=options.threads(),
        progress=report.advance,
    )
    parts = _Parts(
        files={DECODER: decoder},
        special_rows=write_special_rows(prepared.tensors, folder),
        audio=_write_audio(prepared, folder, report),
        vision=_write_vision(prepared, folder, report),
        onnx=_write_onnx(prepared, options, folder, report),
    )
    if prepared.trimmed:
        prepared.trimmed.write_kept(folder)
    for path in sorted(folder.iterdir()):
        if path.name != DECODER and not path.name.startswith("."):
            parts.files[path.name] = file_entry(path)
    report.stage("check")
    quality = None
    if options.check:
        quality = _receipt(prepared, options, options.check, folder / DECODER, report)
    manifest = _manifest(prepared, options, folder / DECODER, parts, quality)
    if prepared.trimmed is None:
        return manifest
    report.stage("vocabulary")
    part = _vocabulary_part(prepared, prepared.trimmed, options, folder)
    return msgspec.structs.replace(manifest, vocabulary=part)


def _vocabulary_part(
    prepared: Prepared, trimmed: Trimmed, options: Conversion, folder: Path
) -> VocabularyPart:
    """With ``--check`` the whole decoder lies beside for as long as it takes to compare."""
    measure, n_threads = options.check is not None, options.threads()
    if measure:
        trimmed.write_whole(folder, prepared.tensors, prepared.importance, n_threads)
    return trimmed.part(folder, folder / DECODER, measure=measure, n_threads=n_threads)


@dataclass(frozen=True)
class _Parts:
    """What was written beside the manifest."""

    files: dict[str, File]
    special_rows: tuple[str, ...]
    audio: AudioPart | None
    vision: VisionPart | None
    onnx: OnnxPart | None


def _receipt(
    prepared: Prepared, options: Conversion, text: Path, decoder: Path, report: Report
) -> dict[str, float | int | str]:
    """Quality against the same weights in bf16, which lie beside for as
    long as it takes.
    """
    from edge_gemma.convert.quality import compare
    from edge_gemma.engines.llama.rescoring import rescorer_of

    reference, n_threads = decoder.with_name(".reference.gguf"), options.threads()
    layout = _reference_layout(prepared)
    write_decoder(reference, layout, prepared.tensors, n_threads=n_threads)
    report.stage("receipt")
    with ExitStack() as stack:
        part = _with_head(describe(decoder).decoder, prepared)
        rescorer = rescorer_of(decoder, prepared.mapping.dims.family, part)
        if rescorer:  # the receipt is of the model as it runs
            stack.callback(rescorer.close)
        receipts = compare(
            reference,
            {"new": decoder},
            Path(text),
            max_tokens=options.check_tokens,
            n_threads=n_threads,
            rescorers={} if rescorer is None else {"new": rescorer},
        )
    reference.unlink()
    return receipts["new"].table()


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
    needed = prepared.disk_bytes + _DISK_MARGIN_BYTES
    if options.check:
        needed += _reference_layout(prepared).total_bytes
        needed += prepared.trimmed.whole.total_bytes if prepared.trimmed else 0
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RuntimeFailure(
            f"the bundle needs {format_bytes(needed)} on disk, {folder.parent} has "
            f"{format_bytes(free)} free; choose another folder or a smaller recipe"
        )


def _write_onnx(
    prepared: Prepared, options: Conversion, folder: Path, report: Report
) -> OnnxPart | None:
    if prepared.onnx is None:
        return None
    from edge_gemma.convert.onnx_decoder import write_onnx_decoder

    report.stage("ONNX decoder")
    return write_onnx_decoder(
        folder,
        prepared.onnx,
        prepared.tensors,
        importance=prepared.importance,
        n_threads=options.threads(),
        progress=report.advance,
    )


def _write_audio(prepared: Prepared, folder: Path, report: Report) -> AudioPart | None:
    if "audio" not in prepared.towers:
        return None
    from edge_gemma.convert.audio import write_audio_encoder

    report.stage("audio encoder")
    return write_audio_encoder(prepared.tensors, folder, prepared.towers["audio"])


def _write_vision(prepared: Prepared, folder: Path, report: Report) -> VisionPart | None:
    if "vision" not in prepared.towers:
        return None
    from edge_gemma.convert.vision import write_vision_encoder

    report.stage("vision encoder")
    return write_vision_encoder(prepared.tensors, folder, prepared.towers["vision"])


def _manifest(
    prepared: Prepared,
    options: Conversion,
    decoder: Path,
    parts: _Parts,
    quality: dict[str, float | int | str] | None,
) -> Manifest:
    # What the runtime will read there, by the code that it reads with
    description = describe(decoder)
    origin = prepared.checkpoint.name
    return Manifest(
        name=description.name,
        family=prepared.mapping.dims.family,
        instruct=description.chat_template is not None and prepared.embedding is None,
        decoder=_with_head(description.decoder, prepared),
        source=Source(origin=origin, tool="edge-gemma convert"),
        files=parts.files,
        chat_template=description.chat_template,
        # the decoder's own, and those of pictures and sound that config.json names
        special_tokens={**description.special_tokens, **prepared.special_tokens},
        end_tokens=prepared.answers.end_tokens,
        sampling=prepared.answers.sampling,
        special_rows=parts.special_rows,
        audio=parts.audio,
        vision=parts.vision,
        embedding=prepared.embedding,
        onnx=parts.onnx,
        recipe=_recipe_record(prepared, options),
        quality=quality,
    )


def _with_head(part: DecoderPart, prepared: Prepared) -> DecoderPart:
    """``part``, told whether its head is the token embedding a second time, and no matrix of the
    checkpoint's.
    """
    heads = [s for s in prepared.mapping.sources if s.name == "output.weight"]
    again = any(source.name == EMBEDDING for head in heads for source in head.parts)
    return msgspec.structs.replace(part, head_from_embedding=again)


def _media_tokens(
    config: dict, dims: Dims, towers: dict[str, str]
) -> tuple[dict[str, int], list[str]]:
    """The ids of pictures and sound by our names, and notes on those without a row. What
    config.json leaves out of a model that has the tower is transformers' default.
    """
    found: dict[str, int] = {}
    notes: list[str] = []
    defaults = _DEFAULT_TOKENS[dims.family]
    for name, keys in _CONFIG_TOKENS.items():
        value = next((config[key] for key in keys if type(config.get(key)) is int), None)
        tower = "audio" if "audio" in name else "vision"
        if value is None and tower in towers:
            value = defaults.get(name)
        if value is None:
            continue
        if 0 <= value < dims.n_vocab:
            found[name] = value
        else:
            notes.append(
                f"config.json gives {name} the id {value}, which has no row in the table of "
                f"{dims.n_vocab}; ignored"
            )
    return found, notes


def _recipe_record(prepared: Prepared, options: Conversion) -> dict[str, str]:
    """What the manifest says of how the weights were made."""
    recipe = prepared.recipe
    record = {
        "name": recipe.name,
        "matrix": recipe.matrix,
        "head": recipe.head,
        "kept": recipe.kept,
    }
    if recipe.lookup:
        record["lookup"] = recipe.lookup
    if recipe.ple:
        record["ple"] = recipe.ple
    if options.imatrix:
        record["imatrix"] = options.imatrix.name
    if options.slice:
        record["slice"] = Path(options.slice).name
    if prepared.trimmed:
        record["vocabulary"] = f"{len(prepared.trimmed.choice.kept)} tokens"
    if options.merge:
        merged = [f"{folder.name} × {scale:g}" for folder, scale in options.merge]
        record["merged"] = ", ".join(merged)
    return record
