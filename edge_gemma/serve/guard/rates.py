"""How often, and for how many generated tokens, a caller may come within a sliding window.

In: requests and generated tokens, by the caller's name. Out: a refusal with ``Retry-After``, and
the headers OpenAI's clients read. The clock is monotonic: setting the time changes nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edge_gemma.conversation.stream import Chunk
from edge_gemma.serve.answer import Answer, Observer
from edge_gemma.serve.refusals import Refusal

Clock = Callable[[], float]
RATE_HEADERS = tuple(
    f"x-ratelimit-{what}-{of}"
    for what in ("limit", "remaining", "reset")
    for of in ("requests", "tokens")
)
_SLICES = 60  # of a window: events within one are counted together, so that memory is bounded


@dataclass(frozen=True)
class Rate:
    """At most so many requests and generated tokens within ``window_s``; None: any number."""

    requests: int | None = None
    tokens: int | None = None
    window_s: float = 60.0


@dataclass
class Window:
    """How much happened within the last ``length_s`` seconds, to a 60th of it.

    >>> now = [0.0]
    >>> window = Window(60.0, lambda: now[0])
    >>> window.add(3)
    >>> now[0] = 30.0
    >>> window.add(2)
    >>> window.total(), window.free_in_s(1), window.free_in_s(4)
    (5, 31.0, 61.0)
    >>> now[0] = 61.0
    >>> window.total()
    2
    """

    length_s: float
    clock: Clock = time.monotonic
    _counts: deque[list[float]] = field(default_factory=deque)  # [until when, how many]
    _total: int = 0

    def add(self, n: int) -> None:
        now, slice_s = self.clock(), self.length_s / _SLICES
        # never forgotten early: a slice counts until all of it is old
        until = (math.floor(now / slice_s) + 1) * slice_s + self.length_s
        if self._counts and self._counts[-1][0] == until:
            self._counts[-1][1] += n
        else:
            self._counts.append([until, n])
        self._total += n

    def total(self) -> int:
        now = self.clock()
        while self._counts and self._counts[0][0] <= now:
            self._total -= int(self._counts.popleft()[1])
        return self._total

    def free_in_s(self, n: int) -> float:
        """Seconds until ``n`` of what is counted now are forgotten."""
        left = n
        for until, count in self._counts:
            left -= int(count)
            if left <= 0:
                return until - self.clock() if n else 0.0
        return 0.0


@dataclass
class _Caller:
    rate: Rate
    requests: Window
    tokens: Window


class RateLimits(Observer):
    """The rate of each caller: ``default``, or their own ``by_name``.

    Tokens are counted while they are generated. An answer that has begun is not cut off by them:
    the next request is refused.
    """

    def __init__(
        self,
        default: Rate = Rate(),
        by_name: Mapping[str, Rate] = {},
        clock: Clock = time.monotonic,
    ):
        self._default, self._by_name, self._clock = default, dict(by_name), clock
        self._callers: dict[str, _Caller] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> set[str]:
        """Those who have a rate of their own."""
        return set(self._by_name)

    def admit(self, name: str) -> dict[str, str]:
        """Count a request → the headers of its response. Raises Refusal 429."""
        with self._lock:
            caller = self._caller(name)
            rate = caller.rate
            for what, limit, window in (
                ("requests", rate.requests, caller.requests),
                ("generated tokens", rate.tokens, caller.tokens),
            ):
                if limit is None or (used := window.total()) < limit:
                    continue
                raise Refusal(
                    429,
                    f"{used} {what} within {rate.window_s:g} s; {limit} are allowed",
                    code="rate_limit_exceeded",
                    retry_after_s=max(1.0, window.free_in_s(used - limit + 1)),
                )
            caller.requests.add(1)
            return self._headers(caller)

    def headers(self, name: str) -> dict[str, str]:
        with self._lock:
            return self._headers(self._caller(name))

    def generated(self, answer: Answer, chunk: Chunk) -> None:
        if chunk.token_ids and answer.visit is not None:
            with self._lock:
                self._caller(answer.visit.caller).tokens.add(len(chunk.token_ids))

    def _caller(self, name: str) -> _Caller:
        if name not in self._callers:
            rate = self._by_name.get(name, self._default)
            windows = (Window(rate.window_s, self._clock) for _ in range(2))
            self._callers[name] = _Caller(rate, *windows)
        return self._callers[name]

    def _headers(self, caller: _Caller) -> dict[str, str]:
        headers = {}
        for what, limit, window in (
            ("requests", caller.rate.requests, caller.requests),
            ("tokens", caller.rate.tokens, caller.tokens),
        ):
            if limit is None:
                continue
            used = window.total()
            headers[f"x-ratelimit-limit-{what}"] = str(limit)
            headers[f"x-ratelimit-remaining-{what}"] = str(max(0, limit - used))
            headers[f"x-ratelimit-reset-{what}"] = go_duration(window.free_in_s(used))
        return headers


def go_duration(seconds: float) -> str:
    """As OpenAI writes it.

    >>> [go_duration(value) for value in (0, 0.5, 7.2, 360.4)]
    ['0s', '500ms', '8s', '6m1s']
    """
    if 0 < seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
