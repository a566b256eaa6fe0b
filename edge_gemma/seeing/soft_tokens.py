"""Pictures and videos of a message → soft tokens.

The one place where picture, encoder and cache meet.

In: message parts with pictures (paths, bytes, arrays, :class:`~edge_gemma.seeing.picture.Picture`)
and :class:`~edge_gemma.seeing.video.Video`. Out: the same parts ready for :mod:`edge_gemma.prompts`
(:func:`prepare`), and their rows (:class:`Look`). This room does not know tokens, templates or the
decoder. It holds at most one decoded picture at a time, and the encoder only while it is needed,
unless told to keep it.
"""

from __future__ import annotations

import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import VisionPart, no_encoder, require
from edge_gemma.errors import PlanRefused, UsageError
from edge_gemma.messages import Audio, Image
from edge_gemma.seeing.cache import SoftTokenCache
from edge_gemma.seeing.encoder import ImageEncoder
from edge_gemma.seeing.picture import Picture, with_crops
from edge_gemma.seeing.video import Video, expand
from edge_gemma.spans import Rows

FRAME_TOKENS = 6  # begin and end of image and the two line breaks around, at most


def soft_token_cost(vision: VisionPart) -> int:
    """Context that one picture takes, in tokens."""
    return vision.n_soft_tokens + FRAME_TOKENS


def prepare(
    parts,
    vision: VisionPart | None,
    free_tokens: int,
    *,
    pan_and_scan: bool = False,
    name: str = "this bundle",
) -> list:
    """Open every picture's header, cut videos into frames that fit, add crops if asked, and check
    that all of it fits ``free_tokens``.

    So a broken file, or one picture too many, is refused before anything was encoded. Raises
    MediaError, UnsupportedModel, PlanRefused (with the number that fits), UsageError.
    """
    parts = [parts] if isinstance(parts, str | Picture | Video | Image) else list(parts)
    seen = [
        part
        for part in parts
        if isinstance(part, Picture | Video) or (isinstance(part, Image) and part.rows is None)
    ]
    if not seen:
        return parts
    if vision is None:
        raise no_encoder(name, "vision")
    size, cost = _size(vision, None), soft_token_cost(vision)
    pictures = [part if not _is_picture(part) else _open(part) for part in parts]
    if pan_and_scan:
        if vision.kind != "siglip":
            raise UsageError("pan and scan is Gemma 3's; Gemma 3n looks at a picture once")
        pictures = [
            piece
            for part in pictures
            for piece in (_with_crops(part) if _is_picture(part) else [part])
        ]
    n_pictures = sum(map(_is_picture, pictures))
    if n_pictures * cost > free_tokens:
        raise PlanRefused(
            f"{n_pictures} pictures take {n_pictures} × {cost} = {n_pictures * cost} tokens "
            f"and {max(0, free_tokens)} of the context are free: "
            f"{max(0, free_tokens) // cost} fit. Send fewer, or load with a larger n_ctx"
        )
    expanded = expand(pictures, size, cost, free_tokens - n_pictures * cost)
    return [Image(source=part) if isinstance(part, Picture) else part for part in expanded]


def _is_picture(part) -> bool:
    return isinstance(part, Picture) or (isinstance(part, Image) and part.rows is None)


def _open(part: Picture | Image) -> Image:
    if isinstance(part, Picture):
        return Image(source=part)
    return (
        part
        if isinstance(part.source, Picture)
        else Image(source=Picture(part.source), size=part.size)
    )


def _with_crops(part: Image) -> list:
    return [
        Image(source=piece, size=part.size) if isinstance(piece, Picture) else piece
        for piece in with_crops(part.source)
    ]


def _size(vision: VisionPart, size: int | None) -> int:
    if size is not None and size not in vision.image_sizes:
        raise UsageError(
            f"pictures of {size} px were asked for; this encoder takes "
            f"{', '.join(map(str, vision.image_sizes))}"
        )
    return size or vision.image_sizes[0]


class Look:
    """Soft tokens of pictures for one bundle.

    ``keep`` leaves the encoder loaded between pictures; else it goes after :meth:`release`.

    >>> with Look(Bundle.open(getfixture("seeing_bundle")), cache=None) as look:
    ...     look(Picture(np.zeros((20, 30, 3), np.uint8))).shape
    (16, 256)
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        size: int | None = None,
        n_threads: int = 2,
        keep: bool = True,
        cache: SoftTokenCache | None = None,
    ):
        self.bundle, self.vision, self.n_threads, self.keep, self.cache = (
            bundle,
            require(bundle.manifest, "vision"),
            n_threads,
            keep,
            cache,
        )
        self.size = _size(self.vision, size)
        self._encoder: ImageEncoder | None = None
        files = bundle.manifest.files
        self._identity = "-".join(
            files[name].sha256[:32] for name in sorted(files) if name.startswith(self.vision.file)
        )

    def __call__(self, part) -> np.ndarray:
        """A picture (a path, bytes, an array, a Picture, or a message's Image) → ``[n_soft_tokens,
        n_embd]`` float32, the real rows only.

        Raises MediaError (the picture), BundleError (the encoder), RuntimeFailure.
        """
        size = self.size
        if isinstance(part, Image):
            if part.rows is not None:
                return part.rows
            part, size = part.source, _size(self.vision, part.size) if part.size else self.size
        if isinstance(part, Audio | Rows):
            raise UsageError(f"a picture was expected, got {type(part).__name__}")
        picture = part if isinstance(part, Picture) else Picture(part)
        key, shape = (
            f"{picture.digest}@{size}/{self._identity}",
            (self.vision.n_soft_tokens, self.vision.n_embd),
        )
        if self.cache is not None and (rows := self.cache.get(key, shape)) is not None:
            return rows
        pixels = picture.array(
            size, self.vision.mean, self.vision.std
        )  # before the encoder is loaded: a large photograph and it are never there together
        if self._encoder is not None and self._encoder.size != size:
            self.release()
        if self._encoder is None:
            self._encoder = ImageEncoder(self.bundle, size=size, n_threads=self.n_threads)
        rows = self._encoder.encode(pixels)
        if self.cache is not None:
            self.cache.put(key, rows)
        if not self.keep:
            self.release()
        return rows

    @property
    def loaded(self) -> bool:
        return self._encoder is not None

    def release(self) -> None:
        """Let go of the encoder's weights; the next picture loads them again."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None

    close = release

    def __enter__(self) -> Look:
        return self

    def __exit__(self, *_) -> None:
        self.release()
