"""Text → token ids, with the difference between text and control kept.

In: what a template wrote and what a user wrote, in order. Out: ids, with media in their places. A
control token counts only where the template wrote it; in a user's text it becomes letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from edge_gemma.errors import UsageError
from edge_gemma.messages import Audio, FunctionCall, Image, Part
from edge_gemma.spans import Rows

Piece = int | Image | Audio | Rows  # a rendered prompt: token ids, and media in their places

TOKEN_LIKE = re.compile(r"<[^<>\s]{1,64}>")


class TextIds:
    """A bundle's tokenizer, as a prompt uses it. ``control_ids`` are the ids of control tokens;
    ``spelled`` those whose spelling is known, whatever the tokenizer makes of it.
    """

    def __init__(
        self,
        tokenize: Callable[[str, bool], list[int]],
        control_ids: Collection[int],
        spelled: Mapping[str, int] | None = None,
    ):
        self._tokenize, self._control_ids = tokenize, frozenset(control_ids)
        self._controls: dict[str, int | None] = {**(spelled or {})}

    def control(self, text: str) -> int | None:
        """The id of a control token written out, or None for what only looks like one."""
        if text not in self._controls:
            ids = self._tokenize(text, True)
            self._controls[text] = ids[0] if len(ids) == 1 else None
        return self._controls[text]

    def plain(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token, whatever it looks like.

        Some of Gemma's control tokens are ordinary entries for the tokenizer
        (``<start_of_image>``): those are cut behind the ``<``, so that they become letters.
        """
        ids = self._tokenize(text, False)
        if self._is_text(ids):
            return ids
        pieces = TOKEN_LIKE.sub(self._cut, text).split("\0")
        ids = [id for piece in pieces for id in self._tokenize(piece, False)]
        if self._is_text(ids):
            return ids
        return [id for letter in text for id in self._tokenize(letter, False)]

    def _cut(self, match: re.Match[str]) -> str:
        text = match[0]
        return text if self._is_text(self._tokenize(text, False)) else f"{text[0]}\0{text[1:]}"

    def _is_text(self, ids: Sequence[int]) -> bool:
        return self._control_ids.isdisjoint(ids)


class PieceWriter:
    """Collects ids and media in order. Neighbouring text is tokenized in one piece, as it would be
    in the full rendering.
    """

    def __init__(self, text_ids: TextIds):
        self._text_ids, self._text = text_ids, ""
        self._pieces: list[Piece] = []

    def user(self, text: str) -> None:
        """What somebody wrote: text, whatever it looks like."""
        self._text += text

    def template(self, text: str) -> None:
        """What the template wrote: its control tokens count."""
        position = 0
        for match in TOKEN_LIKE.finditer(text):
            id = self._text_ids.control(match[0])
            if id is not None:
                self._text += text[position : match.start()]
                self.control([id])
                position = match.end()
        self._text += text[position:]

    def control(self, ids: Sequence[int]) -> None:
        if self._text:
            self._pieces += self._text_ids.plain(self._text)
            self._text = ""
        self._pieces += ids

    def part(self, part: Part) -> None:
        """A part of a message; a picture or clip gets a blank line before and behind it."""
        if isinstance(part, FunctionCall):
            raise UsageError("a function call stands in an assistant's message, not in raw text")
        if isinstance(part, str):
            self.user(part)
        elif isinstance(part, Rows):
            self.control([])
            self._pieces.append(part)
        else:
            self._text += "\n\n"
            self.control([])
            self._pieces.append(part)
            self._text = "\n\n"

    def done(self) -> list[Piece]:
        self.control([])
        return self._pieces
