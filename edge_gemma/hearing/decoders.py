"""Sound files → frames of samples, with libsndfile and, for what that refuses, FFmpeg's libraries.

In: an opened file and what its container says. Out: frames ``[n, channels]`` float32 at the file's
rate, in order. The files are untrusted: what a decoder raises becomes a MediaError, no other file
is opened, and no name decides what a file is. It does not know resampling, mixing or speech.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

from edge_gemma.errors import MediaError, MissingExtra, first_line
from edge_gemma.hearing.containers import Container, Window

if TYPE_CHECKING:
    from types import ModuleType

    from av.audio.stream import AudioStream

BLOCK_FRAMES = 1 << 16
_MIN_RATE_HZ, _MAX_RATE_HZ = 1000, 768_000
_MAX_CHANNELS = 256
# a FLAC that ends early loses what was asked for at once: little is asked for
_FLAC_FRAMES = 4096
_FLOAT_SUBTYPES = ("FLOAT", "DOUBLE")
_MAX_DAMAGED_PACKETS = 1000  # one after the other: nothing more will come
# FFmpeg's demuxers with a signature of their own; none that names other files
_DEMUXERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dts,eac3,flac,flv,loas,matroska,webm,mov,mp4,m4a,3gp,3g2,"
    "mj2,mp3,mpc,mpc8,mpeg,mpegts,nut,ogg,rm,sox,tta,voc,w64,wav,wv"
)
# of these the length of the sound stands in the file; of others it is an estimate
_EXACT_LENGTHS = ("mov", "caf", "wav", "w64", "aiff", "flac", "tta", "wv")
_READABLE = "wav, flac, ogg, opus, mp3, m4a, aac, amr, 3gp, mp4 and webm can"


@dataclass(frozen=True)
class Frames:
    """``samples [n, channels]`` float32 at ``rate_hz``; a chained Ogg may change both."""

    samples: np.ndarray
    rate_hz: int


class Decoder(Protocol):
    """A sound file being decoded, once, from its beginning."""

    rate_hz: int
    channels: int
    claimed_s: float | None  # length by the header; None: it does not say
    is_float: bool  # its samples have no fixed full scale
    is_cut: bool  # its data ended too early, found while reading

    def frames(self) -> Iterator[Frames]:
        """In order, about BLOCK_FRAMES at a time. Raises MediaError where the data is damaged."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SoundFile:
    """What is decoded: its bytes by ``open``, and its name for messages."""

    name: str
    path: str | None  # None: it is in memory
    data: bytes
    container: Container

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data) if self.path is None else open(self.path, "rb")

    def decoder(self) -> Decoder:
        """Raises MediaError, MissingExtra."""
        opened: Decoder
        try:
            opened = SndfileDecoder(self)
        except _Refused as refusal:
            opened = _with_ffmpeg(self, str(refusal))
        try:
            _check_format(self.name, opened.rate_hz, opened.channels)
        except MediaError:
            opened.close()
            raise
        return opened


class _Refused(Exception):
    """libsndfile does not take the file."""


def _check_format(name: str, rate_hz: int, channels: int) -> None:
    if _MIN_RATE_HZ <= rate_hz <= _MAX_RATE_HZ and 1 <= channels <= _MAX_CHANNELS:
        return
    raise MediaError(
        f"{name} claims {rate_hz} Hz and {channels} channels; "
        f"expected {_MIN_RATE_HZ} … {_MAX_RATE_HZ} Hz and 1 … {_MAX_CHANNELS}"
    )


# --- libsndfile ---


def _soundfile() -> ModuleType:
    try:
        import soundfile
    except ImportError:
        raise MissingExtra("Reading sound files", "hear") from None
    except OSError as error:
        raise MediaError(
            f"libsndfile cannot be loaded ({error}); on Debian type: sudo apt-get "
            "install libsndfile1"
        ) from None
    return soundfile


