"""The token loop: rows of logits → chunks of answers, for one generation or several at once.

In: something that holds a place in a KV cache (:class:`Place`, which a session is) and how to
sample. Out: chunks, the last one with a finish reason, usage and timings. A single answer is a loop
with one lane; a batch is a loop with several, which share one decode per step; lanes may join and
leave between steps. This module knows no turns, templates or text formats.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge_gemma.conversation.drafts import Drafts, Lookup
from edge_gemma.conversation.positions import Key
from edge_gemma.conversation.stream import Chunk, TextStream, Timings, Usage
from edge_gemma.engines.engine import Context, Decoder, Step, Weights
from edge_gemma.errors import Cancelled, EdgeGemmaError
from edge_gemma.options import Logprob, Sampling

# the name of a function behind the beginning of an object, where prompts/calls.py looks for calls
_CALL_BEGINS = re.compile(r'(?:^|```\w*|[\[,;])\s*(\{\s*"name"\s*:\s*"[^"]*)\Z', re.MULTILINE)
_TAIL_BYTES = 200


@dataclass(frozen=True)
class Prefilled:
    """What a place prefilled since it was last asked."""

    n_positions: int
    seconds: float


class Place(Protocol):
    """What the loop asks of whoever holds a place in the KV cache."""

    @property
    def length(self) -> int:
        """Positions so far."""

    @property
    def n_ctx(self) -> int: ...

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked this generation to stop."""

    def begin(self) -> None:
        """A generation starts: the place may not be taken away until :meth:`end`."""

    def prefill_step(self) -> bool:
        """Decode at most one ubatch of what is not in the cache yet. True when nothing is left:
        then the logits of the last position are kept. Raises Cancelled, RuntimeFailure.
        """

    @property
    def keys(self) -> Sequence[Key]:
        """What stands at each position."""

    def next_tokens(self, n_most: int) -> Step:
        """``(sequence, position, ids)`` of what is not in the cache yet, ``n_most`` of them."""

    def take_token(self, token: int) -> None:
        """A sampled token becomes the last position; it is not in the cache yet."""

    def step_done(self, n_tokens: int) -> bool:
        """``n_tokens`` more are in the cache; what was decoded behind them was a draft, and is
        forgotten. Whether nothing is left to decode.
        """

    def end(self) -> Prefilled:
        """The generation is over."""


