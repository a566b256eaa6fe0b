"""Listening: sound → turns of a conversation, encoded and prefilled while the user is still
speaking.

In: a chat, and blocks of 16 kHz samples (a microphone, or a file that never waits). Out:
:class:`Heard` records, and text. After the last sample only the tail of the encoder and the end of
the prompt are left to compute, however long the utterance was.

One thread does the listening: detection, features, encoder and prefill in turns, so that encoder
and decoder never fight for the cores; the microphone's queue evens out what a step takes. Only an
answer runs beside it, so that speech can stop it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from edge_gemma.conversation.chat import Chat
from edge_gemma.conversation.live_turn import LiveTurn
from edge_gemma.conversation.stream import Chunk
from edge_gemma.conversation.voice import Voice
from edge_gemma.engines.llama.decoder import Cancelled
from edge_gemma.errors import DeviceLost, EdgeGemmaError, UsageError
from edge_gemma.hearing.devices import Microphone
from edge_gemma.hearing.samples import RATE_HZ
from edge_gemma.hearing.sound import AudioFile
from edge_gemma.hearing.utterances import SpeechDetector, UtteranceEvent, VadSettings
from edge_gemma.options import Sampling

RETRY_S = 0.5  # between attempts to get a lost microphone back
_MIN_CLIP = RATE_HZ // 10  # samples; a shorter piece holds no word
# The wording Gemma 3n's authors give for speech (ai.google.dev/gemma/docs/capabilities/audio).
TRANSCRIBE = "Transcribe the following speech segment in {language}:"
TRANSCRIBE_ANY = "Transcribe the following speech segment:"
TRANSLATE = "Transcribe the following speech segment in {language}, then translate it into {to}:"
TRANSLATE_ONLY = "Translate the following speech segment into {to}:"


@dataclass(frozen=True)
class ListenOptions:
    """``instruction`` stands before the audio, so that it is prefilled before the user speaks.

    ``pad_audio`` is the reference mode: every clip takes 188 rows as in transformers; without
    (short mode) an answer starts sooner and may differ from the reference. ``barge_in``: speech
    stops a running answer; turn it off where the microphone hears the loudspeaker.
    """

    instruction: str = ""
    pad_audio: bool = False
    barge_in: bool = True
    vad: VadSettings = VadSettings()
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Heard:
    """One record of a listening session. ``kind``:

    - ``ready`` (a microphone is open), ``speech`` (an utterance began), ``partial`` (so many soft
      tokens are in the decoder by now), ``silence`` (it ended; the answer starts), ``text`` (a
      piece of the answer), ``turn`` (its whole text, its last chunk);
    - ``interrupted`` (speech stopped the answer; ``text`` is what had come), ``dropped`` (``n``
      blocks were lost so far), ``lost``, ``back`` (the microphone; ``text`` says why; what was said
      until then is answered), ``failed`` (a turn that could not be answered; ``text`` says why).

    ``at_s`` counts seconds of sound; ``wait_s`` (with turn) is the time from the last sample's
    arrival to the first token.
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
        "lost",
        "back",
        "failed",
    ]
    at_s: float
    text: str = ""
    n: int = 0
    wait_s: float | None = None
    end: Chunk | None = None


@dataclass(frozen=True)
class Segment:
    """A stretch of speech and what the model made of it. Seconds from the file's beginning."""

    start_s: float
    end_s: float
    text: str


def transcribe(
    chat: Chat,
    blocks: Iterable[np.ndarray],
    instruction: str = TRANSCRIBE_ANY,
    options: ListenOptions = ListenOptions(),
    detector: SpeechDetector | None = None,
) -> Iterator[Segment]:
    """Speech in ``blocks`` (16 kHz mono float32, any length) → a segment per utterance, each asked
    by itself. Memory does not grow.

    An utterance beyond 30 s gives several segments, cut at pauses. Raises what :class:`LiveTurn`
    raises.
    """
    detector = detector or SpeechDetector(options.vad)
    turn: LiveTurn | None = None
    start = position = n = 0  # samples

    def events() -> Iterator[UtteranceEvent]:
        nonlocal position
        for block in blocks:
            position += len(block)
            yield from detector.push(block)
        yield from detector.finish()

    def answer(turn: LiveTurn) -> str:
        turn.finish()
        text = "".join(chunk.text for chunk in turn.generate(options.sampling)).strip()
        chat.reset()
        return text

    for event in events():
        if event.kind == "start":
            start = event.at
        if event.kind == "start" or turn is None:
            turn, n = (
                LiveTurn(
                    chat,
                    instruction,
                    pad_audio=options.pad_audio,
                    max_tokens=options.sampling.max_tokens,
                ),
                0,
            )
        turn.push(event.samples)
        n += len(event.samples)
        if event.kind in ("cut", "end"):
            if n >= _MIN_CLIP:
                yield Segment(start / RATE_HZ, event.at / RATE_HZ, answer(turn))
            else:
                turn.abandon()
            turn, start = None, event.at  # behind a cut the next piece begins at once


