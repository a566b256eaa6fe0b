"""Messages → turns a chat template understands: roles checked, system text folded in, user text
between marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edge_gemma.errors import UsageError
from edge_gemma.messages import Audio, FunctionCall, Image, Message, Part, TextItem
from edge_gemma.prompts.call_styles import CallStyle, Content, Result
from edge_gemma.prompts.calls import call_of
from edge_gemma.prompts.text_ids import TOKEN_LIKE
from edge_gemma.prompts.written import ControlText, ExactText
from edge_gemma.spans import Rows

ResultForm = Literal["text", "list", "mapping"]
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


@dataclass(frozen=True)
class Turn:
    """One turn as a template is given it. ``open``: the model goes on in it."""

    role: str
    content: Content
    open: bool = False


class Marks:
    """Messages with every text between marks and every medium replaced by one, so that the
    rendering can be taken apart again.

    A mark is ``KEYk N`` between two characters of Unicode's private use area: t3 opens text 3, c3
    closes it, m0 is medium 0. The key is chosen so that no text holds it. What a template is given
    outside of marks (functions, calls, results, language codes) holds KEY! behind the ``<`` of
    everything that looks like a control token, so that it is none.
    """

    def __init__(
        self,
        turns: Sequence[Turn],
        template: str,
        tools: Sequence[Mapping] = (),
        result_form: ResultForm = "text",
    ):
        self._turns, self._tools, self._result_form = turns, tools, result_form
        self._printed_as_python: list[str] = []  # what no template should write
        parts = [part for turn in turns for part in turn.content]
        texts = [repr(tools), *(str(part) for part in parts if not isinstance(part, Rows))]
        n = 0
        while any(f"\ue000{n}" in text for text in (*texts, template)):
            n += 1
        self._key = f"\ue000{n}"
        self._order: list[str] = []  # the marks as they must appear
        # of each text; from the end, since folding moves the front
        self._turns_after: list[int] = []
        self._media: list[Image | Audio | Rows] = []

    def tools(self) -> list[dict[str, Any]] | None:
        """Checked tools as transformers gives them to a template."""
        found = [{"type": "function", "function": self._guarded(tool)} for tool in self._tools]
        return found or None

    def messages(self, flat: bool) -> list[dict[str, Any]]:
        """What a template is given. ``flat``: each content as one string, not a list of parts."""
        self._order, self._turns_after, self._media = [], [], []
        turns = enumerate(self._turns)
        return [self._message(turn, len(self._turns) - 1 - i, flat) for i, turn in turns]

    def _message(self, turn: Turn, turns_after: int, flat: bool) -> dict[str, Any]:
        for part in turn.content:
            if isinstance(part, Result):
                return self._result(part)
        calls = [part for part in turn.content if isinstance(part, FunctionCall)]
        parts = [part for part in turn.content if not isinstance(part, FunctionCall | Result)]
        texts = [self._mark(part, turns_after) for part in parts]
        items = [
            {"type": "text", **self._fields(part), "text": text}
            for part, text in zip(parts, texts, strict=True)
        ]
        is_text = all(isinstance(part, str) for part in parts)
        is_ours = any(isinstance(part, ControlText) for part in parts)
        is_one_text = is_text and (len(parts) < 2 or is_ours)
        message: dict[str, Any] = {"role": turn.role, "content": "".join(texts)}
        if any(map(self._fields, parts)) or not (flat or is_one_text):
            message["content"] = items
        if calls:
            message["tool_calls"] = [self._call(call) for call in calls]
        return message

    def _fields(self, part: Part) -> dict[str, Any]:
        return self._guarded(part.fields) if isinstance(part, TextItem) else {}

    def _call(self, call: FunctionCall) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.parameters}
        return {"type": "function", "function": self._guarded(function)}

    def _result(self, result: Result) -> dict[str, Any]:
        """A tool message: transformers' text, or what FunctionGemma's template takes."""
        message = {"role": "tool", "name": self._guarded(result.name)}
        if self._result_form == "text":
            return {**message, "content": self._guarded(result.text)}
        try:
            value = json.loads(result.text)
        except (ValueError, RecursionError):
            value = result.text
        content: Any = self._guarded({"name": result.name, "response": value})
        if self._result_form == "list":
            content = [content]
        self._printed_as_python.append(str(content))
        return {**message, "content": content}

    def _guarded(self, value: Any) -> Any:
        if isinstance(value, str):
            return TOKEN_LIKE.sub(lambda match: f"<{self._key}!\ue001{match[0][1:]}", value)
        if isinstance(value, Mapping):
            return {self._guarded(key): self._guarded(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(item) for item in value]
        return value

    def _mark(self, part: Part, turns_after: int) -> str:
        if isinstance(part, ControlText):
            return part
        if not isinstance(part, str):
            assert not isinstance(part, FunctionCall)
            self._order.append(f"m{len(self._media)}")
            self._media.append(part)
            return f"{self._key}{self._order[-1]}\ue001"
        n = len(self._turns_after)
        self._turns_after.append(turns_after)
        self._order += [f"t{n}", f"c{n}"]
        start, end = len(part) - len(part.lstrip()), len(part.rstrip())
        if isinstance(part, ExactText):
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
        found = re.findall(rf"{self._key}([tcm][0-9]+)\ue001", rendered)
        if found != self._order or any(text in rendered for text in self._printed_as_python):
            raise UsageError(
                "the bundle's chat template drops, repeats or reorders what the messages say; it "
                "cannot be used for this conversation"
            )

    def split(self, rendered: str) -> list[RenderedPart]:
        """The rendering in stretches, each with what the mark before it says."""
        found = re.split(rf"{self._key}([tcm!])([0-9]*)\ue001", rendered)
        parts = [RenderedPart(found[0])]
        for kind, number, text in zip(found[1::3], found[2::3], found[3::3], strict=True):
            if kind == "t":
                parts.append(RenderedPart(text, is_user_text=True))
            elif kind == "c":
                parts.append(RenderedPart(text, closes=self._turns_after[int(number)]))
            elif kind == "m":
                parts.append(RenderedPart(text, medium=self._media[int(number)]))
            else:
                parts.append(RenderedPart(text))
        return parts


def read_turns(
    messages: Iterable[Message | Mapping], tools: Sequence[Mapping], style: CallStyle
) -> list[Turn]:
    """Checked messages as turns: calls, results and tools are written as ``style`` says, roles
    alternate. Raises UsageError.
    """
    reader = _TurnReader(style)
    for message in messages:
        reader.read(message)
    turns = _with_system(reader.turns, tools, style)
    if not turns or turns[-1].role == "system":
        raise UsageError("the prompt is empty: give at least one user message")
    return turns


class _TurnReader:
    def __init__(self, style: CallStyle):
        self.turns: list[Turn] = []
        self._style = style
        self._last_is_result = False
        self._unanswered: list[str] = []  # names of the calls that wait for their result

    def read(self, message: Message | Mapping) -> None:
        role, content, name = _read(message)
        is_result = role == "tool"
        if role == "system" and self.turns:
            raise UsageError(
                "a system message comes first or not at all; found one later in the conversation"
            )
        if is_result:
            role, written = self._style.results_in, self._result(content, name)
        else:
            written = self._with_calls(content)
        if role == "user" and _is_empty(written):
            raise UsageError("a user message is empty: give it text, an image or a clip")
        self._add(role, written, is_result)
        self._last_is_result = is_result

    def _add(self, role: str, content: Content, is_result: bool) -> None:
        last = self.turns[-1] if self.turns else None
        if last is not None and last.role == role != "tool" and (is_result or self._last_is_result):
            join = _joined if role == "user" else tuple.__add__
            self.turns[-1] = Turn(role, join(last.content, content), open=is_result)
            return
        _check_order(self.turns, role)
        self.turns.append(Turn(role, content))

    def _with_calls(self, content: Content) -> Content:
        calls = [part for part in content if isinstance(part, FunctionCall)]
        rest = tuple(part for part in content if not isinstance(part, FunctionCall))
        if not calls:
            return rest
        self._unanswered = [call.name for call in calls]
        has_text = not _is_empty(rest)
        return (*(rest if has_text else ()), *self._style.calls(calls, has_text))

    def _result(self, content: Content, name: str | None) -> Content:
        waiting = self._unanswered.pop(0) if self._unanswered else "function"
        text = "".join(part for part in content if isinstance(part, str))
        return self._style.result(Result(name or waiting, text))


def _is_empty(content: Content) -> bool:
    return all(isinstance(part, str) and not part.strip() for part in content)


def _check_order(turns: list[Turn], role: str) -> None:
    last = turns[-1].role if turns else None
    if role == "system" or "tool" in (role, last):
        return
    expected = "assistant" if last == "user" else "user"
    if role != expected:
        raise UsageError(
            f"the roles must alternate between user and assistant; message {len(turns) + 1} is "
            f"from {role!r}, expected {expected!r}"
        )


def _with_system(turns: list[Turn], tools: Sequence[Mapping], style: CallStyle) -> list[Turn]:
    """The turns with one system text first, which the tools' description is part of; none if there
    is nothing in it.
    """
    system: list[Part | Result] = []
    if turns and turns[0].role == "system":
        system, turns = list(turns[0].content), turns[1:]
    if tools:
        system += style.tools(tools, after_text=bool(system))
    texts = [part for part in system if isinstance(part, str)]
    if len(texts) < len(system):
        raise UsageError("a system message holds media; put them into a user message")
    if any(type(part) is not str for part in texts):
        return [Turn("system", tuple(texts)), *turns]
    text = "".join(texts)
    return [Turn("system", (text,)), *turns] if text.strip() else turns


def _joined(before: Content, after: Content) -> Content:
    """Two contents as one turn, on lines of their own."""
    if before and after and isinstance(before[-1], str) and isinstance(after[0], str):
        return (*before[:-1], before[-1] + "\n" + after[0], *after[1:])
    return (*before, *after)


def _read(message: Message | Mapping) -> tuple[str, Content, str | None]:
    """Role, content, and the name of the function that a result comes from."""
    name = None
    if isinstance(message, Mapping):
        role, content = message.get("role"), message.get("content")
        name = message.get("name")
        calls = _calls(message.get("tool_calls") or ())
        if calls:
            given = [content] if isinstance(content, str) else list(content or ())
            content = [*given, *calls]
    elif isinstance(message, Message):
        role, content = message.role, message.content
    else:
        raise UsageError(
            "a message is a Message or a dict with role and content; found "
            f"{type(message).__name__}"
        )
    if not isinstance(role, str) or role not in _ROLES:
        raise UsageError(f"unknown role {role!r}; known are {', '.join(_ROLES)}")
    if isinstance(content, str | Image | Audio | Rows | FunctionCall):
        content = (content,)
    if not isinstance(content, Sequence):
        raise UsageError(
            f"a message's content is text or a list of parts; found {type(content).__name__}"
        )
    parts = tuple(checked_part(part) for part in content)
    return _ROLES[role], parts, name if isinstance(name, str) else None


def _calls(given: Sequence[Any]) -> list[FunctionCall]:
    calls = [call_of(call) for call in given]
    for call, value in zip(calls, given, strict=True):
        if call is None:
            raise UsageError(f"a tool call is a name and parameters; found {str(value)[:200]}")
    return [call for call in calls if call is not None]


def checked_part(part: Any) -> Part:
    fields: dict[str, Any] = {}
    if isinstance(part, Mapping) and part.get("type") == "text":
        fields = {key: value for key, value in part.items() if key not in ("type", "text")}
        part = part.get("text")
    elif isinstance(part, TextItem):
        fields = dict(part.fields)
    if not isinstance(part, str | Image | Audio | Rows | FunctionCall):
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
        return TextItem(part, fields) if fields else part
    return part


def folded(turns: list[Turn]) -> list[Turn]:
    """The system text at the head of the first user turn, one blank line between: how Gemma was
    tuned.
    """
    if turns[0].role != "system" or len(turns) < 2:
        return turns
    system, user, *rest = turns
    if all(type(part) is str for part in system.content):
        text = "".join(part for part in system.content if isinstance(part, str))
        lead: Content = (ExactText(text + "\n\n"),)
    else:
        lead = (*system.content, ExactText("\n\n"))
    parts = list(user.content)
    if type(parts[0]) is str:
        parts[0] = parts[0].lstrip()
    return [Turn("user", (*lead, *parts)), *rest]
