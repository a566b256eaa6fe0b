"""The last requests and answers, and what they say together: percentiles and a success rate."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from edge_gemma.serve.answer import Answer, Observer
from edge_gemma.serve.visit import Visit

PERCENTILES = (50, 90, 95, 99)
FAILED = 500  # statuses from here on are the server's faults
_BUSY = (429, 503)


@dataclass(frozen=True)
class AnswerFigures:
    """Of one answer; None where there was nothing to time. Seconds. What was spoken is there when
    it was spoken to its end.
    """

    outcome: str
    queue_s: float | None  # from submit to a lane
    ttft_s: float | None  # from when all of the request was there to the first token
    time_per_token_s: float | None  # after the first
    duration_s: float
    prompt_tokens: int
    completion_tokens: int
    audio_s: float
    real_time_factor: float | None  # seconds of work per second of speech, of whole clips


def figures_of(answer: Answer) -> AnswerFigures:
    """Of an answer that has ended."""
    ended_s = answer.ended_s or answer.submitted_s
    began_s, first_s, n_tokens = answer.began_s, answer.first_s, answer.n_tokens
    usage = answer.last.usage if answer.last else None
    per_token = None if first_s is None or n_tokens < 2 else (ended_s - first_s) / (n_tokens - 1)
    factor = None
    spoken = answer.asked_s != answer.submitted_s  # as fast as somebody speaks
    answered = answer.outcome not in ("failed", "cancelled")
    if answer.audio_s and began_s is not None and answered and not spoken:
        factor = (ended_s - began_s) / answer.audio_s
    return AnswerFigures(
        outcome=answer.outcome,
        queue_s=None if began_s is None else began_s - answer.submitted_s,
        ttft_s=None if first_s is None else first_s - answer.asked_s,
        time_per_token_s=per_token,
        duration_s=max(0.0, ended_s - answer.asked_s),
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=n_tokens,
        audio_s=answer.audio_s,
        real_time_factor=factor,
    )


class Recent(Observer):
    """The last ``n_kept`` answers and POST requests.

    The success rate leaves out what clients did wrong (4xx but 429) and those who left; without a
    request that counts it is None.
    """

    def __init__(self, n_kept: int = 1000):
        self._answers: deque[AnswerFigures] = deque(maxlen=n_kept)
        self._visits: deque[str] = deque(maxlen=n_kept)
        self._lock = threading.Lock()

    def ended(self, answer: Answer) -> None:
        with self._lock:
            self._answers.append(figures_of(answer))

    def visited(self, visit: Visit) -> None:
        if visit.method == "POST":
            with self._lock:
                self._visits.append(_kind(visit))

    def summary(self) -> dict[str, object]:
        """Counts, and percentiles in seconds by name: {"p50": …, "p90": …, "p95": …, "p99": …}."""
        with self._lock:
            answers, visits = list(self._answers), Counter(self._visits)
        counted = visits["ok"] + visits["busy"] + visits["failed"]
        speeds = [1 / a.time_per_token_s for a in answers if a.time_per_token_s]
        return {
            "requests": sum(visits.values()),
            **{name: visits[name] for name in ("ok", "client_error", "busy", "failed", "left")},
            "success_rate": visits["ok"] / counted if counted else None,
            "answers": len(answers),
            "outcomes": dict(Counter(answer.outcome for answer in answers)),
            "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
            "completion_tokens": sum(answer.completion_tokens for answer in answers),
            "queue_s": percentiles(answer.queue_s for answer in answers),
            "ttft_s": percentiles(answer.ttft_s for answer in answers),
            "time_per_token_s": percentiles(answer.time_per_token_s for answer in answers),
            "duration_s": percentiles(answer.duration_s for answer in answers),
            "real_time_factor": percentiles(answer.real_time_factor for answer in answers),
            "median_tok_s": float(np.median(speeds)) if speeds else None,
        }

    def figures(self) -> list[dict[str, object]]:
        """Every answer that is kept, the oldest first."""
        with self._lock:
            return [asdict(answer) for answer in self._answers]


def _kind(visit: Visit) -> str:
    """ok, client_error, busy, failed, or left: the client went away before the answer began."""
    if visit.status is None or visit.status == 499:
        return "left"
    if visit.status in _BUSY:
        return "busy"
    if visit.status >= FAILED or "failed" in visit.finish_reasons and visit.status < 400:
        return "failed"
    return "client_error" if visit.status >= 400 else "ok"


def percentiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """None without a value.

    >>> percentiles([1.0, None, 3.0])["p50"]
    2.0
    """
    found = [value for value in values if value is not None]
    if not found:
        return None
    at = np.percentile(found, PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, at, strict=True)}
