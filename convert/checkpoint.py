"""A Hugging Face folder → tensors by canonical name, read lazily, a few
rows at a time.

In: a folder with ``config.json`` and ``*.safetensors`` (one file, or shards
with an index). Out: a :class:`Checkpoint` whose tensors are float32 slices.
This module does not know which tensors a model needs, nor what becomes of
them. Pickle files are never opened.

Headers are read here, not by the safetensors library, which maps whole
files: pages of a mapped file count as this process's memory, while slices
that are read and dropped keep the peak at a few megabytes. The format is
https://github.com/huggingface/safetensors#format: 8 bytes little-endian
length, JSON, then the tensors without holes. Everything is checked against
the file's size before anything is allocated.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from edge_gemma.convert.convolutions import channel_first
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.errors import CheckpointError
from edge_gemma.units import MiB, format_bytes

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_JSON_BYTES = 256 * MiB  # tokenizer.json of Gemma has 33 MB, an index less than 1 MB
INDEX = "model.safetensors.index.json"
# Element types that weights may have, and what numpy calls them
DTYPES: dict[str, type] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
_OTHER_SIZES = {
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
_SIZES = {name: np.dtype(kind).itemsize for name, kind in DTYPES.items()} | _OTHER_SIZES
# Buffers that some checkpoints carry; every model computes them anew
_IGNORED = ("position_ids", "inv_freq", "inv_timescales", "embed_scale")

_DECODER_PARTS = (
    "embed_tokens",
    "embed_tokens_per_layer",
    "layers",
    "norm",
    "per_layer_model_projection",
    "per_layer_projection_norm",
    "altup_projections",
    "altup_unembed_projections",
)
# What training wrappers put into the names they save (torch.compile, FSDP, DDP, PEFT)
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
    r"|^(?:base_model\.model\.|module\.)+"
)
# Old and text-only spellings → the names transformers 5 writes; the first
# match wins and is applied until none does.
_RENAMES = (
    (_WRAPPERS, ""),
    # transformers 4.57 renames every "model" of a text-only Gemma 3n, inside a word as well
    (re.compile(r"(?<=_model)\.language_model(?=_)"), ""),
    (re.compile(r"^model\.language_model\.model\."), "model.language_model."),
    (re.compile(r"^(?:model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^language_model\."), "model.language_model."),
    (re.compile(r"^model\.vision_tower\.vision_model\."), "model.vision_tower."),
    (
        re.compile(r"^(audio_tower|vision_tower|embed_audio|embed_vision|multi_modal_projector)\."),
        r"model.\1.",
    ),
    (re.compile(rf"^model\.(?=(?:{'|'.join(_DECODER_PARTS)})\.)"), "model.language_model."),
    # the bare text model, saved without the class that holds it
    (re.compile(rf"^(?=(?:{'|'.join(_DECODER_PARTS)})\.)"), "model.language_model."),
)
HEAD = "lm_head.weight"


def canonical_name(stored: str) -> str:
    """The name a tensor has in transformers 5, whatever the checkpoint's
    age.

    >>> canonical_name("language_model.model.layers.0.mlp.up_proj.weight")
    'model.language_model.layers.0.mlp.up_proj.weight'
    >>> canonical_name("model.embed_tokens.weight")
    'model.language_model.embed_tokens.weight'
    """
    renamed = _renamed(stored)
    while renamed != stored:
        stored, renamed = renamed, _renamed(renamed)
    return stored


def without_wrappers(stored: str) -> str:
    """A name as the model that was trained spells it.

    >>> without_wrappers("base_model.model.model.layers.0._orig_mod.mlp.up_proj")
    'model.layers.0.mlp.up_proj'
    """
    return _WRAPPERS.sub("", stored)


def _renamed(stored: str) -> str:
    for pattern, replacement in _RENAMES:
        renamed = pattern.sub(replacement, stored)
        if renamed != stored:
            return renamed
    return stored


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies. ``shape`` is in numpy order (rows first);
    ``offset`` counts from the start of ``file``.
    """

    name: str  # canonical
    stored: str  # as the file spells it
    file: Path
    dtype: str  # F64 | F32 | F16 | BF16
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> list[Entry]:
    """The tensor table of one safetensors file, in file order. Raises
    CheckpointError for anything that is not exactly right.
    """
    entries, _ = _header_and_framework(path)
    return entries


