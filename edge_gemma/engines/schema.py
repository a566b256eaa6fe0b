"""A JSON schema as a user gives it → the same schema in the form that is enforced, or a refusal
that names keyword and place.

In: any Python value. Out: a dict of the keywords that :data:`ENFORCED` lists, patterns rewritten.
This module knows no tokens and no library: whoever enforces the schema says with
``Compile(schema) -> str`` what is wrong with it, and :func:`refusal` finds out where.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from edge_gemma.engines.closing import closed
from edge_gemma.engines.one_of import without_one_of
from edge_gemma.engines.patterns import translated
from edge_gemma.engines.references import endless
from edge_gemma.errors import UsageError

MAX_SCHEMA_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_COUNT = 10_000  # of minItems and the like: each is a part of the grammar
TOP = "the top"

Json = Any  # a JSON value: whatever json.loads gives
Schema = dict[str, Json]
Compile = Callable[[Schema], str]  # what is wrong with a schema; "" when nothing is

# they say something about a value, and forbid none
NOTES = frozenset(
    "title description default examples $schema $id $comment deprecated readOnly writeOnly "
    "contentMediaType contentEncoding discriminator".split()
)
_SWITCHES = ("uniqueItems", "nullable")  # false says nothing
ENFORCED = frozenset(
    "type enum const $ref $defs definitions $anchor allOf anyOf oneOf properties required "
    "additionalProperties patternProperties minProperties maxProperties items prefixItems "
    "additionalItems minItems maxItems minLength maxLength pattern format minimum maximum "
    "exclusiveMinimum exclusiveMaximum multipleOf".split()
)
# how the answer is spaced, at the top of a schema
SPACING = "x-guidance"
_SPACES = r"[ \t]{0,2}(\n[ \t]{0,16})?"  # as JSON is printed; never a run without an end
_SPACING_VALUES = {
    "whitespace_flexible": re.compile(r"true|false"),
    "item_separator": re.compile(r'"( |\\[tnr])*,( |\\[tnr])*"'),
    "key_separator": re.compile(r'"( |\\[tnr])*:( |\\[tnr])*"'),
    "whitespace_pattern": re.compile(re.escape(json.dumps(_SPACES))),
}
ANY_SPACE = {
    "whitespace_flexible": True,
    "whitespace_pattern": _SPACES,
    "item_separator": ",",
    "key_separator": ":",
}
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "additionalItems")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
_TYPES = frozenset("object array string number integer boolean null".split())


def enforceable(schema: Json) -> Schema:
    """The schema in the form that is enforced. Raises UsageError naming keyword and place.

    >>> enforceable({"type": "string", "pattern": "^[0-9]$", "title": "A digit"})
    {'type': 'string', 'pattern': '^[0-9]$'}
    >>> enforceable({"items": {"uniqueItems": True}})
    Traceback (most recent call last):
    edge_gemma.errors.UsageError: schema keyword 'uniqueItems' at the top.items cannot be ...
    """
    if schema is True:
        schema = {}
    if schema is False:
        raise UsageError("the schema is false: nothing can fulfil it")
    if not isinstance(schema, dict):
        raise UsageError(f"a schema is a JSON object, got {type(schema).__name__}")
    try:
        data = json.dumps(schema, allow_nan=False)
        json.dumps(schema, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise UsageError(f"the schema is nested more than {MAX_DEPTH} deep") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"the schema is not JSON: {error}") from None
    if len(data) > MAX_SCHEMA_BYTES:
        raise UsageError(f"the schema has {len(data)} bytes; at most {MAX_SCHEMA_BYTES}")
    plain: Schema = json.loads(data)  # tuples are lists now, keys are strings
    try:
        plain = with_null(plain)
    except RecursionError:
        raise UsageError(f"the schema is nested more than {MAX_DEPTH} deep") from None
    spacing = _spacing(plain.pop(SPACING, {}))
    written = _rewritten(plain, TOP, 0)
    problem = endless(plain)
    if problem:
        raise cannot_be_enforced("$ref", TOP, problem)
    return {**closed(without_one_of(written, written)), **spacing}


def with_null(schema: Json) -> Json:
    """OpenAPI 3.0's ``nullable`` beside a type, in JSON Schema's own words: what Home Assistant
    sends of its tasks.

    >>> with_null({"type": "string", "nullable": True})
    {'anyOf': [{'type': 'string'}, {'type': 'null'}]}
    """
    if isinstance(schema, list):
        return [with_null(child) for child in schema]
    if not isinstance(schema, dict):
        return schema
    written = {
        key: value if key in ("enum", "const", "default", "examples") else with_null(value)
        for key, value in schema.items()
    }
    # in a map of properties these two are names, and "type" is no text
    if written.get("nullable") is True and isinstance(written.get("type"), str | list):
        del written["nullable"]
        return {"anyOf": [written, {"type": "null"}]}
    return written


def cannot_be_enforced(keyword: str, where: str, reason: str = "") -> UsageError:
    because = f": {reason}" if reason else ""
    return UsageError(
        f"schema keyword {keyword!r} at {where} cannot be enforced while sampling{because}; "
        "leave it out and check the answer"
    )


def _spacing(given: Json) -> Schema:
    values = given.items() if isinstance(given, dict) else [("", given)]
    for key, value in values:
        expected = _SPACING_VALUES.get(key)
        if expected is None or not expected.fullmatch(json.dumps(value)):
            raise UsageError(
                f"schema keyword {SPACING!r} at {TOP} is {str(given)[:200]}; expected an object "
                'such as {"whitespace_flexible": true, "item_separator": ", "}'
            )
    return {SPACING: given} if given else {}


def _rewritten(schema: Schema, where: str, depth: int) -> Schema:
    if depth > MAX_DEPTH:
        raise UsageError(f"the schema is nested more than {MAX_DEPTH} deep, at {where[:200]} …")
    schema = {k: v for k, v in schema.items() if k not in _SWITCHES or v is not False}
    unknown = sorted(key for key in schema if key not in NOTES and key not in ENFORCED)
    if unknown:
        raise cannot_be_enforced(unknown[0], where)
    _check_values(schema, where)
    written: Schema = {}
    for key, value in schema.items():
        if key in ENFORCED or key in ("$schema", "$id"):
            written[key] = _value(key, value, where, depth)
    return written


def _value(key: str, value: Json, where: str, depth: int) -> Json:
    """A keyword's value with every schema and pattern inside it rewritten."""
    if key in _MAPS:
        below = f"{where}" if key == "properties" else f"{where}.{key}"
        return {
            _pattern(name, where) if key == "patternProperties" else name: _child(
                child, f"{below}.{name}", depth
            )
            for name, child in _typed(key, value, where, dict).items()
        }
    if key in _LISTS or (key == "items" and isinstance(value, list)):
        children = enumerate(_typed(key, value, where, list))
        return [_child(child, f"{where}.{key}[{i}]", depth) for i, child in children]
    if key in _SINGLE:
        return _child(value, f"{where}.{key}", depth)
    return _pattern(value, where) if key == "pattern" else value


