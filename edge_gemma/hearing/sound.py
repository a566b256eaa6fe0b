"""Sound files → blocks; any sampling rate → 16 kHz.

In: a path. Out: blocks ``[n]`` float32 at 16 kHz mono, in order. Any rate and
number of channels is taken (mean of the channels, soxr for the rate). It does not
know devices, speech, features or models.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_gemma.errors import MediaError, MissingExtra, first_line
from edge_gemma.hearing.samples import MAX_CLIP_S, RATE_HZ, check_samples

_MIN_RATE_HZ, _MAX_RATE_HZ = 1000, 768_000
_MAX_CHANNELS = 256
_FILE_BLOCK = 1 << 16  # frames of a file read at a time
_MISSING_S = 0.1  # a file may end so much before its header says
# beyond it (115 days) the header's length is a placeholder of a program that
# streamed the file
_ABSURD_S = 1e7
_SILENCE_DBFS = -120.0


class AudioFile:
    """A sound file (wav, flac, ogg, mp3 … whatever libsndfile reads), decoded as it
    is asked for: memory does not grow with its length.

    ``duration_s`` is what the header says; a truncated file has less, and
    ``truncated_at_s`` is set once its end was read.

    Raises MediaError: missing, empty, not audio; MissingExtra.

    >>> with AudioFile("clip.wav") as file:
    ...     round(file.duration_s, 2), sum(len(block) for block in file.blocks())
    (0.5, 8000)
    """

    def __init__(self, path: str | os.PathLike[str]):
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
                f"{self.path} is not a sound file that can be read ({first_line(error)}); "
                "wav, flac, ogg and mp3 can. "
                f"Others convert with: ffmpeg -i {self.path.name} -ar 16000 -ac 1 out.wav"
            ) from None
        self.rate_hz: int = self._file.samplerate
        self.channels: int = self._file.channels
        self._check_format()
        self.duration_s: float = max(0, self._file.frames) / self.rate_hz
        self.truncated_at_s: float | None = None

    def _check_format(self) -> None:
        rate_fits = _MIN_RATE_HZ <= self.rate_hz <= _MAX_RATE_HZ
        if rate_fits and 1 <= self.channels <= _MAX_CHANNELS:
            return
        self._file.close()
        raise MediaError(
            f"{self.path} claims {self.rate_hz} Hz and {self.channels} channels; "
            f"expected {_MIN_RATE_HZ} … {_MAX_RATE_HZ} Hz and 1 … {_MAX_CHANNELS}"
        )

    def blocks(self) -> Iterator[np.ndarray]:
        """``[n]`` float32 at 16 kHz mono, n up to a few seconds. Raises MediaError
        where the data is damaged.
        """
        resample, n_read, last = Resampler(self.rate_hz), 0, False
        while not last:
            frames = self._read(at_s=n_read / self.rate_hz)
            n_read += len(frames)
            last = len(frames) < _FILE_BLOCK
            block = resample.push(frames.mean(axis=1), last=last)
            if len(block):
                yield check_samples(block)
        read_s = n_read / self.rate_hz
        if read_s < self.duration_s - _MISSING_S and self.duration_s < _ABSURD_S:
            self.truncated_at_s = read_s

    def _read(self, at_s: float) -> np.ndarray:
        """The next frames ``[n, channels]`` float32."""
        import soundfile

        try:
            return self._file.read(_FILE_BLOCK, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise MediaError(
                f"{self.path} is damaged after {at_s:.1f} s ({first_line(error)})"
            ) from None

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> AudioFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_audio(path: str | os.PathLike[str], *, max_s: float = MAX_CLIP_S) -> np.ndarray:
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
    """Any rate → 16 kHz, as a stream (soxr, HQ). Raises MissingExtra.

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
        """``samples [n]`` at the given rate → those ``[m]`` at 16 kHz that are
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
