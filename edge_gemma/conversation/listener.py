"""Listening: sound → turns of a conversation, encoded and prefilled while the user is still
speaking.

In: a chat, and a microphone or blocks of 16 kHz samples. Out: :class:`Heard` records, and text.
After the last sample only the tail of the encoder and the end of the prompt are left to compute,
however long the utterance was.

One thread does the listening: detection, features, encoder and prefill in turns, so that encoder
and decoder never compete for the cores; the microphone's queue evens out what a step takes. Only an
answer runs beside it (spoken_answer.py), so that speech can stop it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from edge_gemma.conversation.chat import Chat
from edge_gemma.conversation.live_turn import LiveTurn
from edge_gemma.conversation.notice import Notice, SpokenNotice
from edge_gemma.conversation.spoken_answer import Heard, Responder, SpokenAnswer, failed
from edge_gemma.conversation.transcription import ListenOptions, Source, blocks_of, live_turn
from edge_gemma.conversation.voice import Voice
from edge_gemma.errors import (
    Cancelled,
    ContextFull,
    DeviceLost,
    EdgeGemmaError,
    UsageError,
)
from edge_gemma.hearing.devices import Microphone
from edge_gemma.hearing.echo import EchoCanceller, SoundFilter
from edge_gemma.hearing.samples import BLOCK_SAMPLES, RATE_HZ
from edge_gemma.hearing.utterances import SpeechDetector, UtteranceEvent

__all__ = ["Attention", "Heard", "ListenOptions", "Listener"]

RETRY_S = 0.5  # between attempts to get a lost microphone back
_FLUSH = 3 * BLOCK_SAMPLES  # of silence: canceller and filters give out what they hold back


class Attention(Protocol):
    """Decides at every moment whether the detector hears: a life with more than a wake word."""

    def hears(self, samples: np.ndarray) -> bool:
        """Asked with every block, while somebody speaks and while an answer is spoken, too."""

    def cuts(self) -> bool:
        """Asked right behind it, once: whether what is being said and answered ends here."""


@dataclass
class Listener:
    """A conversation by voice. Iterate :meth:`records`; :meth:`stop` ends it from anywhere.

    ``source`` is a :class:`Microphone` (opened and closed here), a sound file, or any iterable of
    sample blocks; the last two wait for each answer. ``make_voice`` makes a :class:`Voice` for each
    answer, None for a silent one. ``gate(samples) -> bool`` is asked, block by block, before an
    utterance may begin (a wake word); once it says yes, the next utterance is heard.
    ``attention`` takes its place where more than a word decides.

    ``turn_over`` is asked at each pause how likely the turn is over by what was said
    (:class:`~edge_gemma.conversation.turn_end.TurnEnd` knows from a transcript); it counts where
    ``options.vad`` has a rule.

    ``echo`` takes what the loudspeaker plays out of the sound first, ``filters`` (noise
    suppression) come behind it; gate, detector and encoder hear what is left.

    ``responder`` answers in the chat's stead (tools); ``notices()`` is asked, block by block while
    nobody speaks, for what is to be said unasked (timers).
    """

    chat: Chat
    source: Microphone | Source
    options: ListenOptions = ListenOptions()
    make_voice: Callable[[], Voice | None] = lambda: None
    gate: Callable[[np.ndarray], bool] | None = None
    detector: SpeechDetector | None = None
    turn_over: Callable[[], float | None] | None = None
    echo: EchoCanceller | None = None
    filters: Sequence[SoundFilter] = ()
    responder: Responder | None = None
    notices: Callable[[], Notice | None] = lambda: None
    attention: Attention | None = None
    retry_s: float | None = None  # between attempts to get a lost microphone back; None: 0.5
    _stopping: threading.Event = field(default_factory=threading.Event, repr=False)
    _listening: _Listening | None = field(default=None, repr=False)

    @property
    def answering(self) -> bool:
        """Whether an answer is being decoded or spoken."""
        return self._listening is not None and self._listening.answering

    def stop(self) -> None:
        """End :meth:`records`, from any thread; a running answer is stopped."""
        self._stopping.set()
        self.chat.cancel()

    def records(self) -> Generator[Heard, None, None]:
        """Listen until stopped, or until the source ends. Errors of a single turn become ``failed``
        records. Raises UnsupportedModel (a bundle that cannot hear), DeviceLost (no microphone),
        UsageError (a schema or grammar that no answer could be held to).
        """
        if self.options.sampling is not None:
            self.chat.session.check(self.options.sampling)
        self.chat.senses.audio()  # opened before the first word, not after it
        detector = self.detector or SpeechDetector(self.options.vad)
        self._listening = listening = _Listening(self, detector, self._stopping)
        try:
            if isinstance(self.source, Microphone):
                with self.source:
                    yield Heard("ready", 0.0, self.source.name)
                    yield from listening.hear_live(self.source)
            else:
                yield from listening.hear_all(blocks_of(self.source))
            if self._stopping.is_set():
                yield from listening.interrupted()
            else:
                yield from listening.finish()
                yield from listening.drain(wait=True)
        finally:
            listening.close()


class _Listening:
    """The state of one :meth:`Listener.records`."""

    def __init__(self, listener: Listener, detector: SpeechDetector, stopping: threading.Event):
        self._chat, self._options = listener.chat, listener.options
        self._make_voice = listener.make_voice
        self._gate, self._attention = listener.gate, listener.attention
        self._detector, self._stopping = detector, stopping
        self._turn_over = listener.turn_over
        self._echo, self._filters = listener.echo, listener.filters
        self._responder, self._notices = listener.responder, listener.notices
        self._retry_s = RETRY_S if listener.retry_s is None else listener.retry_s
        self._n_samples = self._n_dropped = 0
        self._from = 0  # the sample that the detector counts from
        self._unheard = np.zeros(0, np.float32)  # the last of what the detector did not get
        self._was_deaf = False
        self._gate_open = self._gate is None
        self._speech_at = 0  # where the present utterance began, as the detector counts
        self._turn: LiveTurn | None = None
        self._expected = False  # what follows the turn was tried at the present pause
        self._given_up = False  # the present utterance failed; its end alone would make no sense
        self._answer: SpokenAnswer | SpokenNotice | None = None
        self._last_notice: Notice | None = None  # that nobody has spoken to

    @property
    def answering(self) -> bool:
        return self._answer is not None

    @property
    def _at_s(self) -> float:
        return self._n_samples / RATE_HZ

    def hear_all(self, blocks: Iterable[np.ndarray]) -> Iterator[Heard]:
        """Blocks that wait for each answer."""
        for block in blocks:
            if self._stopping.is_set():
                return
            yield from self._hear(block)
            yield from self._expect_end()
            yield from self.drain(wait=True)

    def hear_live(self, microphone: Microphone) -> Iterator[Heard]:
        """A microphone until stopped; when it is lost, what was heard so far is answered."""
        while not self._stopping.is_set():
            try:
                block = microphone.read(timeout_s=0.1)
            except DeviceLost as error:
                yield Heard("lost", self._at_s, str(error))
                yield from self._hear(np.zeros(_FLUSH, np.float32))
                yield from self.finish()
                self._restart_detector()
                yield from self._reopened(microphone)
                continue
            yield from self._hear(block)
            if not microphone.n_waiting:
                yield from self._expect_end()
            n_lost = microphone.dropped_blocks - self._n_dropped
            if n_lost > 0:
                self._n_dropped += n_lost
                if self._echo is not None:
                    self._echo.lost(n_lost * BLOCK_SAMPLES)
                yield Heard("dropped", self._at_s, n=self._n_dropped)

    def _reopened(self, microphone: Microphone) -> Iterator[Heard]:
        while not self._stopping.wait(self._retry_s):
            try:
                microphone.reopen()
            except (DeviceLost, UsageError):
                yield from self.drain()
                self._notice()
            else:
                if self._echo is not None:
                    self._echo.restart()
                yield Heard("back", self._at_s, microphone.name)
                return

    def finish(self) -> Iterator[Heard]:
        """The sound ends here: an utterance that is not over ends with it."""
        for event in self._detector.finish():
            yield from self._event(event, time.perf_counter())

    def _hear(self, block: np.ndarray) -> Iterator[Heard]:
        arrived_s = time.perf_counter()
        if self._answer and self._answer.done:
            yield from self.drain(wait=True)
        self._notice()
        block = self._cleaned(block)
        n, hears = len(block), self._hears(block)
        if self._attention is not None and self._attention.cuts():
            yield from self._cut_short()
        if hears and self._was_deaf:
            # or the next utterance would begin with the last one's end
            self._restart_detector(len(self._unheard))
            block, self._unheard = np.concatenate([self._unheard, block]), self._unheard[:0]
        elif not hears:
            self._remember_unheard(block)
        self._was_deaf = not hears
        self._n_samples += n
        if hears and (not self._answer or self._options.barge_in):
            for event in self._detector.push(block):
                yield from self._event(event, arrived_s)
        yield from self.drain()

    def _hears(self, block: np.ndarray) -> bool:
        """Whether the detector gets this block."""
        if self._attention is not None:
            return self._attention.hears(block)
        is_asked = self._responder is not None and self._responder.asks
        if self._gate_open or self._gate is None or is_asked:
            return True
        self._gate_open = self._gate(block)
        return False

    def _remember_unheard(self, block: np.ndarray) -> None:
        n = round(self._options.look_back_s * RATE_HZ)
        whole = np.concatenate([self._unheard, block])
        self._unheard = whole[len(whole) - min(n, len(whole)) :]
        if self._answer:  # what is said then is the loudspeaker's
            self._unheard = whole[:0]

    def _restart_detector(self, n_back: int = 0) -> None:
        """It counts from here, or from ``n_back`` samples before."""
        self._detector = self._detector.restarted()
        self._from = self._n_samples - n_back

    def _cut_short(self) -> Iterator[Heard]:
        """What is being said is forgotten, what is being answered or rung ends."""
        yield from self.interrupted()
        self._spoken_to()
        self._abandon()
        self._restart_detector()

    def _spoken_to(self) -> None:
        if self._last_notice is not None:
            self._last_notice.spoken_to()
            self._last_notice = None

    def _notice(self) -> None:
        """Say what is to be said unasked, while nobody speaks."""
        if self._answer or self._turn:
            return
        notice = self._notices()
        if notice is not None:
            self._last_notice = notice
            self._answer = SpokenNotice(notice, self._make_voice())

    def _cleaned(self, block: np.ndarray) -> np.ndarray:
        if self._echo is not None:
            block = self._echo.clean(block)
        for sound_filter in self._filters:
            block = sound_filter(block)
        return block

    def _event(self, event: UtteranceEvent, arrived_s: float) -> Iterator[Heard]:
        if event.kind == "start":
            yield from self.interrupted()
            self._spoken_to()
            yield Heard("speech", self._said_at_s(event))
            self._turn, self._given_up = None, False
            self._speech_at = event.at
        if self._given_up:
            return
        try:
            yield from self._heard(event, arrived_s)
        except Cancelled:
            self._abandon()
        except EdgeGemmaError as error:
            self._abandon()
            self._given_up = True
            yield failed(error, self._at_s)

    def _said_at_s(self, event: UtteranceEvent) -> float:
        return (self._from + event.at) / RATE_HZ

    def interrupted(self) -> Iterator[Heard]:
        """What is being said ends now."""
        if self._answer:
            text = self._answer.stop()
            while (record := self._answer.next_record(timeout_s=0.0)) is not None:
                if record.kind == "called":  # that was done, whatever was said of it
                    yield replace(record, at_s=self._at_s)
            self._answer = None
            yield Heard("interrupted", self._at_s, text)

    def _heard(self, event: UtteranceEvent, arrived_s: float) -> Iterator[Heard]:
        if self._turn is None:
            instruction = self._options.instruction
            if self._responder is not None:
                instruction = self._responder.instruction(instruction)
            self._turn = live_turn(self._chat, instruction, self._options)
        turn = self._turn
        self._expected &= not len(event.samples)
        if len(event.samples) and turn.push(event.samples):
            yield Heard("partial", self._at_s, n=turn.n_rows)
        if event.kind == "cut":
            turn.cut()
        if event.kind == "end" and self._too_short(event):
            self._abandon()
            yield Heard("ignored", self._said_at_s(event))
        elif event.kind == "end":
            yield Heard("silence", self._said_at_s(event))
            self._turn = None
            self._answer = SpokenAnswer(
                self._chat,
                turn,
                self._options.sampling,
                self._make_voice(),
                heard_s=arrived_s,
                ending=self._stopping,
                responder=self._responder,
            )
            self._gate_open = self._gate is None

    def _too_short(self, end: UtteranceEvent) -> bool:
        return end.at - self._speech_at < self._options.shortest_s * RATE_HZ

    def _expect_end(self) -> Iterator[Heard]:
        """At a pause: have the answer begun with, in case this was the end of the turn."""
        turn, options = self._turn, self._options
        if turn is None or self._expected or not self._detector.pausing:
            return
        self._expected = True
        try:
            over = turn.expect_end(ask=options.ask_for_end) if options.expect_end else None
        except Cancelled:
            self._abandon()
        except ContextFull:  # the turn itself may still fit
            pass
        except EdgeGemmaError as error:
            self._abandon()
            self._given_up = True
            yield failed(error, self._at_s)
        else:
            self._detector.over = self._turn_over() if self._turn_over else over

    def _abandon(self) -> None:
        if self._turn:
            self._turn.abandon()
            self._turn = None

    def drain(self, wait: bool = False) -> Iterator[Heard]:
        """What the running answer has produced since the last look; with ``wait``, all of it."""
        while self._answer:
            record = self._answer.next_record(timeout_s=0.1 if wait else 0.0)
            if record is not None:
                yield replace(record, at_s=self._at_s)
            elif self._answer.ended:
                self._answer.close()
                self._answer = None
            elif not wait:
                return

    def close(self) -> None:
        self._abandon()
        if self._answer:
            self._answer.stop()
