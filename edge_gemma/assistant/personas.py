"""Personas: what a model is told before a conversation, as data.

In: a persona's name or a TOML file, a language, values. Out: system text, and what is said before
each utterance. Sentences stand in lists; one that names a ``{slot}`` nobody filled is left out.
The files are in ``prompts/``, with what people of a language expect (``cultures.toml``).
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import msgspec

from edge_gemma.errors import UsageError, first_line
from edge_gemma.files import read_bounded
from edge_gemma.languages import NAMES
from edge_gemma.units import KiB

_FOLDER = files("edge_gemma.assistant") / "prompts"
_CULTURES = "cultures"
_SLOT = re.compile(r"\{(\w+)\}")
_NAME = re.compile(r"[A-Za-z][A-Za-z '()-]{1,40}")
_OF_ALL = ("language", "culture")  # slots that need not be listed
_NO_SPACES = ("ja", "zh")  # sentences are joined without
_MAX_FILE_BYTES = 64 * KiB
_MAX_VALUE_CHARACTERS = 4000


class _Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    system: tuple[str, ...] = ()
    instruction: tuple[str, ...] = ()
    any_language: str | None = None  # stands for {language} where none was chosen


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    about: str
    slots: dict[str, str] = {}
    required: tuple[str, ...] = ()
    text: dict[str, _Text]


class _Culture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    own: str | None = None
    en: str | None = None


@dataclass(frozen=True)
class Instructions:
    """``system`` stands before a conversation, ``instruction`` before each utterance; "" where
    the persona has none.
    """

    system: str
    instruction: str


@dataclass(frozen=True)
class Persona:
    """One of :func:`persona_names`, or a file of one's own. ``slots``: what may be filled → what
    it is for.

    >>> persona = Persona.of("translator")
    >>> persona.instructions(to="fr").instruction
    'Translate what is said into French:'
    """

    name: str
    about: str
    slots: dict[str, str]
    required: tuple[str, ...]
    _texts: dict[str, _Text]

    @classmethod
    def of(cls, name: str | os.PathLike[str]) -> Persona:
        """By name, or by the path of a ``.toml`` file. Raises UsageError."""
        name = os.fspath(name)
        if name.endswith(".toml"):
            return cls._checked(
                Path(name).stem, read_bounded(name, _MAX_FILE_BYTES, "a persona"), name
            )
        if name not in persona_names():
            near = difflib.get_close_matches(name, persona_names(), 1, 0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                f"there is no persona {name!r}; {hint}There are {', '.join(persona_names())}, or a "
                "FILE.toml of your own"
            )
        return cls._checked(name, (_FOLDER / f"{name}.toml").read_bytes(), name)

    @classmethod
    def _checked(cls, name: str, data: bytes, source: str) -> Persona:
        try:
            file = msgspec.toml.decode(data, type=_File)
        except ValueError as error:  # of msgspec, TOML and UTF-8
            raise UsageError(f"{source} is no persona: {first_line(error)}") from None
        known = {*file.slots, *_OF_ALL}
        if wrong := [key for key in file.required if key not in file.slots]:
            raise UsageError(f"{source} requires {wrong[0]!r}, which is not among its slots")
        for language, text in file.text.items():
            if unknown := sorted(_used(text) - known):
                raise UsageError(
                    f"{source}: its text in {language!r} names {{{unknown[0]}}}, which is not "
                    f"among its slots: {', '.join(sorted(known))}"
                )
        if not file.text:
            raise UsageError(f"{source} has no text; expected [text.en] with system = [...]")
        return cls(name, file.about, file.slots, file.required, file.text)

    @property
    def languages(self) -> tuple[str, ...]:
        """Those it has a text of its own in; in any other the first of them asks for it."""
        return tuple(self._texts)

    def instructions(self, language: str | None = None, **values: str) -> Instructions:
        """What the model is told. ``language`` of the answers: a code (``de``, ``de-AT``) or an
        English name; None: the one that is spoken. ``values`` fill the slots; ``culture`` takes the
        place of what cultures.toml says. Raises UsageError.

        >>> print(Persona.of("comparison").instructions("de", criteria="Preis").system[:60])
        Du vergleichst, was man dir gibt, in der Reihenfolge, in der
        """
        self._check(values)
        code, name = language_of(language) if language is not None else (None, None)
        short = code.partition("-")[0] if code else None
        own = short if short in self._texts else next(iter(self._texts))
        text = self._texts[own]
        if language is not None and own != short and "language" not in _used(text):
            raise UsageError(
                f"the persona {self.name} does not choose the language of its answers"
                + (" by --answer-in; give --with to=…" if "to" in self.slots else "")
            )
        filled = {key: _named(key, value) for key, value in values.items() if value.strip()}
        filled.setdefault("language", name or text.any_language or "")
        filled.setdefault("culture", culture_of(code, own) if own == short or own == "en" else "")
        gap = "" if own in _NO_SPACES else " "
        return Instructions(
            _filled(text.system, filled, gap), _filled(text.instruction, filled, gap)
        )

    def _check(self, values: Mapping[str, str]) -> None:
        known = {*self.slots, "culture"}
        for key, value in values.items():
            if key not in known:
                slots = ", ".join(sorted(known))
                raise UsageError(f"the persona {self.name} has no slot {key!r}; it has {slots}")
            if len(value) > _MAX_VALUE_CHARACTERS:
                raise UsageError(
                    f"{key} has {len(value)} characters; at most {_MAX_VALUE_CHARACTERS} are taken"
                )
        for key in self.required:
            if not values.get(key, "").strip():
                raise UsageError(
                    f"the persona {self.name} needs {key} ({self.slots[key]}); give it with "
                    f"--with {key}=…"
                )


@functools.cache
def persona_names() -> tuple[str, ...]:
    """Those that come with this package.

    >>> persona_names()
    ('assistant', 'comparison', 'describer', 'tools', 'translator')
    """
    names = sorted(path.name for path in _FOLDER.iterdir() if path.name.endswith(".toml"))
    return tuple(name[:-5] for name in names if name != f"{_CULTURES}.toml")


def language_of(text: str) -> tuple[str, str]:
    """A code (``de``, ``de-at``) or an English name → code and region, name. Raises UsageError.

    >>> language_of("de_at"), language_of("German"), language_of("Swiss German")
    (('de-AT', 'German'), ('de', 'German'), ('', 'Swiss German'))
    """
    short, _, region = text.strip().replace("_", "-").partition("-")
    if short.lower() in NAMES:
        code = short.lower()
        return (f"{code}-{region.upper()}" if region else code), NAMES[code]
    by_name = {name.lower(): code for code, name in NAMES.items()}
    named = by_name.get(text.strip().lower())
    if named is not None:
        return named, NAMES[named]
    if len(text.strip()) <= 3 or not _NAME.fullmatch(text.strip()):
        raise UsageError(f"{text[:40]!r} is no language; expected a code like de, or a name")
    return "", text.strip()


def culture_of(code: str | None, written_in: str = "en") -> str:
    """What people who speak ``code`` (``de-AT``) expect, said in ``written_in``; "" where nothing
    is known. None: of a language that is not known yet.
    """
    table = _cultures()
    for key in (code, code.partition("-")[0]) if code else ("any",):
        entry = table.get(key)
        if entry is not None:
            is_own = key.partition("-")[0] == written_in
            return (entry.own if is_own else entry.en) or ""
    return ""


@functools.cache
def _cultures() -> dict[str, _Culture]:
    data = (_FOLDER / f"{_CULTURES}.toml").read_bytes()
    return msgspec.toml.decode(data, type=dict[str, _Culture])


def _used(text: _Text) -> set[str]:
    return {slot for line in (*text.system, *text.instruction) for slot in _slots(line)}


def _slots(sentence: str) -> list[str]:
    return _SLOT.findall(sentence)


def _named(key: str, value: str) -> str:
    """``to=fr`` is said as French."""
    return NAMES.get(value.strip().lower(), value.strip()) if key == "to" else value.strip()


def _filled(sentences: Iterable[str], values: Mapping[str, str], gap: str) -> str:
    whole = (line for line in sentences if all(values.get(slot) for slot in _slots(line)))
    return gap.join(_SLOT.sub(lambda found: values[found[1]], line) for line in whole)
