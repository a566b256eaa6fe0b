"""A recipe (TOML) → the type of every tensor. llama.cpp's mixes as tables,
and edge recipes of our own.

In: a recipe's name or file, the mapped tensors. Out: tensor name → ggml
type, with a note for each that had to fall back. This module does not know
what the weights are.

A recipe names a type per kind of tensor, ``head`` (what every token
multiplies: the output head, tied or not), ``lookup`` (the token embedding
once it is untied), ``ple``, ``matrix`` (the layers), ``kept`` (the small
matrices llama.cpp leaves alone), and rules that the first match decides.
The stock recipes restate src/llama-quant.cpp, llama_tensor_get_type_impl,
for gemma3 and gemma3n; tests hold them to what ``llama_model_quantize``
chooses.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from edge_gemma.convert.gemma import Mapping, Source
from edge_gemma.convert.quantize import TYPES, fitting_type
from edge_gemma.errors import UsageError

FOLDER = Path(__file__).parent / "recipes"
# Matrices llama.cpp never quantizes (tensor_allows_quantization); of them
# the two coefficient tables stay F32 in its converter
_KEPT = ("altup", "laurel", "per_layer_model_proj", "dense_")
_F32 = ("altup_correct_coef", "altup_predict_coef")


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tensors: list[str]  # as in blk.N.<name>.weight
    type: str
    layers: Literal["all", "more_bits", "first_eighth", "first_sixteenth", "first_2", "first_4"] = (
        "all"
    )
    min_gqa: int = 1  # heads per KV head, at least
    imatrix: bool | None = None  # only with (true) or only without (false) an importance matrix


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    about: str
    matrix: str
    head: str
    kept: str = "F16"
    lookup: str | None = None  # default: as the head when tied, else as the matrices (llama.cpp)
    ple: str | None = None  # default: as lookup
    untied: bool = False  # write a separate head even where the model ties it
    file_type: int = 1  # llama.h, enum llama_ftype: for display only
    rule: list[Rule] = []
    name: str = ""


def names() -> list[str]:
    """The recipes that come with the package, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_recipe(name: str | Path) -> Recipe:
    """A recipe by name, or from a ``.toml`` file of one's own. Raises
    UsageError.

    >>> read_recipe("q4_k_m").head
    'Q6_K'
    """
    path = Path(name) if str(name).endswith(".toml") else FOLDER / f"{str(name).lower()}.toml"
    if not path.is_file():
        raise UsageError(
            f"no recipe {str(name)!r}; there are {', '.join(names())}, or give a .toml file "
            "of your own"
        )
    try:
        recipe = msgspec.convert(
            tomllib.loads(path.read_text("utf-8")) | {"name": path.stem}, Recipe
        )
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a recipe: {error}") from None
    for kind in (
        recipe.matrix,
        recipe.head,
        recipe.kept,
        recipe.lookup,
        recipe.ple,
        *(rule.type for rule in recipe.rule),
    ):
        if kind is not None and kind not in TYPES:
            raise UsageError(f"{path} names the type {kind!r}; known are {', '.join(TYPES)}")
    return recipe


def choose_types(
    recipe: Recipe, mapping: Mapping, *, has_imatrix: bool = False
) -> tuple[dict[str, str], list[str]]:
    """(tensor name → type, a note on every group of tensors whose rows do
    not fit the wanted type).
    """
    types: dict[str, str] = {}
    misfits: dict[tuple[int, str, str], list[str]] = {}
    for source in mapping.sources:
        wanted = _wanted(recipe, mapping, source, has_imatrix)
        is_plain = wanted in ("F32", "F16", "BF16")
        got = wanted if is_plain else fitting_type(wanted, source.n_per_row)
        types[source.name] = got
        if got != wanted:
            misfits.setdefault((source.n_per_row, wanted, got), []).append(source.name)
    return types, [
        f"{_together(names)}: rows of {row} are no multiple of {wanted}'s block, so {got}"
        for (row, wanted, got), names in misfits.items()
    ]


def _together(names: list[str]) -> str:
    """Many tensors' names in one line: those of several layers by what they
    are, with how many.

    >>> q = ["blk.0.attn_q.weight", "blk.1.attn_q.weight"]
    >>> _together(["output.weight", *q, "blk.3.attn_k.weight"])
    'output.weight, attn_q of 2 layers, blk.3.attn_k.weight'
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"blk\.\d+\.(\w+)\.weight", name)
        kinds.setdefault(match[1] if match else name, []).append(name)
    return ", ".join(
        f"{kind} of {len(members)} layers" if len(members) > 1 else members[0]
        for kind, members in kinds.items()
    )


def _wanted(recipe: Recipe, mapping: Mapping, source: Source, has_imatrix: bool) -> str:
    dims, name = mapping.dims, source.name
    if len(source.shape) == 1 or any(part in name for part in _F32):
        return "F32"
    if any(part in name for part in _KEPT):
        return recipe.kept
    if name == "output.weight":
        return recipe.head
    lookup = recipe.lookup or (recipe.head if dims.tied else recipe.matrix)
    if name == "token_embd.weight":
        is_head = dims.tied and dims.family != "gemma-embedding"
        return recipe.head if is_head else lookup
    if name == "per_layer_token_embd.weight":
        return recipe.ple or lookup
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    assert match is not None, name
    layer, tensor = int(match[1]), match[2]
    for rule in recipe.rule:
        if (
            tensor in rule.tensors
            and _in_layers(rule.layers, layer, dims.n_layer)
            and dims.n_head // dims.n_head_kv >= rule.min_gqa
            and rule.imatrix in (None, has_imatrix)
        ):
            return rule.type
    return recipe.matrix


def _in_layers(which: str, i: int, n: int) -> bool:
    # use_more_bits of llama.cpp: the first and last eighth, and every third
    # layer between
    if which == "more_bits":
        return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    return {
        "all": True,
        "first_eighth": i < n // 8,
        "first_sixteenth": i < n // 16,
        "first_2": i < 2,
        "first_4": i < 4,
    }[which]
