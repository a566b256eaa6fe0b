"""Answers held to a JSON schema: valid, or refused with keyword and place before anything is
prefilled.
"""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import schemas
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import edge_gemma
from edge_gemma import Sampling
from edge_gemma.cli.app import app
from edge_gemma.conversation.transcription import live_turn
from edge_gemma.engines.closing import closed
from edge_gemma.engines.constraint import ids_in, mask_of
from edge_gemma.engines.guidance import Guidance
from edge_gemma.engines.one_of import without_one_of
from edge_gemma.engines.patterns import translated
from edge_gemma.errors import UsageError
from edge_gemma.plan.costs import STRUCTURED_BYTES_PER_TOKEN

# each word of it needs another escape
HARD = 'say "hi" \\ here\nand 😀 / \t\x01'
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "children": {"type": "array", "items": {}}},
    "required": ["value"],
    "additionalProperties": False,
}
TREE["properties"]["children"]["items"] = {"$ref": "#/$defs/node"}


def case(what: str, *values: object):
    """A row of docs/compatibility.md, and what is tested of it."""
    mark = pytest.mark.compat(kind="schema", what=what, happens="every answer is valid")
    return pytest.param(*values, marks=mark, id=what)


def refused(what: str, *values: object):
    happens = "refused before prefill, with what is at fault and where"
    mark = pytest.mark.compat(kind="schema", what=what, happens=happens)
    return pytest.param(*values, marks=mark, id=what)


ENFORCED = [
    case("enum with quotes, backslashes, line breaks, emoji", {"enum": [HARD, 1, None, [HARD]]}),
    case("const with quotes, backslashes, line breaks, emoji", {"const": {HARD: HARD}}),
    case(
        "keys with quotes, backslashes, line breaks, emoji",
        {"type": "object", "properties": {HARD: {"type": "null"}}, "required": [HARD]},
    ),
    case("allOf around $ref", {"allOf": [{"$ref": "#/$defs/p"}], "$defs": {"p": PERSON}}),
    case(
        "allOf of $ref and more properties",
        {
            "allOf": [
                {"$ref": "#/$defs/p"},
                {"properties": {"sex": {"enum": ["f", "m"]}}, "required": ["sex"]},
            ],
            "$defs": {"p": {**PERSON, "additionalProperties": True}},
        },
    ),
    case("$ref at the root", {"$ref": "#/$defs/node", "$defs": {"node": TREE}}),
    case(
        "recursion through the root",
        {
            "type": "object",
            "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}},
            "required": ["next"],
            "additionalProperties": False,
        },
    ),
    case("the schema true", True),
    case(
        "true and false as schemas of properties",
        {"type": "object", "properties": {"a": True, "b": False}, "required": ["a"]},
    ),
    case(
        "required names a key that no property describes",
        {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["zz"]},
    ),
    case("the pattern \\d", {"type": "string", "pattern": r"^\d\d$"}),
    case("the pattern \\.", {"type": "string", "pattern": r"^v\d\.\d$"}),
    case("the pattern [^,;]", {"type": "string", "pattern": "^[^,;]{1,9}$"}),
    case("a pattern without anchors", {"type": "string", "pattern": "b+c", "maxLength": 6}),
    case("quotes and backslashes in a pattern", {"type": "string", "pattern": r'^"\\\w"$'}),
    case("minimum and maximum", {"type": "integer", "minimum": -3, "maximum": 12}),
    case("exclusive bounds", {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 9}),
    case("multipleOf", {"type": "integer", "multipleOf": 7, "minimum": 1}),
    case("format", {"type": "string", "format": "date"}),
    case(
        "additionalProperties as a schema",
        {"type": "object", "additionalProperties": {"type": "boolean"}},
    ),
    case(
        "patternProperties",
        {
            "type": "object",
            "patternProperties": {"^n": {"type": "integer"}},
            "additionalProperties": False,
        },
    ),
    case("anyOf", {"anyOf": [PERSON, {"type": "null"}]}),
    case("oneOf of different types", {"oneOf": [{"type": "string"}, {"type": "integer"}]}),
    case(
        "oneOf that a property tells apart, through $ref (a discriminated union)",
        {
            "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
            "discriminator": {"propertyName": "kind"},
            "$defs": {
                "cat": {
                    "type": "object",
                    "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}},
                    "required": ["kind"],
                },
                "dog": {
                    "type": "object",
                    "properties": {"kind": {"const": "dog"}, "friend": {"$ref": "#"}},
                    "required": ["kind"],
                },
            },
        },
    ),
    case(
        "oneOf of number ranges apart",
        {
            "oneOf": [
                {"type": "integer", "minimum": 0, "maximum": 3},
                {"type": "integer", "minimum": 8, "maximum": 9},
            ]
        },
    ),
    case("uniqueItems: false", {"items": {"const": 1}, "type": "array", "uniqueItems": False}),
    case("prefixItems", {"type": "array", "prefixItems": [{"const": 1}], "items": False}),
    case("titles, defaults, examples", {**PERSON, "title": "t", "default": {}, "examples": [1]}),
]


