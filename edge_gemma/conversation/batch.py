"""Several prompts in one decode per step.

In: prompts as spans. Out: ``(index, chunk)`` as they come, from as many prompts at a time as the KV
cache has sequences.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Generator, Sequence

from edge_gemma.conversation.generation import Lane, TokenLoop
from edge_gemma.conversation.sequences import Sequences
from edge_gemma.conversation.session import Session
from edge_gemma.conversation.stream import Chunk
from edge_gemma.options import Sampling
from edge_gemma.spans import Span


class Batch:
    """An iterator of ``(index, chunk)``; the last chunk of each prompt has a finish reason, usage
    and timings. A seed that is given counts up with the prompt's index.

    :meth:`cancel`, from any thread, ends every prompt: those that run end as cancelled, those that
    wait do not begin. Closing it (or leaving its ``with``) stops at once.
    """

    def __init__(self, sequences: Sequences, prompts: Sequence[Sequence[Span]], sampling: Sampling):
        self._sequences, self._sampling = sequences, sampling
        self._waiting = deque(enumerate(prompts))
        self._sessions: dict[int, tuple[int, Session]] = {}  # by the lane's index
        self._cancelled = threading.Event()
        self._chunks = self._run()

    def _run(self) -> Generator[tuple[int, Chunk], None, None]:
        sequences = self._sequences
        loop = TokenLoop(sequences.decoder, sequences.context, sequences.weights)
        n_lanes = sequences.context.settings.n_seq_max
        try:
            while self._waiting or loop.n_active:
                while self._waiting and loop.n_active < n_lanes and not self._cancelled.is_set():
                    self._begin(loop, *self._waiting.popleft())
                if self._cancelled.is_set():
                    self._waiting.clear()
                for lane, chunk in loop.step():
                    if lane.error is not None:
                        raise lane.error
                    index = self._sessions[lane.index][0]
                    if chunk.finish_reason:
                        self._end(lane)
                    yield index, chunk
        finally:
            loop.close()
            for _, session in self._sessions.values():
                session.close()
            self._sessions.clear()

    def _begin(self, loop: TokenLoop, index: int, prompt: Sequence[Span]) -> None:
        session = Session(self._sequences, remember=False)
        session.replace(prompt)
        seed = self._sampling.seed
        if seed is not None:
            seed = (seed + index) % 2**32
        lane = loop.add(session, dataclasses.replace(self._sampling, seed=seed))
        self._sessions[lane.index] = index, session

    def _end(self, lane: Lane) -> None:
        _, session = self._sessions.pop(lane.index)
        session.close()

    def cancel(self) -> None:
        """End every prompt, from any thread."""
        self._cancelled.set()
        for _, session in list(self._sessions.values()):
            session.cancel()

    def close(self) -> None:
        """Stop at once; nothing more comes."""
        self._waiting.clear()
        self._chunks.close()

    def __iter__(self) -> Batch:
        return self

    def __next__(self) -> tuple[int, Chunk]:
        return next(self._chunks)

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
