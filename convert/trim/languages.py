"""What a language, program text or a file of one's own is made of: spellings with weights.

In: a language's code, ``code``, or a path. Out: ``(text, weight)`` pairs to tokenize. Word lists
are wordfreq's (the extra ``trim``, used while converting only); program text is Python's own
library, which every machine that runs this has. The texts beside this module belong to nobody's
word list: they measure, they do not choose.
"""

from __future__ import annotations

import difflib
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.languages import NAMES
from edge_gemma.units import MiB, format_bytes

CODE = "code"
N_WORDS = 50_000  # of a language, the most frequent ones
# how often a word is written so, beside its usual form behind a space (names are always large)
_FORMS = ((" {w}", 1.0), (" {c}", 1.0), ("{w}", 0.3), ("{c}", 1.0), (" {u}", 0.1), ("{u}", 0.1))
_ABBREVIATION = ((" {u}", 1.0), ("{u}", 0.3))  # a short word may be one: GNU, IEEE
_SHORT = 4  # letters
# wordfreq folds cases, which writes ß as ss: the word may have been either
_FOLDED = {"de": ("ss", "ß")}
_MAX_FILE_BYTES = 64 * MiB
_CODE_BYTES = 4 * MiB
_NO_PROGRAMS = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages")
# besides Python: what is written in web pages, data files and shells
_CODE_WORDS = """
const let var function async await return export import default class extends interface public
private protected static void int long float double bool boolean string char unsigned struct enum
typedef include define ifdef endif namespace template typename std vector nullptr null undefined
true false self this new delete throw try catch finally switch case break continue while for do
else elif fi esac then done echo sudo apt install pip npm git commit push pull clone docker curl
SELECT FROM WHERE INSERT INTO VALUES UPDATE SET DELETE JOIN LEFT INNER GROUP ORDER BY LIMIT CREATE
TABLE PRIMARY KEY FOREIGN INDEX div span href src html head body script style link meta title input
button onclick className useState useEffect console log println printf malloc free sizeof uint8_t
int32_t size_t fn impl pub mut usize match Some None Ok Err unwrap func package main fmt defer chan
""".split()


def languages() -> dict[str, str]:
    """Code → English name of what can be asked for. Raises RuntimeFailure (wordfreq is missing)."""
    known = dict.fromkeys(_wordfreq().available_languages())
    return {code: NAMES.get(code, code) for code in sorted(known)} | {CODE: "program text"}


def check_languages(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Codes for what somebody typed: a code or an English name. Raises UsageError with the nearest.

    >>> check_languages(("en", "Slovenian"))
    ('en', 'sl')
    """
    known = languages()
    by_name = {name.lower(): code for code, name in known.items()}
    found: list[str] = []
    for text in wanted:
        key = text.strip().lower()
        code = key if key in known else by_name.get(key)
        if code is None:
            near = difflib.get_close_matches(key, [*known, *by_name], 3, 0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UsageError(
                f"--languages {text!r} is not known; {hint}There are word lists for "
                f"{', '.join(known)}"
            )
        if code not in found:
            found.append(code)
    return tuple(found)


def spellings(language: str) -> dict[str, float]:
    """A language's words as they are written in text, with weights.

    Of each word those forms that are about as frequent as the rarest word that is taken.
    """
    if language == CODE:
        return dict.fromkeys([f"{lead}{word}" for word in _CODE_WORDS for lead in ("", " ")], 20.0)
    by_use = _frequent_words(language)
    least = min(by_use.values())
    found: dict[str, float] = {}
    for word, use in by_use.items():
        forms: dict[str, float] = {}
        for form, share in _FORMS + (_ABBREVIATION if len(word) <= _SHORT else ()):
            text = form.format(w=word, c=word[:1].upper() + word[1:], u=word.upper())
            forms[text] = forms.get(text, 0.0) + share
        for text, share in forms.items():
            if share * use >= least:
                found[text] = share * use
    return found


@cache
def _frequent_words(language: str) -> dict[str, float]:
    """The most frequent words with their share of all text, the first one first."""
    by_use = _wordfreq().get_frequency_dict(language)
    frequent = sorted(by_use, key=lambda word: (-by_use[word], word))[:N_WORDS]
    found = {word: by_use[word] for word in frequent}
    folded, letter = _FOLDED.get(language, ("", ""))
    if folded:
        found |= {word.replace(folded, letter): found[word] for word in frequent if folded in word}
    return found


def running_text(language: str) -> Iterator[str]:
    """Text of that kind, piece by piece; only program text has any."""
    if language == CODE:
        yield from _program_text()


def alphabet(language: str) -> set[str]:
    """The characters that a language's words are written with, small and large."""
    if language == CODE:
        return set()
    text = "".join(_frequent_words(language))
    return {*text, *text.upper(), *text.title()}


def file_text(path: Path) -> str:
    """A text or word list of one's own. Raises UsageError (no file, too large, no text)."""
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise UsageError(
                f"{path} has {format_bytes(size)}; at most {format_bytes(_MAX_FILE_BYTES)} are "
                "read: give a part of it"
            )
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is no UTF-8 text (byte {error.start}); expected a text or a list of words"
        ) from None
    if "\0" in text or not text.strip():
        raise UsageError(f"{path} is no text; expected a text or a list of words")
    return text


def words_of_text(text: str) -> Counter[str]:
    """Words as they stand behind a space, so that a list of words serves as well as a text."""
    return Counter(f" {word}" for word in text.split())


def measuring_text(language: str) -> str | None:
    """A text of that language that no word list was made from; None where there is none."""
    path = files("edge_gemma.convert.trim") / "texts" / f"{language}.txt"
    return path.read_text("utf-8") if path.is_file() else None


def measuring_texts() -> dict[str, str]:
    """All of them, by language."""
    folder = files("edge_gemma.convert.trim") / "texts"
    names = sorted(each.name for each in folder.iterdir() if each.name.endswith(".txt"))
    return {name[:-4]: (folder / name).read_text("utf-8") for name in names}


def _program_text() -> Iterator[str]:
    """Python's library, a bounded part of it in a fixed order."""
    folder, left = Path(sysconfig.get_paths()["stdlib"]), _CODE_BYTES
    for path in sorted(folder.rglob("*.py")):
        if any(part in _NO_PROGRAMS for part in path.relative_to(folder).parts):
            continue
        text = path.read_text("utf-8", "replace")
        left -= len(text)
        if left < 0:
            break
        yield text


@cache
def _wordfreq():
    try:
        import wordfreq
    except ImportError:
        raise RuntimeFailure(
            "word lists need wordfreq: pip install 'edge-gemma[trim]' (used while converting only)"
        ) from None
    return wordfreq
