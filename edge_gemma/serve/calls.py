"""The schema of an answer that may also be a call."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from edge_gemma.prompts.calls import tool_schema


def call_or(wanted: dict, tools: Sequence[Mapping]) -> dict:
    """The schema of an answer that either calls one of ``tools`` or is as ``wanted``. Where
    ``wanted`` refers to itself by its place, which would be another one then, it stays alone.

    >>> call_or({"type": "string"}, [{"name": "now"}])["anyOf"][1]
    {'type': 'string'}
    """
    shared = {key: wanted[key] for key in ("$defs", "definitions") if key in wanted}
    rest = {key: value for key, value in wanted.items() if key not in shared}
    places = re.findall(r'"\$ref": "([^"]*)"', json.dumps(wanted))
    if not tools or any(not place.startswith(("#/$defs/", "#/definitions/")) for place in places):
        return wanted
    return {**shared, "anyOf": [tool_schema(tools), rest]}
