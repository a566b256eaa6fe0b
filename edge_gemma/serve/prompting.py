"""A request → the spans of its prompt, as long as the context has room for them.

In: requests, whose pictures and clips :meth:`Prompting.encoded` makes soft tokens of first. Out:
spans, and how many of the oldest turns were forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_gemma.conversation.fitting import Fitted, fit
from edge_gemma.errors import ContextFull
from edge_gemma.messages import Message, Part
from edge_gemma.prompts.prompt import Listening
from edge_gemma.serve.answer import GenerationRequest
from edge_gemma.spans import Span

if TYPE_CHECKING:
    from edge_gemma.model import Model


class Prompting:
    """The prompts of one model, in a context of ``n_ctx`` tokens."""

    def __init__(self, model: Model, n_ctx: int):
        self._model, self._n_ctx = model, n_ctx

    def encoded(self, request: GenerationRequest) -> GenerationRequest:
        """The request with its pictures and clips as soft tokens. Raises what
        :meth:`Senses.encoded` raises.
        """
        senses, n_reserve = self._model.senses, self._n_reserve(request)

        def encoded(content: str | Sequence[Part]) -> str | Sequence[Part]:
            if isinstance(content, str):
                return content
            return senses.encoded(content, used_tokens=n_reserve)

        if request.prompt is not None:
            return replace(request, prompt=encoded(request.prompt))
        messages = [replace(each, content=encoded(each.content)) for each in request.messages]
        return replace(request, messages=messages)

    def spans(self, request: GenerationRequest) -> tuple[list[Span], int]:
        """The spans, and how many turns were forgotten. Raises ContextFull, UsageError."""
        n_reserve = self._n_reserve(request)
        if request.prompt is not None:
            spans = self._model.spans(request.prompt)
            self._check_length(n_positions(spans), n_reserve)
            return spans, 0

        def render(some: Sequence[Message]) -> list[Span]:
            return self._model.prompt.spans(some, tools=request.tools, pad_audio=request.pad_audio)

        if request.truncate:
            n_ctx = self._n_ctx
            fitted = fit(request.messages, render, n_positions, n_ctx=n_ctx, n_reserve=n_reserve)
            return fitted.rendered, fitted.dropped
        spans = render(request.messages)
        self._check_length(n_positions(spans), n_reserve)
        return spans, 0

    def listening(self, request: GenerationRequest) -> Fitted[Listening]:
        """What stands around a clip that is still being spoken. Raises ContextFull, UsageError."""

        def render(some: Sequence[Message]) -> Listening:
            return self._model.prompt.listening(
                some, tools=request.tools, pad_audio=request.pad_audio
            )

        n_reserve = self._n_reserve(request)
        if not request.truncate:
            self._check_length(_around(render(request.messages)), n_reserve)
        return fit(request.messages, render, _around, n_ctx=self._n_ctx, n_reserve=n_reserve)

    def _n_reserve(self, request: GenerationRequest) -> int:
        """Positions that an answer should find free."""
        return min(request.sampling.max_tokens, self._n_ctx // 4)

    def _check_length(self, n: int, n_reserve: int) -> None:
        n_most = self._n_ctx - min(n_reserve, 64)
        if n > n_most:
            raise ContextFull(
                f"the prompt has {n} tokens; this model's context holds {self._n_ctx}, of which "
                f"{n_most} are for the prompt"
            )


def n_positions(spans: Sequence[Span]) -> int:
    return sum(len(span) for span in spans)


def _around(listening: Listening) -> int:
    """Positions that a spoken turn takes beside its soft tokens."""
    return n_positions(listening.before) + 2 + n_positions(listening.after(0))
