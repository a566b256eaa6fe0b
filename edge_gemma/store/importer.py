"""An existing Gemma 3 / Gemma 3n GGUF → a bundle.

In: a GGUF. Out: a bundle folder with the file hard-linked (else copied, or rewritten cold-first)
and a manifest. Every tensor's name and shape is held against the family's table here, because
llama.cpp would divide by zero, assert or answer nonsense on some contradictions. ``describe`` is
shared with the converter, so there is one derivation of the facts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from edge_gemma.bundles.description import (
    Description,
    describe,
)
from edge_gemma.bundles.folder import Bundle, BundleWriter, file_entry
from edge_gemma.bundles.gguf import (
    TYPE_IDS,
    TensorInfo,
    layout_rank,
    read_header,
)
from edge_gemma.bundles.manifest import (
    File,
    Manifest,
    Source,
    VisionPart,
)
from edge_gemma.errors import BundleError

Progress = Callable[[int], None]
WriteVision = Callable[[Path, Description], VisionPart]


def import_gguf(
    path: str | Path,
    out: str | Path,
    *,
    relayout: bool = False,
    overwrite: bool = False,
    name: str | None = None,
    origin: str | None = None,
    write_vision: WriteVision | None = None,
    progress: Progress = lambda n_bytes: None,
) -> Bundle:
    """Make a bundle of a GGUF.

    Hard link where the file system allows it, else a copy; ``relayout`` rewrites it cold-first.

    ``write_vision(folder, description)`` adds a vision encoder to the bundle: see
    :func:`edge_gemma.convert.mmproj.vision_writer`.

    Raises BundleError, UnsupportedModel (the file), UsageError (``out`` exists), RuntimeFailure
    (the disk).
    """
    path = Path(path)
    description = describe(path)
    from edge_gemma.engines.llama.library import (
        check_loads,  # late: starts a child process with llama.cpp
    )

    with BundleWriter(out, overwrite=overwrite) as writer:
        target = writer.folder / description.decoder.file
        if relayout:
            entry = relayout_gguf(path, target, progress)
            description = describe(target)
        else:
            entry = _link_or_copy(path, target, progress)
        check_loads(target)
        files, seeing = {description.decoder.file: entry}, None
        if write_vision is not None:
            seeing = write_vision(writer.folder, description)
            files |= {
                file.name: file_entry(file)
                for file in sorted(writer.folder.glob(f"{seeing.file}*"))
            }
        manifest = Manifest(
            name=name or description.name,
            family=description.family,
            instruct=description.chat_template is not None,
            decoder=description.decoder,
            source=Source(
                origin=origin or path.name,
                sha256=None if relayout else entry.sha256,
                licence=description.licence,
                tool="edge-gemma import",
            ),
            files=files,
            vision=seeing,
            chat_template=description.chat_template,
            special_tokens=description.special_tokens,
            end_tokens=description.end_tokens,
            notes=description.notes,
            recipe={"name": "imported", "relayout": "cold-first" if relayout else "as found"},
        )
        return writer.commit(manifest)


def _link_or_copy(path: Path, target: Path, progress: Progress) -> File:
    try:
        os.link(path.resolve(), target)
        return file_entry(target, progress)
    except OSError:  # another file system, or one without hard links: copy, hashing on the way
        digest, size = hashlib.sha256(), 0
        with open(path, "rb") as source, open(target, "wb") as sink:
            while chunk := source.read(4 << 20):
                sink.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                progress(len(chunk))
        shutil.copystat(path, target)
        return File(size=size, sha256=digest.hexdigest())


def relayout_gguf(path: Path, target: Path, progress: Progress = lambda n_bytes: None) -> File:
    """Rewrite a GGUF with cold tensors first and hot ones last: pages populated last survive a
    tight limit best.

    The key/value section is copied byte for byte; only the tensor table's order and offsets change.
    """
    header, uses = read_header(path), {t.name: t.use for t in describe(path).decoder.tensors}
    order = sorted(header.tensors, key=lambda t: layout_rank(uses[t.name], t.type, len(t.shape)))
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

        source.seek(header.kv_range[0])
        n_keys = len(header.metadata)
        put(
            b"GGUF"
            + struct.pack("<IQQ", header.version, len(order), n_keys)
            + source.read(header.kv_range[1] - header.kv_range[0])
        )
        put(_tensor_table(order, header.alignment))
        pad()
        for tensor in order:
            source.seek(tensor.offset)
            left = tensor.nbytes
            while left:
                chunk = source.read(min(left, 4 << 20))
                if not chunk:
                    raise BundleError(
                        f"{path} ended inside the tensor {tensor.name!r} while it was read"
                    )
                put(chunk)
                left -= len(chunk)
            pad()
    return File(size=size, sha256=digest.hexdigest())


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
            + struct.pack("<IQ", TYPE_IDS[tensor.type], offset)
        )
        offset += -(-tensor.nbytes // alignment) * alignment
    return b"".join(table)
