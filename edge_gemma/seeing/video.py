"""Short video: a file → pictures with their times, as parts of a message.

In: a path (anything PyAV decodes; animated GIF, WebP and PNG through Pillow alone).
Out: :class:`Video`, whose :meth:`Video.parts` are texts and pictures. Frames are
squeezed to the encoder's square as they are decoded, so a clip costs ``size² · 3``
bytes a frame. This module does not know prompts or encoders; the caller says how
many tokens a frame costs and how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from edge_gemma.errors import EdgeGemmaError, MediaError, MissingExtra, UsageError
from edge_gemma.messages import Image, Part
from edge_gemma.seeing.picture import Picture
from edge_gemma.seeing.pixels import MAX_PIXELS, to_rgb
from edge_gemma.seeing.source import pillow
from edge_gemma.sources import local_file

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from PIL.Image import Image as PillowImage

TIMESTAMP_TOKENS = 12  # "00:05 " and the \n\n, begin and end rows around a frame, generously
# FFmpeg's demuxers of files; no playlists, which name other files
FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,mjpeg,ivf,dv,rm,gif,"
    "wav,mp3,flac,aac"
)
ANIMATION_SUFFIXES = (".gif", ".webp", ".png", ".apng", ".avif")
# to a frame further away than this it is cheaper to jump to a key frame than to
# decode everything between
SEEK_GAP_S = 4.0
_SOON_S = 1e-3  # a frame so little before the wanted time is the wanted one
_LONGEST_S = 24 * 3600.0
_MIN_FRAME_S = 0.02  # browsers show no frame of an animation for less
_DEFAULT_FRAME_S = 0.1


@dataclass(frozen=True)
class Video:
    """A clip as a part of a message:

    ``rate_hz`` frames a second from ``start_s`` to ``end_s``, at most
    ``max_frames``.

    When the clip has more frames than fit, they are spread evenly over all of it.
    Raises MediaError, MissingExtra, UsageError.

    >>> [(time_s, image.width) for time_s, image in Video("clip.gif").frames(size=32)]
    [(0.0, 32)]
    """

    path: str | Path
    rate_hz: float = 1.0
    max_frames: int = 32
    start_s: float = 0.0
    end_s: float | None = None
    max_pixels: int = field(default=MAX_PIXELS, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.rate_hz <= 120 or self.max_frames < 1:
            raise UsageError(
                f"a video needs 0 < rate_hz ≤ 120 and max_frames ≥ 1; got {self.rate_hz} and "
                f"{self.max_frames}"
            )
        ends_late_enough = self.end_s is None or self.end_s > self.start_s
        if self.start_s < 0 or not ends_late_enough:
            raise UsageError(
                f"a video runs from start_s ≥ 0 to a later end_s; got {self.start_s} to "
                f"{self.end_s}"
            )

    def parts(self, size: int, tokens_per_image: int, max_tokens: int) -> list[str | Picture]:
        """``["00:00 ", Picture, "\\n00:01 ", Picture, …]`` within ``max_tokens``;
        ``size`` is the encoder's input side in pixels. Raises MediaError.
        """
        tokens_per_frame = tokens_per_image + TIMESTAMP_TOKENS
        n_fitting = max_tokens // tokens_per_frame
        if n_fitting < 1:
            raise MediaError(
                f"one frame takes {tokens_per_frame} tokens and "
                f"{max_tokens} are free; no frame of {Path(self.path).name} fits"
            )
        parts: list[str | Picture] = []
        for time_s, image in self.frames(size, min(n_fitting, self.max_frames)):
            line_break = "\n" if parts else ""
            parts += [f"{line_break}{timestamp(time_s)} ", image]
        return parts

    def frames(self, size: int, max_frames: int | None = None) -> Iterator[tuple[float, Picture]]:
        """``(time_s, Picture)`` in order, at most ``max_frames``, each of ``size``
        × ``size`` pixels. Raises MediaError.
        """
        path = local_file(self.path, "video")
        limit = min(self.max_frames, max_frames or self.max_frames)
        bilinear = pillow().Resampling.BILINEAR
        n = 0
        with _open(path) as clip:
            self._check_size(path, clip)
            for time_s, frame in clip.at(self._times(clip.duration_s, limit)):
                n += 1
                square = np.asarray(frame.resize((size, size), resample=bilinear))
                yield time_s, Picture(square, name=f"{path.name} @ {timestamp(time_s)}")
        if not n:
            end = "its end" if self.end_s is None else f"{self.end_s:g} s"
            raise MediaError(f"{path.name} has no frames between {self.start_s:g} s and {end}")

    def _check_size(self, path: Path, clip: _Clip) -> None:
        if clip.width * clip.height > self.max_pixels:
            raise MediaError(
                f"{path.name} has frames of {clip.width} × {clip.height}; the limit "
                f"is {self.max_pixels:,} pixels"
            )

    def _times(self, duration_s: float | None, limit: int) -> list[float]:
        """The wanted times. A clip of unknown length is taken frame by frame at the
        asked rate until it ends.
        """
        ends = [end_s for end_s in (self.end_s, duration_s, _LONGEST_S) if end_s is not None]
        length_s = min(ends) - self.start_s
        if length_s <= 0:
            may_have_a_frame = duration_s is None or self.start_s < duration_s or not self.start_s
            return [self.start_s] if may_have_a_frame else []
        n = min(limit, max(1, int(length_s * self.rate_hz + 1e-6)))
        step_s = 1 / self.rate_hz
        if duration_s is not None or self.end_s is not None:
            step_s = max(step_s, length_s / n)
        return [self.start_s + k * step_s for k in range(n)]


def expand(
    parts: Sequence[Part | Video], size: int, tokens_per_image: int, max_tokens: int
) -> list[Part]:
    """A message's parts with each :class:`Video` replaced by its texts and frames;
    the videos share ``max_tokens`` evenly. Raises MediaError.
    """
    n_videos = sum(isinstance(part, Video) for part in parts)
    expanded: list[Part] = []
    for part in parts:
        if not isinstance(part, Video):
            expanded.append(part)
            continue
        for piece in part.parts(size, tokens_per_image, max_tokens // n_videos):
            expanded.append(piece if isinstance(piece, str) else Image(source=piece))
    return expanded


def timestamp(time_s: float) -> str:
    """Seconds → ``mm:ss``, or ``h:mm:ss`` from an hour on.

    >>> timestamp(65.4), timestamp(3600)
    ('01:05', '1:00:00')
    """
    minutes, seconds = divmod(int(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


class _Clip(Protocol):
    """An opened clip."""

    width: int
    height: int
    duration_s: float | None  # None: the file does not say

    def at(self, times: Sequence[float]) -> Iterator[tuple[float, PillowImage]]:
        """For each time (ascending; the clip starts at 0) the frame that is shown
        then, once where several times have the same. Raises MediaError.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def _open(path: Path) -> _Clip:
    if path.suffix.lower() in ANIMATION_SUFFIXES:
        return _Animation(Picture(path))
    return _Decoded(path)


