"""Spans → KV cache → logits → sampled ids, on llama.cpp (llama.py); its failures become ours here.

In: a GGUF that was checked, settings that a plan approved, spans. Out: ids, logits ``[k, n_vocab]``
float32, saved sequences. This room does not know prompts, bundles or sessions. llama.cpp aborts the
process on what it asserts, so whatever it would assert on (outputs beyond the reserve, batches
beyond n_ubatch, a grammar fed a forbidden token) is checked before the call.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from edge_gemma.bundles.gguf import TYPE_IDS
from edge_gemma.engines.llama import library as llama
from edge_gemma.errors import BundleError, RuntimeFailure, UsageError
from edge_gemma.plan.records import Settings
from edge_gemma.spans import Rows, Span, Tokens

EVALUATE_ROWS = 64  # logits rows per block in Context.evaluate: 64 × 262,144 × 4 bytes = 64 MiB

# -- the model: weights and vocabulary, shared and immutable -----------------------------------------------------------


class Decoder:
    """Weights and vocabulary of one GGUF in llama.cpp.

    Holds no conversation; :meth:`context` makes what does.

    ``on_progress(fraction) -> bool`` is called while weights load; returning False stops the load
    (KeyboardInterrupt is raised for it). Raises BundleError when llama.cpp refuses the file.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Settings,
        *,
        lora: Sequence[tuple[str | Path, float]] = (),
        on_progress: Callable[[float], bool] | None = None,
    ):
        self._low = low = llama.library()
        self.settings = settings
        llama.forget_log()
        params = low.llama_model_default_params()
        params.n_gpu_layers = settings.n_gpu_layers
        params.use_extra_bufts = settings.repack
        params.load_mode = low.LLAMA_LOAD_MODE_MMAP
        stopped = threading.Event()

        def progress(fraction: float, _) -> bool:
            try:
                if on_progress is not None and on_progress(fraction) is False:
                    stopped.set()
            except (
                BaseException
            ):  # an exception cannot cross the C frames: stop the load, tell afterwards
                stopped.set()
            return not stopped.is_set()

        params.progress_callback = low.llama_progress_callback(progress)
        self._model = None
        self._contexts: set[Context] = set()
        self._adapters = []
        try:
            with llama.interrupts_held(stopped.set):
                self._model = low.llama_model_load_from_file(os.fsencode(path), params)
                if not self._model:
                    if stopped.is_set():
                        raise KeyboardInterrupt
                    raise BundleError(f"llama.cpp could not load {path}: {llama.last_log()}")
                for file, scale in lora:  # before any context: the graph is sized from them
                    self._adapters.append((self._open_adapter(Path(file)), float(scale)))
        except BaseException:
            self.close()
            raise
        self.vocab = low.llama_model_get_vocab(self._model)
        self.n_vocab = low.llama_vocab_n_tokens(self.vocab)
        self.n_embd = low.llama_model_n_embd(self._model)
        self.n_ctx_train = low.llama_model_n_ctx_train(self._model)
        self.n_swa = low.llama_model_n_swa(self._model)
        self.bos = low.llama_vocab_bos(self.vocab)
        self.add_bos = bool(low.llama_vocab_get_add_bos(self.vocab))

    def _open_adapter(self, path: Path):
        if not path.is_file():
            raise UsageError(f"no LoRA adapter at {path}")
        adapter = self._low.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not adapter:
            raise BundleError(
                f"llama.cpp could not apply the LoRA adapter {path}: {llama.last_log()}"
            )
        return adapter

    def reported_bytes(self) -> dict[str, int]:
        """What llama.cpp said it allocated while loading and making contexts: ``{"CPU_REPACK
        model": bytes, …}``.
        """
        return llama.reported_bytes()

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Text → ids without BOS. ``special`` lets control tokens in the text be control tokens;
        user text never should.
        """
        data = text.encode("utf-8", "surrogatepass")
        capacity = len(data) + 2
        while True:
            buffer = (ctypes.c_int32 * capacity)()
            n = self._low.llama_tokenize(
                self.vocab, data, len(data), buffer, capacity, False, special
            )
            if n >= 0:
                return buffer[:n]
            if n == -(1 << 31):
                raise UsageError(f"a text of {len(data)} bytes is too long to tokenize")
            capacity = -n

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes a token stands for; control tokens give none unless ``special``."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._low.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def is_end(self, token: int) -> bool:
        return bool(self._low.llama_vocab_is_eog(self.vocab, token))

    def context(self, settings: Settings | None = None, **changes) -> Context:
        """A KV cache with compute buffers. ``changes`` as of :class:`Context`. Raises
        RuntimeFailure when llama.cpp cannot.
        """
        return Context(self, settings or self.settings, **changes)

    def close(self) -> None:
        for context in list(getattr(self, "_contexts", ())):
            context.close()
        if self._model:
            for adapter, _ in self._adapters:
                self._low.llama_adapter_lora_free(adapter)
            self._adapters = []
            with llama.interrupts_held():
                self._low.llama_model_free(self._model)
                self._model = None


class Cancelled(Exception):
    """A decode was stopped by :meth:`Context.cancel`. The positions before ``position`` are intact,
    nothing after them is kept.
    """

    def __init__(self, position: int):
        self.position = position


# -- the context: KV cache and compute buffers ------------------------------------------------------------------------


class Context:
    """One llama.cpp context:

    ``n_seq_max`` sequences of ``n_ctx`` positions each. Not for two threads at once: hold ``lock``.

    ``n_outputs``: logits rows one decode may ask for. ``on_tensor``: an evaluation callback
    ``(tensor_pointer, ask) -> bool`` (see ggml_backend_sched_eval_callback), for calibration.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: Settings,
        *,
        n_outputs: int | None = None,
        on_tensor: Callable | None = None,
    ):
        self._low = low = decoder._low
        self.decoder, self.settings = decoder, settings
        self.n_outputs = max(n_outputs or 0, settings.n_seq_max)
        params = low.llama_context_default_params()
        params.n_ctx = settings.n_ctx * settings.n_seq_max
        params.n_batch = params.n_ubatch = (
            settings.n_ubatch
        )  # we split; a larger n_batch would only delay cancelling
        params.n_seq_max = settings.n_seq_max
        params.n_outputs_max = self.n_outputs
        params.n_threads = params.n_threads_batch = settings.n_threads
        params.type_k = params.type_v = TYPE_IDS[settings.kv_type.upper()]
        params.flash_attn_type = (
            1 if settings.flash_attention or settings.kv_type != "f16" else 0
        )  # a quantized V needs it
        params.swa_full = False
        params.kv_unified = False
        params.no_perf = True
        params.offload_kqv = settings.n_gpu_layers > 0
        # A C function as abort callback: it is asked between any two graph nodes, and a Python one
        # would fight for the GIL each time. strlen(flag) is 0 for an empty string and 1 once
        # cancel() has written one character.
        self._flag = ctypes.create_string_buffer(2)
        strlen = ctypes.CDLL(None).strlen
        params.abort_callback = ctypes.cast(strlen, low.ggml_abort_callback)
        params.abort_callback_data = ctypes.cast(self._flag, ctypes.c_void_p)
        self._on_tensor = None
        if on_tensor is not None:
            self._on_tensor = low.ggml_backend_sched_eval_callback(
                lambda tensor, ask, _: bool(on_tensor(tensor, ask))
            )
            params.cb_eval = self._on_tensor
        self._ctx = None
        self.lock = threading.RLock()
        try:
            with llama.interrupts_held():
                self._ctx = low.llama_init_from_model(decoder._model, params)
        except BaseException:
            self.close()
            raise
        if not self._ctx:
            raise RuntimeFailure(
                f"llama.cpp could not make a context of {settings.n_ctx} tokens: {llama.last_log()}"
            )
        if decoder._adapters:
            pointers = (ctypes.c_void_p * len(decoder._adapters))(
                *[ctypes.cast(a, ctypes.c_void_p) for a, _ in decoder._adapters]
            )
            scales = (ctypes.c_float * len(decoder._adapters))(*[s for _, s in decoder._adapters])
            low.llama_set_adapters_lora(
                self._ctx,
                ctypes.cast(pointers, ctypes.POINTER(low.llama_adapter_lora_p_ctypes)),
                len(decoder._adapters),
                scales,
            )
        self._memory = low.llama_get_memory(self._ctx)
        self._buffers(settings.n_ubatch, settings.n_seq_max)
        decoder._contexts.add(self)

    def _buffers(self, n: int, n_seq: int) -> None:
        """Arrays that every llama_batch points into: allocated once, so the token loop allocates
        nothing.
        """
        self._ids = np.zeros(n, np.int32)
        self._pos = np.zeros(n, np.int32)
        self._n_seq = np.ones(n, np.int32)
        self._out = np.zeros(n, np.int8)
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

    def decode(self, sequence: int, position: int, span: Span, outputs: str = "none") -> None:
        """Put one span at ``position`` of ``sequence``, split into ubatches.

        ``outputs``: logits of "none" or "last".

        Raises Cancelled (whole ubatches before the stop stay), RuntimeFailure.
        """
        n, step = len(span), self.settings.n_ubatch
        if isinstance(span, Rows):
            if span.rows.shape[1] != self.decoder.n_embd:
                raise UsageError(
                    f"embedding rows are {span.rows.shape[1]} wide; this model takes "
                    f"{self.decoder.n_embd}"
                )
            if not span.causal:
                self._decode_block(sequence, position, span, outputs)
                return
        for start in range(0, n, step):
            stop = min(start + step, n)
            self._fill(sequence, position + start, span, start, stop)
            self._out[: stop - start] = 0
            if outputs == "last" and stop == n:
                self._out[stop - start - 1] = 1
            self._run(stop - start, {sequence: position + start})

    def _decode_block(self, sequence: int, position: int, span: Rows, outputs: str) -> None:
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

    def decode_step(self, items: Sequence[tuple[int, int, int]]) -> None:
        """One token for each of several sequences in one pass: ``(sequence, position, id)``; logits
        of all are kept, in order.
        """
        n = len(items)
        self._batch.token, self._batch.embd = self._token_pointer, None
        for i, (sequence, position, token) in enumerate(items):
            self._ids[i], self._pos[i], self._seq[i] = token, position, self._seq_address[sequence]
        self._out[:n] = 1
        self._run(n, {sequence: position for sequence, position, _ in items})

    def _fill(self, sequence: int, position: int, span: Span, start: int, stop: int) -> None:
        n = stop - start
        if isinstance(span, Tokens):
            ids = np.asarray(span.ids[start:stop], np.int32)
            if ids.size and (ids.min() < 0 or ids.max() >= self.decoder.n_vocab):
                raise UsageError(
                    f"token ids must be 0 … {self.decoder.n_vocab - 1}; got {ids.min()} … "
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
        self._out_index = np.flatnonzero(self._out[:n])
        if len(self._out_index) > self.n_outputs:
            raise UsageError(
                f"{len(self._out_index)} logits rows asked of a context made for {self.n_outputs}"
            )
        with llama.interrupts_held(self.cancel) if self._on_tensor else nullcontext():
            code = self._low.llama_decode(self._ctx, self._batch)
        if code == 0:
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
        return np.ctypeslib.as_array(pointer, (self.decoder.n_vocab,))

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
            block = (
                len(span)
                if isinstance(span, Rows) and not span.causal
                else min(self.settings.n_ubatch, step or self.n_outputs)
            )
            for start in range(0, len(span), block):
                stop = min(start + block, len(span))
                n = stop - start
                self._fill(0, position, span, start, stop)
                keep = (
                    np.ones(n, np.int8)
                    if wanted is None
                    else np.array([p in wanted for p in range(position, position + n)], np.int8)
                )
                self._out[:n] = keep
                causal = not (isinstance(span, Rows) and not span.causal)
                self._low.llama_set_causal_attn(self._ctx, causal)
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
        oldest = self._low.llama_memory_seq_pos_min(self._memory, sequence)
        if position == 0 or oldest > max(0, position - self.decoder.n_swa):
            self.clear(sequence)
            return position == 0
        return bool(self._low.llama_memory_seq_rm(self._memory, sequence, position, -1))

    def length(self, sequence: int) -> int:
        return self._low.llama_memory_seq_pos_max(self._memory, sequence) + 1

    def save(self, sequence: int) -> bytes:
        """llama.cpp's own bytes of one sequence's cells. Restore only into a context of the same
        file, n_ctx and KV type.
        """
        size = self._low.llama_state_seq_get_size(self._ctx, sequence)
        buffer = (ctypes.c_uint8 * size)()
        written = self._low.llama_state_seq_get_data(self._ctx, buffer, size, sequence)
        if written == 0:
            raise RuntimeFailure("llama.cpp could not save the conversation's state")
        return bytes(memoryview(buffer)[:written])

    def restore(self, sequence: int, state: bytes) -> bool:
        self.clear(sequence)
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if self._low.llama_state_seq_set_data(self._ctx, buffer, len(state), sequence) == 0:
            self.clear(sequence)
            return False
        return True

    def close(self) -> None:
        self.cancel()
        with self.lock:  # a decode in another thread lands first
            if self._ctx:
                self.decoder._contexts.discard(self)
                with llama.interrupts_held():
                    self._low.llama_free(self._ctx)
                    self._ctx = None

    def check_open(self) -> None:
        if not self._ctx:
            raise RuntimeFailure("the model was closed while it was in use")
