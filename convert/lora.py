"""PEFT adapters: to a GGUF adapter for run time, or folded into the weights
while they are converted.

In: a PEFT folder (``adapter_config.json``, ``adapter_model.safetensors``)
and the base checkpoint. Out: a GGUF adapter, or :class:`Merged`, which
reads like a checkpoint. Targets that llama.cpp would silently not apply are
refused by name; so is what is more than a low-rank product (DoRA, trained
biases, saved modules). This module does not know quantization.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from edge_gemma.convert.checkpoint import (
    DTYPES,
    Checkpoint,
    Entry,
    canonical_name,
    read_header,
    read_json,
)
from edge_gemma.convert.gemma import PREFIX, Dims, checkpoint_shapes, read_dims
from edge_gemma.convert.gguf_writer import Pair, check_output, write_gguf
from edge_gemma.convert.tensors import TensorReader

from edge_gemma.bundles.description import GEMMA3N_KV_LAYERS
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
_PLAIN: dict[str, object] = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "lora_bias": False,
}


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
    """transformers' module → GGUF's tensor, for what an adapter may change."""
    return _TARGETS_3N if dims.family == "gemma3n" else _TARGETS


def read_adapter(folder: str | Path, dims: Dims) -> list[Delta]:
    """The low-rank pairs of a PEFT folder, checked against the base's dims.
    Raises CheckpointError, UnsupportedModel.
    """
    folder = Path(folder)
    config = _adapter_config(folder)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        is_pickled = (folder / "adapter_model.bin").is_file()
        hint = "; its adapter_model.bin is a pickle and is never opened" if is_pickled else ""
        raise CheckpointError(f"{folder} has no adapter_model.safetensors{hint}")
    pairs: dict[str, dict[str, np.ndarray]] = {}
    entries = read_header(path)
    values = _values(folder, entries)
    for entry in entries:
        match = re.fullmatch(
            r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight", entry.stored
        )
        if match is None:
            raise UnsupportedModel(
                f"{path}: tensor {entry.stored!r} is not a low-rank pair that llama.cpp "
                "applies (an embedding or a saved module?); train linear layers only"
            )
        module = canonical_name(match[1] + ".weight").removesuffix(".weight")
        pairs.setdefault(module, {})[match[2]] = values.read(entry.name)
    return [_delta(path, module, pair, config, dims) for module, pair in sorted(pairs.items())]


def _adapter_config(folder: Path) -> dict:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no adapter_config.json; expected a PEFT folder")
    config = read_json(path)
    if config.get("peft_type", "LORA") != "LORA":
        raise UnsupportedModel(
            f"{folder} is a {config['peft_type']} adapter; only LORA can be applied"
        )
    for key, expected in _PLAIN.items():
        if config.get(key) not in (expected, None, []):
            raise UnsupportedModel(
                f"{path}: {key} is {config[key]!r}; only plain "
                f"LoRA ({key} {expected!r}) can be converted. Merge it with PEFT first"
            )
    return config


def _values(folder: Path, entries: list[Entry]) -> Checkpoint:
    bad = next((entry for entry in entries if entry.dtype not in DTYPES), None)
    if bad:
        raise CheckpointError(
            f"{bad.file}: tensor {bad.stored!r} has type {bad.dtype}; expected one of "
            f"{', '.join(DTYPES)}"
        )
    return Checkpoint(folder, {}, entries)


def _delta(path: Path, module: str, pair: dict[str, np.ndarray], config: dict, dims: Dims) -> Delta:
    targets = targets_of(dims)
    match = re.fullmatch(re.escape(PREFIX) + r"layers\.(\d+)\.(.+)", module)
    if match is None or match[2] not in targets or int(match[1]) >= dims.n_layer:
        raise UnsupportedModel(
            f"{path} adapts {module!r}, which llama.cpp would not apply to a {dims.family} "
            f"of {dims.n_layer} layers; it applies {', '.join(targets)}"
        )
    layer, target = int(match[1]), match[2]
    if pair.keys() != {"A", "B"}:
        raise CheckpointError(
            f"{path}: {module!r} has only lora_{next(iter(pair))}; the adapter is incomplete"
        )
    a, b = pair["A"], pair["B"]
    expected = checkpoint_shapes(dims)[f"{PREFIX}layers.0.{target}.weight"]
    is_product = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]
    if not is_product or (b.shape[0], a.shape[1]) != expected:
        raise CheckpointError(
            f"{path}: {module!r} has A {list(a.shape)} and B {list(b.shape)}; the base's "
            f"weight is {list(expected)}. Was it trained on another model?"
        )
    rank = int(a.shape[0])
    alpha = _own_alpha(config, module)
    if alpha is None:
        alpha = float(config.get("lora_alpha", rank))
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return Delta(layer, target, a, b, alpha / divisor)


def _own_alpha(config: dict, module: str) -> float | None:
    """PEFT's alpha_pattern: the first key that ends the module's name (or
    matches it as an expression).
    """
    for key, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return float(value)
    return None


class Merged(TensorReader):
    """A checkpoint with adapters (folder, scale) added to the weights they
    belong to.
    """

    def __init__(
        self, checkpoint: Checkpoint, dims: Dims, adapters: tuple[tuple[Path, float], ...]
    ):
        self._checkpoint = checkpoint
        self._deltas: dict[str, list[tuple[Delta, float]]] = {}
        for folder, scale in adapters:
            if not math.isfinite(scale):
                raise UsageError(
                    f"the scale of {folder} is {scale}; expected a number, 1 for the adapter "
                    "as trained"
                )
            for delta in read_adapter(folder, dims):
                name = f"{PREFIX}{delta.module}.weight"
                self._deltas.setdefault(name, []).append((delta, scale))

    @property
    def config(self) -> dict:
        return self._checkpoint.config

    def names(self) -> list[str]:
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        values = self._checkpoint.read(name, rows)
        for delta, scale in self._deltas.get(name, ()):
            b = delta.b if rows is None else delta.b[rows]
            values = values + np.float32(scale * delta.scale) * (b @ delta.a)
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
    notes: list[str] = []
    tensors: list[tuple[str, tuple[int, ...], np.ndarray]] = []  # shapes in ggml order
    for delta in read_adapter(folder, dims):
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
        ("general.name", folder.resolve().name),
        ("adapter.type", "lora"),
        ("adapter.lora.alpha", 1.0),
    ]
    write_gguf(out, pairs, tensors)
    return notes
