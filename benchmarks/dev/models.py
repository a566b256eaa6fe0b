"""Checkpoints with random weights, for tests and benchmarks: values, bf16, safetensors.

    python -m edge_gemma.benchmarks.dev.models e2b|e4b OUT                a whole checkpoint in shards (10.3, 15.2 GB)
    python -m edge_gemma.benchmarks.dev.models audio OUT                  Gemma 3n's audio tower alone (1.4 GB)
    python -m edge_gemma.benchmarks.dev.models siglip|mobilenetv5 OUT     a vision tower alone

In: shapes (``shapes.py``) and configurations. Out: Hugging Face folders as transformers reads them.
Their text is noise; conversion, memory and speed are those of real weights. What it does not know:
conversion, bundles.
"""  # noqa: E501

from __future__ import annotations

import argparse
import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import log2, prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from edge_gemma.benchmarks.dev import shapes as sizes
from edge_gemma.benchmarks.dev.sample import sample_gguf, tokenizer_model
from edge_gemma.benchmarks.dev.shapes import Shapes
from edge_gemma.errors import UsageError

METADATA = {"format": "pt"}
POOL_VALUES = 1 << 24
SHARD_BYTES = 4 << 30
BF16_ONE = np.uint16(0x3F80)
_EXPONENT = 7  # bits of a bf16's fraction: the exponent begins above them


# --- values ---


def values(name: str, shape: tuple[int, ...], seed: int, family: str) -> np.ndarray:
    """One tensor as float32: near unit gain through every matrix, norms near one.

    The same for the same (seed, name): the answers in tests/reference were computed from these.
    """
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


def to_bf16(x: np.ndarray) -> np.ndarray:
    """``x`` rounded to bfloat16, to nearest even."""
    return np.ascontiguousarray(x, np.float32).astype(ml_dtypes.bfloat16)


def bf16(x: np.ndarray) -> np.ndarray:
    """``x`` rounded to bfloat16, as float32."""
    return to_bf16(x).astype(np.float32)


# --- files ---

_ENCODE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "BF16": to_bf16,
    "F16": lambda x: np.ascontiguousarray(x, np.float16),
    "F32": lambda x: np.ascontiguousarray(x, np.float32),
}


def write_safetensors(
    path: Path, tensors: Iterable[tuple[str, np.ndarray]], dtype: str = "BF16"
) -> None:
    """One file of tensors that fit in memory, stored as ``dtype`` (BF16, F16 or F32)."""
    encode = _ENCODE[dtype]
    save_file({name: encode(value) for name, value in tensors}, path, METADATA)


def stream_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Callable[[str, tuple[int, ...]], Iterator[np.ndarray]],
) -> int:
    """One bf16 file larger than memory: ``pieces(name, shape)`` yields a tensor's values from front
    to back. Returns the bytes of its weights.

    safetensors' own writer takes whole tensors; this one holds one piece at a time.
    """
    table: dict[str, Any] = {"__metadata__": METADATA}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * prod(shape)
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, shape in shapes.items():
            for piece in pieces(name, shape):
                file.write(piece.tobytes())
        written = file.tell() - 8 - len(head)
    assert written == offset, (written, offset)
    return offset


# --- checkpoints ---


def write_tower(folder: Path, shapes: Shapes, config: dict[str, Any], *, seed: int = 0) -> Path:
    """A checkpoint of one tower: ``config.json`` and ``model.safetensors``, one tensor in memory at
    a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    family = "gemma3n" if "3n" in config["model_type"] else "gemma3"

    def whole(name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        yield to_bf16(values(name, shape, seed, family))

    stream_safetensors(folder / "model.safetensors", shapes, whole)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_audio_tower(
    folder: Path, *, config: dict[str, Any] | None = None, n_embd: int = 2048, seed: int = 0
) -> Path:
    """Gemma 3n's audio tower and embedder; ``config``: another ``audio_config``."""
    config = config or sizes.audio_config()
    whole = {
        "model_type": "gemma3n",
        "audio_config": config,
        "text_config": {"hidden_size": n_embd},
    }
    return write_tower(folder, sizes.audio_shapes(config, n_embd), whole, seed=seed)