def _header_and_framework(path: Path) -> tuple[list[Entry], str]:
    """:func:`read_header`, and the framework that wrote the file ("pt", "mlx", "" when the file
    does not say).
    """
    raw, size = _header_bytes(path)
    header = _json_object(raw, path)
    metadata = header.pop("__metadata__", None)
    framework = metadata.get("format") if isinstance(metadata, dict) else None
    data_start = 8 + len(raw)
    entries = [_entry(path, stored, value, data_start) for stored, value in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_no_holes(path, entries, data_start, size)
    return entries, framework if isinstance(framework, str) else ""


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON at the start of a safetensors file, and the size of the
    whole file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            n = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= n <= min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is not a usable safetensors file: its header claims {n} bytes, "
                    f"the file has {size} (limit {MAX_HEADER_BYTES}); truncated, or an LFS "
                    "pointer: download it again"
                )
            return file.read(n), size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def _entry(path: Path, stored: str, value: object, data_start: int) -> Entry:
    dtype, shape, begin, end = _tensor_fields(path, stored, value)
    needed = prod(shape) * _SIZES[dtype]
    if end - begin != needed:
        raise CheckpointError(
            f"{path}: tensor {stored!r} of shape {list(shape)} and type {dtype} needs "
            f"{needed} bytes, its offsets give {end - begin}"
        )
    return Entry(
        name=canonical_name(stored),
        stored=stored,
        file=path,
        dtype=dtype,
        shape=shape,
        offset=data_start + begin,
        nbytes=needed,
    )


def _check_no_holes(path: Path, entries: list[Entry], data_start: int, size: int) -> None:
    position = data_start
    for entry in entries:
        if entry.offset != position:
            overlaps = entry.offset < position
            fault = "overlaps the tensor before it" if overlaps else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {entry.stored!r} {fault} (starts at byte {entry.offset}, "
                f"expected {position}); the file is damaged"
            )
        position += entry.nbytes
    if position != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header describes {position}: truncated or "
            "damaged; download it again"
        )


