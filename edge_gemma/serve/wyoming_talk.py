"""Text over Wyoming: a conversation (``handle``), and reading aloud (``tts``).

In: texts, whole or in pieces. Out: ``handled-start/-chunk/-stop`` and ``handled``; or sound. A
client names the conversation and sends only what was said last, so what was said before is kept
here, within bounds.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.event import Eventable
from wyoming.handle import Handled, HandledChunk, HandledStart, HandledStop
from wyoming.tts import SynthesizeStopped, SynthesizeVoice

from edge_gemma.conversation.clauses import Sentences
from edge_gemma.conversation.voice import Synthesizer, espeak
from edge_gemma.errors import UsageError
from edge_gemma.messages import Message
from edge_gemma.serve.answer import GenerationRequest
from edge_gemma.serve.bodies import Server
from edge_gemma.serve.wyoming_asr import Trimmed

Send = Callable[[Eventable], Awaitable[None]]
MAX_CHARACTERS = 16_000  # of one text
_MAX_TOKENS = 512  # of an answer that is spoken
_MAX_CONVERSATIONS = 32  # the longest unused is forgotten
_KEPT_CHARACTERS = 32_000  # of one conversation; its oldest turns are forgotten
_CHUNK_SAMPLES = 4096  # of what is read aloud


def checked_text(text: object) -> str:
    """Raises UsageError for what is no text, is blank, or is too long."""
    if not isinstance(text, str) or not text.strip():
        raise UsageError("the text is empty; there is nothing to answer or to read")
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"the text has {len(text)} characters; at most {MAX_CHARACTERS} are taken")
    return text


class Conversations:
    """What was said, by the client's name for the conversation. ``system`` stands before each."""

    def __init__(self, server: Server, system: str | None = None):
        self._server = server
        self._system = [Message("system", system)] if system else []
        self._said: OrderedDict[str, list[Message]] = OrderedDict()

    async def answer(self, text: str, context: Mapping[str, Any] | None, send: Send) -> None:
        """Answer within the conversation that ``context`` names, piece by piece. Raises UsageError,
        ServiceBusy, ContextFull, RuntimeFailure.
        """
        name = (context or {}).get("conversation_id")
        before = self._said.get(name, []) if isinstance(name, str) else []
        messages = [*self._system, *before, Message("user", checked_text(text))]
        request = GenerationRequest(
            messages, sampling=self._server.sampling(_MAX_TOKENS), truncate=True, urgent=True
        )
        pieces: list[str] = []
        written = Trimmed()
        await self._server.wake()
        async with self._server.service.submit(request) as answer:
            await send(HandledStart(context=_plain(context)))
            async for chunk in answer:
                if piece := written.push(chunk.text):
                    pieces.append(piece)
                    await send(HandledChunk(piece))
        said = "".join(pieces)
        if isinstance(name, str):
            self._keep(name[:200], [*messages[len(self._system) :], Message("assistant", said)])
        await send(Handled(said, context=_plain(context)))
        await send(HandledStop())

    def _keep(self, name: str, messages: list[Message]) -> None:
        while len(messages) > 2 and sum(len(m.content) for m in messages) > _KEPT_CHARACTERS:
            messages = messages[2:]
        self._said[name] = messages
        self._said.move_to_end(name)
        while len(self._said) > _MAX_CONVERSATIONS:
            self._said.popitem(last=False)


def _plain(context: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if context is None else dict(context)


class Reading:
    """A text that is read aloud sentence by sentence, while it still comes. ``voice`` is one of
    ``voices`` (the first that fits where only a language is given). Raises UsageError.
    """

    def __init__(self, voice: SynthesizeVoice | None, voices: Mapping[str, str], send: Send):
        self._synthesize = _synthesizer(voice or SynthesizeVoice(), voices)
        self._send, self._sentences = send, Sentences()
        self._n_characters, self._rate_hz = 0, 0

    async def push(self, text: object) -> None:
        """Raises UsageError, RuntimeFailure (the synthesizer failed)."""
        if not isinstance(text, str):
            raise UsageError(f"a text is expected, not {type(text).__name__}")
        self._n_characters += len(text)
        if self._n_characters > MAX_CHARACTERS:
            raise UsageError(f"the text has more than {MAX_CHARACTERS} characters")
        for sentence in self._sentences.push(text):
            await self._read(sentence)

    async def finish(self, *, streamed: bool) -> None:
        """The rest. ``streamed``: say, too, that everything was read."""
        for sentence in self._sentences.finish():
            await self._read(sentence)
        if not self._rate_hz:
            raise UsageError("the text is empty; there is nothing to answer or to read")
        await self._send(AudioStop())
        if streamed:
            await self._send(SynthesizeStopped())

    async def _read(self, sentence: str) -> None:
        samples, rate_hz = await asyncio.to_thread(self._synthesize, sentence)
        if not self._rate_hz:
            self._rate_hz = rate_hz
            await self._send(AudioStart(rate_hz, 2, 1))
        pcm = (np.clip(samples, -1, 32767 / 32768) * 32768).astype("<i2")
        for start in range(0, len(pcm), _CHUNK_SAMPLES):
            block = pcm[start : start + _CHUNK_SAMPLES].tobytes()
            await self._send(AudioChunk(rate_hz, 2, 1, block))


def _synthesizer(voice: SynthesizeVoice, voices: Mapping[str, str]) -> Synthesizer:
    asked = voice.name or voice.language or "en"
    code = str(asked).lower().replace("_", "-")
    if code in voices:
        return espeak(code)
    language = code.partition("-")[0]
    if any(known.partition("-")[0] == language for known in voices):
        return espeak(language)  # which of its accents is espeak-ng's choice
    raise UsageError(f"no voice {str(asked)[:40]!r} is installed; see the server's info")