@pytest.mark.parametrize("schema", ENFORCED)
def test_every_answer_is_valid(tiny_model, schema):
    answers = [schemas.answer_from_noise(tiny_model.decoder, schema, seed) for seed in range(12)]
    finished = [answer for answer in answers if answer is not None]
    assert len(finished) >= 6
    assert [schemas.invalid(answer, schema) for answer in finished] == [""] * len(finished)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        refused("uniqueItems", {"items": {"uniqueItems": True}}, "'uniqueItems' at the top.items"),
        refused("not", {"properties": {"a": {"not": {}}}}, "'not' at the top.a"),
        refused("if, then, else", {"if": {}, "then": {}}, "'if' at the top"),
        refused("an unknown keyword", {"nullable": True}, "'nullable' at the top"),
        refused(
            "oneOf whose branches overlap",
            {"oneOf": [{"type": "number"}, {"type": "integer"}]},
            "'oneOf' at the top .* may overlap",
        ),
        refused("a remote $ref", {"$ref": "http://x/y.json"}, "leaves the document"),
        refused("a $ref to nothing", {"items": {"$ref": "#/$defs/a"}}, "'[$]ref' at the top.items"),
        refused(
            "a $ref that leads back to itself",
            {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}},
            "'[$]ref' .* back to itself",
        ),
        refused(
            "recursion without an end",
            {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            "'[$]ref' .* without an end",
        ),
        refused(
            "recursion without an end, through additionalProperties",
            {"type": "object", "required": ["a"], "additionalProperties": {"$ref": "#"}},
            "'[$]ref' .* without an end",
        ),
        refused(
            "recursion without an end, in one of several branches",
            {
                "anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}],
                "$defs": {
                    "a": {
                        "allOf": [
                            {"type": "object", "required": ["a"]},
                            {"properties": {"a": {"$ref": "#/$defs/a"}}},
                        ]
                    }
                },
            },
            "'[$]ref' .* without an end",
        ),
        refused("the schema false", False, "the schema is false"),
        refused(
            "a required property that can never be",
            {"type": "object", "properties": {"a": False}, "required": ["a"]},
            "nothing can fulfil it",
        ),
        refused(
            "a range without a number",
            {"type": "integer", "minimum": 4, "maximum": 3},
            "'minimum' at the top .* nothing can fulfil it",
        ),
        refused("a pattern that looks ahead", {"pattern": "(?=a)b"}, "'pattern' .* looks around"),
        refused("a pattern with a back-reference", {"pattern": r"(a)\1"}, r"'pattern' .* uses \\1"),
        refused("an anchor inside a pattern", {"pattern": "a^b"}, "'pattern' .* uses \\^ or"),
        refused("a broken pattern", {"pattern": "["}, "'pattern' .* not a regular expression"),
        refused("an unknown format", {"format": "iri"}, "'format' .* unknown"),
        refused("an unknown type", {"items": {"type": "text"}}, "type 'text' at the top.items"),
        refused("minProperties beyond what is required", {"minProperties": 1}, "'minProperties'"),
        refused("too many items", {"minItems": 10**9}, "minItems at the top is 1000000000"),
        refused("an empty enum", {"enum": []}, "'enum' at the top"),
        refused("a schema that is no object", [1], "a schema is a JSON object, got list"),
        refused("a property that is no schema", {"properties": {"a": 3}}, "at the top.a is 3"),
        refused("a value that JSON does not know", {"const": {1, 2}}, "not JSON"),
        refused("half of a surrogate pair", {"const": "\ud800"}, "not JSON"),
        refused("separators that are not JSON", {"x-guidance": {"item_separator": ";"}}, "x-guid"),
        refused("switched-off checks", {"x-guidance": {"lenient": True}}, "'x-guidance'"),
    ],
)
def test_what_cannot_hold_is_refused_before_prefill(tiny_model, schema, message):
    with tiny_model.chat() as chat:
        with pytest.raises(UsageError, match=message) as caught:
            next(chat.send("Hi", Sampling(schema=schema)))
        assert chat.session.length == 0 and chat.messages == []
    noise = ("json-schema:", "Unimplemented", "error:", "Unsatisfiable", "\n")
    assert not any(word in str(caught.value) for word in noise)


