"""Run a worker under limits and watch it from outside.

In: a :class:`~edge_gemma.benchmarks.systems.Task` and :class:`~edge_gemma.benchmarks.caps.Limits`.
Out: a :class:`Run`, with what was timed, what the kernel counted by phase, and a timeline. What it
does not know: what is compared with what.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge_gemma.benchmarks.caps import NO_LIMITS, Limits, Outcome
from edge_gemma.benchmarks.caps import run as run_capped
from edge_gemma.benchmarks.sections import Steps, no_steps
from edge_gemma.benchmarks.systems import Task
from edge_gemma.machine import footprint as memory
from edge_gemma.machine.peak import PeakSampler

# walking the page tables of 1.5 GB takes 15 ms of a core that the measured threads want: of two,
# one waits for the other
WALK_DUTY = 0.004


@dataclass
class Sample:
    """One moment of a run, bytes. ``hot`` and ``cold`` split the mapped model file by what its
    manifest calls each tensor.
    """

    seconds: float
    anon_bytes: int
    file_bytes: int
    cold_bytes: int = 0


@dataclass
class Run:
    """One worker's life. Peaks: ``load_peak`` up to the end of load, ``peak`` from there to exit
    (what a plan promises).
    """

    task: Task
    outcome: Outcome
    result: dict[str, Any] = field(default_factory=dict)
    load_peak_rss_bytes: int = 0
    load_peak_pss_bytes: int = 0
    peak_pss_bytes: int = 0
    peak_rss_bytes: int = 0
    loaded_rss_bytes: int = 0
    phases: list[dict[str, Any]] = field(default_factory=list)
    timeline: list[Sample] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.outcome.ok and bool(self.result)

    def median(self, key: str) -> float | None:
        """Median over the rounds of ``decode_tok_s``, ``prefill_tok_s``, ``ttft_s`` …"""
        found = [
            value for one in self.result.get("rounds", ()) if (value := one.get(key)) is not None
        ]
        return statistics.median(found) if found else None

    @property
    def planned_peak_bytes(self) -> int:
        return int(self.result.get("planned_peak_bytes", 0))

    @property
    def peak_anon_bytes(self) -> int:
        return max(phase["peak_anon_bytes"] for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    task: Task,
    limits: Limits = NO_LIMITS,
    *,
    interval_s: float = 0.05,
    watch_pages: bool = False,
    timeout_s: float = 1800,
    cold_start: bool = False,
    on_phase: Callable[[str], None] = lambda name: None,
    permit_groups: bool = True,
) -> Run:
    """Run one task to its end.

    ``watch_pages`` adds the timeline and splits the file's pages into hot and cold (costs a
    page-table walk a second).

    Under a memory limit, or with ``cold_start``, the model's cached pages are dropped first, so
    that the worker pays for each it reads.
    """
    watcher = _Watcher(task, interval_s, watch_pages, on_phase)
    files = _model_files(Path(task.path)) if limits.memory_bytes or cold_start else []
    shared = _held_by_others(files)
    try:
        outcome = run_capped(
            [sys.executable, "-W", "ignore", "-m", "edge_gemma.benchmarks.worker", task.to_json()],
            limits,
            cold_files=files,
            on_start=watcher.start,
            on_line=watcher.line,
            timeout_s=timeout_s,
            permit_groups=permit_groups,
        )
    finally:
        watcher.stop()
    outcome.notes += [
        f"process {pid} has {name} mapped as well: of shared pages only a part is counted, "
        "so the measured peak is too low"
        for pid, name in shared
    ]
    return watcher.finished(outcome)


def _model_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]


def _held_by_others(files: Sequence[Path]) -> list[tuple[int, str]]:
    """(process, file name) of who else has one of these files mapped."""
    if not sys.platform.startswith("linux"):
        return []
    stats = [(path.name, path.stat()) for path in files]
    wanted = {(st.st_dev, st.st_ino): name for name, st in stats if st.st_size}
    shared = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        for device, inode in _mapped_files(folder):
            if name := wanted.get((device, inode)):
                shared.append((int(folder.name), name))
    return shared


def _mapped_files(process: Path) -> set[tuple[int, int]]:
    """(device, inode) of each file that a process of /proc has mapped."""
    try:
        lines = (process / "maps").read_text().splitlines()
    except OSError:
        return set()  # the process has ended, or belongs to another user
    found = set()
    for line in lines:
        if "/" in line:
            device, inode = line.split()[3:5]
            major, minor = (int(part, 16) for part in device.split(":"))
            found.add((os.makedev(major, minor), int(inode)))
    return found


class _Watcher:
    """The parent's side of one run: phases from the worker's lines, memory from the kernel."""

    def __init__(
        self, task: Task, interval_s: float, watch_pages: bool, on_phase: Callable[[str], None]
    ):
        self.task, self.interval_s, self.on_phase = task, interval_s, on_phase
        self.facts: dict[str, Any] = {}
        self.load_peak = (0, 0)
        self.loaded_rss_bytes = 0
        self.timeline: list[Sample] = []
        self._file, self._cold = _cold_ranges(Path(task.path)) if watch_pages else (None, [])
        self._watch = watch_pages
        self._stop = threading.Event()
        self._pages: threading.Thread | None = None
        self._sampler: PeakSampler | None = None

    @property
    def sampler(self) -> PeakSampler:
        assert self._sampler is not None, "the worker has not started"
        return self._sampler

    def start(self, pid: int) -> None:
        self._watch_process(pid)
        self.begin = time.perf_counter()
        if self._watch:
            self._pages = threading.Thread(target=self._look, daemon=True)
            self._pages.start()

    def _watch_process(self, pid: int) -> None:
        self.pid = pid
        self._sampler = PeakSampler(pid=pid, interval_s=self.interval_s, duty=WALK_DUTY)
        self._sampler.__enter__()

    def _look(self) -> None:
        """A timeline at 10 Hz from the counters; the file's pages that are held, once a second."""
        cold, checked = 0, -9.0
        while not self._stop.wait(0.1):
            try:
                now = memory.footprint(self.pid, exact=False)
            except ProcessLookupError:
                return
            seconds = time.perf_counter() - self.begin
            if self._file and seconds - checked >= 1:
                cold, checked = memory.resident_bytes(self._file, self._cold, self.pid), seconds
            self.timeline.append(
                Sample(seconds, now.anon_bytes, now.file_bytes, min(cold, now.file_bytes))
            )

    def line(self, text: str) -> None:
        try:
            found = json.loads(text)
        except ValueError:
            return  # a library's own chatter
        if not isinstance(found, dict):
            return
        if "result" in found:
            self.facts |= found["result"]
        if phase := found.pop("phase", None):
            now = self.sampler.mark(phase)
            if phase == "loaded":
                self.loaded_rss_bytes = now.rss_bytes if now else 0
                self._loaded(found)
            if phase == "exit":
                self._close_sampler()
            self.on_phase(phase)

    def _loaded(self, facts: dict[str, Any]) -> None:
        """The end of load: its peaks are kept, and a new peak begins."""
        self.facts |= facts
        if "watch_pid" in facts:
            self._follow(facts["watch_pid"])
            return
        high = memory.high_water_bytes(self.pid)
        self.load_peak = (max(self.sampler.peak_rss_bytes, high), self.sampler.peak_pss_bytes)
        self.sampler.rebase()

    def _follow(self, pid: int) -> None:
        """The model is in a process of the worker's: from here on that one is measured."""
        self.sampler.__exit__()
        self.load_peak = (memory.high_water_bytes(pid), memory.footprint(pid).pss_bytes)
        self._watch_process(pid)

    def _close_sampler(self) -> None:
        if self._sampler and not self._stop.is_set():
            self._stop.set()
            self._sampler.__exit__()

    def stop(self) -> None:
        self._close_sampler()
        if self._pages:
            self._pages.join()

    def finished(self, outcome: Outcome) -> Run:
        complete = "rounds" in self.facts
        return Run(
            self.task,
            outcome,
            self.facts if complete or not outcome.ok else {},
            *self.load_peak,
            self.sampler.peak_pss_bytes,
            self.sampler.peak_rss_bytes,
            self.loaded_rss_bytes,
            [asdict(phase) for phase in self.sampler.phases],
            self.timeline,
        )


