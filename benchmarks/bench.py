"""The benchmarks behind ``edge-gemma bench``: each takes bundles and gives a :class:`Section` of
rows.

In: bundle folders, device profiles. Out: rows (plain dictionaries, bytes and seconds), a table for
people, timelines for pictures. What it does not know: HTML, files to compare with, the command
line.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edge_gemma.benchmarks.caps import Limits, usable_cpus
from edge_gemma.benchmarks.machine import bandwidth, bytes_per_token
from edge_gemma.benchmarks.measure import Run, interleave, measure, median_of, spread_of
from edge_gemma.benchmarks.systems import Task

from edge_gemma.bundles.folder import Bundle
from edge_gemma.errors import UsageError
from edge_gemma.machine.device import Device, load_profile, profile_names
from edge_gemma.machine.probe import find_device, probe
from edge_gemma.machine.repack import repacked
from edge_gemma.plan.ladder import make_plan
from edge_gemma.plan.records import Plan, PlanRequest
from edge_gemma.units import MiB, format_bytes

Progress = Callable[[str], None]


@dataclass
class Section:
    """One benchmark's outcome, or what there was of it when Ctrl-C came (``stopped``)."""

    kind: str
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timelines: dict[str, list[dict]] = field(default_factory=dict)
    stopped: bool = False

    @property
    def title(self) -> str:
        return KINDS[self.kind].title

    @property
    def head(self) -> list[str]:
        return list(KINDS[self.kind].columns)

    @property
    def cells(self) -> list[list[str]]:
        return [[cell(row) for cell in KINDS[self.kind].columns.values()] for row in self.rows]

    @property
    def key(self) -> tuple[str, ...]:
        return KINDS[self.kind].key

    @property
    def better(self) -> dict[str, int]:
        return KINDS[self.kind].better

    @property
    def overview(self) -> list[list[str]]:
        """Rows of the small table before the large one, head first; nothing where the large one is
        small enough.
        """
        return (
            board_overview(self.rows)
            if self.kind == "memory" and len({row["model"] for row in self.rows}) > 1
            else []
        )

    def markdown(self) -> str:
        tables = [rows for rows in (self.overview, [self.head, *self.cells]) if rows]
        return "\n\n".join(
            [
                f"## {self.title}",
                *map(markdown_table, tables),
                "\n".join(f"- {note}" for note in self.notes),
            ]
        )

    def note(self, *texts: str) -> None:
        self.notes += [text for text in texts if text not in self.notes]


@dataclass(frozen=True)
class Kind:
    """How a kind of section reads: column → cell, the fields that name a row, and what is better
    (+1 more, −1 less).
    """

    title: str
    columns: dict[str, Callable[[dict], str]]
    key: tuple[str, ...]
    better: dict[str, int]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


@contextmanager
def _keeping(section: Section) -> Iterator[None]:
    """Ctrl-C ends a benchmark, not what it has found so far. (The worker is gone by then: see
    ``caps.run``.)
    """
    try:
        yield
    except KeyboardInterrupt:
        section.stopped = True
        section.note("stopped by Ctrl-C; these are the results until then")


# --- memory --------------------------------------------------------------------------------------------------------


