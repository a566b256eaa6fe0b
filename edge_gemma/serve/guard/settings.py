"""The guard as a TOML file: each thing is off until its table is there.

In: a file. Out: :class:`Guarding`, what http.py puts around the routes and gives to the service.
docs/serve.md shows a whole file.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from edge_gemma.errors import UsageError
from edge_gemma.messages import Image
from edge_gemma.serve.answer import Observer
from edge_gemma.serve.guard.audit import AuditLog
from edge_gemma.serve.guard.content import ContentRules, ModelRule, Rule, Side, pattern_rule
from edge_gemma.serve.guard.limits import Limits
from edge_gemma.serve.guard.rates import Rate, RateLimits
from edge_gemma.serve.guard.usage import UsageBook
from edge_gemma.units import parse_bytes

log = logging.getLogger("edge_gemma.serve")
T = TypeVar("T")


class _Table(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A table of the file; a key that is not known is an error."""


class LimitsTable(_Table):
    body: str | int | None = None
    messages: int | None = None
    image_pixels: int | None = None
    audio_seconds: float | None = None
    context_tokens: int | None = None
    output_tokens: int | None = None
    header_seconds: float | None = None
    body_seconds: float | None = None
    wait_seconds: float | None = None

    def limits(self) -> Limits:
        """Raises UsageError."""
        given: dict[str, Any] = {
            "body_bytes": None if self.body is None else parse_bytes(self.body),
            "messages": self.messages,
            "pixels": self.image_pixels,
            "audio_s": self.audio_seconds,
            "context_tokens": self.context_tokens,
            "output_tokens": self.output_tokens,
            "header_s": self.header_seconds,
            "body_s": self.body_seconds,
            "wait_s": self.wait_seconds,
        }
        found = {name: value for name, value in given.items() if value is not None}
        wrong = [name for name, value in found.items() if value <= 0]
        if wrong:
            raise UsageError(f"[limits]: {wrong[0]} is {found[wrong[0]]}; expected more than 0")
        return Limits(**found)


class RateTable(_Table):
    requests: int | None = None
    tokens: int | None = None
    window_seconds: float = 60.0

    def rate(self) -> Rate:
        """Raises UsageError."""
        numbers = [n for n in (self.requests, self.tokens, self.window_seconds) if n is not None]
        if min(numbers) <= 0:
            raise UsageError("[rates]: expected numbers above 0")
        return Rate(self.requests, self.tokens, self.window_seconds)


class RatesTable(RateTable):
    by_name: dict[str, RateTable] = {}

    def limits(self) -> RateLimits:
        """Raises UsageError."""
        return RateLimits(self.rate(), {name: each.rate() for name, each in self.by_name.items()})


class RuleTable(_Table):
    name: str
    reason: str
    on: tuple[Side, ...] = ("input", "output")
    verdict: Literal["refuse", "flag"] = "refuse"
    pattern: str | None = None
    words: list[str] = []
    words_file: str | None = None
    model: str | None = None
    policy: str | None = None
    threshold: float = 0.5


class AuditTable(_Table):
    file: str
    max_bytes: str | int = "10MiB"
    keep: int = 5


class UsageTable(_Table):
    file: str


class CorsTable(_Table):
    origins: list[str]


class GuardTable(_Table):
    limits: LimitsTable = msgspec.field(default_factory=LimitsTable)
    rates: RatesTable | None = None
    content: list[RuleTable] = []
    audit: AuditTable | None = None
    usage: UsageTable | None = None
    cors: CorsTable | None = None


@dataclass(frozen=True)
class GuardedModel:
    """A bundle that judges contents by a policy."""

    bundle: str
    policy: str
    rule: RuleTable


