"""GGUF header → metadata and tensor ranges, without the vocabulary and without trusting the file.

In: a path. Out: :class:`Header`. Nothing is allocated on the file's word alone: every count and
length is held against what is left of the file first. A 262,144-token vocabulary is stepped over,
never kept (that alone would cost 70 MB). This module knows the container only; what the numbers
mean for a Gemma is in ``description.py``. gguf-py has a reader too, but it keeps the whole
vocabulary and believes the lengths that the file gives.

Format: the GGUF specification, versions 2 and 3, little endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from edge_gemma.errors import BundleError, UnsupportedModel

# ggml's type id (ggml.h, enum ggml_type): (name, values per block, bytes per block)
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
# known by name only: types of intermediate results, of one vendor's kernels, and withdrawn ones
_OTHER_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    40: "NVFP4",
    41: "Q1_0",
}
TYPE_SIZES = {name: (block, nbytes) for name, block, nbytes in GGML_TYPES.values()}
TYPE_IDS = {name: number for number, (name, _, _) in GGML_TYPES.items()}

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_ARRAY_HEAD = 12  # bytes before an array's first item: type and count
_TYPE_NAMES = {
    0: "uint8",
    1: "int8",
    2: "uint16",
    3: "int16",
    4: "uint32",
    5: "int32",
    6: "float32",
    7: "bool",
    8: "string",
    10: "uint64",
    11: "int64",
    12: "float64",
}
MAX_TENSORS, MAX_KEYS, MAX_NAME = 65_536, 65_536, 64  # GGML_MAX_NAME is 64 with the terminator
# arrays up to this many scalars are kept (per-layer tables); longer ones are counted only
MAX_KEPT = 4_096
MIN_ALIGNMENT = 32  # ggml-cpu asserts that weights lie so (TENSOR_ALIGNMENT, ggml-backend.cpp)
MAX_STRING = 1 << 20  # a chat template has a few kilobytes


@dataclass(frozen=True)
class Skipped:
    """An array that was stepped over: a vocabulary, its scores or types."""

    type: int
    length: int
    offset: int  # of its first item, absolute


Value = bool | int | float | str | list[bool] | list[int] | list[float] | Skipped


@dataclass(frozen=True)
class TensorInfo:
    name: str
    type: str
    shape: tuple[int, ...]  # ggml order
    offset: int  # absolute
    nbytes: int


@dataclass(frozen=True)
class Header:
    version: int
    metadata: dict[str, Value]
    types: dict[str, str]  # of each key: "uint32", "array of string" …
    tensors: tuple[TensorInfo, ...]
    alignment: int
    kv_range: tuple[int, int]  # bytes of the key/value section, to copy it verbatim
    data_offset: int  # = bytes of the header with its padding
    file_bytes: int = field(default=0)
    # absolute, of each value: of an array's first item, of a string's length
    offsets: dict[str, int] = field(default_factory=dict)

    def tensor(self, name: str) -> TensorInfo | None:
        return next((t for t in self.tensors if t.name == name), None)


def read_header(path: str | Path) -> Header:
    """Read and check the header of one GGUF file. Raises BundleError (damaged), UnsupportedModel
    (version, byte order, type).
    """
    path = Path(path)
    try:
        file = open(path, "rb")
    except OSError as error:
        raise BundleError(f"cannot open {path}: {error.strerror}") from None
    with file:
        try:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (ValueError, OSError):
            raise BundleError(f"{path} is empty or no regular file; expected a GGUF") from None
        with view:
            try:
                return _parse(_Cursor(view), path)
            except _Truncated as error:
                raise BundleError(
                    f"{path} is damaged: {error}; it has {len(view)} bytes. Download it again"
                ) from None


def find_strings(path: str | Path, array: Skipped, wanted: set[str]) -> dict[str, int]:
    """The indices at which ``wanted`` strings first occur in an array that :func:`read_header`
    stepped over.
    """
    remaining, found = {name.encode(): name for name in wanted}, {}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        unpack, at = struct.Struct("<Q").unpack_from, array.offset
        for i in range(array.length):
            n = unpack(view, at)[0]
            if n < 64 and (name := remaining.pop(bytes(view[at + 8 : at + 8 + n]), None)):
                found[name] = i
                if not remaining:
                    break
            at += 8 + n
    return found


def read_strings(path: str | Path, array: Skipped) -> Iterator[bytes]:
    """The strings of an array that :func:`read_header` stepped over."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        unpack, at = struct.Struct("<Q").unpack_from, array.offset
        for _ in range(array.length):
            n = unpack(view, at)[0]
            yield view[at + 8 : at + 8 + n]
            at += 8 + n


