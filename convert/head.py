"""Whether the output head is the token embedding or a matrix of its own.

In: an opened checkpoint. Out: a decision, with what is to be said about it. transformers 5 ties
the two only where they are equal or the head is absent, whatever config.json says; so is done here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_gemma.convert.checkpoint import HEAD, Checkpoint
from edge_gemma.convert.gemma import EMBEDDING, Dims

_VALUES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Head:
    separate: bool
    notes: tuple[str, ...] = ()


def choose_head(checkpoint: Checkpoint, dims: Dims) -> Head:
    """Decide, reading both matrices where config.json ties them and both are there."""
    has_head = HEAD in checkpoint
    if not dims.tied:
        if has_head:
            return Head(True)
        if checkpoint.config.get("tie_word_embeddings") is True:
            return Head(False)  # only the decoder's own section unties it
        return Head(
            False,
            (
                f"config.json says tie_word_embeddings false, but there is no {HEAD}: the token "
                "embedding is the output head, as in every published Gemma",
            ),
        )
    both = has_head and EMBEDDING in checkpoint
    if not both or same_rows(checkpoint, HEAD, checkpoint, EMBEDDING):
        return Head(False)
    return Head(
        True,
        (
            f"{HEAD} differs from the token embedding although config.json does not untie them; "
            "it is kept as the output head, as transformers 5 does",
        ),
    )


def same_rows(one: Checkpoint, name: str, other: Checkpoint, other_name: str) -> bool:
    """Whether two tensors hold the same values, a few rows at a time."""
    shape = one.shape(name)
    if shape != other.shape(other_name):
        return False
    step = max(1, _VALUES_AT_ONCE // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        if not np.array_equal(one.read(name, rows), other.read(other_name, rows)):
            return False
    return True
