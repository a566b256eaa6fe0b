"""What a block of samples is everywhere in this package: 16 kHz mono float32, finite, within ±1."""

from __future__ import annotations

import math

import numpy as np

from edge_gemma.errors import MediaError

RATE_HZ = 16_000
# what a microphone delivers at a time, and what speech detection looks at (silero takes no other)
BLOCK_SAMPLES = 512  # 32 ms
MAX_CLIP_S = 30
MAX_CLIP_SAMPLES = MAX_CLIP_S * RATE_HZ  # 480000
# resamplers and decoders overshoot 1 a little; beyond this the samples are integers by mistake
_LOUDEST = 16.0


def check_samples(samples: np.ndarray) -> np.ndarray:
    """``samples [n]`` as contiguous float32, or MediaError: more than one dimension, integers, NaN,
    or far outside [−1, 1].

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
    if len(samples):
        peak = float(np.abs(samples).max())  # NaN if any is NaN
        if not math.isfinite(peak):
            raise MediaError("samples hold NaN or infinity; the recording or its decoder is broken")
        if peak > _LOUDEST:
            raise MediaError(
                f"samples reach {peak:.6g}; expected [-1, 1] (divide 16-bit integers by 32768)"
            )
    return samples
