"""Tools that the model may call: what each is called and takes, and running one safely.

In: functions with type hints and docstrings, or a file of them. Out: descriptions for the prompt,
and for each call a short text. A tool that raises, hangs or returns too much is told in that text;
nothing it does ends the conversation. This module knows no model.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from edge_gemma.assistant.http_tools import read_http_tools
from edge_gemma.assistant.signatures import functions_of, tool_of
from edge_gemma.assistant.tool import MAX_CHARS, Tool, ToolError, ToolResult
from edge_gemma.errors import EdgeGemmaError, UsageError, first_line
from edge_gemma.messages import FunctionCall
from edge_gemma.prompts.calls import check_tools

__all__ = ["Tool", "ToolError", "ToolResult", "Toolbox"]

_MAX_REASON_CHARS = 200
_LOOK_S = 0.05  # how often a call that may be stopped looks whether it was


class Toolbox:
    """Tools by name: functions (see :func:`~edge_gemma.assistant.signatures.tool_of`) or
    :class:`Tool`. Raises UsageError (no hints, no docstring, a name twice).

    >>> def add(a: int, b: int = 1) -> int:
    ...     "Add two numbers."
    ...     return a + b
    >>> toolbox = Toolbox([add])
    >>> toolbox.specs[0]["parameters"]["required"]
    ['a']
    >>> toolbox.call(FunctionCall("add", {"a": 2}))
    ToolResult(name='add', text='3', ok=True, note='')
    >>> toolbox.call(FunctionCall("add", {"a": "two"})).text
    'Error: add was not called: Expected `int`, got `str` - at `$.a`'
    """

    def __init__(self, tools: Iterable[Tool | Callable[..., Any]] = ()):
        self.tools = tuple(tool if isinstance(tool, Tool) else tool_of(tool) for tool in tools)
        self.specs: list[dict[str, Any]] = check_tools([tool.spec for tool in self.tools])
        self._by_name = {tool.name: tool for tool in self.tools}
        self._running: dict[str, threading.Thread] = {}

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Toolbox:
        """The tools of a local file: the public functions of ``FILE.py``, which is run as the
        program of yours that it is; or the HTTP calls of ``FILE.json``
        (:mod:`edge_gemma.assistant.http_tools`). Raises UsageError.
        """
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"{path} is no file; tools come from a local FILE.py or FILE.json")
        if path.suffix == ".py":
            return cls(functions_of(path))
        if path.suffix == ".json":
            return cls(read_http_tools(path))
        raise UsageError(f"{path} is no tool file: expected FILE.py or FILE.json")

    def __add__(self, other: Toolbox) -> Toolbox:
        return Toolbox([*self.tools, *other.tools])

    def __len__(self) -> int:
        return len(self.tools)

    def question(self, call: FunctionCall) -> bool | str:
        """Whether the user is to be asked before this call; a text is the question."""
        tool = self._by_name.get(call.name)
        return tool.dangerous if tool is not None else False

    def call(self, call: FunctionCall, stopped: threading.Event | None = None) -> ToolResult:
        """Run one call in a thread of its own, and wait for it no longer than its time-out, or
        until ``stopped``. Python cannot end a thread: one that hangs stays behind, and its tool is
        refused until it has ended. Raises nothing.
        """
        tool = self._by_name.get(call.name)
        if tool is None:
            known = ", ".join(self._by_name) or "none"
            return _failed(call.name, f"there is no tool {call.name[:64]!r}; there are: {known}")
        before = self._running.get(call.name)
        if before is not None and before.is_alive():
            return _failed(call.name, f"{call.name} still hangs in the call before")
        found: list[ToolResult] = []
        thread = threading.Thread(
            target=lambda: found.append(_run(tool, call)), name="edge-gemma-tool", daemon=True
        )
        self._running[call.name] = thread
        thread.start()
        if _ended(thread, tool.timeout_s, stopped):
            self._running.pop(call.name, None)
            return found[0] if found else _failed(call.name, f"{call.name} gave no result")
        if stopped is not None and stopped.is_set():
            return _failed(call.name, f"the user interrupted; {call.name} may still be going on")
        return _failed(call.name, f"{call.name} did not answer within {tool.timeout_s:g} seconds")


def _ended(thread: threading.Thread, timeout_s: float, stopped: threading.Event | None) -> bool:
    """Wait for the thread, until the time is over or ``stopped``. Whether it has ended."""
    if stopped is None:
        thread.join(timeout_s)
        return not thread.is_alive()
    until = time.monotonic() + timeout_s
    while thread.is_alive() and not stopped.is_set() and time.monotonic() < until:
        thread.join(_LOOK_S)
    return not thread.is_alive()


def _run(tool: Tool, call: FunctionCall) -> ToolResult:
    """In the tool's thread: call it, and write what it gave as text."""
    try:
        return _told(tool.name, tool.run(call.parameters))
    except (ToolError, EdgeGemmaError) as error:
        return _failed(tool.name, first_line(error))
    except BaseException as error:  # somebody else's code: even sys.exit() ends no conversation
        return _failed(
            tool.name, f"{tool.name} failed with {type(error).__name__}: {first_line(error)}"
        )


def _told(name: str, value: Any) -> ToolResult:
    if value is None:
        return ToolResult(name, "done")
    if isinstance(value, str):
        text: str = value
    else:
        try:
            text = msgspec.json.encode(value).decode()
        except (TypeError, ValueError, RecursionError):
            return _failed(name, f"{name} returned a {type(value).__name__}, which is not JSON")
    n = len(text)
    text = text[:MAX_CHARS].encode("utf-8", "replace").decode()
    if n <= MAX_CHARS:
        return ToolResult(name, text)
    note = f"{name} returned {n} characters; the first {MAX_CHARS} are used"
    return ToolResult(name, f"{text}… ({note})", note=note)


def _failed(name: str, reason: str) -> ToolResult:
    reason = reason[:_MAX_REASON_CHARS].encode("utf-8", "replace").decode()
    return ToolResult(name, f"Error: {reason}", ok=False, note=reason)
