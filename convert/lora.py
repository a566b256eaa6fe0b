"""PEFT adapters: to a GGUF adapter for run time, or folded into the weights
while they are converted.

In: a PEFT folder (``adapter_config.json``, ``adapter_model.safetensors``)
and the base checkpoint. Out: a GGUF adapter, or :class:`Merged`, which
reads like a checkpoint. A GGUF adapter holds plain low-rank pairs of the
layers where llama.cpp applies them; merging also folds DoRA, embeddings,
the output head, the towers and whole modules that were trained. What
neither can do is refused by name. This module does not know quantization.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_gemma.bundles.description import GEMMA3N_KV_LAYERS
from edge_gemma.convert.adapter import Adapter, LowRank, open_adapter, read_config
from edge_gemma.convert.checkpoint import HEAD, Checkpoint, checkpoint_name, read_json
from edge_gemma.convert.gemma import EMBEDDING, PREFIX, Dims, checkpoint_shapes, read_dims
from edge_gemma.convert.gguf_writer import Pair, check_output, write_gguf
from edge_gemma.convert.head import same_rows
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.errors import CheckpointError, UnsupportedModel, UsageError

# transformers' module → GGUF's tensor, where llama.cpp multiplies with
# build_lora_mm (src/models/gemma3.cpp, gemma3n.cpp)
_TARGETS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TARGETS_3N = {
    **_TARGETS,
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
}
# What adapter_config.json says of plain LoRA
_PLAIN: dict[str, object] = {"use_dora": False, "bias": "none", "modules_to_save": None}
_SHARED_KV = re.compile(re.escape(PREFIX) + r"layers\.(\d+)\.self_attn\.[kv]_proj")


@dataclass(frozen=True)
class Delta:
    """``scale · B @ A`` of one module: A ``[r, in]``, B ``[out, r]``
    float32.
    """

    layer: int
    target: str  # a key of the targets above
    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def module(self) -> str:
        return f"layers.{self.layer}.{self.target}"


def targets_of(dims: Dims) -> dict[str, str]:
    """transformers' module → GGUF's tensor, for what a GGUF adapter may change."""
    return _TARGETS_3N if dims.family == "gemma3n" else _TARGETS


def read_adapter(folder: str | Path, dims: Dims) -> list[Delta]:
    """The low-rank pairs of a PEFT folder that llama.cpp applies at run time, checked against the
    base's dims. Raises CheckpointError, UnsupportedModel (anything else in it).
    """
    return _plain_deltas(_open_plain(folder), dims)


def _open_plain(folder: str | Path) -> Adapter:
    """An adapter whose config says that it is plain LoRA. Raises UnsupportedModel."""
    config = read_config(Path(folder))
    for key, expected in _PLAIN.items():
        if config.get(key) not in (expected, None, []):
            raise UnsupportedModel(
                f"{Path(folder) / 'adapter_config.json'}: {key} is {config[key]!r}; only plain "
                f"LoRA ({key} {expected!r}) can be applied at run time. Fold it into the "
                "weights instead: `edge-gemma convert BASE OUT --merge ADAPTER`"
            )
    return open_adapter(folder)


def _plain_deltas(adapter: Adapter, dims: Dims) -> list[Delta]:
    for pair in adapter.pairs:
        if pair.is_embedding:
            raise UnsupportedModel(
                f"{adapter.path}: '{pair.module}.lora_embedding_A' is not a low-rank pair that "
                "llama.cpp applies; fold it with --merge, or train linear layers only"
            )
    for name in adapter.saved:
        raise UnsupportedModel(
            f"{adapter.path}: tensor {adapter.values.entry(name).stored!r} is not a low-rank pair "
            "that llama.cpp applies (a saved module); fold it with --merge, or train linear "
            "layers only"
        )
    return [_delta(adapter.path, pair, dims) for pair in adapter.pairs]


def _delta(path: Path, pair: LowRank, dims: Dims) -> Delta:
    targets = targets_of(dims)
    match = re.fullmatch(re.escape(PREFIX) + r"layers\.(\d+)\.(.+)", pair.module)
    if match is None or match[2] not in targets or int(match[1]) >= dims.n_layer:
        raise UnsupportedModel(
            f"{path} adapts {pair.module!r}, which llama.cpp would not apply to a {dims.family} "
            f"of {dims.n_layer} layers; it applies {', '.join(targets)}. --merge folds others"
        )
    layer, target = int(match[1]), match[2]
    expected = checkpoint_shapes(dims)[f"{PREFIX}layers.0.{target}.weight"]
    _check_shape(path, pair, expected)
    return Delta(layer, target, pair.a, pair.b, pair.scale)


def _check_shape(path: Path, pair: LowRank, expected: tuple[int, ...]) -> None:
    """Raises CheckpointError when the product is not of the weight's shape."""
    a, b = pair.a, pair.b
    made = (a.shape[1], b.shape[0]) if pair.is_embedding else (b.shape[0], *a.shape[1:])
    is_plain_b = all(side == 1 for side in b.shape[2:])
    if made != expected or not is_plain_b:
        raise CheckpointError(
            f"{path}: {pair.module!r} has A {list(a.shape)} and B {list(b.shape)}; the base's "
            f"weight is {list(expected)}. Was it trained on another model?"
        )


