"""What the assistant says by itself, and whether somebody said yes: phrases.toml by language."""

from __future__ import annotations

import functools
import re
import tomllib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

_MAX_WORDS = 8  # a longer utterance is no answer to a question of yes or no
_APOSTROPHES = str.maketrans({"’": "'", "ʼ": "'", "`": "'"})
_UNITS_S = (60, 3600, 86400)  # from where on minutes, hours, days are said
# languages that write no spaces: their phrases are looked for anywhere
_UNSPACED = ("ja", "zh")


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    text = (files("edge_gemma.assistant") / "phrases.toml").read_text("utf-8")
    return tomllib.loads(text)


def known_languages() -> tuple[str, ...]:
    return tuple(_table())


@dataclass(frozen=True)
class Phrases:
    """Those of one language; English stands in for one that is not in the table.

    >>> Phrases.of("de_DE").say("timer", label=" Tee")
    'Der Timer Tee ist abgelaufen.'
    >>> Phrases.of("en").span(7300)
    '2 hours'
    """

    language: str

    @classmethod
    def of(cls, language: str) -> Phrases:
        """``language`` may have a region or a variant behind it: de_DE, en-us, en+f3."""
        short = re.split(r"[^a-z]", language.lower())[0]
        return cls(short if short in _table() else "en")

    def say(self, name: str, **values: str) -> str:
        text = str(_table()[self.language][name])
        for key, value in values.items():
            text = text.replace("{" + key + "}", value)
        return text

    def span(self, seconds: float) -> str:
        """So long, to the unit that is heard best."""
        unit = sum(seconds >= 2 * border_s for border_s in _UNITS_S)
        n = max(0, round(seconds / (1, *_UNITS_S)[unit]))
        return str(_table()[self.language]["spans"][unit]).replace("{n}", str(n))


def says_yes(text: str, languages: Sequence[str] = ()) -> bool:
    """Whether this is a clear yes in one of ``languages`` (none given: in any that is known).
    Anything else is a no: silence, a doubt, a long sentence, yes and no together.

    >>> [says_yes(text) for text in ("Yes, please!", "Ja.", "No", "Yes. No, wait!", "", "Maybe")]
    [True, True, False, False, False, False]
    """
    words = _words(text)
    if not 0 < len(words) <= _MAX_WORDS:
        return False
    chosen = _chosen(languages)
    if any(_found(_table()[language]["no"], words, language) for language in chosen):
        return False
    return any(_found(_table()[language]["yes"], words, language) for language in chosen)


def says_stop(text: str, languages: Sequence[str] = ()) -> bool:
    """Whether this whole utterance sends the assistant to sleep, in one of ``languages`` (none
    given: in any that is known).

    >>> [says_stop(text) for text in ("Stop!", "Good-bye.", "Stop, please.", "Stop the music", "")]
    [True, True, True, False, False]
    """
    said = _key(_words(text))
    return bool(said) and any(said in _stops(language) for language in _chosen(languages))


def may_say_stop(text: str, languages: Sequence[str] = ()) -> bool:
    """Whether more words could still make :func:`says_stop` true.

    >>> [may_say_stop(text) for text in ("", "That's", "What")]
    [True, True, False]
    """
    said = _key(_words(text))
    chosen = _chosen(languages)
    return any(stop.startswith(said) for language in chosen for stop in _stops(language))


@functools.cache
def _stops(language: str) -> frozenset[str]:
    """The stop phrases as :func:`_key` writes them, alone and with a polite word on either side."""
    table = _table()[language]
    alone = [_key(_words(phrase)) for phrase in table["stop"]]
    polite = [_key(_words(word)) for word in table["polite"]]
    around = [pair for stop in alone for word in polite for pair in (stop + word, word + stop)]
    return frozenset(alone + around)


def _key(words: Sequence[str]) -> str:
    """Without gaps and hyphens: "good-bye" is "good bye" is "goodbye"."""
    return "".join(words).replace("-", "")


def _words(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).casefold().translate(_APOSTROPHES)
    return re.findall(r"[\w'-]+", text)


def _chosen(languages: Sequence[str]) -> list[str]:
    return [Phrases.of(language).language for language in languages] or list(_table())


def _found(phrases: Sequence[str], words: Sequence[str], language: str) -> bool:
    if language in _UNSPACED:
        joined = "".join(words)
        return any(phrase in joined for phrase in phrases)
    line = f" {' '.join(words)} "
    return any(f" {phrase} " in line for phrase in phrases)
