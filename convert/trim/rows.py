"""Tables by token with only some of their rows, on the way from a checkpoint.

In: a mapping of the whole model, ids that stay. Out: the same mapping with shorter tables, and the
vocabulary, special ids and end tokens by their new numbers. Ids keep their order, so row 0 stays
the padding row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from edge_gemma.convert.gemma import Mapping as TensorMapping
from edge_gemma.convert.gemma import Source
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.convert.vocabulary import Vocabulary

TABLES = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
_GAP_ROWS = 8  # rows between two that stay that are rather read than skipped


@dataclass(frozen=True)
class KeptRows(Source):
    """A table's ``kept`` rows, in their order."""

    kept: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32), compare=False)

    def rows(self, tensors: TensorReader, start: int, stop: int) -> np.ndarray:
        ids = self.kept[start:stop]
        out = np.empty((len(ids), self.n_per_row), np.float32)
        for a, b in _runs(ids):
            first = int(ids[a])
            block = Source.rows(self, tensors, first, int(ids[b - 1]) + 1)
            out[a:b] = block[ids[a:b] - first]
        return out


def _runs(ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of ``ids`` with no large gap inside."""
    breaks = np.flatnonzero(np.diff(ids) > _GAP_ROWS) + 1
    edges = [0, *breaks.tolist(), len(ids)]
    return zip(edges[:-1], edges[1:], strict=True)


def cut_mapping(mapping: TensorMapping, kept: np.ndarray) -> TensorMapping:
    sources = tuple(
        KeptRows(source.name, (source.shape[0], len(kept)), source.parts, source.use, kept=kept)
        if source.name in TABLES
        else source
        for source in mapping.sources
    )
    return replace(mapping, dims=replace(mapping.dims, n_vocab=len(kept)), sources=sources)


def new_ids(kept: np.ndarray) -> dict[int, int]:
    """Id in the whole vocabulary → id among those that stay."""
    return {int(old): new for new, old in enumerate(kept)}


def cut_vocabulary(vocabulary: Vocabulary, kept: np.ndarray) -> Vocabulary:
    ids = new_ids(kept)
    return replace(
        vocabulary,
        tokens=[vocabulary.tokens[i] for i in kept],
        scores=vocabulary.scores[kept],
        types=vocabulary.types[kept],
        special=renamed(vocabulary.special, ids),
    )


def renamed(tokens: Mapping[str, int], ids: Mapping[int, int]) -> dict[str, int]:
    """Named ids by their new numbers; what has no row any more is left out."""
    return {name: ids[i] for name, i in tokens.items() if i in ids}


def renumbered(tokens: Iterable[int], ids: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(ids[i] for i in tokens if i in ids)
