"""FunctionGemma's own way of writing functions, calls and results, with control tokens.

    <start_function_declaration>declaration:NAME{description:…,parameters:{…}}<end_function_…>
    <start_function_call>call:NAME{city:<escape>Rome<escape>,days:3}<end_function_call>
    <start_function_response>response:NAME{…}<end_function_response>

Texts stand between two ``<escape>``, keys are sorted, types are in upper case
(ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices). In: tools and calls in our
own form. Out: parts of a message. An answer is read from its ids, so that a text which merely
spells a token stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from edge_gemma.bundles.token_roles import FUNCTION_TOKENS
from edge_gemma.messages import FunctionCall
from edge_gemma.prompts.written import ControlText, ExactText

# what the model was trained to read before the declarations
INTRODUCTION = "You can do function calling with the following functions:"
# FunctionGemma's turns, for a bundle without a template
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + {'assistant': 'model', 'system': 'developer'}"
    ".get(message.role, message.role) + '\\n' }}"
    "{% if message.content is string %}{{ message.content | trim }}"
    "{% else %}{% for item in message.content %}{{ item.text | trim }}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_MAX_DEPTH = 32
# each token as a character that no text holds (Unicode's noncharacters)
_STANDS_FOR = {name: chr(0xFDD0 + i) for i, name in enumerate(FUNCTION_TOKENS)}
_ESCAPE = _STANDS_FOR["escape"]
_CALL = re.compile(rf"{_STANDS_FOR['start_function_call']}\s*call:([^{{]{{1,64}})(?={{)", re.DOTALL)
_BARE = re.compile(r"[^,}\]]*")
_KEY = re.compile(rf"\s*{_ESCAPE}?([^:{_ESCAPE}]*){_ESCAPE}?\s*:")
Written = Iterator[str]  # parts of a message: ControlText and ExactText


def has_tokens(special_tokens: Mapping[str, int]) -> bool:
    return all(name in special_tokens for name in FUNCTION_TOKENS)


# ---- writing


def declarations(tools: Sequence[Mapping[str, Any]]) -> Written:
    """Checked tools as the end of a system text."""
    for tool in tools:
        yield ControlText("<start_function_declaration>declaration:")
        yield ExactText(tool["name"])
        yield ControlText("{description:")
        yield from _value(tool["description"])
        yield ControlText(",parameters:")
        yield from _schema(tool["parameters"], is_property=False)
        yield ControlText("}<end_function_declaration>")


def calls(given: Iterable[FunctionCall]) -> Written:
    for call in given:
        yield ControlText("<start_function_call>call:")
        yield ExactText(call.name)
        yield from _value(call.parameters)
        yield ControlText("<end_function_call>")


def result(name: str, text: str) -> Written:
    """What a function returned. A JSON object is written key by key, anything else as ``value``."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    yield ControlText("<start_function_response>response:")
    yield ExactText(name)
    yield from _value(value if isinstance(value, dict) else {"value": value})
    yield ControlText("<end_function_response>")
    yield ExactText("")  # where the answer goes on


def _schema(schema: Mapping[str, Any], *, is_property: bool = True) -> Written:
    described = {"description": "", **schema} if is_property else schema
    first = True
    yield ControlText("{")
    for key in sorted(described):
        value = described[key]
        if key == "properties" and not value:
            continue
        yield ControlText(f"{'' if first else ','}{key}:")
        first = False
        if key == "properties":
            yield from _map(value, _schema)
        elif key == "items" and isinstance(value, Mapping):
            yield from _schema(value, is_property=False)
        elif key == "type":
            kinds = value if isinstance(value, list) else [value]
            named = [str(kind) for kind in kinds if kind != "null"]
            yield from _value(named[0].upper() if named else "NULL")
        else:
            yield from _value(value)
    yield ControlText("}")


def _value(value: Any) -> Written:
    if isinstance(value, str):
        yield ControlText("<escape>")
        yield ExactText(value)
        yield ControlText("<escape>")
    elif isinstance(value, Mapping):
        yield from _map(value, _value)
    elif isinstance(value, list | tuple):
        yield ControlText("[")
        for i, item in enumerate(value):
            yield ControlText("," if i else "")
            yield from _value(item)
        yield ControlText("]")
    else:
        yield ControlText(json.dumps(value))


def _map(values: Mapping[str, Any], write: Callable[[Any], Written]) -> Written:
    yield ControlText("{")
    for i, key in enumerate(sorted(values)):
        yield ControlText("," if i else "")
        yield ExactText(key)
        yield ControlText(":")
        yield from write(values[key])
    yield ControlText("}")


# ---- reading


def read_answer(
    ids: Sequence[int], piece: Callable[[int], bytes], special_tokens: Mapping[str, int]
) -> tuple[str, list[FunctionCall]]:
    """The ids of an answer → the text before its first call, and its calls in order. A call that
    was cut is none.
    """
    marks = {special_tokens[name]: mark.encode() for name, mark in _STANDS_FOR.items()}
    data = b"".join(marks.get(token) or piece(token) for token in ids)
    text = data.decode("utf-8", "replace")
    found: list[FunctionCall] = []
    position = 0
    while match := _CALL.search(text, position):
        position = match.end()
        reader = _Reader(text, position)
        try:
            parameters = reader.value(0)
        except ValueError:
            continue
        position = reader.at
        if isinstance(parameters, dict):
            found.append(FunctionCall(match[1].strip(), parameters))
    return text.partition(_STANDS_FOR["start_function_call"])[0], found


class _Reader:
    """Reads one value. Raises ValueError where the text is none or ends too soon."""

    def __init__(self, text: str, at: int):
        self._text, self.at = text, at

    def value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        self._skip_space()
        first = self._text[self.at : self.at + 1]
        if first == _ESCAPE:
            return self._escaped()
        if first == "{":
            return dict(self._items("}", lambda: (self._key(), self.value(depth + 1))))
        if first == "[":
            return list(self._items("]", lambda: self.value(depth + 1)))
        return self._bare()

    def _items(self, end: str, read: Callable[[], Any]) -> Iterator[Any]:
        self.at += 1
        while not self._takes(end):
            yield read()
            if not self._takes(",") and not self._text.startswith(end, self.at):
                raise ValueError(f"expected , or {end}")

    def _takes(self, letter: str) -> bool:
        self._skip_space()
        found = self._text.startswith(letter, self.at)
        self.at += found
        return found

    def _skip_space(self) -> None:
        while self._text[self.at : self.at + 1].isspace():
            self.at += 1

    def _key(self) -> str:
        match = _KEY.match(self._text, self.at)
        if match is None:
            raise ValueError("expected a key")
        self.at = match.end()
        return match[1].strip()

    def _escaped(self) -> str:
        end = self._text.index(_ESCAPE, self.at + 1)
        found = self._text[self.at + 1 : end]
        self.at = end + 1
        return found

    def _bare(self) -> Any:
        """A number, true, false, null; any other word is a text that was not escaped."""
        match = _BARE.match(self._text, self.at)
        assert match is not None  # it matches nothing as well
        word = match[0].strip()
        if not word:
            raise ValueError("expected a value")
        self.at = match.end()
        try:
            return json.loads(word, parse_constant=str)
        except ValueError:
            return word