# --- folded into the weights ---


@dataclass(frozen=True)
class _Product:
    """A low-rank pair that is added; with a magnitude the rows are then given that length."""

    pair: LowRank
    scale: float  # the user's

    def apply(self, values: np.ndarray, rows: slice | None) -> np.ndarray:
        pair = self.pair
        left = pair.a.T if pair.is_embedding else pair.b.reshape(len(pair.b), -1)
        right = pair.b.T if pair.is_embedding else pair.a.reshape(len(pair.a), -1)
        if rows is not None:
            left = left[rows]
        product = (left @ right).reshape(values.shape)
        values = values + np.float32(self.scale * pair.scale) * product
        if pair.magnitude is None:
            return values
        magnitude = pair.magnitude.reshape(-1)
        magnitude = magnitude if rows is None else magnitude[rows]
        length = np.linalg.norm(values, axis=1)
        return values * (magnitude / length)[:, None]


@dataclass(frozen=True)
class _Whole:
    """A tensor that was trained whole; a scale below 1 goes part of the way."""

    values: Checkpoint
    name: str
    scale: float

    def apply(self, values: np.ndarray, rows: slice | None) -> np.ndarray:
        trained = self.values.read(self.name, rows)
        if self.scale == 1:
            return trained
        return values + np.float32(self.scale) * (trained - values)


class Merged(TensorReader):
    """A checkpoint with adapters (folder, scale) folded into the weights they
    belong to.

    ``separate_head`` says that the output head is no longer the token embedding; then
    ``lm_head.weight`` can be read although the checkpoint does not hold it. Raises CheckpointError,
    UnsupportedModel, UsageError.
    """

    def __init__(
        self, checkpoint: Checkpoint, dims: Dims, adapters: tuple[tuple[Path, float], ...]
    ):
        self._checkpoint, self._dims = checkpoint, dims
        self._changes: dict[str, list[_Product | _Whole]] = {}
        self.notes: list[str] = []
        stays_tied = True
        for folder, scale in adapters:
            if not math.isfinite(scale):
                raise UsageError(
                    f"the scale of {folder} is {scale}; expected a number, 1 for the adapter "
                    "as trained"
                )
            adapter = open_adapter(folder)
            self.notes += adapter.notes
            for name in adapter.saved:
                self._add_whole(adapter, name, scale)
            for pair in adapter.pairs:
                self._add_pair(adapter, pair, scale)
            stays_tied &= bool(adapter.config.get("ensure_weight_tying"))
        self._check_dora()
        touched = {HEAD, EMBEDDING} & self._changes.keys()
        self.separate_head = (
            bool(touched) and dims.tied and not (stays_tied and HEAD not in touched)
        )
        if self.separate_head:
            changed = " and ".join(sorted(name.removesuffix(".weight") for name in touched))
            self.notes.append(
                f"the adapter changes {changed}, so the output head is no longer the token "
                "embedding: it is written as a matrix of its own"
            )

    def _base_of(self, name: str) -> str:
        """The checkpoint's tensor that ``name`` starts from: a tied head is the embedding."""
        return EMBEDDING if name == HEAD and HEAD not in self._checkpoint else name

    def _add_whole(self, adapter: Adapter, name: str, scale: float) -> None:
        base = self._base_of(name)
        if base not in self._checkpoint:
            raise UnsupportedModel(
                f"{adapter.path}: tensor {adapter.values.entry(name).stored!r} is not one that the "
                "base has; was the adapter trained on another model?"
            )
        found, expected = adapter.values.shape(name), self._checkpoint.shape(base)
        if found != expected:
            resized = " (was the vocabulary enlarged? Merge it with PEFT first)"
            raise CheckpointError(
                f"{adapter.path}: {name!r} has shape {list(found)}, the base's is "
                f"{list(expected)}{resized if name in (HEAD, EMBEDDING) else ''}"
            )
        # PEFT stores embeddings that were not trained as well
        if same_rows(adapter.values, name, self._checkpoint, base):
            return
        self._changes.setdefault(name, []).append(_Whole(adapter.values, name, scale))

    def _add_pair(self, adapter: Adapter, pair: LowRank, scale: float) -> None:
        name = f"{pair.module}.weight"
        base = self._base_of(name)
        if base not in self._checkpoint:
            match = _SHARED_KV.fullmatch(pair.module)
            if match and self._dims.family == "gemma3n" and int(match[1]) >= GEMMA3N_KV_LAYERS:
                self.notes.append(
                    f"{pair.module}: a layer that shares its KV never computes this; left out"
                )
                return
            raise UnsupportedModel(
                f"{adapter.path} adapts {pair.module!r}, which the base does not have; was the "
                "adapter trained on another model?"
            )
        _check_shape(adapter.path, pair, self._checkpoint.shape(base))
        if pair.magnitude is not None:
            self._check_dora_pair(adapter, pair, scale)
        self._changes.setdefault(name, []).append(_Product(pair, scale))

    def _check_dora_pair(self, adapter: Adapter, pair: LowRank, scale: float) -> None:
        is_matrix = pair.a.ndim == pair.b.ndim == 2 and not pair.is_embedding
        if not is_matrix or scale != 1:
            raise UnsupportedModel(
                f"{adapter.path} adapts {pair.module!r} with DoRA"
                + (
                    f" at scale {scale:g}; only the whole (1) is defined"
                    if is_matrix
                    else ", which can be folded into matrices only. Merge it with PEFT first"
                )
            )
        if pair.magnitude is not None and pair.magnitude.size != len(pair.b):
            raise CheckpointError(
                f"{adapter.path}: the magnitude of {pair.module!r} has {pair.magnitude.size} "
                f"values, its weight {len(pair.b)} rows"
            )

    def _check_dora(self) -> None:
        for name, changes in self._changes.items():
            products = [change for change in changes if isinstance(change, _Product)]
            if len(products) > 1 and any(c.pair.magnitude is not None for c in products):
                raise UnsupportedModel(
                    f"several adapters change {name!r} and one of them is DoRA, whose result "
                    "depends on the order; merge them one after the other"
                )

    @property
    def config(self) -> dict:
        return self._checkpoint.config

    def names(self) -> list[str]:
        names = self._checkpoint.names()
        return [*names, HEAD] if self.separate_head and HEAD not in self._checkpoint else names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(self._base_of(name))

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        values = self._checkpoint.read(self._base_of(name), rows)
        for change in self._changes.get(name, ()):
            values = change.apply(values, rows)
        return values


