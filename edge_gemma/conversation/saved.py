"""The file format of a saved conversation: header and checksum first, checked before an engine
reads a byte of it.

In: a path. Out: :class:`Saved`. The layout is the magic line, a BLAKE2b checksum, and one
MessagePack record.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np

from edge_gemma.conversation.positions import Positions
from edge_gemma.engines.engine import Buffer
from edge_gemma.errors import BundleError
from edge_gemma.files import written_whole
from edge_gemma.spans import Rows

SAVE_MAGIC = b"edge-gemma conversation 1\n"
MAX_SAVED_BYTES = 8 << 30
CHECKSUM_BYTES = 32


class Saved(msgspec.Struct, forbid_unknown_fields=True):
    """A session on disk. ``state`` is the engine's own bytes, ``extra`` the caller's."""

    bundle_sha256: str
    n_ctx: int
    kv_type: str
    n_ubatch: int
    keys: list[int | tuple[str, int]]
    cached: int
    rows: list[tuple[str, bool, tuple[int, int], bytes]]  # digest, causal, shape, float32 bytes
    state: bytes
    extra: bytes

    def positions(self, n_vocab: int, n_embd: int, path: Path) -> Positions:
        """What was appended. Raises BundleError for an id, a row or a shape that cannot be."""
        positions = Positions()
        for digest, causal, shape, data in self.rows:
            if shape[1] != n_embd or len(data) != shape[0] * shape[1] * 4:
                raise BundleError(
                    f"{path} is damaged: embedding rows of shape {shape} in {len(data)} bytes"
                )
            rows = np.frombuffer(data, np.float32).reshape(shape)
            positions.blocks[digest] = Rows(rows, causal, digest)
        for key in self.keys:
            if isinstance(key, int):
                inside = 0 <= key < n_vocab
            else:
                block = positions.blocks.get(key[0])
                inside = block is not None and 0 <= key[1] < len(block)
            if not inside:
                raise BundleError(f"{path} is damaged: position {key!r} names no token or row")
        positions.keys = list(self.keys)
        return positions


def checksum(data: Buffer) -> bytes:
    """Of everything that is read back from a disk before an engine sees it."""
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES).digest()


def rows_of(positions: Positions) -> list[tuple[str, bool, tuple[int, int], bytes]]:
    """The embedding rows of a session, as :class:`Saved` holds them."""
    return [
        (digest, block.causal, (len(block), block.rows.shape[1]), block.rows.tobytes())
        for digest, block in positions.blocks.items()
    ]


def write_saved(path: Path, saved: Saved) -> None:
    """Write the file whole or not at all. Raises RuntimeFailure."""
    body = msgspec.msgpack.encode(saved)
    with written_whole(path) as file:
        file.write(SAVE_MAGIC + checksum(body) + body)


def read_saved(path: Path) -> Saved:
    """Raises BundleError: not such a file, damaged, too large."""
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
    found = data[start : start + CHECKSUM_BYTES]
    body = memoryview(data)[start + CHECKSUM_BYTES :]
    if checksum(body) != found:
        raise BundleError(f"{path} is damaged: its checksum does not match. Nothing was restored")
    try:
        return msgspec.msgpack.decode(body, type=Saved)
    except ValueError as error:
        raise BundleError(f"{path} is damaged: {error}") from None
