"""An answer as it is generated → text that is an answer, and function calls at its end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from edge_gemma.conversation.stream import Chunk
from edge_gemma.messages import FunctionCall
from edge_gemma.prompts.calls import parse_calls
from edge_gemma.prompts.prompt import Prompt

# where a call in text may begin: a line that opens an object or an array, or a fence
_BEGINS = re.compile(r"^[ \t]*[{\[]|```", re.MULTILINE)
_MAY_BEGIN = re.compile(r"(?:^[ \t]*|`{1,2})\Z", re.MULTILINE)


class CallStream:
    """Holds back what may be a call until the answer's end. Without tools nothing is held.

    Calls are read as JSON in the text, or from control tokens where the model writes them so.
    ``piece`` gives the bytes of an id.

    >>> stream = CallStream([{"name": "now"}], model.prompt, model.decoder.piece)
    >>> texts = ("Let me see.\\n{", '"name": "now", "parameters": {}}')
    >>> [stream.push(Chunk(text)) for text in texts]
    ['Let me see.\\n', '']
    >>> stream.finish()
    ('', [FunctionCall(name='now', parameters={})])
    """

    def __init__(self, tools: Sequence[Mapping], prompt: Prompt, piece: Callable[[int], bytes]):
        self._tools, self._prompt, self._piece = tools, prompt, piece
        self._call_token = prompt.manifest.special_tokens.get("start_function_call")
        self._ids: list[int] = []
        self._n_sent, self._held = 0, ""
        self._at_line_start, self._holding, self._has_call_token = True, False, False

    def push(self, chunk: Chunk) -> str:
        """The text that certainly belongs to no call."""
        if not self._tools:
            return chunk.text
        self._ids += chunk.token_ids
        self._held += chunk.text
        if self._call_token is not None and self._call_token in chunk.token_ids:
            self._holding = self._has_call_token = True
        if self._holding or not chunk.text:
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
            self._n_sent += len(sure)
        return sure

    def finish(self) -> tuple[str, list[FunctionCall]]:
        """What was held back: text, the calls in it, or both."""
        if not self._tools:
            return "", []
        if self._has_call_token:
            content, calls = self._prompt.answer(self._ids, "", self._piece)
            if calls:
                return str(content[0])[self._n_sent :], calls
        calls = parse_calls(self._held, self._tools)
        return ("", calls) if calls else (self._held, [])