def convert_lora(
    folder: str | Path, base: str | Path, out: str | Path, *, overwrite: bool = False
) -> list[str]:
    """Write a PEFT adapter as a GGUF adapter for ``--lora``.

    ``base`` is the checkpoint it was trained on (only its config is read).

    Returns notes on what has no effect. Raises CheckpointError,
    UnsupportedModel, UsageError.
    """
    folder, base, out = Path(folder), Path(base), Path(out)
    check_output(out, overwrite=overwrite)
    if not (base / "config.json").is_file():
        raise CheckpointError(
            f"{base} has no config.json; give the checkpoint folder the adapter was trained on"
        )
    dims = read_dims(read_json(base / "config.json"))
    adapter = _open_plain(folder)
    notes = list(adapter.notes)
    tensors: list[tuple[str, tuple[int, ...], np.ndarray]] = []  # shapes in ggml order
    for delta in _plain_deltas(adapter, dims):
        tensor = targets_of(dims)[delta.target]
        is_shared = dims.family == "gemma3n" and delta.layer >= GEMMA3N_KV_LAYERS
        if is_shared and tensor in ("attn_k", "attn_v"):
            notes.append(
                f"{delta.module}: a layer that shares its KV never computes this; left out"
            )
            continue
        # llama.cpp multiplies by alpha / r; alpha is 1 in this file
        b = delta.b * np.float32(delta.scale * delta.a.shape[0])
        name = f"blk.{delta.layer}.{tensor}.weight"
        for suffix, values in ((".lora_a", delta.a), (".lora_b", b)):
            tensors.append((name + suffix, tuple(reversed(values.shape)), values))
    if not tensors:
        raise CheckpointError(f"{folder} adapts nothing that this model computes")
    pairs: list[Pair] = [
        ("general.architecture", dims.family),
        ("general.type", "adapter"),
        ("general.name", checkpoint_name(folder)),
        ("adapter.type", "lora"),
        ("adapter.lora.alpha", 1.0),
    ]
    write_gguf(out, pairs, tensors)
    return notes