@dataclass(frozen=True)
class GuardSettings:
    """What a file asks for; nothing is opened yet."""

    table: GuardTable = field(default_factory=GuardTable)
    folder: Path = Path()
    limits: Limits = Limits()
    rules: tuple[Rule, ...] = ()
    models: tuple[GuardedModel, ...] = ()

    @classmethod
    def read(cls, path: Path) -> GuardSettings:
        """Raises UsageError, which names what is wrong and where."""
        table = read_toml(path, GuardTable)
        plain = [rule for rule in table.content if rule.model is None]
        if table.rates is not None:
            table.rates.limits()
        return cls(
            table,
            path.parent,
            table.limits.limits(),
            tuple(_pattern_rule(rule, path.parent) for rule in plain),
            tuple(_guarded_model(rule) for rule in table.content if rule.model is not None),
        )

    def open(self) -> Guarding:
        """Open the files. Raises UsageError."""
        table = self.table
        audit, usage = table.audit, table.usage
        return Guarding(
            self.limits,
            None if table.rates is None else table.rates.limits(),
            self.rules,
            AuditLog(self.folder / audit.file, parse_bytes(audit.max_bytes), audit.keep)
            if audit
            else None,
            UsageBook(self.folder / usage.file if usage else None),
            tuple(table.cors.origins) if table.cors else (),
        )


@dataclass(frozen=True)
class Guarding:
    """What stands around a service. Close it at the end."""

    limits: Limits = Limits()
    rates: RateLimits | None = None
    content: tuple[Rule, ...] = ()
    audit: AuditLog | None = None
    usage: UsageBook = field(default_factory=UsageBook)
    origins: tuple[str, ...] = ()

    @property
    def rules(self) -> ContentRules | None:
        return ContentRules(self.content) if self.content else None

    def with_rules(self, rules: Sequence[Rule]) -> Guarding:
        """The same with more content rules."""
        return replace(self, content=(*self.content, *rules))

    @property
    def observers(self) -> list[Observer]:
        found = (self.rates, self.audit, self.usage)
        return [observer for observer in found if observer is not None]

    def warn_unknown(self, names: Collection[str]) -> None:
        """Say whose rates are of no use, since no token has the name."""
        unknown = sorted(self.rates.names - set(names)) if self.rates else []
        if unknown:
            log.warning("[rates.by_name]: no token is called %s", ", ".join(unknown))

    def close(self) -> None:
        self.usage.save()
        if self.audit is not None:
            self.audit.close()


def read_toml(path: Path, kind: type[T]) -> T:
    """A TOML file as a record. Raises UsageError, which names what is wrong and where."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), kind)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"{path}: {error}") from None


def _pattern_rule(rule: RuleTable, folder: Path) -> Rule:
    words = list(rule.words)
    if rule.words_file is not None:
        try:
            lines = (folder / rule.words_file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"rule {rule.name}: its words cannot be read: {error}") from None
        words += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if rule.policy is not None:
        raise UsageError(f"rule {rule.name}: a policy needs a model")
    return pattern_rule(
        rule.name,
        rule.reason,
        pattern=rule.pattern,
        words=words,
        on=rule.on,
        verdict=rule.verdict,
    )


def _guarded_model(rule: RuleTable) -> GuardedModel:
    assert rule.model is not None
    if rule.policy is None or rule.pattern or rule.words or rule.words_file:
        raise UsageError(f"rule {rule.name}: give a model and a policy, and no pattern or words")
    if not 0 < rule.threshold < 1:
        raise UsageError(f"rule {rule.name}: threshold is {rule.threshold}; expected 0 … 1")
    return GuardedModel(rule.model, rule.policy, rule)


def model_rule(
    asked: GuardedModel, judge: Callable[[str | Image], float], *, texts: bool, pictures: bool
) -> ModelRule:
    """The rule that ``asked`` describes, with the opened model behind ``judge``."""
    rule = asked.rule
    return ModelRule(
        rule.name,
        rule.reason,
        frozenset(rule.on),
        rule.verdict,
        judge,
        rule.threshold,
        texts,
        pictures,
    )
