"""A turn that is still being spoken, on its way into a service.

In: 16 kHz samples, from a task of an event loop. Out: an :class:`Answer`. The encoders' thread
makes soft tokens of the samples, the worker prefills them as they come, so that after the last
sample only the encoder's tail and the end of the prompt are left to compute.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np

from edge_gemma.errors import UsageError
from edge_gemma.hearing.encoder import Encoder
from edge_gemma.hearing.samples import RATE_HZ
from edge_gemma.serve.answer import Answer, GenerationRequest


class SpokenAnswer(Answer):
    """Push the samples, finish, and read the answer; :meth:`Service.listen` makes it.

    ``async with`` it, as every :class:`Answer`. One clip holds 30 s at most.
    """

    def __init__(
        self,
        request: GenerationRequest,
        place: int,
        on_closed: Callable[[Answer], None],
        encoders: Executor,
        open_stream: Callable[[], Encoder],
        on_rows: Callable[[], None],
    ):
        super().__init__(request, place, on_closed)
        self._encoders, self._open_stream, self._on_rows = encoders, open_stream, on_rows
        self._stream: Encoder | None = None
        self._rows: list[np.ndarray] = []
        self._spoken = False
        self._n_samples = 0

    @property
    def audio_s(self) -> float:
        return self._n_samples / RATE_HZ

    async def push(self, samples: np.ndarray) -> int:
        """``samples [n]`` float32 at 16 kHz → how many soft tokens they completed. Raises
        MediaError, UnsupportedModel, RuntimeFailure, UsageError (after :meth:`finish`).
        """
        return await self._encoded(samples)

    async def finish(self) -> None:
        """The turn was spoken to its end; the answer begins as soon as it is prefilled."""
        self.asked_s = time.perf_counter()
        await self._encoded(None)

    async def _encoded(self, samples: np.ndarray | None) -> int:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoders, self._encode, samples)

    def _encode(self, samples: np.ndarray | None) -> int:
        if self.stopped:
            return 0
        if self._spoken:
            raise UsageError("the turn was spoken to its end already; begin another one")
        if self._stream is None:
            self._stream = self._open_stream()
        self._n_samples += 0 if samples is None else len(samples)
        rows = self._stream.finish() if samples is None else self._stream.push(samples)
        with self._lock:
            self._rows += [rows] if len(rows) else []
            self._spoken = samples is None
        if len(rows) or self._spoken:
            self._on_rows()
        return len(rows)

    # the worker's side

    @property
    def has_news(self) -> bool:
        """Whether :meth:`take_rows` has something to give."""
        return bool(self._rows) or self._spoken or self.stopped

    def take_rows(self) -> tuple[list[np.ndarray], bool]:
        """The soft tokens ``[k, n_embd]`` since the last call, and whether they were the last."""
        with self._lock:
            rows, self._rows = self._rows, []
            return rows, self._spoken