def memory(
    bundles: Sequence[Path],
    devices: Sequence[str] = (),
    *,
    n_ctx: int | None = None,
    n_prompt: int = 512,
    n_predict: int = 32,
    run: bool = True,
    progress: Progress = lambda text: None,
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
        "Peak from the end of load to exit. The board's plan counts the weights its CPU "
        "repacks; the run is held against the plan for this machine's CPU."
    )
    if len(bundles) > 1:
        section.note(OVERVIEW_NOTE)
    done: dict[tuple, Run] = {}
    host, cpus = probe(), usable_cpus()
    boards = {name: find_device(name) for name in devices or profile_names()}
    section.note(*_beyond_this_machine(boards, host, len(cpus)) if run else ())
    with _keeping(section):
        for folder in bundles:
            bundle = Bundle.open(folder)
            for name, board in boards.items():
                plan = make_plan(bundle.manifest, board, PlanRequest(n_ctx=n_ctx), _repacks(board))
                row = _planned(bundle, name, board, plan)
                section.rows.append(row)
                if not plan.fits or not run:
                    continue
                progress(f"{bundle.manifest.name} on {name}")
                limits = (
                    Limits()
                    if name == "auto"
                    else Limits(board.usable_bytes, tuple(cpus[: len(board.cpus)]))
                )
                if plan.total_bytes > host.usable_bytes:
                    row["outcome"] = (
                        f"not run: this machine has only {format_bytes(host.usable_bytes)} to spend"
                    )
                    continue
                task = _memory_task(folder, bundle, name, plan, limits, n_prompt, n_predict)
                same = (
                    folder,
                    task.n_ctx,
                    task.n_threads,
                    task.settings,
                    task.audio_s,
                    task.image_px,
                )
                if (found := done.get(same)) and min(
                    limits.memory_bytes, found.outcome.limit_bytes
                ) > 1.5 * found.peak_rss_bytes:
                    row |= _measured(found)
                    row["outcome"] += f" (on {found.task.device}, same settings)"
                    continue
                found = measure(task, limits, watch_pages=True, permit_groups=permit_groups)
                section.note(*found.outcome.notes)
                row |= _measured(found)
                if found.ok:
                    done[same] = found
                    section.timelines[f"{bundle.manifest.name} on {name}"] = _timeline(
                        found, limits.memory_bytes
                    )
    return section


def board_overview(rows: Sequence[dict]) -> list[list[str]]:
    """Boards by models: what each board's plan counts, and what was measured under its limit."""
    models, boards = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "device"))
    by = {(row["device"], row["model"]): row for row in rows}

    def one(row: dict | None) -> str:
        if row is None:
            return "–"
        if not row["fits"]:
            return f"no: {mib(row['needed_bytes'])}"
        return mib(row["planned_bytes"]) + (
            f"; {mib(row['peak_pss_bytes'])} ({percent(row['error'])})"
            if "peak_pss_bytes" in row
            else ""
        )

    def spend(board: str) -> str:
        return mib(next(row["usable_bytes"] for row in rows if row["device"] == board))

    return [
        ["MiB", "to spend", *models],
        *(
            [board, spend(board), *(one(by.get((board, model))) for model in models)]
            for board in boards
        ),
    ]


OVERVIEW_NOTE = (
    "First table: the peak that the board's plan counts; what was measured under that "
    "board's limit here, and by how much the plan for this machine's CPU was off. "
    "`no:` refused, with what it would need."
)


def _repacks(board: Device):
    if board.name == "auto":
        from edge_gemma.engines.llama.weights import repacked_here

        return repacked_here
    return lambda tensor: repacked(tensor.type, tensor.shape, board.cpu_features)


def _planned(bundle: Bundle, name: str, board: Device, plan: Plan) -> dict:
    s = plan.settings
    return {
        "model": bundle.manifest.name,
        "device": name,
        "fits": plan.fits,
        "usable_bytes": board.usable_bytes,
        "planned_bytes": plan.total_bytes,
        "needed_bytes": plan.needed_bytes,
        "load_peak_bytes": plan.load_peak_bytes,
        "n_ctx": s.n_ctx,
        "settings": asdict(s),
        "conceded": "; ".join(text.split(":")[0] for text in plan.concessions[-2:]),
        "items": [[i.name, i.bytes, i.kind, list(i.phases)] for i in plan.items],
        "refusal": plan.refusal,
    }


def _beyond_this_machine(boards: dict[str, Device], host: Device, n_cpus: int) -> list[str]:
    """What of the boards' limits this machine cannot set."""
    others = {name: board for name, board in boards.items() if name != "auto"}
    notes = []
    if wider := [
        f"{name} ({len(board.cpus)})" for name, board in others.items() if len(board.cpus) > n_cpus
    ]:
        notes.append(
            f"Run on this machine's {n_cpus} cores for want of the board's own: {', '.join(wider)}"
        )
    if larger := [
        f"{name} ({format_bytes(board.usable_bytes)})"
        for name, board in others.items()
        if board.usable_bytes > host.usable_bytes
    ]:
        notes.append(
            "A limit that cannot bind here, because this machine has only "
            f"{format_bytes(host.usable_bytes)} to spend: {', '.join(larger)}"
        )
    return notes


