"""The answer to a spoken turn: decoded and spoken in a thread, so that speech can stop it.

In: a finished turn, how to sample, perhaps a voice. Out: :class:`Heard` records.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, Protocol

from edge_gemma.conversation.chat import Chat
from edge_gemma.conversation.live_turn import LiveTurn
from edge_gemma.conversation.stream import Chunk
from edge_gemma.conversation.voice import Voice
from edge_gemma.errors import Cancelled, EdgeGemmaError
from edge_gemma.machine.footprint import trim_heap
from edge_gemma.options import Sampling


@dataclass(frozen=True)
class Heard:
    """One record of a listening session. ``kind``:

    - ``ready`` (a microphone is open), ``speech`` (an utterance began), ``partial`` (so many soft
      tokens are in the decoder by now), ``silence`` (it ended; the answer starts), ``text`` (a
      piece of the answer), ``turn`` (its whole text, its last chunk);
    - ``interrupted`` (speech stopped the answer; ``text`` is what was said of it, or what had come
      where nothing speaks; the chat remembers that), ``dropped`` (``n`` blocks were lost so far),
      ``called`` (a tool; ``text`` says with what, and what came of it), ``notice`` (something was
      said or rung unasked: a timer), ``lost``, ``back`` (the microphone; ``text`` says why; what
      was said until then is answered),
      ``failed`` (a turn that could not be answered, or spoken; ``text`` says why; ``error`` is the
      class of what kept it from being answered, like ContextFull), ``ignored`` (the utterance had
      less speech than ``ListenOptions.shortest_s``).

    ``at_s`` counts seconds of sound; ``wait_s`` (with turn) is the time from the last sample's
    arrival to the first token, ``sound_wait_s`` to the first sound.
    """

    kind: Literal[
        "ready",
        "speech",
        "partial",
        "silence",
        "text",
        "turn",
        "interrupted",
        "dropped",
        "called",
        "notice",
        "lost",
        "back",
        "failed",
        "ignored",
    ]
    at_s: float
    text: str = ""
    n: int = 0
    wait_s: float | None = None
    sound_wait_s: float | None = None
    end: Chunk | None = None
    error: str = ""


def failed(error: EdgeGemmaError, at_s: float = 0.0) -> Heard:
    """The record of a turn that could not be answered."""
    return Heard("failed", at_s, str(error), error=type(error).__name__)


class Responder(Protocol):
    """What answers in the chat's stead: it may call tools between what the model says, or ask
    before it does.
    """

    @property
    def asks(self) -> bool:
        """Whether it asked something: the next utterance needs no wake word."""

    def instruction(self, usual: str) -> str:
        """What stands before the turn that begins now."""

    def answer(
        self,
        generate: Callable[[Sampling | None], Generator[Chunk, None, None]],
        sampling: Sampling | None,
        stopped: threading.Event,
        tell: Callable[[str], None],
    ) -> Generator[Chunk, None, None]:
        """What is said to the turn, which ``generate`` has the model answer. ``tell`` takes what is
        shown but not spoken. Ends soon after ``stopped``.
        """

    def spoken(self) -> None:
        """The last answer was heard to its end."""


class Spoken(ABC):
    """Something that is said: made in a thread of its own, told in records."""

    def __init__(self, voice: Voice | None):
        self._voice = voice
        self._records: queue.Queue[Heard | None] = queue.Queue()  # None: no more
        self._stopped = threading.Event()
        self.ended = False  # the last record was taken

    @property
    def done(self) -> bool:
        """Whether nothing more is decoded or spoken."""
        return not self._thread.is_alive()

    def next_record(self, timeout_s: float) -> Heard | None:
        """The next record, or None when there is none yet, or none any more (``ended``)."""
        try:
            record = self._records.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None
        self.ended = record is None
        return record

    @abstractmethod
    def stop(self) -> str:
        """Stop at once and wait for the thread. Returns what was said."""

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.join()

    @abstractmethod
    def _run(self) -> None:
        """Ends with None among the records."""

    def _start(self, name: str) -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _finish_voice(self, voice: Voice) -> None:
        voice.finish()
        voice.join()
        if voice.error:
            self._records.put(Heard("failed", 0.0, str(voice.error)))


class SpokenAnswer(Spoken):
    """Starts at once. ``heard_s`` is when the last sample arrived, by time.perf_counter;
    ``ending`` is set when no utterance will follow.
    """

    def __init__(
        self,
        chat: Chat,
        turn: LiveTurn,
        sampling: Sampling | None,
        voice: Voice | None,
        *,
        heard_s: float,
        ending: threading.Event,
        responder: Responder | None = None,
    ):
        super().__init__(voice)
        self._responder = responder
        self._chat, self._turn, self._sampling = chat, turn, sampling
        self._heard_s, self._ending = heard_s, ending
        self._parts: list[str] = []
        self._n_before = 0  # characters before the model's last message
        self._start("edge-gemma-answer")

    def _run(self) -> None:
        try:
            self._turn.finish()
            if self._chat.senses.one_at_a_time:  # the plan counts the encoder while listening only
                self._chat.senses.release()
            end = self._decode()
            if not self._stopped.is_set():
                self._speak_rest()
            if not self._stopped.is_set():
                self._records.put(self._whole(end))
        except Cancelled:
            pass  # stopped before the first token
        except EdgeGemmaError as error:
            self._records.put(failed(error))
        finally:
            self._open_ears()
            # else what turns free piles up in the C library's heap: 20 MiB in the first ten minutes
            trim_heap()
            self._records.put(None)

    def _decode(self) -> Chunk | None:
        end = None
        n_chars = 0
        with closing(self._chunks()) as chunks:
            for chunk in chunks:
                if end is not None and end.finish_reason:  # that was a call; the answer follows
                    self._n_before = n_chars
                end = chunk
                n_chars += len(chunk.text)
                if chunk.text:
                    self._parts.append(chunk.text)
                    self._records.put(Heard("text", 0.0, chunk.text))
                    if self._voice:
                        self._voice.push(chunk.text)
                if self._stopped.is_set():
                    break
        return end

    def _chunks(self) -> Generator[Chunk, None, None]:
        if self._responder is None:
            return self._turn.generate(self._sampling)
        return self._responder.answer(
            self._turn.generate, self._sampling, self._stopped, self._tell
        )

    def _tell(self, text: str) -> None:
        self._records.put(Heard("called", 0.0, text))

    def _speak_rest(self) -> None:
        if self._voice:
            self._finish_voice(self._voice)
        if self._responder:
            self._responder.spoken()

    def _whole(self, end: Chunk | None) -> Heard:
        first_s = self._turn.first_token_s
        wait_s = first_s - self._heard_s if first_s else None
        sound_s = self._voice.first_sound_s if self._voice else None
        sound_wait_s = sound_s - self._heard_s if sound_s else None
        text = "".join(self._parts)
        return Heard("turn", 0.0, text, wait_s=wait_s, sound_wait_s=sound_wait_s, end=end)

    def _open_ears(self) -> None:
        """The encoder is back before the next utterance, not after its first word."""
        if self._chat.senses.one_at_a_time and not self._ending.is_set():
            try:
                self._chat.senses.audio()
            except EdgeGemmaError as error:
                self._records.put(failed(error))

    def stop(self) -> str:
        """Stop speaking and decoding, wait for the thread. Returns what was said of the answer
        (what had come, without a voice); the chat remembers that much.
        """
        self._stopped.set()
        if self._voice:
            self._voice.stop()  # first: silence is what the one who speaks waits for
        self._chat.cancel()
        self.close()
        if not self._voice:
            return "".join(self._parts)
        self._voice.join()
        said = self._voice.said
        # before the first token the turn was taken back; a voice that failed says nothing about it
        if self._turn.first_token_s is not None and not self._voice.error:
            self._chat.heard_only(said[self._n_before :])
        return said
