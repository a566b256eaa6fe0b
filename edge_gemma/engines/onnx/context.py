"""Spans → KV cache → logits, in one onnxruntime session; its failures become ours here.

In: spans, settings that a plan approved. Out: logits ``[k, n_vocab]`` float32, saved sequences.
The cache is ours: for each sequence and layer one array of keys and one of values, float32
``[1, n_head_kv, n_ctx, head_dim]``, which the graph takes as its past and writes as its present in
place. So going back is a number, and nothing is copied per token. A page of them is in memory once
it was written. One sequence per run: lanes are runs after one another.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_gemma.engines.engine import Buffer, Outputs, Step
from edge_gemma.engines.onnx.masks import NAMES as MASKS
from edge_gemma.engines.onnx.masks import fill_masks
from edge_gemma.engines.onnx.row_table import Table
from edge_gemma.engines.onnx.runtime import BoundGraph, run_bound, run_options
from edge_gemma.errors import (
    Cancelled,
    RuntimeFailure,
    UnsupportedModel,
    UsageError,
)
from edge_gemma.files import pages
from edge_gemma.plan.records import Settings
from edge_gemma.spans import Rows, Span, Tokens

_SIDES = ("key", "value")
# a saved sequence: mark, layers, heads of K/V, values of a head, positions
_STATE = struct.Struct("<8s4I")
_STATE_MARK, _WINDOW_MARK = b"EGONNX01", b"EGONNXW1"


@dataclass(frozen=True)
class LoadedGraph:
    """An opened graph and the tables beside it."""

    session: BoundGraph
    n_vocab: int
    n_embd: int
    n_layer: int
    kv_layers: tuple[int, ...]  # the N of past_key_values.N, in order
    n_head_kv: int
    head_dim: int
    embeddings: Table
    per_layer: Table | None  # gemma3n
    masked_window: int | None = None  # of sliding layers, where the graph is told who sees whom

    @property
    def ple_width(self) -> int:
        return self.per_layer.width // self.n_layer if self.per_layer else 0

    def close(self) -> None:
        self.embeddings.close()
        if self.per_layer:
            self.per_layer.close()


@dataclass
class _Sequence:
    """One sequence's cache, ``arrays[2 · layer + side]``, bound to the graph; and its length."""

    arrays: list[np.ndarray]
    binding: Any  # onnxruntime's IOBinding
    length: int = 0


@dataclass
class _Feed:
    """The buffers that every run is fed from, ``n_ubatch`` rows of them."""

    embeddings: np.ndarray
    per_layer: np.ndarray | None
    mask: np.ndarray
    biases: np.ndarray | None  # [2, n_ubatch · n_ctx]: who attends to whom
    keep: np.ndarray = field(default_factory=lambda: np.zeros((), np.int64))


