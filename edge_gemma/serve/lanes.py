"""Who has a lane of a service, and what it does there: records of the worker's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_gemma.conversation.generation import Lane
from edge_gemma.conversation.session import Session
from edge_gemma.conversation.stream import Chunk
from edge_gemma.serve.answer import Answer
from edge_gemma.serve.spoken import SpokenAnswer
from edge_gemma.spans import Span


@dataclass(frozen=True)
class Slot:
    """What a busy lane does: ``encoding`` (pictures and sound), ``listening`` (its turn is being
    spoken), ``prefill`` or ``decode``. Tokens so far; seconds since it left the queue.
    """

    state: str
    urgent: bool
    prompt_tokens: int
    completion_tokens: int
    since_s: float


@dataclass
class Running:
    answer: Answer
    session: Session
    dropped_turns: int
    lane: Lane


@dataclass
class Heard:
    """A turn that is being spoken; ``after(n_rows)`` makes the spans that close its clip."""

    answer: SpokenAnswer
    session: Session
    after: Callable[[int], list[Span]]
    dropped_turns: int
    n_rows: int = 0
    filled: bool = False  # whether all that came is prefilled
    goes_on: bool = True  # False once it ended, or its answer runs

    @property
    def has_work(self) -> bool:
        return not self.filled or self.answer.has_news


@dataclass
class Counts:
    """Since the service was opened."""

    answered: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    answer_s: float = 0.0  # seconds from leaving the queue to the end, of recent answers on average

    def ended(self, end: Chunk, answer: Answer) -> None:
        """An answer's last chunk came."""
        if end.finish_reason == "cancelled":
            self.cancelled += 1
        elif end.finish_reason == "failed":
            self.failed += 1
        else:
            self.answered += 1
        if end.usage is not None:
            self.prompt_tokens += end.usage.prompt_tokens
            self.reused_tokens += end.usage.reused_tokens
            self.completion_tokens += end.usage.completion_tokens
        took_s = time.perf_counter() - (answer.began_s or answer.submitted_s)
        self.answer_s += (took_s - self.answer_s) / 8


def slot(state: str, answer: Answer, n_prompt: int = 0, n_answer: int = 0) -> Slot:
    since_s = time.perf_counter() - (answer.began_s or answer.submitted_s)
    return Slot(state, answer.request.urgent, n_prompt, n_answer, since_s)


def running_slot(running: Running) -> Slot:
    lane = running.lane
    state = "decode" if lane.prefilled else "prefill"
    return slot(state, running.answer, lane.prompt_tokens, len(lane.generation.ids))
