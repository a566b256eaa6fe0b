"""Sampling: llama.cpp's samplers, log-probabilities that add up, and grammars that hold or are
refused.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from edge_gemma import Sampling
from edge_gemma.engines.llama.grammar import schema_to_grammar
from edge_gemma.errors import UsageError


def answer(model, **options) -> tuple[str, str]:
    chunks = list(model.generate("Q: ", Sampling(**{"max_tokens": 200, "seed": 5} | options)))
    return "".join(c.text for c in chunks), chunks[-1].finish_reason


@pytest.fixture(scope="module", params=["llama", "onnx"])
def tiny_model(request, tiny_model):
    """Every test here with both engines."""
    return tiny_model if request.param == "llama" else request.getfixturevalue("onnx_model")


def test_greedy_takes_the_largest_logit(tiny_model):
    chunks = list(tiny_model.generate("Q: ", Sampling(temperature=0, max_tokens=1, logprobs=3)))
    (last,) = tiny_model.evaluate("Q: ", rows="last")
    (logprob,) = chunks[0].logprobs
    assert chunks[0].token_ids == (int(last[0].argmax()),) == (logprob.token_id,)
    x = last[0].astype(np.float64)
    expected = x - x.max() - math.log(np.exp(x - x.max()).sum())
    assert abs(logprob.logprob - expected.max()) < 1e-3
    assert [i for i, _ in logprob.top] == list(np.argsort(-x, kind="stable")[:3])


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_holds(tiny_model, seed):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "n": {"type": "integer"},
            "kind": {"enum": ["a", "b"]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["name", "n", "kind", "tags"],
    }
    text, reason = answer(tiny_model, schema=schema, seed=seed)
    if reason == "length":
        pytest.skip("random weights wrote a long number")
    data = json.loads(text)
    assert (
        set(data) == {"name", "n", "kind", "tags"}
        and isinstance(data["n"], int)
        and data["kind"] in "ab"
        and len(data["tags"]) <= 3
    )


def test_strings_of_a_schema_hold_no_control_characters():
    assert r"\x00-\x1F" in schema_to_grammar(
        {"type": "string"}
    ) and r"\x00-\x1F" in schema_to_grammar({"type": "string", "maxLength": 3})


def test_a_grammar_holds(tiny_model):
    text, reason = answer(tiny_model, grammar='root ::= "yes" | "no"')
    assert text in ("yes", "no") and reason == "stop"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "integer", "minimum": 0}, "'minimum' at the top"),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "string", "pattern": "^a$", "minLength": 3}},
            },
            "'minLength' at the top.a",
        ),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "string", "format": "email"}, "format 'email'"),
        ({"type": "text"}, "type 'text'"),
        ({"$ref": "http://example.com/x.json"}, "leaves the document"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 10**9}, "minItems"),
        ([1], "a schema is a JSON object"),
        ({"properties": {"a": 3}}, "expected an object"),
        ({"$ref": "#/$defs/absent"}, "cannot be turned"),
    ],
)
def test_schemas_that_cannot_hold_are_refused(schema, message):
    with pytest.raises(UsageError, match=message):
        schema_to_grammar(schema)


@pytest.mark.parametrize(
    "grammar", ["", "root ::= (", "nothing", 'other ::= "a"', "root ::= root", "\0"]
)
def test_grammars_that_do_not_parse_are_refused(tiny_model, grammar):
    with pytest.raises(UsageError, match="grammar"):
        answer(tiny_model, grammar=grammar)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 2},
        {"max_tokens": 0},
        {"seed": -1},
        {"stop": "x"},
        {"stop": ("",)},
        {"grammar": "a", "schema": {}},
        {"logprobs": 1000},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(UsageError):
        Sampling(**options)


def test_a_typo_fails():
    with pytest.raises(TypeError):
        Sampling(temprature=1)
