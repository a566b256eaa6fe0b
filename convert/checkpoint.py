"""A Hugging Face folder → tensors by canonical name, read lazily, a few rows at a time.

In: a folder with ``config.json`` and ``*.safetensors`` (one file, or shards with an index). Out: a
:class:`Checkpoint` whose tensors are float32 slices. This room does not know which tensors a model
needs, nor what becomes of them. Pickle files are never opened.

The header reader follows https://github.com/huggingface/safetensors#format: 8 bytes little-endian
length, JSON, then the tensors without holes. Everything is checked against the file's size before
anything is allocated.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from edge_gemma.errors import CheckpointError
from edge_gemma.units import MiB, format_bytes

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_JSON_BYTES = 256 * MiB  # tokenizer.json of Gemma has 33 MB, an index less than 1 MB
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_SIZES = DTYPES | {
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
_IGNORED = ("position_ids",)  # integer buffers that old checkpoints carry and no model reads

# Old and text-only spellings → the names transformers 5 writes; the first match wins and is applied
# until none does.
_RENAMES = (
    (re.compile(r"^model\.language_model\.model\."), "model.language_model."),
    (re.compile(r"^(?:model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^language_model\."), "model.language_model."),
    (re.compile(r"^model\.vision_tower\.vision_model\."), "model.vision_tower."),
    (
        re.compile(r"^(audio_tower|vision_tower|embed_audio|embed_vision|multi_modal_projector)\."),
        r"model.\1.",
    ),
    (
        re.compile(
            r"^model\.(?=(?:embed_tokens|embed_tokens_per_layer|layers|norm|per_layer_model_projection|per_layer_projection_norm"
            r"|altup_projections|altup_unembed_projections)\.)"
        ),
        "model.language_model.",
    ),
)


def canonical_name(stored: str) -> str:
    """The name a tensor has in transformers 5, whatever the checkpoint's age.

    >>> canonical_name("language_model.model.layers.0.mlp.up_proj.weight")
    'model.language_model.layers.0.mlp.up_proj.weight'
    >>> canonical_name("model.embed_tokens.weight")
    'model.language_model.embed_tokens.weight'
    """
    for _ in range(4):
        for pattern, replacement in _RENAMES:
            renamed = pattern.sub(replacement, stored)
            if renamed != stored:
                stored = renamed
                break
        else:
            break
    return stored


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies. ``shape`` is in numpy order (rows first); ``offset`` counts from the
    start of ``file``.
    """

    name: str  # canonical
    stored: str  # as the file spells it
    file: Path
    dtype: str  # F64 | F32 | F16 | BF16
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> list[Entry]:
    """The tensor table of one safetensors file, in file order. Raises CheckpointError for anything
    that is not exactly right.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            n = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= n <= min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is not a usable safetensors file: its header claims {n} bytes, "
                    f"the file has {size} "
                    f"(limit {MAX_HEADER_BYTES}); truncated, or an LFS pointer: download it again"
                )
            raw = file.read(n)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    header = _json_object(raw, path)
    header.pop("__metadata__", None)
    entries, data_start = [], 8 + n
    for stored, value in header.items():
        dtype, shape, begin, end = _tensor_fields(path, stored, value)
        if end - begin != prod(shape) * _SIZES[dtype]:
            raise CheckpointError(
                f"{path}: tensor {stored!r} of shape {list(shape)} and type {dtype} needs "
                f"{prod(shape) * _SIZES[dtype]} bytes, its offsets give {end - begin}"
            )
        entries.append(
            Entry(
                canonical_name(stored), stored, path, dtype, shape, data_start + begin, end - begin
            )
        )
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    position = data_start
    for entry in entries:
        if entry.offset != position:
            kind = (
                "overlaps the tensor before it"
                if entry.offset < position
                else "leaves a gap before it"
            )
            raise CheckpointError(
                f"{path}: tensor {entry.stored!r} {kind} (starts at byte {entry.offset}, "
                f"expected {position}); the file is damaged"
            )
        position += entry.nbytes
    if position != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header describes {position}: truncated or "
            "damaged; download it again"
        )
    return entries


def _tensor_fields(path: Path, stored: str, value) -> tuple[str, tuple[int, ...], int, int]:
    def is_int(x) -> bool:
        return type(x) is int and 0 <= x < 1 << 48

    ok = (
        isinstance(value, dict)
        and isinstance(value.get("dtype"), str)
        and value["dtype"] in _SIZES
        and isinstance(value.get("shape"), list)
    )
    ok = ok and len(value["shape"]) <= 8 and all(map(is_int, value["shape"]))
    ok = (
        ok
        and isinstance(value.get("data_offsets"), list)
        and len(value["data_offsets"]) == 2
        and all(map(is_int, value["data_offsets"]))
    )
    if not ok:
        raise CheckpointError(
            f"{path}: the entry of tensor {stored!r} is malformed: {str(value)[:120]}; "
            "expected dtype, shape and two data_offsets"
        )
    return value["dtype"], tuple(value["shape"]), *value["data_offsets"]


def _json_object(raw: bytes, path: Path) -> dict:
    def no_duplicates(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds JSON of type {type(value).__name__}, expected an object"
        )
    return value


def read_json(path: Path) -> dict:
    """A JSON object from a file of bounded size. Raises CheckpointError."""
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {format_bytes(size)}; expected at most {format_bytes(MAX_JSON_BYTES)}"
            )
        return _json_object(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


class Checkpoint:
    """The tensors of a folder by canonical name. Reading is safe from several threads.

    >>> checkpoint = Checkpoint.open(getfixture("tiny_checkpoint"))
    >>> checkpoint.read("model.language_model.norm.weight").dtype
    dtype('float32')
    """

    def __init__(
        self, folder: Path, config: dict, entries: Iterable[Entry], ignored: Iterable[str] = ()
    ):
        self.folder, self.config = folder, config
        self.entries: dict[str, Entry] = {}
        self.ignored = tuple(ignored)  # stored names that were left out on purpose
        for entry in entries:
            if (other := self.entries.get(entry.name)) is not None:
                raise CheckpointError(
                    f"{folder}: tensor {entry.name!r} is there twice, as {other.stored!r} in "
                    f"{other.file.name} and as {entry.stored!r} in {entry.file.name}"
                )
            self.entries[entry.name] = entry

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Checkpoint:
        """Read the config and every header; no tensor yet. Raises CheckpointError."""
        folder = Path(folder)
        if not folder.is_dir():
            hint = (
                f"; a GGUF is imported with `edge-gemma import {folder} OUT`"
                if folder.suffix == ".gguf"
                else ""
            )
            raise CheckpointError(
                f"{folder} is not a folder; expected one with config.json and *.safetensors{hint}"
            )
        files = _weight_files(folder)
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
        if config is None:
            raise CheckpointError(f"{folder} has no config.json; download the whole checkpoint")
        entries, ignored = [], []
        for path, expected in files.items():
            found = read_header(path)
            if expected is not None:
                stored = {entry.stored for entry in found}
                for name in sorted(expected - stored):
                    raise CheckpointError(
                        f"{folder / INDEX} places tensor {name!r} in {path.name}, which does "
                        "not hold it; download the shards again"
                    )
                for name in sorted(stored - expected):
                    raise CheckpointError(
                        f"{path} holds tensor {name!r}, which {INDEX} does not place there; "
                        "the shards are of different checkpoints"
                    )
            for entry in found:
                if entry.dtype in DTYPES:
                    entries.append(entry)
                elif entry.stored.endswith(_IGNORED):
                    ignored.append(entry.stored)
                else:
                    raise CheckpointError(
                        f"{path}: tensor {entry.stored!r} has type {entry.dtype}; expected "
                        f"one of {', '.join(DTYPES)}. "
                        "Quantized checkpoints (bitsandbytes, GPTQ, FP8 …) cannot be "
                        "converted: take the original bf16 one"
                    )
        return cls(folder, config, entries, ignored)

    def names(self) -> list[str]:
        return list(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str) -> Entry:
        try:
            return self.entries[name]
        except KeyError:
            raise CheckpointError(
                f"{self.folder} lacks the tensor {name!r}; the checkpoint is incomplete or "
                "not of the architecture its config names"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """``name`` as float32 ``[rows, …]``, whole or a contiguous slice along its first axis. NaN
        and infinity are refused by name.
        """
        entry = self.entry(name)
        shape, first = entry.shape, 0
        if rows is not None:
            first, stop, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError(f"rows must be contiguous, got {rows}")
            shape = (max(0, stop - first), *shape[1:])
        n, width = prod(shape), _SIZES[entry.dtype]
        raw = np.empty(
            n,
            {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}[
                entry.dtype
            ],
        )
        if n:
            _read_exactly(
                entry.file,
                entry.offset + first * prod(entry.shape[1:]) * width,
                memoryview(raw).cast("B"),
            )
        if entry.dtype == "BF16":  # the upper half of a float32
            wide = raw.astype(np.uint32)
            wide <<= 16
            raw = wide.view(np.float32)
        values = raw.astype(np.float32, copy=False)
        # A finite sum proves that every term is; only a suspicious one is looked at value by value.
        with np.errstate(over="ignore", invalid="ignore"):
            finite = (
                n == 0 or np.isfinite(values.sum(dtype=np.float32)) or np.isfinite(values).all()
            )
        if not finite:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.stored!r} holds NaN or infinity; the "
                "checkpoint is damaged or diverged in training"
            )
        return values.reshape(shape)


def _read_exactly(path: Path, offset: int, out: memoryview) -> None:
    """Fill ``out`` from ``offset``. Opened per call: safe between threads on every platform, and
    cheap next to a chunk's megabytes.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            position = 0
            while position < len(out):
                count = file.readinto(out[position : position + (1 << 30)])
                if not count:
                    raise CheckpointError(
                        f"{path} ended at byte {offset + position} while it was read; it was "
                        "changed during the conversion"
                    )
                position += count
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Every safetensors file to read, with the stored names its index expects in it (None without
    an index).
    """
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX} has no weight_map; download it again")
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if (
                not isinstance(file, str)
                or Path(file).name != file
                or not file.endswith(".safetensors")
            ):
                raise CheckpointError(
                    f"{folder / INDEX} places {name!r} in {file!r}; expected the plain name "
                    "of a .safetensors file in the same folder"
                )
            files.setdefault(folder / file, set()).add(name)
        for path in sorted(files):
            if not path.is_file():
                raise CheckpointError(
                    f"the shard {path.name} is missing in {folder} ({INDEX} lists "
                    f"{len(files)} shards); download it"
                )
        return dict(sorted(files.items()))
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if (folder / "model.safetensors") in found:
        return {folder / "model.safetensors": None}
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is a LoRA adapter, not a model; use `edge-gemma convert-lora {folder} "
            "BASE OUT`, or --merge while converting its base"
        )
    shards = [
        (path, match)
        for path in found
        if (match := re.fullmatch(r".*-(\d{5})-of-(\d{5})\.safetensors", path.name))
    ]
    if shards:
        total = int(shards[0][1][2])
        for k in range(1, total + 1):
            if not any(int(match[1]) == k and int(match[2]) == total for _, match in shards):
                raise CheckpointError(f"shard {k} of {total} is missing in {folder}; download it")
        return {path: None for path, _ in shards}
    if len(found) == 1:
        return {found[0]: None}
    pickles = sorted(
        path.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
        for path in folder.glob(pattern)
    )
    if pickles and not found:
        raise CheckpointError(
            f"{folder} holds its weights as pickle ({pickles[0]}), which can run code when "
            "opened and is never read here; take the safetensors version"
        )
    what = f"{len(found)} safetensors files without {INDEX}" if found else "no *.safetensors"
    raise CheckpointError(
        f"{folder} has {what}; expected model.safetensors, or shards with {INDEX}"
    )
