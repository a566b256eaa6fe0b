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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edge_gemma.errors import UsageError
from edge_gemma.messages import FunctionCall

MAX_ANSWER_CHARS = 1 << 20
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
# a fence with its language, or a line that begins like JSON
_BEGINNING = re.compile(r"```[ \t]*(?P<tag>[\w+-]*)|^[ \t]*(?=[{\[])", re.MULTILINE)
_CALL_TAGS = ("", "json", "tool_code", "tool_call", "tool_calls", "function_call")
_WHITE_SPACE, _SEPARATORS = re.compile(r"\s*"), re.compile(r"[\s,;]*")


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_not_json)


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

    Read are: JSON objects and arrays that begin the answer, a line or a fence (```json,
    ```tool_code, ```), and what follows them behind a space, comma or semicolon. Nothing is
    evaluated: Python syntax inside a fence is text, not a call.

    >>> parse_calls('{"name": "now"}; {"name": "light", "arguments": {"on": true}}')
    [FunctionCall(name='now', parameters={}), FunctionCall(name='light', parameters={'on': True})]
    """
    known = None if tools is None else {tool["name"] for tool in check_tools(tools)}
    text = text[:MAX_ANSWER_CHARS]
    calls: list[FunctionCall] = []
    position = 0
    while match := _BEGINNING.search(text, position):
        position = match.end()
        if match["tag"] is not None and match["tag"].lower() not in _CALL_TAGS:
            closing = text.find("```", position)  # code: no call in it counts
            position = len(text) if closing < 0 else closing + 3
            continue
        values, behind = _values(text, position)
        position = behind if values else position + (match["tag"] is None)
        calls += [call for value in values for call in _calls_of(value)]
    return [call for call in calls if known is None or call.name in known]


def _values(text: str, position: int) -> tuple[list[Any], int]:
    """The JSON objects and arrays from ``position`` on, and where they end."""
    values: list[Any] = []
    separators = _WHITE_SPACE
    while match := separators.match(text, position):
        if text[match.end() : match.end() + 1] not in ("{", "["):
            break
        try:
            value, position = _DECODER.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            break
        values.append(value)
        separators = _SEPARATORS
    return values, position


def _calls_of(value: Any) -> Iterator[FunctionCall]:
    """The calls in a JSON value: an object, a list of them, or other models' wrappings."""
    for item in value if isinstance(value, list) else [value]:
        call = call_of(item)
        if call is not None:
            yield call
        elif isinstance(item, Mapping) and isinstance(item.get("tool_calls"), list):
            yield from filter(None, map(call_of, item["tool_calls"]))


def call_of(value: Any) -> FunctionCall | None:
    """A call in one of the forms that models and programs write, or None for any other value.

    ``parameters`` may be called ``arguments``, be JSON text, null or missing (then the object says
    nothing else); the whole may stand below ``function``.
    """
    if isinstance(value, FunctionCall):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    given = [value[key] for key in ("parameters", "arguments") if key in value]
    if not given and set(value) - {"name", "type", "id"}:
        return None  # some object with a name
    parameters = given[0] if given else None
    if isinstance(parameters, str):
        try:
            parameters = json.loads(parameters) if parameters.strip() else None
        except (ValueError, RecursionError):
            return None
    if parameters is None:
        parameters = {}
    return FunctionCall(value["name"], dict(parameters)) if isinstance(parameters, dict) else None
