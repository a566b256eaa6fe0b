"""An answer's text in pieces → what is read aloud, clause by clause, and which part of the answer
each one is.

Sentence ends are found by ``sentence-stream``. Markup, emoji and code are left out; units behind
numbers are written as words where a voice would spell them. Numbers, percent signs and currencies
stay: the voices read them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from edge_gemma.conversation.language_guess import LanguageGuess
from edge_gemma.errors import MissingExtra

_END_OF_SENTENCE = re.compile(r"(?<=[.!?…。！？])[\"')\]]*\s+|\n+")
_MAX_CHARACTERS = 400  # without an end of sentence: spoken anyway, up to the last comma or space
_SHORT = 48  # characters: so long is a first clause at most
# not behind a single short word; a comma is one before its space has come, if it is in no number
_PAUSE = re.compile(r"\S.{7,}?(?:[,;:–—](?=\s)|(?<!\d)[,;]$)")
_FENCE = "```"

_LINE_MARKS = re.compile(r"^\s*(?:#{1,6}\s+|>\s?|[-*+•]\s+|\|)+|^\s*[-=*_|:\s]{3,}$")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_ADDRESS = re.compile(r"https?://(?:www\.)?([^\s/]+)\S*")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_EMPHASIS = re.compile(r"\*\*|__|~~|`+|(?<!\w)[*_](?=\w)|(?<=[\w.!?,])[*_](?!\w)")
_CELL = re.compile(r"\s*\|\s*")
_KEPT_SIGNS = "°©®™"

# language → unit behind a number → its words for one and for several
_UNITS: dict[str, dict[str, tuple[str, str]]] = {
    "en": {
        "°C": ("degree Celsius", "degrees Celsius"),
        "°F": ("degree Fahrenheit", "degrees Fahrenheit"),
        "km/h": ("kilometre per hour", "kilometres per hour"),
        "mph": ("mile per hour", "miles per hour"),
        "km": ("kilometre", "kilometres"),
        "cm": ("centimetre", "centimetres"),
        "mm": ("millimetre", "millimetres"),
        "m": ("metre", "metres"),
        "kg": ("kilogram", "kilograms"),
        "g": ("gram", "grams"),
        "ml": ("millilitre", "millilitres"),
        "kWh": ("kilowatt hour", "kilowatt hours"),
        "GB": ("gigabyte", "gigabytes"),
        "min": ("minute", "minutes"),
    },
    "de": {
        "°C": ("Grad Celsius", "Grad Celsius"),
        "km/h": ("Kilometer pro Stunde", "Kilometer pro Stunde"),
        "km": ("Kilometer", "Kilometer"),
        "cm": ("Zentimeter", "Zentimeter"),
        "mm": ("Millimeter", "Millimeter"),
        "m": ("Meter", "Meter"),
        "kg": ("Kilogramm", "Kilogramm"),
        "g": ("Gramm", "Gramm"),
        "ml": ("Milliliter", "Milliliter"),
        "kWh": ("Kilowattstunde", "Kilowattstunden"),
        "GB": ("Gigabyte", "Gigabyte"),
        "min": ("Minute", "Minuten"),
    },
}


@dataclass(frozen=True)
class Clause:
    """``text`` as it is read aloud, perhaps nothing, in ``language``; the answer's characters up to
    ``end`` are said with it.
    """

    text: str
    end: int
    language: str = "en"


class Clauses:
    """Text in pieces → clauses, as soon as they are known to be whole. ``language`` (a code like
    ``en``) is for units; of several, each clause's is guessed.

    With ``hungry`` (nothing is left to be spoken) a pause within the sentence is enough, so that
    sound comes early. Raises MissingExtra.

    >>> cut = Clauses()
    >>> found = [*cut.push("It is warm today, I th"), *cut.push("ink. Go o"), *cut.finish()]
    >>> [clause.text for clause in found]
    ['It is warm today,', 'I think.', 'Go o']
    """

    def __init__(self, language: str | Sequence[str] = "en"):
        self._first_sentence = _sentence_finder()
        languages = (language,) if isinstance(language, str) else tuple(language)
        self._language = languages[0]
        self._guess = LanguageGuess(languages) if len(languages) > 1 else None
        self._text, self._begin = "", 0
        self._in_code = False
        self._any = False

    def push(self, text: str, hungry: bool | None = None) -> Iterator[Clause]:
        """``hungry`` None: before the first clause only."""
        self._text += text
        while (n := self._boundary(not self._any if hungry is None else hungry)) is not None:
            yield from self._take(n)

    def finish(self) -> Iterator[Clause]:
        """No more text comes: the rest."""
        yield from self.push("\n", hungry=False)

    def _boundary(self, hungry: bool) -> int | None:
        """How many of the characters that wait are a clause."""
        rest = self._text[self._begin :]
        line, newline, _ = rest.partition("\n")
        if newline and (self._in_code or line.lstrip().startswith(_FENCE)):
            return len(line) + 1
        if self._in_code or line.lstrip().startswith("`"):
            return None  # a fence is known by its whole line
        ends = [len(line) + 1] if newline else []
        if sentence := self._first_sentence(line):
            ends.append(_extent(line, sentence))
        if hungry and (pause := _PAUSE.search(line)):
            ends.append(pause.end())
        limit = _SHORT if hungry and not self._any else _MAX_CHARACTERS
        if len(line) > limit:
            ends.append(_last_gap(line, limit))
        return min(ends, default=None)

    def _take(self, n: int) -> Iterator[Clause]:
        taken = self._text[self._begin : self._begin + n]
        self._begin += n
        fence = taken.lstrip().startswith(_FENCE)
        if fence:
            self._in_code = not self._in_code
        if not fence and not self._in_code:
            if self._guess is not None:
                self._language = self._guess(taken)
            text = spoken_form(taken, self._language)
            if text:
                self._any = True
                yield Clause(text, self._begin, self._language)


class Sentences:
    """Text pieces → whole sentences as they stand, as soon as they are known to be whole; by
    punctuation alone, for texts that somebody wants read.

    >>> cut = Sentences()
    >>> [*cut.push("Hello the"), *cut.push("re. How a"), *cut.push("re you? "), *cut.finish()]
    ['Hello there.', 'How are you?']
    """

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str) -> Iterator[str]:
        self._text += text
        while True:
            match = _END_OF_SENTENCE.search(self._text)
            if match is None:
                break
            sentence = self._take(match.end())
            if sentence:
                yield sentence
        while len(self._text) > _MAX_CHARACTERS:
            yield self._take(_last_gap(self._text, _MAX_CHARACTERS))

    def finish(self) -> Iterator[str]:
        sentence = self._take(len(self._text))
        if sentence:
            yield sentence

    def _take(self, n: int) -> str:
        taken, self._text = self._text[:n], self._text[n:]
        return taken.strip()


def _sentence_finder() -> Callable[[str], str | None]:
    """What finds the first whole sentence of a text. Raises MissingExtra."""
    try:
        from sentence_stream import SentenceBoundaryDetector
    except ImportError:
        raise MissingExtra("Speaking answers", "voice") from None

    def first_sentence(text: str) -> str | None:
        return next(iter(SentenceBoundaryDetector().add_chunk(text)), None)

    return first_sentence


def _extent(text: str, sentence: str) -> int:
    """How much of ``text`` the library's ``sentence`` is, which lacks some white space and
    asterisks of it.
    """
    left = sum(not c.isspace() and c != "*" for c in sentence)
    for at, c in enumerate(text):
        if not left and not c.isspace() and c != "*":
            return at
        left -= not c.isspace() and c != "*"
    return len(text)


def _last_gap(text: str, limit: int) -> int:
    """Where a text without an end of sentence is cut: behind the last comma or space."""
    last = max(text.rfind(gap, 0, limit) for gap in ", ")
    return last + 1 if last >= 0 else limit


def spoken_form(text: str, language: str = "en") -> str:
    """``text`` as a voice should read it.

    >>> spoken_form("**Warm**: 21 °C 😀, see [the map](https://example.org/x)")
    'Warm: 21 degrees Celsius, see the map'
    """
    lines = (_LINE_MARKS.sub("", line) for line in text.splitlines())
    text = _LINK.sub(r"\1", " ".join(lines))
    text = _ADDRESS.sub(r"\1", text)
    text = _EMPHASIS.sub("", _TAG.sub(" ", text))
    text = "".join(c for c in text if not _is_picture(c))
    text = _CELL.sub(", ", text.strip(" |"))
    text = re.sub(r"\s+([,.;:!?])", r"\1", " ".join(_in_words(text, language).split()))
    return text if any(c.isalnum() for c in text) else ""


def _is_picture(character: str) -> bool:
    """Emoji and what joins and varies them."""
    category = unicodedata.category(character)
    if character in _KEPT_SIGNS:
        return False
    is_skin_tone = "\U0001f3fb" <= character <= "\U0001f3ff"
    return category in ("So", "Cs", "Co", "Me") or character in "\u200d\ufe0e\ufe0f" or is_skin_tone


def _in_words(text: str, language: str) -> str:
    units = _UNITS.get(language.partition("-")[0].lower())
    if not units:
        return text
    names = "|".join(sorted(map(re.escape, units), key=len, reverse=True))

    def words(found: re.Match[str]) -> str:
        one, several = units[found[2]]
        return f"{found[1]} {one if found[1] == '1' else several}"

    return re.sub(rf"(?<![\w.,])(\d+(?:[.,]\d+)*)\s?({names})(?![\w/])", words, text)