def _child(schema: Json, where: str, depth: int) -> Json:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise UsageError(f"the schema at {where} is {schema!r:.200}; expected an object or boolean")
    return _rewritten(schema, where, depth + 1)


def _typed(key: str, value: Json, where: str, kind: type) -> Json:
    if not isinstance(value, kind):
        raise UsageError(f"schema {key} at {where} is {value!r:.200}; expected {_KINDS[kind]}")
    return value


def _pattern(pattern: Json, where: str) -> str:
    try:
        return translated(_typed("pattern", pattern, where, str))
    except UsageError as error:
        if "expected" in str(error):
            raise
        reason = f"of {pattern!r:.200}, {error}"
        raise cannot_be_enforced("pattern", where, reason) from None


def _check_values(schema: Schema, where: str) -> None:
    kinds = schema.get("type", [])
    for name in kinds if isinstance(kinds, list) else [kinds]:
        if name not in _TYPES:
            raise UsageError(
                f"schema type {name!r:.200} at {where} is unknown; expected one of "
                f"{', '.join(sorted(_TYPES))}"
            )
    for key in _COUNTS:
        count = schema.get(key, 0)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_COUNT:
            raise UsageError(f"schema {key} at {where} is {count!r:.200}; expected 0 … {MAX_COUNT}")
    if not str(schema.get("$ref", "#")).startswith("#"):
        raise UsageError(
            f"schema $ref {schema['$ref']!r:.200} at {where} leaves the document; only #… is "
            "followed"
        )
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise UsageError(f"schema required at {where} is {required!r:.200}; expected names")
    if schema.get("minProperties", 0) > len(set(required)):
        # an answer may write one name twice, which a reader counts once
        raise cannot_be_enforced(
            "minProperties", where, f"only {len(set(required))} names are required"
        )


