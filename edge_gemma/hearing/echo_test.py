"""What a microphone hears of a loudspeaker, and how much of it the canceller leaves: played and
measured.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from edge_gemma.errors import DeviceLost
from edge_gemma.hearing.devices import Microphone, Speaker
from edge_gemma.hearing.echo import EchoCanceller, State
from edge_gemma.hearing.samples import RATE_HZ
from edge_gemma.hearing.sound import level_dbfs
from edge_gemma.hearing.utterances import SpeechDetector

_QUIET_S = 1.0  # listened before anything is played
_LEARNING_S = 4.5  # of sound, before what is left is counted


@dataclass(frozen=True)
class EchoTest:
    """``left_db`` is the power left against the echo's, None where it was not learned;
    ``barge_ins`` counts utterances that were heard in the ``seconds`` behind the learning, though
    nobody spoke.
    """

    microphone: str
    loudspeaker: str
    noise_dbfs: float
    echo_dbfs: float
    state: State
    delay_s: float | None
    left_db: float | None
    barge_ins: int
    seconds: float


def echo_test(
    microphone: str | int | None = None,
    loudspeaker: str | int | None = None,
    speech: np.ndarray | None = None,
    seconds: float = 10.0,
) -> EchoTest:
    """Play ``seconds`` of ``speech [n]`` (16 kHz), over and over, while listening; without it noise
    shaped like speech, which a canceller takes out less well than a voice. Raises DeviceLost,
    UsageError, MediaError, MissingExtra.
    """
    canceller, detector = EchoCanceller(), SpeechDetector()
    sound = speech_like(seconds) if speech is None else speech
    sound = np.resize(sound, int(seconds * RATE_HZ)).astype(np.float32)
    n_begin, n_end = (int((_QUIET_S + s) * RATE_HZ) for s in (_LEARNING_S, seconds))
    heard: list[np.ndarray] = []
    n, barge_ins = 0, 0
    with Speaker(loudspeaker, canceller.played) as speaker, Microphone(microphone) as ears:
        player: threading.Thread | None = None
        try:
            while n < n_end:
                block = ears.read()
                n += len(block)
                heard.append(block)
                events = detector.push(canceller.clean(block))
                if n > n_begin:
                    barge_ins += sum(event.kind == "start" for event in events)
                if player is None and n >= _QUIET_S * RATE_HZ:
                    player = threading.Thread(target=_play, args=(speaker, sound), daemon=True)
                    player.start()
        finally:
            speaker.stop()
            if player is not None:
                player.join()
        names = ears.name, speaker.name
    total = np.concatenate(heard)
    quiet, loud = total[: int(_QUIET_S * RATE_HZ)], total[n_begin:n_end]
    return EchoTest(
        *names,
        noise_dbfs=level_dbfs(quiet)[0],
        echo_dbfs=level_dbfs(loud)[0],
        state=canceller.state,
        delay_s=canceller.delay_s,
        left_db=canceller.echo_left_db,
        barge_ins=barge_ins,
        seconds=seconds - _LEARNING_S,
    )


def _play(speaker: Speaker, samples: np.ndarray) -> None:
    try:
        speaker.play(samples, RATE_HZ)
    except DeviceLost:  # the microphone's reader sees the same, or hears no echo
        pass


def speech_like(seconds: float, seed: int = 0) -> np.ndarray:
    """``[n]`` float32 at 16 kHz, peak 0.5: noise that falls by 6 dB an octave above 500 Hz, in
    syllables of a quarter of a second.
    """
    n = int(seconds * RATE_HZ)
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(n))
    hz = np.fft.rfftfreq(n, 1 / RATE_HZ)
    spectrum *= np.where(hz < 100, 0, 1 / np.maximum(1, hz / 500))
    sound = np.fft.irfft(spectrum, n) * np.sin(2 * np.pi * 2 * np.arange(n) / RATE_HZ) ** 2
    return (0.5 * sound / np.abs(sound).max()).astype(np.float32)