def test_what_cannot_hold_is_refused_before_a_word_is_spoken(tiny_model):
    impossible = Sampling(schema={"not": {}})
    options = edge_gemma.ListenOptions(sampling=impossible)
    with tiny_model.chat() as chat:
        with pytest.raises(UsageError, match="'not' at the top"):
            live_turn(chat, "Say", options)
        with pytest.raises(UsageError, match="'not' at the top"):
            next(edge_gemma.Listener(chat, "absent.wav", options=options).records())


def test_the_command_line_counts_structured_output_in_its_plan(tiny_bundle):
    def planned_bytes(*more: str) -> int:
        arguments = ["run", str(tiny_bundle), "Q: ", "--json", "-n", "40", "--seed", "1", *more]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["memory"]["planned_peak_bytes"]

    with_schema = planned_bytes("--schema", '{"enum": ["a"]}')
    assert with_schema - planned_bytes() == 768 * STRUCTURED_BYTES_PER_TOKEN


def property_of_schemas(decoder, n_cases: int) -> dict[str, int]:
    counts = {"valid": 0, "refused": 0, "open": 0}

    @settings(max_examples=n_cases, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(schemas.schemas(), st.integers(0, 2**31))
    def check(schema, seed):
        try:
            answer = schemas.answer_from_noise(decoder, schema, seed)
        except UsageError as error:
            assert re.match(r"(the )?schema ", str(error))
            counts["refused"] += 1
            return
        if answer is None:
            counts["open"] += 1
            return
        assert schemas.invalid(answer, schema) == ""
        counts["valid"] += 1

    check()
    return counts


@pytest.mark.compat(
    kind="schema", what="any schema", happens="every answer is valid, or the schema is refused"
)
def test_any_schema_holds_or_is_refused(tiny_model):
    counts = property_of_schemas(tiny_model.decoder, 150)
    assert counts["valid"] >= 50 and counts["open"] <= 10


@pytest.mark.slow
def test_ten_thousand_schemas_hold_or_are_refused(tiny_model):
    counts = property_of_schemas(tiny_model.decoder, 10_000)
    assert counts["valid"] >= 4000 and counts["open"] <= 500


# ---- branches that exclude each other


@pytest.mark.parametrize(
    "branches",
    [
        [{"const": 1}, {"const": 1.0}],
        [{"const": [1]}, {"const": [2]}],
        [{"type": "integer"}, {"type": "number"}],
        [{"type": "string", "pattern": "^a"}, {"type": "string", "pattern": "^b"}],
        [{"type": "integer", "maximum": 3}, {"type": "integer", "minimum": 3}],
        [
            {"type": "object", "properties": {"k": {"const": 1}}},
            {"type": "object", "properties": {"k": {"const": 2}}, "required": ["k"]},
        ],
        [{"$ref": "#/oneOf/1"}, {"$ref": "#/oneOf/0"}],
        [True, {"type": "null"}],
    ],
)
def test_branches_that_may_overlap_stay_one_of(branches):
    schema = {"oneOf": branches}
    assert without_one_of(schema, schema) == schema


# ---- keys that nobody asked for


@pytest.mark.compat(
    kind="schema",
    what="additionalProperties missing",
    happens="no other key is written, unless allOf, $ref or required ask for one",
)
def test_no_key_comes_that_nobody_asked_for(tiny_model):
    ok = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    for schema in (ok, {"anyOf": [ok]}, {"$ref": "#/$defs/ok", "$defs": {"ok": ok}}):
        answers = {schemas.answer_from_noise(tiny_model.decoder, schema, i) for i in range(8)}
        assert answers <= {'{"ok": true}', '{"ok": false}'}
    answers = {
        schemas.answer_from_noise(tiny_model.decoder, {**ok, "additionalProperties": True}, i)
        for i in range(8)
    }
    assert any(answer and len(json.loads(answer)) > 1 for answer in answers)


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {}}, "required": ["b"]},
        {"properties": {"a": {}}, "patternProperties": {"^b": {}}},
        {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]},
        {"$ref": "#/$defs/a", "properties": {"b": {}}, "$defs": {"a": {"properties": {"a": {}}}}},
        {
            "allOf": [{"$ref": "#/$defs/b"}, {"properties": {"b": {}}}],
            "$defs": {"b": {"anyOf": [{"$ref": "#/$defs/a"}]}, "a": {"properties": {"a": {}}}},
        },
        {"properties": {}},
        {"type": "object"},
    ],
)
def test_an_object_described_in_several_places_stays_open(schema):
    assert closed(schema) == schema


