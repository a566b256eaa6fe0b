"""JSON schemas as hypothesis draws them, and answers sampled from noise that are held to them."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import strategies as st

from edge_gemma import Sampling

MAX_TOKENS = 400

# quotes, backslashes, line breaks, emoji, what JSON must escape, what patterns would read
LETTERS = st.sampled_from(list('abcé"\\\n\t/{}[],:.^$*+?()|-\x01\x7f\u2028😀日'))
TEXTS = st.text(LETTERS, max_size=5)
KEYS = st.sampled_from(["a", "b", "c", 'q"q', "b\\s", "n\nl", "😀", ""])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-1000, 1000), st.sampled_from([0.5, -2.25]), TEXTS
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)
PATTERNS = st.sampled_from(
    [r"^\d{1,3}$", r"\.", r"^[^,;]+$", r"a.c", r'^"\w+"$', r"^(a|bc)*$", r"^\S+ \S+$", r"\\", "^$"]
    + [
        r"[\d,]x",
        "^[a-f0-9]{4}$",
        r"\/",
        r"^.{2}$",
        r"[&\[]",
        "é|日",
        "^a",
        "b$",
        r"^[^\d\s]{1,4}$",
    ]
)
FORMATS = st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "email"])


def _some(**optional: st.SearchStrategy) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries({}, optional=optional)


def _ordered(low: str, high: str, numbers: st.SearchStrategy) -> st.SearchStrategy[dict]:
    pairs = st.tuples(numbers, numbers).map(sorted)
    return pairs.map(lambda pair: {low: pair[0], high: pair[1]})


STRINGS = st.one_of(
    _some(minLength=st.integers(0, 3)),
    _ordered("minLength", "maxLength", st.integers(0, 6)),
    st.fixed_dictionaries({"pattern": PATTERNS}, optional={"maxLength": st.integers(3, 12)}),
    st.fixed_dictionaries({"format": FORMATS}),
).map(lambda schema: {"type": "string", **schema})
NUMBERS = st.one_of(
    _some(minimum=st.integers(-20, 20) | st.sampled_from([0.5, -1.75])),
    _some(exclusiveMaximum=st.integers(-20, 20)),
    _ordered("minimum", "maximum", st.integers(-50, 50)),
    st.fixed_dictionaries({"multipleOf": st.integers(1, 12)}),
)
NUMBERS = st.tuples(st.sampled_from(["number", "integer"]), NUMBERS).map(
    lambda pair: {"type": pair[0], **pair[1]}
)
LEAVES = st.one_of(
    st.sampled_from([{}, True, False, {"type": "boolean"}, {"type": "null"}]),
    st.sampled_from([{"type": ["string", "null"]}, {"type": ["integer", "boolean"]}]),
    VALUES.map(lambda value: {"const": value}),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    STRINGS,
    NUMBERS,
    st.sampled_from([{"$ref": "#"}, {"$ref": "#/$defs/one"}, {"$ref": "#/$defs/two"}]),
)


def _objects(inner: st.SearchStrategy) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(KEYS, inner, max_size=3)},
        optional={
            "required": st.lists(KEYS, max_size=3, unique=True),
            "additionalProperties": st.booleans() | inner,
            "patternProperties": st.dictionaries(
                st.sampled_from(["^a", "b", r"^\d"]), inner, max_size=2
            ),
            "minProperties": st.integers(0, 1),
            "maxProperties": st.integers(0, 4),
        },
    )


def _arrays(inner: st.SearchStrategy) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": inner,
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "minItems": st.integers(0, 2),
            "maxItems": st.integers(2, 4),
        },
    )


def _combined(inner: st.SearchStrategy) -> st.SearchStrategy[dict]:
    lists = st.lists(inner, min_size=1, max_size=3)
    keyword = st.sampled_from(["anyOf", "oneOf", "allOf"])
    alone = st.tuples(keyword, lists).map(lambda pair: {pair[0]: pair[1]})
    beside = st.tuples(keyword, lists, LEAVES.filter(lambda leaf: isinstance(leaf, dict)))
    return alone | beside.map(lambda three: {**three[2], three[0]: three[1]})


INNER = st.recursive(
    LEAVES,
    lambda inner: _objects(inner) | _arrays(inner) | _combined(inner),
    max_leaves=6,
)


@st.composite
def schemas(draw) -> dict:
    """A schema with ``#/$defs/one`` and ``#/$defs/two``, which anything in it may refer to."""
    top = draw(INNER.filter(lambda schema: isinstance(schema, dict)))
    return {**top, "$defs": {"one": draw(INNER), "two": draw(INNER)}}


def answer_from_noise(decoder, schema: object, seed: int) -> str | None:
    """What a model that knows nothing writes under a schema; None where it does not come to an end.
    What is forced is taken at once.

    Quotes, brackets and ends get likelier with every token, so that most answers are short.
    """
    noise = np.random.default_rng(seed)
    closing = [token for text in ('"', "}", "]", '"}', '"]') for token in decoder.tokenize(text)]
    ends = [token for token in range(decoder.n_vocab) if decoder.is_end(token)]
    sampler = decoder.sampler(Sampling(schema=schema, seed=seed, top_k=0, top_p=1))
    ids: list[int] = []
    try:
        for step in range(MAX_TOKENS):
            row = noise.normal(0, 2, decoder.n_vocab).astype(np.float32)
            row[closing + ends] += min(step, 40) * 0.3
            token = sampler.sample(row)
            if decoder.is_end(token):
                return b"".join(map(decoder.piece, ids)).decode("utf-8")
            ids += [token, *sampler.forced()]
    finally:
        sampler.close()
    return None


def invalid(answer: str, schema: object) -> str:
    """Why an answer is not valid; "" when it is."""
    import jsonschema

    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.FormatChecker(["date", "uuid", "ipv4", "email"])
    )
    errors = validator.iter_errors(json.loads(answer))
    return next((error.message[:300] for error in errors), "")
