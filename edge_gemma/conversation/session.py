"""One conversation in spans: what was appended, what of it is in the KV cache, and how it goes on.

In: spans, and the sequences of a KV cache. Out: chunks. A :class:`Session` knows no turns; those
are chat.py's. State lives here, never on the model.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_gemma.conversation.generation import Prefilled, TokenLoop
from edge_gemma.conversation.positions import Key, Positions
from edge_gemma.conversation.prompt_cache import CHECKPOINT_EVERY, MIN_LONG, MIN_STATE, Found
from edge_gemma.conversation.saved import Saved, read_saved, rows_of, write_saved
from edge_gemma.conversation.sequences import Sequences
from edge_gemma.conversation.stream import Chunk
from edge_gemma.engines.engine import Outputs, Step
from edge_gemma.errors import BundleError, Cancelled, ContextFull, RuntimeFailure, UsageError
from edge_gemma.options import Sampling
from edge_gemma.spans import Span, Tokens

log = logging.getLogger("edge_gemma.prompt_cache")


@dataclass(frozen=True)
class Mark:
    """Positions that were appended, and those of them in the cache."""

    length: int
    cached: int


class Session:
    """Spans in the order they were appended, and their KV cache.

    The last position is decoded only when it is needed: appending (while a user still speaks, say)
    never pays for logits.

    Where the model keeps prompts (conversation/prompt_cache.py), what was prefilled once is
    restored. ``remember=False`` only restores, and keeps nothing itself.

    >>> session = model.session()
    >>> session.append([Tokens([2, 300, 301])])
    >>> session.length
    3
    """

    def __init__(self, sequences: Sequences, *, remember: bool = True):
        self._sequences, self._context = sequences, sequences.context
        self._prompts = sequences.prompts
        self._remember = remember and self._prompts is not None
        self._n_stable = 0  # positions that other conversations begin with, too
        self._boundary = 0  # where the last answer ended; 0: a window was kept there already
        self._positions = Positions()
        self._cached = 0  # positions whose K and V are in the cache
        self._sequence: int | None = None
        self._busy = False
        self._cancelled = threading.Event()
        self._n_prefilled, self._prefill_s = 0, 0.0  # since the last generation
        # (positions, decodes of the context) whose last logits the context still has
        self._logits_of: tuple[int, int] | None = None

    @property
    def length(self) -> int:
        """Positions appended so far."""
        return len(self._positions)

    @property
    def n_ctx(self) -> int:
        return self._context.settings.n_ctx

    @property
    def busy(self) -> bool:
        """Whether an answer is being generated; its sequence is not taken away then."""
        return self._busy

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called since the last append or generation began."""
        return self._cancelled.is_set()

    def append(self, spans: Sequence[Span], *, prefill: bool = True) -> None:
        """Add spans and prefill all but the last position.

        Without ``prefill`` they wait for what comes next, so that a prompt's end and its logits
        take one pass. Raises ContextFull (nothing is added), Cancelled, RuntimeFailure.
        """
        n_new = sum(len(span) for span in spans)
        if self.length + n_new > self.n_ctx:
            raise ContextFull(
                f"{n_new} positions do not fit behind the {self.length} of {self.n_ctx} that are "
                "taken; load with a larger n_ctx or start anew"
            )
        self._cancelled.clear()
        self._positions.extend(spans)
        if prefill:
            self._prefill(self._positions.last_start())

    def replace(self, spans: Sequence[Span], *, n_stable: int = 0) -> int:
        """Make ``spans`` the whole content, reusing the cache as far as they agree with it.

        ``n_stable``: so many positions at the beginning (system text and tools) are what other
        conversations begin with, too; they are kept on disk. 0: of a long prompt, all but the end.

        Returns the positions reused; the others are prefilled by the next append or generation.
        Raises UsageError (nothing given), ContextFull; the session is unchanged then.
        """
        positions = Positions(spans)
        if not len(positions):
            raise UsageError(
                "the prompt is empty; give some text, or spans with at least one position"
            )
        if len(positions) > self.n_ctx:
            raise ContextFull(
                f"the prompt has {len(positions)} positions; the context holds {self.n_ctx}. "
                f"Shorten it or load with n_ctx ≥ {len(positions) + 64}"
            )
        same = self._positions.shared_with(positions)
        keep = positions.block_start(min(same, positions.last_start(), self._cached))
        if self._cached - keep >= MIN_STATE:
            self._park()
        self._positions = positions
        self._n_stable = n_stable or _long_beginning(positions.last_start())
        self._keep(keep)
        self._cancelled.clear()
        return self._cached

    def prefill_whole(self) -> None:
        """Prefill everything that was appended and keep the last logits, so that a generation that
        follows at once finds nothing left to do. Raises Cancelled, RuntimeFailure.
        """
        self._cancelled.clear()
        self._prefill(self.length, outputs="last")

    def mark(self) -> Mark:
        """How far things are, for :meth:`return_to`."""
        return Mark(self.length, self._cached)

    def return_to(self, mark: Mark) -> None:
        """Forget what was appended since. Where the cache cannot be rewound exactly, it is
        prefilled again when it is needed.
        """
        self._positions.shorten(mark.length)
        self._keep(min(self._cached, mark.cached))

    def shared(self, spans: Sequence[Span]) -> int:
        """How many positions at the beginning of ``spans`` are in the cache already."""
        return min(self._cached, self._positions.shared_with(Positions(spans)))

    def _keep(self, n_positions: int) -> None:
        """Forget the cache behind ``n_positions``. Where that cannot be done exactly, go further
        back: to what was kept, or to nothing.
        """
        if self._sequence is None:
            self._cached = 0
            return
        with self._context.lock:
            rewinds = self._context.can_rewind(self._sequence, n_positions)
            if self._restore_kept(n_positions, n_positions if rewinds else 0):
                return
            if n_positions < self._cached:
                if not self._context.rewind(self._sequence, n_positions):
                    n_positions = 0
                self._cached = n_positions

    def _restore_kept(self, n_live: int, n_reached: int) -> bool:
        """Take up the longest beginning that was kept, if it is longer than the ``n_reached``
        positions that are reached without. ``n_live`` of them are in the sequence, windows apart.
        """
        assert self._sequence is not None
        last = self._positions.last_start()
        if self._prompts is None or last < n_reached + MIN_STATE:
            return False
        found = self._prompts.find(self._positions.codes()[:last], n_live)
        if found is None or found.position < n_reached + MIN_STATE:
            return False
        self._boundary = 0
        if self._restored(self._sequence, found):
            self._cached = found.position
        else:
            self._prompts.forget(found)
            self._context.clear(self._sequence)
            self._cached = 0
        return True

    def _restored(self, sequence: int, found: Found) -> bool:
        context = self._context
        if found.state is not None and not context.restore(sequence, found.state.data):
            return False
        if found.window is not None:
            return context.restore_window(sequence, found.window.data, found.position)
        n_held = context.length(sequence)
        return n_held == found.position or context.rewind(sequence, found.position)

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; none for control tokens."""
        return self._sequences.decoder.piece(token)

    def logits(self) -> np.ndarray:
        """Logits ``[n_vocab]`` float32 of what may follow, a copy. Everything that was appended is
        prefilled. Raises UsageError (nothing appended), Cancelled, RuntimeFailure.
        """
        if not self.length:
            raise UsageError("nothing to continue: append a prompt first")
        with self._context.lock:
            self._prefill(self.length, outputs="last")
            return self._context.logits().copy()

    def check(self, sampling: Sampling) -> None:
        """Raises UsageError for a grammar or schema that cannot be enforced, before anything is
        prefilled for it.
        """
        self._sequences.decoder.check(sampling)

    def generate(self, sampling: Sampling | None = None) -> Generator[Chunk, None, None]:
        """Continue from what was appended, sampling as the model's authors do unless told.

        The answer's tokens become part of the session, its end-of-turn token does not.

        Closing the iterator, or :meth:`cancel` from another thread, stops within one token. Raises
        UsageError (nothing appended, a bad grammar), RuntimeFailure.
        """
        if not self.length:
            raise UsageError("nothing to continue: append a prompt first")
        sequences = self._sequences
        loop = TokenLoop(
            sequences.decoder, self._context, sequences.weights, drafts=sequences.drafts
        )
        loop.add(self, sampling or self._sequences.sampling)
        for _, chunk in loop.run():
            yield chunk

    def cancel(self) -> None:
        """Stop a running append or generation, from any thread."""
        self._cancelled.set()
        self._context.cancel()

    # what the token loop asks (generation.Place)

    def begin(self) -> None:
        self._cancelled.clear()
        self._busy = True

    def prefill_step(self, outputs: Outputs = "last") -> bool:
        """Decode at most one ubatch of what was appended → whether nothing is left. With outputs
        "none" the last position is left out, as :meth:`append` does. Raises Cancelled,
        RuntimeFailure.
        """
        end = self.length if outputs == "last" else self._positions.last_start()
        return self._prefill(end, outputs, n_passes=1)

    @property
    def keys(self) -> Sequence[Key]:
        return self._positions.keys

    def next_tokens(self, n_most: int) -> Step:
        keys = self._positions.keys[self._cached : self._cached + n_most]
        ids = [key for key in keys if isinstance(key, int)]
        assert ids and len(ids) == len(keys)
        return self._held_sequence(), self._cached, ids

    def take_token(self, token: int) -> None:
        self._positions.keys.append(token)

    def step_done(self, n_tokens: int) -> bool:
        self._cached += n_tokens
        sequence = self._held_sequence()
        if self._context.length(sequence) > self._cached:  # the rest of a draft
            if not self._context.rewind(sequence, self._cached):
                self._cached = 0
                raise RuntimeFailure("a rejected draft could not be taken back")
        return self._cached == self.length

    def end(self) -> Prefilled:
        self._busy = False
        self._boundary = self._cached
        prefilled = Prefilled(self._n_prefilled, self._prefill_s)
        self._n_prefilled, self._prefill_s = 0, 0.0
        return prefilled

    # the cache

    def _prefill(self, end: int, outputs: Outputs = "none", n_passes: int | None = None) -> bool:
        """Decode positions up to ``end``, in ``n_passes`` at most; with outputs "last", keep the
        logits of the last one (decoding it again if need be). False when positions are left.
        """
        with self._context.lock:
            self._context.check_open()
            sequence = self._held_sequence()
            if outputs == "last" and self._cached >= end:
                if self._logits_of == (end, self._context.n_decodes):
                    return True
                self._keep(self._positions.last_start())  # its logits were not kept: one step back
            started, first = time.perf_counter(), self._cached
            self._context.clear_cancel()
            try:
                while self._cached < end and n_passes != 0:
                    if self._cancelled.is_set():
                        raise Cancelled(self._cached)
                    self._prefill_pass(sequence, end, outputs)
                    n_passes = None if n_passes is None else n_passes - 1
            except Cancelled as stop:
                self._cached = stop.position
                raise
            finally:
                self._n_prefilled += self._cached - first
                self._prefill_s += time.perf_counter() - started
            return self._cached >= end

    def _prefill_pass(self, sequence: int, end: int, outputs: Outputs) -> None:
        """One pass over the weights: the next positions of one kind, an ubatch of them at most."""
        start = self._cached
        if start == self._boundary:
            self._checkpoint(sequence)
        mark = self._next_stop(end)
        stop = min(mark, start + self._context.settings.n_ubatch)
        if stop < end and (block := self._positions.block_start(stop)) < stop:
            stop = block if block > start else end  # the rows of a block are decoded together
        position, span = next(self._positions.runs(start, stop))
        last = position + len(span) == end
        self._decode(sequence, position, span, outputs if last else "none")
        if self._cached == mark < end:
            self._checkpoint(sequence)

    def _decode(self, sequence: int, position: int, span: Span, outputs: Outputs) -> None:
        self._sequences.weights.wake()
        if isinstance(span, Tokens):
            self._sequences.weights.prefetch(span.ids)
        self._context.decode(sequence, position, span, outputs)
        self._cached = position + len(span)
        if outputs == "last":
            self._logits_of = self._cached, self._context.n_decodes

    def _next_stop(self, end: int) -> int:
        """Where the next state or window is kept, or ``end``. Never inside a block whose rows
        attend to each other.
        """
        if not self._remember:
            return end
        next_checkpoint = (self._cached // CHECKPOINT_EVERY + 1) * CHECKPOINT_EVERY
        stops = {self._n_stable, *range(next_checkpoint, end, CHECKPOINT_EVERY)}
        return min(
            (s for s in stops if self._cached < s < end and self._positions.block_start(s) == s),
            default=end,
        )

    def _checkpoint(self, sequence: int) -> None:
        """Keep what leads back here. The sliding layers are read back at once: cells that lie as
        they will after a restore give the same bits.
        """
        self._boundary = 0
        if not self._remember or not self._cached:
            return
        assert self._prompts is not None
        codes = self._positions.codes()[: self._cached]
        n_bytes = self._context.state_bytes(sequence, window=True) + codes.nbytes
        if not self._prompts.make_room(n_bytes, window=True):
            return
        window = self._context.save_window(sequence)
        if not self._context.restore_window(sequence, window, self._cached):
            self._cached = 0
            raise RuntimeFailure("the engine refused the state that it had just given")
        self._prompts.keep_window(codes, window)
        if self._cached == self._n_stable:
            self._keep_state(sequence, codes, on_disk=True)

    def _keep_state(self, sequence: int, codes: np.ndarray, *, on_disk: bool) -> None:
        assert self._prompts is not None
        if len(codes) < MIN_STATE or self._prompts.holds(codes):
            return
        try:
            if self._prompts.make_room(self._context.state_bytes(sequence) + codes.nbytes):
                self._prompts.keep(codes, self._context.save(sequence), on_disk=on_disk)
        except RuntimeFailure as failure:  # it is prefilled again, then
            log.warning("%s", failure)

    def _park(self, *, on_disk: bool = False) -> None:
        """Keep what the sequence holds before it is lost."""
        if self._remember and self._sequence is not None and self._cached:
            with self._context.lock:
                codes = self._positions.codes()[: self._cached]
                self._keep_state(self._sequence, codes, on_disk=on_disk)

    def _held_sequence(self) -> int:
        """This session's sequence, taken now if it has none: empty then, or with what was kept of
        its beginning.
        """
        if self._sequence is None:
            self._sequence = self._sequences.take(self)
            self._context.clear(self._sequence)
            self._cached = 0
            self._restore_kept(0, 0)
        return self._sequence

    def give_up_sequence(self) -> int:
        """Leave the sequence to another session; what was appended stays, and is restored or
        prefilled again when it is needed. Raises RuntimeFailure while an answer is generated.
        """
        if self._busy or self._sequence is None:
            raise RuntimeFailure(
                "every sequence of the KV cache is busy generating; load with a larger n_seq_max"
            )
        self._park()
        sequence, self._sequence, self._cached = self._sequence, None, 0
        return sequence

    def close(self, *, keep: bool = True) -> None:
        """Give the sequence back. ``keep``: what it holds is kept where the model keeps prompts."""
        if self._sequence is not None:
            if keep and self._context.is_open:
                self._park(on_disk=True)
            self._sequences.give_back(self._sequence)
            self._sequence, self._cached = None, 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # on disk

    def save(self, path: str | os.PathLike[str], extra: bytes = b"") -> None:
        """Write the conversation and its KV cache to one file, whole or not at all.

        ``extra`` is the caller's own. Raises RuntimeFailure.
        """
        settings, state = self._context.settings, b""
        with self._context.lock:
            if self._sequence is not None and self._cached:
                state = bytes(self._context.save(self._sequence))
        saved = Saved(
            bundle_sha256=self._sequences.identity,
            n_ctx=settings.n_ctx,
            kv_type=settings.kv_type,
            n_ubatch=settings.n_ubatch,
            keys=list(self._positions.keys),
            cached=self._cached if state else 0,
            rows=rows_of(self._positions),
            state=state,
            extra=extra,
        )
        write_saved(Path(path), saved)

    def restore(self, path: str | os.PathLike[str]) -> bytes:
        """Take a saved conversation over; returns its ``extra``.

        Nothing of it reaches the engine before header, checksum, bundle, context and KV type agree;
        where only the context differs, the cache is prefilled again. Raises BundleError,
        ContextFull; the session is unchanged then.
        """
        path = Path(path)
        saved = read_saved(path)
        if saved.bundle_sha256 != self._sequences.identity:
            raise BundleError(
                f"{path} was saved with another bundle (decoder {saved.bundle_sha256[:12]}…, "
                f"this one is {self._sequences.identity[:12]}…)"
            )
        if len(saved.keys) > self.n_ctx:
            raise ContextFull(
                f"{path} holds {len(saved.keys)} positions; this context has {self.n_ctx}. "
                f"Load with n_ctx ≥ {saved.n_ctx}"
            )
        decoder = self._sequences.decoder
        positions = saved.positions(decoder.n_vocab, decoder.n_embd, path)
        with self._context.lock:
            sequence = self._held_sequence()
            self._context.clear(sequence)
            self._positions, self._cached, self._logits_of = positions, 0, None
            if self._restore_state(sequence, saved):
                self._cached = saved.cached
        return saved.extra

    def _restore_state(self, sequence: int, saved: Saved) -> bool:
        settings = self._context.settings
        here = (settings.n_ctx, settings.kv_type, settings.n_ubatch)
        if (saved.n_ctx, saved.kv_type, saved.n_ubatch) != here or not saved.state:
            return False
        if not self._context.restore(sequence, saved.state):
            return False
        if self._context.length(sequence) == saved.cached <= self.length:
            return True
        self._context.clear(sequence)
        return False


def _long_beginning(n_positions: int) -> int:
    """What is likely to come again of a long prompt whose parts are not known: a document, with
    another question behind it.
    """
    return n_positions // CHECKPOINT_EVERY * CHECKPOINT_EVERY if n_positions >= MIN_LONG else 0
