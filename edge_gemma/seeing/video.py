"""Short video and cameras: a file or a lens → pictures with their times, as parts of a message.

In: a path (anything PyAV decodes; animated GIF, WebP and PNG through Pillow alone), or a camera's
number. Out: :class:`Video`, whose :meth:`Video.parts` are texts and pictures, and :func:`capture`,
one ``Picture``. Frames are squeezed to the encoder's square as they are decoded, so a clip costs
``size² · 3`` bytes a frame. This room does not know prompts or encoders; the caller says how many
tokens a frame costs and how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_gemma.errors import EdgeGemmaError, MediaError, MissingExtra, UsageError
from edge_gemma.seeing.picture import MAX_PIXELS, Picture, local_file

TIMESTAMP_TOKENS = 12  # "00:05 " and the \n\n, begin and end rows around a frame, generously
# files; no playlists
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,h264,hevc,mjpeg,ivf,dv,rm,gif,wav,mp3,flac,aac"
# to a frame further away than this it is cheaper to jump to a key frame than to decode everything
# between
SEEK_GAP_S = 4.0


@dataclass(frozen=True)
class Video:
    """A clip as a part of a message:

    ``rate_hz`` frames a second from ``start_s`` to ``end_s``, at most ``max_frames``.

    When the clip has more frames than fit, they are spread evenly over all of it. Raises
    MediaError, MissingExtra, UsageError.
    """

    path: str | Path
    rate_hz: float = 1.0
    max_frames: int = 32
    start_s: float = 0.0
    end_s: float | None = None
    max_pixels: int = field(default=MAX_PIXELS, repr=False)

    def __post_init__(self):
        if not 0 < self.rate_hz <= 120 or self.max_frames < 1:
            raise UsageError(
                f"a video wants 0 < rate_hz ≤ 120 and max_frames ≥ 1; got {self.rate_hz} and "
                f"{self.max_frames}"
            )
        if self.start_s < 0 or (self.end_s is not None and self.end_s <= self.start_s):
            raise UsageError(
                f"a video runs from start_s ≥ 0 to a later end_s; got {self.start_s} to "
                f"{self.end_s}"
            )

    def parts(self, size: int, tokens_per_image: int, max_tokens: int) -> list:
        """``["00:00 ", Picture, "\\n00:01 ", Picture, …]`` within ``max_tokens``; ``size`` is the
        encoder's input side in pixels.
        """
        fits = max_tokens // (tokens_per_image + TIMESTAMP_TOKENS)
        if fits < 1:
            raise MediaError(
                f"one frame takes {tokens_per_image + TIMESTAMP_TOKENS} tokens and "
                f"{max_tokens} are free; no frame of {Path(self.path).name} fits"
            )
        parts: list = []
        for time_s, image in self.frames(size, min(fits, self.max_frames)):
            parts += [f"{'' if not parts else chr(10)}{timestamp(time_s)} ", image]
        return parts

    def frames(self, size: int, max_frames: int | None = None) -> Iterator[tuple[float, Picture]]:
        """``(time_s, Picture)`` in order, at most ``max_frames``."""
        path = local_file(self.path, "video")
        limit = min(self.max_frames, max_frames or self.max_frames)
        opened = _animation(path) or _Decoded(path)
        n = 0
        with opened:
            if opened.width * opened.height > self.max_pixels:
                raise MediaError(
                    f"{path.name} has frames of {opened.width} × {opened.height}; the limit "
                    f"is {self.max_pixels:,} pixels"
                )
            for time_s, frame in opened.at(self._times(opened.duration_s, limit)):
                n += 1
                yield (
                    time_s,
                    Picture(
                        np.asarray(frame.resize((size, size), resample=2)),
                        name=f"{path.name} @ {timestamp(time_s)}",
                    ),
                )
        if not n:
            raise MediaError(
                f"{path.name} has no frames between {self.start_s:g} s and "
                f"{'its end' if self.end_s is None else f'{self.end_s:g} s'}"
            )

    def _times(self, duration_s: float | None, limit: int) -> list[float]:
        """When to look. A clip of unknown length is taken frame by frame at the asked rate until it
        ends.
        """
        end_s = min(x for x in (self.end_s, duration_s, 24 * 3600.0) if x is not None)
        if end_s <= self.start_s:
            return (
                [self.start_s]
                if duration_s is None or self.start_s < duration_s or self.start_s == 0
                else []
            )
        n = min(limit, max(1, int((end_s - self.start_s) * self.rate_hz + 1e-6)))
        step_s = (
            1 / self.rate_hz
            if duration_s is None and self.end_s is None
            else max(1 / self.rate_hz, (end_s - self.start_s) / n)
        )
        return [self.start_s + k * step_s for k in range(n)]


def expand(parts: list, size: int, tokens_per_image: int, max_tokens: int) -> list:
    """A message's parts with each :class:`Video` replaced by its texts and frames; the videos share
    ``max_tokens`` evenly.
    """
    videos = sum(isinstance(part, Video) for part in parts)
    expanded: list = []
    for part in parts:
        expanded += (
            part.parts(size, tokens_per_image, max_tokens // videos)
            if isinstance(part, Video)
            else [part]
        )
    return expanded


def timestamp(time_s: float) -> str:
    """Seconds → ``mm:ss``, or ``h:mm:ss`` from an hour on.

    >>> timestamp(65.4), timestamp(3600)
    ('01:05', '1:00:00')
    """
    minutes, seconds = divmod(int(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


class _Decoded:
    """A file that PyAV decodes. Untrusted: only local files, no playlists that name others."""

    def __init__(self, path: Path):
        try:
            import av
        except ImportError:
            raise MissingExtra("Reading video", "video") from None
        self._av, self.name = av, path.name
        try:
            self.container = av.open(
                str(path),
                metadata_errors="replace",
                options={"protocol_whitelist": "file", "format_whitelist": FORMATS},
            )
        except (av.error.FFmpegError, OSError, ValueError) as error:
            if _is_picture(path):
                raise MediaError(
                    f"{path.name} is a picture, not a video; name it among the pictures, or "
                    "use Image(…)"
                ) from None
            raise MediaError(
                f"{path.name} is not a video this can read: "
                f"{getattr(error, 'strerror', None) or error}"
            ) from None
        if not self.container.streams.video:
            others = ", ".join(stream.type for stream in self.container.streams) or "none"
            self.container.close()
            raise MediaError(f"{path.name} has no pictures (its streams: {others})")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        self.width, self.height = self.stream.width, self.stream.height
        if self.stream.duration and self.stream.time_base:
            self.duration_s = float(self.stream.duration * self.stream.time_base)
        else:
            self.duration_s = self.container.duration / 1e6 if self.container.duration else None
        self.start_s = float((self.stream.start_time or 0) * (self.stream.time_base or 0))

    def at(self, times: list[float]) -> Iterator[tuple[float, object]]:
        """For each time the first frame shown at or after it (the clip starts at 0)."""
        pending = list(times)
        position_s, frames = 0.0, self.container.decode(self.stream)
        try:
            while pending:
                if pending[0] - position_s > SEEK_GAP_S:
                    self.container.seek(
                        int((pending[0] + self.start_s) / self.stream.time_base), stream=self.stream
                    )
                    frames = self.container.decode(self.stream)
                for frame in frames:
                    position_s = max(0.0, (frame.time or 0.0) - self.start_s)
                    if position_s >= pending[0] - 1e-3:
                        break
                else:
                    return
                picture = frame.to_image()
                if rotation := int(getattr(frame, "rotation", 0) or 0):
                    picture = picture.rotate(rotation, expand=True)
                while pending and pending[0] - 1e-3 <= position_s:
                    pending.pop(0)
                yield position_s, picture
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise MediaError(
                f"{self.name} is damaged after {timestamp(position_s)}: "
                f"{getattr(error, 'strerror', None) or error}"
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()


class _Animated:
    """An animated GIF, WebP or PNG, through Pillow."""

    def __init__(self, image: Picture):
        self.image, self.width, self.height = image, image.width, image.height
        with image._opened() as picture:
            self._durations_s = []
            for number in range(picture.n_frames):
                picture.seek(number)
                picture.load()  # WebP tells a frame's duration only then
                self._durations_s.append(
                    max(picture.info.get("duration", 100), 20) / 1000
                )  # browsers show nothing faster
        self.duration_s = sum(self._durations_s)

    def at(self, times: list[float]) -> Iterator[tuple[float, object]]:
        from edge_gemma.seeing.picture import _to_rgb

        pending, begin_s = list(times), 0.0
        with self.image._opened() as picture:
            for number, duration_s in enumerate(self._durations_s):
                if pending and pending[0] < begin_s + duration_s:
                    picture.seek(number)
                    yield begin_s, _to_rgb(picture.copy(), self.image.name)
                    while pending and pending[0] < begin_s + duration_s:
                        pending.pop(0)
                begin_s += duration_s

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def _is_picture(path: Path) -> bool:
    try:
        Picture(path)
    except EdgeGemmaError:
        return False
    return True


def _animation(path: Path) -> _Animated | None:
    if path.suffix.lower() not in (".gif", ".webp", ".png", ".apng", ".avif"):
        return None
    return _Animated(Picture(path))
