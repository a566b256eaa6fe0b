"""How long the model stays in memory while nobody asks for it, and its way back.

In: requests that begin and end, and what they say of ``keep_alive``. Out: a service that has its
model whenever a request needs it. The way back goes through the plan: what does not fit by then is
refused, and the next request tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edge_gemma.errors import PlanRefused, ServiceBusy, UsageError

if TYPE_CHECKING:
    from edge_gemma.model import Model
    from edge_gemma.serve.service import Service

log = logging.getLogger("edge_gemma.serve")
FOREVER = math.inf
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(ns|us|µs|ms|s|m|h)")


def parse_keep_alive(value: float | str) -> float:
    """Seconds; FOREVER for what is negative. A text is a number of seconds or a duration as Go
    writes it. Raises UsageError.

    >>> parse_keep_alive("1h30m"), parse_keep_alive(300), parse_keep_alive("-1")
    (5400.0, 300.0, inf)
    """
    if isinstance(value, str):
        seconds = _seconds(value.strip())
    else:
        seconds = float(value)
    if math.isnan(seconds):
        raise UsageError(
            f"keep_alive is {str(value)[:40]!r}; expected seconds, or a duration such as 5m, "
            "1h30m, 0 (unload at once) or -1 (never)"
        )
    return FOREVER if seconds < 0 else seconds


def _seconds(text: str) -> float:
    """NaN for what is no duration."""
    with contextlib.suppress(ValueError):
        return float(text)
    digits = text[1:] if text[:1] in "+-" else text
    found = list(_DURATION.finditer(digits[:100]))
    if not found or "".join(piece[0] for piece in found) != digits:
        return math.nan
    seconds = sum(float(piece[1]) * _UNITS_S[piece[2]] for piece in found)
    return -seconds if text.startswith("-") else seconds


class Residence:
    """``reopen`` plans and loads the model anew; ``keep_alive_s`` counts where a request says
    nothing. Used by the tasks of one event loop.
    """

    def __init__(
        self, service: Service, reopen: Callable[[], Model], keep_alive_s: float = FOREVER
    ):
        self._service, self._reopen, self._default_s = service, reopen, keep_alive_s
        self._keep_s = keep_alive_s
        self._moving = asyncio.Lock()  # the model comes or goes
        self._changed = asyncio.Event()
        self._n_using = 0
        self._last_used_s = time.monotonic()

    @property
    def loaded(self) -> bool:
        return not self._service.parked

    @property
    def left_s(self) -> float:
        """Until it goes, if nobody asks for it before."""
        return max(0.0, self._last_used_s + self._keep_s - time.monotonic())

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """It does not go in here, if it is there; :meth:`load` says whether it is."""
        self._n_using += 1
        try:
            yield
        finally:
            self._n_using -= 1
            self._last_used_s = time.monotonic()
            self._changed.set()

    async def load(self, keep_alive_s: float | None = None) -> float:
        """Have the model in memory, inside :meth:`using` → how many seconds its way back took; 0
        where it was there. Raises ServiceBusy (it does not fit now), BundleError, RuntimeFailure.
        """
        self.keep(keep_alive_s)
        async with self._moving:
            if self.loaded:
                return 0.0
            began_s = time.perf_counter()
            try:
                model = await asyncio.to_thread(self._reopen)
            except PlanRefused as refused:
                raise ServiceBusy(
                    f"the model was unloaded, and does not fit now: {refused}"
                ) from None
            self._service.resume(model)
            load_s = time.perf_counter() - began_s
        log.info("the model is back after %.1f s", load_s)
        return load_s

    def keep(self, keep_alive_s: float | None) -> None:
        """From the end of this request on it stays for so long; None: as the server has it."""
        self._keep_s = self._default_s if keep_alive_s is None else keep_alive_s

    async def run(self) -> None:
        """Unload it when its time is over, until cancelled."""
        while True:
            self._changed.clear()
            wait_s = None
            if self.loaded and not self._n_using:
                if not self.left_s:
                    await self._unload()
                    continue
                wait_s = None if self.left_s == FOREVER else self.left_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait_s)

    async def _unload(self) -> None:
        async with self._moving:
            await self._service.park()
        log.info("nobody asked for the model; it is unloaded")
