"""Pictures: a file, bytes, an array or a Pillow image → the square of pixels a vision encoder was
trained on.

In: anything a person calls a picture. Out: :class:`Picture`, which remembers where its pixels are
and what they hash to, and :meth:`Picture.array`, the encoder's input. This room knows Pillow; it
does not know onnxruntime, prompts or models (the size, mean and deviation come from the bundle's
manifest).

A ``Picture`` made from a path keeps no pixels: it is read when it is encoded, one at a time, so
that a conversation over twenty photographs never holds more than one of them.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_gemma.errors import EdgeGemmaError, MediaError, MissingExtra, UsageError
from edge_gemma.units import MiB, format_bytes

MAX_PIXELS = 50_000_000  # a 50-megapixel photograph: 150 MB of RGB while it is being read
MAX_FILE_BYTES = 256 * MiB
DECODE_BYTES_PER_PIXEL = 7  # RGBA and its RGB copy together, the worst case of one image being read
# Formats Pillow decodes by itself. Left out on purpose: EPS and the like, which start other
# programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF")

_SIGNATURES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"RIFF": "WebP",
}

PAN_AND_SCAN_MIN_CROP = 256  # the values Gemma 3's model card and paper use for pan and scan
PAN_AND_SCAN_MAX_CROPS = 4
PAN_AND_SCAN_MIN_RATIO = 1.2


@dataclass(frozen=True)
class Crop:
    left: int
    top: int
    right: int
    bottom: int


class Picture:
    """One picture.

    ``source`` is a path, the bytes of a file, an array ``[h, w, 3]`` or ``[h, w]`` uint8, or a
    Pillow image.

    The header is checked here (kind, width × height ≤ ``max_pixels``), the pixels are read when
    they are needed. Raises MediaError for what cannot be a picture, MissingExtra without Pillow.

    >>> image = Picture(np.zeros((2, 3, 3), np.uint8))
    >>> image.width, image.height, image.array(size=4).shape
    (3, 2, (1, 3, 4, 4))
    """

    def __init__(
        self,
        source,
        *,
        max_pixels: int = MAX_PIXELS,
        name: str | None = None,
        crop: Crop | None = None,
    ):
        self._source, self.max_pixels, self.crop = _accept(source), max_pixels, crop
        self.name = name or (self._source.name if isinstance(self._source, Path) else "image")
        self._key = _file_key(self._source) if isinstance(self._source, Path) else None
        self._content = _content_hash(self._source, self.name)
        with self._opened() as picture:
            # an animation's first frame is the picture; edge_gemma.seeing.video reads the others
            self.animated = picture.format in ("GIF", "WEBP", "PNG", "AVIF") and getattr(
                picture, "is_animated", False
            )
            width, height = picture.size
            if picture.getexif().get(0x0112, 1) >= 5:  # EXIF orientations 5 to 8 lie on their side
                width, height = height, width
        if crop is not None:
            width, height = crop.right - crop.left, crop.bottom - crop.top
        self.width, self.height = width, height

    @property
    def digest(self) -> str:
        """Hash of the file's (or array's) content and the crop: two pictures with one digest have
        the same soft tokens.
        """
        return (
            self._content
            if self.crop is None
            else f"{self._content}-{self.crop.left}.{self.crop.top}.{self.crop.right}.{self.crop.bottom}"
        )

    def rgb(self):
        """The picture upright, opaque (transparent parts on white) and 8 bits per channel: a Pillow
        image in mode RGB.
        """
        from PIL import ImageOps

        with self._opened() as picture:
            picture.load()
            ImageOps.exif_transpose(
                picture, in_place=True
            )  # in place: no second copy of a large photograph
            picture = _to_rgb(picture, self.name)
            if self.crop is not None:
                picture = picture.crop(
                    (self.crop.left, self.crop.top, self.crop.right, self.crop.bottom)
                )
        return picture

    def array(self, size: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
        """Encoder input ``[1, 3, size, size]`` float32: squeezed to a square with Pillow's bilinear
        filter, (x/255 − mean)/std.
        """
        from PIL import Image as Pillow

        squeezed = np.asarray(
            self.rgb().resize((size, size), Pillow.Resampling.BILINEAR)
        )  # [size, size, 3] uint8
        pixels = np.ascontiguousarray(squeezed.transpose(2, 0, 1)[None], np.float32)
        pixels /= np.float32(255)
        if mean:
            pixels -= np.float32(mean)
        if std != 1:
            pixels /= np.float32(std)
        return pixels

    def crops(
        self,
        min_crop: int = PAN_AND_SCAN_MIN_CROP,
        max_crops: int = PAN_AND_SCAN_MAX_CROPS,
        min_ratio: float = PAN_AND_SCAN_MIN_RATIO,
    ) -> list[Picture]:
        """Gemma 3's pan and scan: cuts of a wide or tall picture along its longer side, or none
        when it is near square.
        """
        return [
            Picture(
                self._source,
                max_pixels=self.max_pixels,
                name=f"{self.name} (crop {number})",
                crop=crop,
            )
            for number, crop in enumerate(
                pan_and_scan(self.width, self.height, min_crop, max_crops, min_ratio), 1
            )
        ]

    @contextmanager
    def _opened(self) -> Iterator:
        """The Pillow image, its size checked, its pixels not read yet. Whatever a decoder raises
        inside becomes a MediaError.
        """
        pillow = _pillow()
        source = self._source
        if isinstance(source, Path):
            self._check_unchanged(source)
        with (
            warnings.catch_warnings()
        ):  # width × height is checked below, with our own limit and message
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
            try:
                if isinstance(source, np.ndarray):
                    picture = pillow.fromarray(source)
                elif isinstance(source, (Path, bytes)):
                    picture = pillow.open(
                        source if isinstance(source, Path) else io.BytesIO(source),
                        formats=_formats(source),
                    )
                else:
                    picture = (
                        source.copy()
                    )  # the caller's own stays as it is, whatever is done below
            except pillow.DecompressionBombError:
                raise MediaError(
                    f"{self.name} claims more than {2 * pillow.MAX_IMAGE_PIXELS:,} pixels; "
                    f"{_limit(self.max_pixels)}"
                ) from None
            except Exception as error:  # Pillow's decoders raise nearly anything on a broken header
                raise MediaError(_why_not(source, self.name, error)) from None
        with picture:
            width, height = picture.size
            if width * height > self.max_pixels:
                raise MediaError(
                    f"{self.name} is {width} × {height} = {width * height:,} pixels; "
                    f"{_limit(self.max_pixels)}"
                )
            if not width or not height:
                raise MediaError(f"{self.name} is {width} × {height}: there is no picture in it")
            try:
                yield picture
            except EdgeGemmaError:
                raise
            except Exception as error:  # likewise on a broken body
                raise MediaError(
                    f"{self.name} is damaged: {error or type(error).__name__}. Perhaps an "
                    "incomplete download; copy it again"
                ) from None

    def _check_unchanged(self, path: Path) -> None:
        key = _file_key(path)
        if key != self._key and _content_hash(path, self.name) != self._content:
            raise MediaError(
                f"{path} changed after it was put into the message; make the Picture again"
            )
        self._key = key

    def __repr__(self) -> str:
        return f"Picture({self.name!r}, {self.width}×{self.height})"

    def __eq__(self, other) -> bool:
        return isinstance(other, Picture) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def pan_and_scan(
    width: int, height: int, min_crop: int, max_crops: int, min_ratio: float
) -> list[Crop]:
    """Where to cut a ``width`` × ``height`` picture, in reading order; [] when no cut helps.

    Source: Gemma 3's image processor.

    >>> [(c.left, c.right) for c in pan_and_scan(1000, 500, 256, 4, 1.2)]
    [(0, 500), (500, 1000)]
    """
    long, short = max(width, height), min(width, height)
    if long / short < min_ratio:
        return []
    n = min(long // min_crop, math.floor(long / short + 0.5))
    n = min(max(2, n), max_crops)
    step = math.ceil(long / n)
    if min(step, short) < min_crop:
        return []
    cuts = [(start, min(start + step, long)) for start in range(0, long, step)]
    return [Crop(a, 0, b, height) if width >= height else Crop(0, a, width, b) for a, b in cuts]


def with_crops(picture: Picture) -> list:
    """The parts of a message that show a picture whole and then in crops, worded as Gemma 3 was
    trained; ``[picture]`` when near square.
    """
    crops = picture.crops()
    if not crops:
        return [picture]
    parts: list = [
        "Here is the original image ",
        picture,
        " and here are some crops to help you see better ",
    ]
    for number, crop in enumerate(crops):
        parts += [" ", crop] if number else [crop]
    return parts


def _pillow():
    try:
        from PIL import Image as pillow
    except ImportError:
        raise MissingExtra("Looking at pictures", "see") from None
    return pillow


def _formats(source) -> tuple[str, ...]:
    pillow = _pillow()
    if _is_heic(_head(source)):
        try:
            import pillow_heif
        except ImportError:
            pass
        else:
            pillow_heif.register_heif_opener()
            return ("HEIF",)
    pillow.init()
    return tuple(name for name in FORMATS if name in pillow.OPEN)  # some builds lack a codec


def local_file(source: str | os.PathLike, what: str) -> Path:
    """``source`` as the path of a file that is there and not empty; ``what`` (image, video) is for
    the message when it is not. Raises MediaError.
    """
    path = Path(source).expanduser()
    if re.match(r"[a-z][a-z0-9+]+:/", str(path)):  # Path has folded // into /
        raise MediaError(f"{source} is a network address; download it first and name the file")
    if path.is_dir():
        raise MediaError(
            f"{path} is a directory; name the {what} files in it"
            + (f", for instance {path}/*.jpg" if what == "image" else "")
        )
    if not path.is_file():
        raise MediaError(f"there is no {what} file {path}")
    if not path.stat().st_size:
        raise MediaError(f"{path} is empty (0 bytes)")
    return path


def _accept(source):
    """The source in one of the four forms a Picture keeps."""
    if isinstance(source, (str, os.PathLike)):
        path = local_file(source, "image")
        if (n_bytes := path.stat().st_size) > MAX_FILE_BYTES:
            raise MediaError(
                f"{path} has {format_bytes(n_bytes)}; image files up to "
                f"{format_bytes(MAX_FILE_BYTES)} are read"
            )
        return path
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not source or len(source) > MAX_FILE_BYTES:
            raise MediaError(f"image data of {len(source)} bytes; expected 1 to {MAX_FILE_BYTES}")
        return bytes(source)
    if isinstance(source, np.ndarray):
        shape = source.shape
        if (
            source.dtype != np.uint8
            or len(shape) not in (2, 3)
            or (len(shape) == 3 and shape[2] not in (1, 3, 4))
            or 0 in shape
        ):
            raise UsageError(
                "an image array is [h, w], [h, w, 3] or [h, w, 4] uint8 with h, w ≥ 1; got "
                f"{list(shape)} {source.dtype}"
            )
        return np.ascontiguousarray(source[..., 0] if len(shape) == 3 and shape[2] == 1 else source)
    if isinstance(source, _pillow().Image):
        return source
    raise UsageError(
        f"an image is a path, bytes, a uint8 array or a Pillow image; got {type(source).__name__}"
    )


def _content_hash(source, name: str) -> str:
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
        digest.update(repr(source.shape).encode() + source.tobytes())
    else:
        digest.update(f"{source.mode}{source.size}{source.getexif().get(0x0112, 1)}".encode())
        digest.update(source.tobytes())
        if source.mode == "P":
            digest.update(
                bytes(source.getpalette() or ()) + repr(source.info.get("transparency")).encode()
            )
    return digest.hexdigest()


def _file_key(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        raise MediaError(f"{path} is gone; it was there when it was put into the message") from None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _limit(max_pixels: int) -> str:
    return (
        f"the limit is {max_pixels:,} (max_pixels). Make it smaller first, for instance: magick "
        "IN -resize 2000x2000 OUT"
    )


def _head(source, n: int = 512) -> bytes:
    if isinstance(source, Path):
        with open(source, "rb") as file:
            return file.read(n)
    return source[:n]


def _is_heic(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in (
        b"heic",
        b"heix",
        b"hevc",
        b"heim",
        b"heis",
        b"mif1",
        b"msf1",
    )


def _why_not(source, name: str, error: Exception) -> str:
    """The sentence for a file Pillow does not take: what it is, when its first bytes tell, and what
    to do.
    """
    head = _head(source)
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
    if head[4:8] == b"ftyp" or head.startswith(b"\x1aE\xdf\xa3"):
        return f"{name} looks like a video; use Video(…), or `describe --video`"
    if isinstance(error, OSError) and error.errno:
        return f"cannot read {name}: {error.strerror}"
    if kind := next(
        (kind for signature, kind in _SIGNATURES.items() if head.startswith(signature)), None
    ):
        return (
            f"{name} is a {kind} whose header is damaged. Perhaps an incomplete download; copy "
            "it again"
        )
    return (
        f"{name} is not a picture this can read (its first bytes are {head[:8].hex(' ')}); JPEG, "
        "PNG, WebP, GIF, BMP, TIFF and AVIF are"
    )


def _to_rgb(picture, name: str):
    """Any of Pillow's modes → RGB, 8 bits a channel. Transparency goes onto white, as a page would
    show it.
    """
    from PIL import Image as Pillow

    mode = picture.mode
    if mode == "RGB":
        return picture
    if (
        mode.startswith("I;16") or mode == "I"
    ):  # 16-bit grey; Pillow's own conversion would clip it to white
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise MediaError(
                f"{name} has {mode} pixels from {values.min()} to {values.max()}; expected 0 "
                "to 65535 (16-bit grey)"
            )
        return Pillow.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode == "F":
        raise MediaError(
            f"{name} has floating-point pixels, whose range nobody wrote down; save it with "
            "8 or 16 bits per channel"
        )
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        page = Pillow.new("RGB", picture.size, (255, 255, 255))
        page.paste(picture, mask=picture.getchannel("A"))
        return page
    return picture.convert("RGB")