# ---- where a schema fails


def refusal(schema: Schema, compile: Compile) -> UsageError | None:
    """None when ``compile`` takes the schema, else the error that names the keyword at fault.

    The innermost schema that fails by itself, and in it the first keyword without which it does
    not.
    """
    message = compile(schema)
    if not message:
        return None
    shared: Schema = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    where, failing = _innermost(schema, TOP, shared, compile)
    message = compile({**shared, **failing}) or message
    return cannot_be_enforced(_culprit(failing, shared, compile), where, _reason(message))


def _innermost(schema: Schema, where: str, shared: Schema, compile: Compile) -> tuple[str, Schema]:
    for place, child in _children(schema, where):
        if isinstance(child, dict) and compile({**shared, **child}):
            if "Pointer" in compile({**shared, **child}) and not _is_shared(child):
                continue  # it refers to what stands outside of it
            return _innermost(child, place, shared, compile)
    return where, schema


def _is_shared(schema: Schema) -> bool:
    references = [word for word in json.dumps(schema).split('"') if word.startswith("#")]
    return all(word.startswith(("#/$defs/", "#/definitions/")) for word in references)


def _children(schema: Schema, where: str) -> Iterator[tuple[str, Json]]:
    for key, value in schema.items():
        if key in _MAPS:
            below = where if key == "properties" else f"{where}.{key}"
            yield from ((f"{below}.{name}", child) for name, child in value.items())
        elif isinstance(value, list) and (key in _LISTS or key == "items"):
            yield from ((f"{where}.{key}[{i}]", child) for i, child in enumerate(value))
        elif key in _SINGLE:
            yield f"{where}.{key}", value


def _culprit(schema: Schema, shared: Schema, compile: Compile) -> str:
    keys = [key for key in schema if key not in ("type", "$defs", "definitions")]
    for key in [*keys, "type"]:
        rest = {k: v for k, v in schema.items() if k != key}
        if key in schema and not compile({**shared, **rest}):
            return key
    return (keys or ["type"])[0]


# how an explanation of the library begins → what it means
_REASONS = {
    "Unsatisfiable": "nothing can fulfil it",
    "Unknown format": "the format is unknown",
    "Pointer": "it points at nothing in the schema",
    "oneOf": "its branches may overlap; use anyOf",
    "lookarounds": "the pattern uses ^ or $ inside",
    "Failed to generate regex": "the range is too large",
    "regex parse": "the pattern is not a regular expression",
    "min/maxProperties": "a property may be left out",
    "not disjoint": "two of its patterns may fit the same name",
    "circular": "a reference back to itself stands beside other keywords",
    "stack level": "it is nested too deeply",
}


def _reason(message: str) -> str:
    for start, meaning in _REASONS.items():
        if start in message:
            return meaning
    return ""
