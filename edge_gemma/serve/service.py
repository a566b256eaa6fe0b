"""One model for many callers: a bounded queue, and one worker thread that drives the token loop.

In: whole conversations, from any number of tasks of an event loop. Out: answers, chunk by chunk. Up
to ``n_seq_max`` of them are generated together, one decode per token for all. Nothing is kept for a
caller; what a conversation shares with an earlier one is reused from the KV cache all the same.
Encoding pictures and sound, prefill and decode are done by the one worker, so that the plan's
memory is never exceeded. This module knows no protocol.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edge_gemma.conversation.fitting import fit
from edge_gemma.conversation.generation import Lane, TokenLoop
from edge_gemma.conversation.session import Session
from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import (
    Cancelled,
    ContextFull,
    EdgeGemmaError,
    RuntimeFailure,
    ServiceBusy,
    UsageError,
    first_line,
)
from edge_gemma.messages import Message
from edge_gemma.serve.answer import Answer, GenerationRequest
from edge_gemma.spans import Span

if TYPE_CHECKING:
    from edge_gemma.model import Model

log = logging.getLogger("edge_gemma.serve")

# a session is continued when at least this share of the prompt is in its cache already
REUSED_SHARE = 0.25
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


@dataclass
class _Counts:
    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    answer_s: float = 0.0  # seconds from leaving the queue to the end, of recent answers on average


@dataclass
class _Running:
    answer: Answer
    session: Session
    dropped_turns: int


class Service:
    """Many conversations on one model. Close it before the model.

    ``max_waiting`` requests wait beside those that are generated; beyond it :meth:`submit` raises
    ServiceBusy. The model is the service's alone while it is open.

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

    def __init__(self, model: Model, *, max_waiting: int = 32):
        self.model, self.max_waiting = model, max_waiting
        self.n_lanes = model.plan.settings.n_seq_max
        self.n_ctx = model.plan.settings.n_ctx
        self._changed = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._open: set[Answer] = set()  # not closed by their readers
        self._running: dict[int, _Running] = {}  # by the lane's index
        self._idle = [Session(model.sequences) for _ in range(self.n_lanes)]  # longest idle first
        self._counts = _Counts()
        self._preparing = 0  # 1 while the worker makes a request's prompt
        self._closing = self._cut_off = False
        self._worker = threading.Thread(target=self._work, name="edge-gemma-serve", daemon=True)
        self._worker.start()

    # for callers

    def submit(self, request: GenerationRequest) -> Answer:
        """Queue a request → its answer; read it inside ``async with``. Call it in an event loop.

        Raises ServiceBusy (the queue is full, or the service is closing), UsageError.
        """
        if (request.prompt is None) == (not request.messages):
            raise UsageError("give messages or a prompt, and not both")
        with self._changed:
            self._check_admission()
            n_busy = len(self._running) + self._preparing + len(self._waiting)
            place = max(0, n_busy + 1 - self.n_lanes)
            answer = Answer(request, place, self._closed)
            self._waiting.append(answer)
            self._open.add(answer)
            self._changed.notify()
        return answer

    def _check_admission(self) -> None:
        if self._closing or not self._worker.is_alive():
            self._counts.refused += 1
            raise ServiceBusy("the server is shutting down")
        n_free = self.n_lanes - len(self._running) - self._preparing
        n_allowed = self.n_lanes + self.max_waiting
        too_many_waiting = len(self._waiting) >= max(0, n_free) + self.max_waiting
        # answers that are there and not read take memory, too
        if not too_many_waiting and len(self._open) < 2 * n_allowed:
            return
        self._counts.refused += 1
        waiting_s = self._counts.answer_s * (len(self._waiting) + 1) / self.n_lanes
        raise ServiceBusy(
            f"{len(self._waiting)} requests are waiting already, as many as may; try again later",
            retry_after_s=max(1.0, waiting_s),
        )

    def health(self) -> Health:
        with self._changed:
            counts, live = self._counts, self._worker.is_alive()
            return Health(
                live=live,
                ready=live and not self._closing and len(self._waiting) < self.max_waiting,
                n_lanes=self.n_lanes,
                n_running=len(self._running) + self._preparing,
                n_waiting=len(self._waiting),
                max_waiting=self.max_waiting,
                n_answered=counts.answered,
                n_failed=counts.failed,
                n_cancelled=counts.cancelled,
                n_refused=counts.refused,
                prompt_tokens=counts.prompt_tokens,
                reused_tokens=counts.reused_tokens,
                completion_tokens=counts.completion_tokens,
            )

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
        await asyncio.to_thread(self._worker.join, timeout_s)
        if self._worker.is_alive():
            with self._changed:
                self._cut_off = True
                cut_off = [running.answer for running in self._running.values()]
            for answer in cut_off:
                answer.stop_session()
            await asyncio.to_thread(self._worker.join, _LAST_CUT_S)
        return not self._worker.is_alive()

    def _closed(self, answer: Answer) -> None:
        """The reader of an answer left."""
        with self._changed:
            self._open.discard(answer)
            if answer in self._waiting:
                self._waiting.remove(answer)
                self._counts.cancelled += 1
            self._changed.notify()

    # the worker

    def _work(self) -> None:
        loop = self._new_loop()
        while self._wait_for_work():
            try:
                self._admit(loop)
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
        return TokenLoop(sequences.decoder, sequences.context, sequences.weights, shared=True)

    def _wait_for_work(self) -> bool:
        """False when the service is closed and nothing runs."""
        with self._changed:
            while not self._running and not self._waiting:
                if self._closing:
                    return False
                self._changed.wait()
            return True

    def _admit(self, loop: TokenLoop) -> None:
        """Begin the next request, if there is one and a lane for it. One at a time, so that
        encoding for several does not keep the running ones waiting.
        """
        with self._changed:
            if not self._waiting or not self._idle:
                return
            answer = self._waiting.popleft()
            self._preparing = 1
        try:
            self._begin(loop, answer)
        except Cancelled:
            answer.put(Chunk("", finish_reason="cancelled"))
            answer.end()
        except EdgeGemmaError as error:
            self._count_failed()
            answer.end(error)
        except Exception as error:
            log.exception("a request failed")
            self._count_failed()
            answer.end(_internal(error))
        finally:
            with self._changed:
                self._preparing = 0

    def _begin(self, loop: TokenLoop, answer: Answer) -> None:
        request = answer.request
        spans, dropped = self._prompt(request)
        session = self._take_session(spans)
        try:
            n_stable = 0
            if session.shared(spans) < _length(spans) // 2:
                n_stable = self.model.prompt.stable_length(request.messages, tools=request.tools)
            session.replace(spans, n_stable=n_stable)
            lane = loop.add(session, request.sampling)
        except BaseException:
            self._idle.append(session)
            raise
        answer.begin(session)
        with self._changed:
            self._preparing = 0
            self._running[lane.index] = _Running(answer, session, dropped)

    def _take_session(self, spans: Sequence[Span]) -> Session:
        """The idle session that has most of the prompt in its cache, else the one that is idle
        longest.
        """
        shared = [session.shared(spans) for session in self._idle]
        best = max(range(len(shared)), key=shared.__getitem__)
        if shared[best] < REUSED_SHARE * _length(spans):
            best = 0
        return self._idle.pop(best)

    def _stop_abandoned(self) -> None:
        """Cancel what was to be stopped before its generation began."""
        for running in self._running.values():
            if running.answer.stopped or self._cut_off:
                running.answer.stop_session()

    def _deliver(self, lane: Lane, chunk: Chunk) -> None:
        running = self._running[lane.index]
        answer = running.answer
        if not chunk.finish_reason:
            answer.put(chunk)
            return
        with self._changed:
            del self._running[lane.index]
            self._count(chunk, answer)
        if lane.error is not None:
            # what the engine's cache holds behind the failure is not known
            running.session.close(keep=False)
            self._idle.insert(0, Session(self.model.sequences))
            answer.end(lane.error)
            return
        self._idle.append(running.session)
        if self._cut_off and chunk.finish_reason == "cancelled" and not answer.stopped:
            answer.end(ServiceBusy("the server is shutting down; the answer was cut off"))
            return
        if running.dropped_turns and chunk.usage:
            usage = replace(chunk.usage, dropped_turns=running.dropped_turns)
            chunk = replace(chunk, usage=usage)
        answer.put(chunk)
        answer.end()

    def _count(self, end: Chunk, answer: Answer) -> None:
        counts, usage = self._counts, end.usage
        if end.finish_reason == "cancelled":
            counts.cancelled += 1
        elif end.finish_reason == "failed":
            counts.failed += 1
        else:
            counts.answered += 1
        if usage is not None:
            counts.prompt_tokens += usage.prompt_tokens
            counts.reused_tokens += usage.reused_tokens
            counts.completion_tokens += usage.completion_tokens
        took_s = time.perf_counter() - (answer.began_s or answer.submitted_s)
        counts.answer_s += (took_s - counts.answer_s) / 8

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

    # prompts

    def _prompt(self, request: GenerationRequest) -> tuple[list[Span], int]:
        """The spans of a request, media encoded, and how many turns were forgotten."""
        self.model.decoder.check(request.sampling)
        n_reserve = min(request.sampling.max_tokens, self.n_ctx // 4)
        if request.prompt is not None:
            spans = self.model.spans(request.prompt)
            self._check_length(spans, n_reserve)
            return spans, 0
        messages = [self._encoded(message, n_reserve) for message in request.messages]

        def render(some: Sequence[Message]) -> list[Span]:
            return self.model.prompt.spans(some, tools=request.tools, pad_audio=request.pad_audio)

        if request.truncate:
            fitted = fit(messages, render, _length, n_ctx=self.n_ctx, n_reserve=n_reserve)
            return fitted.rendered, fitted.dropped
        spans = render(messages)
        self._check_length(spans, n_reserve)
        return spans, 0

    def _encoded(self, message: Message, n_reserve: int) -> Message:
        if isinstance(message.content, str):
            return message
        parts = self.model.senses.encoded(message.content, used_tokens=n_reserve)
        return Message(message.role, parts)

    def _check_length(self, spans: Sequence[Span], n_reserve: int) -> None:
        n_most = self.n_ctx - min(n_reserve, 64)
        n = _length(spans)
        if n > n_most:
            raise ContextFull(
                f"the prompt has {n} tokens; this model's context holds {self.n_ctx}, of which "
                f"{n_most} are for the prompt"
            )


def _length(spans: Sequence[Span]) -> int:
    return sum(len(span) for span in spans)


def _internal(error: Exception) -> EdgeGemmaError:
    if isinstance(error, EdgeGemmaError):
        return error
    return RuntimeFailure(f"the server failed on this request: {first_line(error)}; see its log")
