"""A JSON schema as GBNF, or a refusal that names what llama.cpp's converter would silently drop."""

from __future__ import annotations

import json
from typing import Any

from edge_gemma.engines.llama.library import library
from edge_gemma.engines.schema import with_null
from edge_gemma.errors import UsageError

# What llama_cpp's converter turns into grammar. It drops everything else without a word (minimum,
# maximum …), so we refuse it.
_NOTES = {
    "title",
    "description",
    "default",
    "examples",
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
    "deprecated",
}
# the first that applies wins in the converter; its companions are all it looks at
_BY_SHAPE: tuple[tuple[set[str], set[str]], ...] = (
    ({"$ref"}, set()),
    ({"oneOf"}, set()),
    ({"anyOf"}, set()),
    ({"const"}, {"type"}),
    ({"enum"}, {"type"}),
    ({"properties"}, {"type", "required", "additionalProperties"}),
    ({"additionalProperties"}, {"type", "required"}),
    ({"allOf"}, {"type"}),
    ({"prefixItems"}, {"type"}),
    ({"items"}, {"type", "minItems", "maxItems"}),
    ({"pattern"}, {"type"}),
    ({"format"}, {"type"}),
    ({"minLength"}, {"type", "maxLength"}),
    ({"maxLength"}, {"type", "minLength"}),
    ({"type"}, set()),
    (set(), set()),
)
_FORMATS = {"date", "time", "date-time", "uuid", "uuid1", "uuid2", "uuid3", "uuid4", "uuid5"}
_TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}
_MAX_REPEAT = 2000  # llama.cpp's own bound on a repetition


def schema_to_grammar(schema: dict) -> str:
    """A JSON schema as GBNF. Raises UsageError naming the keyword that cannot be honoured.

    >>> schema_to_grammar({"type": "integer", "minimum": 3})
    Traceback (most recent call last):
    edge_gemma.errors.UsageError: schema keyword 'minimum' at the top cannot be enforced ...
    """
    library()
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    if not isinstance(schema, dict):
        raise UsageError(f"a schema is a JSON object, got {type(schema).__name__}")
    try:
        schema = with_null(schema)
        _check_schema(schema, "the top", 0)
        # its rule for a character lets control characters through, which JSON forbids inside
        # strings (RFC 8259, section 7)
        return json_schema_to_gbnf(json.dumps(schema)).replace(r'[^"\\]', r'[^"\\\x7F\x00-\x1F]')
    except UsageError:
        raise
    except RecursionError:
        raise UsageError("the schema is nested too deeply") from None
    except Exception as error:  # the converter raises whatever Python does: KeyError, …
        raise UsageError(
            f"the schema cannot be turned into a grammar: {type(error).__name__}: {error}"
        ) from None


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
        raise UsageError(
            f"schema keyword {min(extra)!r} at {where} cannot be enforced while sampling; "
            "leave it out and check the answer"
        )
    _check_values(schema, where, present)
    for name, child in _children(schema, where):
        _check_schema(child, name, depth + 1)


def _check_values(schema: dict[str, Any], where: str, present: set[str]) -> None:
    kind = schema.get("type")
    for name in kind if isinstance(kind, list) else [kind]:
        if name is not None and name not in _TYPES:
            raise UsageError(
                f"schema type {name!r} at {where} is unknown; expected one of "
                f"{', '.join(sorted(_TYPES))}"
            )
    if isinstance(kind, list) and present != {"type"}:
        raise UsageError(
            f"schema at {where}: several types together with other keywords cannot be "
            "enforced; use anyOf"
        )
    if "format" in present and schema["format"] not in _FORMATS:
        raise UsageError(
            f"schema format {schema['format']!r} at {where} is unknown; expected one of "
            f"{', '.join(sorted(_FORMATS))}"
        )
    if "$ref" in present and not str(schema["$ref"]).startswith("#/"):
        raise UsageError(
            f"schema $ref {schema['$ref']!r} at {where} leaves the document; only #/… is followed"
        )
    for key in ("minItems", "maxItems", "minLength", "maxLength"):
        if key in present and not (
            isinstance(schema[key], int) and 0 <= schema[key] <= _MAX_REPEAT
        ):
            raise UsageError(
                f"schema {key} at {where} is {schema[key]!r}; expected 0 … {_MAX_REPEAT}"
            )


def _children(schema: dict[str, Any], where: str) -> list[tuple[str, object]]:
    """The schemas inside a schema, each with its place."""
    children: list[tuple[str, object]] = [
        (f"{where}.{k}", v)
        for group in ("properties", "$defs", "definitions")
        for k, v in (schema.get(group) or {}).items()
    ]
    children += [
        (f"{where}.{k}[{i}]", v)
        for k in ("oneOf", "anyOf", "allOf", "prefixItems")
        for i, v in enumerate(schema.get(k) or ())
    ]
    children += [
        (f"{where}.{k}", schema[k])
        for k in ("items", "additionalProperties")
        if isinstance(schema.get(k), dict)
    ]
    return children
