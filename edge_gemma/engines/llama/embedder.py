"""Token ids → one vector for each text, in a llama.cpp context made for embedding.

In: lists of ids, settings that a plan approved. Out: pooled vectors ``[n, width]`` float32, not
normalised. This module does not know texts, prompts or bundles.

Every token attends to every other of its text, so a text is computed in one ubatch; llama.cpp
aborts the process when it is longer, which is checked before the call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_gemma.engines.llama import library as llama
from edge_gemma.engines.llama.context import LoadedModel
from edge_gemma.engines.llama.output_rows import UnwrittenOutputs
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.plan.records import EMBED_TEXTS, Settings

_Pointer = Any  # llama.cpp's objects behind ctypes
_POOLING_MEAN = 1  # llama.h, enum llama_pooling_type


class Embedder:
    """One llama.cpp context of ``settings.n_ctx`` tokens, of at most EMBED_TEXTS texts at a time.
    Not for two threads at once. Raises RuntimeFailure (no memory).
    """

    def __init__(self, model: LoadedModel, settings: Settings):
        self._low = llama.library()
        self._model, self.settings = model, settings
        self._ctx: _Pointer = None
        self._width: int = self._low.llama_model_n_embd_out(model.pointer)
        self._outputs = UnwrittenOutputs(4 * (model.n_vocab + self._width))
        with llama.interrupts_held(), self._outputs.reserving():
            self._ctx = self._low.llama_init_from_model(model.pointer, self._params())
        if not self._ctx:
            raise RuntimeFailure(
                f"llama.cpp could not make a context of {settings.n_ctx} tokens: {llama.last_log()}"
            )

    def _params(self) -> _Pointer:
        settings = self.settings
        params = self._low.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = settings.n_ctx
        params.n_seq_max = EMBED_TEXTS
        params.n_outputs_max = settings.n_ctx  # the mean is of every position
        params.n_threads = params.n_threads_batch = settings.n_threads
        params.embeddings = True
        params.pooling_type = _POOLING_MEAN
        params.flash_attn_type = 1 if settings.flash_attention else 0
        params.kv_unified = True  # the texts share n_ctx as they come
        params.no_perf = True
        params.offload_kqv = settings.n_gpu_layers > 0
        return params

    def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """The mean-pooled vector of each text, through the dense layers the file has: ``[n,
        width]`` float32. All ``texts`` are computed in one pass: 1 … EMBED_TEXTS of them, of at
        most ``settings.n_ctx`` ids together. Raises UsageError, RuntimeFailure.
        """
        lengths = [len(ids) for ids in texts]
        if not 0 < len(texts) <= EMBED_TEXTS or not 0 < min(lengths):
            raise UsageError(f"1 … {EMBED_TEXTS} texts of at least one token are embedded at once")
        if sum(lengths) > self.settings.n_ctx:
            raise UsageError(
                f"{sum(lengths)} tokens were given to a context of {self.settings.n_ctx}"
            )
        batch = self._low.llama_batch_init(sum(lengths), 0, 1)
        try:
            self._fill(batch, texts)
            with self._outputs.reserving():
                code = self._low.llama_encode(self._ctx, batch)
        finally:
            self._low.llama_batch_free(batch)
        if code != 0:
            raise RuntimeFailure(f"llama.cpp could not embed (code {code}): {llama.last_log()}")
        return np.stack([self._vector(i) for i in range(len(texts))])

    def _fill(self, batch: _Pointer, texts: Sequence[Sequence[int]]) -> None:
        n = 0
        for sequence, ids in enumerate(texts):
            for position, token in enumerate(ids):
                if not 0 <= token < self._model.n_vocab:
                    raise UsageError(
                        f"token ids must be 0 … {self._model.n_vocab - 1}; got {token}"
                    )
                batch.token[n], batch.pos[n] = token, position
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                batch.logits[n] = 1
                n += 1
        batch.n_tokens = n

    def _vector(self, sequence: int) -> np.ndarray:
        pointer = self._low.llama_get_embeddings_seq(self._ctx, sequence)
        if not pointer:
            raise RuntimeFailure("llama.cpp kept no vector; is the file an embedding model?")
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, (self._width,)).copy()

    def close(self) -> None:
        if self._ctx:
            with llama.interrupts_held():
                self._low.llama_free(self._ctx)
                self._ctx = None
            self._outputs.close()
