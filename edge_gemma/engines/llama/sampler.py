"""Logits → one id: llama.cpp's own samplers in a fixed order, under a grammar where one is asked
for.

In: a context with a kept logits row, :class:`Sampling`. Out: ids and log-probabilities. llama.cpp
itself is reached through ``decode`` only. The grammar never sees a token it does not allow:
accepting one throws C++ through ctypes and ends the process.
"""

from __future__ import annotations

import ctypes
import math
import secrets

import numpy as np

from edge_gemma.engines.llama.decoder import Context, Decoder
from edge_gemma.engines.llama.grammar import schema_to_grammar
from edge_gemma.engines.llama.library import library
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.options import Logprob, Sampling

_CANDIDATE = np.dtype(
    [("id", np.int32), ("logit", np.float32), ("p", np.float32)]
)  # llama_token_data
MAX_GRAMMAR_BYTES = 1 << 20
PENALTY_WINDOW = 64  # tokens the repeat penalty looks back on, llama.cpp's own default


class Sampler:
    """llama.cpp's sampler chain for one generation. Close it. Raises UsageError for a grammar that
    does not parse.
    """

    def __init__(self, decoder: Decoder, options: Sampling):
        self._low, self.decoder, self.options = library(), decoder, options
        self.seed = secrets.randbits(32) if options.seed is None else options.seed
        self._chain = self._grammar = None
        self._grammar = self._make_grammar()
        self._chain = self._make_chain()
        self._candidates: np.ndarray | None = None

    def _make_chain(self):
        low, o = self._low, self.options
        chain = low.llama_sampler_chain_init(low.llama_sampler_chain_default_params())

        def add(sampler) -> None:
            low.llama_sampler_chain_add(chain, sampler)

        if o.repeat_penalty != 1.0:
            add(
                low.llama_sampler_init_penalties(
                    self.decoder.n_vocab, PENALTY_WINDOW, o.repeat_penalty, 0.0, 0.0
                )
            )
        if o.temperature == 0:
            add(low.llama_sampler_init_greedy())
            return chain
        if o.top_k:
            add(low.llama_sampler_init_top_k(o.top_k))
        if o.top_p < 1:
            add(low.llama_sampler_init_top_p(o.top_p, 1))
        if o.min_p > 0:
            add(low.llama_sampler_init_min_p(o.min_p, 1))
        add(low.llama_sampler_init_temp(o.temperature))
        add(low.llama_sampler_init_dist(self.seed))
        return chain

    def _make_grammar(self):
        text = (
            self.options.grammar
            if self.options.schema is None
            else schema_to_grammar(self.options.schema)
        )
        if text is None:
            return None
        data = text.encode()
        if not text.strip() or len(data) > MAX_GRAMMAR_BYTES or b"\0" in data:
            raise UsageError(
                f"the grammar has {len(data)} bytes; expected GBNF text of 1 … "
                f"{MAX_GRAMMAR_BYTES} bytes without NUL"
            )
        grammar = self._low.llama_sampler_init_grammar(self.decoder.vocab, data, b"root")
        if not grammar:
            raise UsageError(
                "the grammar does not parse as GBNF with a rule named root; `-v` shows where "
                "llama.cpp stopped"
            )
        return grammar

    def sample(self, context: Context, row: int = -1) -> int:
        """Choose, and accept, one id from the kept logits row."""
        low = self._low
        if self._grammar is None:
            index = int(context._out_index[row])
            return low.llama_sampler_sample(self._chain, context._ctx, index)  # applies and accepts
        array = self._fill(context.logits(row))
        token = self._apply(self._chain, array)
        if not self._allowed(token):
            # Only now the grammar looks at all candidates: most tokens pass at the first try, and
            # 262,144 checks are slow.
            array = self._fill(context.logits(row))
            low.llama_sampler_apply(self._grammar, ctypes.byref(array))
            token = self._apply(self._chain, array)
            if not self._allowed(token):
                raise RuntimeFailure(
                    "the grammar allows no token of this vocabulary here; it cannot be completed"
                )
        low.llama_sampler_accept(self._chain, token)
        low.llama_sampler_accept(self._grammar, token)
        return token

    def _fill(self, logits: np.ndarray):
        if self._candidates is None:
            self._candidates = np.zeros(len(logits), _CANDIDATE)
        self._candidates["id"] = np.arange(len(logits), dtype=np.int32)
        self._candidates["logit"] = logits
        return self._array(self._candidates)

    def _array(self, candidates: np.ndarray):
        low = self._low
        return low.llama_token_data_array(
            candidates.ctypes.data_as(low.llama_token_data_p), len(candidates), -1, False
        )

    def _apply(self, sampler, array) -> int:
        self._low.llama_sampler_apply(sampler, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise RuntimeFailure("the samplers left no candidate; relax top_k, top_p or min_p")
        return int(array.data[array.selected].id)

    def _allowed(self, token: int) -> bool:
        one = np.array([(token, 0.0, 0.0)], _CANDIDATE)
        self._low.llama_sampler_apply(self._grammar, ctypes.byref(array := self._array(one)))
        return array.size == 1 and bool(np.isfinite(one["logit"][0]))

    def logprob(self, context: Context, token: int, row: int = -1) -> Logprob:
        logits = context.logits(row).astype(np.float64)
        shifted = logits - logits.max()
        total = math.log(np.exp(shifted).sum())
        n = self.options.logprobs or 0
        best = np.argpartition(-logits, n)[:n] if n else np.empty(0, int)
        best = best[np.argsort(-logits[best], kind="stable")]
        return Logprob(
            token,
            float(shifted[token] - total),
            tuple((int(i), float(shifted[i] - total)) for i in best),
        )

    def close(self) -> None:
        for sampler in (self._chain, self._grammar):
            if sampler:
                self._low.llama_sampler_free(sampler)
        self._chain = self._grammar = None
