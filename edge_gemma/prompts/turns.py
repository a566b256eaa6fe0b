"""Messages → turns a chat template understands: roles checked, system text folded in, user text
between marks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edge_gemma.errors import UsageError
from edge_gemma.messages import Audio, Image, Message, Part
from edge_gemma.prompts.calls import FunctionCall, tools_text
from edge_gemma.spans import Rows

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
}


class _Marks:
    """Messages with every text between marks and every medium replaced by one, so that the
    rendering can be taken apart again.
    """

    def __init__(self, turns: list[Message], template: str):
        self._turns = turns
        self.texts = [part for turn in turns for part in turn.content if isinstance(part, str)]
        n = 0
        while any(f"\ue000{n}" in text for text in (*self.texts, template)):
            n += 1
        self.key = f"\ue000{n}"
        self.order: list[
            str
        ] = []  # the marks as they must appear: t3 opens text 3, c3 closes it, m0 is medium 0
        self.turns_after: list[
            int
        ] = []  # of each text; counted from the end, since folding moves the front
        self.media: list[Image | Audio | Rows] = []

    def messages(self, flat: bool) -> list[dict]:
        self.order, self.turns_after, self.media, result = [], [], [], []
        for number, turn in enumerate(self._turns):
            items = [
                {"type": "text", "text": self._mark(part, len(self._turns) - 1 - number)}
                for part in turn.content
            ]
            plain = flat or (len(items) == 1 and isinstance(turn.content[0], str))
            result.append(
                {
                    "role": turn.role,
                    "content": "".join(item["text"] for item in items) if plain else items,
                }
            )
        return result

    def _mark(self, part: Part, turns_after: int) -> str:
        if not isinstance(part, str):
            self.order.append(f"m{len(self.media)}")
            self.media.append(part)
            return f"{self.key}{self.order[-1]}\ue001"
        n = len(self.turns_after)
        self.turns_after.append(turns_after)
        self.order += [f"t{n}", f"c{n}"]
        start, end = len(part) - len(part.lstrip()), len(part.rstrip())
        if isinstance(part, _Folded):
            start, end = 0, len(part)
        if start >= end:
            start = end = len(part)
        # white space stays outside the marks, where the template may trim it
        return (
            f"{part[:start]}{self.key}t{n}\ue001{part[start:end]}{self.key}c{n}\ue001{part[end:]}"
        )


class _Folded(str):
    """System text inside a user turn: its blank line is part of it and not to be trimmed."""


def _turns(messages: Iterable[Message | Mapping], tools: Sequence[Mapping]) -> list[Message]:
    """Checked messages with tuple contents: tool results become user turns, tools join the system
    text, roles alternate.
    """
    turns: list[Message] = []
    results = False  # whether the last turn so far is made of tool results
    for message in messages:
        role, content = _read(message)
        if role == "system" and turns:
            raise UsageError(
                "a system message comes first or not at all; found one later in the conversation"
            )
        if role == "tool":
            content = (
                "```tool_output\n"
                + "".join(part if isinstance(part, str) else "" for part in content)
                + "\n```",
            )
            role, is_result = "user", True
        else:
            is_result = False
        if turns and turns[-1].role == role == "user" and (is_result or results):
            turns[-1] = Message("user", _joined(turns[-1].content, content))
        else:
            expected = "assistant" if turns and turns[-1].role == "user" else "user"
            if role != "system" and role != expected:
                raise UsageError(
                    "the roles must alternate between user and assistant; message "
                    f"{len(turns) + 1} is from {role!r}, expected {expected!r}"
                )
            turns.append(Message(role, content))
        if role == "user" and not any(
            not isinstance(part, str) or part.strip() for part in content
        ):
            raise UsageError("a user message is empty: give it text, an image or a clip")
        results = is_result
    if tools:
        text = tools_text(tools)
        if turns and turns[0].role == "system":
            turns[0] = Message("system", (*turns[0].content, "\n\n" + text))
        else:
            turns.insert(0, Message("system", (text,)))
    if turns and turns[0].role == "system":
        if not all(isinstance(part, str) for part in turns[0].content):
            raise UsageError("a system message holds media; put them into a user message")
        text = "".join(turns[0].content)
        turns[0:1] = [Message("system", (text,))] if text.strip() else []
    if not turns or turns[-1].role == "system":
        raise UsageError("the prompt is empty: give at least one user message")
    return turns


def _joined(before: tuple[Part, ...], after: tuple[Part, ...]) -> tuple[Part, ...]:
    """Two contents as one turn, on lines of their own."""
    if before and after and isinstance(before[-1], str) and isinstance(after[0], str):
        return (*before[:-1], before[-1] + "\n" + after[0], *after[1:])
    return (*before, *after)


def _read(message: Message | Mapping) -> tuple[str, tuple[Part, ...]]:
    if isinstance(message, Mapping):
        role, content, calls = (
            message.get("role"),
            message.get("content"),
            message.get("tool_calls"),
        )
        if calls and not content:
            content = "\n".join(
                call.to_json()
                if isinstance(call, FunctionCall)
                else json.dumps(call, ensure_ascii=False)
                for call in calls
            )
    elif isinstance(message, Message):
        role, content = message.role, message.content
    else:
        raise UsageError(
            "a message is a Message or a dict with role and content; found "
            f"{type(message).__name__}"
        )
    if not isinstance(role, str) or role not in _ROLES:
        raise UsageError(f"unknown role {role!r}; known are {', '.join(_ROLES)}")
    if isinstance(content, str | Image | Audio | Rows):
        content = (content,)
    if not isinstance(content, Sequence):
        raise UsageError(
            f"a message's content is text or a list of parts; found {type(content).__name__}"
        )
    return _ROLES[role], tuple(_checked(part) for part in content)


def _checked(part: Any) -> Part:
    if isinstance(part, Mapping) and part.get("type") == "text":
        part = part.get("text")
    if not isinstance(part, str | Image | Audio | Rows):
        raise UsageError(
            f"a part of a message is text, Image, Audio or Rows; found {type(part).__name__}"
        )
    if isinstance(part, str):
        try:
            part.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text holds half of a surrogate pair at position {error.start}, which "
                "is not valid Unicode"
            ) from None
        part = part.replace("\0", "\ufffd")
    return part


def _folded(turns: list[Message]) -> list[Message]:
    """The system text at the head of the first user turn, one blank line between: how Gemma was
    tuned.
    """
    if turns[0].role != "system":
        return turns
    system, user, *rest = turns
    first, *others = user.content
    if isinstance(first, str):
        first = first.lstrip()
    return [Message("user", (_Folded("".join(system.content) + "\n\n"), first, *others)), *rest]
