"""What a block of samples is everywhere in this package: 16 kHz mono float32,
finite, within ±1; and what gives such blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol, Self

import numpy as np

from edge_gemma.errors import MediaError

RATE_HZ = 16_000
# what a microphone delivers at a time, and what speech detection looks at (silero
# takes no other)
BLOCK_SAMPLES = 512  # 32 ms
MAX_CLIP_S = 30
MAX_CLIP_SAMPLES = MAX_CLIP_S * RATE_HZ  # 480000
# resamplers and decoders overshoot 1 a little; beyond this the samples are integers
# by mistake
_MAX_PEAK = 16.0


class SoundSource(Protocol):
    """What gives sound in blocks: a file, a microphone. A context manager, which
    closes it.
    """

    def blocks(self) -> Iterator[np.ndarray]:
        """Blocks ``[n]`` float32 at 16 kHz mono, in order, any n. Raises MediaError."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class LiveSource(SoundSource, Protocol):
    """A :class:`SoundSource` that does not wait for its reader and may go away: a microphone."""

    name: str  # of the device that was opened
    dropped_blocks: int  # lost so far, because read came too late

    def read(self, timeout_s: float = 1.0) -> np.ndarray:
        """The next samples ``[n]`` float32 at 16 kHz mono, or none (n = 0) after
        ``timeout_s``.

        Raises DeviceLost when the device went away; it is closed then.
        """
        ...

    def reopen(self) -> None:
        """Open the device again after DeviceLost. Raises DeviceLost while it is away."""
        ...


def check_samples(samples: np.ndarray) -> np.ndarray:
    """``samples [n]`` as contiguous float32, or MediaError: more than one
    dimension, integers, NaN, or far outside [−1, 1].

    >>> check_samples(np.zeros(3)).dtype
    dtype('float32')
    """
    samples = np.asarray(samples)
    if samples.ndim != 1:
        raise MediaError(
            f"samples have shape {samples.shape}; expected one channel, [n] (mix channels by "
            "their mean)"
        )
    if samples.dtype.kind != "f":
        raise MediaError(
            f"samples have type {samples.dtype}; expected float32 in [-1, 1] (divide 16-bit "
            "integers by 32768)"
        )
    samples = np.ascontiguousarray(samples, np.float32)
    if len(samples) == 0:
        return samples
    peak = float(np.abs(samples).max())  # NaN if any is NaN
    if not math.isfinite(peak):
        raise MediaError("samples hold NaN or infinity; the recording or its decoder is broken")
    if peak > _MAX_PEAK:
        raise MediaError(
            f"samples reach {peak:.6g}; expected [-1, 1] (divide 16-bit integers by 32768)"
        )
    return samples
