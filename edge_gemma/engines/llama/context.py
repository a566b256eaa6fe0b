"""Spans → KV cache → logits, in one llama.cpp context; its failures become ours here.

In: spans, settings that a plan approved. Out: logits ``[k, n_vocab]`` float32, saved sequences.
This module does not know prompts, bundles or sessions. llama.cpp aborts the process on what it
asserts, so whatever it would assert on (outputs beyond the reserve, batches beyond n_ubatch) is
checked before the call.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from edge_gemma.bundles.gguf import TYPE_IDS
from edge_gemma.engines.engine import Buffer, Outputs, Step
from edge_gemma.engines.llama import library as llama
from edge_gemma.engines.llama.rescoring import Rescorer
from edge_gemma.errors import Cancelled, RuntimeFailure, UsageError
from edge_gemma.files import pages
from edge_gemma.plan.records import Settings
from edge_gemma.spans import Rows, Span, Tokens

_Pointer = Any  # llama.cpp's objects behind ctypes


@dataclass(frozen=True)
class LoadedModel:
    """What a context needs to know of a loaded model."""

    pointer: _Pointer
    n_vocab: int
    n_embd: int
    n_swa: int  # the sliding window in tokens; 0 where there is none
    adapters: tuple[tuple[_Pointer, float], ...]  # LoRA adapters and their scales


class Context:
    """One llama.cpp context:

    ``n_seq_max`` sequences of ``n_ctx`` positions each. Not for two threads at once: hold ``lock``.

    ``n_outputs``: logits rows one decode may ask for. ``on_tensor``: an evaluation callback
    ``(tensor_pointer, ask) -> bool`` (see ggml_backend_sched_eval_callback), for calibration.
    ``rescorer`` scores the best of each kept row again; llama.cpp gives hidden states for all of a
    batch or none, so a span's last position is then a batch of its own.
    """

    def __init__(
        self,
        model: LoadedModel,
        settings: Settings,
        *,
        n_outputs: int | None = None,
        on_tensor: Callable[[int, bool], bool] | None = None,
        on_close: Callable[[Context], None] = lambda context: None,
        rescorer: Rescorer | None = None,
    ):
        self._low = llama.library()
        self._rescorer = rescorer
        self._model, self.settings, self._on_close = model, settings, on_close
        self.n_outputs = max(n_outputs or 0, settings.n_seq_max)
        # A C function as abort callback: it is asked between any two graph nodes, and a Python one
        # would fight for the GIL each time. strlen(flag) is 0 for an empty string and 1 once
        # cancel() has written one character.
        self._flag = ctypes.create_string_buffer(2)
        self._on_tensor = self._tensor_callback(on_tensor)
        self._ctx: _Pointer = None
        self.n_decodes = 0
        self.lock = threading.RLock()
        try:
            with llama.interrupts_held():
                self._ctx = self._low.llama_init_from_model(model.pointer, self._params())
        except BaseException:
            self.close()
            raise
        if not self._ctx:
            raise RuntimeFailure(
                f"llama.cpp could not make a context of {settings.n_ctx} tokens: {llama.last_log()}"
            )
        self._set_adapters()
        self._memory = self._low.llama_get_memory(self._ctx)
        self._buffers(settings.n_ubatch, settings.n_seq_max)

    def _params(self) -> _Pointer:
        low, settings = self._low, self.settings
        params = low.llama_context_default_params()
        params.n_ctx = settings.n_ctx * settings.n_seq_max
        # spans are split here; a larger n_batch would only delay cancelling
        params.n_batch = params.n_ubatch = settings.n_ubatch
        params.n_seq_max = settings.n_seq_max
        params.n_outputs_max = self.n_outputs
        params.n_threads = params.n_threads_batch = settings.n_threads
        params.type_k = params.type_v = TYPE_IDS[settings.kv_type.upper()]
        quantized_v = settings.kv_type != "f16"  # which needs flash attention
        params.flash_attn_type = 1 if settings.flash_attention or quantized_v else 0
        params.swa_full = False
        params.kv_unified = False
        params.no_perf = True
        params.offload_kqv = settings.n_gpu_layers > 0
        strlen = ctypes.CDLL(None).strlen
        params.abort_callback = ctypes.cast(strlen, low.ggml_abort_callback)
        params.abort_callback_data = ctypes.cast(self._flag, ctypes.c_void_p)
        if self._on_tensor is not None:
            params.cb_eval = self._on_tensor
        return params

    def _tensor_callback(self, on_tensor: Callable[[int, bool], bool] | None) -> _Pointer:
        if on_tensor is None:
            return None
        return self._low.ggml_backend_sched_eval_callback(
            lambda tensor, ask, _: bool(on_tensor(tensor, ask))
        )

    def _set_adapters(self) -> None:
        low, adapters = self._low, self._model.adapters
        if not adapters:
            return
        handles = [ctypes.cast(adapter, ctypes.c_void_p) for adapter, _ in adapters]
        pointers = (ctypes.c_void_p * len(adapters))(*handles)
        scales = (ctypes.c_float * len(adapters))(*[scale for _, scale in adapters])
        handle_type = ctypes.POINTER(low.llama_adapter_lora_p_ctypes)
        low.llama_set_adapters_lora(
            self._ctx, ctypes.cast(pointers, handle_type), len(adapters), scales
        )

    def _buffers(self, n: int, n_seq: int) -> None:
        """Arrays that every llama_batch points into: allocated once, so the token loop allocates
        nothing.
        """
        self._ids = np.zeros(n, np.int32)
        self._pos = np.zeros(n, np.int32)
        self._n_seq = np.ones(n, np.int32)
        self._out = np.zeros(n, np.int8)
        self._out_index = np.empty(0, np.int64)  # rows of the last batch whose logits are kept
        self._seq_values = (ctypes.c_int32 * n_seq)(*range(n_seq))
        step, base = ctypes.sizeof(ctypes.c_int32), ctypes.addressof(self._seq_values)
        self._seq_address = [base + i * step for i in range(n_seq)]
        self._seq = np.zeros(n, np.uintp)
        int32, int8, pointer = (
            ctypes.POINTER(ctypes.c_int32),
            ctypes.POINTER(ctypes.c_int8),
            ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)),
        )
        self._batch = self._low.llama_batch(
            n_tokens=0,
            token=self._ids.ctypes.data_as(int32),
            embd=None,
            pos=self._pos.ctypes.data_as(int32),
            n_seq_id=self._n_seq.ctypes.data_as(int32),
            seq_id=self._seq.ctypes.data_as(pointer),
            logits=self._out.ctypes.data_as(int8),
        )
        self._token_pointer = self._ids.ctypes.data_as(
            int32
        )  # not read from the batch: ctypes would give a view of its field

    # decoding

    def decode(self, sequence: int, position: int, span: Span, outputs: Outputs = "none") -> None:
        """Put one span at ``position`` of ``sequence``, split into ubatches.

        ``outputs``: logits of "none" or "last".

        Raises Cancelled (whole ubatches before the stop stay), RuntimeFailure.
        """
        n, step = len(span), self.settings.n_ubatch
        if isinstance(span, Rows):
            if span.rows.shape[1] != self._model.n_embd:
                raise UsageError(
                    f"embedding rows are {span.rows.shape[1]} wide; this model takes "
                    f"{self._model.n_embd}"
                )
            if not span.causal:
                self._decode_block(sequence, position, span, outputs)
                return
        alone = n - 1 if self._rescorer and outputs == "last" else n
        starts = [*range(0, alone, step), *range(alone, n)]
        for start, stop in pairwise([*starts, n]):
            self._fill(sequence, position + start, span, start, stop)
            self._out[: stop - start] = 0
            if outputs == "last" and stop == n:
                self._out[stop - start - 1] = 1
            self._run(stop - start, {sequence: position + start})

    def _decode_block(self, sequence: int, position: int, span: Rows, outputs: Outputs) -> None:
        n = len(span)
        if (
            n > self.settings.n_ubatch
        ):  # llama.cpp asserts n_ubatch >= n_tokens for non-causal attention
            raise UsageError(
                f"{n} rows that attend to each other need n_ubatch ≥ {n}; it is "
                f"{self.settings.n_ubatch}"
            )
        self._fill(sequence, position, span, 0, n)
        self._out[:n] = 0
        self._out[n - 1] = outputs == "last"
        self._low.llama_set_causal_attn(self._ctx, False)
        try:
            self._run(n, {sequence: position})
        finally:
            self._low.llama_set_causal_attn(self._ctx, True)

    def decode_step(self, items: Sequence[Step], *, every: bool = False) -> None:
        """Tokens for each of several sequences in one pass: ``(sequence, position, ids)``; the
        logits of each one's last are kept, in order, or those of ``every`` token.
        """
        n = sum(len(ids) for _, _, ids in items)
        if n > self.settings.n_ubatch:
            raise UsageError(f"{n} tokens in one pass; n_ubatch is {self.settings.n_ubatch}")
        starts = {sequence: position for sequence, position, _ in items}
        # llama.cpp cuts a batch wherever its sequences do not follow each other upwards, and reads
        # all weights for each piece: four lanes out of order took three times as long
        order = sorted(range(len(items)), key=lambda i: items[i][0])
        items = [items[i] for i in order]
        if self._rescorer and not every and n > len(items):  # the last ones in a pass of their own
            before = [(s, position, ids[:-1]) for s, position, ids in items]
            self._run(self._fill_step(before, every=False, last=False), starts)
            items = [(s, position + len(ids) - 1, ids[-1:]) for s, position, ids in items]
        self._run(self._fill_step(items, every=every), starts)
        counts = [len(ids) if every else 1 for _, _, ids in items]
        kept = np.split(self._out_index, np.cumsum(counts)[:-1])
        self._out_index = np.concatenate([kept[order.index(i)] for i in range(len(items))])

    def _fill_step(self, items: Sequence[Step], *, every: bool, last: bool = True) -> int:
        """Put ``items`` into the batch; returns how many tokens they are."""
        self._batch.token, self._batch.embd = self._token_pointer, None
        i = 0
        for sequence, position, ids in items:
            for offset, token in enumerate(ids):
                self._ids[i], self._pos[i] = token, position + offset
                self._seq[i], self._out[i] = self._seq_address[sequence], every
                i += 1
            if last and ids:
                self._out[i - 1] = 1
        return i

    def _fill(self, sequence: int, position: int, span: Span, start: int, stop: int) -> None:
        n = stop - start
        if isinstance(span, Tokens):
            ids = np.asarray(span.ids[start:stop], np.int32)
            if ids.size and (ids.min() < 0 or ids.max() >= self._model.n_vocab):
                raise UsageError(
                    f"token ids must be 0 … {self._model.n_vocab - 1}; got {ids.min()} … "
                    f"{ids.max()}"
                )
            self._ids[:n] = ids
            self._batch.token, self._batch.embd = self._token_pointer, None
        else:
            rows = span.rows[start:stop]  # contiguous float32 by construction
            self._batch.token, self._batch.embd = (
                None,
                rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            )
        self._pos[:n] = np.arange(position, position + n)
        self._seq[:n] = self._seq_address[sequence]

    def _run(self, n: int, starts: dict[int, int]) -> None:
        self._batch.n_tokens = n
        self.n_decodes += 1
        self._out_index = np.flatnonzero(self._out[:n])
        if len(self._out_index) > self.n_outputs:
            raise UsageError(
                f"{len(self._out_index)} logits rows asked of a context made for {self.n_outputs}"
            )
        rescored = self._rescorer if 0 < n == len(self._out_index) else None
        if self._rescorer:
            self._low.llama_set_embeddings(self._ctx, rescored is not None)
        with llama.interrupts_held(self.cancel) if self._on_tensor else nullcontext():
            code = self._low.llama_decode(self._ctx, self._batch)
        if code == 0:
            if rescored:
                self._rescore(rescored, n)
            return
        for sequence, position in starts.items():
            self._low.llama_memory_seq_rm(self._memory, sequence, position, -1)
        if code == 2:
            raise Cancelled(min(starts.values()))
        if code == 1:
            raise RuntimeFailure(
                f"the KV cache has no room for {n} more positions (n_ctx {self.settings.n_ctx})"
            )
        raise RuntimeFailure(f"llama.cpp could not decode (code {code}): {llama.last_log()}")

    def _rescore(self, rescorer: Rescorer, n: int) -> None:
        for index in range(n):
            hidden = self._low.llama_get_embeddings_ith(self._ctx, index)
            if not hidden:
                raise RuntimeFailure("llama.cpp kept no hidden state to score candidates with")
            row = np.ctypeslib.as_array(hidden, (self._model.n_embd,))
            rescorer.rescore(self.logits(index), row)

    def cancel(self) -> None:
        """Stop a decode that is running, from any thread, between two graph nodes (CPU only)."""
        self._flag[0] = b"\x01"

    def clear_cancel(self) -> None:
        self._flag[0] = b"\x00"

    def logits(self, row: int = -1) -> np.ndarray:
        """A view of one kept logits row ``[n_vocab]`` float32 of the last decode, valid until the
        next.
        """
        index = int(self._out_index[row]) if len(self._out_index) else -1
        pointer = self._low.llama_get_logits_ith(self._ctx, index) if index >= 0 else None
        if not pointer:
            raise RuntimeFailure("no logits are kept; the last decode asked for none")
        return np.ctypeslib.as_array(pointer, (self._model.n_vocab,))

    def evaluate(
        self, spans: Sequence[Span], wanted: range | None = None, step: int | None = None
    ) -> Iterator[np.ndarray]:
        """Logits at every position (or those in ``wanted``, a contiguous range) of one prompt, in
        blocks ``[k, n_vocab]`` float32.

        The context is cleared first. Blocks hold at most ``n_outputs`` rows and are copies.
        """
        self.clear(0)
        position = 0
        for span in spans:
            is_block = isinstance(span, Rows) and not span.causal
            block = len(span) if is_block else min(self.settings.n_ubatch, step or self.n_outputs)
            cuts = set(range(0, len(span), block)) | {len(span)}
            if self._rescorer and wanted is not None and not is_block:  # batches of their own
                borders = {wanted.start - position, wanted.stop - position}
                cuts |= {border for border in borders if 0 < border < len(span)}
            for start, stop in pairwise(sorted(cuts)):
                n = stop - start
                self._fill(0, position, span, start, stop)
                keep = (
                    np.ones(n, np.int8)
                    if wanted is None
                    else np.array([p in wanted for p in range(position, position + n)], np.int8)
                )
                self._out[:n] = keep
                self._low.llama_set_causal_attn(self._ctx, not is_block)
                try:
                    self._run(n, {0: position})
                finally:
                    self._low.llama_set_causal_attn(self._ctx, True)
                if len(self._out_index):
                    yield np.stack([self.logits(i) for i in range(len(self._out_index))])
                position += n

    # the cache

    def clear(self, sequence: int) -> None:
        self._low.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def rewind(self, sequence: int, position: int) -> bool:
        """Forget ``position`` and everything after it.

        False when the sliding window's cells are gone: then prefill again.

        llama_memory_seq_rm says True even when they are, and the next logits are silently wrong.
        """
        if position == 0 or not self.can_rewind(sequence, position):
            self.clear(sequence)
            return position == 0
        return bool(self._low.llama_memory_seq_rm(self._memory, sequence, position, -1))

    def can_rewind(self, sequence: int, position: int) -> bool:
        # a token attends to itself and the n_swa - 1 before it
        oldest = self._low.llama_memory_seq_pos_min(self._memory, sequence)
        return position == 0 or oldest <= max(0, position - self._model.n_swa + 1)

    def length(self, sequence: int) -> int:
        return self._low.llama_memory_seq_pos_max(self._memory, sequence) + 1

    def state_bytes(self, sequence: int, *, window: bool = False) -> int:
        return self._low.llama_state_seq_get_size_ext(self._ctx, sequence, self._part(window))

    def save(self, sequence: int) -> memoryview:
        """llama.cpp's own bytes of one sequence's cells. Restore only into a context of the same
        file, n_ctx and KV type.
        """
        return self._saved(sequence, window=False)

    def save_window(self, sequence: int) -> memoryview:
        return self._saved(sequence, window=True)

    def restore(self, sequence: int, state: Buffer) -> bool:
        self.clear(sequence)
        return self._restored(sequence, state, window=False)

    def restore_window(self, sequence: int, window: Buffer, position: int) -> bool:
        if not self._restored(sequence, window, window=True):
            return False
        # the other layers go back, too
        self._low.llama_memory_seq_rm(self._memory, sequence, position, -1)
        return self.length(sequence) == position

    def _part(self, window: bool) -> int:
        low = self._low
        return low.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY if window else low.LLAMA_STATE_SEQ_FLAGS_NONE

    def _saved(self, sequence: int, *, window: bool) -> memoryview:
        size, flags = self.state_bytes(sequence, window=window), self._part(window)
        state = pages(size)
        buffer = (ctypes.c_uint8 * size).from_buffer(state)
        if self._low.llama_state_seq_get_data_ext(self._ctx, buffer, size, sequence, flags) != size:
            raise RuntimeFailure("llama.cpp could not save the conversation's state")
        return state

    def _restored(self, sequence: int, state: Buffer, *, window: bool) -> bool:
        data = np.frombuffer(state, np.uint8)  # no copy: a state is up to a hundred MiB
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read = self._low.llama_state_seq_set_data_ext(
            self._ctx, pointer, data.size, sequence, self._part(window)
        )
        if read == 0:
            self.clear(sequence)
        return bool(read)

    def close(self) -> None:
        self.cancel()
        with self.lock:  # a decode in another thread lands first
            if self._ctx:
                self._on_close(self)
                with llama.interrupts_held():
                    self._low.llama_free(self._ctx)
                    self._ctx = None

    @property
    def is_open(self) -> bool:
        return bool(self._ctx)

    def check_open(self) -> None:
        if not self._ctx:
            raise RuntimeFailure("the model was closed while it was in use")