def _tensor_fields(path: Path, stored: str, value: object) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one entry of the header, checked."""
    match value:
        case {
            "dtype": str(dtype),
            "shape": [*shape],
            "data_offsets": [begin, end],
        } if dtype in _SIZES and len(shape) <= 8 and all(map(_is_size, [*shape, begin, end])):
            return dtype, tuple(shape), begin, end
    raise CheckpointError(
        f"{path}: the entry of tensor {stored!r} is malformed: {str(value)[:120]}; "
        "expected dtype, shape and two data_offsets"
    )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _json_object(raw: bytes, path: Path) -> dict:
    def no_duplicates(pairs: list[tuple[str, object]]) -> dict:
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


class Checkpoint(TensorReader):
    """The tensors of a folder by canonical name. Reading is safe from
    several threads.

    >>> checkpoint = Checkpoint.open(getfixture("tiny_checkpoint"))
    >>> checkpoint.read("model.language_model.norm.weight").dtype
    dtype('float32')
    """

    def __init__(
        self,
        folder: Path,
        config: dict,
        entries: Iterable[Entry],
        ignored: Iterable[str] = (),
        *,
        framework: str = "",
        notes: Iterable[str] = (),
    ):
        self.folder = folder
        self._config = config
        self.entries: dict[str, Entry] = {}
        self.ignored = tuple(ignored)  # stored names that were left out on purpose
        self.framework = framework  # that wrote the files: "pt", "mlx", "" when they do not say
        for entry in entries:
            if (other := self.entries.get(entry.name)) is not None:
                raise CheckpointError(
                    f"{folder}: tensor {entry.name!r} is there twice, as {other.stored!r} in "
                    f"{other.file.name} and as {entry.stored!r} in {entry.file.name}"
                )
            self.entries[entry.name] = entry
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        self._turned = channel_first(shapes, config, framework)
        self.notes = tuple(notes)  # what was found and how it was read
        if self._turned:
            n = len(self._turned)
            what = "1 convolution is" if n == 1 else f"{n} convolutions are"
            self.notes += (f"{what} stored channel-last (as MLX does) and read channel-first",)

    @property
    def name(self) -> str:
        """What the checkpoint is called: its folder, or in the hub's cache its repository."""
        return checkpoint_name(self.folder)

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Checkpoint:
        """Read the config and every header; no tensor yet. Raises
        CheckpointError.
        """
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
        files, notes = _weight_files(folder)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json; download the whole checkpoint")
        config = read_json(folder / "config.json")
        entries: list[Entry] = []
        ignored: list[str] = []
        frameworks: set[str] = set()
        for path, expected in files.items():
            found, framework = _header_and_framework(path)
            frameworks.add(framework)
            if expected is not None:
                _check_against_index(folder, path, found, expected)
            for entry in found:
                if entry.stored.endswith(_IGNORED):
                    ignored.append(entry.stored)
                elif entry.dtype in DTYPES:
                    entries.append(entry)
                else:
                    raise _not_a_weight(entry)
        written_by = "mlx" if "mlx" in frameworks else min(frameworks)
        return cls(folder, config, entries, ignored, framework=written_by, notes=notes)

    @property
    def config(self) -> dict:
        return self._config

    def include(self, name: str, path: Path, stored: str) -> None:
        """Add the tensor ``stored`` of another file under ``name``. Raises
        CheckpointError.
        """
        found = {entry.stored: entry for entry in read_header(path)}
        if stored not in found or found[stored].dtype not in DTYPES:
            raise CheckpointError(
                f"{path} holds {', '.join(sorted(found)) or 'no tensor'}; expected {stored!r} as "
                f"{', '.join(DTYPES)}"
            )
        self.entries[name] = replace(found[stored], name=name)

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
        shape = self.entry(name).shape
        return tuple(shape[axis] for axis in self._turned[name]) if name in self._turned else shape

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """``name`` as float32 ``[rows, …]``, whole or a contiguous slice
        along its first axis. NaN and infinity are refused by name.
        """
        entry = self.entry(name)
        shape, first = entry.shape, 0
        if rows is not None:
            first, stop, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError(f"rows must be contiguous, got {rows}")
            shape = (max(0, stop - first), *shape[1:])
        raw: np.ndarray = np.empty(prod(shape), DTYPES[entry.dtype])
        skipped_bytes = first * prod(entry.shape[1:]) * raw.itemsize
        _read_exactly(entry.file, entry.offset + skipped_bytes, raw.view(np.uint8).data)
        values = raw.astype(np.float32, copy=False)
        if not _all_finite(values):
            raise CheckpointError(
                f"{entry.file}: tensor {entry.stored!r} holds NaN or infinity; the "
                "checkpoint is damaged or diverged in training"
            )
        values = values.reshape(shape)
        if name in self._turned:  # the first axis stays, so that rows stay rows
            values = np.ascontiguousarray(values.transpose(self._turned[name]))
        return values


def checkpoint_name(folder: str | os.PathLike) -> str:
    """The last part of a checkpoint's name: of its folder, or of the repository when the folder
    is a snapshot in the hub's cache (``models--org--name/snapshots/COMMIT``).
    """
    path = Path(folder).resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.split("--")[-1]
    return path.name


def _check_against_index(folder: Path, path: Path, found: list[Entry], expected: set[str]) -> None:
    # an output head that is tied is listed by some tools and left out by others; whether one
    # is needed is decided where tensors are mapped
    stored = {entry.stored for entry in found if entry.name != HEAD}
    expected = {name for name in expected if canonical_name(name) != HEAD}
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


