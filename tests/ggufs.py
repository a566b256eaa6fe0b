"""GGUF files taken apart and put together again with another key or value."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from edge_gemma.bundles.gguf import GGML_TYPES, read_header

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL = range(8)
STRING, ARRAY, UINT64, INT64, FLOAT64 = range(8, 13)
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's types of tokens
CODES = {
    UINT8: "<B",
    INT8: "<b",
    UINT16: "<H",
    INT16: "<h",
    UINT32: "<I",
    INT32: "<i",
    FLOAT32: "<f",
    BOOL: "<?",
    UINT64: "<Q",
    INT64: "<q",
    FLOAT64: "<d",
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def scalar(kind: int, value: float | str) -> bytes:
    """A value with its type before it, as it stands behind a key."""
    body = text(str(value)) if kind == STRING else struct.pack(CODES[kind], value)
    return struct.pack("<I", kind) + body


def array(kind: int, values: list) -> bytes:
    items = b"".join(scalar(kind, value)[4:] for value in values)
    return struct.pack("<IIQ", ARRAY, kind, len(values)) + items


@dataclass
class Parts:
    """One file: its pairs in order, and what follows them."""

    pairs: dict[str, bytes]  # key → type and value
    n_tensors: int
    table: bytes
    data: bytes

    @classmethod
    def read(cls, path: Path) -> Parts:
        raw = path.read_bytes()
        n_tensors, n_keys = struct.unpack_from("<QQ", raw, 8)
        header, at, pairs = read_header(path), 24, {}
        for _ in range(n_keys):
            (length,) = struct.unpack_from("<Q", raw, at)
            key = raw[at + 8 : at + 8 + length].decode()
            start = at + 8 + length
            at = _end(raw, start)
            pairs[key] = raw[start:at]
        table_end = at + sum(8 + len(t.name) + 4 + 8 * len(t.shape) + 4 + 8 for t in header.tensors)
        return cls(pairs, n_tensors, raw[at:table_end], raw[header.data_offset :])

    def write(self, path: Path, *, weights: bool = True) -> Path:
        """``weights=False`` leaves a hole of their size, for readers of the header."""
        pairs = b"".join(text(key) + value for key, value in self.pairs.items())
        head = b"GGUF" + struct.pack("<IQQ", 3, self.n_tensors, len(self.pairs))
        head += pairs + self.table
        head += b"\0" * (-len(head) % 32)
        with open(path, "wb") as file:
            file.write(head)
            if weights:
                file.write(self.data)
            file.truncate(len(head) + len(self.data))
        return path

    def with_value(self, key: str, value: bytes | None) -> Parts:
        """A copy in which ``key`` has that value, or is missing."""
        pairs = {**self.pairs}
        if value is None:
            pairs.pop(key, None)
        else:
            pairs[key] = value
        return Parts(pairs, self.n_tensors, self.table, self.data)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], int, bytes]]:
        """name → (shape in ggml order, ggml type, data)."""
        found, at = {}, 0
        ranges: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(self.n_tensors):
            (length,) = struct.unpack_from("<Q", self.table, at)
            name = self.table[at + 8 : at + 8 + length].decode()
            at += 8 + length
            (n_dims,) = struct.unpack_from("<I", self.table, at)
            shape = struct.unpack_from(f"<{n_dims}Q", self.table, at + 4)
            at += 4 + 8 * n_dims
            kind, offset = struct.unpack_from("<IQ", self.table, at)
            at += 12
            ranges.append((name, shape, kind, offset))
        for name, shape, kind, offset in ranges:
            _, block, block_bytes = GGML_TYPES[kind]
            nbytes = prod(shape) // block * block_bytes
            found[name] = (shape, kind, self.data[offset : offset + nbytes])
        return found

    def with_tensors(self, changed: dict[str, tuple[tuple[int, ...], int, bytes]]) -> Parts:
        """A copy with these tensors instead or in addition, behind the others."""
        table, data = b"", b""
        tensors = self.tensors() | changed
        for name, (shape, kind, values) in tensors.items():
            table += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            table += struct.pack("<IQ", kind, len(data))
            data += values + b"\0" * (-len(values) % 32)
        return Parts({**self.pairs}, len(tensors), table, data)


def with_tokens(parts: Parts, tokens: dict[int, tuple[str, int]]) -> Parts:
    """A copy in which these ids have another spelling and llama.cpp type. A spelling that stands
    at another id already goes away there: no vocabulary may hold one twice.
    """
    raw, at, spelled = parts.pairs["tokenizer.ggml.tokens"], 16, []
    while at < len(raw):
        end = at + 8 + struct.unpack_from("<Q", raw, at)[0]
        spelled.append(raw[at + 8 : end].decode())
        at = end
    types = list(memoryview(parts.pairs["tokenizer.ggml.token_type"][16:]).cast("i"))
    wanted = {spelling for spelling, _ in tokens.values()}
    spelled = [f"<was {i}>" if word in wanted else word for i, word in enumerate(spelled)]
    for id, (spelling, kind) in tokens.items():
        spelled[id], types[id] = spelling, kind
    changed = parts.with_value("tokenizer.ggml.tokens", array(STRING, spelled))
    return changed.with_value("tokenizer.ggml.token_type", array(INT32, types))


def _end(raw: bytes, at: int) -> int:
    """Behind the typed value that begins at ``at``."""
    (kind,) = struct.unpack_from("<I", raw, at)
    at += 4
    if kind == STRING:
        return at + 8 + struct.unpack_from("<Q", raw, at)[0]
    if kind != ARRAY:
        return at + struct.calcsize(CODES[kind])
    item, count = struct.unpack_from("<IQ", raw, at)
    at += 12
    if item != STRING:
        return at + count * struct.calcsize(CODES[item])
    for _ in range(count):
        at += 8 + struct.unpack_from("<Q", raw, at)[0]
    return at
