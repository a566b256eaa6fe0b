"""One model for many callers: a bounded queue, and one worker thread that drives the token loop.

In: whole conversations, and turns that are still being spoken, from any number of tasks of an event
loop. Out: answers, chunk by chunk. Up to ``n_seq_max`` of them are generated together, one decode
per token for all, and between two of them at most one ubatch of somebody's prompt. Nothing is kept
for a caller; what a conversation shares with an earlier one is reused from the KV cache all the
same. Pictures and sound are encoded by a second thread, one at a time, for those who have a lane
already, so that the plan's memory is never exceeded. This module knows no protocol.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from edge_gemma.bundles.manifest import require, require_embedding, require_generation
from edge_gemma.conversation.generation import Lane, TokenLoop
from edge_gemma.conversation.session import Session
from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import (
    Cancelled,
    EdgeGemmaError,
    RuntimeFailure,
    ServiceBusy,
    UsageError,
    first_line,
)
from edge_gemma.hearing.encoder import Encoder
from edge_gemma.messages import Image
from edge_gemma.options import Sampling
from edge_gemma.prompts.calls import tool_schema
from edge_gemma.serve.answer import Answer, GenerationRequest, Observer
from edge_gemma.serve.lanes import Counts, Heard, Running, Slot, running_slot, slot
from edge_gemma.serve.prompting import Prompting, n_positions
from edge_gemma.serve.rules import Rules
from edge_gemma.serve.spoken import SpokenAnswer
from edge_gemma.spans import Rows, Span

if TYPE_CHECKING:
    from edge_gemma.model import Model

log = logging.getLogger("edge_gemma.serve")
_AnAnswer = TypeVar("_AnAnswer", bound=Answer)

# a session is continued when at least this share of the prompt is in its cache already
REUSED_SHARE = 0.25
_CUT_OFF = "the server is shutting down; the answer was cut off"
_LAST_CUT_S = 5.0  # for what was cut off to end


@dataclass(frozen=True)
class Health:
    """What a service does. ``ready``: it takes requests now. Counts are since it was opened."""

    live: bool
    ready: bool
    n_lanes: int
    n_running: int
    n_waiting: int
    max_waiting: int
    n_answered: int
    n_failed: int
    n_cancelled: int
    n_refused: int
    prompt_tokens: int
    reused_tokens: int
    completion_tokens: int


class Service:
    """Many conversations on one model. Close it before the model.

    ``max_waiting`` requests wait beside those that are generated; beyond it :meth:`submit` raises
    ServiceBusy. ``n_urgent`` of the lanes are kept for urgent requests, so that a spoken turn finds
    one free while texts are generated. ``max_context`` (tokens) is what one conversation may take
    of the plan's context. ``observers`` are told what happens, ``rules`` may refuse. The model is
    the service's alone while it is open.

    >>> import asyncio
    >>> async def ask(service, text):
    ...     request = GenerationRequest(prompt=text, sampling=Sampling(max_tokens=2))
    ...     async with service.submit(request) as answer:
    ...         chunks = [chunk async for chunk in answer]
    ...     return chunks[-1].finish_reason, await service.close()
    >>> async def main():
    ...     return await ask(Service(model), "abc")
    >>> asyncio.run(main())
    ('length', True)
    """

    def __init__(
        self,
        model: Model,
        *,
        max_waiting: int = 32,
        n_urgent: int = 0,
        max_context: int | None = None,
        observers: Sequence[Observer] = (),
        rules: Rules | None = None,
    ):
        self.max_waiting, self.n_urgent = max_waiting, n_urgent
        self.n_lanes = model.plan.settings.n_seq_max
        if not 0 <= n_urgent < self.n_lanes:
            raise UsageError(
                f"{n_urgent} of {self.n_lanes} lanes cannot be kept for urgent requests; load with "
                f"n_seq_max ≥ {n_urgent + 1}"
            )
        self._max_context = max_context or sys.maxsize
        self._observers, self._rules = observers, rules
        self._changed = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._open: set[Answer] = set()  # not closed by their readers
        self._running: dict[int, Running] = {}  # by the lane's index
        # a bundle that embeds generates nothing: it has no lanes, and no worker is needed
        self._embeds = model.bundle.manifest.embedding is not None
        self._n_embedding = 0  # requests that are embedded or wait for it
        self._counts = Counts()
        self._encoding: dict[Answer, Future[GenerationRequest]] = {}
        self._listening: list[Heard] = []  # the one whose turn it is first
        self._beginning: Answer | None = None  # the worker makes its prompt
        self._encoders = ThreadPoolExecutor(1, thread_name_prefix="edge-gemma-encode")
        self._closing = self._cut_off = False
        self.resume(model)

    # for callers

    def submit(self, request: GenerationRequest) -> Answer:
        """Queue a request → its answer; read it inside ``async with``. Call it in an event loop.

        Raises ServiceBusy (the queue is full, or the service is closing), UsageError,
        UnsupportedModel (a bundle that embeds).
        """
        require_generation(self.model.bundle.manifest)
        if (request.prompt is None) == (not request.messages):
            raise UsageError("give messages or a prompt, and not both")
        return self._queued(request, Answer)

    def listen(self, request: GenerationRequest) -> SpokenAnswer:
        """Queue a turn that is still being spoken: the last message holds one ``Audio()``. Call it
        in an event loop, then push samples while the prompt is prefilled.

        Raises what :meth:`submit` raises, and UnsupportedModel (a bundle that cannot hear).
        """
        require(self.model.bundle.manifest, "audio")
        if len([part for part in request.media if part.source is None]) != 1:
            raise UsageError("a spoken turn is a message with one Audio() that is still to come")
        if len(request.media) > 1:
            raise UsageError("a spoken turn takes earlier pictures and clips as soft tokens only")

        def spoken(
            request: GenerationRequest, place: int, on_closed: Callable[[Answer], None]
        ) -> SpokenAnswer:
            encoders = (self._encoders, self._open_stream, self._notify)
            waits = self.model.senses.hears_first
            return SpokenAnswer(request, place, on_closed, *encoders, waits=waits)

        return self._queued(request, spoken)

    def _queued(self, request: GenerationRequest, make: Callable[..., _AnAnswer]) -> _AnAnswer:
        rules = None if request.scoring else self._rules
        if rules is not None:
            rules.check(request)
        with self._changed:
            self._check_admission(request.urgent)
            place = max(0, len(self._waiting) + 1 - self._n_free(request.urgent))
            answer = make(request, place, self._closed)
            answer.watched(() if request.scoring else self._observers)
            answer.screen = None if rules is None else rules.screen(answer)
            self._waiting.append(answer)
            self._open.add(answer)
            self._changed.notify()
        return answer

    async def embed(
        self,
        texts: Sequence[str],
        *,
        kind: str | None = None,
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> np.ndarray:
        """:meth:`Model.embed` for many callers: one request after the other, in a thread of its
        own. Raises ServiceBusy, UsageError, UnsupportedModel (a bundle that generates text).
        """
        require_embedding(self.model.bundle.manifest)
        with self._changed:
            if self._closing or self._parked or self._n_embedding > self.max_waiting:
                self._counts.refused += 1
                what = "is shutting down" if self._closing else "has as many requests as may wait"
                retry_after_s = None if self._closing else 1.0
                raise ServiceBusy(f"the server {what}", retry_after_s=retry_after_s)
            self._n_embedding += 1
        try:
            embed = functools.partial(
                self.model.embed, texts, kind=kind, dimensions=dimensions, truncate=truncate
            )
            vectors = await asyncio.get_running_loop().run_in_executor(self._encoders, embed)
        except EdgeGemmaError:
            self._count_failed()
            raise
        finally:
            with self._changed:
                self._n_embedding -= 1
        with self._changed:
            self._counts.answered += 1
        return vectors

    def check_texts(self, texts: Sequence[str]) -> None:
        """What the rules say of texts that nothing is generated from. Raises what they raise."""
        if self._rules is not None:
            for text in texts:
                self._rules.check(GenerationRequest(prompt=text))

    def _open_stream(self) -> Encoder:
        return self.model.senses.audio().stream()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify()

    def _n_free(self, urgent: bool) -> int:
        """Lanes that such a request could have now."""
        busy = self._busy()
        n_free = self.n_lanes - len(busy)
        if urgent:
            return n_free
        n_kept = self.n_urgent - sum(answer.request.urgent for answer in busy)
        return max(0, n_free - max(0, n_kept))

    def _busy(self) -> list[Answer]:
        """Those that have a lane."""
        running = [running.answer for running in self._running.values()]
        listening: list[Answer] = [heard.answer for heard in self._listening]
        beginning = [] if self._beginning is None else [self._beginning]
        return list(dict.fromkeys([*running, *listening, *self._encoding, *beginning]))

    def _check_admission(self, urgent: bool) -> None:
        if self._parked and not self._closing:
            self._counts.refused += 1
            raise ServiceBusy("the model is not in memory", retry_after_s=1.0)
        if self._closing or not self._worker.is_alive():
            self._counts.refused += 1
            raise ServiceBusy("the server is shutting down")
        n_allowed = self.n_lanes + self.max_waiting
        too_many_waiting = len(self._waiting) >= self._n_free(urgent) + self.max_waiting
        # answers that are there and not read take memory, too
        if not too_many_waiting and len(self._open) < 2 * n_allowed:
            return
        self._counts.refused += 1
        waiting_s = self._counts.answer_s * (len(self._waiting) + 1) / self.n_lanes
        raise ServiceBusy(
            f"{len(self._waiting)} requests are waiting already, as many as may; try again later",
            retry_after_s=max(1.0, waiting_s),
        )

    def slots(self) -> list[Slot]:
        """What each busy lane does now; lanes that are not in it are idle."""
        with self._changed:
            encoding = [slot("encoding", answer) for answer in self._encoding]
            heard = [
                slot("listening", heard.answer, heard.session.length) for heard in self._listening
            ]
            running = [running_slot(running) for running in self._running.values()]
        return [*running, *heard, *encoding]

    def cached_tokens(self) -> int:
        """Positions that the KV cache holds, of busy lanes and of idle ones."""
        with self._changed:
            busy = [running.session for running in self._running.values()]
            sessions = [*busy, *(heard.session for heard in self._listening), *self._idle]
        return sum(session.length for session in sessions)

    def health(self) -> Health:
        with self._changed:
            counts = self._counts
            live = self._parked or self._embeds or self._worker.is_alive()
            return Health(
                live=live,
                ready=live and not self._closing and len(self._waiting) < self.max_waiting,
                n_lanes=self.n_lanes,
                n_running=len(self._busy()) + min(1, self._n_embedding),
                n_waiting=len(self._waiting) + max(0, self._n_embedding - 1),
                max_waiting=self.max_waiting,
                n_answered=counts.answered,
                n_failed=counts.failed,
                n_cancelled=counts.cancelled,
                n_refused=counts.refused,
                prompt_tokens=counts.prompt_tokens,
                reused_tokens=counts.reused_tokens,
                completion_tokens=counts.completion_tokens,
            )

    def resume(self, model: Model) -> None:
        """Have this model, which is loaded as the one before it was."""
        self.model = model
        self.n_ctx = min(model.plan.settings.n_ctx, self._max_context)
        n_sessions = 0 if self._embeds else self.n_lanes
        # longest idle first
        self._idle = [Session(model.sequences) for _ in range(n_sessions)]
        self._prompting = Prompting(model, self.n_ctx)
        self._parked = False
        self._worker = threading.Thread(target=self._work, name="edge-gemma-serve", daemon=True)
        if not self._embeds:
            self._worker.start()

    @property
    def parked(self) -> bool:
        """Whether it has no model in memory, or will have none in a moment."""
        return self._parked

    async def park(self) -> None:
        """Answer what was submitted, then close the model; :meth:`resume` brings another. Until
        then :meth:`submit` raises ServiceBusy.
        """
        with self._changed:
            self._parked = True
            self._changed.notify()
        if not self._embeds:
            await asyncio.to_thread(self._worker.join)
        self._idle = []
        # behind what the encoders still have to do
        await asyncio.get_running_loop().run_in_executor(self._encoders, self.model.close)

    async def close(self, timeout_s: float = 10.0) -> bool:
        """Take nothing more, refuse what waits, and let the running answers end for at most
        ``timeout_s``; what runs then is cut off, and its reader gets ServiceBusy.

        False when the worker is still busy 5 s later (in an encoder, which cannot be stopped): do
        not close the model then.
        """
        with self._changed:
            self._closing = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for answer in waiting:
            answer.end(ServiceBusy("the server is shutting down"))
        if self._embeds:
            await asyncio.to_thread(self._encoders.shutdown, cancel_futures=True)
            return True
        await asyncio.to_thread(self._worker.join, timeout_s)
        if self._worker.is_alive():
            with self._changed:
                self._cut_off = True
                cut_off = self._busy()
                self._changed.notify()
            for answer in cut_off:
                answer.stop_session()
            await asyncio.to_thread(self._worker.join, _LAST_CUT_S)
        if self._worker.is_alive():
            return False
        self._encoders.shutdown()
        return True

    def _closed(self, answer: Answer) -> None:
        """The reader of an answer left."""
        with self._changed:
            self._open.discard(answer)
            if answer in self._waiting:
                self._waiting.remove(answer)
                self._counts.cancelled += 1
                answer.end()
            if answer in self._encoding:
                self._encoding[answer].cancel()
            self._changed.notify()

    # the worker

    def _work(self) -> None:
        loop = self._new_loop()
        while self._wait_for_work():
            try:
                self._admit(loop)
                self._hear(loop)
                self._stop_abandoned()
                for lane, chunk in loop.step():
                    self._deliver(lane, chunk)
            except Exception as error:  # whatever it is, the next request must find a service
                log.exception("the token loop failed; it begins anew")
                self._fail_all(loop, error)
                loop = self._new_loop()
        self._close_sessions()

    def _new_loop(self) -> TokenLoop:
        sequences = self.model.sequences
        return TokenLoop(
            sequences.decoder,
            sequences.context,
            sequences.weights,
            shared=True,
            drafts=sequences.drafts,
        )

    def _wait_for_work(self) -> bool:
        """False when the service is closed and nothing runs."""
        with self._changed:
            while not self._has_work():
                if (self._closing or self._parked) and not self._busy():
                    return False
                self._changed.wait()
            return True

    def _has_work(self) -> bool:
        if self._running or self._next() is not None:
            return True
        if self._cut_off and self._listening:
            return True
        encoded = any(future.done() for future in self._encoding.values())
        return encoded or any(heard.has_work for heard in self._listening)

    def _next(self) -> Answer | None:
        """The first of those that wait and may have a lane now; urgent ones before others."""
        for urgent in (True, False):
            if self._n_free(urgent):
                for answer in self._waiting:
                    if answer.request.urgent == urgent and not self._must_wait(answer):
                        return answer
        return None

    def _must_wait(self, answer: Answer) -> bool:
        """Whether a picture's encoder would take the place of one that hears a turn."""
        if not (self._listening and self.model.senses.one_at_a_time):
            return False
        return any(isinstance(part, Image) for part in answer.request.media)

    def _admit(self, loop: TokenLoop) -> None:
        """Begin what was encoded, else the next request, if there is one and a lane for it."""
        with self._changed:
            encoded = [answer for answer, future in self._encoding.items() if future.done()]
            answer = encoded[0] if encoded else self._next()
            if answer is None:
                return
            if encoded:
                future = self._encoding.pop(answer)
            else:
                self._waiting.remove(answer)
            self._beginning = answer
        try:
            if encoded:
                self._attempt(answer, lambda: self._start(loop, answer, future.result()))
            else:
                self._attempt(answer, lambda: self._begin(loop, answer))
        finally:
            with self._changed:
                self._beginning = None

    def _attempt(
        self, answer: Answer, begin: Callable[[], None], session: Session | None = None
    ) -> None:
        """What goes wrong ends the answer, and nobody else's; a ``session`` it had is idle then."""
        try:
            if answer.stopped:
                raise Cancelled(0)
            begin()
            return
        except (Cancelled, CancelledError):
            self._count_cancelled()
            answer.put(Chunk("", finish_reason="cancelled"))
            answer.end()
        except EdgeGemmaError as error:
            self._count_failed()
            answer.end(error)
        except Exception as error:
            log.exception("a request failed")
            self._count_failed()
            answer.end(_internal(error))
        if session is not None:
            self._idle.append(session)

    def _begin(self, loop: TokenLoop, answer: Answer) -> None:
        """The answer has a lane from here on."""
        request = answer.request
        answer.began_s = time.perf_counter()
        self.model.decoder.check(request.sampling)
        if isinstance(answer, SpokenAnswer):
            self._begin_listening(answer)
        elif request.media or (self._rules is not None and self._rules.judges):
            future = self._encoders.submit(self._encoded, request)
            with self._changed:
                self._encoding[answer] = future
            future.add_done_callback(lambda _: self._notify())
        else:
            self._start(loop, answer, request)

    def _encoded(self, request: GenerationRequest) -> GenerationRequest:
        if self._rules is not None and not request.scoring:
            self._rules.judge(request)
        return self._prompting.encoded(request)

    def _start(self, loop: TokenLoop, answer: Answer, request: GenerationRequest) -> None:
        """The generation begins; ``request`` has its media as soft tokens."""
        spans, dropped = self._prompting.spans(request)
        session = self._take_session(spans)
        try:
            n_stable = 0
            if session.shared(spans) < n_positions(spans) // 2:
                n_stable = self.model.prompt.stable_length(request.messages, tools=request.tools)
            session.replace(spans, n_stable=n_stable)
            self._run(loop, answer, session, dropped)
        except BaseException:
            self._idle.append(session)
            raise

    def _run(self, loop: TokenLoop, answer: Answer, session: Session, dropped: int) -> None:
        request = answer.request
        sampling = self._bounded(_with_calls(request), session.length)
        lane = loop.add(session, sampling, urgent=request.urgent)
        answer.begin(session)
        with self._changed:
            self._running[lane.index] = Running(answer, session, dropped, lane)

    def _bounded(self, sampling: Sampling, n_prompt: int) -> Sampling:
        """At most what ``max_context`` leaves; the plan's own context bounds itself."""
        n_left = max(1, self.n_ctx - n_prompt)
        if self.n_ctx == self.model.plan.settings.n_ctx or sampling.max_tokens <= n_left:
            return sampling
        return replace(sampling, max_tokens=n_left)

    # turns that are being spoken

    def _begin_listening(self, answer: SpokenAnswer) -> None:
        fitted = self._prompting.listening(answer.request)
        session = self._take_session(fitted.rendered.before)
        session.replace(fitted.rendered.before)
        answer.begin(session)
        with self._changed:
            heard = Heard(answer, session, fitted.rendered.after, fitted.dropped)
            self._listening.append(heard)
        answer.has_lane()

    def _hear(self, loop: TokenLoop) -> None:
        """At most one ubatch of one turn that is being spoken, in turns."""
        with self._changed:
            heard = next((heard for heard in self._listening if heard.has_work), None)
        if heard is None:
            return
        heard.goes_on = False
        self._attempt(heard.answer, lambda: self._advance(loop, heard), heard.session)
        with self._changed:
            self._listening.remove(heard)
            if heard.goes_on:
                self._listening.append(heard)

    def _advance(self, loop: TokenLoop, heard: Heard) -> None:
        session = heard.session
        rows, spoken = heard.answer.take_rows()
        for block in rows:
            session.append([Rows(block)], prefill=False)
            heard.n_rows += len(block)
        if spoken:
            session.append(heard.after(heard.n_rows), prefill=False)
            self._run(loop, heard.answer, session, heard.dropped_turns)
            return
        # where the plan hears first, all of it waits for the last sample
        heard.filled = self.model.senses.hears_first or self._filled(session)
        heard.goes_on = True

    def _filled(self, session: Session) -> bool:
        """One ubatch of what was appended → whether nothing is left."""
        try:
            return session.prefill_step("none")
        except Cancelled:
            return False  # if it was this one's, the next look ends it

    def _take_session(self, spans: Sequence[Span]) -> Session:
        """The idle session that has most of the prompt in its cache, else the one that is idle
        longest.
        """
        shared = [session.shared(spans) for session in self._idle]
        best = max(range(len(shared)), key=shared.__getitem__)
        if shared[best] < REUSED_SHARE * n_positions(spans):
            best = 0
        return self._idle.pop(best)

    def _stop_abandoned(self) -> None:
        """Cancel what was to be stopped before its generation began."""
        for running in self._running.values():
            if running.answer.stopped or self._cut_off:
                running.answer.stop_session()
        if not self._cut_off:
            return
        with self._changed:
            listening, self._listening = self._listening, []
        for heard in listening:
            heard.answer.end(ServiceBusy(_CUT_OFF))
            self._idle.append(heard.session)

    def _deliver(self, lane: Lane, chunk: Chunk) -> None:
        running = self._running[lane.index]
        answer = running.answer
        if not chunk.finish_reason:
            answer.put(chunk)
            return
        with self._changed:
            del self._running[lane.index]
            self._counts.ended(chunk, answer)
        if lane.error is not None:
            # what the engine's cache holds behind the failure is not known
            running.session.close(keep=False)
            self._idle.insert(0, Session(self.model.sequences))
            answer.end(lane.error)
            return
        self._idle.append(running.session)
        if self._cut_off and chunk.finish_reason == "cancelled" and not answer.stopped:
            answer.end(ServiceBusy(_CUT_OFF))
            return
        if running.dropped_turns and chunk.usage:
            usage = replace(chunk.usage, dropped_turns=running.dropped_turns)
            chunk = replace(chunk, usage=usage)
        answer.put(chunk)
        answer.end()

    def _count_cancelled(self) -> None:
        with self._changed:
            self._counts.cancelled += 1

    def _count_failed(self) -> None:
        with self._changed:
            self._counts.failed += 1

    def _fail_all(self, loop: TokenLoop, error: Exception) -> None:
        with self._changed:
            failed = list(self._running.values())
            self._running.clear()
            self._counts.failed += len(failed)
        try:
            loop.close()
        except Exception:
            log.exception("the token loop could not be closed")
        for running in failed:
            running.session.close(keep=False)
            self._idle.insert(0, Session(self.model.sequences))
            running.answer.end(_internal(error))

    def _close_sessions(self) -> None:
        for session in self._idle:
            session.close()


def _with_calls(request: GenerationRequest) -> Sampling:
    """With tools a call that begins is held to what they take, whatever else is said."""
    sampling = request.sampling
    if not request.tools or sampling.schema is not None or sampling.grammar is not None:
        return sampling
    return replace(sampling, call_schema=tool_schema(request.tools))


def _internal(error: Exception) -> EdgeGemmaError:
    if isinstance(error, EdgeGemmaError):
        return error
    return RuntimeFailure(f"the server failed on this request: {first_line(error)}; see its log")
