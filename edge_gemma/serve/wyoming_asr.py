"""A stream of sound → transcripts, as Wyoming's asr sends them.

In: 16 kHz samples as they come. Out: ``transcript-start``, a ``transcript-chunk`` for each piece of
text, ``transcript`` and ``transcript-stop``. Each utterance is a turn of its own, encoded and
prefilled while it is spoken; it is written down as soon as it ends, whether or not the stream does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from wyoming.asr import Transcript, TranscriptChunk, TranscriptStart, TranscriptStop
from wyoming.event import Eventable

from edge_gemma.conversation.transcription import MIN_CLIP, TRANSCRIBE, TRANSCRIBE_ANY
from edge_gemma.hearing.utterances import SpeechDetector, UtteranceEvent, VadSettings
from edge_gemma.messages import Audio, Message
from edge_gemma.serve.answer import GenerationRequest
from edge_gemma.serve.bodies import Server
from edge_gemma.serve.languages import language_name
from edge_gemma.serve.spoken import SpokenAnswer

Send = Callable[[Eventable], Awaitable[None]]
Fail = Callable[[BaseException], Awaitable[None]]
MAX_TOKENS = 448  # a clip of 30 s holds fewer tokens of speech
_MAX_PIECES = 2  # of one stream that are written down or spoken at a time
# how long a person may pause, by the names of the protocol; as Home Assistant's own detector
SILENCE_S = {"aggressive": 0.25, "default": 0.7, "relaxed": 1.25}


@dataclass(frozen=True)
class Asked:
    """How a stream is to be written down. ``endpoint``: the transcript is sent when the first
    utterance ends, and the rest of the stream is not heard.
    """

    language: str | None = None  # as the client named it
    endpoint: bool = False
    silence_s: float = SILENCE_S["default"]


class Transcription:
    """One stream. Close it. ``fail(error)`` is told what the writing down failed with."""

    def __init__(self, server: Server, asked: Asked, send: Send, fail: Fail):
        self._server, self._asked, self._send, self._fail = server, asked, send, fail
        name = language_name(asked.language or "")
        self._instruction = TRANSCRIBE.format(language=name) if name else TRANSCRIBE_ANY
        self._detector = SpeechDetector(VadSettings(end_s=asked.silence_s))
        self._turn: SpokenAnswer | None = None
        self._n_samples = 0  # of the turn
        self._room = asyncio.Semaphore(_MAX_PIECES)
        self._spoken: asyncio.Queue[SpokenAnswer | None] = asyncio.Queue()
        self._turns: set[SpokenAnswer] = set()
        self._writer = asyncio.create_task(self._write())
        self._ended = False  # nothing more is heard

    async def push(self, samples: np.ndarray) -> None:
        """``samples [n]`` float32 at 16 kHz. Raises ServiceBusy, MediaError, RuntimeFailure."""
        if self._ended:
            return
        for event in await asyncio.to_thread(self._detector.push, samples):
            await self._heard(event)
            if event.kind == "end" and self._asked.endpoint:
                await self._end()
                return

    async def finish(self) -> None:
        """The stream ended; what is left is written down while others go on. Raises as push."""
        if not self._ended:
            for event in self._detector.finish():
                await self._heard(event)
            await self._end()

    async def wait(self) -> None:
        """Until the transcript was sent."""
        await self._writer

    async def _end(self) -> None:
        self._ended = True
        await self._spoken.put(None)

    async def _heard(self, event: UtteranceEvent) -> None:
        if self._turn is None:
            self._turn, self._n_samples = await self._begun(), 0
        turn = self._turn
        await turn.push(event.samples)
        self._n_samples += len(event.samples)
        if event.kind not in ("cut", "end"):
            return
        self._turn = None
        if self._n_samples < MIN_CLIP:
            self._close_turn(turn)
            return
        await turn.finish()
        await self._spoken.put(turn)

    async def _begun(self) -> SpokenAnswer:
        await self._room.acquire()
        request = GenerationRequest(
            [Message("user", [self._instruction, Audio()])],
            sampling=self._server.sampling(MAX_TOKENS, temperature=0),
            pad_audio=False,
            urgent=True,
        )
        await self._server.wake()
        turn = self._server.service.listen(request)
        self._turns.add(turn)
        return turn

    def _close_turn(self, turn: SpokenAnswer) -> None:
        turn.cancel()
        self._turns.discard(turn)
        self._room.release()

    async def _write(self) -> None:
        try:
            await self._send(TranscriptStart(language=self._asked.language))
            text = ""
            while (turn := await self._spoken.get()) is not None:
                written = Trimmed(" " if text else "")
                async for chunk in turn:
                    if piece := written.push(chunk.text):
                        text += piece
                        await self._send(TranscriptChunk(piece))
                self._close_turn(turn)
            await self._send(Transcript(text, language=self._asked.language))
            await self._send(TranscriptStop())
        except Exception as error:
            self._ended = True
            self._room.release()  # nobody waits for a turn that never ends
            await self._fail(error)

    def close(self) -> None:
        """Stop; nothing more is sent."""
        self._ended = True
        for turn in self._turns:
            turn.cancel()
        self._turns.clear()
        self._writer.cancel()


class Trimmed:
    """Pieces of a text without the white space at its ends; ``before`` comes before the first.

    >>> trimmed = Trimmed(", ")
    >>> [trimmed.push(piece) for piece in (" a", " ", "b\\n", "")]
    [', a', '', ' b', '']
    """

    def __init__(self, before: str = ""):
        self._before, self._held, self._begun = before, "", False

    def push(self, text: str) -> str:
        text = self._held + text
        if not self._begun:
            text = text.lstrip()
        out = text.rstrip()
        self._held = text[len(out) :]
        if out and not self._begun:
            self._begun, out = True, self._before + out
        return out