class SndfileDecoder:
    """wav, flac, ogg, mp3, aiff, au, caf …"""

    def __init__(self, source: SoundFile):
        self._source, self._library = source, _soundfile()
        container = source.container
        self._pieces: Sequence[tuple[int, int] | None] = container.pieces or (None,)
        self._window: Window | None = None
        self._file = self._opened(self._pieces[0])
        self.rate_hz: int = self._file.samplerate
        self.channels: int = self._file.channels
        self.is_float = self._file.subtype in _FLOAT_SUBTYPES
        self.is_cut = False
        self.claimed_s = container.claimed_s
        if self.claimed_s is None and not container.length_is_unknown and len(self._pieces) == 1:
            self.claimed_s = max(0, self._file.frames) / self.rate_hz

    def _opened(self, piece: tuple[int, int] | None) -> Any:
        """libsndfile's handle of a piece of the file, or of all of it."""
        source, container = self._source, self._source.container
        what: object = source.path
        is_flac = container.is_flac
        if piece or container.patches or is_flac or source.path is None:
            start, end = piece or (0, None)
            what = self._window = Window(source.open(), start, end, container.patches)
        try:
            if container.length_is_unknown:
                return _unseekable(self._library)(what)
            return self._library.SoundFile(what)
        except self._library.SoundFileError as error:
            self._close_window()
            raise _Refused(first_line(error)) from None

    def frames(self) -> Iterator[Frames]:
        n_read = 0.0
        for number, piece in enumerate(self._pieces):
            if number:
                self.close()
                try:
                    self._file = self._opened(piece)
                except _Refused:
                    self.is_cut = True  # a chained stream whose beginning is not whole
                    return
            rate_hz = self._file.samplerate
            last = False
            while not last:
                samples = self._read(n_read)
                n_read += len(samples) / rate_hz
                last = len(samples) < BLOCK_FRAMES
                yield Frames(samples, rate_hz)

    def _read(self, at_s: float) -> np.ndarray:
        """The next frames ``[n, channels]`` float32; fewer than BLOCK_FRAMES at the end."""
        step = _FLAC_FRAMES if self._file.format == "FLAC" else BLOCK_FRAMES
        parts: list[np.ndarray] = []
        n = 0
        while n < BLOCK_FRAMES:
            try:
                part = self._file.read(step, dtype="float32", always_2d=True)
            except self._library.SoundFileError as error:
                if self._window is not None and self._window.at_end:
                    self.is_cut = True
                    break
                if n:
                    return np.concatenate(parts)
                raise MediaError(
                    f"{self._source.name} is damaged after {at_s:.1f} s ({first_line(error)})"
                ) from None
            parts.append(part)
            n += len(part)
            if len(part) < step:
                break
        empty = np.zeros((0, self._file.channels), np.float32)
        return np.concatenate(parts) if len(parts) > 1 else (parts or [empty])[0]

    def _close_window(self) -> None:
        if self._window is not None:
            self._window.close()
            self._window = None

    def close(self) -> None:
        self._file.close()
        self._close_window()


def _unseekable(library: ModuleType) -> type:
    """soundfile's class for a file in which libsndfile cannot seek: a FLAC of unknown length."""

    class Unseekable(library.SoundFile):  # type: ignore[name-defined]  # has no types
        def seekable(self) -> bool:
            return False

    return Unseekable


# --- FFmpeg's libraries ---


def _with_ffmpeg(source: SoundFile, refusal: str) -> Decoder:
    """The file by FFmpeg. Raises MediaError, which says what the file is where its first bytes
    tell; MissingExtra.
    """
    with source.open() as file:
        head = file.read(4096)
        kind = kind_of(head)
        is_unfinished = kind == "MP4" and not _has_index(file)
    if is_unfinished:
        raise MediaError(
            f"{source.name} is an MP4 recording without its index (moov), which is written last: "
            "the recording or the copy was cut. Copy it again; what is here cannot be read"
        )
    try:
        import av  # noqa: F401  (whether it is there)
    except ImportError:
        if kind in _FFMPEG_KINDS:
            raise MissingExtra(f"{source.name} is {kind}; reading it", "hear") from None
    else:
        try:
            return AvDecoder(source)
        except _Refused as error:
            refusal = str(error) or refusal
    if source.container.is_cut:
        refusal = "it was cut before its sound begins"
    what = f"it is {kind}" if kind and kind not in _FFMPEG_KINDS else refusal
    raise MediaError(
        f"{source.name} is not a sound file that can be read ({what}); {_READABLE}. "
        f"Others convert with: ffmpeg -i {source.name.rpartition('/')[2]} -ar 16000 -ac 1 out.wav"
    )


_FFMPEG_KINDS = ("MP4", "WebM or Matroska", "AAC", "AMR", "ASF (WMA)", "MPEG-TS", "FLV")
_SIGNATURES = (
    (4, b"ftyp", "MP4"),
    (0, b"\x1aE\xdf\xa3", "WebM or Matroska"),
    (0, b"\xff\xf1", "AAC"),
    (0, b"\xff\xf9", "AAC"),
    (0, b"#!AMR", "AMR"),
    (0, b"0&\xb2u", "ASF (WMA)"),
    (0, b"FLV\x01", "FLV"),
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"GIF8", "a GIF picture"),
    (8, b"WEBP", "a WebP picture"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x7fELF", "a program"),
    (0, b"GGUF", "a GGUF model"),
    (0, b"<!DOCTYPE", "an HTML page"),
    (0, b"<html", "an HTML page"),
)


