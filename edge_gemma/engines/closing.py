"""Objects of a JSON schema that nobody said may have more keys get none.

JSON Schema allows any further key where ``additionalProperties`` is missing. A model that is held
to a schema should not use that: what it writes stays valid, and ends. In: a checked schema. Out:
the same one with ``additionalProperties: false`` where that excludes nothing that is asked for. An
object whose description is spread over ``allOf``, ``$ref`` and neighbours stays as it is.
"""

from __future__ import annotations

from typing import Any

Json = Any  # a JSON value: whatever json.loads gives
_IN_PLACE = ("allOf", "anyOf", "oneOf")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_INSIDE = ("items", "prefixItems", "additionalProperties", "additionalItems")
_SAY_NOTHING = {"$defs", "definitions", "$schema", "$id", "$anchor", "x-guidance"}
_MORE_KEYS = {"additionalProperties", "patternProperties", "$ref", *_IN_PLACE}


def closed(schema: Json) -> Json:
    """
    >>> closed({"type": "object", "properties": {"a": {}}})
    {'type': 'object', 'properties': {'a': {}}, 'additionalProperties': False}
    """
    closer = _Closer()
    while True:
        n_shared = len(closer.shared)
        made = closer.visit(schema, "#", alone=True)
        if len(closer.shared) == n_shared:
            return made


class _Closer:
    def __init__(self) -> None:
        # references that describe a value together with something else
        self.shared: set[str] = set()

    def visit(self, schema: Json, pointer: str, *, alone: bool) -> Json:
        """``alone``: nothing else describes the same value."""
        if isinstance(schema, list):
            children = enumerate(schema)
            return [self.visit(child, f"{pointer}/{i}", alone=alone) for i, child in children]
        if not isinstance(schema, dict):
            return schema
        alone = alone and pointer not in self.shared
        says = set(schema) - _SAY_NOTHING
        if isinstance(schema.get("$ref"), str) and (not alone or says != {"$ref"}):
            self.shared.add(schema["$ref"])
        made = {}
        for key, value in schema.items():
            below = f"{pointer}/{key}"
            if key in _IN_PLACE:
                only = key != "allOf" and says <= {key, "type"}
                made[key] = self.visit(value, below, alone=alone and only)
            elif key in _MAPS:
                made[key] = {
                    name: self.visit(child, f"{below}/{_escaped(name)}", alone=True)
                    for name, child in value.items()
                }
            elif key in _INSIDE:
                made[key] = self.visit(value, below, alone=True)
            else:
                made[key] = value
        if alone and _is_whole(schema):
            made["additionalProperties"] = False
        return made


def _is_whole(schema: dict[str, Json]) -> bool:
    """Whether the properties of an object are all here."""
    properties = schema.get("properties")
    if not properties or _MORE_KEYS & set(schema):
        return False
    return set(schema.get("required", ())) <= set(properties)


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
