"""What a conversion will write, decided before a weight is read.

In: a checkpoint folder and :class:`Conversion`. Out: :class:`Prepared`, or an error. This is also
the dry run; an output head is compared with the token embedding here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_gemma.bundles.manifest import (
    EmbeddingPart,
    Family,
)
from edge_gemma.convert.checkpoint import Checkpoint
from edge_gemma.convert.decoder import CHUNK_VALUES, Layout, plan_layout
from edge_gemma.convert.embedding import read_embedding
from edge_gemma.convert.gemma import TOWERS, Dims, Mapping, map_tensors, read_dims
from edge_gemma.convert.generation_config import Answers, read_answers
from edge_gemma.convert.head import Head, choose_head
from edge_gemma.convert.lora import Merged
from edge_gemma.convert.recipe import Recipe, choose_types, read_recipe
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.convert.vocabulary import Vocabulary, read_vocabulary
from edge_gemma.errors import UsageError
from edge_gemma.units import MiB

if TYPE_CHECKING:
    from edge_gemma.convert.onnx_weights import OnnxPlan
    from edge_gemma.convert.trim.choice import Wanted
    from edge_gemma.convert.trim.conversion import Trimmed

DECODERS = ("gguf", "both")


ONNX_RECIPE = "q8_0"


DEFAULT_RECIPE: dict[Family, str] = {
    "gemma3": "q4_k_m",
    "gemma3n": "q4_k_m",
    "gemma-embedding": "q8_0",
}


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
    prompts = prepared.embedding.prompts.values() if prepared.embedding else ()
    trimmed = decide(
        prepared.mapping, prepared.vocabulary, wanted, needed, prompts, prepared.layout
    )
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
