"""Texts → vectors, with the prompts and the length that an embedding bundle asks for.

In: texts, a bundle's embedding part, a decoder. Out: vectors ``[n, width]`` float32. Short texts
share a pass over the weights. What it does not know: llama.cpp, files, chats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edge_gemma.bundles.manifest import EmbeddingPart, Manifest, require_embedding
from edge_gemma.engines.engine import Embedder, Weights
from edge_gemma.errors import UsageError
from edge_gemma.plan.records import EMBED_TEXTS

# Texts of one pass attend to all its tokens before the mask takes the others away, so a pass of
# many texts stays short
_PASS_TOKENS = 256
_SMALLEST_NORM = 1e-12  # what a vector is divided by at least, as in PyTorch's normalize


class TextEmbedder:
    """Embeds for one bundle. Close it. Raises UnsupportedModel (the bundle generates text)."""

    def __init__(self, manifest: Manifest, weights: Weights):
        self._part: EmbeddingPart = require_embedding(manifest)
        self._tokens, self._weights = manifest.special_tokens, weights
        self._embedder: Embedder = weights.decoder.embedder()

    @property
    def max_tokens(self) -> int:
        """The longest text in tokens, its prompt and begin and end of sequence included."""
        return min(self._part.max_tokens, self._embedder.settings.n_ctx)

    def embed(
        self,
        texts: Sequence[str],
        *,
        kind: str | None = None,
        dimensions: int | None = None,
        truncate: bool = False,
    ) -> np.ndarray:
        """See :meth:`edge_gemma.model.Model.embed`."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UsageError("embed takes a list of texts; for one text give a list with it alone")
        width = self._width(dimensions)
        prompt = self._prompt(kind)
        rows = [self._ids(i, prompt + text, truncate) for i, text in enumerate(texts)]
        vectors = np.zeros((len(rows), self._part.width), np.float32)
        for indices in _passes(rows, self._embedder.settings.n_ctx):
            vectors[indices] = self._embedder.embed([rows[i] for i in indices])
        self._weights.trim()
        vectors = vectors[:, :width]
        # a vector that was cut is normalised again
        return normalised(vectors) if self._part.normalize else np.ascontiguousarray(vectors)

    def _width(self, dimensions: int | None) -> int:
        if dimensions is None:
            return self._part.width
        if isinstance(dimensions, bool) or dimensions not in self._part.dimensions:
            choices = ", ".join(map(str, self._part.dimensions))
            raise UsageError(f"dimensions is {dimensions!r}; this model's vectors have {choices}")
        return dimensions

    def _prompt(self, kind: str | None) -> str:
        name = kind if kind is not None else self._part.default_prompt
        if name is None:
            return ""
        if name not in self._part.prompts:
            choices = ", ".join(self._part.prompts) or "none"
            raise UsageError(f"kind is {name!r}; this model's prompts are {choices}")
        return self._part.prompts[name]

    def _ids(self, index: int, text: str, truncate: bool) -> list[int]:
        """The ids of one text. Control tokens written in it count as such: so it is in
        sentence-transformers, and no answer is at stake.
        """
        part = self._part
        begin = [self._tokens["bos"]] if part.add_bos else []
        end = [self._tokens["eos"]] if part.add_eos else []
        ids = self._weights.decoder.tokenize(text, True)
        room = self.max_tokens - len(begin) - len(end)
        if len(ids) > room and not truncate:
            raise UsageError(
                f"text {index} has {len(ids) + len(begin) + len(end)} tokens with its prompt, "
                f"{self.max_tokens} fit; split it, load with a larger n_ctx (at most "
                f"{part.max_tokens}), or cut it with truncate=True"
            )
        ids = begin + ids[:room] + end
        if not ids:
            raise UsageError(f"text {index} is empty; there is nothing to embed")
        return ids

    def close(self) -> None:
        self._embedder.close()


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Each row divided by its length: ``[n, width]`` float32.

    >>> normalised(np.array([[3.0, 4.0]], np.float32)).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, np.float32(_SMALLEST_NORM))).astype(np.float32)


def _passes(rows: Sequence[Sequence[int]], n_ctx: int) -> Iterator[list[int]]:
    """Indices of the rows that are computed together: texts of like length, at most _PASS_TOKENS
    ids unless one text alone has more.

    >>> list(_passes([[1] * 200, [1] * 10, [1] * 300, [1] * 40], n_ctx=512))
    [[1, 3, 0], [2]]
    """
    limit = min(_PASS_TOKENS, n_ctx)
    group: list[int] = []
    n_tokens = 0
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if group and (n_tokens + len(rows[i]) > limit or len(group) == EMBED_TEXTS):
            yield group
            group, n_tokens = [], 0
        group.append(i)
        n_tokens += len(rows[i])
    if group:
        yield group