def ask(
    chat: Chat,
    blocks: Iterable[np.ndarray],
    question: str,
    options: ListenOptions = ListenOptions(),
) -> Iterator[Chunk]:
    """A question about a sound of at most 30 s → the answer. The question stands before the sound."""
    turn = LiveTurn(
        chat, question, pad_audio=options.pad_audio, max_tokens=options.sampling.max_tokens
    )
    for block in blocks:
        turn.push(block)
    turn.finish()
    yield from turn.generate(options.sampling)


def file_blocks(path) -> Iterator[np.ndarray]:
    """The blocks of a sound file, closed at the end."""
    with AudioFile(path) as file:
        yield from file.blocks()


@dataclass
class Listener:
    """A conversation by voice. Iterate :meth:`records`; :meth:`stop` ends it from anywhere.

    ``source`` is a :class:`Microphone` (opened and closed here) or any iterable of sample blocks
    (which waits for each answer). ``make_voice`` makes a :class:`Voice` for each answer, None for a
    silent one. ``gate(samples) -> bool`` is asked, block by block, before an utterance may begin (a
    wake word); once it says yes, the next utterance is heard.
    """

    chat: Chat
    source: Microphone | Iterable[np.ndarray]
    options: ListenOptions = ListenOptions()
    make_voice: Callable[[], Voice | None] = lambda: None
    gate: Callable[[np.ndarray], bool] | None = None
    detector: SpeechDetector | None = None
    _stopping: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        self._stopping.set()
        self.chat.cancel()

    def records(self) -> Iterator[Heard]:
        """Listen until stopped, or until the source ends. Errors of a single turn become ``failed``
        records.
        """
        self.chat.model.encoder("audio")  # before the first word, not after it
        self.detector = self.detector or SpeechDetector(self.options.vad)
        self._n, self._dropped, self._open = 0, 0, self.gate is None
        self._turn: LiveTurn | None = None
        self._given_up = False
        self._answer: _Answer | None = None
        try:
            if isinstance(self.source, Microphone):
                with self.source:
                    yield Heard("ready", 0.0, self.source.name)
                    for block in self._live_blocks():
                        yield from block if isinstance(block, list) else self._hear(block)
            else:
                for block in self.source:
                    if self._stopping.is_set():
                        break
                    yield from self._hear(block)
                    yield from self._drain(wait=True)
            if not self._stopping.is_set():
                for event in self.detector.finish():
                    yield from self._event(event)
            yield from self._drain(wait=True)
        finally:
            if self._turn:
                self._turn.abandon()
            if self._answer:
                self._answer.stop()

    @property
    def _at_s(self) -> float:
        return self._n / RATE_HZ

    def _live_blocks(self) -> Iterator[np.ndarray | list[Heard]]:
        """Blocks, or lists of records about the microphone itself."""
        while not self._stopping.is_set():
            try:
                yield self.source.read(timeout_s=0.1)
                if self.source.dropped_blocks > self._dropped:
                    self._dropped = self.source.dropped_blocks
                    yield [Heard("dropped", self._at_s, n=self._dropped)]
            except DeviceLost as error:
                yield [Heard("lost", self._at_s, str(error))]
                for event in (
                    self.detector.finish()
                ):  # what was heard so far is answered: nobody says it twice with pleasure
                    yield list(self._event(event))
                self.detector = SpeechDetector(self.options.vad, self.detector._probability)
                while not self._stopping.wait(RETRY_S):
                    try:
                        self.source.reopen()
                        yield [Heard("back", self._at_s, self.source.name)]
                        break
                    except (DeviceLost, UsageError):
                        yield from ([record] for record in self._drain())

    def _hear(self, block: np.ndarray) -> Iterator[Heard]:
        self._n += len(block)
        arrived = time.perf_counter()
        if self._answer and self._answer.done:
            yield from self._drain(wait=True)
        if not self._open:
            self._open = self.gate(block)
            return
        if self._answer and not self.options.barge_in:
            yield from self._drain()
            return
        for event in self.detector.push(block):
            yield from self._event(event, arrived)
        yield from self._drain()

    def _event(self, event: UtteranceEvent, arrived: float | None = None) -> Iterator[Heard]:
        if event.kind == "start":
            if self._answer:
                text = self._answer.stop()
                yield Heard("interrupted", self._at_s, text)
                self._answer = None
            yield Heard("speech", event.at / RATE_HZ)
            self._turn, self._given_up = None, False
        if self._given_up:  # the utterance failed on the way; its end alone would make no sense
            return
        try:
            if self._turn is None:
                options = self.options
                self._turn = LiveTurn(
                    self.chat,
                    options.instruction,
                    pad_audio=options.pad_audio,
                    max_tokens=options.sampling.max_tokens,
                )
            if len(event.samples) and self._turn.push(event.samples):
                yield Heard("partial", self._at_s, n=self._turn.n_rows)
            if event.kind == "cut":
                self._turn.cut()
            if event.kind == "end":
                yield Heard("silence", event.at / RATE_HZ)
                turn, self._turn = self._turn, None
                self._answer = _Answer(self, turn, arrived or time.perf_counter())
                self._open = self.gate is None
        except Cancelled:
            self._turn = None
        except EdgeGemmaError as error:
            self._turn, self._given_up = None, True
            yield Heard("failed", self._at_s, str(error))

    def _drain(self, wait: bool = False) -> Iterator[Heard]:
        """What the running answer has produced since the last look."""
        while self._answer:
            try:
                item = self._answer.out.get(timeout=0.1) if wait else self._answer.out.get_nowait()
            except queue.Empty:
                if not wait:
                    return
                continue
            if item is None:
                self._answer.close()
                self._answer = None
            else:
                yield replace(item, at_s=self._at_s)


