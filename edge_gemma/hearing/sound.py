"""Sound files → blocks; any sampling rate → 16 kHz.

In: a path, a data URI or the bytes of a file. Out: blocks ``[n]`` float32 at 16 kHz mono, in order.
Any rate and number of channels is taken (mean of the channels, soxr for the rate). It does not
know devices, speech, features or models.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator

import numpy as np

from edge_gemma.errors import MediaError, MediaWarning, MissingExtra, UsageError
from edge_gemma.hearing.containers import Container, inspect
from edge_gemma.hearing.decoders import Decoder, Frames, SoundFile
from edge_gemma.hearing.mixing import Mixer
from edge_gemma.hearing.samples import MAX_CLIP_S, RATE_HZ, check_samples
from edge_gemma.sources import (
    BinarySource,
    FileSource,
    Wanted,
    data_uri_bytes,
    is_data_uri,
    local_file,
    read_all,
)
from edge_gemma.units import MiB

MAX_DATA_BYTES = 256 * MiB  # of a sound file in memory
_TYPES = ("audio/", "video/", "application/ogg")  # browsers record webm and mp4 as video/…
_MISSING_S = 0.1  # a file may end so much before its header says
# beyond it (115 days) the header's length is a placeholder of a program that
# streamed the file
_ABSURD_S = 1e7
_MAX_FLOAT_PEAK = 2.0**32  # larger than any integer scale: the samples are no sound
_SILENCE_DBFS = -120.0


class AudioFile:
    """A sound file (wav, flac, ogg, mp3, m4a, webm …), decoded as it is asked for: memory does not
    grow with its length.

    ``source`` is a path, a data URI, the bytes of a file or an open one. ``duration_s`` is what the
    header says, infinite when it does not; a truncated file has less, and ``truncated_at_s`` is set
    once its end was read. ``notes`` are sentences about what was done to hear it; some are known
    only then.

    Raises MediaError: missing, empty, not audio, without samples, NaN; MissingExtra.

    >>> with AudioFile("clip.wav") as file:
    ...     round(file.duration_s, 2), sum(len(block) for block in file.blocks())
    (0.5, 8000)
    """

    def __init__(self, source: FileSource):
        self._sound = _sound(source)
        self.name = self._sound.name
        self._decoder: Decoder = self._sound.decoder()
        self.rate_hz: int = self._decoder.rate_hz
        self.channels: int = self._decoder.channels
        claimed_s = self._decoder.claimed_s
        self.duration_s: float = math.inf if claimed_s is None else claimed_s
        self.truncated_at_s: float | None = None
        self._notes = list(self._sound.container.notes)
        self._mixer = Mixer()
        try:
            if not self.duration_s:
                raise self._no_samples()
            self._gain = self._float_gain() if self._decoder.is_float else None
        except BaseException:
            self.close()
            raise

    @property
    def notes(self) -> list[str]:
        """What somebody who listens to the file should know, as sentences."""
        found = [*self._notes, self._mixer.note]
        if self.truncated_at_s is not None:
            is_told = self.truncated_at_s < self.duration_s < _ABSURD_S
            promise = f"; its header promises {self.duration_s:.1f} s" if is_told else ""
            found.append(f"ends at {self.truncated_at_s:.1f} s{promise}. It is truncated")
        return [f"{self.name}: {text}" for text in found if text]

    def _float_gain(self) -> np.float32 | None:
        """What brings float samples into ±1, or None when they are. The file is read once for it.
        Raises MediaError for samples that are no numbers.
        """
        peak, n_read = 0.0, 0
        decoder = self._sound.decoder()
        try:
            for frames in decoder.frames():
                samples = np.abs(frames.samples)
                block_peak = float(samples.max(initial=0.0))  # NaN if any is NaN
                if not block_peak <= _MAX_FLOAT_PEAK:
                    raise self._no_sound(samples, n_read / frames.rate_hz, frames.rate_hz)
                peak = max(peak, block_peak)
                n_read += len(samples)
        finally:
            decoder.close()
        if peak <= 1:
            return None
        self._notes.append(f"its samples reach {peak:.4g}, beyond ±1; they were divided by that")
        return np.float32(1 / peak)

    def _no_sound(self, samples: np.ndarray, at_s: float, rate_hz: int) -> MediaError:
        """The error for ``samples [n, channels]``, magnitudes, that are NaN, infinite or huge."""
        frame, channel = np.argwhere(~(samples <= _MAX_FLOAT_PEAK))[0]
        value = samples[frame, channel]
        what = "NaN" if np.isnan(value) else "infinity" if np.isinf(value) else f"{value:.4g}"
        return MediaError(
            f"{self.name} holds {what} at {at_s + frame / rate_hz:.3f} s, channel {channel + 1}; "
            "expected samples in ±1. The recording or the program that wrote it is broken"
        )

    def _no_samples(self) -> MediaError:
        promise = ""
        if 0 < self.duration_s < _ABSURD_S:
            promise = f", though its header promises {self.duration_s:.1f} s"
        cut = "; it was cut before its sound" if self._sound.container.is_cut or promise else ""
        return MediaError(
            f"{self.name} holds no samples{promise}{cut}. There is nothing to hear in it"
        )

    def blocks(self) -> Iterator[np.ndarray]:
        """``[n]`` float32 at 16 kHz mono, n up to a few seconds. Raises MediaError
        where the data is damaged, or holds no samples at all.
        """
        read_s = 0.0
        for block, last_s in self._resampled():
            read_s = last_s
            if len(block):
                yield check_samples(block)
        if not read_s:
            raise self._no_samples()
        ends_early = read_s < self.duration_s - _MISSING_S and self.duration_s < _ABSURD_S
        if ends_early or self._decoder.is_cut or self._sound.container.is_cut:
            self.truncated_at_s = read_s

    def _resampled(self) -> Iterator[tuple[np.ndarray, float]]:
        """Blocks at 16 kHz, and the seconds of the file read up to them."""
        resampler, rate_hz, read_s = None, 0, 0.0
        waiting: np.ndarray | None = None  # the block before: only its successor says if it is last
        for frames in self._decoder.frames():
            if resampler is not None and waiting is not None:
                yield resampler.push(waiting, last=frames.rate_hz != rate_hz), read_s
            if resampler is None or frames.rate_hz != rate_hz:
                rate_hz = frames.rate_hz
                resampler = Resampler(rate_hz)
            waiting = self._mono(frames)
            read_s += len(waiting) / rate_hz
        if resampler is not None and waiting is not None:
            yield resampler.push(waiting, last=True), read_s

    def _mono(self, frames: Frames) -> np.ndarray:
        """One channel within ±1, ``[n]`` float32."""
        samples = frames.samples
        return self._mixer.mono(samples if self._gain is None else samples * self._gain)

    def close(self) -> None:
        self._decoder.close()

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _sound(source: FileSource) -> SoundFile:
    """What is decoded, by its name and container. Raises MediaError, UsageError."""
    if isinstance(source, str) and is_data_uri(source):
        source = data_uri_bytes(source, Wanted("sound", _TYPES, MAX_DATA_BYTES))
    if isinstance(source, BinarySource):
        source = read_all(source, MAX_DATA_BYTES, "sound")
    if isinstance(source, bytes | bytearray | memoryview):
        if not 1 <= len(source) <= MAX_DATA_BYTES:
            raise MediaError(f"sound data of {len(source)} bytes; expected 1 to {MAX_DATA_BYTES}")
        return _inspected("the sound", None, bytes(source))
    if not isinstance(source, str | os.PathLike):
        raise UsageError(
            "a sound is a path, a data URI, bytes, a binary file or samples; got "
            f"{type(source).__name__}"
        )
    path = local_file(source, "sound")
    return _inspected(str(path), str(path), b"")


def _inspected(name: str, path: str | None, data: bytes) -> SoundFile:
    with SoundFile(name, path, data, Container()).open() as file:
        return SoundFile(name, path, data, inspect(file))


def read_audio(source: FileSource, *, max_s: float = MAX_CLIP_S) -> np.ndarray:
    """A whole short file as ``[n]`` float32 at 16 kHz mono, n ≥ 1. What had to be done to hear it
    is a MediaWarning.

    Raises MediaError: not audio, no samples, or longer than ``max_s`` seconds.

    >>> read_audio("clip.wav").shape
    (8000,)
    """
    blocks, n = [], 0
    with AudioFile(source) as file:
        for block in file.blocks():
            n += len(block)
            if n > max_s * RATE_HZ:
                length = f" ({file.duration_s:.0f} s)" if file.duration_s < _ABSURD_S else ""
                raise MediaError(
                    f"{file.name} has more than {max_s:g} s{length}, the "
                    "model's limit for one clip; `edge-gemma transcribe` takes any length"
                )
            blocks.append(block)
        warn(file.notes)
    if not n:
        raise MediaError(f"{file.name} is too short: it has no sample at 16 kHz")
    return np.concatenate(blocks)


def warn(notes: list[str]) -> None:
    """Each note as a MediaWarning at the caller's caller."""
    for text in notes:
        warnings.warn(text, MediaWarning, stacklevel=3)


