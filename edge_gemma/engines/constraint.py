"""What an answer may say next: the interface that a sampler asks before each token.

A :class:`Constraint` belongs to one answer. It works on ids of the vocabulary alone, so it serves
every engine; :class:`TokenTable` is what it needs to know of a vocabulary. The mask has one bit for
each id: bit ``id % 32`` of word ``id // 32``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class TokenTable:
    """A vocabulary: the bytes of every id, the ids that are no text (control tokens and what is
    never sampled), those that end an answer, and text → ids as the model reads it.
    """

    pieces: Sequence[bytes]
    control_ids: Sequence[int]
    end_ids: Sequence[int]
    tokenize: Callable[[str], list[int]]


class Constraint(Protocol):
    """Where one answer stands in its schema."""

    def allowed(self) -> np.ndarray:
        """The ids that may come next, as mask words ``[⌈n_vocab / 32⌉]`` uint32. The array is
        valid until the next call. Raises RuntimeFailure when the schema became too large to follow.
        """

    def accept(self, token: int) -> None:
        """``token`` comes next; one of those that :meth:`allowed` gave. Raises RuntimeFailure."""

    def begin(self, text: str) -> bool:
        """Whether an answer may begin with ``text``, which was said already; then it goes on from
        there. Otherwise the constraint is of no more use.
        """

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""

    def forced_tokens(self) -> list[int]:
        """The ids that must come next whatever the model says; empty where there is a choice."""


def ids_in(words: np.ndarray) -> np.ndarray:
    """The ids of a mask, in order, ``[n]`` int32. Empty words cost next to nothing.

    >>> ids_in(np.array([0b101, 0, 1 << 31], np.uint32))
    array([ 0,  2, 95], dtype=int32)
    """
    filled = np.flatnonzero(words).astype(np.int32)
    bits = np.unpackbits(words[filled].view(np.uint8), bitorder="little")
    positions = np.flatnonzero(bits).astype(np.int32)
    return filled[positions >> 5] * 32 + (positions & 31)


def mask_of(ids: Sequence[int] | np.ndarray, n_vocab: int) -> np.ndarray:
    """Ids → mask words ``[⌈n_vocab / 32⌉]`` uint32.

    >>> mask_of([0, 2, 33], 40)
    array([5, 2], dtype=uint32)
    """
    bits = np.zeros(-(-n_vocab // 32) * 32, np.uint8)
    bits[np.asarray(ids, np.intp)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)
