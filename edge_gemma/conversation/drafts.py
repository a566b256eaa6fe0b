"""Drafts out of the text itself: what followed the last few tokens when they stood there before.

In: the tokens of a prompt and its answer. Out: a few tokens that may come next. One decode verifies
them all, and each is still sampled from its own row of logits, so a draft never decides what is
said, only how many passes that takes. This module knows no engine.

Drafts pay where answers quote or edit their prompt, and cost where they are rejected. So an account
is kept in passes over one token: a pass over a draft costs what was measured on this machine, each
token that it yields gives back one. Nothing is proposed while it is overdrawn by more than
:data:`FREE_LOSS` passes and :data:`ALLOWED_LOSS` of what was generated.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_gemma.conversation.positions import Key

FIRST_DRAFT = 3
NGRAM = 3  # tokens that must agree: fewer are often an accident
FREE_LOSS, ALLOWED_LOSS = 0.5, 0.01
# of a pass over n tokens, in passes over one, until it was measured: it rises so on a CPU
_GUESSED_RISE = 0.4
_SMOOTHING = 0.2
_MAX_SAVED = 8.0  # passes that earlier gains may be overdrawn by


class PassCosts:
    """Seconds of a pass by how many tokens it took, smoothed while a model runs."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def record(self, n_tokens: int, seconds: float) -> None:
        """A pass over ``n_tokens`` of one sequence."""
        before = self._seconds.get(n_tokens, seconds)
        # a pass that was interrupted by something else says nothing: at most twice the usual
        seconds = min(seconds, 2 * before)
        self._seconds[n_tokens] = before + _SMOOTHING * (seconds - before)

    def of(self, n_tokens: int) -> float:
        """In passes over one token.

        >>> costs = PassCosts()
        >>> costs.record(1, 0.010), costs.record(4, 0.022)
        (None, None)
        >>> costs.of(4)
        2.2
        """
        one = self._seconds.get(1)
        if one is None or n_tokens == 1 or not self._seconds.keys() - {1}:
            return 1 + _GUESSED_RISE * (n_tokens - 1)
        nearest = min(self._seconds.keys() - {1}, key=lambda n: abs(n - n_tokens))
        rise = (self._seconds[nearest] / one - 1) / (nearest - 1)
        return round(1 + rise * (n_tokens - 1), 3)


class Drafts:
    """What the answers of one model share: ``n_most`` tokens are proposed at a time."""

    def __init__(self, n_most: int):
        self.n_most, self.costs = n_most, PassCosts()


class Lookup:
    """Drafts for one answer; ``n_most`` tokens at a time."""

    def __init__(self, costs: PassCosts, n_most: int):
        self._costs, self._n_most = costs, n_most
        self._size = min(FIRST_DRAFT, n_most)
        self._behind: dict[tuple[Key, ...], int] = {}  # n-gram → what follows it last
        self._n_indexed = 0
        self._saved = 0.0  # passes over one token
        self._n_tokens = 0

    def propose(self, keys: Sequence[Key], n_room: int) -> list[int]:
        """What may follow ``keys``, ``n_room`` tokens at most; empty where nothing is known, or
        where drafts cost more than they give.
        """
        self._index(keys)
        n = min(self._size, n_room)
        if n < 1 or len(keys) < NGRAM or not self._may_spend():
            return []
        start = self._behind.get(tuple(keys[-NGRAM:]))
        if start is None:
            return []
        draft = []
        for key in keys[start : start + n]:
            if not isinstance(key, int):
                break
            draft.append(key)
        return draft

    def _index(self, keys: Sequence[Key]) -> None:
        """Every n-gram that something follows."""
        for end in range(max(NGRAM, self._n_indexed), len(keys)):
            self._behind[tuple(keys[end - NGRAM : end])] = end
        self._n_indexed = max(self._n_indexed, len(keys))

    def _may_spend(self) -> bool:
        return self._saved >= -(FREE_LOSS + ALLOWED_LOSS * self._n_tokens)

    def judged(self, n_proposed: int, n_accepted: int) -> None:
        """A pass took place: ``n_accepted`` of the proposed tokens came, and one more."""
        self._n_tokens += n_accepted + 1
        if not n_proposed:
            return
        saved = self._saved + n_accepted + 1 - self._costs.of(n_proposed + 1)
        self._saved = min(saved, _MAX_SAVED)
        if n_accepted == n_proposed:
            self._size = min(2 * self._size + 1, self._n_most)
        else:
            self._size = min(max(n_accepted + 1, FIRST_DRAFT), self._n_most)
