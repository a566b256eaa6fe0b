"""PEFT adapters: to a GGUF adapter for run time, or folded into the weights while they are
converted.

In: a PEFT folder (``adapter_config.json``, ``adapter_model.safetensors``) and the base checkpoint.
Out: a GGUF adapter, or :class:`Merged`, which reads like a checkpoint. Targets that llama.cpp would
silently not apply are refused by name; so is what is more than a low-rank product (DoRA, trained
biases, saved modules). This room does not know quantization.
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
    canonical_name,
    read_header,
    read_json,
)
from edge_gemma.convert.gemma import PREFIX, Dims, family_of, read_dims
from edge_gemma.convert.gguf_writer import check_output, write_gguf

from edge_gemma.bundles.description import GEMMA3N_KV_LAYERS
from edge_gemma.errors import CheckpointError, UnsupportedModel, UsageError

# transformers' module → GGUF's tensor, where llama.cpp multiplies with build_lora_mm
# (src/models/gemma3.cpp, gemma3n.cpp)
_TARGETS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TARGETS_3N = _TARGETS | {
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
}
_PLAIN = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "lora_bias": False,
}


@dataclass(frozen=True)
class Delta:
    """``scale · B @ A`` of one module: A ``[r, in]``, B ``[out, r]`` float32."""

    module: str  # e.g. layers.3.self_attn.q_proj
    a: np.ndarray
    b: np.ndarray
    scale: float


def read_adapter(folder: str | Path, dims: Dims) -> list[Delta]:
    """The low-rank pairs of a PEFT folder, checked against the base's dims. Raises CheckpointError,
    UnsupportedModel.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} has no adapter_config.json; expected a PEFT folder")
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type", "LORA") != "LORA":
        raise UnsupportedModel(
            f"{folder} is a {config['peft_type']} adapter; only LORA can be applied"
        )
    for key, expected in _PLAIN.items():
        if config.get(key) not in (expected, None, []):
            raise UnsupportedModel(
                f"{folder / 'adapter_config.json'}: {key} is {config[key]!r}; only plain "
                f"LoRA ({key} {expected!r}) can be converted. Merge it with PEFT first"
            )
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"{folder} has no adapter_model.safetensors"
            + ("; its adapter_model.bin is a pickle and is never opened" if pickled else "")
        )
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


def _values(folder: Path, entries) -> Checkpoint:
    bad = next((entry for entry in entries if entry.dtype not in DTYPES), None)
    if bad:
        raise CheckpointError(
            f"{bad.file}: tensor {bad.stored!r} has type {bad.dtype}; expected one of "
            f"{', '.join(DTYPES)}"
        )
    return Checkpoint(folder, {}, entries)


def _delta(path: Path, module: str, pair: dict[str, np.ndarray], config: dict, dims: Dims) -> Delta:
    targets = _TARGETS_3N if dims.family == "gemma3n" else _TARGETS
    match = re.fullmatch(re.escape(PREFIX) + r"layers\.(\d+)\.(.+)", module)
    if match is None or match[2] not in targets or int(match[1]) >= dims.n_layer:
        raise UnsupportedModel(
            f"{path} adapts {module!r}, which llama.cpp would not apply to a {dims.family} "
            f"of {dims.n_layer} layers; it applies {', '.join(targets)}"
        )
    if pair.keys() != {"A", "B"}:
        raise CheckpointError(
            f"{path}: {module!r} has only lora_{next(iter(pair))}; the adapter is incomplete"
        )
    a, b = pair["A"], pair["B"]
    out, columns = _shape(dims, match[2])
    if (
        a.ndim != 2
        or b.ndim != 2
        or a.shape[0] != b.shape[1]
        or (b.shape[0], a.shape[1]) != (out, columns)
    ):
        raise CheckpointError(
            f"{path}: {module!r} has A {list(a.shape)} and B {list(b.shape)}; the base's "
            f"weight is {[out, columns]}. Was it trained on another model?"
        )
    rank = a.shape[0]
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    return Delta(
        module.removeprefix(PREFIX),
        a,
        b,
        float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank),
    )


def _pattern(patterns, module: str, default):
    """PEFT's alpha_pattern: the first key that ends the module's name (or matches it as an
    expression).
    """
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default


def _shape(dims: Dims, target: str) -> tuple[int, int]:
    from edge_gemma.convert.gemma import _checkpoint_shapes

    return _checkpoint_shapes(dims)[f"{PREFIX}layers.0.{target}.weight"]


class Merged:
    """Reads like a Checkpoint, with adapters added to the weights they belong to."""

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
                self._deltas.setdefault(f"{PREFIX}{delta.module}.weight", []).append((delta, scale))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        values = self._checkpoint.read(name, rows)
        for delta, scale in self._deltas.get(name, ()):
            values = values + np.float32(scale * delta.scale) * (
                delta.b[rows if rows is not None else slice(None)] @ delta.a
            )
        return values


def convert_lora(
    folder: str | Path, base: str | Path, out: str | Path, *, overwrite: bool = False
) -> list[str]:
    """Write a PEFT adapter as a GGUF adapter for ``--lora``.

    ``base`` is the checkpoint it was trained on (only its config is read).

    Returns notes on what has no effect. Raises CheckpointError, UnsupportedModel, UsageError.
    """
    out = Path(out)
    check_output(out, overwrite=overwrite)
    config = (
        read_json(Path(base) / "config.json") if (Path(base) / "config.json").is_file() else None
    )
    if config is None:
        raise CheckpointError(
            f"{base} has no config.json; give the checkpoint folder the adapter was trained on"
        )
    dims = read_dims(config)
    targets = _TARGETS_3N if dims.family == "gemma3n" else _TARGETS
    notes, tensors = [], []
    for delta in read_adapter(folder, dims):
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", delta.module)
        if (
            dims.family == "gemma3n"
            and int(match[1]) >= GEMMA3N_KV_LAYERS
            and targets[match[2]] in ("attn_k", "attn_v")
        ):
            notes.append(
                f"{delta.module}: a layer that shares its KV never computes this; left out"
            )
            continue
        name = f"blk.{match[1]}.{targets[match[2]]}.weight"
        tensors.append((name + ".lora_a", delta.a))  # [r, in]: in ggml order (in, r)
        tensors.append(
            (name + ".lora_b", delta.b * np.float32(delta.scale * delta.a.shape[0]))
        )  # alpha 1: llama.cpp divides by r again
    if not tensors:
        raise CheckpointError(f"{folder} adapts nothing that this model computes")
    pairs = [
        ("general.architecture", family_of(config)),
        ("general.type", "adapter"),
        ("general.name", Path(folder).resolve().name),
        ("adapter.type", "lora"),
        ("adapter.lora.alpha", 1.0),
    ]
    write_gguf(
        out, pairs, [(name, tuple(reversed(values.shape)), values) for name, values in tensors]
    )
    return notes
