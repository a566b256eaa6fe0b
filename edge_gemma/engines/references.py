"""Where the references of a JSON schema lead: whether some finite value can fulfil it.

In: a schema whose keywords were checked. Out: what is wrong with its references, or nothing.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

Json = Any  # a JSON value: whatever json.loads gives
MAX_REFERENCES = 1000  # different ones in one schema
_IN_PLACE = ("allOf", "anyOf", "oneOf")  # they speak of the same value


def endless(root: dict[str, Json]) -> str:
    """Why following the references never ends; "" when it does.

    >>> endless({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]})
    'it asks for a value without an end'
    >>> endless({"type": "object", "properties": {"a": {"$ref": "#"}}})
    ''
    """
    targets: dict[str, Json] = {}
    _collect(root, root, targets)
    if len(targets) > MAX_REFERENCES:
        return f"{len(targets)} different references; at most {MAX_REFERENCES} are followed"
    if _has_a_loop(targets):
        return "it leads back to itself before any value"
    # a branch without an end is one too many: a model that enters it never comes back
    if _finite_references(targets) != set(targets):
        return "it asks for a value without an end"
    return ""


def _collect(schema: Json, root: dict[str, Json], targets: dict[str, Json]) -> None:
    """Every reference anywhere in the schema, with what it points at (True where that is nothing:
    whoever compiles the schema says so).
    """
    if isinstance(schema, list):
        for child in schema:
            _collect(child, root, targets)
    if isinstance(schema, dict):
        reference = schema.get("$ref")
        if isinstance(reference, str):
            targets[reference] = resolved(reference, root)
        for child in schema.values():
            _collect(child, root, targets)


def resolved(reference: str, root: dict[str, Json]) -> Json:
    """What a reference inside the document points at; True where that is nothing or an anchor."""
    if reference != "#" and not reference.startswith("#/"):
        return True  # an anchor
    found: Json = root
    for name in reference[1:].split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        else:
            return True
    return found


def _has_a_loop(targets: dict[str, Json]) -> bool:
    """Whether a reference comes back to itself while it still speaks of the same value."""
    waiting = {name: set(_in_place(schema)) for name, schema in targets.items()}
    while waiting:
        done = {name for name, others in waiting.items() if not others}
        if not done:
            return True
        waiting = {n: others - done for n, others in waiting.items() if n not in done}
    return False


def _in_place(schema: Json) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("$ref"), str):
        yield schema["$ref"]
    for key in _IN_PLACE:
        for child in schema.get(key, ()):
            yield from _in_place(child)


def _finite_references(targets: dict[str, Json]) -> set[str]:
    """The references that some finite value fulfils: a least fixed point."""
    finite: set[str] = set()
    while True:
        more = {n for n, schema in targets.items() if n not in finite and _ends(schema, finite)}
        if not more:
            return finite
        finite |= more


def _ends(schema: Json, finite: Container[str]) -> bool:
    """Whether a finite value can fulfil the schema, as far as references decide that."""
    if not isinstance(schema, dict):
        return True
    if "$ref" in schema and schema["$ref"] not in finite:
        return False
    if not all(_ends(child, finite) for child in schema.get("allOf", ())):
        return False
    for key in ("anyOf", "oneOf"):
        branches = schema.get(key)
        if branches and not any(_ends(child, finite) for child in branches):
            return False
    return all(_ends(child, finite) for child in _needed(schema))


def _needed(schema: dict[str, Json]) -> Iterator[Json]:
    """The schemas of what every value of this schema holds inside."""
    parts = [part for part in (schema, *schema.get("allOf", ())) if isinstance(part, dict)]
    kinds = {part["type"] for part in parts if isinstance(part.get("type"), str)}
    if "object" in kinds:
        names = {name for part in parts for name in part.get("required", ())}
        for part in parts:
            yield from (_of_property(part, name) for name in names)
    elif "array" in kinds:
        n_items = max(part.get("minItems", 0) for part in parts)
        for part in parts:
            first = part.get("prefixItems", [])[:n_items]
            yield from first
            if len(first) < n_items:
                yield part.get("items", True)


def _of_property(schema: dict[str, Json], name: str) -> Json:
    """What an object's schema says of one property; where patterns may, any of them."""
    if name in schema.get("properties", {}):
        return schema["properties"][name]
    others = [schema.get("additionalProperties", True)]
    return {"anyOf": [*schema.get("patternProperties", {}).values(), *others]}
