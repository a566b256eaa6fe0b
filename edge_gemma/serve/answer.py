"""A request to a service, and its answer on the way from the worker thread to an event loop.

In: chunks, put by the worker. Out: an async iterator for one reader. The buffer between them is
bounded: a reader that falls behind gets fewer, larger chunks, and holds nobody up.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from edge_gemma.conversation.session import Session
from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import EdgeGemmaError
from edge_gemma.hearing.samples import RATE_HZ
from edge_gemma.messages import Audio, Image, Message, Part
from edge_gemma.options import Sampling
from edge_gemma.serve.visit import Visit, current_visit

log = logging.getLogger("edge_gemma.serve")
BUFFERED_CHUNKS = 64


@dataclass(frozen=True)
class GenerationRequest:
    """What to answer: a whole conversation (``messages``), or a text or parts to continue
    (``prompt``). Exactly one of both is given.

    ``tools`` are described in the prompt. ``truncate`` forgets the oldest turns of a conversation
    that does not fit the context; without, it is refused. ``pad_audio`` fills each clip to 188 rows
    as transformers does. ``urgent`` requests (a person waits for what was spoken) go before others.
    ``scoring`` ones are the server's own: counted nowhere, held to no rule.
    """

    messages: Sequence[Message] = ()
    prompt: str | Sequence[Part] | None = None
    sampling: Sampling = Sampling()
    tools: Sequence[Mapping] = ()
    truncate: bool = False
    pad_audio: bool = True
    urgent: bool = False
    scoring: bool = False

    @property
    def media(self) -> list[Image | Audio]:
        """The pictures and sounds that must be encoded before the prompt is known."""
        contents = [self.prompt or (), *(message.content for message in self.messages)]
        parts = [part for content in contents if not isinstance(content, str) for part in content]
        return [part for part in parts if isinstance(part, Image | Audio) and part.rows is None]


class Observer:
    """Who is told what happens. Called by the worker and by the event loop: be quick, and lock.

    Each method does nothing here; what one raises is logged and disturbs nobody.
    """

    def submitted(self, answer: Answer) -> None:
        """It is about to be queued; its request may still be changed."""

    def generated(self, answer: Answer, chunk: Chunk) -> None:
        """The worker made a chunk."""

    def ended(self, answer: Answer) -> None:
        """Nothing more comes; the answer has its figures."""

    def visited(self, visit: Visit) -> None:
        """An HTTP request was answered, or its client left."""


class Screen(Protocol):
    """Looks at an answer before its reader does."""

    async def passed(self, chunk: Chunk) -> Chunk | None:
        """What may be read now of the chunks so far; None: nothing yet."""

    @property
    def closed(self) -> bool:
        """Whether no text passes any more."""


class Answer:
    """The chunks of one answer: ``async with answer: async for chunk in answer: …``.

    Leaving the ``async with`` early (or :meth:`cancel`) stops the generation within one token.
    Iterating raises what the request failed with: UsageError, MediaError, ContextFull,
    UnsupportedModel, RuntimeFailure, ServiceBusy (the service was closed).

    ``place`` is how many requests stood before it when it was submitted; 0 began at once.
    """

    def __init__(self, request: GenerationRequest, place: int, on_closed: Callable[[Answer], None]):
        self.request, self.place = request, place
        self.visit = current_visit.get()  # the HTTP request it is for
        self.screen: Screen | None = None
        self._observers: Sequence[Observer] = ()
        self._hides_logprobs = False
        # by time.perf_counter: in the queue, out of it, its first token, its end
        self.submitted_s = self.asked_s = time.perf_counter()  # asked: when all of it was there
        self.began_s: float | None = None
        self.first_s: float | None = None
        self.ended_s: float | None = None
        self.n_tokens = 0  # generated so far
        self.last: Chunk | None = None  # the one with the figures
        self.error: EdgeGemmaError | None = None
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._chunks: deque[Chunk] = deque()
        self._ended = False
        self._stopped = threading.Event()
        self._session: Session | None = None

    def watched(self, observers: Sequence[Observer]) -> None:
        """Tell these from here on. Before it is queued."""
        self._observers = observers
        self._tell(lambda observer: observer.submitted(self))

    def with_hidden_logprobs(self) -> None:
        """Have the worker find the tokens' log-probabilities for observers; a reader who did not
        ask for them does not see them. Before it is queued.
        """
        if self.request.sampling.logprobs is None:
            sampling = replace(self.request.sampling, logprobs=0)
            self.request = replace(self.request, sampling=sampling)
            self._hides_logprobs = True

    @property
    def audio_s(self) -> float:
        """Seconds of sound in the request."""
        clips = [part.source for part in self.request.media if isinstance(part, Audio)]
        samples = [len(clip) for clip in clips if isinstance(clip, np.ndarray)]
        return sum(samples) / RATE_HZ

    # the reader's side

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Chunk:
        if self.screen is None:
            return await self._next()
        while True:
            chunk = await self.screen.passed(await self._next())
            if self.screen.closed:
                self.stop_session()
            if chunk is not None:
                return chunk

    async def _next(self) -> Chunk:
        while True:
            self._ready.clear()
            with self._lock:
                if self._chunks:
                    return self._chunks.popleft()
                if self.error is not None:
                    raise self.error
                if self._ended:
                    raise StopAsyncIteration
            await self._ready.wait()

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Nobody reads any more: stop within one token. From any thread, any number of times."""
        self._stopped.set()
        with self._lock:
            self._chunks.clear()
            if self._session is not None:
                self._session.cancel()
        self._on_closed(self)

    @property
    def stopped(self) -> bool:
        """Whether its reader went away."""
        return self._stopped.is_set()

    # the worker's side

    def begin(self, session: Session) -> None:
        """From here on :meth:`cancel` stops this session."""
        self.began_s = self.began_s or time.perf_counter()
        with self._lock:
            self._session = session

    def stop_session(self) -> None:
        """What :meth:`cancel` asked for before the session's generation began."""
        with self._lock:
            if self._session is not None:
                self._session.cancel()

    def put(self, chunk: Chunk) -> None:
        self.n_tokens += len(chunk.token_ids)
        if self.first_s is None and chunk.token_ids:
            self.first_s = time.perf_counter()
        if chunk.finish_reason:
            self.last = chunk
        self._tell(lambda observer: observer.generated(self, chunk))
        if self._hides_logprobs:
            chunk = replace(chunk, logprobs=())
        with self._lock:
            if len(self._chunks) >= BUFFERED_CHUNKS:
                chunk = joined(self._chunks.pop(), chunk)
            self._chunks.append(chunk)
        self._wake()

    def end(self, error: EdgeGemmaError | None = None) -> None:
        """Nothing more comes; ``error`` is raised behind the last chunk."""
        with self._lock:
            self._session = None
            self._ended, self.error = True, error
        self.ended_s = time.perf_counter()
        self._note_for_visit()
        self._tell(lambda observer: observer.ended(self))
        self._wake()

    @property
    def outcome(self) -> str:
        """failed, cancelled, or how the answer finished."""
        if self.error is not None:
            return "failed"
        return (self.last and self.last.finish_reason) or "cancelled"

    def _note_for_visit(self) -> None:
        if self.visit is None:
            return
        usage = self.last.usage if self.last else None
        self.visit.prompt_tokens += usage.prompt_tokens if usage else 0
        self.visit.completion_tokens += self.n_tokens
        self.visit.finish_reasons.append(self.outcome)

    def _tell(self, call: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                call(observer)
            except Exception:
                log.exception("%s failed", type(observer).__name__)

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the event loop was closed: nobody reads
            self._stopped.set()


def joined(first: Chunk, second: Chunk) -> Chunk:
    return replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
    )
