"""What stays with a token: every piece on the way of its merges.

A text is tokenized by joining two neighbours again and again, the pair whose piece has the best
score first and of equal ones the leftmost (sentencepiece's BPE; llama.cpp's ``llm_tokenizer_spm``).
Where every piece that is made on the way stays, a smaller vocabulary takes the same way: what is
gone only takes candidates away that had lost. The borders of the tokens are never crossed, so the
way inside a token is that of its own characters alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class Merges:
    """The merges of a vocabulary: ``tokens`` as they are spelled, ``scores`` (higher first)."""

    def __init__(self, tokens: Sequence[bytes], scores: np.ndarray):
        self.ids: dict[str, int] = {}
        self.twins: dict[int, list[int]] = {}  # id → the others of the same spelling
        for i, token in enumerate(tokens):
            text = token.decode("utf-8", "surrogatepass")
            if text in self.ids:
                self.twins.setdefault(self.ids[text], []).append(i)
            self.ids.setdefault(text, i)
        self._texts = list(tokens)
        self._scores = scores.tolist()

    def path(self, text: str) -> list[str]:
        """The pieces that are made while ``text`` (no spaces, but ``▁``) is joined, in order; the
        last is the text itself where it is a token that can be reached.

        >>> merges = Merges([b"a", b"b", b"c", b"bc", b"abc"], np.array([-9, -9, -9, -1, -2]))
        >>> merges.path("abc")
        ['bc', 'abc']
        """
        symbols, ids, scores = list(text), self.ids, self._scores
        made: list[str] = []
        while len(symbols) > 1:
            best, at, joined = None, -1, ""
            for i in range(len(symbols) - 1):
                pair = symbols[i] + symbols[i + 1]
                token = ids.get(pair)
                if token is not None and (best is None or scores[token] > best):
                    best, at, joined = scores[token], i, pair
            if best is None:
                break
            symbols[at : at + 2] = [joined]
            made.append(joined)
        return made

    def with_paths(self, tokens: Iterable[int]) -> set[int]:
        """``tokens`` and all that is made on the way to them, twins too."""
        kept: set[int] = set()
        for token in tokens:
            kept.update(self.group(token))
        return kept

    def group(self, token: int) -> list[int]:
        """``token`` and all that is made on the way to it."""
        text = self._texts[token].decode("utf-8", "surrogatepass")
        found = [token, *(self.ids[piece] for piece in self.path(text))]
        return [*found, *(twin for i in found for twin in self.twins.get(i, ()))]
