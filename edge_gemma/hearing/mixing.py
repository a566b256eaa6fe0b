"""Several channels → one.

In: frames ``[n, channels]``. Out: ``[n]``, the mean of the channels; where they cancel each other,
the loudest of them. It does not know files.
"""

from __future__ import annotations

import numpy as np

# Channels that have nothing in common leave 1/channels of their power in the mean. So much less
# than that is left only when they cancel: a microphone wired the wrong way round, or one side of a
# balanced line on each channel.
_CANCELLED = 0.1
_AS_LOUD = 0.25  # a channel within 6 dB of the loudest stays the one that is heard


class Mixer:
    """One sound's channels, block by block.

    >>> wave = np.sin(np.arange(1000.0, dtype=np.float32))
    >>> Mixer().mono(np.stack([wave, -wave], axis=1)).shape
    (1000,)
    """

    def __init__(self) -> None:
        self.chosen: int | None = None  # the channel heard last in place of the mean

    def mono(self, frames: np.ndarray) -> np.ndarray:
        """``frames [n, channels]`` float32 → ``[n]``."""
        mean = frames.mean(axis=1)
        if frames.shape[1] < 2 or len(frames) < 2:
            return mean
        powers = frames.var(axis=0, dtype=np.float64)  # without the mean: a constant is no sound
        enough = _CANCELLED * powers.mean() / len(powers)
        if not np.isfinite(enough) or mean.var(dtype=np.float64) >= enough:
            return mean
        loudest = int(powers.argmax())
        if self.chosen is None or powers[self.chosen] < _AS_LOUD * powers[loudest]:
            self.chosen = loudest
        return frames[:, self.chosen]

    @property
    def note(self) -> str | None:
        """What was done, where it was not the mean."""
        if self.chosen is None:
            return None
        return (
            "its channels cancel each other (opposite phases): channel "
            f"{self.chosen + 1} is heard in place of their mean"
        )
