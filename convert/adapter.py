"""A PEFT folder → what it changes, module by module.

In: ``adapter_config.json`` and ``adapter_model.safetensors``. Out: an :class:`Adapter`: low-rank
pairs with their scale, and whole tensors that were trained (``modules_to_save``). What is no sum of
a weight and something stored there is refused by name. This module knows no base model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edge_gemma.convert.checkpoint import (
    DTYPES,
    Checkpoint,
    Entry,
    canonical_name,
    read_header,
    read_json,
    without_wrappers,
)
from edge_gemma.errors import CheckpointError, UnsupportedModel

TENSORS = "adapter_model.safetensors"
# What adapter_config.json says where no mathematics of ours applies
_NEUTRAL: dict[str, object] = {
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
# Ways to begin that change the base's weights, which the adapter's file does not hold
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PAIR = re.compile(r"(.+)\.lora_(A|B)(?:\.\w+)?\.weight")
_EMBEDDING_PAIR = re.compile(r"(.+)\.lora_embedding_(A|B)(?:\.\w+)?")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.\w+)*")
_SAVED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")


@dataclass(frozen=True)
class LowRank:
    """``scale · B @ A`` of one module: ``a [r, …]`` and ``b [out, r]`` float32, convolutions with
    their kernel behind. For an embedding ``[rows, columns]`` the product is transposed: ``a [r,
    rows]``, ``b [columns, r]``. ``magnitude [out]`` makes it DoRA.
    """

    module: str  # canonical, without .weight
    a: np.ndarray
    b: np.ndarray
    scale: float
    is_embedding: bool = False
    magnitude: np.ndarray | None = None


@dataclass(frozen=True)
class Adapter:
    """What a PEFT folder holds. ``saved``: canonical names of whole tensors, in ``values``."""

    folder: Path
    config: dict
    pairs: tuple[LowRank, ...]
    saved: tuple[str, ...]
    values: Checkpoint
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.folder / TENSORS


@dataclass
class _Module:
    """The tensors of one module while they are collected."""

    stored: str  # as PEFT names the module
    parts: dict[str, np.ndarray] = field(default_factory=dict)  # A, B, magnitude
    is_embedding: bool = False


def open_adapter(folder: str | Path) -> Adapter:
    """Read a PEFT folder. Raises CheckpointError (damaged), UnsupportedModel (not LoRA, or a kind
    of it that cannot be applied).
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / TENSORS
    if not path.is_file():
        raise _no_tensors(folder)
    entries = read_header(path)
    bad = next((entry for entry in entries if entry.dtype not in DTYPES), None)
    if bad:
        raise CheckpointError(
            f"{path}: tensor {bad.stored!r} has type {bad.dtype}; expected one of "
            f"{', '.join(DTYPES)}"
        )
    values = Checkpoint(folder, {}, [replace(entry, name=entry.stored) for entry in entries])
    modules: dict[str, _Module] = {}
    saved: list[Entry] = []
    for entry in entries:
        if not _collect(modules, values, entry):
            saved.append(replace(entry, name=_saved_name(path, entry)))
    pairs = [_low_rank(path, name, module, config) for name, module in sorted(modules.items())]
    stored = [module.stored for module in modules.values()]
    return Adapter(
        folder,
        config,
        tuple(pairs),
        tuple(entry.name for entry in saved),
        Checkpoint(folder, {}, saved),
        tuple(_unmatched(config, stored)),
    )


