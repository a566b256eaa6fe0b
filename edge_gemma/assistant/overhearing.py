"""Before a spoken turn is answered: is it a stop phrase, and what are its words?

In: a chat whose turn was spoken, and who answers it. Out: the answer, or nothing where somebody
said stop. The model that hears is asked to write the utterance down; the conversation knows
nothing of that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

from edge_gemma.assistant.phrases import may_say_stop, says_stop
from edge_gemma.conversation.chat import Chat
from edge_gemma.conversation.spoken_answer import Responder
from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import ContextFull
from edge_gemma.options import Sampling

ASK = "Transcribe this speech segment word for word, and write nothing else."
# soft tokens of 0.16 s: 1.2 s of speech, and half a second that is kept around it
SHORT_ROWS = 11
_STOP = Sampling(max_tokens=12, temperature=0.0)
_WORDS = Sampling(max_tokens=200, temperature=0.0)

Generate = Callable[[Sampling | None], Generator[Chunk, None, None]]


class Overhearing:
    """A listener's responder around another one (``inner``), or around the chat alone.

    ``stops``: short utterances are asked about; ``writes``: all are. ``heard(text)`` takes the
    words that were written down, ``stop()`` is called where they are a stop phrase of
    ``languages``.
    """

    def __init__(
        self,
        chat: Chat,
        inner: Responder | None,
        *,
        stops: bool,
        writes: bool,
        languages: Sequence[str],
        heard: Callable[[str], object],
        stop: Callable[[], object],
    ):
        self._chat, self._inner = chat, inner
        self._stops, self._writes, self._languages = stops, writes, tuple(languages)
        self._heard, self._stop = heard, stop

    @property
    def asks(self) -> bool:
        return self._inner is not None and self._inner.asks

    def instruction(self, usual: str) -> str:
        return usual if self._inner is None else self._inner.instruction(usual)

    def answer(
        self,
        generate: Generate,
        sampling: Sampling | None,
        stopped: threading.Event,
        tell: Callable[[str], None],
    ) -> Generator[Chunk, None, None]:
        # what answers a question of yes or no is written down anyway, and "stop" is a no
        if not self.asks and self._is_stop():
            self._chat.abandon_turn()
            self._stop()
            return
        if stopped.is_set():
            self._chat.abandon_turn()
            return
        if self._inner is None:
            yield from generate(sampling)
        else:
            yield from self._inner.answer(generate, sampling, stopped, tell)

    def spoken(self) -> None:
        if self._inner is not None:
            self._inner.spoken()

    def _is_stop(self) -> bool:
        is_short = 0 < self._chat.spoken_rows <= SHORT_ROWS
        if not self._writes and not (self._stops and is_short):
            return False
        try:
            text = self._written(whole=self._writes)
        except ContextFull:  # the turn itself fits
            return False
        is_stop = self._stops and is_short and says_stop(text, self._languages)
        if self._writes or is_stop:
            self._heard(text.strip())
        return is_stop

    def _written(self, *, whole: bool) -> str:
        """What the model writes down; without ``whole`` only as much as it takes to know that it
        is no stop phrase.
        """
        text = ""
        with closing(self._chat.aside(ASK, _WORDS if whole else _STOP)) as chunks:
            for chunk in chunks:
                text += chunk.text
                if not whole and not may_say_stop(text, self._languages):
                    break
        return text
