"""Messages → turns a chat template understands: roles checked, system text folded in, user text
between marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class RenderedPart:
    """A stretch of a rendering, and the mark before it.

    ``is_user_text``: somebody wrote it, rather than the template. ``medium`` stands before it.
    ``closes`` is set where a turn's text ends just before: how many turns follow that one.
    """

    text: str
    is_user_text: bool = False
    medium: Image | Audio | Rows | None = None
    closes: int | None = None


class Marks:
    """Messages with every text between marks and every medium replaced by one, so that the
    rendering can be taken apart again.

    A mark is ``KEYk N`` between two characters of Unicode's private use area: t3 opens text 3, c3
    closes it, m0 is medium 0. The key is chosen so that no text holds it.
    """

    def __init__(self, turns: list[Message], template: str):
        self._turns = turns
        texts = [part for turn in turns for part in turn.content if isinstance(part, str)]
        n = 0
        while any(f"\ue000{n}" in text for text in (*texts, template)):
            n += 1
        self._key = f"\ue000{n}"
        self._order: list[str] = []  # the marks as they must appear
        self._turns_after: list[
            int
        ] = []  # of each text; from the end, since folding moves the front
        self._media: list[Image | Audio | Rows] = []

    def messages(self, flat: bool) -> list[dict[str, Any]]:
        """What a template is given. ``flat``: each content as one string, not a list of parts."""
        self._order, self._turns_after, self._media = [], [], []
        result = []
        for number, turn in enumerate(self._turns):
            texts = [self._mark(part, len(self._turns) - 1 - number) for part in turn.content]
            one_text = len(texts) == 1 and isinstance(turn.content[0], str)
            content: str | list[dict[str, str]] = "".join(texts)
            if not flat and not one_text:
                content = [{"type": "text", "text": text} for text in texts]
            result.append({"role": turn.role, "content": content})
        return result

    def _mark(self, part: Part, turns_after: int) -> str:
        if not isinstance(part, str):
            self._order.append(f"m{len(self._media)}")
            self._media.append(part)
            return f"{self._key}{self._order[-1]}\ue001"
        n = len(self._turns_after)
        self._turns_after.append(turns_after)
        self._order += [f"t{n}", f"c{n}"]
        start, end = len(part) - len(part.lstrip()), len(part.rstrip())
        if isinstance(part, _Folded):
            start, end = 0, len(part)
        if start >= end:
            start = end = len(part)
        opening, closing = f"{self._key}t{n}\ue001", f"{self._key}c{n}\ue001"
        # white space stays outside the marks, where the template may trim it
        return f"{part[:start]}{opening}{part[start:end]}{closing}{part[end:]}"

    def check(self, rendered: str) -> None:
        """Raises UsageError when the template did not keep every text and medium, once and in
        order.
        """
        if re.findall(rf"{self._key}([tcm][0-9]+)\ue001", rendered) != self._order:
            raise UsageError(
                "the bundle's chat template drops, repeats or reorders what the messages say; it "
                "cannot be used for this conversation"
            )

    def split(self, rendered: str) -> list[RenderedPart]:
        """The rendering in stretches, each with what the mark before it says."""
        found = re.split(rf"{self._key}([tcm])([0-9]+)\ue001", rendered)
        parts = [RenderedPart(found[0])]
        for kind, number, text in zip(found[1::3], found[2::3], found[3::3], strict=True):
            if kind == "t":
                parts.append(RenderedPart(text, is_user_text=True))
            elif kind == "c":
                parts.append(RenderedPart(text, closes=self._turns_after[int(number)]))
            else:
                parts.append(RenderedPart(text, medium=self._media[int(number)]))
        return parts


class _Folded(str):
    """System text inside a user turn: its blank line is part of it and not to be trimmed."""


def read_turns(messages: Iterable[Message | Mapping], tools: Sequence[Mapping]) -> list[Message]:
    """Checked messages with tuple contents: tool results become user turns, tools join the system
    text, roles alternate. Raises UsageError.
    """
    turns: list[Message] = []
    results = False  # whether the last turn so far is made of tool results
    for message in messages:
        role, content = _read(message)
        if role == "system" and turns:
            raise UsageError(
                "a system message comes first or not at all; found one later in the conversation"
            )
        is_result = role == "tool"
        if is_result:
            role, content = "user", (_tool_output(content),)
        if role == "user" and _is_empty(content):
            raise UsageError("a user message is empty: give it text, an image or a clip")
        if turns and turns[-1].role == role == "user" and (is_result or results):
            turns[-1] = Message("user", _joined(tuple(turns[-1].content), content))
        else:
            _check_order(turns, role)
            turns.append(Message(role, content))
        results = is_result
    turns = _with_system(turns, tools)
    if not turns or turns[-1].role == "system":
        raise UsageError("the prompt is empty: give at least one user message")
    return turns


def _tool_output(content: tuple[Part, ...]) -> str:
    text = "".join(part for part in content if isinstance(part, str))
    return f"```tool_output\n{text}\n```"


def _is_empty(content: tuple[Part, ...]) -> bool:
    return all(isinstance(part, str) and not part.strip() for part in content)


def _check_order(turns: list[Message], role: str) -> None:
    expected = "assistant" if turns and turns[-1].role == "user" else "user"
    if role not in ("system", expected):
        raise UsageError(
            f"the roles must alternate between user and assistant; message {len(turns) + 1} is "
            f"from {role!r}, expected {expected!r}"
        )


def _with_system(turns: list[Message], tools: Sequence[Mapping]) -> list[Message]:
    """The turns with one system text first, which the tools' description is part of; none if there
    is nothing in it.
    """
    system: list[Part] = []
    if turns and turns[0].role == "system":
        system, turns = list(turns[0].content), turns[1:]
    if tools:
        system += ["\n\n" if system else "", tools_text(tools)]
    texts = [part for part in system if isinstance(part, str)]
    if len(texts) < len(system):
        raise UsageError("a system message holds media; put them into a user message")
    text = "".join(texts)
    return [Message("system", (text,)), *turns] if text.strip() else turns


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
    return _ROLES[role], tuple(checked_part(part) for part in content)


def checked_part(part: Any) -> Part:
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


def folded(turns: list[Message]) -> list[Message]:
    """The system text at the head of the first user turn, one blank line between: how Gemma was
    tuned.
    """
    if turns[0].role != "system":
        return turns
    system, user, *rest = turns
    text = "".join(part for part in system.content if isinstance(part, str))
    parts = list(user.content)
    if isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    return [Message("user", (_Folded(text + "\n\n"), *parts)), *rest]
