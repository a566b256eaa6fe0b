"""Text as it is generated → text that is an answer, and function calls at its end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from edge_gemma.prompts.calls import FunctionCall, parse_calls

# where a call may begin: a line that opens an object, an array or a fence
_BEGINS = re.compile(r"^[ \t]*(?:[{\[]|```)", re.MULTILINE)
_MAY_BEGIN = re.compile(r"^[ \t]*`{0,2}\Z", re.MULTILINE)


class CallStream:
    """Holds back what may be a call until the answer's end. Without tools nothing is held.

    >>> stream = CallStream([{"name": "now"}])
    >>> stream.push("Let me see.\\n{"), stream.push('"name": "now", "parameters": {}}')
    ('Let me see.\\n', '')
    >>> stream.finish()
    ('', [FunctionCall(name='now', parameters={})])
    """

    def __init__(self, tools: Sequence[Mapping]):
        self._tools = tools
        self._held = ""
        self._at_line_start, self._holding = True, False

    def push(self, text: str) -> str:
        """The text that certainly is no call."""
        if not self._tools or not text:
            return text
        self._held += text
        if self._holding:
            return ""
        # ^ matches at the beginning of what is held; that need not be a line's
        guard = "" if self._at_line_start else "x"
        line = guard + self._held
        found = _BEGINS.search(line)
        self._holding = found is not None
        found = found or _MAY_BEGIN.search(line)
        end = len(line) if found is None else found.start()
        sure = line[len(guard) : end]
        self._held = line[max(end, len(guard)) :]
        if sure:
            self._at_line_start = sure.endswith("\n")
        return sure

    def finish(self) -> tuple[str, list[FunctionCall]]:
        """What was held back: text, or the calls in it."""
        calls = parse_calls(self._held, self._tools) if self._tools else []
        return ("", calls) if calls else (self._held, [])
