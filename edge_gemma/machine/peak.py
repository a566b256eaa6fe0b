"""The peak of a process's memory, phase by phase, sampled from a thread."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from edge_gemma.machine.footprint import (
    Footprint,
    footprint,
    high_water_bytes,
    reset_peak,
)


@dataclass
class Phase:
    """What one named stretch of a run took at most."""

    name: str
    start_s: float
    end_s: float = 0.0
    peak_pss_bytes: int = 0
    peak_rss_bytes: int = 0
    peak_anon_bytes: int = 0
    peak_file_bytes: int = 0


@dataclass
class PeakSampler:
    """Watches one process from a thread: peaks overall and by phase, and a timeline of ``(seconds,
    Footprint)``.

    Every ``interval_s`` it reads the kernel's counters (microseconds); the exact walk for PSS
    happens when they show a new peak, at each mark and at the end, and never for more than ``duty``
    of the time. What grew and vanished between two samples is still in ``peak_rss_bytes`` (the
    kernel's high-water mark), and ``peak_pss_bytes`` never exceeds it.

    >>> with PeakSampler() as sampler:
    ...     _ = sampler.mark("work")
    ...     block = bytearray(8 << 20)
    >>> sampler.phases[-1].name, sampler.peak_pss_bytes > 8 << 20
    ('work', True)
    """

    pid: int | None = None
    interval_s: float = 0.05
    duty: float = 0.02
    keep_timeline: bool = False
    peak_pss_bytes: int = 0
    peak_rss_bytes: int = 0
    phases: list[Phase] = field(default_factory=list)
    timeline: list[tuple[float, Footprint]] = field(default_factory=list)

    def __post_init__(self):
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._shared_bytes, self._next_walk, self._walked_rss = 0, 0.0, 0
        self._thread = threading.Thread(target=self._run, name="peak-sampler", daemon=True)

    def __enter__(self) -> PeakSampler:
        self._t0 = time.perf_counter()
        self._resettable = reset_peak(self.pid)
        self.mark("start")
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        with self._lock:
            self._sample(walk=True)
            if self._resettable:
                self.peak_rss_bytes = max(self.peak_rss_bytes, high_water_bytes(self.pid))
            self._close_phase()

    def mark(self, name: str) -> Footprint | None:
        """Begin the phase ``name``; the one before it ends here. Returns the footprint of this
        moment.
        """
        with self._lock:
            now = self._sample(walk=True)
            self._close_phase()
            self.phases.append(Phase(name, time.perf_counter() - self._t0))
            return self._sample(walk=False, known=now)

    def rebase(self) -> None:
        """Forget the peaks so far; a plan's peak counts from the end of load."""
        with self._lock:
            self.peak_pss_bytes = self.peak_rss_bytes = self._walked_rss = 0
            self._resettable = reset_peak(self.pid)

    def _close_phase(self) -> None:
        if self.phases and not self.phases[-1].end_s:
            self.phases[-1].end_s = time.perf_counter() - self._t0

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            with self._lock:
                if self._sample(walk=False) is None:
                    return

    def _sample(self, walk: bool, known: Footprint | None = None) -> Footprint | None:
        """One look. Between two walks PSS is RSS less what was last seen to be shared."""
        try:
            now = known or footprint(self.pid, exact=False)
            clock = time.perf_counter()
            if known is None and (
                walk or (now.rss_bytes > self._walked_rss and clock >= self._next_walk)
            ):
                now = footprint(self.pid)
                self._shared_bytes = now.rss_bytes - now.pss_bytes
                self._walked_rss = max(self._walked_rss, now.rss_bytes)
                took = time.perf_counter() - clock
                self._next_walk = clock + took / self.duty
            elif known is None:
                pss = now.rss_bytes - self._shared_bytes
                now = Footprint(
                    now.rss_bytes,
                    pss,
                    now.anon_bytes,
                    max(0, pss - now.anon_bytes),
                    now.swap_bytes,
                    exact=False,
                )
        except ProcessLookupError:
            return None
        self.peak_pss_bytes = max(self.peak_pss_bytes, now.pss_bytes)
        self.peak_rss_bytes = max(self.peak_rss_bytes, now.rss_bytes)
        if self.phases:
            phase = self.phases[-1]
            phase.peak_pss_bytes = max(phase.peak_pss_bytes, now.pss_bytes)
            phase.peak_rss_bytes = max(phase.peak_rss_bytes, now.rss_bytes)
            phase.peak_anon_bytes = max(phase.peak_anon_bytes, now.anon_bytes)
            phase.peak_file_bytes = max(phase.peak_file_bytes, now.file_bytes)
        if self.keep_timeline:
            self.timeline.append(
                (clock - self._t0 if known is None else time.perf_counter() - self._t0, now)
            )
        return now

    def phase(self, name: str) -> Phase:
        """The last phase of that name. Raises KeyError."""
        for phase in reversed(self.phases):
            if phase.name == name:
                return phase
        raise KeyError(name)
