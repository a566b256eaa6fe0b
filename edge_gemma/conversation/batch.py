"""Several prompts in one decode per step."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from edge_gemma.conversation.session import Session
from edge_gemma.conversation.stream import Chunk, TextStream, Usage
from edge_gemma.engines.llama.sampler import Sampler
from edge_gemma.options import Sampling
from edge_gemma.spans import Span

if TYPE_CHECKING:
    from edge_gemma.model import Model


class _Lane:
    """One prompt of a batch."""

    def __init__(self, model: Model, index: int, spans: list[Span], options: Sampling):
        self.index, self.options, self._model = index, options, model
        self.session = Session(model.cache)
        self.session.replace(spans)
        self.session.busy = True
        self._prompt_tokens = self.session.length
        seed = None if options.seed is None else (options.seed + index) % 2**32
        self._sampler = Sampler(model.decoder, dataclasses.replace(options, seed=seed))
        self._stream = TextStream(options.stop)
        self.ids: list[int] = []
        self._out: list[Chunk] = []
        self.done = False

    def next_id(self, row: int) -> None:
        decoder, context = self._model.decoder, self._model.cache.context
        token = self._sampler.sample(context, row)
        logprobs = (
            (self._sampler.logprob(context, token, row),)
            if self.options.logprobs is not None
            else ()
        )
        if decoder.is_end(token):
            return self._finish("stop")
        self.ids.append(token)
        self.session._keys.append(token)
        self._out.append(Chunk(self._stream.push(decoder.piece(token)), (token,), logprobs))
        if self._stream.stopped:
            self._finish("stop_string")
        elif len(self.ids) >= self.options.max_tokens:
            self._finish("length")
        elif self.session.length >= self.session.n_ctx:
            self._finish("context")

    def _finish(self, reason: str) -> None:
        usage = Usage(self._prompt_tokens, 0, len(self.ids), self._sampler.seed)
        self._out.append(Chunk(self._stream.finish(), finish_reason=reason, usage=usage))
        self.done = True

    def take(self) -> list[Chunk]:
        out, self._out = self._out, []
        return out

    def close(self) -> None:
        self._sampler.close()
        self.session.busy = False
        self.session.close()
