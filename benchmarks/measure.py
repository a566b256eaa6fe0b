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

from edge_gemma.benchmarks.caps import Limits, Outcome
from edge_gemma.benchmarks.caps import run as run_capped
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
    result: dict = field(default_factory=dict)
    load_peak_rss_bytes: int = 0
    load_peak_pss_bytes: int = 0
    peak_pss_bytes: int = 0
    peak_rss_bytes: int = 0
    loaded_rss_bytes: int = 0
    phases: list[dict] = field(default_factory=list)
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
        return self.result.get("planned_peak_bytes", 0)

    def to_dict(self) -> dict:
        return asdict(self)


def measure(
    task: Task,
    limits: Limits = Limits(),
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
    return watcher.run(outcome)


def _model_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]


def _held_by_others(files: Sequence[Path]) -> list[tuple[int, str]]:
    """(process, file name) of who else has one of these files mapped."""
    if not sys.platform.startswith("linux"):
        return []
    wanted = {
        (found.st_dev, found.st_ino): path.name for path in files if (found := path.stat()).st_size
    }
    shared = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines = (
                (folder / "maps").read_text().splitlines()
                if int(folder.name) != os.getpid()
                else []
            )
        except OSError:
            continue  # gone, or somebody else's
        for device, inode in {tuple(line.split()[3:5]) for line in lines if "/" in line}:
            major, minor = (int(part, 16) for part in device.split(":"))
            if name := wanted.get((os.makedev(major, minor), int(inode))):
                shared.append((int(folder.name), name))
    return shared


class _Watcher:
    """The parent's side of one run: phases from the worker's lines, memory from the kernel."""

    def __init__(
        self, task: Task, interval_s: float, watch_pages: bool, on_phase: Callable[[str], None]
    ):
        self.task, self.interval_s, self.on_phase = task, interval_s, on_phase
        self.facts: dict = {}
        self.sampler: PeakSampler | None = None
        self.load_peak = (0, 0)
        self.loaded_rss_bytes = 0
        self.timeline: list[Sample] = []
        self._file, self._cold = _cold_ranges(Path(task.path)) if watch_pages else (None, [])
        self._watch = watch_pages
        self._stop = threading.Event()
        self._pages: threading.Thread | None = None

    def start(self, pid: int) -> None:
        self.pid = pid
        self.sampler = PeakSampler(pid=pid, interval_s=self.interval_s, duty=WALK_DUTY)
        self.sampler.__enter__()
        self.begin = time.perf_counter()
        if self._watch:
            self._pages = threading.Thread(target=self._look, daemon=True)
            self._pages.start()

    def _look(self) -> None:
        """A timeline at 10 Hz from the counters; which pages of the file are held, once a second."""
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
        if phase := found.get("phase"):
            now = self.sampler.mark(phase)
            if phase == "loaded":
                self.facts |= {key: value for key, value in found.items() if key != "phase"}
                high = memory.high_water_bytes(self.pid)
                self.load_peak = (
                    max(self.sampler.peak_rss_bytes, high),
                    self.sampler.peak_pss_bytes,
                )
                self.loaded_rss_bytes = now.rss_bytes if now else 0
                if "watch_pid" in found:
                    self._follow(found["watch_pid"])
                else:
                    self.sampler.rebase()
            if phase == "exit":
                self._close_sampler()
            self.on_phase(phase)

    def _follow(self, pid: int) -> None:
        """The model lives in a server of the worker's: from here on that process is the measured
        one.
        """
        self.sampler.__exit__()
        self.load_peak = (memory.high_water_bytes(pid), memory.footprint(pid).pss_bytes)
        self.pid = pid
        self.sampler = PeakSampler(pid=pid, interval_s=self.interval_s, duty=WALK_DUTY)
        self.sampler.__enter__()

    def _close_sampler(self) -> None:
        if self.sampler and not self._stop.is_set():
            self._stop.set()
            self.sampler.__exit__()

    def stop(self) -> None:
        if self.sampler:
            self._close_sampler()
        if self._pages:
            self._pages.join()

    def run(self, outcome: Outcome) -> Run:
        s = self.sampler
        complete = "rounds" in self.facts
        return Run(
            self.task,
            outcome,
            self.facts if complete or not outcome.ok else {},
            *self.load_peak,
            s.peak_pss_bytes,
            s.peak_rss_bytes,
            self.loaded_rss_bytes,
            [asdict(phase) for phase in s.phases],
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
    **options,
) -> list[list[Run]]:
    """Add ``repeats`` runs of each task to its list in ``runs``, in turns (forwards, then
    backwards), so that what drifts drifts for all.

    ``limits``: one for each task, or none at all. What was measured before an interruption is in
    ``runs``.
    """
    for repeat in range(repeats):
        order = range(len(tasks)) if repeat % 2 == 0 else reversed(range(len(tasks)))
        for i in order:
            runs[i].append(measure(tasks[i], limits[i] if limits else Limits(), **options))
    return runs


def median_of(runs: Sequence[Run], key: str) -> float | None:
    found = [value for run in runs if run.ok and (value := run.median(key)) is not None]
    return statistics.median(found) if found else None


def spread_of(runs: Sequence[Run], key: str) -> float:
    """Half the range over the median: the noise that a comparison must exceed."""
    found = [value for run in runs if run.ok and (value := run.median(key)) is not None]
    return (max(found) - min(found)) / 2 / statistics.median(found) if len(found) > 1 else 0.0
