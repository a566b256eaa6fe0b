"""PCM → log-mel, as a stream.

Bit-identical to transformers' ``Gemma3nAudioFeatureExtractor`` for one clip,
however it is cut.

In: 16 kHz mono float32 in [−1, 1], in packets of any size. Out: mel rows
``[k, 128]`` float32, one per 10 ms. It does not know microphones, files or the encoder.
Source: transformers 5.23 ``feature_extraction_gemma3n.py``.
"""

from __future__ import annotations

import math

import numpy as np

from edge_gemma.errors import MediaError
from edge_gemma.hearing.samples import (
    MAX_CLIP_S,
    MAX_CLIP_SAMPLES,
    RATE_HZ,
    check_samples,
)

N_MELS = 128
FRAME_SAMPLES = 512  # what one row is computed from: 32 ms
HOP_SAMPLES = 160  # from one row to the next: 10 ms
_N_FFT = 1024
_N_BINS = _N_FFT // 2 + 1  # 513
_LOWEST_HZ, _HIGHEST_HZ = 125.0, 7600.0
_PRE_EMPHASIS = 0.97
_FLOOR = 1e-5
_PAD_SAMPLES = 128  # the clip's end is zero-padded to a multiple of this
# rows computed at a time: one fixed shape, because the rounding of a matrix product
# may depend on its shape
_GROUP = 4


def _mel(hz: float) -> float:
    return 2595.0 * math.log10(1.0 + hz / 700.0)  # HTK's formula


def _mel_filters() -> np.ndarray:
    """[513, 128] float64: HTK-mel triangles over 125 … 7600 Hz, without area normalisation."""
    bins_hz = np.arange(_N_BINS, dtype=np.float32) * (RATE_HZ / _N_FFT)
    points = np.linspace(_mel(_LOWEST_HZ), _mel(_HIGHEST_HZ), N_MELS + 2)
    points_hz = 700.0 * (10.0 ** (points / 2595.0) - 1.0)
    width = np.diff(points_hz)
    distance = points_hz[None, :] - bins_hz[:, None]  # [513, 130]
    rising = -distance[:, :-2] / width[:-1]
    falling = distance[:, 2:] / width[1:]
    return np.maximum(0.0, np.minimum(rising, falling))


def _periodic_hann() -> np.ndarray:
    """[512] float32."""
    n = np.arange(FRAME_SAMPLES, dtype=np.float32)
    window = 0.5 * (1 - np.cos(2 * np.pi * n / FRAME_SAMPLES))
    return window.astype(np.float32)


_WINDOW = _periodic_hann()
_FILTERS = _mel_filters()


def _log_mel(frames: np.ndarray) -> np.ndarray:
    """``frames [4, 512]`` float32 raw samples → ``[4, 128]`` float32."""
    x = np.empty_like(frames)
    x[:, 0] = frames[:, 0] * np.float32(1.0 - _PRE_EMPHASIS)
    x[:, 1:] = frames[:, 1:] - np.float32(_PRE_EMPHASIS) * frames[:, :-1]
    magnitude = np.abs(np.fft.rfft(x * _WINDOW, n=_N_FFT, axis=-1))
    return np.log(np.maximum(magnitude @ _FILTERS, _FLOOR)).astype(np.float32)


class LogMel:
    """One clip's features.

    Row k is made of samples 160k … 160k+511, once sample 160k+512 is there.

    >>> mel = LogMel()
    >>> mel.push(np.zeros(800, np.float32)).shape
    (0, 128)
    >>> mel.finish().shape  # 800 samples, padded to 896
    (3, 128)
    """

    def __init__(self) -> None:
        self.n_samples = 0  # received
        self.n_rows = 0  # given out
        self._pending = np.zeros(0, np.float32)  # samples from 160·n_rows on
        self._finished = False

    def push(self, samples: np.ndarray) -> np.ndarray:
        """``samples [n]`` → the rows ``[k, 128]`` they complete, in groups of 4.
        Raises MediaError beyond 30 s or for broken samples.
        """
        assert not self._finished, "push after finish"
        samples = check_samples(samples)
        n_samples = self.n_samples + len(samples)
        if n_samples > MAX_CLIP_SAMPLES:
            raise MediaError(
                f"the clip has more than {MAX_CLIP_S} s "
                f"({n_samples / RATE_HZ:.1f} s), the model's limit; "
                "cut it at pauses (`edge-gemma transcribe` and listening sessions do)"
            )
        self.n_samples = n_samples
        self._append(samples)
        whole_groups = self._n_ready() // _GROUP
        return self._rows(whole_groups * _GROUP)

    def finish(self) -> np.ndarray:
        """The rows ``[k, 128]`` that remain at the clip's end, zero-padded to a
        multiple of 128 samples. A clip of ≤ 512 samples has none.
        """
        assert not self._finished, "finish twice"
        self._finished = True
        self._append(np.zeros(-self.n_samples % _PAD_SAMPLES, np.float32))
        n = self._n_ready()
        # fills the last group, whose extra rows are dropped
        self._append(np.zeros(_GROUP * HOP_SAMPLES + FRAME_SAMPLES, np.float32))
        return self._rows(n)

    def _append(self, samples: np.ndarray) -> None:
        self._pending = np.concatenate([self._pending, samples])

    def _n_ready(self) -> int:
        """Rows whose samples are there, the one behind the frame included."""
        beyond_first = len(self._pending) - (FRAME_SAMPLES + 1)
        return max(0, beyond_first // HOP_SAMPLES + 1)

    def _rows(self, n: int) -> np.ndarray:
        """The next ``n`` rows ``[n, 128]``, computed in whole groups."""
        n_groups = -(-n // _GROUP)
        out = np.empty((n_groups * _GROUP, N_MELS), np.float32)
        for first in range(0, len(out), _GROUP):
            start = first * HOP_SAMPLES
            stop = start + (_GROUP - 1) * HOP_SAMPLES + FRAME_SAMPLES
            windows = np.lib.stride_tricks.sliding_window_view(
                self._pending[start:stop], FRAME_SAMPLES
            )
            out[first : first + _GROUP] = _log_mel(windows[::HOP_SAMPLES])
        if n:
            self._pending = self._pending[n * HOP_SAMPLES :].copy()
        self.n_rows += n
        return out[:n]


def log_mel(samples: np.ndarray) -> np.ndarray:
    """A whole clip ``[n]`` → ``[(n_padded − 513) // 160 + 1, 128]`` float32.

    >>> log_mel(np.zeros(16000, np.float32)).shape
    (97, 128)
    """
    mel = LogMel()
    return np.concatenate([mel.push(samples), mel.finish()])
