"""The life of an assistant beside the sound: what the listener asks with every block.

In: blocks of sound, the wake word and stop word detectors, button presses from any thread. Out:
whether the detector hears, whether what goes on is cut off; tones; states, as they change.
"""

from __future__ import annotations

import queue
from collections.abc import Callable

import numpy as np

from edge_gemma.assistant.life import Action, Event, Life, State
from edge_gemma.assistant.tones import sleep_tone, wake_tone
from edge_gemma.hearing.samples import RATE_HZ
from edge_gemma.hearing.wake_word import WakeWord


class LifeAttention:
    """The listener's :class:`~edge_gemma.conversation.listener.Attention`.

    ``answering()`` says whether something is said; ``asks_s()`` for how many seconds an answer is
    waited for anyway; ``tone(samples)`` plays; ``on_state(state)`` is told each change, in the
    listener's thread; ``alive()`` is called with every block.
    """

    def __init__(
        self,
        life: Life,
        *,
        clock: Callable[[], float],
        on_state: Callable[[State], object],
        tone: Callable[[np.ndarray], object],
        answering: Callable[[], bool],
        asks_s: Callable[[], float],
        alive: Callable[[], object],
        wake: WakeWord | None = None,
        stop_word: WakeWord | None = None,
    ):
        self.life = life
        self._clock, self._on_state, self._tone = clock, on_state, tone
        self._answering, self._asks_s, self._alive = answering, asks_s, alive
        self._wake, self._stop_word = wake, stop_word
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()  # of other threads
        self._tones: list[np.ndarray] = []  # that wait: what is cut off would take them with it
        self._cuts = False
        self._n_samples = 0

    @property
    def heard_s(self) -> float:
        """Of sound, so far."""
        return self._n_samples / RATE_HZ

    def later(self, event: Event) -> None:
        """From any thread: it is taken up with the next block."""
        self._events.put(event)

    def on(self, event: Event) -> None:
        """In the listener's thread."""
        before = self.life.state
        at_least_s = self._asks_s() if event == "over" else 0.0
        self._do(self.life.on(event, self._clock(), at_least_s=at_least_s), before)

    def hears(self, samples: np.ndarray) -> bool:
        self._n_samples += len(samples)
        self._alive()
        for sound in self._tones:
            self._tone(sound)
        self._tones.clear()
        if self.life.state in ("answering", "ringing") and not self._answering():
            self.on("over")
        before = self.life.state
        self._do(self.life.tick(self._clock()), before)
        while not self._events.empty():
            self.on(self._events.get())
        # both see every block: their models count them
        woke = self._wake is not None and self._wake(samples)
        stopped = self._stop_word is not None and self._stop_word(samples)
        if stopped:
            self.on("stop")
        elif woke:
            self.on("wake")
        return self.life.hears

    def cuts(self) -> bool:
        cuts, self._cuts = self._cuts, False
        return cuts

    def _do(self, actions: tuple[Action, ...], before: State) -> None:
        for action in actions:
            if action == "cut":
                self._cuts = True
            else:
                self._tones.append(wake_tone() if action == "wake tone" else sleep_tone())
        if self.life.state != before:
            self._on_state(self.life.state)
