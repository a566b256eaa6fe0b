"""Logits → one id: llama.cpp's own samplers in a fixed order, under a grammar where one is asked for.

In: a context with a kept logits row, :class:`Options`. Out: ids and log-probabilities. llama.cpp itself is reached through
``decode`` only. The grammar never sees a token it does not allow: accepting one throws C++ through ctypes and ends the process.
"""

from __future__ import annotations

import ctypes
import json
import math
import secrets
from dataclasses import dataclass

import numpy as np

from .decode import Context, Decoder
from .errors import RuntimeFailure, UsageError
from .llama import library

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
MAX_GRAMMAR_BYTES = 1 << 20
PENALTY_WINDOW = 64  # tokens the repeat penalty looks back on, llama.cpp's own default


@dataclass(frozen=True)
class Options:
    """How to sample. The defaults are the ones Gemma's authors give (temperature 1, top-k 64, top-p 0.95).

    ``seed=None`` draws one, reported in the last chunk's usage. ``temperature=0`` is greedy. ``logprobs=n`` adds the n most
    likely alternatives to each token. ``schema`` (a JSON schema as dict) and ``grammar`` (GBNF) exclude each other.

    >>> Options(temperature=0, max_tokens=16).max_tokens
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
    logprobs: int | None = None

    def __post_init__(self):
        for name, value, low, high in (
            ("max_tokens", self.max_tokens, 1, 1 << 24), ("temperature", self.temperature, 0, 100), ("top_k", self.top_k, 0, 1 << 24),
            ("top_p", self.top_p, 0, 1), ("min_p", self.min_p, 0, 1), ("repeat_penalty", self.repeat_penalty, 0.01, 100),
            ("seed", self.seed or 0, 0, 2**32 - 1), ("logprobs", self.logprobs or 0, 0, 100),
        ):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not low <= value <= high:
                raise UsageError(f"{name} is {value!r}; expected {low} … {high}")
        if self.grammar is not None and self.schema is not None:
            raise UsageError("give a grammar or a schema, not both")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise UsageError(f"stop is {self.stop!r}; expected a tuple of non-empty strings")


@dataclass(frozen=True)
class Logprob:
    """Natural log-probabilities under the model, before temperature and truncation."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely ids


class Sampler:
    """llama.cpp's sampler chain for one generation. Close it. Raises UsageError for a grammar that does not parse."""

    def __init__(self, decoder: Decoder, options: Options):
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
            add(low.llama_sampler_init_penalties(self.decoder.n_vocab, PENALTY_WINDOW, o.repeat_penalty, 0.0, 0.0))
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
        text = self.options.grammar if self.options.schema is None else schema_to_grammar(self.options.schema)
        if text is None:
            return None
        data = text.encode()
        if not text.strip() or len(data) > MAX_GRAMMAR_BYTES or b"\0" in data:
            raise UsageError(f"the grammar has {len(data)} bytes; expected GBNF text of 1 … {MAX_GRAMMAR_BYTES} bytes without NUL")
        grammar = self._low.llama_sampler_init_grammar(self.decoder.vocab, data, b"root")
        if not grammar:
            raise UsageError("the grammar does not parse as GBNF with a rule named root; `-v` shows where llama.cpp stopped")
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
            # Only now the grammar looks at all candidates: most tokens pass at the first try, and 262,144 checks are slow.
            array = self._fill(context.logits(row))
            low.llama_sampler_apply(self._grammar, ctypes.byref(array))
            token = self._apply(self._chain, array)
            if not self._allowed(token):
                raise RuntimeFailure("the grammar allows no token of this vocabulary here; it cannot be completed")
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
        return low.llama_token_data_array(candidates.ctypes.data_as(low.llama_token_data_p), len(candidates), -1, False)

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
        return Logprob(token, float(shifted[token] - total), tuple((int(i), float(shifted[i] - total)) for i in best))

    def close(self) -> None:
        for sampler in (self._chain, self._grammar):
            if sampler:
                self._low.llama_sampler_free(sampler)
        self._chain = self._grammar = None