class _Decoded:
    """A file that PyAV decodes. Untrusted: only local files, no playlists that name others."""

    def __init__(self, path: Path):
        try:
            import av
        except ImportError:
            raise MissingExtra("Reading video", "video") from None
        self.name = path.name
        self._errors = (av.error.FFmpegError, OSError, ValueError)
        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
        try:
            self._container = av.open(str(path), metadata_errors="replace", options=options)
        except self._errors as error:
            if _is_picture(path):
                raise MediaError(
                    f"{path.name} is a picture, not a video; name it among the pictures, or "
                    "use Image(…)"
                ) from None
            raise MediaError(
                f"{path.name} is not a video this can read: {_reason(error)}"
            ) from None
        streams = self._container.streams
        if not streams.video:
            kinds = ", ".join(stream.type for stream in streams) or "none"
            self._container.close()
            raise MediaError(f"{path.name} has no pictures (its streams: {kinds})")
        self._stream = streams.video[0]
        self._stream.thread_type = "AUTO"
        self._time_base = self._stream.time_base or Fraction(1, av.time_base)
        self._start_s = float((self._stream.start_time or 0) * self._time_base)
        self._position_s = 0.0  # of the frame decoded last, from the clip's start
        self.width, self.height = self._stream.width, self._stream.height
        self.duration_s: float | None = None
        if self._stream.duration:
            self.duration_s = float(self._stream.duration * self._time_base)
        elif self._container.duration:
            self.duration_s = self._container.duration / av.time_base

    def at(self, times: Sequence[float]) -> Iterator[tuple[float, PillowImage]]:
        pending = list(times)
        try:
            frames = self._container.decode(self._stream)
            while pending:
                if pending[0] - self._position_s > SEEK_GAP_S:
                    frames = self._decode_from(pending[0])
                frame = self._first_at(frames, pending[0])
                if frame is None:
                    return
                time_s = self._position_s
                yield time_s, _upright(frame)
                pending = [later_s for later_s in pending if later_s - _SOON_S > time_s]
        except self._errors as error:
            raise MediaError(
                f"{self.name} is damaged after {timestamp(self._position_s)}: {_reason(error)}"
            ) from None

    def _decode_from(self, time_s: float) -> Iterator[VideoFrame]:
        """Frames from the last key frame at or before that time."""
        offset = int((time_s + self._start_s) / self._time_base)
        self._container.seek(offset, stream=self._stream)
        return self._container.decode(self._stream)

    def _first_at(self, frames: Iterator[VideoFrame], time_s: float) -> VideoFrame | None:
        """The first frame shown at or after that time."""
        for frame in frames:
            self._position_s = max(0.0, (frame.time or 0.0) - self._start_s)
            if self._position_s >= time_s - _SOON_S:
                return frame
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._container.close()


def _upright(frame: VideoFrame) -> PillowImage:
    image = frame.to_image()
    rotation = int(getattr(frame, "rotation", 0) or 0)  # degrees; PyAV 12 does not tell
    return image.rotate(rotation, expand=True) if rotation else image


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


class _Animation:
    """An animated GIF, WebP or PNG, through Pillow."""

    def __init__(self, picture: Picture):
        self._picture, self.width, self.height = picture, picture.width, picture.height
        self._durations_s: list[float] = []
        with picture.opened() as image:
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                image.load()  # WebP tells a frame's duration only then
                milliseconds = image.info.get("duration", 1000 * _DEFAULT_FRAME_S)
                self._durations_s.append(max(milliseconds / 1000, _MIN_FRAME_S))
        self.duration_s: float | None = sum(self._durations_s)

    def at(self, times: Sequence[float]) -> Iterator[tuple[float, PillowImage]]:
        pending, begin_s = list(times), 0.0
        with self._picture.opened() as image:
            for number, duration_s in enumerate(self._durations_s):
                end_s = begin_s + duration_s
                if pending and pending[0] < end_s:
                    image.seek(number)
                    yield begin_s, to_rgb(image.copy(), self._picture.name)
                    pending = [later_s for later_s in pending if later_s >= end_s]
                begin_s = end_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass  # nothing is open between two calls


def _is_picture(path: Path) -> bool:
    try:
        Picture(path)
    except EdgeGemmaError:
        return False
    return True
