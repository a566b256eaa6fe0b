"""What an assistant says and sounds, with a loudspeaker that may be absent, go and come back.

In: a speaker, synthesizers. Out: voices and tones while there is a loudspeaker; one note when it
is gone and one when it is back. Answers are shown meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from edge_gemma.assistant.tones import RATE_HZ
from edge_gemma.conversation.voice import Synthesizer, Voice
from edge_gemma.errors import DeviceLost, EdgeGemmaError, MediaError, UsageError
from edge_gemma.hearing.devices import Speaker

RETRY_S = 5.0  # between attempts to open a loudspeaker that is gone


class Loudspeaker:
    """``synthesizers``: language → what speaks it; none: nothing is spoken, tones and rings sound
    all the same.

    ``tell(text)`` is told what changed, from whichever thread found it.
    """

    def __init__(
        self,
        speaker: Speaker,
        synthesizers: Mapping[str, Synthesizer],
        *,
        tell: Callable[[str], object],
        retry_s: float = RETRY_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._speaker, self._synthesizers = speaker, dict(synthesizers)
        self._tell, self._retry_s, self._clock = tell, retry_s, clock
        self._lock = threading.Lock()
        self._next_try_s = 0.0
        self._thread: threading.Thread | None = None  # of a tone
        self.is_lost = False
        #: whether what sounds now is a tone, which nobody takes for speech
        self.harmless = False

    def ready(self) -> bool:
        """Whether there is one; opens it. Asks the system at most every ``retry_s`` seconds while
        there is none.
        """
        with self._lock:
            if self.is_lost and self._clock() < self._next_try_s:
                return False
            try:
                self._speaker.play(np.zeros(0, np.float32), RATE_HZ)
            except (MediaError, UsageError) as error:
                self._lost(error)
                return False
            if self.is_lost:
                self.is_lost = False
                self._tell(f"the loudspeaker is back: {self._speaker.name}")
            return True

    def _lost(self, error: EdgeGemmaError) -> None:
        if not self.is_lost:
            self._tell(f"{error}. Until it is back, answers are only shown")
        self.is_lost, self._next_try_s = True, self._clock() + self._retry_s

    def failed(self, error: EdgeGemmaError) -> None:
        """Somebody who played through it found it gone."""
        with self._lock:
            self._lost(error)

    def make_voice(self) -> Voice | None:
        """For one answer; None where nothing can be spoken now."""
        if not self._synthesizers or not self.ready():
            return None
        self.harmless = False
        speaker = self._speaker
        return Voice(self._synthesizers, self._play, speaker.stop, lambda: speaker.n_heard)

    def _play(self, samples: np.ndarray, rate_hz: int) -> bool:
        try:
            return self._speaker.play(samples, rate_hz)
        except DeviceLost as error:
            self.failed(error)
            raise

    def ring(self, samples: np.ndarray, rate_hz: int) -> bool:
        """Play it, and return when it is over or was stopped; without a loudspeaker at once."""
        return self.ready() and self._play(samples, rate_hz)

    def silence(self) -> None:
        self._speaker.stop()

    def tone(self, samples: np.ndarray) -> None:
        """Play a short tone at 16 kHz in a thread of its own; dropped while another one sounds."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(
            target=self._run_tone, args=(samples,), name="edge-gemma-tone", daemon=True
        )
        self._thread.start()

    def _run_tone(self, samples: np.ndarray) -> None:
        if not self.ready():
            return
        self.harmless = True
        try:
            self._speaker.play(samples, RATE_HZ)
            self._speaker.wait()
        except EdgeGemmaError as error:
            self.failed(error)
        finally:
            self.harmless = False

    def close(self) -> None:
        self._speaker.close()
        if self._thread is not None:
            self._thread.join(timeout=2.0)