class Resampler:
    """Any rate → another, 16 kHz unless said, as a stream (soxr, HQ). Raises MissingExtra.

    >>> Resampler(48000).push(np.zeros(4800, np.float32), last=True).shape
    (1600,)
    """

    def __init__(self, rate_hz: int, to_hz: int = RATE_HZ):
        self._stream = None
        if rate_hz != to_hz:
            try:
                import soxr
            except ImportError:
                raise MissingExtra(f"Resampling {rate_hz} Hz to {to_hz} Hz", "hear") from None
            self._stream = soxr.ResampleStream(rate_hz, to_hz, 1, dtype="float32")

    def push(self, samples: np.ndarray, last: bool = False) -> np.ndarray:
        """``samples [n]`` at the first rate → those ``[m]`` at the second that are
        ready; with ``last`` the rest too.
        """
        samples = np.ascontiguousarray(samples, np.float32)
        if self._stream is None:
            return samples
        return self._stream.resample_chunk(samples, last=last)


def level_dbfs(samples: np.ndarray) -> tuple[float, float]:
    """(RMS, peak) in dB below full scale, −120 for silence.

    >>> level_dbfs(np.full(100, 0.5, np.float32))
    (-6.0, -6.0)
    """
    if not len(samples):
        return _SILENCE_DBFS, _SILENCE_DBFS
    power = np.mean(np.square(samples, dtype=np.float64))
    return _dbfs(math.sqrt(power)), _dbfs(float(np.abs(samples).max()))


def _dbfs(amplitude: float) -> float:
    floor = 10 ** (_SILENCE_DBFS / 20)
    return round(20 * math.log10(max(amplitude, floor)), 1)
