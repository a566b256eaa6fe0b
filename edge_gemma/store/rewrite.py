"""A GGUF in another file: linked, copied, or written anew with cold tensors first.

In: a path, its header and what is to be different. Out: a file, its size and hash. This module does
not judge what is right; see :mod:`~edge_gemma.store.repairs`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edge_gemma.bundles.description import describe
from edge_gemma.bundles.folder import file_entry
from edge_gemma.bundles.gguf import TYPE_IDS, TensorInfo, layout_rank, read_header
from edge_gemma.bundles.manifest import File
from edge_gemma.errors import BundleError
from edge_gemma.store.repairs import NO_REPAIRS, Repairs

Progress = Callable[[int], None]
_CHUNK = 4 << 20


def link_or_copy(path: Path, target: Path, progress: Progress) -> File:
    """A hard link, else a copy (another file system, or one without links)."""
    try:
        os.link(path.resolve(), target)
        return file_entry(target, progress)
    except OSError:
        digest, size = hashlib.sha256(), 0
        with open(path, "rb") as source, open(target, "wb") as sink:
            while chunk := source.read(_CHUNK):
                sink.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                progress(len(chunk))
        shutil.copystat(path, target)
        return File(size=size, sha256=digest.hexdigest())


def rewritten(
    path: Path,
    target: Path,
    repairs: Repairs = NO_REPAIRS,
    progress: Progress = lambda n_bytes: None,
) -> File:
    """Write a GGUF anew: repaired, cold tensors first and hot ones last, because pages populated
    last survive a tight limit best.

    The key/value section is copied byte for byte but for the repairs; no tensor's values change.
    Raises BundleError (the file ends early).
    """
    header = read_header(path)
    uses = {tensor.name: tensor.use for tensor in describe(path, repairable=True).decoder.tensors}
    kept = [tensor for tensor in header.tensors if tensor.name in uses]
    order = sorted(kept, key=lambda t: layout_rank(uses[t.name], _new_type(t), len(t.shape)))
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as source, open(target, "wb") as sink:

        def put(data: bytes) -> None:
            nonlocal size
            sink.write(data)
            digest.update(data)
            size += len(data)
            progress(len(data))

        def pad() -> None:
            put(b"\0" * (-size % header.alignment))

        n_keys = len(header.metadata) + len(repairs.added)
        put(b"GGUF" + struct.pack("<IQQ", header.version, len(order), n_keys))
        source.seek(header.kv_range[0])
        pairs = source.read(header.kv_range[1] - header.kv_range[0])
        put(_patched(pairs, header.kv_range[0], repairs.patches))
        for key, value in repairs.added.items():
            put(struct.pack("<Q", len(key)) + key.encode() + value)
        put(_tensor_table(order, header.alignment))
        pad()
        for tensor in order:
            for chunk in _chunks(source, tensor, path):
                put(_widened(chunk, tensor) if _is_narrow_norm(tensor) else chunk)
            pad()
    return File(size=size, sha256=digest.hexdigest())


def _chunks(source: BinaryIO, tensor: TensorInfo, path: Path) -> Iterator[bytes]:
    source.seek(tensor.offset)
    left = tensor.nbytes
    while left:
        chunk = source.read(min(left, _CHUNK))
        if not chunk:
            raise BundleError(f"{path} ended inside the tensor {tensor.name!r} while it was read")
        yield chunk
        left -= len(chunk)


def _patched(pairs: bytes, start: int, patches: dict[int, bytes]) -> bytes:
    """The key/value section, which lies at ``start``, with other bytes in places."""
    changed = bytearray(pairs)
    for offset, value in patches.items():
        changed[offset - start : offset - start + len(value)] = value
    return bytes(changed)


def _is_narrow_norm(tensor: TensorInfo) -> bool:
    return len(tensor.shape) == 1 and tensor.type in ("F16", "BF16")


def _new_type(tensor: TensorInfo) -> str:
    return "F32" if _is_narrow_norm(tensor) else tensor.type


def _new_bytes(tensor: TensorInfo) -> int:
    return 2 * tensor.nbytes if _is_narrow_norm(tensor) else tensor.nbytes


def _widened(chunk: bytes, tensor: TensorInfo) -> bytes:
    """F16 or BF16 as F32."""
    if tensor.type == "F16":
        return np.frombuffer(chunk, "<f2").astype("<f4").tobytes()
    return (np.frombuffer(chunk, "<u2").astype("<u4") << 16).tobytes()


def _tensor_table(order: list[TensorInfo], alignment: int) -> bytes:
    table, offset = [], 0
    for tensor in order:
        name = tensor.name.encode()
        dims = struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        table.append(
            struct.pack("<Q", len(name))
            + name
            + struct.pack("<I", len(tensor.shape))
            + dims
            + struct.pack("<IQ", TYPE_IDS[_new_type(tensor)], offset)
        )
        offset += -(-_new_bytes(tensor) // alignment) * alignment
    return b"".join(table)
