"""Timers that are due → what is rung and said, until somebody speaks.

In: timers, and how to play a sound. Out: a :class:`Notice` at a time, for the listener.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

import numpy as np

from edge_gemma.assistant.phrases import Phrases
from edge_gemma.assistant.timers import Ring, Timers
from edge_gemma.assistant.tones import RATE_HZ, ringing_tone
from edge_gemma.conversation.notice import Notice

N_RINGS = 12
GAP_S = 2.0  # between them, in which somebody is heard even where nothing takes the echo out


class Ringing:
    """Called again and again; returns what is to be rung now, or None.

    ``play(samples, rate_hz)`` and ``silence()`` are a loudspeaker's; without them a ring is only
    shown and said. A timer rings ``N_RINGS`` times or until somebody speaks; what was missed is
    told once. A timer stays on the disk until then.
    """

    def __init__(
        self,
        timers: Timers,
        play: Callable[[np.ndarray, int], object] = lambda samples, rate_hz: None,
        silence: Callable[[], object] = lambda: None,
        *,
        language: str = "en",
        gap_s: float = GAP_S,
    ):
        self._timers, self._play, self._silence = timers, play, silence
        self._phrases, self._gap_s = Phrases.of(language), gap_s
        self._n_rings: dict[int, int] = {}
        self._next_s = 0.0  # by time.monotonic
        self._problem = ""  # what was told of it

    def __call__(self) -> Notice | None:
        if self._timers.problem != self._problem:
            self._problem = self._timers.problem
            return Notice(self._problem)
        rings = self._timers.due() if time.monotonic() >= self._next_s else []
        missed = [ring for ring in rings if ring.missed]
        if missed:
            return Notice(" ".join(map(self._missed, missed)), done=lambda _: self._told(missed))
        if not rings:
            return None
        return self._ring(rings[0])

    def _ring(self, ring: Ring) -> Notice:
        return Notice(
            self._over(ring),
            ring=lambda: self._play(ringing_tone(), RATE_HZ),
            silence=self._silence,
            done=lambda _: self._rang(ring),
            spoken_to=lambda: self._timers.done(ring.timer),
        )

    def _over(self, ring: Ring) -> str:
        label = f" {ring.timer.label}" if ring.timer.label else ""
        if ring.timer.kind == "timer":
            return self._phrases.say("timer", label=label)
        return self._phrases.say("alarm", label=label, time=f"{datetime.now():%H:%M}")

    def _missed(self, ring: Ring) -> str:
        label = ring.timer.label or self._phrases.say(f"nameless_{ring.timer.kind}")
        return self._phrases.say("missed", label=label, ago=self._phrases.span(ring.late_s))

    def _told(self, missed: list[Ring]) -> None:
        for ring in missed:
            self._timers.done(ring.timer)

    def _rang(self, ring: Ring) -> None:
        n = self._n_rings.pop(ring.timer.id, 0) + 1
        self._next_s = time.monotonic() + self._gap_s
        if n >= N_RINGS:
            self._timers.done(ring.timer)
        else:
            self._n_rings[ring.timer.id] = n
