"""What measured systems are given to hear and to see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edge_gemma.hearing.samples import RATE_HZ
from edge_gemma.hearing.utterances import SpeechDetector

PACKET = 512  # samples: what a microphone hands over at once
LOUD = 0.05  # a hum reaches 0.1
STEP_S = 0.48  # sound that the audio encoder takes at once


def sound(seconds: float) -> np.ndarray:
    """A hum with noise, at 16 kHz. # [n] float32"""
    t = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    noise = np.random.default_rng(0).standard_normal(len(t))
    return (0.1 * np.sin(2 * np.pi * 220 * t) + 0.02 * noise).astype(np.float32)


def picture(side: int) -> np.ndarray:
    """Gradients, waves and noise. # [side, side, 3] uint8"""
    y, x = np.mgrid[0:side, 0:side]
    waves = 127 + 127 * np.sin((x + y) / 37)
    smooth = np.stack([255 * x / side, 255 * y / side, waves], -1)
    values = smooth + np.random.default_rng(5).normal(0, 8, (side, side, 3))
    return values.clip(0, 255).astype(np.uint8)


def normalized(pixels: np.ndarray, tower: str) -> np.ndarray:
    """As the graphs take them: SigLIP −1 … 1, MobileNetV5 0 … 1. # [1, 3, side, side] float32"""
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32)
    mean, std = (0.5, 0.5) if tower.startswith("siglip") else (0.0, 1.0)
    scaled: np.ndarray = (planes / np.float32(255) - np.float32(mean)) / np.float32(std)
    return scaled


def packets(clips: Sequence[str]) -> Iterator[np.ndarray]:
    """The clips at 16 kHz, a second of silence behind each; two hums where there are none.
    # [PACKET] float32
    """
    from edge_gemma.hearing.sound import read_audio

    silence = np.zeros(RATE_HZ, np.float32)
    heard = (read_audio(Path(clip)) for clip in clips) if clips else iter([sound(2), sound(3)])
    for clip in heard:
        samples = np.concatenate([clip, silence])
        for at in range(0, len(samples), PACKET):
            yield samples[at : at + PACKET]


def detector(clips: Sequence[str]) -> SpeechDetector:
    """Speech detection for :func:`packets`: silero for speech, loudness for hums."""
    if clips:
        return SpeechDetector()
    return SpeechDetector(probability=lambda block: float(np.abs(block).max() > LOUD))
