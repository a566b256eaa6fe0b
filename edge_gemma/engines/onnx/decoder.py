"""A bundle's ``decoder.onnx`` and its vocabulary: what makes contexts and samplers.

The vocabulary, the constraints and the sampler are the llama.cpp engine's, opened without weights:
one sampler for both engines, so equal logits give equal answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_gemma.engines.engine import Embedder
from edge_gemma.engines.llama.decoder import Decoder as LlamaDecoder
from edge_gemma.engines.onnx.context import Context, LoadedGraph
from edge_gemma.errors import UnsupportedModel
from edge_gemma.options import Sampling
from edge_gemma.plan.records import Settings

if TYPE_CHECKING:
    from edge_gemma.engines.llama.sampler import Sampler


class Decoder:
    """Weights in onnxruntime, vocabulary in llama.cpp. Holds no conversation. Owns both."""

    def __init__(self, graph: LoadedGraph, vocabulary: LlamaDecoder, n_ctx_train: int):
        self._graph, self._vocabulary = graph, vocabulary
        self.n_vocab, self.n_embd, self.n_ctx_train = graph.n_vocab, graph.n_embd, n_ctx_train
        self.settings = vocabulary.settings
        self.bos, self.add_bos = vocabulary.bos, vocabulary.add_bos
        self._contexts: set[Context] = set()

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        return self._vocabulary.tokenize(text, special)

    def piece(self, token: int, special: bool = False) -> bytes:
        return self._vocabulary.piece(token, special)

    def is_end(self, token: int) -> bool:
        return self._vocabulary.is_end(token)

    def sampler(self, sampling: Sampling) -> Sampler:
        return self._vocabulary.sampler(sampling)

    def check(self, sampling: Sampling) -> None:
        self._vocabulary.check(sampling)

    def context(self, settings: Settings | None = None, *, n_outputs: int | None = None) -> Context:
        context = Context(
            self._graph,
            settings or self.settings,
            n_outputs=n_outputs,
            on_close=self._contexts.discard,
        )
        self._contexts.add(context)
        return context

    def embedder(self, settings: Settings | None = None) -> Embedder:
        raise UnsupportedModel(
            "the ONNX engine makes no vectors of texts; load with engine='llama'"
        )

    def close(self) -> None:
        for context in list(self._contexts):
            context.close()
        self._graph.close()
        self._vocabulary.close()
