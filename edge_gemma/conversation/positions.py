"""What stands at each position of a conversation: a token id, or one of a block's embedding rows.

In: spans. Out: how far two contents agree, and stretches to decode in one pass each. Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import takewhile

import numpy as np

from edge_gemma.spans import Rows, Span, Tokens

Key = int | tuple[str, int]  # a token id, or (digest, index) of an embedding row


class Positions:
    """Spans in the order they were appended, position by position.

    >>> positions = Positions([Tokens([2, 300]), Rows(np.ones((3, 8)))])
    >>> len(positions), positions.shared_with(Positions([Tokens([2, 300, 301])]))
    (5, 2)
    """

    def __init__(self, spans: Sequence[Span] = ()):
        self.keys: list[Key] = []
        self.blocks: dict[str, Rows] = {}
        self.extend(spans)

    def __len__(self) -> int:
        return len(self.keys)

    def extend(self, spans: Sequence[Span]) -> None:
        for span in spans:
            if isinstance(span, Tokens):
                self.keys += span.ids
            else:
                self.blocks[span.digest] = span
                self.keys += [(span.digest, i) for i in range(len(span))]

    def shorten(self, n: int) -> None:
        """Forget all but the first ``n`` positions."""
        del self.keys[n:]
        used = {key[0] for key in self.keys if not isinstance(key, int)}
        self.blocks = {digest: rows for digest, rows in self.blocks.items() if digest in used}

    def codes(self) -> np.ndarray:
        """A number for each position, ``[n]`` int64: the token id, or a negative one that stands
        for an embedding row by its digest.
        """
        first_of: dict[str, int] = {}
        values = []
        for key in self.keys:
            if not isinstance(key, int):
                digest, index = key
                if digest not in first_of:
                    hashed = hashlib.blake2b(digest.encode(), digest_size=7).digest()
                    first_of[digest] = int.from_bytes(hashed, "little") + 1
                key = -first_of[digest] - index
            values.append(key)
        return np.array(values, np.int64)

    def shared_with(self, other: Positions) -> int:
        """How many positions at the beginning are the same in both."""
        pairs = zip(self.keys, other.keys, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def block_start(self, position: int) -> int:
        """``position``, or the first position of the block there whose rows attend to each other:
        such rows are decoded together or not at all.
        """
        if position >= len(self.keys):
            return position
        key = self.keys[position]
        if isinstance(key, int) or self.blocks[key[0]].causal:
            return position
        return position - key[1]

    def last_start(self) -> int:
        """The last position, or the start of a last block whose rows attend to each other."""
        return self.block_start(len(self.keys) - 1) if self.keys else 0

    def runs(self, start: int, end: int) -> Iterator[tuple[int, Span]]:
        """Positions ``start … end`` as spans: neighbouring ids together, neighbouring causal rows
        together, a block of other rows by itself.

        Every span is a pass over all weights, so rows that came in pieces (a clip while it is
        spoken) must not stay in pieces.
        """
        position = start
        while position < end:
            stop = position + 1
            while stop < end and self._joins(stop):
                stop += 1
            yield position, self._span(position, stop)
            position = stop

    def _joins(self, position: int) -> bool:
        """Whether this position is decoded in one span with the one before it."""
        before, key = self.keys[position - 1], self.keys[position]
        if isinstance(before, int) or isinstance(key, int):
            return isinstance(before, int) and isinstance(key, int)
        if self.blocks[before[0]].causal and self.blocks[key[0]].causal:
            return True
        return key == (before[0], before[1] + 1)

    def _span(self, start: int, stop: int) -> Span:
        keys = self.keys[start:stop]
        ids = [key for key in keys if isinstance(key, int)]
        if ids:
            return Tokens(tuple(ids))
        places = [key for key in keys if not isinstance(key, int)]
        rows = np.stack([self.blocks[digest].rows[i] for digest, i in places])
        return Rows(rows, self.blocks[places[0][0]].causal)