class Generation:
    """One answer while it is generated: sampler, text stream, ids, finish reason and times.

    ``n_room`` is how many tokens the context can still take. Raises UsageError (a grammar or schema
    that cannot be enforced). Close it.
    """

    def __init__(self, decoder: Decoder, sampling: Sampling, n_room: int):
        self._decoder, self._sampling, self._n_room = decoder, sampling, n_room
        self._started = time.perf_counter()
        self._first_s: float | None = None
        self._last_s = self._started
        self._sampler = decoder.sampler(sampling)
        self._stream = TextStream(sampling.stop)
        self.ids: list[int] = []
        self._tail = b""  # of the answer, where a call may have begun
        self.n_passes = self.n_drafted = self.n_accepted = self._n_forced = 0
        self.finish_reason: str | None = None

    @property
    def may_draft(self) -> bool:
        """Not under a schema or grammar: what it forces is known without drafts, and the rest is
        seldom a quotation.
        """
        held = (self._sampling.schema, self._sampling.grammar, self._sampling.call_schema)
        return not any(held)

    def take(self, logits: np.ndarray) -> Chunk | None:
        """Sample from a row of logits ``[n_vocab]`` float32 → the chunk of the token, and of those
        that must follow it; None for a token that ends the turn. Sets ``finish_reason`` when it was
        the last.
        """
        token = self._sampler.sample(logits)
        logprobs: tuple[Logprob, ...] = ()
        if self._sampling.logprobs is not None:
            logprobs = (self._sampler.logprob(logits, token),)
        self._last_s = time.perf_counter()
        self._first_s = self._first_s or self._last_s
        n_before, text = len(self.ids), self._add(token)
        if self.finish_reason is None:
            self._watch_for_call(token)
            for forced in self._sampler.forced():
                text += self._add(forced)
                if self.finish_reason is not None:
                    break
        taken = tuple(self.ids[n_before:])
        self._n_forced += max(0, len(taken) - 1)
        return Chunk(text, taken, logprobs) if taken else None

    def _watch_for_call(self, token: int) -> None:
        if self._sampling.call_schema is None:
            return
        self._tail = (self._tail + self._decoder.piece(token))[-_TAIL_BYTES:]
        begun = _CALL_BEGINS.search(self._tail.decode("utf-8", "replace"))
        if begun is not None:
            self._sampler.begin_call(begun[1])

    def _add(self, token: int) -> str:
        """One more token of the answer → its text."""
        if self._decoder.is_end(token):
            self.finish_reason = "stop"
            return ""
        self.ids.append(token)
        text = self._stream.push(self._decoder.piece(token))
        if self._stream.stopped:
            self.finish_reason = "stop_string"
        elif len(self.ids) >= self._sampling.max_tokens:
            self.finish_reason = "length"
        elif len(self.ids) >= self._n_room:
            self.finish_reason = "context"
        return text

    def n_left(self, n_room: int) -> int:
        """Tokens that may still come where the context has ``n_room``."""
        return min(n_room, self._sampling.max_tokens - len(self.ids))

    def last_chunk(self, prompt_tokens: int, prefilled: Prefilled) -> Chunk:
        """What the text stream held back, with finish reason, usage and timings."""
        return Chunk(
            self._stream.finish(),
            finish_reason=self.finish_reason or "cancelled",
            usage=Usage(
                prompt_tokens,
                max(0, prompt_tokens - prefilled.n_positions),
                len(self.ids),
                self._sampler.seed,
                n_passes=self.n_passes,
                forced_tokens=self._n_forced,
                drafted_tokens=self.n_drafted,
                accepted_tokens=self.n_accepted,
            ),
            timings=self._timings(prefilled),
        )

    def _timings(self, prefilled: Prefilled) -> Timings:
        n, first_s = len(self.ids), self._first_s
        decode_s = self._last_s - first_s if first_s else 0.0
        prefill_tok_s = None
        if prefilled.n_positions and prefilled.seconds > 0:
            prefill_tok_s = prefilled.n_positions / prefilled.seconds
        return Timings(
            ttft_s=first_s - self._started if first_s else None,
            prefill_s=prefilled.seconds,
            prefill_tok_s=prefill_tok_s,
            decode_s=decode_s,
            decode_tok_s=(n - 1) / decode_s if n > 1 and decode_s > 0 else None,
        )

    def close(self) -> None:
        self._sampler.close()


class Lane:
    """One place and its generation in a :class:`TokenLoop`. ``index`` is its number there;
    ``urgent`` prompts are prefilled before others; ``error`` is why it ended, where it failed.
    """

    def __init__(self, index: int, place: Place, generation: Generation, urgent: bool = False):
        self.index, self.place, self.generation = index, place, generation
        self.urgent, self.prefilled = urgent, False
        self.prompt_tokens = place.length
        self.lookup: Lookup | None = None
        self.error: EdgeGemmaError | None = None

    @property
    def done(self) -> bool:
        return self.generation.finish_reason is not None

    def take(self, logits: np.ndarray) -> list[tuple[Lane, Chunk]]:
        """The next token's chunk; nothing for one that ends the turn."""
        chunk = self.generation.take(logits)
        if chunk is None:
            return []
        for token in chunk.token_ids:
            self.place.take_token(token)
        return [(self, chunk)]

    def cancel(self) -> None:
        self.generation.finish_reason = "cancelled"

    def fail(self, error: EdgeGemmaError) -> None:
        self.generation.finish_reason, self.error = "failed", error

    def close(self) -> Chunk:
        """End the generation → its last chunk."""
        self.generation.close()
        return self.generation.last_chunk(self.prompt_tokens, self.place.end())


