"""What a service asks before and after it generates. guard/content.py is one."""

from __future__ import annotations

from typing import Protocol

from edge_gemma.serve.answer import Answer, GenerationRequest, Screen


class Rules(Protocol):
    """What may be asked and answered. ``check`` and ``judge`` raise EdgeGemmaError."""

    judges: bool  # whether judge does anything

    def check(self, request: GenerationRequest) -> None:
        """At once, in the event loop."""

    def judge(self, request: GenerationRequest) -> None:
        """What takes a while, in the thread of the encoders."""

    def screen(self, answer: Answer) -> Screen | None:
        """What stands between an answer and its reader."""
