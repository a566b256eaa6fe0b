"""How to sample, and the log-probabilities that can be asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

from edge_gemma.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    The defaults are the ones Gemma's authors give (temperature 1, top-k 64, top-p 0.95). A bundle
    may hold others, which count where no Sampling is given: see :meth:`edge_gemma.Model.sampling`.

    ``seed=None`` draws one, reported in the last chunk's usage. ``temperature=0`` is greedy.
    ``logprobs=n`` adds the n most likely alternatives to each token. ``schema`` (a JSON schema as
    dict) and ``grammar`` (GBNF) exclude each other. With ``call_schema`` (as
    :func:`edge_gemma.tool_schema` makes it) text is free, and a function call in it is held to that
    from the moment it begins.

    >>> Sampling(temperature=0, max_tokens=16).max_tokens
    16
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    schema: dict | None = None
    call_schema: dict | None = None
    logprobs: int | None = None

    def __post_init__(self):
        for name, value, low, high in (
            ("max_tokens", self.max_tokens, 1, 1 << 24),
            ("temperature", self.temperature, 0, 100),
            ("top_k", self.top_k, 0, 1 << 24),
            ("top_p", self.top_p, 0, 1),
            ("min_p", self.min_p, 0, 1),
            ("repeat_penalty", self.repeat_penalty, 0.01, 100),
            ("seed", self.seed or 0, 0, 2**32 - 1),
            ("logprobs", self.logprobs or 0, 0, 100),
        ):
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
                or not low <= value <= high
            ):
                raise UsageError(f"{name} is {value!r}; expected {low} … {high}")
        if self.grammar is not None and self.schema is not None:
            raise UsageError("give a grammar or a schema, not both")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise UsageError(f"stop is {self.stop!r}; expected a tuple of non-empty strings")


class SamplingChanges(TypedDict, total=False):
    """Fields of :class:`Sampling` to be set, as keywords."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    grammar: str | None
    schema: dict | None
    call_schema: dict | None
    logprobs: int | None


@dataclass(frozen=True)
class Logprob:
    """Natural log-probabilities under the model, before temperature and truncation."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely ids