def _memory_task(
    folder: Path,
    bundle: Bundle,
    name: str,
    plan: Plan,
    limits: Limits,
    n_prompt: int,
    n_predict: int,
) -> Task:
    s, manifest = plan.settings, bundle.manifest
    settings = [("n_ubatch", s.n_ubatch), ("kv_type", s.kv_type)]
    if not any(item.name == "weights, repacked" for item in plan.items):
        settings.append(
            ("repack", False)
        )  # as on the board: its CPU, or its memory, has no use for copies
    return Task(
        "edge-gemma",
        str(folder),
        n_ctx=s.n_ctx,
        n_threads=min(s.n_threads, len(limits.cpus or usable_cpus())),
        n_prompt=min(n_prompt, s.n_ctx - n_predict),
        n_predict=n_predict,
        device=name,
        settings=tuple(settings),
        audio_s=10.0 if manifest.audio else 0.0,
        image_px=manifest.vision.image_sizes[0] if manifest.vision else 0,
    )


def _measured(run: Run) -> dict:
    row = {
        "outcome": run.outcome.describe(),
        "limit": run.outcome.kind,
        "oom_kills": run.outcome.oom_kills,
        "max_usage_bytes": run.outcome.max_usage_bytes,
        "major_faults": run.outcome.major_faults,
    }
    if (
        run.ok and not run.peak_pss_bytes
    ):  # the watching process was held up from the end of load to exit
        row["outcome"] = "ran, but nobody saw its memory; measure again"
    elif run.ok:
        here = run.planned_peak_bytes
        row |= {
            "here_planned_bytes": here,
            "peak_pss_bytes": run.peak_pss_bytes,
            "peak_rss_bytes": run.peak_rss_bytes,
            "load_peak_rss_bytes": run.load_peak_rss_bytes,
        }
        row |= {"error": here / run.peak_pss_bytes - 1, "phases": run.phases}
        row["outcome"] = f"done, {run.outcome.kind}"
    return row


def _timeline(run: Run, budget_bytes: int) -> list[dict]:
    """Samples for a picture; anonymous memory split by what the plan knows to be there from the end
    of load on.
    """
    return [
        {
            "budget_bytes": budget_bytes,
            "phases": [[p["name"], p["start_s"]] for p in run.phases],
            "items": run.result.get("items", []),
        },
        *(asdict(sample) for sample in run.timeline),
    ]


# --- speed ---------------------------------------------------------------------------------------------------------


def speed(
    bundles: Sequence[Path],
    *,
    depths: Sequence[int] = (128, 512, 2048),
    threads: Sequence[int] = (),
    repeats: int = 3,
    n_predict: int = 32,
    progress: Progress = lambda text: None,
) -> Section:
    """Prefill and decode tokens per second over context length and thread count; load time from a
    cold and a warm cache; share of the memory's speed.
    """
    threads = tuple(threads) or tuple(sorted({1, len(usable_cpus())}))
    roof = {n: bandwidth(n) for n in threads}
    section = Section("speed")
    section.note(
        *(
            f"Memory reads {roof[n] / 1e9:.1f} GB/s with {n} thread{'s' * (n > 1)}; `of the "
            "roof` is what decode reads per second as a share of it."
            for n in threads
        )
    )
    for folder in bundles:
        bundle = Bundle.open(folder)
        usable = [d for d in depths if d + n_predict <= bundle.manifest.decoder.n_ctx_train]
        tasks = [
            Task(
                "edge-gemma",
                str(folder),
                n_ctx=_context(d + n_predict),
                n_threads=n,
                n_prompt=d,
                n_predict=n_predict,
            )
            for n in threads
            for d in usable
        ]
        runs: list[list[Run]] = [[] for _ in tasks]
        cold: list[Run] = []
        progress(f"{bundle.manifest.name}: {len(tasks)} settings, {repeats} interleaved rounds")
        with _keeping(section):
            cold += [
                measure(
                    Task("edge-gemma", str(folder), n_ctx=512, n_prompt=16, n_predict=2),
                    cold_start=True,
                )
                for _ in range(min(repeats, 3))
            ]
            interleave(tasks, repeats, runs)
        for task, found in zip(tasks, runs):
            if row := _speed_row(section, bundle, task, found, cold, roof[task.n_threads]):
                section.rows.append(row)
        if section.stopped:
            break
    return section


