"""A room as numbers: a loudspeaker and a microphone joined by a delay and a room response, and
people who speak in it. Deterministic; everything at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from edge_gemma.conversation.voice import espeak
from edge_gemma.hearing.sound import Resampler

RATE_HZ = 16000
BLOCK = 512
PASSAGE = (
    "The harbour wakes before the town does. Nets are carried down the steps, the ice is "
    "broken with short spades, and the first boats leave while the lamps along the quay are "
    "still lit. By seven the fish market is loud: crates are weighed, prices are shouted and "
    "written on slates, and two cats wait under the same table as every morning. The ferry comes "
    "at eight with schoolchildren, a post bag and the newspapers from the mainland."
)


@cache
def said(text: str, voice: str = "en") -> np.ndarray:
    """espeak-ng's speech from its first sound on, peak 0.5."""
    samples, rate_hz = espeak(voice)(text)
    samples = Resampler(rate_hz).push(samples, last=True)
    loud = np.abs(samples) > 0.03 * np.abs(samples).max()
    samples = samples[np.argmax(loud) : len(samples) - np.argmax(loud[::-1])]
    return samples * np.float32(0.5 / np.abs(samples).max())


def own_speech(seconds: float, voice: str = "en") -> np.ndarray:
    """The assistant reads, over and over."""
    return np.resize(said(PASSAGE, voice), int(seconds * RATE_HZ)).astype(np.float32)


@dataclass(frozen=True)
class Room:
    """``delay_s`` from loudspeaker to microphone; a decay of 60 dB in ``rt60_s`` behind the direct
    sound, as loud as it (direct-to-reverberant ratio 0 dB); the echo is ``gain_db`` of what is
    played; noise at ``noise_dbfs``.
    """

    delay_s: float
    gain_db: float = -6.0
    rt60_s: float = 0.3
    noise_dbfs: float = -60.0
    seed: int = 0

    def response(self) -> np.ndarray:
        n = int(self.rt60_s * RATE_HZ)
        tail = np.random.default_rng(self.seed).standard_normal(n)
        tail *= 10 ** (-3 * np.arange(n) / n)  # −60 dB at its end
        tail[: RATE_HZ // 400] = 0  # 2.5 ms without a wall near
        tail *= 1 / np.sqrt(np.sum(np.square(tail)))
        tail[0] = 1
        tail *= 10 ** (self.gain_db / 20) / np.sqrt(2)
        return np.concatenate([np.zeros(int(self.delay_s * RATE_HZ)), tail]).astype(np.float32)

    def echo(self, played: np.ndarray) -> np.ndarray:
        response = self.response()
        size = 1 << (len(played) + len(response)).bit_length()
        spectrum = np.fft.rfft(played, size) * np.fft.rfft(response, size)
        return np.fft.irfft(spectrum, size)[: len(played)].astype(np.float32)

    def noise(self, n: int) -> np.ndarray:
        noise = np.random.default_rng(self.seed + 1).standard_normal(n)
        return (noise * 10 ** (self.noise_dbfs / 20)).astype(np.float32)

    def live(
        self, played: np.ndarray, user: np.ndarray, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(played, heard) block by block; nothing is played any more once ``stopped()``."""
        response, noise = self.response(), self.noise(len(played))
        heard = user + noise
        for at in range(0, len(played) - BLOCK + 1, BLOCK):
            block = np.zeros(BLOCK, np.float32) if stopped() else played[at : at + BLOCK]
            if block.any():
                size = 1 << (BLOCK + len(response)).bit_length()
                spectrum = np.fft.rfft(block, size) * np.fft.rfft(response, size)
                echo = np.fft.irfft(spectrum, size)[: BLOCK + len(response) - 1]
                until = min(len(heard), at + len(echo))
                heard[at:until] += echo[: until - at].astype(np.float32)
            yield block, heard[at : at + BLOCK]


def as_loud_as(samples: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``samples`` at the power that ``other`` has."""
    return samples * np.sqrt(np.mean(np.square(other)) / np.mean(np.square(samples)))


def placed(samples: np.ndarray, at_s: float, n: int) -> np.ndarray:
    """``samples`` alone in ``n`` of silence."""
    out = np.zeros(n, np.float32)
    start = int(at_s * RATE_HZ)
    out[start : start + len(samples)] = samples[: n - start]
    return out
