"""PNG files without the parts Pillow refuses: large texts and colour profiles.

In: a path or the bytes of a file. Out: the same, or its bytes without those chunks, whose content
no picture needs. Pillow gives up on a text of more than 1 MiB, compressed or not at all, and on
64 MiB of them together. Nothing here decodes pixels.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from edge_gemma.units import MiB

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_TEXT_BYTES = MiB - 1024  # of one chunk, inflated; Pillow's limit is 1 MiB
_MAX_TEXTS_BYTES = 32 * MiB  # of all of them; Pillow's is 64 MiB
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_FRAME_BYTES = 12  # of a chunk besides its body: length, name, checksum


def without_large_texts(source: Path | bytes) -> Path | bytes:
    """The source itself where there is nothing to leave out, or no PNG.

    >>> without_large_texts(b"no PNG")
    b'no PNG'
    """
    with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            return source
        cuts = list(_large_texts(file))
        if not cuts:
            return source
        file.seek(0)
        content = file.read()
    kept, position = [], 0
    for start, end in cuts:
        kept.append(content[position:start])
        position = end
    return b"".join([*kept, content[position:]])


def _large_texts(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(start, end) of each chunk to leave out."""
    position, n_texts = len(SIGNATURE), 0
    while True:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        end = position + _FRAME_BYTES + int.from_bytes(head[:4])
        if head[4:] in _TEXTS:
            n_bytes = _text_bytes(head[4:], file.read(end - position - _FRAME_BYTES))
            n_texts += n_bytes
            if n_bytes > _MAX_TEXT_BYTES or n_texts > _MAX_TEXTS_BYTES:
                n_texts -= n_bytes
                yield position, end
        position = end


def _text_bytes(name: bytes, body: bytes) -> int:
    """How long a text or profile is, inflated; a little more than the limit stands for any more."""
    _, _, rest = body.partition(b"\0")
    if name == b"tEXt":
        return len(rest)
    if name == b"iTXt":
        is_compressed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
        if not is_compressed:
            return len(rest)
    else:
        rest = rest[1:]  # the method
    try:
        return len(zlib.decompressobj().decompress(rest, _MAX_TEXT_BYTES + 1))
    except zlib.error:
        return 0  # Pillow passes over it
