"""Function calling in Gemma 3's text format: tools → prompt text and a JSON schema; the model's
answer → parsed calls.

In: tool descriptions (name, description, JSON schema of the parameters) and generated text. Out:
text, a schema, :class:`FunctionCall`. Gemma 3 has no tokens for tools: the format is agreed on in
the prompt (ai.google.dev/gemma/docs/capabilities/function-calling). This module calls no function;
whoever has the calls decides what to run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_gemma.errors import UsageError

MAX_ANSWER_CHARS = 1 << 20
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_FENCE = re.compile(
    r"```[ \t]*(?:json|tool_code|tool_call)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL
)


@dataclass(frozen=True)
class FunctionCall:
    """One call the model asks for.

    >>> FunctionCall("light", {"on": True}).to_json()
    '{"name": "light", "parameters": {"on": true}}'
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"name": self.name, "parameters": self.parameters}, ensure_ascii=False)


def check_tools(tools: Sequence[Mapping]) -> list[dict]:
    """Tools as ``{"name", "description", "parameters"}``, bare or inside ``{"type": "function",
    "function": …}``. Raises UsageError.
    """
    checked: list[dict] = []
    for tool in tools:
        tool = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        name = tool.get("name") if isinstance(tool, Mapping) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(
                f"a tool needs a name of letters, digits, _ . - (at most 64); found {name!r} "
                f"in {str(tool)[:200]}"
            )
        if any(name == other["name"] for other in checked):
            raise UsageError(f"two tools are called {name!r}; give each its own name")
        parameters = tool.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise UsageError(
                f'the parameters of tool {name!r} must be a JSON schema of "type": "object"; '
                f"found {str(parameters)[:200]}"
            )
        try:
            json.dumps(parameters)
        except (TypeError, ValueError) as error:
            raise UsageError(f"the parameters of tool {name!r} are not JSON: {error}") from None
        checked.append(
            {
                "name": name,
                "description": str(tool.get("description", "")),
                "parameters": {"type": "object", **parameters},
            }
        )
    return checked


def tools_text(tools: Sequence[Mapping]) -> str:
    """What the system text says about ``tools``: the answer's format, then their descriptions as
    one JSON array.

    >>> text = tools_text([{"name": "now", "description": "The time."}])
    >>> json.loads(text.splitlines()[-1])[0]["parameters"]
    {'type': 'object', 'properties': {}}
    """
    return (
        "You can call the functions listed below. To call one, answer with nothing but a "
        "JSON object in the format\n"
        '{"name": function name, "parameters": dictionary of argument name and its value}\n'
        "To call several, answer with a JSON array of such objects. When no function is "
        "needed, answer in plain text.\n\n" + json.dumps(check_tools(tools), ensure_ascii=False)
    )


def tool_schema(tools: Sequence[Mapping]) -> dict:
    """The JSON schema of one call to one of ``tools``, for constraining what the model may write.

    >>> tool_schema([{"name": "now"}])["properties"]["name"]
    {'const': 'now'}
    """
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "parameters": tool["parameters"]},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for tool in check_tools(tools)
    ]
    if not calls:
        raise UsageError("a call was to be constrained, but no tools were given")
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def parse_calls(text: str, tools: Sequence[Mapping] | None = None) -> list[FunctionCall]:
    """The calls in an answer, in order; an empty list when it is plain text.

    With ``tools``, only calls to those.

    Read are: a JSON object or array that is the whole answer, starts a line, or stands in a fence
    (```json, ```tool_code). Nothing is evaluated: Python syntax inside a fence is text, not a call.
    """
    known = None if tools is None else {tool["name"] for tool in check_tools(tools)}
    text = text[:MAX_ANSWER_CHARS]
    blocks = [match[1] for match in _FENCE.finditer(text)] or [text]
    calls: list[FunctionCall] = []
    for block in blocks:
        position = 0
        while match := re.compile(r"^[ \t]*(?=[{\[])", re.MULTILINE).search(block, position):
            try:
                value, position = json.JSONDecoder().raw_decode(block, match.end())
            except (ValueError, RecursionError):
                position = match.end() + 1
                continue
            calls += [
                call
                for item in (value if isinstance(value, list) else [value])
                if (call := _call(item))
            ]
    return [call for call in calls if known is None or call.name in known]


def _call(value: Any) -> FunctionCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    parameters = value.get(
        "parameters", value.get("arguments")
    )  # "arguments" is what other models' formats say
    return FunctionCall(value["name"], parameters) if isinstance(parameters, dict) else None
