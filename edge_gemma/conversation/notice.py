"""What an assistant says or rings unasked: a timer that is over.

In: a :class:`Notice`, perhaps a voice. Out: one record. Speech stops it, as it stops an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_gemma.conversation.spoken_answer import Heard, Spoken
from edge_gemma.conversation.voice import Voice
from edge_gemma.errors import EdgeGemmaError


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Notice:
    """``ring()`` plays a sound and returns when it is over, or soon after ``silence()``; then
    ``text`` is spoken. ``done(whole)`` is called at the end: whether nobody interrupted.
    ``spoken_to()`` is called when somebody begins to speak, then or before the next notice.
    """

    text: str
    ring: Callable[[], object] = _nothing
    silence: Callable[[], object] = _nothing
    done: Callable[[bool], object] = lambda whole: None
    spoken_to: Callable[[], object] = _nothing


class SpokenNotice(Spoken):
    """Starts at once, in a thread. The same to the listener as an answer."""

    def __init__(self, notice: Notice, voice: Voice | None):
        super().__init__(voice)
        self._notice = notice
        self._records.put(Heard("notice", 0.0, notice.text))
        self._start("edge-gemma-notice")

    def _run(self) -> None:
        try:
            self._notice.ring()
        except EdgeGemmaError as error:  # without a loudspeaker it is still shown
            self._records.put(Heard("failed", 0.0, str(error)))
        try:
            if self._voice:
                if not self._stopped.is_set():
                    self._voice.push(self._notice.text)
                self._finish_voice(self._voice)
            self._notice.done(not self._stopped.is_set())
        finally:
            self._records.put(None)

    def stop(self) -> str:
        """Silence now. Returns the text: it was shown."""
        self._stopped.set()
        self._notice.silence()
        if self._voice:
            self._voice.stop()
        self.close()
        return self._notice.text