def _speed_row(
    section: Section,
    bundle: Bundle,
    task: Task,
    runs: Sequence[Run],
    cold: Sequence[Run],
    roof: float,
) -> dict | None:
    good = [run for run in runs if run.ok]
    if not good:
        section.note(
            *(
                f"{bundle.manifest.name}, {task.n_prompt} tokens, {task.n_threads} threads: "
                f"{run.outcome.describe()}"
                for run in runs[:1]
            )
        )
        return None
    row = {
        "model": bundle.manifest.name,
        "threads": task.n_threads,
        "depth": task.n_prompt,
        **_timed(good),
    }
    row["load_cold_s"] = (
        statistics.median(run.result["load_s"] for run in cold)
        if cold and all(run.ok for run in cold)
        else None
    )
    row["roof_share"] = (
        row["decode_tok_s"] * bytes_per_token(bundle.manifest) / roof
        if row["decode_tok_s"]
        else None
    )
    return row


def _timed(good: Sequence[Run]) -> dict:
    keys = ("prefill_tok_s", "decode_tok_s", "ttft_s")
    found = {key: median_of(good, key) for key in keys} | {
        f"{key}_spread": spread_of(good, key) for key in keys
    }
    return found | {
        "load_s": statistics.median(run.result["load_s"] for run in good),
        "runs": len(good),
    }