class TokenLoop:
    """Generations that advance together: each step is one decode for all of them.

    ``drafts``: one that is alone may have tokens of its own text proposed.
    ``shared``: somebody reads while others begin, so that between two tokens at most one ubatch of
    one prompt is prefilled. Without, prompts are prefilled whole, which keeps the steps full.
    Closing it ends those that are still running.
    """

    def __init__(
        self,
        decoder: Decoder,
        context: Context,
        weights: Weights,
        *,
        shared: bool = False,
        drafts: Drafts | None = None,
    ):
        self._decoder, self._context, self._weights = decoder, context, weights
        self._shared, self._drafts = shared, drafts
        self._lanes: list[Lane] = []
        self._n_added = 0

    @property
    def n_active(self) -> int:
        return len(self._lanes)

    def add(self, place: Place, sampling: Sampling, *, urgent: bool = False) -> Lane:
        """A new generation; its prompt is prefilled in the next steps, an ``urgent`` one before
        others. Raises UsageError.
        """
        generation = Generation(self._decoder, sampling, place.n_ctx - place.length)
        lane = Lane(self._n_added, place, generation, urgent)
        place.begin()
        self._lanes.append(lane)
        self._n_added += 1
        return lane

    def step(self) -> list[tuple[Lane, Chunk]]:
        """Advance every prefilled lane by one token: the chunks, and the last chunk of each lane
        that ended.

        A new lane's prompt is prefilled by itself and its first token sampled from its own logits.
        A lane that was cancelled ends with what it has. One that fails (a grammar that cannot be
        completed, a prompt the engine refuses) ends with the finish reason "failed" and its
        ``error``; the others are not disturbed. Where the shared pass fails, all of its lanes do.
        """
        produced: list[tuple[Lane, Chunk]] = []
        with self._context.lock:
            for lane in self._lanes:
                if lane.place.cancelled:
                    lane.cancel()
            ready = [lane for lane in self._lanes if lane.prefilled and not lane.done]
            for lane in self._to_prefill():
                produced += self._prefill(lane)
            if ready:
                produced += self._advanced(ready)
        ended = [lane for lane in self._lanes if lane.done]
        for lane in ended:
            self._lanes.remove(lane)
            produced.append((lane, lane.close()))
        if ended:
            self._weights.trim()
        return produced

    def _to_prefill(self) -> list[Lane]:
        lanes = [lane for lane in self._lanes if not (lane.prefilled or lane.done)]
        lanes.sort(key=lambda lane: not lane.urgent)
        return lanes[:1] if self._shared else lanes

    def _prefill(self, lane: Lane) -> list[tuple[Lane, Chunk]]:
        """One ubatch of the lane's prompt, or all of it; behind the last, its first token."""
        try:
            while not (ended := lane.place.prefill_step()) and not self._shared:
                pass
        except Cancelled:
            if lane.place.cancelled:
                lane.cancel()
            return []  # or it was another session's stop: the prefill goes on in the next step
        except EdgeGemmaError as error:
            lane.fail(error)
            return []
        if lane.place.cancelled:
            lane.cancel()
            return []
        if not ended:
            return []
        lane.prefilled = True
        return self._taken(lane)

    def _advanced(self, lanes: list[Lane]) -> list[tuple[Lane, Chunk]]:
        """One pass over what each lane holds and the cache does not, and what comes of it. A lane
        that is alone may have a draft verified in the same pass.
        """
        n_most = max(1, self._context.settings.n_ubatch // len(lanes))
        items = [lane.place.next_tokens(n_most) for lane in lanes]
        draft = self._draft(lanes[0], items[0]) if len(self._lanes) == 1 else []
        if draft:
            sequence, position, ids = items[0]
            items = [(sequence, position, [*ids, *draft])]
        if not self._decoded(lanes, items, every=bool(draft)):
            return []
        if draft:
            return self._verified(lanes[0], draft)
        produced = []
        for row, (lane, (_, _, ids)) in enumerate(zip(lanes, items, strict=True)):
            if lane.place.step_done(len(ids)):
                produced += self._taken(lane, row)
        return produced

    def _draft(self, lane: Lane, item: Step) -> list[int]:
        place, generation = lane.place, lane.generation
        if self._drafts is None or len(item[2]) != 1 or not generation.may_draft:
            return []
        if lane.lookup is None:
            lane.lookup = Lookup(self._drafts.costs, self._drafts.n_most)
        # a draft leaves room for the token behind it
        settings = self._context.settings
        n_room = generation.n_left(settings.n_ctx - place.length) - 1
        n_room = min(n_room, settings.n_ubatch - 1)
        return lane.lookup.propose(place.keys, n_room)

    def _verified(self, lane: Lane, draft: list[int]) -> list[tuple[Lane, Chunk]]:
        """Each token sampled from its own row, as long as what comes is what the draft said."""
        produced: list[tuple[Lane, Chunk]] = []
        n_accepted = 0
        for row in range(len(draft) + 1):
            taken = self._taken(lane, row)
            produced += taken
            agrees = row < len(draft) and taken and taken[0][1].token_ids == (draft[row],)
            if lane.done or not agrees:
                break
            n_accepted += 1
        lane.place.step_done(1 + n_accepted)
        assert lane.lookup is not None
        lane.lookup.judged(len(draft), n_accepted)
        lane.generation.n_drafted += len(draft)
        lane.generation.n_accepted += n_accepted
        return produced

    def _taken(self, lane: Lane, row: int = -1) -> list[tuple[Lane, Chunk]]:
        """The lane's next token out of a kept row of logits."""
        try:
            return lane.take(self._context.logits(row))
        except EdgeGemmaError as error:
            lane.fail(error)
            return []

    def _decoded(self, lanes: list[Lane], items: list[Step], *, every: bool) -> bool:
        """One pass over the tokens of each lane. False when it was stopped: nothing was decoded
        then, and those that were not meant go on in the next step. False, too, when it failed.
        """
        try:
            return self._decode_step(lanes, items, every=every)
        except Cancelled:
            return False
        except EdgeGemmaError as error:
            for lane in lanes:
                lane.fail(error)
            return False

    def _decode_step(self, lanes: list[Lane], items: list[Step], *, every: bool) -> bool:
        self._context.check_open()
        # even a single token: its rows lie on several pages, and each would be a wait of its own
        self._weights.wake()
        self._weights.prefetch([token for _, _, ids in items for token in ids])
        self._context.clear_cancel()
        if any(lane.place.cancelled for lane in lanes):
            return False
        started = time.perf_counter()
        self._context.decode_step(items, every=every)
        for lane in lanes:
            lane.generation.n_passes += 1
        n_tokens = len(items[0][2])
        # forced tokens need one row of logits, a draft needs all: they cost less
        if self._drafts is not None and len(lanes) == 1 and (every or n_tokens == 1):
            self._drafts.costs.record(n_tokens, time.perf_counter() - started)
        return True

    def run(self) -> Iterator[tuple[Lane, Chunk]]:
        """Step until every lane has ended. Closing the iterator stops them. Raises what a lane
        failed with.
        """
        try:
            while self._lanes:
                for lane, chunk in self.step():
                    if lane.error is not None:
                        raise lane.error
                    yield lane, chunk
        finally:
            self.close()

    def close(self) -> None:
        """End what is still running, and give back the rows that were looked up."""
        if self._lanes:
            self._weights.trim()
        while self._lanes:
            self._lanes.pop().close()