def kind_of(head: bytes) -> str:
    """What the first bytes of a file say it is; empty where they do not.

    >>> kind_of(b"#!AMR\\n"), kind_of(b"plain words")
    ('AMR', 'text')
    """
    for offset, signature, kind in _SIGNATURES:
        if head[offset:].startswith(signature):
            return kind
    if head[:1] == b"G" and head[188:189] == b"G":
        return "MPEG-TS"
    if head and not head.strip(b"\0"):
        return "zeros"
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    return (
        "text" if text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable() else ""
    )


def _has_index(file: BinaryIO) -> bool:
    """Whether an MP4 has a box moov (or moof: a recording in fragments) at its top."""
    position = 0
    for _ in range(10_000):
        file.seek(position)
        head = file.read(16)
        if len(head) < 8:
            return False
        size, name = int.from_bytes(head[:4]), head[4:8]
        if name in (b"moov", b"moof"):
            return True
        if size == 1:
            size = int.from_bytes(head[8:16])
        if size < 8:
            return False
        position += size
    return False


class AvDecoder:
    """What phones and browsers record: m4a, aac, amr, 3gp, mp4, webm, and the sound of videos."""

    def __init__(self, source: SoundFile):
        import av

        self._source, self._av = source, av
        self._errors = (av.error.FFmpegError, ValueError, LookupError)
        self._window = Window(source.open(), patches=source.container.patches)
        options = {"protocol_whitelist": "none", "format_whitelist": _DEMUXERS}
        try:
            self._container: Any = av.open(self._window, metadata_errors="replace", options=options)
        except Exception as error:  # PyAV raises many types on a broken file
            self._window.close()
            raise _Refused(_reason(error)) from None
        if not self._container.streams.audio:
            kinds = ", ".join(stream.type for stream in self._container.streams) or "none"
            self.close()
            raise MediaError(f"{source.name} has no sound (its streams: {kinds})")
        self._stream: AudioStream = self._container.streams.audio[0]
        context = self._stream.codec_context
        if context is None:
            self.close()
            raise _Refused("its codec is not known")
        self.rate_hz: int = context.sample_rate or 0
        self.channels: int = context.channels or 0
        self.is_float = context.name.startswith("pcm_f")
        self.is_cut = False
        self.claimed_s = self._claimed_s()

    def _claimed_s(self) -> float | None:
        stream, kind = self._stream, self._container.format.name
        if stream.duration and stream.time_base and kind.startswith(_EXACT_LENGTHS):
            return float(stream.duration * stream.time_base)
        is_alone = len(self._container.streams) == 1
        if is_alone and self._container.duration and kind.startswith("matroska"):
            return self._container.duration / self._av.time_base
        return None

    def frames(self) -> Iterator[Frames]:
        parts: list[np.ndarray] = []
        rate_hz, n = self.rate_hz, 0
        for frame in self._decoded():
            samples = self._samples(frame)
            changes = bool(parts) and samples.shape[1] != parts[0].shape[1]
            if parts and (frame.sample_rate != rate_hz or changes or n >= BLOCK_FRAMES):
                yield Frames(np.concatenate(parts), rate_hz)
                parts, n = [], 0
            rate_hz = frame.sample_rate
            parts.append(samples)
            n += len(samples)
        if parts:
            yield Frames(np.concatenate(parts), rate_hz)

    def _samples(self, frame: Any) -> np.ndarray:
        """A frame of any of FFmpeg's formats → ``[n, channels]`` float32."""
        try:
            # interleaved: PyAV reads beyond its memory for more than 8 planes
            convert = self._av.AudioResampler("flt", frame.layout, frame.sample_rate)
            parts = (*convert.resample(frame), *convert.resample(None))
            interleaved = np.concatenate([part.to_ndarray().ravel() for part in parts])
        except self._errors as error:
            raise MediaError(
                f"{self._source.name} is damaged: its samples cannot be read ({_reason(error)})"
            ) from None
        return interleaved.reshape(-1, frame.layout.nb_channels)

    def _decoded(self) -> Iterator[Any]:
        """FFmpeg's frames. A damaged packet is left out; that the file is cut is kept in mind."""
        n_damaged, n_decoded = 0, 0
        packets = self._container.demux(self._stream)
        while n_damaged < _MAX_DAMAGED_PACKETS:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except self._errors:
                self.is_cut = True
                break
            try:
                decoded = packet.decode()
            except self._errors:
                n_damaged += 1
                self.is_cut = True
                continue
            n_damaged = 0
            n_decoded += len(decoded)
            yield from decoded
        if self.is_cut and not n_decoded:
            raise MediaError(f"{self._source.name} is damaged; nothing in it can be decoded")

    def close(self) -> None:
        self._container.close()
        self._window.close()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)