def _context(n: int) -> int:
    return -(-n // 256) * 256


# --- latency -------------------------------------------------------------------------------------------------------


def latency(
    bundles: Sequence[Path],
    *,
    lengths_s: Sequence[float] = (1, 2, 5, 10, 20, 30),
    turns: Sequence[int] = (0, 512, 1536),
    repeats: int = 3,
    progress: Progress = lambda text: None,
) -> Section:
    """Seconds from the end of what the user says to the first token of the answer.

    A bundle that hears: speech of several lengths, encoded and prefilled while it is spoken, with
    and without the padding rows. A bundle that does not: a typed turn of 32 tokens behind
    conversations of several lengths.
    """
    section = Section("latency")
    section.note(
        "Speech is encoded and prefilled while it is spoken; the clock starts with its last "
        "packet. Real-time factor: the work during speech over its length; below 1 it keeps "
        "up."
    )
    with _keeping(section):
        for folder in bundles:
            bundle = Bundle.open(folder)
            hears = bundle.manifest.audio is not None
            cases = (
                [("speech", s, pad) for s in lengths_s for pad in (False, True)]
                if hears
                else [
                    ("text", t, False)
                    for t in turns
                    if t + 256 <= bundle.manifest.decoder.n_ctx_train
                ]
            )
            heard = [
                {"audio_s": amount, "n_prompt": 0} if hears else {"n_prompt": int(amount)}
                for _, amount, _ in cases
            ]
            common = {
                "n_ctx": min(2048, bundle.manifest.decoder.n_ctx_train),
                "n_predict": 8,
                "rounds": 2,
            }
            tasks = [
                Task("edge-gemma", str(folder), mode=mode, pad_audio=pad, **common, **what)
                for (mode, _, pad), what in zip(cases, heard)
            ]
            runs: list[list[Run]] = [[] for _ in tasks]
            progress(f"{bundle.manifest.name}: {len(tasks)} cases, {repeats} interleaved rounds")
            try:
                interleave(tasks, repeats, runs)
            finally:  # Ctrl-C: what there is becomes rows
                section.rows += _latency_rows(section, bundle, cases, runs)
    return section


def _latency_rows(
    section: Section,
    bundle: Bundle,
    cases: Sequence[tuple[str, float, bool]],
    runs: Sequence[Sequence[Run]],
) -> Iterator[dict]:
    for (mode, amount, pad), found in zip(cases, runs):
        if good := [run for run in found if run.ok]:
            row = {
                "model": bundle.manifest.name,
                "mode": mode,
                "amount": float(amount),
                "padding": pad,
                "rtf": median_of(good, "rtf"),
            }
            yield row | {
                "first_token_s": median_of(good, "ttft_s"),
                "first_token_s_spread": spread_of(good, "ttft_s"),
            }
        elif found:
            section.note(
                f"{bundle.manifest.name}, {mode} {amount:g}: {found[0].outcome.describe()}"
            )


# --- quality -------------------------------------------------------------------------------------------------------


def quality(
    reference: Path,
    bundles: Sequence[Path],
    text: Path,
    *,
    max_tokens: int = 4096,
    progress: Progress = lambda line: None,
) -> Section:
    """Perplexity and KL divergence of bundles against a reference of the same vocabulary, with each
    one's size. GGUF files count as bundles here.
    """
    from edge_gemma.convert.quality import compare as receipts

    def decoder(path: Path) -> Path:
        return path if path.is_file() else Bundle.open(path).decoder_path

    section = Section("quality")
    files = {path.stem if path.is_file() else path.name: decoder(path) for path in bundles}
    with _keeping(section):
        found = receipts(
            decoder(reference),
            files,
            text,
            max_tokens=max_tokens,
            n_threads=len(usable_cpus()),
            progress=lambda done, total: progress(f"chunk {done} of {total}"),
        )
        section.rows = [
            {"model": name, "size_bytes": files[name].stat().st_size, **receipt.table()}
            for name, receipt in found.items()
        ]
        itself = {
            "model": f"{reference.name} (reference)",
            "size_bytes": decoder(reference).stat().st_size,
            "kld_mean": 0.0,
            "kld_p99": 0.0,
            "top1_agreement": 1.0,
        }
        section.rows.insert(0, section.rows[0] | itself | {"ppl": section.rows[0]["ppl_reference"]})
        section.note(f"{section.rows[0]['tokens']} tokens of {text.name}; divergences in nats")
    return section


# --- compare -------------------------------------------------------------------------------------------------------


def compare(
    bundle: Path,
    others: Sequence[tuple[str, Path]] = (),
    *,
    n_prompt: int = 512,
    n_predict: int = 128,
    n_ctx: int = 2048,
    n_threads: int = 0,
    repeats: int = 3,
    progress: Progress = lambda line: None,
) -> Section:
    """One interleaved run of this project against what a user would pick instead;
    ``llama_cpp.Llama`` on the same file is always among them.
    """
    opened = Bundle.open(bundle)
    n_threads = n_threads or len(usable_cpus())
    common = {
        "n_ctx": n_ctx,
        "n_threads": n_threads,
        "n_prompt": n_prompt,
        "n_predict": n_predict,
        "rounds": 2,
    }
    tasks = [
        Task("edge-gemma", str(bundle), **common),
        Task("llama_cpp.Llama", str(opened.decoder_path), **common),
    ]
    tasks += [Task(system, str(path), **common) for system, path in others]
    from edge_gemma.benchmarks import rivals

    for task in tasks:
        if reason := rivals.missing(task.system):
            raise UsageError(reason)
    progress(f"{len(tasks)} systems, {repeats} interleaved rounds")
    section = Section("compare")
    section.note(
        f"{n_threads} threads, prompt of {n_prompt} tokens, {n_predict} tokens greedy, up to "
        f"{repeats} interleaved runs of 2 rounds; medians ± half the range"
    )
    runs: list[list[Run]] = [[] for _ in tasks]
    with _keeping(section):
        interleave(tasks, repeats, runs)
    for task, found in zip(tasks, runs):
        good = [run for run in found if run.ok]
        if not good:
            section.note(*(f"{task.system}: {run.outcome.describe()}" for run in found[:1]))
            continue
        memory_of = {
            key: statistics.median(getattr(run, key) for run in good)
            for key in ("peak_pss_bytes", "peak_rss_bytes", "load_peak_rss_bytes")
        }
        section.rows.append(
            {
                "system": task.system,
                "file": Path(task.path).name,
                "version": good[0].result.get("version", ""),
                **_timed(good),
                **memory_of,
            }
        )
    return section


# --- words for cells -----------------------------------------------------------------------------------------------


def mib(n: float | None) -> str:
    return "–" if n is None else f"{n / MiB:.0f}"


def seconds(n: float | None) -> str:
    return "–" if n is None else f"{n:.2f}"


def percent(share: float | None, sign: bool = True) -> str:
    return "–" if share is None else f"{share:+.1%}" if sign else f"{share:.0%}"


def with_spread(row: dict, key: str, digits: int = 1) -> str:
    value = row.get(key)
    return "–" if value is None else f"{value:.{digits}f} ± {row.get(f'{key}_spread', 0.0):.0%}"


def device_names(names: Sequence[str]) -> list[str]:
    """Checked profile names; ``all`` is every shipped one. Raises UsageError."""
    found = profile_names() if "all" in names else list(names)
    for name in found:
        if name != "auto":
            load_profile(name)
    return found


KINDS = {
    "memory": Kind(
        "Memory by device",
        {
            "model": lambda r: r["model"],
            "device": lambda r: r["device"],
            "to spend MiB": lambda r: mib(r["usable_bytes"]),
            "plan": lambda r: (
                ("fits" if r["fits"] else "does not fit")
                + (f" ({r['conceded']})" if r["conceded"] else "")
            ),
            "n_ctx": lambda r: str(r["n_ctx"]),
            "board's peak planned MiB": lambda r: mib(r["planned_bytes"]),
            "planned for this CPU": lambda r: mib(r.get("here_planned_bytes")),
            "measured PSS": lambda r: mib(r.get("peak_pss_bytes")),
            "plan is off by": lambda r: percent(r.get("error")),
            "run under that limit": lambda r: r.get("outcome", "–"),
        },
        ("model", "device"),
        {"peak_pss_bytes": -1, "planned_bytes": -1},
    ),
    "speed": Kind(
        "Speed",
        {
            "model": lambda r: r["model"],
            "threads": lambda r: str(r["threads"]),
            "prompt tokens": lambda r: str(r["depth"]),
            "prefill tok/s": lambda r: with_spread(r, "prefill_tok_s"),
            "decode tok/s": lambda r: with_spread(r, "decode_tok_s"),
            "of the roof": lambda r: percent(r["roof_share"], sign=False),
            "TTFT s": lambda r: seconds(r["ttft_s"]),
            "load cold s": lambda r: seconds(r["load_cold_s"]),
            "load warm s": lambda r: seconds(r["load_s"]),
        },
        ("model", "threads", "depth"),
        {"prefill_tok_s": 1, "decode_tok_s": 1, "ttft_s": -1},
    ),
    "latency": Kind(
        "From the end of the input to the first token",
        {
            "model": lambda r: r["model"],
            "input": lambda r: _input(r),
            "first token s": lambda r: with_spread(r, "first_token_s", 3),
            "real-time factor": lambda r: "–" if r["rtf"] is None else f"{r['rtf']:.2f}",
        },
        ("model", "mode", "amount", "padding"),
        {"first_token_s": -1},
    ),
    "quality": Kind(
        "Quality",
        {
            "model": lambda r: r["model"],
            "size MiB": lambda r: mib(r["size_bytes"]),
            "perplexity": lambda r: f"{r['ppl']:.2f}",
            "mean KL divergence": lambda r: f"{r['kld_mean']:.4f}",
            "99th percentile": lambda r: f"{r['kld_p99']:.3f}",
            "same first choice": lambda r: percent(r["top1_agreement"], sign=False),
        },
        ("model",),
        {"ppl": -1, "kld_mean": -1},
    ),
    "compare": Kind(
        "Against what else there is",
        {
            "system": lambda r: r["system"],
            "file": lambda r: r["file"],
            "prefill tok/s": lambda r: with_spread(r, "prefill_tok_s"),
            "decode tok/s": lambda r: with_spread(r, "decode_tok_s"),
            "peak PSS MiB": lambda r: mib(r["peak_pss_bytes"]),
            "load peak RSS MiB": lambda r: mib(r["load_peak_rss_bytes"]),
            "load s": lambda r: seconds(r["load_s"]),
        },
        ("system", "file"),
        {"decode_tok_s": 1, "prefill_tok_s": 1, "peak_pss_bytes": -1},
    ),
}


def _input(row: dict) -> str:
    if row["mode"] == "speech":
        return f"{row['amount']:g} s of speech" + (", padded to 188 rows" if row["padding"] else "")
    return f"32 tokens behind {row['amount']:g}"
