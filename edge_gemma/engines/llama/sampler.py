"""Logits → one id: llama.cpp's own samplers in a fixed order, under a constraint or a grammar where
one is asked for.

In: a row of logits ``[n_vocab]`` float32, from whichever engine, and :class:`Sampling`. Out: ids
and log-probabilities. A constraint (a schema) says beforehand which ids may come; where those are
few, the samplers see no others. llama.cpp's grammar is asked afterwards and never sees a token it
does not allow: accepting one throws C++ through ctypes and ends the process.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edge_gemma.engines.constraint import Constraint, ids_in, mask_of
from edge_gemma.engines.llama.grammar import schema_to_grammar
from edge_gemma.engines.llama.library import library
from edge_gemma.engines.schema import ANY_SPACE, SPACING
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.options import Logprob, Sampling

log = logging.getLogger("edge_gemma.engines")

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
MAX_GRAMMAR_BYTES = 1 << 20
PENALTY_WINDOW = 64  # tokens the repeat penalty looks back on, llama.cpp's own default

# llama.cpp's objects behind ctypes: opaque pointers, and its llama_token_data_array
_Pointer = Any


@functools.cache
def _ids_in_order(n_vocab: int) -> np.ndarray:
    return np.arange(n_vocab, dtype=np.int32)


class Sampler:
    """llama.cpp's sampler chain for one generation. Close it.

    ``vocab`` is llama.cpp's vocabulary, ``suppressed`` are ids that are never chosen. Without a
    ``constraint`` a schema goes through llama.cpp's own converter. Raises UsageError for a grammar
    that does not parse.
    """

    def __init__(
        self,
        vocab: _Pointer,
        n_vocab: int,
        suppressed: Sequence[int],
        sampling: Sampling,
        constraint: Constraint | None = None,
        call_constraint: Callable[[dict], Constraint] | None = None,
    ):
        self._low, self._sampling = library(), sampling
        self._constraint, self._call_constraint = constraint, call_constraint
        self._is_call = False  # the constraint ends with the call
        self._vocab, self._n_vocab = vocab, n_vocab
        self._suppressed = np.array(suppressed, np.intp)
        self._choosable = ~mask_of(suppressed, n_vocab)
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        self._chain: _Pointer = None
        self._grammar: _Pointer = self._make_grammar()
        self._chain = self._make_chain()
        self._candidates = np.zeros(n_vocab, _CANDIDATE)

    def _make_chain(self) -> _Pointer:
        low, sampling = self._low, self._sampling
        chain = low.llama_sampler_chain_init(low.llama_sampler_chain_default_params())
        steps = []
        if sampling.repeat_penalty != 1.0:
            penalty = (PENALTY_WINDOW, sampling.repeat_penalty, 0.0, 0.0)
            steps.append(low.llama_sampler_init_penalties(self._n_vocab, *penalty))
        if sampling.temperature == 0:
            steps.append(low.llama_sampler_init_greedy())
        else:
            steps += self._random_steps()
        for step in steps:
            low.llama_sampler_chain_add(chain, step)
        return chain

    def _random_steps(self) -> list[_Pointer]:
        low, sampling, steps = self._low, self._sampling, []
        if sampling.top_k:
            steps.append(low.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1:
            steps.append(low.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            steps.append(low.llama_sampler_init_min_p(sampling.min_p, 1))
        steps.append(low.llama_sampler_init_temp(sampling.temperature))
        steps.append(low.llama_sampler_init_dist(self.seed))
        return steps

    def _make_grammar(self) -> _Pointer:
        text = self._sampling.grammar
        if self._sampling.schema is not None and self._constraint is None:
            text = schema_to_grammar(self._sampling.schema)
        if text is None:
            return None
        data = text.encode()
        if not text.strip() or len(data) > MAX_GRAMMAR_BYTES or b"\0" in data:
            raise UsageError(
                f"the grammar has {len(data)} bytes; expected GBNF text of 1 … "
                f"{MAX_GRAMMAR_BYTES} bytes without NUL"
            )
        grammar = self._low.llama_sampler_init_grammar(self._vocab, data, b"root")
        if not grammar:
            raise UsageError(
                "the grammar does not parse as GBNF with a rule named root; `-v` shows where "
                "llama.cpp stopped"
            )
        return grammar

    def sample(self, logits: np.ndarray) -> int:
        """Choose one id from a row of logits ``[n_vocab]`` float32, and accept it. Raises
        RuntimeFailure when nothing is left to choose from.
        """
        token = self._choose(logits, grammar_first=False)
        if not self._allowed(token):
            # Only now the grammar looks at all candidates: most tokens pass at the first try, and
            # 262,144 checks are slow.
            token = self._choose(logits, grammar_first=True)
            if not self._allowed(token):
                raise RuntimeFailure(
                    "the grammar allows no token of this vocabulary here; it cannot be completed"
                )
        self._accept(token)
        return token

    def _accept(self, token: int) -> None:
        self._low.llama_sampler_accept(self._chain, token)
        if self._constraint is not None:
            self._constraint.accept(token)
            if self._is_call and self._constraint.is_complete:
                self._constraint = None
        if self._grammar is not None:
            self._low.llama_sampler_accept(self._grammar, token)

    def begin_call(self, text: str) -> bool:
        schema = self._sampling.call_schema
        if schema is None or self._call_constraint is None or self._constraint is not None:
            return False
        # white space as the model began it: usually as it is fixed, else any
        for tried in (schema, {**schema, SPACING: ANY_SPACE}):
            try:
                constraint = self._call_constraint(tried)
            except UsageError as error:
                log.warning("calls are not held to their schema: %s", error)
                self._call_constraint = None
                return False
            if constraint.begin(text):
                self._constraint, self._is_call = constraint, True
                return True
        return False

    def forced(self) -> list[int]:
        """The ids that must come next whatever the logits say, accepted. None where
        log-probabilities were asked for: each token then needs logits of its own.
        """
        if self._constraint is None or self._sampling.logprobs is not None:
            return []
        tokens = self._constraint.forced_tokens()
        for token in tokens:
            self._accept(token)
        return tokens

    def _choose(self, logits: np.ndarray, *, grammar_first: bool) -> int:
        if self._constraint is None:
            candidates = self._all_candidates(logits, self._suppressed)
        else:
            candidates = self._constrained(logits, self._constraint)
        array = self._array(candidates)
        if grammar_first:
            self._low.llama_sampler_apply(self._grammar, ctypes.byref(array))
        self._low.llama_sampler_apply(self._chain, ctypes.byref(array))
        if not 0 <= array.selected < array.size:
            raise RuntimeFailure("the samplers left no candidate; relax top_k, top_p or min_p")
        return int(array.data[array.selected].id)

    def _all_candidates(self, logits: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
        self._candidates["id"] = _ids_in_order(self._n_vocab)  # samplers sort and cut in place
        self._candidates["p"] = 0
        self._candidates["logit"] = logits
        self._candidates["logit"][forbidden] = -np.inf
        return self._candidates

    def _constrained(self, logits: np.ndarray, constraint: Constraint) -> np.ndarray:
        """The candidates that the constraint allows; whichever of the two ways moves less."""
        allowed = constraint.allowed() & self._choosable
        n_allowed = int(np.bitwise_count(allowed).sum())
        if n_allowed == 0:
            raise RuntimeFailure(
                "the schema allows no token of this vocabulary here; it cannot be completed"
            )
        if n_allowed > self._n_vocab // 2:
            forbidden = ids_in(~allowed)
            return self._all_candidates(logits, forbidden[forbidden < self._n_vocab])
        ids = ids_in(allowed)
        candidates = self._candidates[:n_allowed]
        candidates["id"] = ids
        candidates["logit"] = logits[ids]
        candidates["p"] = 0
        return candidates

    def _array(self, candidates: np.ndarray) -> _Pointer:
        low = self._low
        data = candidates.ctypes.data_as(low.llama_token_data_p)
        return low.llama_token_data_array(data, len(candidates), -1, False)

    def _allowed(self, token: int) -> bool:
        if self._grammar is None:
            return True
        one = np.array([(token, 0.0, 0.0)], _CANDIDATE)
        array = self._array(one)
        self._low.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return array.size == 1 and bool(np.isfinite(one["logit"][0]))

    def logprob(self, logits: np.ndarray, token: int) -> Logprob:
        """Log-probabilities of a row of logits as the model gave it, the most likely ids first."""
        row = logits.astype(np.float64)
        shifted = row - row.max()
        total = math.log(np.exp(shifted).sum())
        n = self._sampling.logprobs or 0
        best = np.argpartition(-row, n)[:n] if n else np.empty(0, np.intp)
        best = best[np.argsort(-row[best], kind="stable")]
        top = tuple((int(i), float(shifted[i] - total)) for i in best)
        return Logprob(token, float(shifted[token] - total), top)

    def close(self) -> None:
        for sampler in (self._chain, self._grammar):
            if sampler:
                self._low.llama_sampler_free(sampler)
        self._chain = self._grammar = None