def _cold_ranges(path: Path) -> tuple[Path | None, list[tuple[int, int]]]:
    """The decoder's file and the byte ranges its manifest does not read whole for every token."""
    if path.is_file():
        return path, []
    from edge_gemma.bundles.folder import Bundle

    bundle = Bundle.open(path)
    return bundle.decoder_path, [
        (t.offset, t.nbytes) for t in bundle.manifest.decoder.tensors if t.use != "matmul"
    ]


def interleave(
    tasks: Sequence[Task],
    repeats: int,
    runs: list[list[Run]],
    limits: Sequence[Limits] = (),
    steps: Steps = no_steps,
) -> list[list[Run]]:
    """Add ``repeats`` runs of each task to its list in ``runs``, in turns (forwards, then
    backwards), so that what drifts drifts for all.

    ``limits``: one for each task, or none at all. What was measured before an interruption is in
    ``runs``.
    """
    done, total = 0, repeats * len(tasks)
    for repeat in range(repeats):
        order = list(range(len(tasks)))
        for i in order if repeat % 2 == 0 else reversed(order):
            steps(done, total)
            runs[i].append(measure(tasks[i], limits[i] if limits else NO_LIMITS))
            done += 1
    return runs


def _found(runs: Sequence[Run], key: str) -> list[float]:
    return [value for run in runs if run.ok and (value := run.median(key)) is not None]


def median_of(runs: Sequence[Run], key: str) -> float | None:
    found = _found(runs, key)
    return statistics.median(found) if found else None


def spread_of(runs: Sequence[Run], key: str) -> float:
    """Half the range over the median: the noise that a comparison must exceed."""
    found = _found(runs, key)
    return (max(found) - min(found)) / 2 / statistics.median(found) if len(found) > 1 else 0.0


def medians(runs: Sequence[Run], *keys: str) -> dict[str, Any]:
    """``key`` and ``key_spread`` of each, over the runs that ended well."""
    return {key: median_of(runs, key) for key in keys} | {
        f"{key}_spread": spread_of(runs, key) for key in keys
    }


MEMORY_KEYS = ("peak_pss_bytes", "peak_rss_bytes", "load_peak_rss_bytes", "loaded_rss_bytes")
SPEED_KEYS = ("prefill_tok_s", "decode_tok_s", "ttft_s")


def timed(good: Sequence[Run]) -> dict[str, Any]:
    """Speeds, load time and how many runs: what rows of several benchmarks share."""
    load_s = statistics.median(run.result["load_s"] for run in good)
    return medians(good, *SPEED_KEYS) | {"load_s": load_s, "runs": len(good)}


def memory_of(good: Sequence[Run]) -> dict[str, float]:
    """Median peaks of several runs."""
    return {key: statistics.median(getattr(run, key) for run in good) for key in MEMORY_KEYS}
