"""Small Hugging Face style checkpoints from recipes, numpy only: every tensor is drawn from a
generator seeded by (seed, name).

A recipe is ``{"seed", "config", "tensors": {name: shape}, "copy": [files], "files": {name: text or
JSON}}``. The answers beside the recipes in ``reference/`` (``.npz``) are what transformers 5.23
(float32, eager attention) computed from exactly these checkpoints; leaving out tensors that a
question does not touch changes no answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from edge_gemma.convert.quantize import to_bf16
from safetensors.numpy import save_file

REFERENCE = Path(__file__).parent / "reference"


def recipe(name: str) -> dict:
    return json.loads((REFERENCE / f"{name}.json").read_text())


def values(name: str, shape: tuple[int, ...], seed: int, family: str) -> np.ndarray:
    """One tensor as float32, before rounding to bf16."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    x = np.random.Generator(np.random.Philox(key)).standard_normal(shape, dtype=np.float32)
    if name.endswith("per_dim_scale"):
        return x * 0.1
    if name.endswith("correct_output_scale"):
        return 1 + 0.1 * x
    if "layer_scale" in name and name.endswith("gamma"):
        return 0.1 * x
    if family == "gemma3n" and name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.35 * (1 + 0.1 * x)
    if ("norm" in name or ".bn" in name) and name.endswith("weight"):
        return 0.1 * x if family == "gemma3" and "vision_tower" not in name else 1 + 0.1 * x
    if name.endswith("bias"):
        return 0.02 * x
    if "embed_tokens" in name or name.endswith("embedding.weight"):
        return 0.05 * x
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
    return (x * (1.0 / np.sqrt(fan_in))).astype(np.float32)


def bf16(x: np.ndarray) -> np.ndarray:
    """``x`` rounded to bf16, as float32."""
    return to_bf16(x).astype(np.float32)


def write_safetensors(
    path: Path, tensors: Iterable[tuple[str, np.ndarray]], dtype: str = "BF16"
) -> None:
    """Write float32 ``tensors`` as ``dtype`` (BF16, F16 or F32)."""
    encode = {
        "BF16": to_bf16,
        "F16": lambda x: x.astype(np.float16),
        "F32": lambda x: x.astype(np.float32),
    }[dtype]
    stored = {name: np.ascontiguousarray(encode(value)) for name, value in tensors}
    save_file(stored, path, metadata={"format": "pt"})


def write_checkpoint(
    recipe: dict | str,
    out: Path,
    *,
    keep: Callable[[str], bool] = lambda name: True,
    rename: Callable[[str], str] = lambda name: name,
    dtype: str = "BF16",
    n_shards: int = 1,
    seed: int | None = None,
) -> Path:
    """Write a recipe (or the one of that name) as a folder: the tensors ``keep`` wants, spelled by
    ``rename``, in one file or shards.
    """
    recipe = (
        json.loads((REFERENCE / f"{recipe}.json").read_text())
        if isinstance(recipe, str)
        else recipe
    )
    out.mkdir(parents=True, exist_ok=True)
    seed = recipe["seed"] if seed is None else seed
    family = "gemma3n" if "3n" in recipe["config"]["model_type"] else "gemma3"
    tensors = [
        (rename(name), values(name, tuple(shape), seed, family))
        for name, shape in recipe["tensors"].items()
        if keep(name)
    ]
    if n_shards == 1:
        write_safetensors(out / "model.safetensors", tensors, dtype)
    else:
        weight_map = {}
        for k in range(n_shards):
            file = f"model-{k + 1:05d}-of-{n_shards:05d}.safetensors"
            part = tensors[k::n_shards]
            write_safetensors(out / file, part, dtype)
            weight_map |= {name: file for name, _ in part}
        (out / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    (out / "config.json").write_text(json.dumps(recipe["config"]))
    for file in recipe.get("copy", []):
        (out / file).write_bytes((REFERENCE / file).read_bytes())
    for file, content in recipe.get("files", {}).items():
        (out / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return out
