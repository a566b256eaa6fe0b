"""Memory: what boards would take, what plans promise, what a hard limit does.

In: bundles, device profiles. Out: sections of rows, and timelines for pictures. What it does not
know: tables, files to compare with, the command line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_gemma.benchmarks.caps import NO_LIMITS, Limits, usable_cpus
from edge_gemma.benchmarks.measure import Run, measure, memory_of, timed
from edge_gemma.benchmarks.sections import OVERVIEW_NOTE, Progress, Row, Section, silent
from edge_gemma.benchmarks.systems import Task
from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import Tensor
from edge_gemma.errors import RuntimeFailure
from edge_gemma.machine.device import Device, load_profile, profile_names
from edge_gemma.machine.probe import find_device, this_machine
from edge_gemma.machine.repack import repacks_for
from edge_gemma.plan.ladder import make_plan
from edge_gemma.plan.records import AFTER_LOAD, Plan, PlanRequest
from edge_gemma.units import format_bytes

HEARD_S = 10.0  # a bundle that hears is given so much sound before the prompt
# a limit so far above what a run took would not change a second run with the same settings
FAR_FROM_BINDING = 1.5


@contextmanager
def keeping(section: Section) -> Iterator[None]:
    """Ctrl-C ends a benchmark and keeps what was measured. (The worker has ended by then: see
    ``caps.run``.)
    """
    try:
        yield
    except KeyboardInterrupt:
        section.stopped = True
        section.note("stopped by Ctrl-C; these are the results until then")


def device_names(names: Sequence[str]) -> list[str]:
    """Checked profile names; ``all`` is every shipped one. Raises UsageError."""
    found = profile_names() if "all" in names else list(names)
    for name in found:
        if name != "auto":
            load_profile(name)
    return found


# --- boards ---


@dataclass(frozen=True)
class Ask:
    """What is asked of every bundle on every board."""

    n_ctx: int | None
    n_prompt: int
    n_predict: int
    permit_groups: bool


def memory(
    bundles: Sequence[Path],
    devices: Sequence[str] = (),
    *,
    n_ctx: int | None = None,
    n_prompt: int = 512,
    n_predict: int = 32,
    run: bool = True,
    progress: Progress = silent,
    permit_groups: bool = True,
) -> Section:
    """For each bundle and profile: the plan for that board; and, where it fits and this machine
    can, a real run under that board's limits.

    Which weights are repacked depends on the CPU, so the run is held against the plan for *this*
    CPU inside the board's memory. Runs with the same settings whose limit is far from binding are
    made once.
    """
    section = Section("memory")
    section.note(
        "Peak from the end of load to exit. The board's plan counts the weights its CPU repacks; "
        "the run is held against the plan for this machine's CPU."
    )
    if len(bundles) > 1:
        section.note(OVERVIEW_NOTE)
    host = this_machine()
    boards = {name: find_device(name) for name in devices or profile_names()}
    if run:
        section.note(*_beyond_this_machine(boards, host))
    runs = _BoardRuns(section, Ask(n_ctx, n_prompt, n_predict, permit_groups), host)
    with keeping(section):
        for folder in bundles:
            bundle = Bundle.open(folder)
            for name, board in boards.items():
                request = PlanRequest(n_ctx=n_ctx)
                plan = make_plan(bundle.manifest, board, request, _repacks(board))
                row = _planned(bundle, name, board, plan)
                section.rows.append(row)
                if plan.fits and run:
                    progress(f"{bundle.manifest.name} on {name}")
                    runs.add(row, bundle, name, board, plan)
    return section


class _BoardRuns:
    """Runs under boards' limits; what was measured with the same settings is not run again."""

    def __init__(self, section: Section, ask: Ask, host: Device):
        self.section, self.ask, self.host = section, ask, host
        self._done: dict[Task, Run] = {}

    def add(self, row: Row, bundle: Bundle, name: str, board: Device, plan: Plan) -> None:
        """Complete ``row`` by a run, or by the reason for none."""
        if plan.total_bytes > self.host.usable_bytes:
            spend = format_bytes(self.host.usable_bytes)
            row["outcome"] = f"not run: this machine has only {spend} to spend"
            return
        limits = NO_LIMITS
        if name != "auto":
            limits = Limits(board.usable_bytes, tuple(usable_cpus()[: len(board.cpus)]))
        task = _memory_task(bundle, name, plan, limits, self.ask)
        if earlier := self._same(task, limits):
            row |= _measured(earlier)
            row["outcome"] += f" (on {earlier.task.device}, same settings)"
            return
        found = measure(task, limits, watch_pages=True, permit_groups=self.ask.permit_groups)
        self.section.note(*found.outcome.notes)
        row |= _measured(found)
        if found.ok:
            self._done[_without_board(task)] = found
            timeline = _timeline(found, limits.memory_bytes)
            self.section.timelines[f"{bundle.manifest.name} on {name}"] = timeline

    def _same(self, task: Task, limits: Limits) -> Run | None:
        found = self._done.get(_without_board(task))
        if found is None:
            return None
        least = min(limits.memory_bytes, found.outcome.limit_bytes)
        return found if least > FAR_FROM_BINDING * found.peak_rss_bytes else None


