"""Pictures and videos of a message → soft tokens.

In: message parts with :class:`~edge_gemma.messages.Image` and
:class:`~edge_gemma.seeing.video.Video`. Out: the same parts with every picture opened and every
video as frames (:func:`prepare`), and the soft tokens of a picture (:class:`PictureEncoder`). It
does not know tokens, templates or the decoder. At most one decoded picture is in memory at a time,
and the encoder only while it is needed, unless told to keep it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import VisionPart, no_encoder, require
from edge_gemma.errors import PlanRefused, UsageError
from edge_gemma.messages import Image, Part
from edge_gemma.seeing.cache import SoftTokenCache
from edge_gemma.seeing.encoder import ImageEncoder
from edge_gemma.seeing.picture import Picture, with_crops
from edge_gemma.seeing.video import Video, expand

FRAME_TOKENS = 6  # begin and end of image and the two line breaks around, at most


def soft_token_cost(vision: VisionPart) -> int:
    """Context that one picture takes, in tokens."""
    return vision.n_soft_tokens + FRAME_TOKENS


def is_unseen(part: Part | Video) -> bool:
    """Whether a part is a picture or video that is not soft tokens yet."""
    return isinstance(part, Video) or (isinstance(part, Image) and part.rows is None)


def prepare(
    parts: Sequence[Part | Video],
    vision: VisionPart | None,
    free_tokens: int,
    *,
    pan_and_scan: bool = False,
    name: str = "this bundle",
) -> list[Part]:
    """Open every picture's header, cut videos into frames that fit, add crops if asked, and check
    that all of it fits ``free_tokens``.

    So a broken file, or one picture too many, is refused before anything is encoded. Raises
    MediaError, UnsupportedModel, PlanRefused (with the number that fits), UsageError.
    """
    if not any(map(is_unseen, parts)):
        return [part for part in parts if not isinstance(part, Video)]
    if vision is None:
        raise no_encoder(name, "vision")
    if pan_and_scan and vision.kind != "siglip":
        raise UsageError("pan and scan is Gemma 3's; Gemma 3n looks at a picture once")
    opened: list[Part | Video] = []
    for part in parts:
        opened += _opened(part, pan_and_scan) if isinstance(part, Image) else [part]
    cost = soft_token_cost(vision)
    n_pictures = sum(isinstance(part, Image) and part.rows is None for part in opened)
    if n_pictures * cost > free_tokens:
        free_tokens = max(0, free_tokens)
        raise PlanRefused(
            f"{n_pictures} pictures take {n_pictures} × {cost} = {n_pictures * cost} tokens and "
            f"{free_tokens} of the context are free: {free_tokens // cost} fit. Send fewer, "
            "or load with a larger n_ctx"
        )
    return expand(opened, vision.image_sizes[0], cost, free_tokens - n_pictures * cost)


def _opened(image: Image, pan_and_scan: bool) -> list[Part]:
    if image.rows is not None:
        return [image]
    picture = image.source if isinstance(image.source, Picture) else Picture(image.source)
    pieces = with_crops(picture) if pan_and_scan else [picture]
    return [
        piece if isinstance(piece, str) else Image(source=piece, size=image.size)
        for piece in pieces
    ]


class PictureEncoder:
    """Soft tokens of pictures for one bundle, from a cache where they are there.

    ``keep`` leaves the encoder loaded between pictures; else it is closed after each.

    >>> with PictureEncoder(Bundle.open("my-gemma-3")) as pictures:
    ...     pictures.encode(Picture(np.zeros((20, 30, 3), np.uint8))).shape
    (16, 256)
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        n_threads: int = 2,
        keep: bool = True,
        cache: SoftTokenCache | None = None,
    ):
        self._bundle, self._vision = bundle, require(bundle.manifest, "vision")
        self._n_threads, self._keep, self._cache = n_threads, keep, cache
        self._encoder: ImageEncoder | None = None
        files = bundle.manifest.files
        hashes = (
            files[name].sha256[:32] for name in sorted(files) if name.startswith(self._vision.file)
        )
        self._identity = "-".join(hashes)

    def encode(self, picture: Picture, size: int | None = None) -> np.ndarray:
        """``size`` is the encoder's input side in pixels, where it offers several →
        ``[n_soft_tokens, n_embd]`` float32, the real rows only.

        Raises MediaError (the picture), BundleError (the encoder), UsageError (the size),
        RuntimeFailure.
        """
        size = self._checked(size)
        key = f"{picture.digest}@{size}/{self._identity}"
        if self._cache is not None:
            found = self._cache.get(key, (self._vision.n_soft_tokens, self._vision.n_embd))
            if found is not None:
                return found
        # before the encoder is loaded: a large photograph and it are never in memory together
        pixels = picture.array(size, self._vision.mean, self._vision.std)
        rows = self._opened(size).encode(pixels)
        if self._cache is not None:
            self._cache.put(key, rows)
        if not self._keep:
            self.release()
        return rows

    def _checked(self, size: int | None) -> int:
        sizes = self._vision.image_sizes
        if size is not None and size not in sizes:
            raise UsageError(
                f"pictures of {size} px were asked for; this encoder takes "
                f"{', '.join(map(str, sizes))}"
            )
        return size or sizes[0]

    def _opened(self, size: int) -> ImageEncoder:
        if self._encoder is not None and self._encoder.size != size:
            self.release()
        if self._encoder is None:
            self._encoder = ImageEncoder(self._bundle, size=size, n_threads=self._n_threads)
        return self._encoder

    @property
    def loaded(self) -> bool:
        return self._encoder is not None

    def release(self) -> None:
        """Let go of the encoder's weights; the next picture loads them again."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None

    close = release

    def __enter__(self) -> PictureEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
