"""``oneOf`` whose branches exclude each other is ``anyOf``, which can be enforced.

In: a checked schema. Out: the same one, with ``anyOf`` where no value fulfils two branches: other
types, other constants, number ranges apart, or objects that a required property tells apart (a
discriminator). Where that cannot be shown, ``oneOf`` stays.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from edge_gemma.engines.references import resolved

Json = Any  # a JSON value: whatever json.loads gives
_MAX_BRANCHES = 100
_MAX_DEPTH = 4  # of references and properties that are looked into
_VALUES = ("const", "enum", "default", "examples")  # they hold values, no schemas


def without_one_of(schema: Json, root: dict[str, Json]) -> Json:
    """
    >>> schema = {"oneOf": [{"const": "a"}, {"const": "b"}]}
    >>> without_one_of(schema, schema)
    {'anyOf': [{'const': 'a'}, {'const': 'b'}]}
    """
    if isinstance(schema, list):
        return [without_one_of(child, root) for child in schema]
    if not isinstance(schema, dict):
        return schema
    made = {k: v if k in _VALUES else without_one_of(v, root) for k, v in schema.items()}
    branches = schema.get("oneOf")
    if isinstance(branches, list) and "anyOf" not in schema and len(branches) <= _MAX_BRANCHES:
        if all(_exclude(a, b, root, 0) for a, b in combinations(branches, 2)):
            made["anyOf"] = made.pop("oneOf")
    return made


def _exclude(a: Json, b: Json, root: dict[str, Json], depth: int) -> bool:
    """Whether surely no value fulfils both."""
    a, b = _target(a, root), _target(b, root)
    if a is False or b is False:
        return True
    if depth > _MAX_DEPTH or not isinstance(a, dict) or not isinstance(b, dict):
        return False
    types_a, types_b = _types(a), _types(b)
    if types_a and types_b and not types_a & types_b:
        return True
    values_a, values_b = _constants(a), _constants(b)
    if values_a is not None and values_b is not None:
        return not values_a & values_b
    if types_a == types_b == {"number"}:
        return _ends_before(a, b) or _ends_before(b, a)
    if types_a == types_b == {"object"}:
        return _told_apart(a, b, root, depth)
    return False


def _told_apart(a: dict[str, Json], b: dict[str, Json], root: dict[str, Json], depth: int) -> bool:
    """Whether two objects both need a property that cannot be the same in both."""
    both = set(a.get("required", ())) & set(b.get("required", ()))
    of_a, of_b = a.get("properties", {}), b.get("properties", {})
    shared = both & set(of_a) & set(of_b)
    return any(_exclude(of_a[name], of_b[name], root, depth + 1) for name in shared)


def _target(schema: Json, root: dict[str, Json]) -> Json:
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, dict) or set(schema) != {"$ref"}:
            break
        schema = resolved(schema["$ref"], root)
    return schema


def _types(schema: dict[str, Json]) -> set[str]:
    given = schema.get("type", [])
    names = given if isinstance(given, list) else [given]
    return {"number" if name == "integer" else name for name in names}


def _constants(schema: dict[str, Json]) -> set[tuple[str, Json]] | None:
    """The values that a schema lists, or None: it lists none, or more than plain values."""
    if "const" in schema:
        values = [schema["const"]]
    elif isinstance(schema.get("enum"), list):
        values = schema["enum"]
    else:
        return None
    found = set()
    for value in values:
        if isinstance(value, dict | list):
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        found.add(("number" if is_number else type(value).__name__, value))
    return found


def _ends_before(a: dict[str, Json], b: dict[str, Json]) -> bool:
    highest, lowest = a.get("maximum"), b.get("minimum")
    if isinstance(highest, int | float) and isinstance(lowest, int | float):
        return highest < lowest
    return False