def _not_a_weight(entry: Entry) -> CheckpointError:
    return CheckpointError(
        f"{entry.file}: tensor {entry.stored!r} has type {entry.dtype}; expected "
        f"one of {', '.join(DTYPES)}. "
        "Quantized checkpoints (bitsandbytes, GPTQ, FP8 …) cannot be "
        "converted: take the original bf16 one"
    )


def _all_finite(values: np.ndarray) -> bool:
    """A finite sum proves that every term is; only a suspicious one is
    looked at value by value.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum(dtype=np.float32)):
            return True
    return bool(np.isfinite(values).all())


def _read_exactly(path: Path, offset: int, out: memoryview) -> None:
    """Fill ``out`` from ``offset``. Opened per call: safe between threads
    on every platform, and cheap next to a chunk's megabytes.
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


def _weight_files(folder: Path) -> tuple[dict[Path, set[str] | None], list[str]]:
    """Every safetensors file to read, with the stored names its index
    expects in it (None without an index), and notes. A whole model.safetensors is read without
    its index, as transformers does.
    """
    whole = folder / "model.safetensors"
    if whole.is_file():
        return {whole: None}, _stale_index(folder)
    return _sharded_files(folder), []


def _stale_index(folder: Path) -> list[str]:
    """A note when the index beside a whole file speaks of other files."""
    if not (folder / INDEX).is_file():
        return []
    try:
        files = read_json(folder / INDEX)["weight_map"].values()
        others = sorted({str(file) for file in files} - {"model.safetensors"})
    except (CheckpointError, KeyError, AttributeError, TypeError):
        others = ["nothing that can be read"]
    return [
        f"{INDEX} lists {others[0]} while model.safetensors is there whole; the index is ignored"
        for _ in others[:1]
    ]


def _sharded_files(folder: Path) -> dict[Path, set[str] | None]:
    if (folder / INDEX).is_file():
        return {**_indexed_files(folder)}
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} is a LoRA adapter, not a model; use `edge-gemma convert-lora {folder} "
            "BASE OUT`, or --merge while converting its base"
        )
    if shards := _numbered_shards(folder, found):
        return dict.fromkeys(shards)
    if len(found) == 1:
        return {found[0]: None}
    raise _no_weights(folder, len(found))


def _indexed_files(folder: Path) -> dict[Path, set[str]]:
    """The files that the index lists, sorted, each with the stored names
    expected in it.
    """
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map; download it again")
    files: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        plain = isinstance(file, str) and Path(file).name == file
        if not plain or not file.endswith(".safetensors"):
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


def _numbered_shards(folder: Path, found: list[Path]) -> list[Path]:
    """The files called ``…-00001-of-00002.safetensors``; raises when one of
    the series lacks.
    """
    shards: dict[Path, tuple[int, int]] = {}  # file → (number, total)
    for path in found:
        if match := re.fullmatch(r".*-(\d{5})-of-(\d{5})\.safetensors", path.name):
            shards[path] = int(match[1]), int(match[2])
    if shards:
        _, total = next(iter(shards.values()))
        for number in range(1, total + 1):
            if (number, total) not in shards.values():
                raise CheckpointError(
                    f"shard {number} of {total} is missing in {folder}; download it"
                )
    return list(shards)


def _no_weights(folder: Path, n_found: int) -> CheckpointError:
    patterns = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
    pickles = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    if pickles and not n_found:
        return CheckpointError(
            f"{folder} holds its weights as pickle ({pickles[0]}), which can run code when "
            "opened and is never read here; take the safetensors version"
        )
    what = f"{n_found} safetensors files without {INDEX}" if n_found else "no *.safetensors"
    return CheckpointError(
        f"{folder} has {what}; expected model.safetensors, or shards with {INDEX}"
    )