def write_vision_tower(
    kind: str,
    folder: Path,
    *,
    n_embd: int | None = None,
    config: dict[str, Any] | None = None,
    n_soft: int = 256,
    seed: int = 1,
) -> Path:
    """``siglip`` or ``mobilenetv5`` with its projector into a decoder ``n_embd`` wide. ``config``:
    another ``vision_config`` (SigLIP alone); ``n_soft``: soft tokens of a picture (SigLIP alone).
    Raises UsageError.
    """
    if kind not in sizes.TOWER_PX:
        raise UsageError(f"unknown tower {kind!r}; choose one of {', '.join(sizes.TOWER_PX)}")
    n_embd = n_embd or sizes.TOWER_N_EMBD[kind]
    vision = config or sizes.vision_config(kind)
    siglip = kind == "siglip"
    shapes = sizes.siglip_shapes(n_embd, vision) if siglip else sizes.mobilenet_shapes(n_embd)
    whole = {
        "model_type": "gemma3" if siglip else "gemma3n",
        "mm_tokens_per_image": n_soft,
        "vision_config": vision,
        "text_config": {"hidden_size": n_embd},
    }
    return write_tower(folder, shapes, whole, seed=seed)


def write_gemma3n(size: str, out: Path, *, seed: int = 0) -> int:
    """A full-size ``e2b`` or ``e4b`` checkpoint (decoder and audio tower) in shards; returns the
    bytes of its weights.

    Values repeat a pool of 16 million normal deviates, from another start in each tensor and scaled
    by a power of two: writing is as fast as the disk, and quantizing takes the time that real
    weights take. The vocabulary is the sample's.
    """
    out.mkdir(parents=True)
    shards = _shards(sizes.shapes("gemma3n", size))
    pool = to_bf16(np.random.default_rng(seed).standard_normal(POOL_VALUES, np.float32))
    total = 0
    weight_map: dict[str, str] = {}
    for k, shard in enumerate(shards):
        file = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        total += stream_safetensors(out / file, shard, _from_pool(pool.view(np.uint16), shard))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(sizes.gemma3n_config(size), indent=1))
    (out / "tokenizer.model").write_bytes(tokenizer_model(sample_gguf()))
    return total


def _shards(shapes: Shapes) -> list[Shapes]:
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * prod(shape)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    return shards


def _from_pool(
    pool: np.ndarray, shard: Shapes
) -> Callable[[str, tuple[int, ...]], Iterator[np.ndarray]]:
    """``pool``: bf16 values as uint16. A power of two less is one less in the exponent."""
    starts = {name: k * 7_654_321 % len(pool) for k, name in enumerate(shard)}

    def pieces(name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        if len(shape) == 1 and "norm" in name:
            yield np.full(shape, BF16_ONE, np.uint16)
            return
        if "embed_tokens" in name or "embedding" in name:
            halvings = 4
        else:
            halvings = round(log2(max(2, prod(shape[1:]) or shape[0])) / 2)
        less = np.uint16(halvings << _EXPONENT)
        exponent = pool & np.uint16(0x7F80)
        scaled = np.where(exponent > less, pool - less, np.uint16(0))
        left, start = prod(shape), starts[name]
        while left:
            part = scaled[start : start + left]
            yield part
            left, start = left - len(part), 0

    return pieces


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["e2b", "e4b", "audio", *sizes.TOWER_PX])
    parser.add_argument("out", type=Path)
    parser.add_argument("--n-embd", type=int, help="width of the decoder a vision tower is for")
    options = parser.parse_args()
    if options.what in ("e2b", "e4b"):
        write_gemma3n(options.what, options.out)
    elif options.what == "audio":
        write_audio_tower(options.out)
    else:
        write_vision_tower(options.what, options.out, n_embd=options.n_embd)
    print(options.out)


if __name__ == "__main__":
    main()
