"""Which tokens of a vocabulary stay.

In: a vocabulary, its tokenizer, what was asked for. Out: :class:`Choice`, ids in order (of
:class:`Chooser`, for any size). What a language uses decides, not a token's rank: cut by rank, a
set of equal size costs several percent of bits on English text, by use none. With every token stays
what its merges make on the way (:mod:`~.merges`), and in every set stay bytes, digits, punctuation,
the tokens that steer the model and the pieces of its chat template.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from edge_gemma.convert.trim import languages as sources
from edge_gemma.convert.trim.merges import Merges
from edge_gemma.convert.vocabulary import BYTE, NORMAL, SPACE, UNUSED, Vocabulary
from edge_gemma.errors import UsageError
from edge_gemma.prompts.calls import tools_text

# The head's rows are repacked in groups of up to 16, and dealt to threads in blocks: a table that
# is no multiple would be multiplied by another kernel, with other roundings, and more slowly
MULTIPLE = 64
ALL = "all"  # instead of languages: everything that text is made of
_OWN_TEXT = 2.0  # weight of a file of one's own beside a language's 1
_UNUSED = re.compile(rb"<unused\d+>|\[PAD\d+\]")


class LineTokenizer(Protocol):
    """The part of :class:`~edge_gemma.engines.llama.tokenizer.Tokenizer` that is asked for."""

    def tokenize(self, text: str) -> list[int]: ...

    def tokenize_lines(self, lines: Sequence[str]) -> Iterator[list[int]]: ...


@dataclass(frozen=True)
class Wanted:
    """What a vocabulary is cut to. Nothing at all, or "all": only the unused tokens go."""

    languages: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()  # texts or lists of words
    keep_tokens: int = 0  # so many at most, what is used most first; 0: all that is used
    min_count: int = 1  # a token that the files use less often goes
    offer_sizes: bool = False  # count smaller sets as well, for a table to choose from


UNUSED_ONLY = Wanted()


@dataclass(frozen=True)
class Choice:
    kept: np.ndarray  # [n] int32, ascending: new id → id in the whole vocabulary
    coverage: float  # share of what the languages and files use that is kept whole, 0 … 1
    languages: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Chooser:
    """What a vocabulary's tokens are used for, counted once; then sets of any size.

    ``needed``: ids that must stay whatever is asked for: media tokens, ends of answers;
    ``prompts``: texts that must be made of the same tokens as before. Raises UsageError (an unknown
    language, a file that is no text), RuntimeFailure (wordfreq is missing).
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        tokenizer: LineTokenizer,
        wanted: Wanted,
        needed: Iterable[int] = (),
        prompts: Iterable[str] = (),
    ):
        if wanted.keep_tokens < 0 or wanted.min_count < 1:
            raise UsageError(
                f"--keep-tokens {wanted.keep_tokens} and --min-count {wanted.min_count}: expected "
                "positive numbers"
            )
        if wanted.min_count > 1 and not wanted.files:
            raise UsageError("--min-count counts in the files of --vocabulary; none was given")
        is_all = any(language.strip().lower() == ALL for language in wanted.languages)
        if is_all and len(wanted.languages) > 1:
            raise UsageError(f"--languages {ALL} stands alone: every language is in it")
        if is_all and wanted.files:
            raise UsageError(
                f"--languages {ALL} keeps every token of text; --vocabulary has nothing to add"
            )
        self._vocabulary, self._tokenizer, self._wanted = vocabulary, tokenizer, wanted
        self.languages = () if is_all else sources.check_languages(wanted.languages)
        self._texts = [(path.name, sources.file_text(path)) for path in wanted.files]
        self._merges = Merges(vocabulary.tokens, vocabulary.scores)
        self._base = self._closed(self._always(needed, prompts))
        self._used = self._usage() if self.languages or self._texts else self._by_rank()

    @property
    def smallest(self) -> int:
        """Tokens of the smallest set there can be."""
        return -(-len(self._base) // MULTIPLE) * MULTIPLE

    def choice(self, keep_tokens: int | None = None) -> Choice:
        """The set that was asked for, or one of another size. Raises UsageError (a size too small
        for what every set needs).
        """
        size = self._wanted.keep_tokens if keep_tokens is None else keep_tokens
        kept = self._filled(size)
        covered = sum(use for token, use in self._used if token in kept)
        total = sum(use for _, use in self._used)
        twins = len(self._merges.twins)
        notes = [f"{twins} tokens are spelled twice; both stay where one does"] if twins else []
        if size and not self.languages and not self._texts:
            notes.append("no language was named: the tokens of the earliest merges stay")
        silent = [code for code in self.languages if sources.measuring_text(code) is None]
        if silent:
            notes.append(
                f"no text of {', '.join(silent)} comes with this package: what the cut costs there "
                "was not measured"
            )
        return Choice(
            np.array(sorted(kept), np.int32),
            covered / total if total else 1.0,
            self.languages,
            tuple(name for name, _ in self._texts),
            tuple(notes),
        )

    def _always(self, needed: Iterable[int], prompts: Iterable[str]) -> set[int]:
        vocabulary = self._vocabulary
        letters = set().union(*(sources.alphabet(code) for code in self.languages))
        # llama.cpp reads row 0 for embedding rows
        kept = {0, *needed, *vocabulary.special.values()}
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
            if kind == NORMAL:
                if _is_common(token.decode("utf-8", "surrogatepass"), letters):
                    kept.add(i)
            elif kind == BYTE or not is_unused(token, kind):
                kept.add(i)
        for text in (*_prompt_texts(vocabulary.chat_template), *prompts):
            kept.update(self._tokenizer.tokenize(text))
        return kept

    def _usage(self) -> list[tuple[int, float]]:
        """(token, share of use), the most used first; what is not used is not in it."""
        used: dict[int, float] = defaultdict(float)
        for code in self.languages:
            weights: dict[int, float] = defaultdict(float)
            words = sources.spellings(code)
            tokens = self._tokenizer.tokenize_lines(list(words))
            for ids, weight in zip(tokens, words.values(), strict=True):
                for token in ids:
                    weights[token] += weight
            for text in sources.running_text(code):
                for token in self._tokenizer.tokenize(text):
                    weights[token] += 1.0
            _add(used, weights, 1.0)
        for _, text in self._texts:
            _add(used, self._counted(text), _OWN_TEXT)
        return sorted(used.items(), key=lambda item: (-item[1], item[0]))

    def _counted(self, text: str) -> dict[int, float]:
        """How often a file uses a token, each of its words behind a space as well."""
        lines = self._tokenizer.tokenize_lines(text.splitlines())
        counts = Counter(token for ids in lines for token in ids)
        words = sources.words_of_text(text)
        for ids, count in zip(
            self._tokenizer.tokenize_lines(list(words)), words.values(), strict=True
        ):
            for token in ids:
                counts[token] = max(counts[token], count)
        return {token: float(n) for token, n in counts.items() if n >= self._wanted.min_count}

    def _by_rank(self) -> list[tuple[int, float]]:
        """Every token of text, the earliest merge first."""
        normal = np.flatnonzero(self._vocabulary.types == NORMAL)
        order = np.argsort(-self._vocabulary.scores[normal], kind="stable")
        return [(int(i), 1.0) for i in normal[order]]

    def _closed(self, tokens: set[int]) -> set[int]:
        normal = (i for i in tokens if self._vocabulary.types[i] == NORMAL)
        return tokens | self._merges.with_paths(normal)

    def _filled(self, keep_tokens: int) -> set[int]:
        """What every set has and the most used tokens with their merges, up to a multiple of
        :data:`MULTIPLE`.
        """
        n_whole = len(self._vocabulary.tokens)
        smallest = self.smallest
        if keep_tokens and keep_tokens < smallest:
            raise UsageError(
                f"--keep-tokens {keep_tokens} is too small: bytes, punctuation, the chat template "
                f"and the letters asked for are {len(self._base)} tokens; give at least {smallest}"
            )
        limit = min(keep_tokens // MULTIPLE * MULTIPLE or n_whole, n_whole)
        kept = set(self._base)
        for token, _ in self._used:
            if token in kept:
                continue
            is_merged = self._vocabulary.types[token] == NORMAL
            new = set(self._merges.group(token) if is_merged else [token]) - kept
            if len(kept) + len(new) <= limit:
                kept |= new
        return _rounded(kept, n_whole)


def is_unused(token: bytes, kind: int) -> bool:
    """Whether a row stands for nothing: ``<unused12>``, the filling behind a vocabulary."""
    return kind == UNUSED or bool(_UNUSED.fullmatch(token))


def _is_common(text: str, letters: set[str]) -> bool:
    """Digits, punctuation, symbols and single characters that texts of any language have, and the
    ``letters`` of those that were asked for.
    """
    if len(text) == 1 and (text in letters or _is_pictograph(text)):
        return True
    return all(
        character == SPACE
        or (character.isascii() and not character.isalpha())
        or (not character.isalnum() and ord(character) < 0x2E80)  # before the scripts of Asia
        for character in text
    )


def _is_pictograph(character: str) -> bool:
    return ord(character) > 0x2000 and unicodedata.category(character) == "So"


def _prompt_texts(template: str | None) -> list[str]:
    """What prompts are written with whatever the user says."""
    function = {
        "name": "get_value",
        "description": "Returns a value.",
        "parameters": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": "text", "enum": ["on", "off"]},
                "count": {"type": "integer", "minimum": 0, "maximum": 9},
                "items": {"type": "array", "items": {"type": "number"}, "default": None},
                "is_on": {"type": "boolean", "default": True},
            },
            "required": ["name"],
        },
    }
    call = '```tool_code\n{"name": "get_value", "parameters": {"name": "on", "is_on": false}}\n```'
    units = " km m cm mm kg g mg l ml °C °F % h min s ms km/h kWh W V A Hz kHz MB GB MiB GiB € $"
    spoken = "system\nuser\nmodel\nassistant\ndeveloper\ntool\ntool_output\n```json\n```python\n"
    return [template or "", tools_text([function]), call, units, spoken, '{"result": null}\n']


def _add(used: dict[int, float], weights: dict[int, float], share: float) -> None:
    total = sum(weights.values())
    for token, weight in weights.items():
        used[token] += share * weight / total


def _rounded(kept: set[int], n_whole: int) -> set[int]:
    """Filled up to a multiple with the first rows that would go: they are there, and never met."""
    n_missing = min(-len(kept) % MULTIPLE, n_whole - len(kept))
    return kept.union(islice((i for i in range(n_whole) if i not in kept), n_missing))