class Context:
    """``n_seq_max`` sequences of ``n_ctx`` positions each. Not for two threads at once: hold
    ``lock``. ``n_outputs``: logits rows one decode may ask for.
    """

    def __init__(
        self,
        graph: LoadedGraph,
        settings: Settings,
        *,
        n_outputs: int | None = None,
        on_close: Callable[[Context], None] = lambda context: None,
    ):
        self._graph, self.settings, self._on_close = graph, settings, on_close
        self.n_outputs = max(n_outputs or 0, settings.n_seq_max)
        self.lock = threading.RLock()
        self._cancelled = threading.Event()
        self._step_options = run_options(empties_arena=False)
        self._options = run_options(empties_arena=True)
        self._sequences: dict[int, _Sequence] = {}
        self._open = True
        self._n_kept = 0
        self.n_decodes = 0
        try:
            n = settings.n_ubatch
            per_layer = None
            if graph.per_layer:
                per_layer = np.zeros((n, graph.n_layer, graph.ple_width), np.float32)
            self._feed = _Feed(
                np.zeros((n, graph.n_embd), np.float32),
                per_layer,
                np.ones((1, settings.n_ctx), np.int64),
                np.empty((2, n * settings.n_ctx), np.float32) if graph.masked_window else None,
            )
            # the kernel gives a page of it when it is first written
            self._logits = np.empty((self.n_outputs, graph.n_vocab), np.float32)
        except MemoryError:
            raise RuntimeFailure(
                f"no memory for a context of {settings.n_ctx} tokens in steps of {n}"
            ) from None

    # decoding

    def decode(self, sequence: int, position: int, span: Span, outputs: Outputs = "none") -> None:
        """Put one span at ``position`` of ``sequence``, split into ubatches. Raises Cancelled
        (whole ubatches before the stop stay), UsageError, UnsupportedModel, RuntimeFailure.
        """
        self._check_span(span)
        self._n_kept = 0
        n, step = len(span), self.settings.n_ubatch
        for start in range(0, n, step):
            stop = min(start + step, n)
            self._fill(span, start, stop)
            self._run(sequence, position + start, stop - start, is_block=_is_block(span))
        self._n_kept = int(outputs == "last" and n > 0)
        if self._n_kept:
            self._check_numbers(self._logits[:1])

    def decode_step(self, items: Sequence[Step], *, every: bool = False) -> None:
        """Tokens for each of several sequences: a run for each, one after the other."""
        n = sum(len(ids) for _, _, ids in items)
        n_rows = n if every else len(items)
        if n > self.settings.n_ubatch:
            raise UsageError(f"{n} tokens in one pass; n_ubatch is {self.settings.n_ubatch}")
        if n_rows > self.n_outputs:
            raise UsageError(f"{n_rows} logits rows asked of a context made for {self.n_outputs}")
        self._n_kept = row = 0
        try:
            for sequence, position, ids in items:
                keep = len(ids) if every else 1
                span = Tokens(tuple(ids))
                self._check_span(span)
                self._fill(span, 0, len(ids))
                self._run(sequence, position, len(ids), keep=keep, row=row)
                row += keep
        except (Cancelled, RuntimeFailure) as error:
            for sequence, position, _ in items:
                if sequence in self._sequences:
                    held = self._sequences[sequence]
                    held.length = min(held.length, position)
            if isinstance(error, Cancelled):
                raise Cancelled(min(position for _, position, _ in items)) from None
            raise
        self._n_kept = n_rows
        self._check_numbers(self._logits[:n_rows])

    def _check_span(self, span: Span) -> None:
        if isinstance(span, Rows):
            if span.rows.shape[1] != self._graph.n_embd:
                raise UsageError(
                    f"embedding rows are {span.rows.shape[1]} wide; this model takes "
                    f"{self._graph.n_embd}"
                )
            if not span.causal and self._feed.biases is None:
                raise UnsupportedModel(
                    "rows that attend to each other (a picture of Gemma 3) do not run in this "
                    "bundle's decoder.onnx, which is causal; load with engine='llama', or convert "
                    "again with the vision encoder"
                )
            if not span.causal and len(span) > self.settings.n_ubatch:
                raise UsageError(
                    f"{len(span)} rows that attend to each other need n_ubatch ≥ {len(span)}; it "
                    f"is {self.settings.n_ubatch}"
                )
        elif span.ids and not 0 <= min(span.ids) <= max(span.ids) < self._graph.n_vocab:
            raise UsageError(
                f"token ids must be 0 … {self._graph.n_vocab - 1}; got {min(span.ids)} … "
                f"{max(span.ids)}"
            )

    def _fill(self, span: Span, start: int, stop: int) -> None:
        graph, n = self._graph, stop - start
        ids = np.zeros(n, np.intp)  # rows of an encoder have the per-layer embeddings of padding
        if isinstance(span, Tokens):
            ids[:] = span.ids[start:stop]
            graph.embeddings.read(ids, self._feed.embeddings[:n])
        else:
            self._feed.embeddings[:n] = span.rows[start:stop]
        if graph.per_layer and self._feed.per_layer is not None:
            graph.per_layer.read(ids, self._feed.per_layer[:n].reshape(n, -1))

    def _run(
        self,
        sequence: int,
        position: int,
        n: int,
        *,
        keep: int = 1,
        row: int = 0,
        is_block: bool = False,
    ) -> None:
        """Run ``n`` fed rows, which attend to each other if they are a block; logits of the last
        ``keep`` go into the kept rows from ``row`` on.
        """
        self.check_open()
        held, total = self._held(sequence), position + n
        if total > self.settings.n_ctx:
            raise RuntimeFailure(
                f"the KV cache has no room for {n} more positions (n_ctx {self.settings.n_ctx})"
            )
        if position > held.length:
            raise UsageError(
                f"position {position} of a sequence that holds {held.length}: there is a gap"
            )
        self.n_decodes += 1
        held.length = position  # what stood behind it is forgotten, also when the run fails
        if self._cancelled.is_set():
            raise Cancelled(position)
        feed, logits = self._feed, self._logits[row : row + keep]
        feed.keep[()] = keep
        bind = held.binding.bind_input
        _bind(bind, "inputs_embeds", feed.embeddings, (1, n, *feed.embeddings.shape[1:]))
        if feed.per_layer is not None:
            _bind(bind, "per_layer_inputs", feed.per_layer, (1, n, *feed.per_layer.shape[1:]))
        _bind(bind, "attention_mask", feed.mask, (1, total))
        window = self._graph.masked_window
        if feed.biases is not None and window:
            biases = fill_masks(feed.biases, position, n, window=window, is_block=is_block)
            for name, bias in zip(MASKS, biases, strict=True):
                _bind(bind, name, bias, (1, 1, n, total))
        _bind(held.binding.bind_output, "logits", logits, (1, *logits.shape))
        try:
            options = self._step_options if n == 1 else self._options
            run_bound(self._graph.session, held.binding, options)
        except RuntimeFailure:
            if self._cancelled.is_set():
                raise Cancelled(position) from None
            raise
        held.length = total

    def _held(self, sequence: int) -> _Sequence:
        """The cache of a sequence, made when it is first used."""
        if not 0 <= sequence < self.settings.n_seq_max:
            raise UsageError(
                f"sequence {sequence}; this context has {self.settings.n_seq_max} of them"
            )
        if sequence not in self._sequences:
            graph = self._graph
            shape = (1, graph.n_head_kv, self.settings.n_ctx, graph.head_dim)
            names = [f"{n}.{side}" for n in graph.kv_layers for side in _SIDES]
            try:
                arrays = [np.zeros(shape, np.float32) for _ in names]
            except MemoryError:
                raise RuntimeFailure(
                    f"no memory for a KV cache of {self.settings.n_ctx} tokens"
                ) from None
            binding = graph.session.io_binding()
            for name, array in zip(names, arrays, strict=True):
                _bind(binding.bind_input, f"past_key_values.{name}", array, shape)
                _bind(binding.bind_output, f"present.{name}", array, shape)
            _bind(binding.bind_input, "num_logits_to_keep", self._feed.keep, ())
            self._sequences[sequence] = _Sequence(arrays, binding)
        return self._sequences[sequence]

    def _check_numbers(self, rows: np.ndarray) -> None:
        if not np.isfinite(rows.max(axis=1)).all():  # NaN passes through max
            raise RuntimeFailure(
                "the decoder gave logits that are no numbers: decoder.onnx or its data is damaged; "
                "`edge-gemma verify` tells"
            )

    def logits(self, row: int = -1) -> np.ndarray:
        """A view of one kept logits row ``[n_vocab]`` float32 of the last decode, valid until the
        next.
        """
        if not self._n_kept:
            raise RuntimeFailure("no logits are kept; the last decode asked for none")
        return self._logits[: self._n_kept][row]

    def evaluate(
        self, spans: Sequence[Span], wanted: range | None = None, step: int | None = None
    ) -> Iterator[np.ndarray]:
        self.clear(0)
        position = 0
        for span in spans:
            self._check_span(span)
            if _is_block(span):
                yield from self._evaluate_block(position, span, wanted)
                position += len(span)
                continue
            n_most = min(self.settings.n_ubatch, step or self.n_outputs, self.n_outputs)
            start = 0
            while start < len(span):
                n, keep = _piece(
                    position, len(span) - start, wanted, self.settings.n_ubatch, n_most
                )
                self._fill(span, start, start + n)
                self._run(0, position, n, keep=max(keep, 1))
                start, position = start + n, position + n
                if keep:
                    self._check_numbers(self._logits[:keep])
                    yield self._logits[:keep].copy()

    def _evaluate_block(
        self, position: int, span: Span, wanted: range | None
    ) -> Iterator[np.ndarray]:
        """Rows that attend to each other, in one run: those wanted may end before the last."""
        n = len(span)
        asked = range(position, position + n)
        if wanted is not None:
            asked = range(max(wanted.start, asked.start), min(wanted.stop, asked.stop))
        keep = position + n - asked.start if asked else 0
        if keep > self.n_outputs:
            raise UsageError(f"{keep} logits rows asked of a context made for {self.n_outputs}")
        self._fill(span, 0, n)
        self._run(0, position, n, keep=max(keep, 1), is_block=True)
        if keep:
            self._check_numbers(self._logits[:keep])
            yield self._logits[: len(asked)].copy()

    # the cache

    def clear(self, sequence: int) -> None:
        if sequence in self._sequences:
            self._sequences[sequence].length = 0

    def can_rewind(self, sequence: int, position: int) -> bool:
        return position <= self.length(sequence)

    def rewind(self, sequence: int, position: int) -> bool:
        """Always exact: every layer keeps all positions."""
        if position > self.length(sequence):
            self.clear(sequence)
            return False
        if sequence in self._sequences:
            self._sequences[sequence].length = position
        return True

    def length(self, sequence: int) -> int:
        return self._sequences[sequence].length if sequence in self._sequences else 0

    def state_bytes(self, sequence: int, *, window: bool = False) -> int:
        graph, n = self._graph, 0 if window else self.length(sequence)
        cells = 2 * len(graph.kv_layers) * graph.n_head_kv * n * graph.head_dim
        return _STATE.size + 4 * cells

    def save(self, sequence: int) -> memoryview:
        """Keys and values of the positions that are held, behind a header."""
        held, n = self._held(sequence), self.length(sequence)
        state = pages(self.state_bytes(sequence))
        state[: _STATE.size] = self._header(_STATE_MARK, n)
        values = np.frombuffer(state, np.float32, offset=_STATE.size)
        if n:
            saved = values.reshape(len(held.arrays), *self._cells(n))
            for place, array in zip(saved, held.arrays, strict=True):
                place[...] = array[0, :, :n]
        return state

    def restore(self, sequence: int, state: Buffer) -> bool:
        self.clear(sequence)
        held, view = self._held(sequence), memoryview(state).cast("B")
        n = self._positions_in(view, _STATE_MARK)
        if n is None:
            return False
        values = np.frombuffer(view, np.float32, offset=_STATE.size)
        if values.size != len(held.arrays) * int(np.prod(self._cells(n))):
            return False
        if n:
            saved = values.reshape(len(held.arrays), *self._cells(n))
            for place, array in zip(saved, held.arrays, strict=True):
                array[0, :, :n] = place
        held.length = n
        return True

    def save_window(self, sequence: int) -> memoryview:
        """A mark alone: no layer loses anything as the sequence grows."""
        window = pages(_STATE.size)
        window[:] = self._header(_WINDOW_MARK, self.length(sequence))
        return window

    def restore_window(self, sequence: int, window: Buffer, position: int) -> bool:
        view = memoryview(window).cast("B")
        if self._positions_in(view, _WINDOW_MARK) != position or len(view) != _STATE.size:
            self.clear(sequence)
            return False
        return self.rewind(sequence, position)

    def _cells(self, n: int) -> tuple[int, int, int]:
        return self._graph.n_head_kv, n, self._graph.head_dim

    def _header(self, mark: bytes, n: int) -> bytes:
        graph = self._graph
        return _STATE.pack(mark, len(graph.kv_layers), graph.n_head_kv, graph.head_dim, n)

    def _positions_in(self, state: memoryview, mark: bytes) -> int | None:
        """How many positions a state holds; None where it is not one of such a graph."""
        if len(state) < _STATE.size or (len(state) - _STATE.size) % 4:
            return None
        n = int(_STATE.unpack_from(state)[-1])
        is_ours = bytes(state[: _STATE.size]) == self._header(mark, n)
        return n if is_ours and n <= self.settings.n_ctx else None

    # stopping

    def cancel(self) -> None:
        """Stop a decode that is running, from any thread, between two nodes of the graph."""
        self._cancelled.set()
        self._options.terminate = self._step_options.terminate = True

    def clear_cancel(self) -> None:
        self._cancelled.clear()
        self._options.terminate = self._step_options.terminate = False

    def close(self) -> None:
        self.cancel()
        with self.lock:  # a decode in another thread lands first
            if self._open:
                self._open = False
                self._on_close(self)
                self._sequences.clear()
                self._n_kept = 0

    @property
    def is_open(self) -> bool:
        return self._open

    def check_open(self) -> None:
        if not self._open:
            raise RuntimeFailure("the model was closed while it was in use")


def _bind(bind: Callable, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Have the graph use the beginning of ``array``, as ``shape``, where it lies."""
    bind(name, "cpu", 0, array.dtype.type, list(shape), array.ctypes.data)


def _is_block(span: Span) -> bool:
    return isinstance(span, Rows) and not span.causal


def _piece(
    position: int, n_left: int, wanted: range | None, n_ubatch: int, n_most: int
) -> tuple[int, int]:
    """How many rows the next run of an evaluation takes, and how many of them keep logits: all or
    none, so that kept rows are a run's last.
    """
    if wanted is None:
        n = min(n_left, n_most)
        return n, n
    if position < wanted.start:
        return min(n_left, n_ubatch, wanted.start - position), 0
    if position >= wanted.stop:
        return min(n_left, n_ubatch), 0
    n = min(n_left, n_most, wanted.stop - position)
    return n, n
