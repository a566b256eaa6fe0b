"""Untrusted picture files → Pillow images, and any of Pillow's modes → RGB.

In: a :data:`~edge_gemma.seeing.source.Source`. Out: a Pillow image whose size was
checked before a pixel was read. Whatever a decoder raises becomes a MediaError that
says what the file is and what to do.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_gemma.errors import EdgeGemmaError, MediaError
from edge_gemma.seeing.png import without_large_texts
from edge_gemma.seeing.source import first_bytes, orientation, pillow

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

    from edge_gemma.seeing.source import Source

MAX_PIXELS = 50_000_000  # a 50-megapixel photograph: 150 MB of RGB while it is being read
# Formats Pillow decodes by itself. Left out on purpose: EPS and the like, which
# start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF")

_SIGNATURES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"RIFF": "WebP",
}
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_HAS_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_WHITE = (255, 255, 255)
_CUT = "Perhaps an incomplete download; copy it again"


@contextmanager
def open_image(source: Source, name: str, max_pixels: int) -> Iterator[PillowImage]:
    """The Pillow image, its size checked, its pixels not read yet. Raises
    MediaError, also for what a decoder raises within the ``with``.
    """
    with _opened(source, name, max_pixels) as image:
        _check_size(image.size, name, max_pixels)
        try:
            yield image
        except EdgeGemmaError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on a broken body
            raise MediaError(
                f"{name} is damaged: {error or type(error).__name__}. Perhaps an "
                "incomplete download; copy it again"
            ) from None


def _opened(source: Source, name: str, max_pixels: int) -> PillowImage:
    library = pillow()
    # the number of pixels is checked by the caller, with our own limit and message
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about metadata
        warnings.simplefilter("ignore", library.DecompressionBombWarning)
        try:
            if isinstance(source, np.ndarray):
                return library.fromarray(source)
            if isinstance(source, Path | bytes):
                file = without_large_texts(source)
                stream = io.BytesIO(file) if isinstance(file, bytes) else file
                return library.open(stream, formats=_formats(source))
            return source.copy()  # the caller's image stays as it is
        except library.DecompressionBombError:
            raise MediaError(
                f"{name} claims more than {2 * library.MAX_IMAGE_PIXELS:,} pixels; "
                f"{_limit(max_pixels)}"
            ) from None
        except Exception as error:  # Pillow's decoders raise nearly anything on a broken header
            raise MediaError(_why_not(source, name, error)) from None


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise MediaError(
            f"{name} is {width} × {height} = {width * height:,} pixels; {_limit(max_pixels)}"
        )
    if not width or not height:
        raise MediaError(f"{name} is {width} × {height}: there is no picture in it")


def _limit(max_pixels: int) -> str:
    return (
        f"the limit is {max_pixels:,} (max_pixels). Make it smaller first, for instance: magick "
        "IN -resize 2000x2000 OUT"
    )


def _formats(source: Source) -> tuple[str, ...]:
    """The formats Pillow may try on this file."""
    if _is_heic(first_bytes(source)):
        try:
            import pillow_heif  # type: ignore[import-not-found]  # a plug-in, if it is there
        except ImportError:
            pass
        else:
            pillow_heif.register_heif_opener()
            return ("HEIF",)
    library = pillow()
    library.init()
    return tuple(name for name in FORMATS if name in library.OPEN)  # some builds lack a codec


def _is_heic(head: bytes) -> bool:
    return _is_iso_media(head) and head[8:12] in _HEIC_BRANDS


def _is_iso_media(head: bytes) -> bool:
    return head[4:8] == b"ftyp"  # the container of MP4, HEIC and AVIF


def _why_not(source: Source, name: str, error: Exception) -> str:
    """The sentence for a file Pillow does not take: what it is, when its first
    bytes tell, and what to do.
    """
    head = first_bytes(source)
    if re.search(rb"<svg[\s>]", head, re.IGNORECASE):
        return (
            f"{name} is an SVG drawing, not pixels; render it first, for instance: rsvg-convert "
            f"{name} -o picture.png"
        )
    if head.startswith(b"%PDF"):
        return (
            f"{name} is a PDF; turn its pages into pictures first, for instance: pdftoppm -png "
            f"-r 150 {name} page"
        )
    if _is_heic(head):
        return f"{name} is HEIC; Pillow reads it with a plug-in: pip install pillow-heif"
    if head[8:12] == b"WAVE":
        return f"{name} is a WAV sound; use Audio(…), or `ask`"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return f"{name} is an AVIF whose data is damaged. {_CUT}"
    if _is_iso_media(head) or head.startswith(b"\x1aE\xdf\xa3"):  # Matroska, WebM
        return f"{name} looks like a video; use Video(…), or `describe --video`"
    if isinstance(error, OSError) and error.errno:
        return f"cannot read {name}: {error.strerror}"
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return f"{name} is a {kind} whose header is damaged. {_CUT}"
    return (
        f"{name} is not a picture this can read (its first bytes are {head[:8].hex(' ')}); JPEG, "
        "PNG, WebP, GIF, BMP, TIFF and AVIF are"
    )


def to_rgb(image: PillowImage, name: str) -> PillowImage:
    """Any of Pillow's modes → RGB, 8 bits a channel. Transparency goes onto white,
    as a page would show it. Raises MediaError for values without a known range.
    """
    mode = image.mode
    if mode == "RGB":
        return _without_key_colour(image)
    if mode.startswith("I;16") or mode == "I":
        return _from_16_bit(image, name)
    if mode == "F":
        raise MediaError(
            f"{name} has floating-point pixels, whose range is not known; save it with "
            "8 or 16 bits per channel"
        )
    if mode == "La":  # Pillow converts it to LA alone
        image = image.convert("LA")
    if mode in _HAS_ALPHA or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: PillowImage) -> PillowImage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "should be converted to RGBA": it is
        image = image.convert("RGBA")
    page = pillow().new("RGB", image.size, _WHITE)
    page.paste(image, mask=image.getchannel("A"))
    return page


def _without_key_colour(image: PillowImage) -> PillowImage:
    """RGB → RGB; the one colour that a PNG names as transparent (tRNS) becomes white."""
    key = image.info.get("transparency")
    if not isinstance(key, tuple) or len(key) != 3:
        return image
    if max(key) > 255:  # of 16 bits a channel, of which Pillow keeps the upper 8
        key = tuple(value >> 8 for value in key)
    pixels = np.array(image)
    pixels[(pixels == np.array(key)).all(axis=2)] = _WHITE
    return pillow().fromarray(pixels)


def upright(image: PillowImage) -> PillowImage:
    """The picture as it is to be looked at, by its EXIF orientation; where that is another one,
    the given one is closed.
    """
    transpose = pillow().Transpose
    turns = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_270,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_90,
    }
    turn = turns.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    image.close()  # two of a large photograph are enough
    return turned


def load(image: PillowImage) -> None:
    """Read the pixels. What Pillow has to say about metadata is of no use here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        image.load()


def _from_16_bit(image: PillowImage, name: str) -> PillowImage:
    """16-bit grey → RGB; Pillow's own conversion would clip it to white."""
    values = np.asarray(image).astype(np.int64)
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise MediaError(
            f"{name} has {image.mode} pixels from {low} to {high}; expected 0 "
            "to 65535 (16-bit grey)"
        )
    grey = ((values + 128) // 257).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    return pillow().fromarray(grey).convert("RGB")