def _without_board(task: Task) -> Task:
    """Two tasks that are equal by this run alike. (Settings alone decide, not the board's name.)"""
    return Task(
        task.system,
        task.path,
        n_ctx=task.n_ctx,
        n_threads=task.n_threads,
        settings=task.settings,
        audio_s=task.audio_s,
        image_px=task.image_px,
    )


def _repacks(board: Device) -> Callable[[Tensor], bool]:
    if board.name == "auto":
        from edge_gemma.engines.llama.weights import repacked_here

        return repacked_here
    return repacks_for(board)


def _planned(bundle: Bundle, name: str, board: Device, plan: Plan) -> Row:
    return {
        "model": bundle.manifest.name,
        "device": name,
        "fits": plan.fits,
        "usable_bytes": board.usable_bytes,
        "planned_bytes": plan.total_bytes,
        "needed_bytes": plan.needed_bytes,
        "load_peak_bytes": plan.load_peak_bytes,
        "n_ctx": plan.settings.n_ctx,
        "settings": asdict(plan.settings),
        "conceded": "; ".join(text.split(":")[0] for text in plan.concessions[-2:]),
        "items": [[i.name, i.bytes, i.kind, list(i.phases)] for i in plan.items],
        "refusal": plan.refusal,
    }


def _beyond_this_machine(boards: dict[str, Device], host: Device) -> list[str]:
    """What of the boards' limits this machine cannot set."""
    others = {name: board for name, board in boards.items() if name != "auto"}
    n_cpus, spend = len(usable_cpus()), host.usable_bytes
    notes = []
    wider = [f"{name} ({len(b.cpus)})" for name, b in others.items() if len(b.cpus) > n_cpus]
    if wider:
        notes.append(
            f"Run on this machine's {n_cpus} cores for want of the board's own: {', '.join(wider)}"
        )
    larger = [
        f"{name} ({format_bytes(b.usable_bytes)})"
        for name, b in others.items()
        if b.usable_bytes > spend
    ]
    if larger:
        notes.append(
            "A limit that cannot bind here, because this machine has only "
            f"{format_bytes(spend)} to spend: {', '.join(larger)}"
        )
    return notes


def _memory_task(bundle: Bundle, name: str, plan: Plan, limits: Limits, ask: Ask) -> Task:
    s, manifest = plan.settings, bundle.manifest
    settings: list[tuple[str, object]] = [("n_ubatch", s.n_ubatch), ("kv_type", s.kv_type)]
    if not any(item.name == "weights, repacked" for item in plan.items):
        # as on the board: its CPU, or its memory, has no use for copies
        settings.append(("repack", False))
    return Task(
        "edge-gemma",
        str(bundle.folder),
        n_ctx=s.n_ctx,
        n_threads=min(s.n_threads, len(limits.cpus or usable_cpus())),
        n_prompt=min(ask.n_prompt, s.n_ctx - ask.n_predict),
        n_predict=ask.n_predict,
        device=name,
        settings=tuple(settings),
        audio_s=HEARD_S if manifest.audio else 0.0,
        image_px=manifest.vision.image_sizes[0] if manifest.vision else 0,
    )


def _measured(run: Run) -> Row:
    outcome = run.outcome
    row: Row = {
        "outcome": outcome.describe(),
        "limit": outcome.kind,
        "oom_kills": outcome.oom_kills,
        "max_usage_bytes": outcome.max_usage_bytes,
        "major_faults": outcome.major_faults,
    }
    if run.ok and not run.peak_pss_bytes:
        # the watching process was held up from the end of load to exit
        row["outcome"] = "ran, but its memory was not seen; measure again"
    elif run.ok:
        planned = run.planned_peak_bytes
        row |= {
            "here_planned_bytes": planned,
            "peak_pss_bytes": run.peak_pss_bytes,
            "peak_rss_bytes": run.peak_rss_bytes,
            "load_peak_rss_bytes": run.load_peak_rss_bytes,
            "error": planned / run.peak_pss_bytes - 1,
            "phases": run.phases,
            "outcome": f"done, {outcome.kind}",
        }
    return row


def _timeline(run: Run, budget_bytes: int) -> list[Row]:
    """Samples for a picture; anonymous memory split by what the plan knows to be there from the end
    of load on.
    """
    head = {
        "budget_bytes": budget_bytes,
        "phases": [[p["name"], p["start_s"]] for p in run.phases],
        "items": run.result.get("items", []),
    }
    return [head, *(asdict(sample) for sample in run.timeline)]


# --- plans and limits on this machine ---


