"""Content rules: what may not be asked, and what may not be answered.

In: requests, and answers while they are generated. Out: a refusal with the rule's name and reason,
an answer that ends with ``content_filter``, or a note in the log. Text is held back only as long as
a match may still begin in it, so that one which spans pieces is caught whole.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import regex

from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import UsageError
from edge_gemma.messages import FunctionCall, Image, Part
from edge_gemma.serve.answer import Answer, GenerationRequest, joined
from edge_gemma.serve.refusals import Refusal
from edge_gemma.serve.visit import Visit, current_visit

log = logging.getLogger("edge_gemma.serve")
Side = Literal["input", "output"]
Verdict = Literal["refuse", "flag"]
_SEARCH_S = 1.0  # for one pattern on one text: a pattern that takes longer is at fault
FINISH_REASON = "content_filter"


@dataclass(frozen=True)
class Rule:
    """Where a rule looks and what it does. ``reason`` is told to who is refused."""

    name: str
    reason: str
    on: frozenset[Side] = frozenset({"input", "output"})
    verdict: Verdict = "refuse"


@dataclass(frozen=True)
class PatternRule(Rule):
    """A regular expression, of the ``regex`` package."""

    pattern: regex.Pattern = field(default_factory=lambda: regex.compile("(?!)"))

    def find(self, text: str, start: int = 0, *, final: bool = True) -> tuple[int, bool] | None:
        """Where a match begins at ``start`` or later, and whether more text changes nothing about
        it; None: nowhere, whatever may follow. A search that takes too long counts as a match.
        """
        try:
            match = self.pattern.search(text, start, partial=not final, timeout=_SEARCH_S)
        except TimeoutError:
            log.error("rule %s: its pattern took longer than %g s", self.name, _SEARCH_S)
            return start, True
        if match is None:
            return None
        # at the end of the text a longer match, or a letter behind a word, may follow
        sure = final or not (match.partial or match.end() == len(text))
        return match.start(), sure


@dataclass(frozen=True)
class ModelRule(Rule):
    """A model that says how likely a text or picture breaks a policy, 0 … 1."""

    judge: Callable[[str | Image], float] = lambda content: 0.0
    threshold: float = 0.5
    texts: bool = True
    pictures: bool = False


def pattern_rule(
    name: str,
    reason: str,
    *,
    pattern: str | None = None,
    words: Sequence[str] = (),
    on: Sequence[Side] = ("input", "output"),
    verdict: Verdict = "refuse",
) -> PatternRule:
    """A rule out of a pattern, or of words and phrases, which are found as whole words in any case.
    Raises UsageError.
    """
    if (pattern is None) == (not words):
        raise UsageError(f"rule {name}: give a pattern or words, and not both")
    try:
        if pattern is not None:
            compiled = regex.compile(pattern)
        else:
            flags = regex.IGNORECASE | regex.FULLCASE
            compiled = regex.compile(r"(?<!\w)\L<words>(?!\w)", flags, words=set(words))
    except regex.error as error:
        raise UsageError(f"rule {name}: {pattern!r} is no pattern: {error}") from None
    if compiled.match("") is not None:
        raise UsageError(f"rule {name}: the pattern matches the empty text, so it matches always")
    return PatternRule(name, reason, frozenset(on), verdict, compiled)


class ContentRules:
    """What a service asks before and after it generates.

    >>> rules = ContentRules([pattern_rule("pets", "no pets here", words=["cat"])])
    >>> rules.check(GenerationRequest(prompt="My category"))
    >>> rules.check(GenerationRequest(prompt="My Cat"))
    Traceback (most recent call last):
    edge_gemma.serve.refusals.Refusal: refused by the rule pets: no pets here
    """

    def __init__(self, rules: Sequence[Rule]):
        self._patterns = [rule for rule in rules if isinstance(rule, PatternRule)]
        self._models = [rule for rule in rules if isinstance(rule, ModelRule)]
        self.judges = any("input" in rule.on for rule in self._models)

    def check(self, request: GenerationRequest) -> None:
        """The patterns on all that a request says. Raises Refusal."""
        texts = texts_of(request)
        for rule in self._patterns:
            if "input" in rule.on and any(rule.find(text) for text in texts):
                _speak(rule, "input", None)

    def judge(self, request: GenerationRequest) -> None:
        """The models on the last message, which is what is new. Raises Refusal."""
        content = request.prompt if request.prompt is not None else request.messages[-1].content
        parts: Sequence[Part] = [content] if isinstance(content, str) else content
        text = _text(parts)
        for rule in self._models:
            if "input" not in rule.on:
                continue
            asked: list[str | Image] = [text] if rule.texts and text.strip() else []
            if rule.pictures:
                asked += [part for part in parts if isinstance(part, Image)]
            if any(rule.judge(each) >= rule.threshold for each in asked):
                _speak(rule, "input", None)

    def screen(self, answer: Answer) -> AnswerScreen | None:
        patterns = [rule for rule in self._patterns if "output" in rule.on]
        models = [rule for rule in self._models if "output" in rule.on and rule.texts]
        if not patterns and not models:
            return None
        return AnswerScreen(patterns, models, answer.visit)


class AnswerScreen:
    """The chunks of one answer on their way to the reader.

    Nothing passes in which a match may still begin. Where a model judges answers, all is held until
    it has. From a match on nothing passes but the last chunk with its figures.
    """

    def __init__(
        self, patterns: Sequence[PatternRule], models: Sequence[ModelRule], visit: Visit | None
    ):
        self._stopping = [rule for rule in patterns if rule.verdict == "refuse"]
        self._flags = [rule for rule in patterns if rule.verdict == "flag"]
        self._models, self._visit = models, visit
        self._text, self._n_sent = "", 0
        self._held: list[Chunk] = []
        self.closed = False

    async def passed(self, chunk: Chunk) -> Chunk | None:
        if self.closed:
            return _emptied(chunk) if chunk.finish_reason else None
        self._text += chunk.text
        self._held.append(chunk)
        final = bool(chunk.finish_reason)
        n_safe, matched = len(self._text), None
        for rule in self._stopping:
            found = rule.find(self._text, self._n_sent, final=final)
            if found is None:
                continue
            n_safe = min(n_safe, found[0])
            matched = rule if found[1] else matched
        if matched is not None:
            return self._cut(matched, n_safe, chunk)
        if final:
            for spoken in await asyncio.to_thread(self._spoken):
                if spoken.verdict == "refuse":
                    return self._cut(spoken, self._n_sent, chunk)
                _note(spoken, "output", self._visit)
        elif any(rule.verdict == "refuse" for rule in self._models):
            return None
        return self._released(n_safe)

    def _spoken(self) -> list[Rule]:
        """What is asked of the whole answer."""
        flags: list[Rule] = [rule for rule in self._flags if rule.find(self._text)]
        if not self._text.strip():
            return flags
        models = [rule for rule in self._models if rule.judge(self._text) >= rule.threshold]
        return [*flags, *models]

    def _released(self, n_safe: int) -> Chunk | None:
        """The held chunks that end within the first ``n_safe`` characters, as one."""
        released: Chunk | None = None
        while self._held and self._n_sent + len(self._held[0].text) <= n_safe:
            chunk = self._held.pop(0)
            self._n_sent += len(chunk.text)
            released = chunk if released is None else joined(released, chunk)
        return released

    def _cut(self, rule: Rule, at: int, chunk: Chunk) -> Chunk | None:
        self.closed = True
        _note(rule, "output", self._visit)
        rest = self._text[self._n_sent : at]
        self._held.clear()
        if chunk.finish_reason:
            return replace(_emptied(chunk), text=rest)
        return Chunk(rest) if rest else None


def _emptied(end: Chunk) -> Chunk:
    return replace(end, text="", token_ids=(), logprobs=(), finish_reason=FINISH_REASON)


def _speak(rule: Rule, side: Side, visit: Visit | None) -> None:
    """Raises Refusal, unless the rule only notes."""
    _note(rule, side, visit or current_visit.get())
    if rule.verdict == "refuse":
        raise Refusal(400, f"refused by the rule {rule.name}: {rule.reason}", code=FINISH_REASON)


def _note(rule: Rule, side: Side, visit: Visit | None) -> None:
    if visit is not None:
        visit.verdicts.append(rule.name)
    log.info("rule %s (%s): %s", rule.name, side, rule.verdict)


def texts_of(request: GenerationRequest) -> list[str]:
    """What a request says, message by message; the texts of a message's parts are one."""
    if request.prompt is not None:
        return [_text(_parts(request.prompt))]
    return [_text(_parts(message.content)) for message in request.messages]


def _parts(content: str | Sequence[Part]) -> Sequence[Part]:
    return [content] if isinstance(content, str) else content


def _text(parts: Sequence[Part]) -> str:
    texts = [part.to_json() if isinstance(part, FunctionCall) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))