def read_config(folder: Path) -> dict:
    """adapter_config.json of a LoRA adapter. Raises CheckpointError, UnsupportedModel."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no adapter_config.json; expected a PEFT folder")
    config = read_json(path)
    if "peft_type" not in config and "fine_tune_type" in config:
        raise _is_mlx(folder)
    if config.get("peft_type", "LORA") != "LORA":
        raise UnsupportedModel(
            f"{folder} is a {config['peft_type']} adapter; only LORA can be applied"
        )
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in (neutral, None, False, [], {}):
            raise UnsupportedModel(
                f"{path}: {key} is {config[key]!r}; LoRA with it is more than a change of weights "
                "that is stored here. Merge it with PEFT first (merge_and_unload)"
            )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGED_BASE):
        raise UnsupportedModel(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changed the "
            "base's weights before training; save the adapter as plain LoRA "
            "(path_initial_model_for_weight_conversion), or merge it with PEFT first"
        )
    return config


def _is_mlx(folder: Path) -> UnsupportedModel:
    return UnsupportedModel(
        f"{folder} is an adapter of mlx-lm, not of PEFT; fuse it first (mlx_lm.fuse) and convert "
        "the result"
    )


def _no_tensors(folder: Path) -> CheckpointError | UnsupportedModel:
    if (folder / "adapters.safetensors").is_file():
        return _is_mlx(folder)
    is_pickled = (folder / "adapter_model.bin").is_file()
    hint = "; its adapter_model.bin is a pickle and is never opened" if is_pickled else ""
    return CheckpointError(f"{folder} has no {TENSORS}{hint}")


def _collect(modules: dict[str, _Module], values: Checkpoint, entry: Entry) -> bool:
    """Put a part of a low-rank pair where it belongs. False for anything else."""
    stored = without_wrappers(entry.stored)
    kinds = ((_PAIR, False), (_EMBEDDING_PAIR, True), (_MAGNITUDE, False))
    for pattern, is_embedding in kinds:
        if match := pattern.fullmatch(stored):
            part = "magnitude" if pattern is _MAGNITUDE else match[2]
            module = canonical_name(match[1] + ".weight").removesuffix(".weight")
            found = modules.setdefault(module, _Module(match[1]))
            found.is_embedding |= is_embedding
            found.parts[part] = values.read(entry.stored)
            return True
    return False


def _saved_name(path: Path, entry: Entry) -> str:
    """The canonical name of a tensor that was trained whole."""
    if "lora_" in entry.stored or "trainable_tokens" in entry.stored:
        raise UnsupportedModel(
            f"{path}: tensor {entry.stored!r} is no part of a low-rank pair; the layer it adds to "
            "has no place for it. Merge the adapter with PEFT first"
        )
    return canonical_name(_SAVED.sub("", without_wrappers(entry.stored)))


def _low_rank(path: Path, name: str, module: _Module, config: dict) -> LowRank:
    missing = [part for part in "AB" if part not in module.parts]
    if missing:
        found = ", ".join(f"lora_{part}" for part in sorted(module.parts))
        raise CheckpointError(f"{path}: {name!r} has only {found}; the adapter is incomplete")
    a, b = module.parts["A"], module.parts["B"]
    if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise CheckpointError(
            f"{path}: {name!r} has A {list(a.shape)} and B {list(b.shape)}, which make no product; "
            "the adapter is damaged, or was saved from a part of a sharded model"
        )
    rank = int(a.shape[0])
    configured = by_pattern(path, config, "rank_pattern", module.stored, config.get("r", rank))
    if configured != rank:
        raise CheckpointError(
            f"{path}: {name!r} has rank {rank}, adapter_config.json says {configured:g}; PEFT "
            "would not load it, and the scale of the adapter depends on it"
        )
    # 8 is PEFT's own default
    alpha = by_pattern(path, config, "alpha_pattern", module.stored, config.get("lora_alpha", 8))
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    magnitude = module.parts.get("magnitude")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise CheckpointError(
            f"{path}: use_dora is {bool(config.get('use_dora'))}, but {name!r} has "
            f"{'no' if magnitude is None else 'a'} magnitude vector"
        )
    return LowRank(name, a, b, alpha / divisor, module.is_embedding, magnitude)


def by_pattern(path: Path, config: dict, key: str, module: str, default: object) -> float:
    """What ``alpha_pattern`` or ``rank_pattern`` gives a module, by PEFT's rule: the first key that
    matches the end of the module's name as the model spells it, as a regular expression, from a dot
    or the name's start on; else ``default``. Raises CheckpointError for what is no number.
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {key} is {patterns!r}; expected an object")
    pattern = matching_pattern(patterns, module)
    value = default if pattern is None else patterns[pattern]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        what = key.replace("_pattern", "") if pattern is None else f"{key}[{pattern!r}]"
        raise CheckpointError(f"{path}: the {what} of {module!r} is {value!r}; expected a number")
    return float(value)


def matching_pattern(patterns: Iterable[str], module: str) -> str | None:
    """The first of PEFT's patterns that a module's name matches.

    >>> matching_pattern(["k_proj", "^model.layers.0.*"], "model.layers.0.self_attn.q_proj")
    '^model.layers.0.*'
    """
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return pattern
        except re.error as error:
            raise CheckpointError(
                f"adapter_config.json: the pattern {pattern!r} is no regular expression ({error})"
            ) from None
    return None


def _unmatched(config: dict, modules: list[str]) -> Iterable[str]:
    """Notes on patterns that match no module; PEFT ignores them as well."""
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            if not any(matching_pattern([pattern], module) for module in modules):
                yield f"{key} {pattern!r} matches no module of the adapter; PEFT ignores it too"
