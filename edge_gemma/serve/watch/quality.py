"""Samples of quality: every k-th answer, scored by the model itself.

In: answers. Out: means over the last samples. What is measured is what the names say: how sure the
model was of its own tokens, how much of the answer repeats itself, whether the model itself calls
the answer a refusal or of another language than the question, and, where a reference is given, how
many words both share. None of it says that an answer is true.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import EdgeGemmaError, UsageError
from edge_gemma.messages import Message
from edge_gemma.options import Sampling
from edge_gemma.serve.answer import Answer, GenerationRequest, Observer
from edge_gemma.serve.guard.content import texts_of
from edge_gemma.serve.service import Service

log = logging.getLogger("edge_gemma.serve")
_MAX_CHARS = 1500  # of a text that the model is asked about
_MAX_PENDING = 4
_N_TOP = 100  # of the alternatives to the first token, among which Yes and No are looked for
_REFUSAL = (
    "A person asked:\n{question}\n\nThe answer was:\n{answer}\n\nDoes the answer refuse to do what "
    "the person asked? Answer Yes or No."
)
_LANGUAGE = (
    "First text:\n{question}\n\nSecond text:\n{answer}\n\nAre both texts written in the same "
    "language? Answer Yes or No."
)


@dataclass(frozen=True)
class Scores:
    """Of one answer, None where there is nothing to say.

    ``mean_logprob``: natural, of the tokens chosen, under the model before temperature.
    ``repetition``: the share of runs of four words that came before. ``refusal`` and
    ``language_mismatch``: the probability, 0 … 1, that the model itself gives to it.
    ``reference_f1``: words shared with the reference (token F1 as SQuAD has it).
    """

    mean_logprob: float | None = None
    repetition: float | None = None
    refusal: float | None = None
    language_mismatch: float | None = None
    reference_f1: float | None = None


@dataclass
class _Sample:
    question: str
    text: str = ""
    logprob: float = 0.0
    n: int = 0


class Quality(Observer):
    """Scores every ``every``-th answer while nobody else asks for something. Texts are kept only
    until they are scored, at most four at a time.

    A sampled answer is generated with log-probabilities, which its reader does not see.
    """

    def __init__(self, every: int, references: Mapping[str, str] = {}, n_kept: int = 200):
        if every < 1:
            raise UsageError(f"[quality] every is {every}; expected 1 or more")
        self._every, self._references = every, dict(references)
        self._n_seen = 0
        self._samples: dict[Answer, _Sample] = {}
        self._pending: deque[_Sample] = deque()
        self._scores: deque[Scores] = deque(maxlen=n_kept)
        self._lock = threading.Lock()
        self.n_scored = 0

    def submitted(self, answer: Answer) -> None:
        with self._lock:
            self._n_seen += 1
            if self._n_seen % self._every or len(self._samples) >= _MAX_PENDING:
                return
            texts = texts_of(answer.request)
            self._samples[answer] = _Sample(texts[-1] if texts else "")
        answer.with_hidden_logprobs()

    def generated(self, answer: Answer, chunk: Chunk) -> None:
        sample = self._samples.get(answer)
        if sample is None:
            return
        sample.text += chunk.text
        found = [entry.logprob for entry in chunk.logprobs if math.isfinite(entry.logprob)]
        sample.logprob += sum(found)
        sample.n += len(found)

    def ended(self, answer: Answer) -> None:
        with self._lock:
            sample = self._samples.pop(answer, None)
            ended = answer.outcome in ("stop", "stop_string", "length")
            if sample is not None and ended and len(self._pending) < _MAX_PENDING:
                self._pending.append(sample)

    async def score_one(self, service: Service) -> Scores | None:
        """Score what waits, if anything, and if nobody else wants the model."""
        state = service.health()
        if not self._pending or state.n_running or state.n_waiting or service.parked:
            return None
        sample = self._pending.popleft()
        asks = sample.question.strip() and sample.text.strip()
        refusal = language = None
        if asks:
            refusal = await self._yes(service, _REFUSAL, sample)
            language = await self._yes(service, _LANGUAGE, sample)
        reference = self._references.get(sample.question.strip())
        scores = Scores(
            sample.logprob / sample.n if sample.n else None,
            repetition(sample.text),
            refusal,
            None if language is None else 1 - language,
            None if reference is None else token_f1(sample.text, reference),
        )
        with self._lock:
            self._scores.append(scores)
            self.n_scored += 1
        return scores

    async def _yes(self, service: Service, question: str, sample: _Sample) -> float | None:
        """How likely the model says Yes rather than No."""
        asked = question.format(
            question=sample.question[:_MAX_CHARS], answer=sample.text[:_MAX_CHARS]
        )
        request = GenerationRequest(
            [Message("user", asked)],
            sampling=Sampling(max_tokens=1, temperature=0, logprobs=_N_TOP),
            scoring=True,
        )
        if service.parked:
            return None
        words = [service.model.tokenize(word)[0] for word in ("Yes", "No")]
        try:
            async with service.submit(request) as answer:
                chunks = [chunk async for chunk in answer]
        except EdgeGemmaError as error:
            log.info("an answer could not be scored: %s", error)
            return None
        entries = [entry for chunk in chunks for entry in chunk.logprobs]
        if not entries:
            return None
        top = dict(entries[0].top)
        yes, no = (top.get(word) for word in words)
        if yes is None or no is None:
            return None  # the model did not take it for a question of Yes or No
        return 1 / (1 + math.exp(min(700.0, no - yes)))

    def means(self) -> dict[str, float | None]:
        """Of the last scores, by the names of :class:`Scores`."""
        with self._lock:
            scores = list(self._scores)
        found: dict[str, float | None] = {}
        for field in fields(Scores):
            values = [getattr(each, field.name) for each in scores]
            known = [value for value in values if value is not None]
            found[field.name] = sum(known) / len(known) if known else None
        return found


def repetition(text: str) -> float | None:
    """The share of runs of four words that came before; None for fewer than eight words.

    >>> repetition("a b c d e f g h"), repetition("a b c d a b c d a b c d")
    (0.0, 0.5555555555555556)
    """
    words = text.split()
    if len(words) < 8:
        return None
    runs = [tuple(words[at : at + 4]) for at in range(len(words) - 3)]
    return 1 - len(set(runs)) / len(runs)


def token_f1(text: str, reference: str) -> float:
    """Words shared, as the harmonic mean of precision and recall.

    >>> token_f1("The cat.", "a cat"), token_f1("dog", "cat")
    (0.5, 0.0)
    """
    words, expected = (Counter(re.findall(r"\w+", each.lower())) for each in (text, reference))
    shared = sum((words & expected).values())
    total = sum(words.values()) + sum(expected.values())
    return 2 * shared / total if total else 1.0


def read_references(path: Path) -> dict[str, str]:
    """Lines of {"prompt": …, "answer": …}. Raises UsageError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the references {path} cannot be read: {error}") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            found[str(entry["prompt"]).strip()] = str(entry["answer"])
        except (ValueError, KeyError, TypeError):
            expected = '{"prompt": "…", "answer": "…"}'
            raise UsageError(f"{path}, line {number}: expected {expected}") from None
    return found
