"""Pictures: a file, bytes, an array or a Pillow image → the square of pixels a
vision encoder was trained on.

In: anything a person calls a picture. Out: :class:`Picture`, which remembers where
its pixels are and what they hash to, and :meth:`Picture.array`, the encoder's
input. This module does not know onnxruntime, prompts or models (the size, mean and
deviation come from the bundle's manifest).

A ``Picture`` made from a path keeps no pixels: it is read when it is encoded, one
at a time, so that a conversation over twenty photographs never holds more than one
of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_gemma.errors import MediaError
from edge_gemma.seeing.pixels import MAX_PIXELS, load, open_image, to_rgb, upright
from edge_gemma.seeing.source import (
    FileKey,
    accept,
    content_hash,
    file_key,
    orientation,
    pillow,
)

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

    from edge_gemma.seeing.source import AnySource

PAN_AND_SCAN_MIN_CROP = 256  # the values Gemma 3's model card and paper use for pan and scan
PAN_AND_SCAN_MAX_CROPS = 4
PAN_AND_SCAN_MIN_RATIO = 1.2
_ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
_LYING = 5  # EXIF orientations from 5 to 8 have width and height exchanged


@dataclass(frozen=True)
class Crop:
    """A rectangle of an upright picture, in pixels; right and bottom are outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.left, self.top, self.right, self.bottom


class Picture:
    """One picture.

    ``source`` is a path, a data URI, the bytes of a file, an open binary file, an array
    ``[h, w, 3]`` or ``[h, w]`` uint8, or a Pillow image.

    The header is checked here (kind, width × height ≤ ``max_pixels``), the pixels
    are read when they are needed. Raises MediaError for what cannot be a picture,
    UsageError for what is none of these types, MissingExtra without Pillow.

    >>> image = Picture("cat.png")
    >>> image.width, image.height, image.array(size=4).shape
    (64, 48, (1, 3, 4, 4))
    """

    def __init__(
        self,
        source: AnySource,
        *,
        max_pixels: int = MAX_PIXELS,
        name: str | None = None,
        crop: Crop | None = None,
    ):
        self._source = accept(source)
        self.max_pixels, self.crop = max_pixels, crop
        path = self._source if isinstance(self._source, Path) else None
        self.name = name or (path.name if path else "image")
        self._key: FileKey | None = file_key(path) if path else None
        self._content = content_hash(self._source, self.name)
        with self.opened() as image:
            # an animation's first frame is the picture; edge_gemma.seeing.video
            # reads the others
            may_move = image.format in _ANIMATED_FORMATS
            self.animated: bool = may_move and getattr(image, "is_animated", False)
            self.width, self.height = image.size
            if orientation(image) >= _LYING:
                self.height, self.width = image.size
        if crop is not None:
            self.width, self.height = crop.right - crop.left, crop.bottom - crop.top

    @property
    def digest(self) -> str:
        """Hash of the file's (or array's) content and the crop: two pictures with
        one digest have the same soft tokens.
        """
        if self.crop is None:
            return self._content
        return f"{self._content}-{'.'.join(map(str, self.crop.box))}"

    def rgb(self) -> PillowImage:
        """The picture upright, opaque (transparent parts on white) and 8 bits per
        channel: a Pillow image in mode RGB. Raises MediaError.
        """
        with self.opened() as image:
            load(image)
            image = to_rgb(upright(image), self.name)
            if self.crop is not None:
                image = image.crop(self.crop.box)
        return image

    def array(self, size: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
        """Encoder input ``[1, 3, size, size]`` float32: squeezed to a square with
        Pillow's bilinear filter, (x/255 − mean)/std. Raises MediaError.
        """
        square = self.rgb().resize((size, size), pillow().Resampling.BILINEAR)
        channels_last = np.asarray(square)  # [size, size, 3] uint8
        channels_first = channels_last.transpose(2, 0, 1)[None]
        pixels = np.ascontiguousarray(channels_first, np.float32)
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
        """Gemma 3's pan and scan: cuts of a wide or tall picture along its longer
        side, or none when it is near square.
        """
        cuts = pan_and_scan(self.width, self.height, min_crop, max_crops, min_ratio)
        return [
            Picture(
                self._source,
                max_pixels=self.max_pixels,
                name=f"{self.name} (crop {number})",
                crop=crop,
            )
            for number, crop in enumerate(cuts, 1)
        ]

    @contextmanager
    def opened(self) -> Iterator[PillowImage]:
        """The Pillow image as the file has it: not upright, not cropped, its pixels
        not read yet. Whatever a decoder raises within becomes a MediaError.
        """
        if isinstance(self._source, Path):
            self._check_unchanged(self._source)
        with open_image(self._source, self.name, self.max_pixels) as image:
            yield image

    def _check_unchanged(self, path: Path) -> None:
        key = file_key(path)
        if key != self._key and content_hash(path, self.name) != self._content:
            raise MediaError(
                f"{path} changed after it was put into the message; make the Picture again"
            )
        self._key = key

    def __repr__(self) -> str:
        return f"Picture({self.name!r}, {self.width}×{self.height})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def pan_and_scan(
    width: int, height: int, min_crop: int, max_crops: int, min_ratio: float
) -> list[Crop]:
    """Where to cut a ``width`` × ``height`` picture, in reading order; [] when no
    cut helps.

    Source: Gemma 3's image processor.

    >>> [(crop.left, crop.right) for crop in pan_and_scan(1000, 500, 256, 4, 1.2)]
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
    if width >= height:
        return [Crop(start, 0, end, height) for start, end in cuts]
    return [Crop(0, start, width, end) for start, end in cuts]


def with_crops(picture: Picture) -> list[str | Picture]:
    """The parts of a message that show a picture whole and then in crops, worded as
    Gemma 3 was trained; ``[picture]`` when near square.
    """
    crops = picture.crops()
    if not crops:
        return [picture]
    parts: list[str | Picture] = [
        "Here is the original image ",
        picture,
        " and here are some crops to help you see better ",
    ]
    for number, crop in enumerate(crops):
        if number:
            parts.append(" ")
        parts.append(crop)
    return parts
