"""The file format of a saved conversation: header and checksum first, checked before llama.cpp
reads a byte.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np

from edge_gemma.errors import BundleError
from edge_gemma.spans import Rows

Key = (
    int | tuple[str, int]
)  # what a position holds: a token id, or (digest, index) of an embedding row
SAVE_MAGIC = b"edge-gemma conversation 1\n"
MAX_SAVED_BYTES = 8 << 30


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    bundle_sha256: str
    n_ctx: int
    kv_type: str
    n_ubatch: int
    keys: list[int | tuple[str, int]]
    cached: int
    rows: list[tuple[str, bool, tuple[int, int], bytes]]
    state: bytes
    extra: bytes


def _read_saved(path: Path) -> _Saved:
    try:
        size = path.stat().st_size
        if size > MAX_SAVED_BYTES:
            raise BundleError(
                f"{path} has {size} bytes; a saved conversation has at most {MAX_SAVED_BYTES}"
            )
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read the saved conversation {path}: {error.strerror}") from None
    start = len(SAVE_MAGIC)
    if not data.startswith(SAVE_MAGIC):
        raise BundleError(f"{path} is not a saved conversation of this version")
    checksum, body = data[start : start + 32], memoryview(data)[start + 32 :]
    if hashlib.blake2b(body, digest_size=32).digest() != checksum:
        raise BundleError(f"{path} is damaged: its checksum does not match. Nothing was restored")
    try:
        return msgspec.msgpack.decode(body, type=_Saved)
    except ValueError as error:
        raise BundleError(f"{path} is damaged: {error}") from None


def _checked_keys(
    saved: _Saved, n_vocab: int, n_embd: int, path
) -> tuple[list[Key], dict[str, Rows]]:
    rows = {}
    for digest, causal, shape, data in saved.rows:
        if shape[1] != n_embd or len(data) != shape[0] * shape[1] * 4:
            raise BundleError(
                f"{path} is damaged: embedding rows of shape {shape} in {len(data)} bytes"
            )
        rows[digest] = Rows(np.frombuffer(data, np.float32).reshape(shape), causal, digest)
    for key in saved.keys:
        inside = (
            0 <= key < n_vocab
            if isinstance(key, int)
            else key[0] in rows and 0 <= key[1] < len(rows[key[0]])
        )
        if not inside:
            raise BundleError(f"{path} is damaged: position {key!r} names no token or row")
    return [k if isinstance(k, int) else tuple(k) for k in saved.keys], rows
