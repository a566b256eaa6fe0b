"""The sounds that say "I listen" and "I sleep", and the one that rings.

Out: samples ``[n]`` float32 at 16 kHz. Pure tones: no detector takes them for speech.
"""

from __future__ import annotations

import numpy as np

RATE_HZ = 16000
_EDGE_S = 0.01  # so that nothing clicks
_LOUD = 0.3


def beep(hz: float, seconds: float) -> np.ndarray:
    t = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    edges = np.minimum(1, np.minimum(t, t[::-1]) / _EDGE_S)
    return (_LOUD * np.sin(2 * np.pi * hz * t) * edges).astype(np.float32)


def pause(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE_HZ), np.float32)


def ringing_tone() -> np.ndarray:
    """Three short beeps, 1.2 s."""
    return np.concatenate([beep(880, 0.25), pause(0.15)] * 3)


def wake_tone() -> np.ndarray:
    """Rises: 0.14 s."""
    return np.concatenate([beep(660, 0.07), beep(990, 0.07)])


def sleep_tone() -> np.ndarray:
    """Falls: 0.14 s."""
    return np.concatenate([beep(660, 0.07), beep(440, 0.07)])
