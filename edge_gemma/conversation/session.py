"""One conversation: what was appended, what of it is in the KV cache, and how it goes on.

In: spans, and a share of a KV cache (cache.py). Out: chunks. :class:`Session` knows no turns; those
are chat.py's. State lives here, never on the model.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edge_gemma.conversation.saved import SAVE_MAGIC, Key, _checked_keys, _read_saved, _Saved
from edge_gemma.conversation.sequences import Cache
from edge_gemma.conversation.stream import Chunk, TextStream, Timings, Usage
from edge_gemma.engines.llama.decoder import Cancelled
from edge_gemma.engines.llama.sampler import Sampler
from edge_gemma.errors import BundleError, ContextFull, RuntimeFailure, UsageError
from edge_gemma.options import Sampling
from edge_gemma.spans import Rows, Span, Tokens


class Session:
    """Spans in the order they were appended, and their KV cache.

    The last position is decoded only when it is needed: appending (while a user still speaks, say)
    never pays for logits.

    >>> session = getfixture("tiny_model").session()
    >>> session.append([Tokens([2, 300, 301])])
    >>> session.length
    3
    """

    def __init__(self, cache: Cache):
        self._cache, self._context = cache, cache.context
        self._keys: list[Key] = []
        self._rows: dict[str, Rows] = {}
        self._cached = 0  # positions whose K and V are in the cache
        self._sequence: int | None = None  # our place in it
        self.busy = False
        self._cancelled = threading.Event()
        self._fresh, self._prefill_s = 0, 0.0  # prefilled since the last generation

    @property
    def length(self) -> int:
        """Positions appended so far."""
        return len(self._keys)

    @property
    def n_ctx(self) -> int:
        return self._context.settings.n_ctx

    def append(self, spans: Sequence[Span], *, prefill: bool = True) -> None:
        """Add spans and prefill all but the last position; without ``prefill``, leave them to what
        comes next, so that a prompt's end and its logits take one pass. Raises ContextFull (nothing
        is added), Cancelled, RuntimeFailure.
        """
        keys, rows = _keys(spans)
        if self.length + len(keys) > self.n_ctx:
            raise ContextFull(
                f"{len(keys)} positions do not fit behind the {self.length} of {self.n_ctx} "
                "that are taken; load with a larger n_ctx or start anew"
            )
        self._cancelled.clear()
        self._keys += keys
        self._rows |= rows
        if prefill:
            self._prefill(self._held_back())

    def replace(self, spans: Sequence[Span]) -> int:
        """Make ``spans`` the whole content, reusing the cache as far as they agree with it. Returns
        the positions reused.
        """
        keys, rows = _keys(spans)
        if not keys:
            raise UsageError(
                "the prompt is empty; give some text, or spans with at least one position"
            )
        if len(keys) > self.n_ctx:
            raise ContextFull(
                f"the prompt has {len(keys)} positions; the context holds {self.n_ctx}. "
                f"Shorten it or load with n_ctx ≥ {len(keys) + 64}"
            )
        same = next(
            (i for i, (a, b) in enumerate(zip(self._keys, keys)) if a != b),
            min(len(self._keys), len(keys)),
        )
        self._keys, self._rows = keys, rows
        keep = min(same, self._held_back(), self._cached)
        while (
            keep
            and isinstance(keys[keep], tuple)
            and keys[keep][1]
            and not rows[keys[keep][0]].causal
        ):
            keep -= 1  # rows that attend to each other are decoded together or not at all
        if keep < self._cached and self._sequence is not None:
            with self._context.lock:
                if not self._context.rewind(self._sequence, keep):
                    keep = 0
        self._cached = keep
        self._cancelled.clear()
        return keep

    def _held_back(self) -> int:
        """Where appending stops: before the last position, or before a last block whose rows attend
        to each other.
        """
        last = len(self._keys) - 1
        if (
            last >= 0
            and isinstance(key := self._keys[last], tuple)
            and not self._rows[key[0]].causal
        ):
            return last - key[1]
        return max(last, 0)

    def generate(self, options: Sampling = Sampling()) -> Iterator[Chunk]:
        """Continue from what was appended.

        The answer's tokens become part of the session, its end-of-turn token does not.

        Closing the iterator, or :meth:`cancel` from another thread, stops within one token. Raises
        UsageError (nothing appended, a bad grammar), RuntimeFailure.
        """
        if not self._keys:
            raise UsageError("nothing to continue: append a prompt first")
        started = time.perf_counter()
        self._cancelled.clear()
        sampler = Sampler(self._cache.decoder, options)
        stream, decoder = TextStream(options.stop), self._cache.decoder
        prompt_tokens, reused = self.length, None
        reason, n, first_s, last_s = "cancelled", 0, None, started
        self.busy = True
        try:
            while True:
                try:
                    with self._context.lock:
                        self._prefill(self.length, outputs="last", counted=reused is None)
                        if reused is None:
                            reused = max(0, prompt_tokens - self._fresh)
                        if self._cancelled.is_set():
                            raise Cancelled(self.length)
                        token = sampler.sample(self._context)
                        logprobs = (
                            (sampler.logprob(self._context, token),)
                            if options.logprobs is not None
                            else ()
                        )
                        ended, piece = decoder.is_end(token), decoder.piece(token)
                except Cancelled:
                    break
                last_s = time.perf_counter()
                first_s = first_s or last_s
                if ended:
                    reason = "stop"
                    break
                self._keys.append(token)
                n += 1
                text = stream.push(piece)
                if stream.stopped or n >= options.max_tokens or self.length >= self.n_ctx:
                    reason = (
                        "stop_string"
                        if stream.stopped
                        else "length"
                        if n >= options.max_tokens
                        else "context"
                    )
                    yield Chunk(text, (token,), logprobs)
                    break
                yield Chunk(text, (token,), logprobs)
        finally:
            self.busy = False
            sampler.close()
            timings = _timings(started, first_s, last_s, n, self._fresh, self._prefill_s)
            self._fresh, self._prefill_s = 0, 0.0
            self._cache.weights.trim()
        yield Chunk(
            stream.finish(),
            finish_reason=reason,
            usage=Usage(prompt_tokens, reused or 0, n, sampler.seed),
            timings=timings,
        )

    def cancel(self) -> None:
        """Stop a running append or generation, from any thread."""
        self._cancelled.set()
        self._context.cancel()

    # the cache

    def _prefill(self, end: int, outputs: str = "none", counted: bool = True) -> None:
        """Decode positions up to ``end``; with outputs "last", keep the logits of the last one
        (decoding it again if need be). ``counted`` is False for a token that was just generated.
        """
        with self._context.lock:
            self._context.check_open()
            self._take_sequence()
            if (
                outputs == "last" and self._cached >= end
            ):  # its logits were not kept: take one step back
                start = self._held_back()
                self._cached = start if self._context.rewind(self._sequence, start) else 0
            begin, first = time.perf_counter(), self._cached
            self._context.clear_cancel()
            try:
                for position, span in self._runs(self._cached, end):
                    if self._cancelled.is_set():
                        raise Cancelled(position)
                    if isinstance(
                        span,
                        Tokens,
                        # one token too: its rows lie on several pages, each a wait of its own when
                        # the disk is asked
                    ):
                        self._cache.weights.prefetch(span.ids)
                    last = position + len(span) == end
                    self._context.decode(
                        self._sequence, position, span, outputs if last else "none"
                    )
                    self._cached = position + len(span)
            except Cancelled as stop:
                self._cached = stop.position
                raise
            finally:
                if counted:
                    self._fresh += self._cached - first
                    self._prefill_s += time.perf_counter() - begin

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, Span]]:
        """Positions ``start … end`` as spans: neighbouring ids together, neighbouring causal rows
        together, one block of others by itself.

        Every span is a pass over all weights, so rows that came in pieces (a clip while it is
        spoken) must not stay in pieces.
        """
        position = start
        while position < end:
            key, stop = self._keys[position], position + 1
            if isinstance(key, int):
                while stop < end and isinstance(self._keys[stop], int):
                    stop += 1
                yield position, Tokens(self._keys[position:stop])
            else:
                (digest, index), causal = key, self._rows[key[0]].causal
                while stop < end and not isinstance(following := self._keys[stop], int):
                    if not (
                        self._rows[following[0]].causal
                        if causal
                        else following == (digest, index + stop - position)
                    ):
                        break
                    stop += 1
                yield (
                    position,
                    Rows(
                        np.stack(
                            [self._rows[digest].rows[i] for digest, i in self._keys[position:stop]]
                        ),
                        causal,
                    ),
                )
            position = stop

    def _take_sequence(self) -> None:
        if self._sequence is None:
            self._sequence = self._cache.take_sequence(self)
            self._context.clear(self._sequence)
            self._cached = 0

    def give_up_sequence(self) -> int:
        """Leave the cache to another session; what was appended stays and is prefilled again when
        needed.
        """
        if self.busy:
            raise RuntimeFailure(
                "every sequence of the KV cache is busy generating; load with a larger n_seq_max"
            )
        sequence, self._sequence, self._cached = self._sequence, None, 0
        return sequence

    def close(self) -> None:
        if self._sequence is not None:
            self._cache.return_sequence(self._sequence)
            self._sequence, self._cached = None, 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # on disk

    def save(self, path: str | os.PathLike, extra: bytes = b"") -> None:
        """Write the conversation and its KV cache to one file, whole or not at all. Raises
        RuntimeFailure.
        """
        with self._context.lock:
            state = (
                self._context.save(self._sequence)
                if self._sequence is not None and self._cached
                else b""
            )
        rows = [
            (digest, block.causal, list(block.rows.shape), block.rows.tobytes())
            for digest, block in self._rows.items()
        ]
        saved = _Saved(
            bundle_sha256=self._cache.identity,
            n_ctx=self.n_ctx,
            kv_type=self._context.settings.kv_type,
            n_ubatch=self._context.settings.n_ubatch,
            keys=list(self._keys),
            cached=self._cached if state else 0,
            rows=rows,
            state=state,
            extra=extra,
        )
        body = msgspec.msgpack.encode(saved)
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with open(partial, "wb") as file:
                file.write(SAVE_MAGIC + hashlib.blake2b(body, digest_size=32).digest() + body)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise RuntimeFailure(
                f"cannot save the conversation to {path}: {error.strerror}"
            ) from error

    def restore(self, path: str | os.PathLike) -> bytes:
        """Take a saved conversation over; returns its ``extra``.

        Nothing of it reaches llama.cpp before header, checksum, bundle, context and KV type agree;
        where only the context differs the cache is prefilled again. Raises BundleError.
        """
        saved = _read_saved(Path(path))
        if saved.bundle_sha256 != self._cache.identity:
            raise BundleError(
                f"{path} was saved with another bundle (decoder {saved.bundle_sha256[:12]}…, "
                f"this one is {self._cache.identity[:12]}…)"
            )
        if len(saved.keys) > self.n_ctx:
            raise ContextFull(
                f"{path} holds {len(saved.keys)} positions; this context has {self.n_ctx}. "
                f"Load with n_ctx ≥ {saved.n_ctx}"
            )
        keys, rows = _checked_keys(
            saved, self._cache.decoder.n_vocab, self._cache.decoder.n_embd, path
        )
        settings = self._context.settings
        same = (saved.n_ctx, saved.kv_type, saved.n_ubatch) == (
            settings.n_ctx,
            settings.kv_type,
            settings.n_ubatch,
        )
        with self._context.lock:
            self._take_sequence()
            self._context.clear(self._sequence)
            self._keys, self._rows, self._cached = keys, rows, 0
            if same and saved.state and self._context.restore(self._sequence, saved.state):
                if self._context.length(self._sequence) == saved.cached <= len(keys):
                    self._cached = saved.cached
                else:
                    self._context.clear(self._sequence)
        return saved.extra


def _keys(spans: Sequence[Span]) -> tuple[list[Key], dict[str, Rows]]:
    keys: list[Key] = []
    rows: dict[str, Rows] = {}
    for span in spans:
        if isinstance(span, Tokens):
            keys += span.ids
        else:
            rows[span.digest] = span
            keys += [(span.digest, i) for i in range(len(span))]
    return keys, rows


def _timings(
    started: float, first: float | None, last: float, n: int, prefilled: int, prefill_s: float
) -> Timings:
    decode_s = last - first if first else 0.0
    return Timings(
        ttft_s=first - started if first else None,
        prefill_s=prefill_s,
        prefill_tok_s=prefilled / prefill_s if prefilled and prefill_s > 0 else None,
        decode_s=decode_s,
        decode_tok_s=(n - 1) / decode_s if n > 1 and decode_s > 0 else None,
    )
