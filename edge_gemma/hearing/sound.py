"""Sound in and out: files, microphone, loudspeaker.

The only room that imports sounddevice; its errors become ours here.

In: a path or a device. Out: blocks ``[n]`` float32 at 16 kHz mono, in order; a file is a microphone
that never waits. Any rate and number of channels is taken (mean of the channels, soxr for the
rate). It does not know speech, features or models.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_gemma.errors import MediaError, MissingExtra
from edge_gemma.hearing.samples import RATE_HZ, check_samples

_MAX_CHANNELS = 256
_FILE_BLOCK = 1 << 16  # frames of a file read at a time


class AudioFile:
    """A sound file (wav, flac, ogg, mp3 … whatever libsndfile reads), decoded as it is asked for:
    memory does not grow with its length.

    Raises MediaError: missing, empty, not audio.

    >>> with AudioFile("clip.wav") as file:
    ...     round(file.duration_s, 2), sum(len(block) for block in file.blocks())
    (0.5, 8000)
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            import soundfile
        except ImportError:
            raise MissingExtra("Reading sound files", "hear") from None
        except OSError as error:
            raise MediaError(
                f"libsndfile cannot be loaded ({error}); on Debian type: sudo apt-get "
                "install libsndfile1"
            ) from None
        if not self.path.is_file():
            raise MediaError(f"no sound file at {self.path}")
        if self.path.stat().st_size == 0:
            raise MediaError(f"{self.path} is empty (0 bytes)")
        try:
            self._file = soundfile.SoundFile(self.path)
        except soundfile.SoundFileError as error:
            raise MediaError(
                f"{self.path} is not a sound file that can be read ({_first_line(error)}); "
                "wav, flac, ogg and mp3 can. "
                f"Others convert with: ffmpeg -i {self.path.name} -ar 16000 -ac 1 out.wav"
            ) from None
        self.rate_hz, self.channels = self._file.samplerate, self._file.channels
        if not 1000 <= self.rate_hz <= 768_000 or not 1 <= self.channels <= _MAX_CHANNELS:
            self._file.close()
            raise MediaError(
                f"{self.path} claims {self.rate_hz} Hz and {self.channels} channels; "
                f"expected 1000 … 768000 Hz and 1 … {_MAX_CHANNELS}"
            )
        self.duration_s = (
            max(0, self._file.frames) / self.rate_hz
        )  # as the header says; a truncated file has less
        self.truncated_at_s: float | None = (
            None  # set when the data ends before the header's length
        )

    def blocks(self) -> Iterator[np.ndarray]:
        """``[n]`` float32 at 16 kHz mono, n up to a few seconds. Raises MediaError where the data
        is damaged.
        """
        import soundfile

        resample, read = Resampler(self.rate_hz), 0
        while True:
            try:
                frames = self._file.read(
                    _FILE_BLOCK, dtype="float32", always_2d=True
                )  # [n, channels]
            except soundfile.SoundFileError as error:
                raise MediaError(
                    f"{self.path} is damaged after {read / self.rate_hz:.1f} s "
                    f"({_first_line(error)})"
                ) from None
            read += len(frames)
            block = resample.push(frames.mean(axis=1), last=len(frames) < _FILE_BLOCK)
            if len(block):
                yield check_samples(block)
            if len(frames) < _FILE_BLOCK:
                break
        if read / self.rate_hz < self.duration_s - 0.1 and self.duration_s < 1e7:
            self.truncated_at_s = read / self.rate_hz

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_audio(path: str | os.PathLike, *, max_s: float = 30.0) -> np.ndarray:
    """A whole short file as ``[n]`` float32 at 16 kHz mono.

    Raises MediaError: not audio, or longer than ``max_s`` seconds.

    >>> read_audio("clip.wav").shape
    (8000,)
    """
    blocks, n = [], 0
    with AudioFile(path) as file:
        for block in file.blocks():
            n += len(block)
            if n > max_s * RATE_HZ:
                raise MediaError(
                    f"{path} has more than {max_s:g} s ({file.duration_s:.0f} s), the "
                    "model's limit for one clip; `edge-gemma transcribe` takes any length"
                )
            blocks.append(block)
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


class Resampler:
    """Any rate → 16 kHz, as a stream (soxr, HQ).

    >>> Resampler(48000).push(np.zeros(4800, np.float32), last=True).shape
    (1600,)
    """

    def __init__(self, rate_hz: int):
        self._stream = None
        if rate_hz != RATE_HZ:
            try:
                import soxr
            except ImportError:
                raise MissingExtra(f"Resampling {rate_hz} Hz to {RATE_HZ} Hz", "hear") from None
            self._stream = soxr.ResampleStream(rate_hz, RATE_HZ, 1, dtype="float32")

    def push(self, samples: np.ndarray, last: bool = False) -> np.ndarray:
        samples = np.ascontiguousarray(samples, np.float32)
        return samples if self._stream is None else self._stream.resample_chunk(samples, last=last)


def level_dbfs(samples: np.ndarray) -> tuple[float, float]:
    """(rms, peak) in dB below full scale, −120 for silence.

    >>> level_dbfs(np.full(100, 0.5, np.float32))
    (-6.0, -6.0)
    """
    if not len(samples):
        return -120.0, -120.0
    rms, peak = (
        float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))),
        float(np.abs(samples).max()),
    )
    return tuple(round(20 * math.log10(max(value, 1e-6)), 1) for value in (rms, peak))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