def plan(
    bundles: Sequence[Path],
    *,
    contexts: Sequence[int] = (2048, 8192),
    n_threads: int = 0,
    n_predict: int = 32,
    progress: Progress = silent,
) -> Section:
    """Planned against measured peak on this machine. The prompt fills three quarters of each
    context: a plan promises what a full one takes. Raises RuntimeFailure for a run that fails.
    """
    section = Section("plan")
    with keeping(section):
        for folder in bundles:
            name = Bundle.open(folder).manifest.name
            for n_ctx in contexts:
                progress(f"{name}, n_ctx {n_ctx}")
                task = Task(
                    "edge-gemma",
                    str(folder),
                    n_ctx=n_ctx,
                    n_threads=n_threads or len(usable_cpus()),
                    n_prompt=n_ctx * 3 // 4,
                    n_predict=n_predict,
                )
                found = measure(task)
                if not found.ok:
                    raise RuntimeFailure(f"{name} at n_ctx {n_ctx}: {found.outcome.describe()}")
                section.rows.append(planned_row(name, n_ctx, found))
    return section


def planned_row(name: str, n_ctx: int, run: Run) -> Row:
    file_peaks = [p["peak_file_bytes"] for p in run.phases if p["name"] in ("prefill", "decode")]
    return {
        "model": name,
        "n_ctx": n_ctx,
        "planned_peak_bytes": run.planned_peak_bytes,
        "peak_pss_bytes": run.peak_pss_bytes,
        "error": run.planned_peak_bytes / run.peak_pss_bytes - 1,
        "planned_anon_bytes": max(_planned_anon(run, phase) for phase in AFTER_LOAD),
        "anon_bytes": run.peak_anon_bytes,
        "peak_file_bytes": max(file_peaks),
        "items": run.result["items"],
    }


def _planned_anon(run: Run, phase: str) -> int:
    items = run.result["items"]
    return sum(n for _, n, kind, phases in items if kind == "anon" and phase in phases)


def capped(
    bundles: Sequence[Path],
    *,
    limits_bytes: Sequence[int],
    n_ctx: int = 2048,
    n_prompt: int = 1000,
    n_predict: int = 64,
    n_threads: int = 0,
    repeats: int = 3,
    progress: Progress = silent,
) -> Section:
    """Each bundle under its hard limit, from a cold cache, in turns with the same without a limit.
    ``limits_bytes``: one for each bundle. Raises RuntimeFailure for a bundle whose every run fails.
    """
    section = Section("capped")
    with keeping(section):
        for folder, limit_bytes in zip(bundles, limits_bytes, strict=True):
            name = Bundle.open(folder).manifest.name
            task = Task(
                "edge-gemma",
                str(folder),
                n_ctx=n_ctx,
                n_threads=n_threads or len(usable_cpus()),
                n_prompt=n_prompt,
                n_predict=n_predict,
                rounds=2,
                budget_bytes=limit_bytes,
            )
            free: list[Run] = []
            held: list[Run] = []
            for number in range(repeats):
                progress(f"{name}, {format_bytes(limit_bytes)}: run {number + 1} of {repeats}")
                free.append(measure(task))
                held.append(measure(task, Limits(limit_bytes)))
            section.rows += [_capped_row(name, runs) for runs in (free, held)]
            section.note(*held[0].outcome.notes)
    return section


def _capped_row(name: str, runs: Sequence[Run]) -> Row:
    good = [run for run in runs if run.ok]
    first = runs[0].outcome
    if not good:
        raise RuntimeFailure(f"{name}: {first.describe()}")
    limit = f"{first.kind}, {format_bytes(first.limit_bytes)}" if first.limit_bytes else "none"
    return {
        "model": name,
        "limit": limit,
        "limit_bytes": first.limit_bytes,
        **timed(good),
        **memory_of(good),
        "outcome": ", ".join(sorted({run.outcome.describe() for run in runs})),
        "oom_kills": sum(run.outcome.oom_kills for run in runs),
        "max_usage_bytes": max(run.outcome.max_usage_bytes for run in runs),
        "major_faults": max(run.outcome.major_faults for run in runs),
    }


# --- before any weight ---

_BASE = """
import json, sys
from edge_gemma.machine.footprint import footprint, trim_heap
steps = [("Python", footprint())]
import numpy
steps.append(("numpy", footprint()))
import edge_gemma.cli, edge_gemma.engines.llama.library, edge_gemma.engines.llama.weights
low = edge_gemma.engines.llama.library.library()
steps.append(("edge-gemma and llama.cpp", footprint()))
params = low.llama_model_default_params()
params.vocab_only = True
model = low.llama_model_load_from_file(sys.argv[1].encode(), params)
trim_heap()
n_tokens = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))
steps.append((f"a vocabulary of {n_tokens} tokens", footprint()))
print(json.dumps([(name, found.anon_bytes, found.file_bytes) for name, found in steps]))
"""


def base(bundles: Sequence[Path], *, progress: Progress = silent) -> Section:
    """What Python, the libraries and a bundle's vocabulary take: the constants of the plan. Raises
    RuntimeFailure.
    """
    section = Section("base")
    for folder in bundles:
        decoder = str(Bundle.open(folder).decoder_path)
        argv = [sys.executable, "-W", "ignore", "-c", _BASE, decoder]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1]
            raise RuntimeFailure(f"the base could not be measured: {reason}")
        section.rows += [
            {"loaded": name, "anon_bytes": anon, "file_bytes": file}
            for name, anon, file in json.loads(done.stdout.splitlines()[-1])
        ]
    return section
