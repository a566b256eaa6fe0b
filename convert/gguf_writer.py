"""The bytes of a GGUF before its tensors: key/value pairs and the tensor
table.

In: pairs and tensors with their sizes. Out: the header, padded, with every
offset. Strings and arrays carry 64-bit lengths, all numbers are
little-endian (docs/gguf.md of ggml). Written here because gguf-py's writer
collects the tensors before it knows their offsets; a streamed file knows
the sizes first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from edge_gemma.bundles.gguf import TYPE_IDS
from edge_gemma.errors import UsageError
from edge_gemma.files import written_whole

ALIGNMENT = 32  # GGUF's default
Value = bool | int | float | str | bytes | np.ndarray | Sequence[str | bytes]
Pair = tuple[str, Value]
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_ITEMS = {np.dtype(np.float32): _FLOAT32, np.dtype(np.int32): _INT32, np.dtype(np.bool_): _BOOL}


def padded(n: int) -> int:
    """The bytes a tensor of ``n`` bytes takes in the file."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def gguf_header(
    pairs: Iterable[Pair], tensors: Iterable[tuple[str, str, tuple[int, ...], int]]
) -> bytes:
    """Header of a GGUF with these pairs and ``(name, type, shape in ggml
    order, bytes)`` of each tensor in file order.

    >>> header = gguf_header([("general.architecture", "gemma3")], [("a", "F32", (4, 2), 32)])
    >>> header[:4], len(header) % 32
    (b'GGUF', 0)
    """
    values = [_string(key) + encoded(value) for key, value in pairs]
    table, offset = [], 0
    for name, kind, shape, nbytes in tensors:
        assert len(name.encode()) < 64, name  # GGML_MAX_NAME
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        place = struct.pack("<IQ", TYPE_IDS[kind], offset)
        table.append(_string(name) + dimensions + place)
        offset += padded(nbytes)
    start = struct.pack("<4sIQQ", b"GGUF", 3, len(table), len(values))
    header = start + b"".join(values) + b"".join(table)
    return header + b"\0" * (-len(header) % ALIGNMENT)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse an output that cannot be made, before the work for it begins.
    Raises UsageError.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another name or pass --force")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder} to write {path.name} into; make it first")


def write_gguf(
    path: Path,
    pairs: Iterable[Pair],
    tensors: Sequence[tuple[str, tuple[int, ...], np.ndarray]],
) -> None:
    """A small GGUF of F32 tensors (name, shape in ggml order, values),
    whole or not at all. Raises RuntimeFailure (the disk).
    """
    blocks = [np.ascontiguousarray(values, np.float32).tobytes() for _, _, values in tensors]
    table = [
        (name, "F32", shape, len(block))
        for (name, shape, _), block in zip(tensors, blocks, strict=True)
    ]
    with written_whole(path) as file:
        file.write(gguf_header(pairs, table))
        for block in blocks:
            file.write(block + b"\0" * (padded(len(block)) - len(block)))


def _string(text: str | bytes) -> bytes:
    data = text.encode("utf-8") if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def encoded(value: Value) -> bytes:
    """A value as it lies behind its key: type, then the value."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, (str, bytes)):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", _ARRAY, _ITEMS[value.dtype], len(value)) + value.tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
