"""A turn that is still being spoken, on its way into a service.

In: 16 kHz samples, from a task of an event loop. Out: an :class:`Answer`. The encoders' thread
makes soft tokens of the samples, the worker prefills them as they come, so that after the last
sample only the encoder's tail and the end of the prompt are left to compute. Where the plan hears
first, a decode would close the encoder: samples are kept until this turn has its lane, and nothing
is prefilled before the last of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np

from edge_gemma.errors import EdgeGemmaError, MediaError, UsageError
from edge_gemma.hearing.encoder import Encoder
from edge_gemma.hearing.samples import MAX_CLIP_S, MAX_CLIP_SAMPLES, RATE_HZ
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
        waits: bool = False,
    ):
        super().__init__(request, place, on_closed)
        self._encoders, self._open_stream, self._on_rows = encoders, open_stream, on_rows
        self._stream: Encoder | None = None
        self._rows: list[np.ndarray] = []
        self._spoken = False
        self._n_samples = 0
        self._waits = waits  # for its lane, before anything is encoded
        self._kept: list[np.ndarray | None] = []  # what came until then; None: the end
        self._failed: EdgeGemmaError | None = None  # in what was kept

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
        if self._spoken or (self._kept and self._kept[-1] is None):
            raise UsageError("the turn was spoken to its end already; begin another one")
        self._n_samples += 0 if samples is None else len(samples)
        if self._waits:
            if self._n_samples > MAX_CLIP_SAMPLES:
                raise MediaError(f"the clip has more than {MAX_CLIP_S} s; cut it in pauses")
            self._kept.append(samples)
            return 0
        return self._made_rows(samples)

    def _made_rows(self, samples: np.ndarray | None) -> int:
        if self._stream is None:
            self._stream = self._open_stream()
        rows = self._stream.finish() if samples is None else self._stream.push(samples)
        with self._lock:
            self._rows += [rows] if len(rows) else []
            self._spoken = samples is None
        if len(rows) or self._spoken:
            self._on_rows()
        return len(rows)

    def _catch_up(self) -> None:
        """The lane is there: encode what was kept."""
        self._waits = False
        kept, self._kept = self._kept, []
        try:
            for samples in kept:
                if not self.stopped:
                    self._made_rows(samples)
        except EdgeGemmaError as error:
            self._failed = error
            self._on_rows()

    # the worker's side

    def has_lane(self) -> None:
        """From now on nobody else decodes until this turn ends."""
        if self._waits:
            self._encoders.submit(self._catch_up)

    @property
    def has_news(self) -> bool:
        """Whether :meth:`take_rows` has something to give."""
        return bool(self._rows) or self._spoken or self.stopped or self._failed is not None

    def take_rows(self) -> tuple[list[np.ndarray], bool]:
        """The soft tokens ``[k, n_embd]`` since the last call, and whether they were the last.
        Raises what went wrong in samples that were kept.
        """
        if self._failed is not None:
            raise self._failed
        with self._lock:
            rows, self._rows = self._rows, []
            return rows, self._spoken