# what is often saved under a GGUF's name
_NOT_GGUF = {
    b"vers": "a pointer of Git LFS, it seems; download the file itself (git lfs pull)",
    b"<!do": "a web page; download the file itself",
    b"<!DO": "a web page; download the file itself",
    b"<htm": "a web page; download the file itself",
    b"ggml": "a file from before GGUF; take a newer one",
    b"ggjt": "a file from before GGUF; take a newer one",
    b"PK\x03\x04": "a zip archive; unpack it first",
}


class _Truncated(Exception):
    pass


class _Cursor:
    """Reads little-endian values; every length is held against the rest of the file before it is
    believed.
    """

    def __init__(self, view: mmap.mmap):
        self.view, self.at, self.end = view, 0, len(view)

    def need(self, n: int, what: str) -> int:
        if n > self.end - self.at:
            raise _Truncated(f"{what} needs {n} bytes at byte {self.at}, past the end of the file")
        start, self.at = self.at, self.at + n
        return start

    def scalar(self, code: str, what: str):
        layout = struct.Struct("<" + code)
        return layout.unpack_from(self.view, self.need(layout.size, what))[0]

    def string(self, what: str, limit: int = MAX_STRING) -> str:
        n = self.scalar("Q", what)
        if n > limit:
            raise _Truncated(f"{what} claims a string of {n} bytes (at most {limit} are believed)")
        start = self.need(n, what)
        return self.view[start : start + n].decode("utf-8", "replace")

    def skip_strings(self, count: int, what: str) -> None:
        unpack, view, at, end = struct.Struct("<Q").unpack_from, self.view, self.at, self.end
        for _ in range(count):
            if at + 8 > end:
                raise _Truncated(f"{what} ends inside its strings")
            at += 8 + unpack(view, at)[0]
        if at > end:
            raise _Truncated(f"{what} ends past the end of the file")
        self.at = at


def _value(cursor: _Cursor, kind: int, key: str) -> tuple[str, Value]:
    """(name of the type, value) of one pair."""
    if kind in _SCALARS:
        return _TYPE_NAMES[kind], cursor.scalar(_SCALARS[kind], key)
    if kind == _STRING:
        return _TYPE_NAMES[kind], cursor.string(key)
    if kind != _ARRAY:
        raise _Truncated(f"key {key!r} has value type {kind}, which GGUF does not define")
    item, count = cursor.scalar("I", key), cursor.scalar("Q", key)
    if item == _STRING:
        if count * 8 > cursor.end - cursor.at:
            raise _Truncated(f"key {key!r} claims {count} strings")
        start = cursor.at
        cursor.skip_strings(count, key)
        return "array of string", Skipped(item, count, start)
    if item not in _SCALARS:
        raise _Truncated(f"key {key!r} is an array of type {item}, which is not supported")
    type_name = f"array of {_TYPE_NAMES[item]}"
    layout = struct.calcsize("<" + _SCALARS[item])
    start = cursor.need(count * layout, key)
    if count > MAX_KEPT:
        return type_name, Skipped(item, count, start)
    return type_name, list(struct.unpack_from(f"<{count}{_SCALARS[item]}", cursor.view, start))


