"""Tools declared in a JSON file: each call is one HTTP request to a program of the user's.

    [{"name": "light", "description": "Switch a light.",
      "parameters": {"type": "object", "properties": {"entity_id": {"type": "string"}},
                     "required": ["entity_id"]},
      "url": "http://homeassistant.local:8123/api/services/light/turn_on",
      "headers": {"Authorization": "Bearer ${HA_TOKEN}"}}]

``parameters`` go as the JSON body of a POST, or with ``"method": "GET"`` as the query; those named
in the address (``…/states/{entity_id}``) go there instead. ``${NAME}`` in a header or address is
read from the environment. ``dangerous`` (true, or the question to ask) and ``timeout_s`` are
optional. Redirects are not followed: a header may hold a password.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_gemma.assistant.tool import MAX_CHARS, TIMEOUT_S, Tool, ToolError
from edge_gemma.errors import UsageError, first_line
from edge_gemma.files import read_bounded

_MAX_FILE_BYTES = 1 << 20
_MAX_BYTES = 1 << 20  # of an answer; what the model is told of it is shorter still
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


class HttpTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of the file."""

    name: str
    description: str
    url: str
    parameters: dict[str, Any] = {}
    method: Literal["POST", "GET", "PUT", "DELETE"] = "POST"
    headers: dict[str, str] = {}
    dangerous: bool | str = False
    timeout_s: float = TIMEOUT_S


def read_http_tools(path: Path) -> list[Tool]:
    """Raises UsageError: no JSON, a field that is missing, wrong or not known."""
    data = read_bounded(path, _MAX_FILE_BYTES, "an array of tools")
    try:
        entries = msgspec.json.decode(data, type=list[HttpTool])
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(
            f"{path} holds no tools: {first_line(error)}. Expected an array of objects with name, "
            "description, parameters and url"
        ) from None
    if not entries:
        raise UsageError(f"{path} holds no tools: the array is empty")
    return [_tool(entry, path) for entry in entries]


def _tool(entry: HttpTool, path: Path) -> Tool:
    where = f"{path}, tool {entry.name!r}"
    url = _filled(entry.url, where)
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{where}: its url is {entry.url!r}; expected http:// or https://")
    try:
        host = urllib.parse.urlsplit(url).netloc
    except ValueError as error:
        raise UsageError(f"{where}: its url {entry.url!r} is no address ({error})") from None
    if "{" in host:
        raise UsageError(f"{where}: its url lets the model choose the host; name it")
    if not 0 < entry.timeout_s <= 600:
        raise UsageError(f"{where}: its timeout_s is {entry.timeout_s}; expected up to 600")
    headers = {name: _filled(value, where) for name, value in entry.headers.items()}
    if any("\n" in text or "\r" in text for pair in headers.items() for text in pair):
        raise UsageError(f"{where}: a header holds a line break")

    required = entry.parameters.get("required", [])

    def run(parameters: Mapping[str, Any]) -> Any:
        missing = [str(key) for key in required if key not in parameters]
        if missing:
            raise ToolError(f"{entry.name} was not called: missing is {', '.join(missing)}")
        request = _request(url, entry.method, headers, parameters)
        return _answer(request, entry.timeout_s, entry.name)

    return Tool(
        entry.name,
        entry.description,
        entry.parameters or {"type": "object", "properties": {}},
        run,
        dangerous=entry.dangerous,
        timeout_s=entry.timeout_s + 1,  # a body that drips is stopped by this one
    )


def _filled(text: str, where: str) -> str:
    """With ``${NAME}`` out of the environment."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UsageError(f"{where} needs the environment variable {match[1]}, which is not set")
        return os.environ[match[1]].strip()

    return _VARIABLE.sub(value, text)


def _request(
    url: str, method: str, headers: Mapping[str, str], parameters: Mapping[str, Any]
) -> urllib.request.Request:
    rest = dict(parameters)

    def place(match: re.Match[str]) -> str:
        value = rest.pop(match[1], None)
        if not isinstance(value, str | int | float):
            raise ToolError(f"the parameter {match[1]!r} is missing")
        if value in (".", ".."):
            raise ToolError(f"the parameter {match[1]!r} is {value!r}")
        return urllib.parse.quote(str(value), safe="")

    url = _PLACE.sub(place, url)
    body = None
    if method in ("POST", "PUT"):
        body = json.dumps(rest).encode()
        headers = {"Content-Type": "application/json", **headers}
    elif rest:
        url += ("&" if "?" in url else "?") + urllib.parse.urlencode(rest, doseq=True)
    return urllib.request.Request(url, body, dict(headers), method=method)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _answer(request: urllib.request.Request, timeout_s: float, name: str) -> str:
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            data: bytes = answer.read(_MAX_BYTES)
            if len(data) < _MAX_BYTES and answer.length:
                raise ToolError(f"{name} could not be reached: the answer was cut short")
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(MAX_CHARS).decode("utf-8", "replace")[:120].strip()
        raise ToolError(f"{name} was refused: {error.code} {error.reason} {said}".strip()) from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or first_line(error)
        raise ToolError(f"{name} could not be reached: {reason}") from None
    return data.decode("utf-8", "replace") or "done"
