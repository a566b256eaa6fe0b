"""One HTTP request, as those who count and log see it. Knows no protocol and no route."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

NOBODY = "anyone"  # the caller's name where there are no tokens


@dataclass(eq=False)
class Visit:
    """``caller`` is the name of the token; ``status`` what was answered, None while nothing was.

    Tokens are those of all answers that the request asked for, as far as they were generated.
    """

    id: str
    method: str
    path: str
    client: str = ""
    caller: str = NOBODY
    status: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)  # names of content rules that spoke
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None

    @property
    def seconds(self) -> float:
        return (self.ended_s or time.monotonic()) - self.started_s


# the request that the running task answers
current_visit: ContextVar[Visit | None] = ContextVar("current_visit", default=None)
