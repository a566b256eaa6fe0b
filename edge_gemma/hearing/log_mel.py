"""PCM → log-mel, as a stream.

Bit-identical to transformers' ``Gemma3nAudioFeatureExtractor`` for one clip, however it is cut.

In: 16 kHz mono float32 in [−1, 1], in packets of any size. Out: mel rows ``[k, 128]`` float32, one
per 10 ms. It does not know microphones, files or the encoder. Source: transformers 5.23
``feature_extraction_gemma3n.py``.
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
FRAME = 512  # samples, 32 ms
HOP = 160  # samples, 10 ms
_N_FFT = 1024
_PRE_EMPHASIS = 0.97
_FLOOR = 1e-5
_PAD = 128  # the clip's end is zero-padded to a multiple of this
# rows computed at a time: one fixed shape, because a matrix product's rounding may depend on its
# shape
_GROUP = 4


def _mel_filters() -> np.ndarray:
    """[513, 128] float64: HTK-mel triangles over 125 … 7600 Hz, without area normalisation."""
    frequency_hz = np.arange(_N_FFT // 2 + 1, dtype=np.float32) * (RATE_HZ / _N_FFT)
    low, high = (2595.0 * math.log10(1.0 + hz / 700.0) for hz in (125.0, 7600.0))
    points_hz = 700.0 * (10.0 ** (np.linspace(low, high, N_MELS + 2) / 2595.0) - 1.0)
    width, distance = np.diff(points_hz), points_hz[None, :] - frequency_hz[:, None]
    return np.maximum(0.0, np.minimum(-distance[:, :-2] / width[:-1], distance[:, 2:] / width[1:]))


_WINDOW = (0.5 * (1 - np.cos(2 * np.pi * np.arange(FRAME, dtype=np.float32) / FRAME))).astype(
    np.float32
)  # periodic Hann
_FILTERS = _mel_filters()


def _log_mel(frames: np.ndarray) -> np.ndarray:
    """frames [4, 512] float32 raw samples → [4, 128] float32."""
    x = np.empty_like(frames)
    x[:, 0] = frames[:, 0] * np.float32(1.0 - _PRE_EMPHASIS)
    x[:, 1:] = frames[:, 1:] - np.float32(_PRE_EMPHASIS) * frames[:, :-1]
    magnitude = np.abs(np.fft.rfft(x * _WINDOW, n=_N_FFT, axis=-1))
    return np.log(np.maximum(magnitude @ _FILTERS, _FLOOR)).astype(np.float32)


class LogMel:
    """One clip's features.

    Frame k is made of samples 160k … 160k+511, once sample 160k+512 is there.

    >>> mel = LogMel()
    >>> mel.push(np.zeros(800, np.float32)).shape, mel.finish().shape   # 800 samples, padded to 896: 3 frames
    ((0, 128), (3, 128))
    """

    def __init__(self):
        self.n_samples = 0  # received
        self.n_rows = 0  # given out
        self._pending = np.zeros(0, np.float32)  # samples from 160·n_rows on
        self._finished = False

    def push(self, samples: np.ndarray) -> np.ndarray:
        """``samples [n]`` → the rows ``[k, 128]`` they complete, in groups of 4. Raises MediaError
        beyond 30 s or for broken samples.
        """
        assert not self._finished, "push after finish"
        samples = check_samples(samples)
        if self.n_samples + len(samples) > MAX_CLIP_SAMPLES:
            raise MediaError(
                f"the clip has more than {MAX_CLIP_S} s "
                f"({(self.n_samples + len(samples)) / RATE_HZ:.1f} s), the model's limit; "
                "cut it at pauses (`edge-gemma transcribe` and listening sessions do)"
            )
        self.n_samples += len(samples)
        self._pending = np.concatenate([self._pending, samples])
        return self._rows(self._n_ready() // _GROUP * _GROUP)

    def finish(self) -> np.ndarray:
        """The rows ``[k, 128]`` that remain at the clip's end, zero-padded to a multiple of 128
        samples. A clip of ≤ 512 samples has none.
        """
        assert not self._finished, "finish twice"
        self._finished = True
        self._pending = np.concatenate(
            [self._pending, np.zeros(-self.n_samples % _PAD, np.float32)]
        )
        n = self._n_ready()
        self._pending = np.concatenate(
            [self._pending, np.zeros(_GROUP * HOP + FRAME, np.float32)]
        )  # fills the last group, whose extra rows are dropped
        return self._rows(n)

    def _n_ready(self) -> int:
        return max(0, (len(self._pending) - (FRAME + 1)) // HOP + 1)

    def _rows(self, n: int) -> np.ndarray:
        out = np.empty((-(-n // _GROUP) * _GROUP, N_MELS), np.float32)
        for k in range(0, len(out), _GROUP):
            frames = np.lib.stride_tricks.sliding_window_view(
                self._pending[k * HOP : (k + _GROUP - 1) * HOP + FRAME], FRAME
            )[::HOP]
            out[k : k + _GROUP] = _log_mel(frames)
        self._pending = self._pending[n * HOP :].copy() if n else self._pending
        self.n_rows += n
        return out[:n]


def log_mel(samples: np.ndarray) -> np.ndarray:
    """A whole clip ``[n]`` → ``[(n_padded − 513) // 160 + 1, 128]`` float32.

    >>> log_mel(np.zeros(16000, np.float32)).shape
    (97, 128)
    """
    mel = LogMel()
    return np.concatenate([mel.push(samples), mel.finish()])