class _Answer:
    """Decoding and speaking of one turn, in a thread of its own. ``out`` gets records, then None."""

    def __init__(self, listener: Listener, turn: LiveTurn, heard_s: float):
        self._chat, self._turn, self._heard_s, self._options = (
            listener.chat,
            turn,
            heard_s,
            listener.options.sampling,
        )
        self._one_at_a_time = (
            getattr(listener.chat.model.plan.settings, "encoders", None) == "one at a time"
        )
        self._ending = listener._stopping
        self.out: queue.Queue[Heard | None] = queue.Queue()
        self._voice = listener.make_voice()
        self._stopped = threading.Event()
        self._parts: list[str] = []
        self._thread = threading.Thread(target=self._run, name="edge-gemma-answer", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._turn.finish()
            if self._one_at_a_time:  # the plan counts the encoder in while listening only
                self._chat.model.release_encoders()
            end = None
            chunks = self._turn.generate(self._options)
            for chunk in chunks:
                if chunk.text:
                    self._parts.append(chunk.text)
                    self.out.put(Heard("text", 0.0, chunk.text))
                    if self._voice:
                        self._voice.push(chunk.text)
                end = chunk
                if self._stopped.is_set():
                    chunks.close()
                    break
            if self._voice and not self._stopped.is_set():
                self._voice.finish()
                self._voice.join()
                if self._voice.error:
                    self.out.put(Heard("failed", 0.0, str(self._voice.error)))
            if not self._stopped.is_set():
                first = self._turn.first_token_s
                self.out.put(
                    Heard(
                        "turn",
                        0.0,
                        "".join(self._parts),
                        wait_s=first - self._heard_s if first else None,
                        end=end,
                    )
                )
        except Cancelled:
            pass  # stopped before the first token
        except EdgeGemmaError as error:
            self.out.put(Heard("failed", 0.0, str(error)))
        finally:
            try:
                if (
                    self._one_at_a_time and not self._ending.is_set()
                ):  # back before the next utterance, not after its first word
                    self._chat.model.encoder("audio")
            except EdgeGemmaError as error:
                self.out.put(Heard("failed", 0.0, str(error)))
            finally:
                self.out.put(None)

    def stop(self) -> str:
        """Stop decoding and speaking, wait for the thread. Returns what was said of the answer."""
        self._stopped.set()
        self._chat.cancel()
        self.close()
        return "".join(self._parts)

    def close(self) -> None:
        if self._voice:
            self._voice.stop() if self._stopped.is_set() else None
            self._voice.join() if self._stopped.is_set() else None
        self._thread.join()
