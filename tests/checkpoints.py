"""Small Hugging Face style checkpoints from recipes, numpy only: every tensor is drawn from a
generator seeded by (seed, name).

A recipe is ``{"seed", "config", "tensors": {name: shape}, "copy": [files], "files": {name: text or
JSON}}``. The answers beside the recipes in ``reference/`` (``.npz``) are what transformers 5.23
(float32, eager attention) computed from exactly these checkpoints; leaving out tensors that a
question does not touch changes no answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from edge_gemma.benchmarks.dev.models import bf16, values, write_safetensors

__all__ = ["bf16", "recipe", "values", "write_checkpoint", "write_safetensors"]

REFERENCE = Path(__file__).parent / "reference"


def recipe(name: str) -> dict:
    return json.loads((REFERENCE / f"{name}.json").read_text())


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
