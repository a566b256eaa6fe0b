"""What a picture is made from: checked, hashed, and not decoded.

In: a path, the bytes of a file, an array or a Pillow image. Out: one of four forms
(:data:`Source`), and the hash of its content. Nothing here reads pixels of a file.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_gemma.errors import MediaError, MissingExtra, UsageError
from edge_gemma.sources import (
    BinarySource,
    FileSource,
    Wanted,
    data_uri_bytes,
    is_data_uri,
    local_file,
    read_all,
)
from edge_gemma.units import MiB, format_bytes

if TYPE_CHECKING:
    from types import ModuleType

    from PIL.Image import Image as PillowImage


MAX_FILE_BYTES = 256 * MiB
_EXIF_ORIENTATION = 0x0112
UPRIGHT = 1
_CHANNELS = (1, 3, 4)


if TYPE_CHECKING:
    # what a caller may give, and the forms it is kept in
    AnySource = FileSource | np.ndarray | PillowImage
    Source = Path | bytes | np.ndarray | PillowImage


def pillow() -> ModuleType:
    """The module ``PIL.Image``. Raises MissingExtra."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("Looking at pictures", "see") from None
    return Image


def accept(source: AnySource) -> Source:
    """The source in the form that is kept. Raises MediaError, UsageError, MissingExtra."""
    if isinstance(source, str) and is_data_uri(source):
        return data_uri_bytes(source, Wanted("image", ("image/",), MAX_FILE_BYTES))
    if isinstance(source, str | os.PathLike):
        return _accept_path(source)
    if isinstance(source, BinarySource):
        source = read_all(source, MAX_FILE_BYTES, "image")
    if isinstance(source, bytes | bytearray | memoryview):
        if not 1 <= len(source) <= MAX_FILE_BYTES:
            raise MediaError(f"image data of {len(source)} bytes; expected 1 to {MAX_FILE_BYTES}")
        return bytes(source)
    if isinstance(source, np.ndarray):
        return _accept_array(source)
    if isinstance(source, pillow().Image):
        return source
    raise UsageError(
        "an image is a path, a data URI, bytes, a binary file, a uint8 array or a Pillow image; "
        f"got {type(source).__name__}"
    )


def _accept_path(source: str | os.PathLike[str]) -> Path:
    path = local_file(source, "image")
    n_bytes = path.stat().st_size
    if n_bytes > MAX_FILE_BYTES:
        raise MediaError(
            f"{path} has {format_bytes(n_bytes)}; image files up to "
            f"{format_bytes(MAX_FILE_BYTES)} are read"
        )
    return path


def _accept_array(source: np.ndarray) -> np.ndarray:
    shape = source.shape
    is_grey = len(shape) == 2
    has_channels = len(shape) == 3 and shape[2] in _CHANNELS
    if source.dtype != np.uint8 or not (is_grey or has_channels) or 0 in shape:
        raise UsageError(
            "an image array is [h, w], [h, w, 3] or [h, w, 4] uint8 with h, w ≥ 1; got "
            f"{list(shape)} {source.dtype}"
        )
    if has_channels and shape[2] == 1:
        source = source[..., 0]
    return np.ascontiguousarray(source)


def content_hash(source: Source, name: str) -> str:
    """A hash of the file's bytes, or of the pixels in memory. Raises MediaError."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, Path):
        try:
            with open(source, "rb") as file:
                while chunk := file.read(MiB):
                    digest.update(chunk)
        except OSError as error:
            raise MediaError(f"cannot read {source}: {error.strerror}") from None
    elif isinstance(source, bytes):
        digest.update(source)
    elif isinstance(source, np.ndarray):
        digest.update(repr(source.shape).encode())
        digest.update(source.tobytes())
    else:
        digest.update(f"{source.mode}{source.size}{orientation(source)}".encode())
        digest.update(source.tobytes())
        if source.mode == "P":
            digest.update(bytes(source.getpalette() or ()))
            digest.update(repr(source.info.get("transparency")).encode())
    return digest.hexdigest()


def orientation(image: PillowImage) -> int:
    """How the picture lies, 1 to 8 as in EXIF; 1 (upright) where that is missing, text, out of
    range, or in metadata that cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's, about metadata
        try:
            value = image.getexif().get(_EXIF_ORIENTATION, UPRIGHT)
        except Exception:  # Pillow raises nearly anything on broken metadata
            return UPRIGHT
    return value if isinstance(value, int) and UPRIGHT <= value <= 8 else UPRIGHT


FileKey = tuple[int, int, int]


def file_key(path: Path) -> FileKey:
    """What changes when a file does, without reading it: inode, size, time. Raises MediaError."""
    try:
        stat = path.stat()
    except OSError:
        raise MediaError(f"{path} is gone; it was there when it was put into the message") from None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def first_bytes(source: Source, n: int = 512) -> bytes:
    """The beginning of a file; empty for pixels in memory."""
    if isinstance(source, Path):
        with open(source, "rb") as file:
            return file.read(n)
    return source[:n] if isinstance(source, bytes) else b""