# What llama_cpp's converter turns into grammar. It drops everything else without a word (minimum, maximum …), so we refuse it.
_NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions", "deprecated"}
_BY_SHAPE = (  # the first that applies wins in the converter; its companions are all it looks at
    ({"$ref"}, set()), ({"oneOf"}, set()), ({"anyOf"}, set()), ({"const"}, {"type"}), ({"enum"}, {"type"}),
    ({"properties"}, {"type", "required", "additionalProperties"}), ({"additionalProperties"}, {"type", "required"}),
    ({"allOf"}, {"type"}), ({"prefixItems"}, {"type"}), ({"items"}, {"type", "minItems", "maxItems"}), ({"pattern"}, {"type"}),
    ({"format"}, {"type"}), ({"minLength"}, {"type", "maxLength"}), ({"maxLength"}, {"type", "minLength"}), ({"type"}, set()), (set(), set()),
)  # fmt: skip
_FORMATS = {"date", "time", "date-time", "uuid", "uuid1", "uuid2", "uuid3", "uuid4", "uuid5"}
_TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}
_MAX_REPEAT = 2000  # llama.cpp's own bound on a repetition


def schema_to_grammar(schema: dict) -> str:
    """A JSON schema as GBNF. Raises UsageError naming the keyword that cannot be honoured.

    >>> schema_to_grammar({"type": "integer", "minimum": 3})
    Traceback (most recent call last):
    edge_gemma.errors.UsageError: schema keyword 'minimum' at the top cannot be enforced while sampling; leave it out and check the answer
    """
    library()
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    if not isinstance(schema, dict):
        raise UsageError(f"a schema is a JSON object, got {type(schema).__name__}")
    try:
        _check_schema(schema, "the top", 0)
        # its rule for a character lets control characters through, which JSON forbids inside strings (RFC 8259, section 7)
        return json_schema_to_gbnf(json.dumps(schema)).replace(r'[^"\\]', r'[^"\\\x7F\x00-\x1F]')
    except UsageError:
        raise
    except RecursionError:
        raise UsageError("the schema is nested too deeply") from None
    except Exception as error:  # the converter raises whatever Python raises on the way: KeyError, AssertionError, …
        raise UsageError(f"the schema cannot be turned into a grammar: {type(error).__name__}: {error}") from None


def _check_schema(schema: object, where: str, depth: int) -> None:
    if schema is True and depth:
        return
    if not isinstance(schema, dict):
        raise UsageError(f"the schema at {where} is {schema!r}; expected an object")
    if depth > 64:
        raise RecursionError
    present = set(schema) - _NOTES
    shape, companions = next(s for s in _BY_SHAPE if s[0] <= present)
    if extra := present - shape - companions:
        raise UsageError(f"schema keyword {min(extra)!r} at {where} cannot be enforced while sampling; leave it out and check the answer")
    kind = schema.get("type")
    for name in kind if isinstance(kind, list) else [kind]:
        if name is not None and name not in _TYPES:
            raise UsageError(f"schema type {name!r} at {where} is unknown; expected one of {', '.join(sorted(_TYPES))}")
    if isinstance(kind, list) and present != {"type"}:
        raise UsageError(f"schema at {where}: several types together with other keywords cannot be enforced; use anyOf")
    if "format" in present and schema["format"] not in _FORMATS:
        raise UsageError(f"schema format {schema['format']!r} at {where} is unknown; expected one of {', '.join(sorted(_FORMATS))}")
    if "$ref" in present and not str(schema["$ref"]).startswith("#/"):
        raise UsageError(f"schema $ref {schema['$ref']!r} at {where} leaves the document; only #/… is followed")
    for key in ("minItems", "maxItems", "minLength", "maxLength"):
        if key in present and not (isinstance(schema[key], int) and 0 <= schema[key] <= _MAX_REPEAT):
            raise UsageError(f"schema {key} at {where} is {schema[key]!r}; expected 0 … {_MAX_REPEAT}")
    children = [(f"{where}.{k}", v) for group in ("properties", "$defs", "definitions") for k, v in (schema.get(group) or {}).items()]
    children += [(f"{where}.{k}[{i}]", v) for k in ("oneOf", "anyOf", "allOf", "prefixItems") for i, v in enumerate(schema.get(k) or ())]
    children += [(f"{where}.{k}", schema[k]) for k in ("items", "additionalProperties") if isinstance(schema.get(k), dict)]
    for name, child in children:
        _check_schema(child, name, depth + 1)