# ---- patterns


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"\d\w\s", None),
        (r"[\d,]", "[0-9,]"),
        (r"[^\D]", "[^[^0-9]]"),
        (r"[[&]", r"[\[\&]"),
        (r"[a--z]", r"[a-\-z]"),
        (r"a\/b\"c", r'a/b"c'),
        (r"é\x41", r"\u{E9}\x41".replace(r"\u{E9}", "é")),
        ("\\u00e9", r"\u{E9}"),
        (r"[\b]\0\v", r"[\x08]\x00\x0B"),
        ("(?:a|b)*?", "(?:a|b)*?"),
        (".", r"[^\n\r\u{2028}\u{2029}]"),
    ],
)
def test_patterns_are_rewritten(pattern, expected):
    assert expected is None or translated(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(?i)a", "sets flags"),
        ("(?<=a)b", "looks around"),
        ("(?<!a)b", "looks around"),
        (r"\p{L}", r"uses \\p"),
        (r"\ba", r"uses \\b"),
        (r"[a-\d]", "a range"),
        (r"[\w-z]", "a range"),
        ("[]", "empty class"),
        ("[^]", "class"),
        (r"\u00", "4 hex digits"),
        (r"\ud83d\ude00", "surrogate"),
        ("a\\", "ends with a backslash"),
    ],
)
def test_patterns_that_mean_something_else_are_refused(pattern, reason):
    with pytest.raises(UsageError, match=reason):
        translated(pattern)


def test_a_digit_is_an_ascii_digit(tiny_model):
    guidance = Guidance(tiny_model.decoder.token_table())
    three = guidance.constraint({"type": "string", "pattern": r"^\d$"})
    for token in tiny_model.tokenize('"'):
        three.accept(token)
    pieces = [tiny_model.decoder.piece(int(token)) for token in ids_in(three.allowed())]
    assert {piece[:1] for piece in pieces} == {b"%d" % digit for digit in range(10)}


# ---- white space, forced tokens, what a vocabulary is


def test_white_space_is_fixed_unless_it_is_set_free(tiny_model):
    both = {"a": {"type": "null"}, "b": {"type": "null"}}
    schema = {"type": "object", "properties": both, "required": ["a", "b"]}
    schema["additionalProperties"] = False
    for seed in range(3):
        answer = schemas.answer_from_noise(tiny_model.decoder, schema, seed)
        assert answer == '{"a": null, "b": null}'
    dense = {**schema, "x-guidance": {"item_separator": ",", "key_separator": ":"}}
    assert schemas.answer_from_noise(tiny_model.decoder, dense, 0) == '{"a":null,"b":null}'
    free = {**schema, "x-guidance": {"whitespace_flexible": True}}
    answers = {schemas.answer_from_noise(tiny_model.decoder, free, seed) for seed in range(5)}
    assert len(answers) > 1


def test_forced_tokens_are_the_vocabularys_own(tiny_model):
    text = '{"name": "set_temperature", "parameters": {"room": "living room"}}'
    constraint = Guidance(tiny_model.decoder.token_table()).constraint({"const": json.loads(text)})
    forced = constraint.forced_tokens()
    assert tiny_model.detokenize(forced) == text[: len(tiny_model.detokenize(forced))]
    assert len(forced) >= len(tiny_model.tokenize(text)) - 2
    assert forced == tiny_model.tokenize(text)[: len(forced)]


def test_the_table_of_tokens_is_what_llama_cpp_prints(tiny_model):
    decoder = tiny_model.decoder
    table = decoder.token_table()
    assert list(table.pieces) == [decoder.piece(id, special=True) for id in range(decoder.n_vocab)]
    assert set(table.end_ids) == {id for id in range(decoder.n_vocab) if decoder.is_end(id)}
    assert set(table.end_ids) | set(decoder.suppressed) <= set(table.control_ids)


def test_masks_and_ids_are_the_same_thing():
    ids = np.unique(np.random.default_rng(1).integers(0, 1000, 300))
    words = mask_of(ids, 1000)
    assert words.shape == (32,) and np.array_equal(ids_in(words), ids)
    assert ids_in(mask_of([], 64)).size == 0


# ---- without llguidance


def test_without_llguidance_llama_cpps_grammar_stands_in(tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr("edge_gemma.engines.llama.decoder.is_installed", lambda: False)
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    chunks = list(tiny_model.generate("Q: ", Sampling(schema=schema, max_tokens=200, seed=2)))
    assert set(json.loads("".join(chunk.text for chunk in chunks))) == {"ok"}
    with pytest.raises(UsageError, match="'minimum' at the top"):
        list(tiny_model.generate("Q: ", Sampling(schema={"type": "integer", "minimum": 3})))
