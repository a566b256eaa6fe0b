"""Ids → UTF-8-safe text pieces, with timings and a finish reason. Pure: this module knows bytes and
clocks only.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_gemma.options import Logprob


@dataclass(frozen=True)
class Usage:
    """Tokens (or rows) of one generation."""

    prompt_tokens: int  # positions the answer was conditioned on
    reused_tokens: int  # of them, already in the KV cache
    completion_tokens: int
    seed: int
    dropped_turns: int = 0  # oldest turns forgotten to make room
    n_passes: int = 0  # over the weights, behind the prompt's
    forced_tokens: int = 0  # of the answer: a schema left no choice
    drafted_tokens: int = 0  # proposed out of the text itself
    accepted_tokens: int = 0  # of those


@dataclass(frozen=True)
class Timings:
    """Seconds, and positions per second. ``None`` where there was nothing to time."""

    ttft_s: float | None
    prefill_s: float
    prefill_tok_s: float | None
    decode_s: float
    decode_tok_s: float | None


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer.

    The last one has ``finish_reason``: stop (end of turn), stop_string, length (max_tokens),
    context (n_ctx is full) or cancelled; and ``usage`` and ``timings``. Texts joined are the
    answer.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None


class TextStream:
    """Token bytes in, text out: never half a character, and never the beginning of a stop string
    that may still complete.

    >>> stream = TextStream(("END",))
    >>> [stream.push(b) for b in (b"caf\\xc3", b"\\xa9 E", b"ND of it")]
    ['caf', 'é ', '']
    >>> stream.stopped
    True
    """

    def __init__(self, stop: tuple[str, ...] = ()):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop, self._held, self.stopped = stop, "", False

    def push(self, data: bytes) -> str:
        return self._pass(self._decoder.decode(data), final=False)

    def finish(self) -> str:
        """What was held back; bytes that never became a character come as U+FFFD."""
        return self._pass(self._decoder.decode(b"", True), final=True)

    def _pass(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            return text
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = (
            0
            if final
            else max(
                (
                    n
                    for stop in self._stop
                    for n in range(1, len(stop))
                    if self._held.endswith(stop[:n])
                ),
                default=0,
            )
        )
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out
