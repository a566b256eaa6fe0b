"""JSON schemas enforced by llguidance, the only module that imports it.

In: a vocabulary as a :class:`~edge_gemma.engines.constraint.TokenTable`, a JSON schema. Out: a
constraint on one answer. What the library cannot do is refused by keyword and place.

Its tables of a vocabulary are made once per model, when the first schema comes: about a second and
:data:`BYTES_PER_TOKEN` for each token.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from edge_gemma.engines.constraint import TokenTable
from edge_gemma.engines.schema import SPACING, Json, Schema, enforceable, refusal
from edge_gemma.errors import RuntimeFailure

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Text inside a JSON string that needs no escape: masks there are computed from a table of these
# tokens. The library's own four such tables take 88 MiB for 262,144 tokens; this one alone takes
# 38 and is as fast.
_SLICES = [r"""[^"\\\x00-\x1F\x7F]+"""]
# white space is fixed, so that what stands between two values is forced
_FIXED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_KEPT_SCHEMAS = 8


def is_installed() -> bool:
    return importlib.util.find_spec("llguidance") is not None


class Guidance:
    """llguidance's tables for one vocabulary. Raises nothing for any vocabulary."""

    def __init__(self, table: TokenTable):
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = _Vocabulary(table)
        wrapper = TokenizerWrapper(vocabulary)
        self._n_vocab = len(table.pieces)
        self._tokenizer = LLTokenizer(
            wrapper,
            n_vocab=self._n_vocab,
            eos_token=list(table.end_ids),
            slices=_SLICES,
        )
        # both keep a list that the library has copied
        wrapper.tokens = vocabulary.tokens = ()
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()  # by schema, unused
        self._lock = threading.Lock()

    def constraint(self, schema: Json) -> Following:
        """A constraint on one answer. Raises UsageError for what cannot be enforced."""
        return Following(self._matcher(schema), self._n_vocab, self._tokenizer.tokenize_str)

    def _matcher(self, schema: Json) -> LLMatcher:
        from llguidance import LLMatcher

        checked = enforceable(schema)
        key = json.dumps(checked)
        with self._lock:
            if key not in self._matchers:
                error = refusal(checked, _complaint)
                if error is not None:
                    raise error
                made = LLMatcher(self._tokenizer, _grammar(checked), log_level=0)
                self._matchers[key] = made
                if len(self._matchers) > _KEPT_SCHEMAS:
                    self._matchers.popitem(last=False)
            self._matchers.move_to_end(key)
            return self._matchers[key].deep_copy()


class Following:
    """One answer on its way through a schema; fulfils engines.constraint.Constraint."""

    def __init__(self, matcher: LLMatcher, n_vocab: int, tokenize: Callable[[str], list[int]]):
        self._matcher, self._tokenize = matcher, tokenize
        self._words = np.zeros(-(-n_vocab // 32), np.uint32)

    def allowed(self) -> np.ndarray:
        words = self._words
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        return words

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def begin(self, text: str) -> bool:
        tokens = self._tokenize(text)
        return self._matcher.try_consume_tokens(tokens) == len(tokens)

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_accepting()

    def forced_tokens(self) -> list[int]:
        return list(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeFailure(
                "the answer can no longer be held to its schema; make the schema smaller"
            )


class _Vocabulary:
    """What llguidance's TokenizerWrapper reads."""

    bos_token_id = None

    def __init__(self, table: TokenTable):
        self.tokens = table.pieces
        self.special_token_ids = list(table.control_ids)
        self.eos_token_id = table.end_ids[0]
        self._tokenize = table.tokenize

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenize(text.decode("utf-8"))


def _grammar(schema: Schema) -> str:
    from llguidance import LLMatcher

    spaced = {**schema, SPACING: {**_FIXED, **schema.get(SPACING, {})}}
    return LLMatcher.grammar_from_json_schema(json.dumps(spaced))


def _complaint(schema: Schema) -> str:
    """What the library says against a schema; "" when it takes it."""
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(_grammar(schema))
    return messages[0] if is_error else ""