def _parse(cursor: _Cursor, path: Path) -> Header:
    magic = bytes(cursor.view[:4])
    if magic != b"GGUF":
        hint = _NOT_GGUF.get(magic, "not a GGUF file")
        raise BundleError(f"{path} begins with {magic!r}, not b'GGUF': {hint}")
    cursor.at = 4
    version = cursor.scalar("I", "version")
    if version not in (2, 3):
        hint = "big-endian files are not supported" if version >> 16 else "expected 2 or 3"
        raise UnsupportedModel(f"{path} is GGUF version {version}; {hint}")
    n_tensors, n_keys = cursor.scalar("Q", "tensor count"), cursor.scalar("Q", "key count")
    if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
        raise _Truncated(f"it claims {n_tensors} tensors and {n_keys} keys")

    kv_start = cursor.at
    metadata: dict[str, Value] = {}
    types: dict[str, str] = {}
    offsets: dict[str, int] = {}
    for i in range(n_keys):
        key = cursor.string(f"key {i}", limit=65_535)
        if key in metadata:
            raise _Truncated(f"key {key!r} occurs twice")
        kind = cursor.scalar("I", key)
        offsets[key] = cursor.at + (_ARRAY_HEAD if kind == _ARRAY else 0)
        types[key], metadata[key] = _value(cursor, kind, key)
    kv_range = (kv_start, cursor.at)

    alignment = _alignment(metadata, types)
    infos = [_tensor_info(cursor, path) for _ in range(n_tensors)]
    data_offset = -(-cursor.at // alignment) * alignment
    tensors = _tensors(infos, data_offset, alignment, cursor.end)
    return Header(
        version, metadata, types, tensors, alignment, kv_range, data_offset, cursor.end, offsets
    )


def _alignment(metadata: dict[str, Value], types: dict[str, str]) -> int:
    alignment = metadata.get("general.alignment", MIN_ALIGNMENT)
    right_type = types.get("general.alignment", "uint32") == "uint32"
    low, high = MIN_ALIGNMENT, 1 << 20
    if not right_type or not isinstance(alignment, int) or not low <= alignment <= high:
        raise _Truncated(f"general.alignment is {alignment!r}; expected a uint32 of {low} … {high}")
    if alignment & (alignment - 1):
        raise _Truncated(f"general.alignment is {alignment}, not a power of two")
    return alignment


_Info = tuple[str, int, tuple[int, ...], int]  # name, ggml type id, shape, offset in the data


def _tensors(
    infos: list[_Info], data_offset: int, alignment: int, end: int
) -> tuple[TensorInfo, ...]:
    """The tensor table with absolute offsets, each range held against the file's end."""
    tensors: list[TensorInfo] = []
    expected, names = 0, set()
    for name, kind, shape, offset in infos:
        type_name, block, block_bytes = GGML_TYPES[kind]
        nbytes = prod(shape) // block * block_bytes
        if offset != expected:  # ggml insists on this order as well (gguf.cpp)
            raise _Truncated(f"tensor {name!r} lies at {offset}, expected {expected}")
        if data_offset + offset + nbytes > end:
            raise _Truncated(f"tensor {name!r} ends at byte {data_offset + offset + nbytes}")
        if name in names:
            raise _Truncated(f"tensor {name!r} occurs twice")
        names.add(name)
        tensors.append(TensorInfo(name, type_name, shape, data_offset + offset, nbytes))
        expected = -(-(offset + nbytes) // alignment) * alignment
    return tuple(tensors)


def _tensor_info(cursor: _Cursor, path: Path) -> _Info:
    name = cursor.string("tensor name")
    if len(name.encode()) >= MAX_NAME:
        raise _Truncated(f"a tensor's name has {len(name.encode())} bytes (at most {MAX_NAME - 1})")
    n_dims = cursor.scalar("I", name)
    if not 0 < n_dims <= 4:
        raise _Truncated(f"tensor {name!r} has {n_dims} dimensions")
    shape = tuple(cursor.scalar("Q", name) for _ in range(n_dims))
    kind, offset = cursor.scalar("I", name), cursor.scalar("Q", name)
    if kind not in GGML_TYPES:
        known = _OTHER_TYPES.get(kind)
        what = f"is {known}" if known else f"has ggml type {kind}"
        raise UnsupportedModel(
            f"{path}: tensor {name!r} {what}, which this version does not read; take a file of "
            "another quantization"
        )
    if any(n <= 0 or n >= 1 << 40 for n in shape) or prod(shape) >= 1 << 48:
        raise _Truncated(f"tensor {name!r} claims the shape {shape}")
    if shape[0] % GGML_TYPES[kind][1]:
        raise _Truncated(
            f"tensor {name!r} has rows of {shape[0]}, no multiple of {GGML_TYPES[kind][0]}'s "
            f"block of {GGML_TYPES[kind][1]}"
        )
    return name, kind, shape, offset


def layout_rank(use: str, type: str, n_dims: int) -> tuple[int, str]:
    """Where a tensor goes in a file of ours: never read, looked up, a matrix (type by type), read
    as it lies on every CPU.

    Cold first and hot last, because pages populated last survive a tight limit best. Which of the
    hot ones a CPU copies into repacked buffers goes by their type, so each type stands by itself:
    the kernel maps whole folios (up to 2 MiB), and a norm or a matrix that is read in place between
    two copied ones would pull their released originals back in (measured: 135 MiB of E2B).

    >>> layout_rank("lookup", "Q8_0", 2), layout_rank("matmul", "Q4_0", 2)
    ((1, ''), (2, 'Q4_0'))
    >>> layout_rank("matmul", "F32", 1)
    (3, '')
    """
    if use != "matmul":
        return {"unused": 0, "lookup": 1}[use], ""
    if n_dims != 2 or type in ("F32", "F16", "BF16"):
        return 3, ""
    return 2, type
