"""Speed: tokens per second over context and threads, the wait for an answer, what else there is.

In: bundles. Out: sections of rows. What it does not know: tables, files, the command line.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edge_gemma.benchmarks.caps import NO_LIMITS, Limits, usable_cpus
from edge_gemma.benchmarks.machine import bandwidth, bytes_per_token
from edge_gemma.benchmarks.measure import (
    Run,
    interleave,
    measure,
    median_of,
    medians,
    memory_of,
    timed,
)
from edge_gemma.benchmarks.memory import keeping
from edge_gemma.benchmarks.sections import Progress, Row, Section, counted, silent
from edge_gemma.benchmarks.systems import Task
from edge_gemma.bundles.folder import Bundle
from edge_gemma.errors import UsageError

OURS, STOCK = "edge-gemma", "llama_cpp.Llama"
MAX_COLD_LOADS = 3
ROOM_BEHIND_TURNS = 256  # tokens of the context left for the turn and its answer


def speed(
    bundles: Sequence[Path],
    *,
    depths: Sequence[int] = (128, 512, 2048),
    threads: Sequence[int] = (),
    repeats: int = 3,
    n_predict: int = 32,
    progress: Progress = silent,
) -> Section:
    """Prefill and decode tokens per second over context length and thread count; load time from a
    cold and a warm cache; share of the memory's speed.
    """
    threads = tuple(threads) or tuple(sorted({1, len(usable_cpus())}))
    roof = {n: bandwidth(n) for n in threads}
    section = Section("speed")
    for n in threads:
        section.note(
            f"Memory reads {roof[n] / 1e9:.1f} GB/s with {n} thread{'s' * (n > 1)}; `of the roof` "
            "is what decode reads per second as a share of it."
        )
    for folder in bundles:
        bundle = Bundle.open(folder)
        longest = bundle.manifest.decoder.n_ctx_train - n_predict
        tasks = [
            Task(
                OURS,
                str(folder),
                n_ctx=_context(depth + n_predict),
                n_threads=n,
                n_prompt=depth,
                n_predict=n_predict,
            )
            for n in threads
            for depth in depths
            if depth <= longest
        ]
        runs: list[list[Run]] = [[] for _ in tasks]
        cold: list[Run] = []
        progress(f"{bundle.manifest.name}: {len(tasks)} settings, {repeats} interleaved rounds")
        with keeping(section):
            short = Task(OURS, str(folder), n_ctx=512, n_prompt=16, n_predict=2)
            for _ in range(min(repeats, MAX_COLD_LOADS)):
                cold.append(measure(short, cold_start=True))
            interleave(tasks, repeats, runs, steps=counted(progress))
        for task, found in zip(tasks, runs, strict=True):
            if row := _speed_row(section, bundle, task, found):
                section.rows.append(row | _load_and_roof(row, bundle, cold, roof[task.n_threads]))
        if section.stopped:
            break
    return section


def _speed_row(section: Section, bundle: Bundle, task: Task, runs: Sequence[Run]) -> Row | None:
    good = [run for run in runs if run.ok]
    name = bundle.manifest.name
    if good:
        return {"model": name, "threads": task.n_threads, "depth": task.n_prompt, **timed(good)}
    if runs:
        reason = runs[0].outcome.describe()
        section.note(f"{name}, {task.n_prompt} tokens, {task.n_threads} threads: {reason}")
    return None


def _load_and_roof(row: Row, bundle: Bundle, cold: Sequence[Run], roof: float) -> Row:
    loads_s = [run.result["load_s"] for run in cold if run.ok]
    complete = bool(cold) and len(loads_s) == len(cold)
    decode = row["decode_tok_s"]
    return {
        "load_cold_s": statistics.median(loads_s) if complete else None,
        "roof_share": decode * bytes_per_token(bundle.manifest) / roof if decode else None,
    }


def _context(n: int) -> int:
    return -(-n // 256) * 256


# --- latency ---


@dataclass(frozen=True)
class _Case:
    """One kind of input: ``amount`` is seconds of speech, or tokens of conversation before."""

    mode: str
    amount: float
    padding: bool = False

    def task(self, folder: Path, n_ctx: int) -> Task:
        task = Task(OURS, str(folder), n_ctx=n_ctx, n_predict=8, rounds=3, mode=self.mode)
        if self.mode == "text":
            return replace(task, n_prompt=int(self.amount))
        return replace(task, n_prompt=0, audio_s=self.amount, pad_audio=self.padding)


def latency(
    bundles: Sequence[Path],
    *,
    lengths_s: Sequence[float] = (1, 2, 5, 10, 20, 30),
    turns: Sequence[int] = (0, 512, 1536),
    padded: bool = True,
    after: bool = False,
    n_ctx: int = 2048,
    n_threads: int = 0,
    repeats: int = 3,
    progress: Progress = silent,
) -> Section:
    """Seconds from the end of what the user says to the first token of the answer.

    A bundle that hears: speech of several lengths, encoded and prefilled while it is spoken, with
    and (``padded``) without the padding rows; ``after``: also encoded after its end, to compare. A
    bundle that does not: a typed turn of 32 tokens behind conversations of several lengths.
    """
    section = Section("latency")
    section.note(
        "Speech is encoded and prefilled while it is spoken; the clock starts with its last "
        "packet. Real-time factor: the work during speech over its length; below 1 it keeps up."
    )
    with keeping(section):
        for folder in bundles:
            bundle = Bundle.open(folder)
            longest = bundle.manifest.decoder.n_ctx_train
            if bundle.manifest.audio is not None:
                cases = _spoken_cases(lengths_s, padded, after)
                section.note(_hangover_note())
            else:
                fitting = [n for n in turns if n + ROOM_BEHIND_TURNS <= longest]
                cases = [_Case("text", n) for n in fitting]
            tasks = [case.task(folder, min(n_ctx, longest)) for case in cases]
            tasks = [replace(task, n_threads=n_threads) for task in tasks]
            runs: list[list[Run]] = [[] for _ in tasks]
            progress(f"{bundle.manifest.name}: {len(tasks)} cases, {repeats} interleaved rounds")
            try:
                interleave(tasks, repeats, runs, steps=counted(progress))
            finally:  # at Ctrl-C, what was measured becomes rows
                section.rows += _latency_rows(section, bundle, cases, runs)
    return section


def _spoken_cases(lengths_s: Sequence[float], padded: bool, after: bool) -> list[_Case]:
    cases = []
    for seconds in lengths_s:
        cases.append(_Case("speech", seconds))
        if padded:
            cases.append(_Case("speech", seconds, padding=True))
        if after:
            cases.append(_Case("speech, encoded after its end", seconds))
    return cases


def _hangover_note() -> str:
    from edge_gemma.benchmarks.hearing import hangover_ms

    return (
        f"Hands-free, speech detection takes {hangover_ms()} ms after the last word until it says "
        "that it was the last: add them."
    )


def _latency_rows(
    section: Section, bundle: Bundle, cases: Sequence[_Case], runs: Sequence[Sequence[Run]]
) -> Iterator[Row]:
    for case, found in zip(cases, runs, strict=True):
        good = [run for run in found if run.ok]
        first = medians(good, "ttft_s")
        if good:
            yield {
                "model": bundle.manifest.name,
                "mode": case.mode,
                "amount": float(case.amount),
                "padding": case.padding,
                "rtf": median_of(good, "rtf"),
                "encoder_s": median_of(good, "encoder_s"),
                "first_token_s": first["ttft_s"],
                "first_token_s_spread": first["ttft_s_spread"],
            }
        elif found:
            reason = found[0].outcome.describe()
            section.note(f"{bundle.manifest.name}, {case.mode} {case.amount:g}: {reason}")


# --- compare ---


def compare(
    bundle: Path,
    others: Sequence[tuple[str, Path]] = (),
    *,
    n_prompt: int = 512,
    n_predict: int = 128,
    n_ctx: int = 2048,
    n_threads: int = 0,
    rounds: int = 2,
    repeats: int = 3,
    unlocked: bool = False,
    progress: Progress = silent,
) -> Section:
    """One interleaved run of this project against what a user would pick instead;
    ``llama_cpp.Llama`` on the same file is always among them, and both engines where the bundle
    has both decoders. ``unlocked``: this project also without the right to lock memory. Raises
    UsageError for a system that is not here.
    """
    from edge_gemma.benchmarks import rivals

    opened = Bundle.open(bundle)
    base = Task(
        OURS,
        str(bundle),
        n_ctx=n_ctx,
        n_threads=n_threads or len(usable_cpus()),
        n_prompt=n_prompt,
        n_predict=n_predict,
        rounds=rounds,
    )
    stock = replace(base, system=STOCK, path=str(opened.decoder_path))
    engines = ("llama", "onnx") if opened.manifest.onnx else ()
    ours = [replace(base, settings=(("engine", engine),)) for engine in engines] or [base]
    tasks = [*ours[:1], stock, *ours[1:]]
    tasks += [replace(base, system=system, path=str(path)) for system, path in others]
    for task in tasks:
        if reason := rivals.missing(task.system):
            raise UsageError(reason)
    names = [f"{OURS}, ONNX engine" if task in ours[1:] else task.system for task in tasks]
    limits = [NO_LIMITS] * len(tasks)
    if unlocked:
        tasks.append(ours[0])
        names.append(f"{OURS}, may not lock memory")
        limits.append(Limits(may_lock=False))
    section = Section("compare")
    section.note(
        f"{base.n_threads} threads, prompt of {n_prompt} tokens, {n_predict} tokens greedy, up to "
        f"{repeats} interleaved runs of {rounds} rounds; medians ± half the range"
    )
    runs: list[list[Run]] = [[] for _ in tasks]
    progress(f"{len(tasks)} systems, {repeats} interleaved rounds")
    with keeping(section):
        interleave(tasks, repeats, runs, limits, steps=counted(progress))
    for name, task, found in zip(names, tasks, runs, strict=True):
        good = [run for run in found if run.ok]
        if good:
            section.rows.append(_compared_row(name, task, good))
        elif found:
            section.note(f"{name}: {found[0].outcome.describe()}")
    section.note(*_ratios(section.rows))
    return section


def compare_each(
    bundles: Sequence[Path],
    *,
    n_prompt: int = 512,
    n_predict: int = 128,
    n_ctx: int = 2048,
    n_threads: int = 0,
    rounds: int = 2,
    repeats: int = 3,
    unlocked: bool = False,
    progress: Progress = silent,
) -> Section:
    """:func:`compare` for several bundles, as one section."""
    whole = Section("compare")
    for bundle in bundles:
        section = compare(
            bundle,
            n_prompt=n_prompt,
            n_predict=n_predict,
            n_ctx=n_ctx,
            n_threads=n_threads,
            rounds=rounds,
            repeats=repeats,
            unlocked=unlocked,
            progress=progress,
        )
        whole.add(section)
        if section.stopped:
            break
    return whole


def _compared_row(name: str, task: Task, good: Sequence[Run]) -> Row:
    path = Path(task.path)
    # a bundle's decoder is the same file in every bundle: its folder tells which it is
    file = path.parent.name if path.name == "decoder.gguf" else path.name
    return {
        "system": name,
        "file": file,
        "version": good[0].result.get("version", ""),
        **timed(good),
        **memory_of(good),
    }


RATIOS = {
    "decode": "decode_tok_s",
    "prefill": "prefill_tok_s",
    "peak PSS": "peak_pss_bytes",
    "peak RSS": "peak_rss_bytes",
    "load peak RSS": "load_peak_rss_bytes",
    "load time": "load_s",
}


def _ratios(rows: Sequence[Row]) -> Iterator[str]:
    """This project over the stock library on the same file, in words."""
    stock = next((row for row in rows if row["system"] == STOCK), None)
    if stock is None:
        return
    for row in rows:
        if row["system"].startswith(OURS):
            parts = [
                f"{words} {row[key] / stock[key]:.2f}×"
                for words, key in RATIOS.items()
                if row[key] and stock[key]
            ]
            yield f"{row['system']} over {STOCK}, {row['file']}: {', '.join(parts)}"
