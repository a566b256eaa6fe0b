"""A stream of sound → the wake words in it, as Wyoming's wake sends them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from wyoming.event import Eventable
from wyoming.wake import Detection, NotDetected

from edge_gemma.errors import UsageError
from edge_gemma.hearing.samples import RATE_HZ
from edge_gemma.hearing.wake_word import WakeWord, wake_word

Send = Callable[[Eventable], Awaitable[None]]


class WakeWords:
    """One stream, listened to for ``names`` (none: all of ``known``). Raises UsageError."""

    def __init__(self, names: Sequence[str], known: Sequence[str], send: Send):
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise UsageError(
                f"no wake word {', '.join(map(repr, unknown))}; known are {', '.join(known)}"
            )
        self._words: dict[str, WakeWord] = {name: wake_word(name) for name in names or known}
        self._send = send
        self._n_samples = 0
        self._detected = False

    async def push(self, samples: np.ndarray) -> None:
        """``samples [n]`` float32 at 16 kHz; a ``detection`` is sent for each word they end."""
        self._n_samples += len(samples)
        for name in await asyncio.to_thread(self._heard, samples):
            self._detected = True
            await self._send(Detection(name, timestamp=self._n_samples * 1000 // RATE_HZ))

    def _heard(self, samples: np.ndarray) -> list[str]:
        return [name for name, heard in self._words.items() if heard(samples)]

    async def finish(self) -> None:
        if not self._detected:
            await self._send(NotDetected())

    async def wait(self) -> None:
        pass  # everything was sent by then

    def close(self) -> None:
        self._words.clear()
