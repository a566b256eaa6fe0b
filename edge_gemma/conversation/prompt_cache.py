"""States of the KV cache that were kept, so that a prompt which begins like an earlier one is
restored instead of prefilled.

In: what stands at each position (:meth:`Positions.codes`), and the engine's bytes of a sequence.
Out: the longest beginning of a prompt that can be taken up again. Two kinds are kept. A *state* is
a whole sequence. A *window* is what the sliding layers held at one position, the only part that is
lost as a conversation goes on: together with a sequence, or a state, that reaches at least as far,
it leads back to its position exactly.

Memory is bounded by what was planned; what was used longest ago goes first. States may lie on disk
as well (prompt_files.py). This module knows no engine and no turns.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edge_gemma.conversation.prompt_files import PromptFiles
from edge_gemma.engines.engine import Buffer

log = logging.getLogger("edge_gemma.prompt_cache")

CHECKPOINT_EVERY = 512  # positions: so many are prefilled again at most, where windows are kept
MIN_STATE = 64  # positions; shorter prompts are prefilled as fast as they are restored
WINDOW_SHARE = 1 / 3  # of the memory
MIN_LONG = 2 * CHECKPOINT_EVERY  # positions
MIN_FILE = 256  # positions; what takes a moment to prefill is not worth a file


@dataclass(frozen=True, eq=False)
class Kept:
    """``data`` are the engine's bytes at position ``len(codes)``."""

    codes: np.ndarray  # [n] int64
    data: Buffer
    is_window: bool

    @property
    def position(self) -> int:
        return len(self.codes)

    @property
    def nbytes(self) -> int:
        return len(self.data) + self.codes.nbytes


@dataclass(frozen=True)
class Found:
    """How to reach ``position``: restore ``state`` (None: the sequence holds enough itself), then
    go back with ``window`` (None: the state ends there, or one position behind).
    """

    position: int
    state: Kept | None
    window: Kept | None

    @property
    def parts(self) -> tuple[Kept, ...]:
        return tuple(part for part in (self.state, self.window) if part is not None)


class PromptCache:
    """Kept states, ``max_bytes`` of them in memory; ``files`` None: nothing on disk.

    >>> cache = PromptCache(1000)
    >>> cache.keep(np.arange(100), b"state")
    >>> cache.find(np.arange(120)).position, cache.find(np.arange(50)) is None
    (100, True)
    """

    def __init__(self, max_bytes: int, files: PromptFiles | None = None):
        self.max_bytes, self._files = max_bytes, files
        self._kept: list[Kept] = []  # used longest ago first
        self._lock = threading.RLock()

    @property
    def total_bytes(self) -> int:
        with self._lock:
            return sum(kept.nbytes for kept in self._kept)

    def make_room(self, n_bytes: int, *, window: bool = False) -> bool:
        """Let go of so much that ``n_bytes`` more fit; False when they never do. Before they are
        allocated, so that the plan holds at every moment.

        Windows come often and serve only who edits: where they take more than their share, they
        go before states.
        """
        if n_bytes > self.max_bytes:
            return False
        with self._lock:
            while self.total_bytes + n_bytes > self.max_bytes:
                windows = [kept for kept in self._kept if kept.is_window]
                states = [kept for kept in self._kept if not kept.is_window]
                in_windows = sum(kept.nbytes for kept in windows) + window * n_bytes
                too_many = in_windows > WINDOW_SHARE * self.max_bytes
                self._kept.remove((windows if windows and too_many else states or windows)[0])
        return True

    def holds(self, codes: np.ndarray) -> bool:
        """Whether a state ends exactly behind ``codes``. It counts as used now."""
        with self._lock:
            for kept in self._kept:
                if not kept.is_window and np.array_equal(kept.codes, codes):
                    self._use(kept)
                    return True
        return False

    def keep(self, codes: np.ndarray, state: Buffer, *, on_disk: bool = False) -> None:
        """A sequence's state behind ``codes``. States of its beginnings are let go: it contains
        them, with the windows that were kept.
        """
        kept = Kept(codes, state, is_window=False)
        with self._lock:
            self._kept = [
                old
                for old in self._kept
                if old.is_window or shared(old.codes, codes) < old.position
            ]
            self._add(kept)
        if on_disk and self._files is not None and len(codes) >= MIN_FILE:
            self._files.put(codes, state)

    def keep_window(self, codes: np.ndarray, window: Buffer) -> None:
        with self._lock:
            self._kept = [
                old
                for old in self._kept
                if not (old.is_window and np.array_equal(old.codes, codes))
            ]
            self._add(Kept(codes, window, is_window=True))

    def _add(self, kept: Kept) -> None:
        if self.make_room(kept.nbytes, window=kept.is_window):
            self._kept.append(kept)

    def _use(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self._kept.append(kept)

    def find(self, codes: np.ndarray, n_live: int = 0) -> Found | None:
        """The longest beginning of ``codes`` that can be taken up. ``n_live``: positions of it that
        the sequence itself still holds, all but the windows.
        """
        with self._lock:
            best = max(self._candidates(codes, n_live), key=_worth, default=None)
            if best is not None:
                for kept in best.parts:
                    self._use(kept)
        position = 0 if best is None else best.position
        if self._files is None or max(position, n_live) >= len(codes):
            return best
        state = self._files.longest(codes, longer_than=max(position, MIN_FILE - 1))
        if state is None or not self.make_room(state.n_bytes):
            return best
        read = state.read()
        if read is None:
            return best
        kept = Kept(codes[: state.n_positions].copy(), read, is_window=False)
        with self._lock:
            self._add(kept)
        return Found(kept.position, kept, None)

    def _candidates(self, codes: np.ndarray, n_live: int) -> Iterator[Found]:
        states = [(kept, shared(kept.codes, codes)) for kept in self._kept if not kept.is_window]
        for state, n_shared in states:
            if n_shared >= state.position - 1:  # its window reaches one step back
                yield Found(n_shared, state, None)
        farthest, n_reached = max(states, key=lambda item: item[1], default=(None, 0))
        for window in self._kept:
            n = window.position
            if not window.is_window or shared(window.codes, codes) < n:
                continue
            if n <= n_live:
                yield Found(n, None, window)
            elif n <= n_reached:
                yield Found(n, farthest, window)

    def forget(self, found: Found) -> None:
        """The engine refused it."""
        log.warning("a kept state of %d positions was refused and is forgotten", found.position)
        with self._lock:
            self._kept = [kept for kept in self._kept if kept not in found.parts]

    def close(self) -> None:
        """Wait for what is being written."""
        with self._lock:
            self._kept.clear()
        if self._files is not None:
            self._files.close()


def _worth(found: Found) -> tuple[int, int]:
    """The longest; among equals what moves the fewest bytes."""
    return found.position, -sum(part.nbytes for part in found.parts)


def shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many elements at the beginning are the same.

    >>> shared(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
    2
    """
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
