"""What hearing costs: encoder steps, a spoken conversation's memory, an hour without growth.

In: a bundle that hears; for some, recordings. Out: sections of rows. The wait for an answer is
``speed.latency``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np

from edge_gemma.benchmarks.caps import Limits, usable_cpus
from edge_gemma.benchmarks.inputs import PACKET
from edge_gemma.benchmarks.measure import Run, interleave, measure, median_of, medians
from edge_gemma.benchmarks.memory import keeping
from edge_gemma.benchmarks.sections import Progress, Row, Section, counted, silent
from edge_gemma.benchmarks.systems import Task
from edge_gemma.bundles.folder import Bundle
from edge_gemma.errors import RuntimeFailure
from edge_gemma.hearing.samples import RATE_HZ
from edge_gemma.machine.device import load_profile
from edge_gemma.plan.records import Encoders
from edge_gemma.units import format_bytes

ENCODER = "edge-gemma audio encoder"
CLIPS_OF_A_CONVERSATION = 2
SOAK_TIMEOUT_S = 4 * 3600.0


def encoder(
    bundles: Sequence[Path],
    *,
    seconds: float = 20.0,
    threads: Sequence[int] = (),
    repeats: int = 3,
    progress: Progress = silent,
) -> Section:
    """Steps of 480 ms through the audio encoder alone. Memory is the whole process's, Python and
    onnxruntime included, from the end of load on.
    """
    section = Section("encoder")
    threads = tuple(threads) or tuple(sorted({1, len(usable_cpus())}))
    tasks = [
        Task(ENCODER, str(folder), n_threads=n, audio_s=seconds, mode="encode")
        for folder in bundles
        for n in threads
    ]
    runs: list[list[Run]] = [[] for _ in tasks]
    with keeping(section):
        interleave(tasks, repeats, runs, steps=counted(progress))
    for task, found in zip(tasks, runs, strict=True):
        if good := [run for run in found if run.ok]:
            section.rows.append(_encoder_row(task, good))
        elif found:
            section.note(f"{Path(task.path).name}: {found[0].outcome.describe()}")
    return section


def _encoder_row(task: Task, good: Sequence[Run]) -> Row:
    facts = good[0].result
    return {
        "model": Bundle.open(task.path).manifest.name,
        "precision": facts["precision"],
        "weights_bytes": facts["weights_bytes"],
        "threads": task.n_threads,
        **medians(good, "rtf", "step_s"),
        "step_p95_s": median_of(good, "step_p95_s"),
        "tail_s": median_of(good, "tail_s"),
        "load_s": facts["load_s"],
        "peak_pss_bytes": max(run.peak_pss_bytes for run in good),
    }


def listening(
    bundles: Sequence[Path],
    *,
    clips: Sequence[Path],
    n_ctx: int = 2048,
    n_threads: int = 0,
    progress: Progress = silent,
) -> Section:
    """Planned against measured PSS of a spoken conversation, while listening and while answering:
    with the audio encoder open all the time, let go while answering, and heard first. Two clips go
    through speech detection, encoder, prefill and 48 tokens of answer each. Raises RuntimeFailure.
    """
    section = Section("listening")
    with keeping(section):
        for folder in bundles:
            name = Bundle.open(folder).manifest.name
            for encoders in get_args(Encoders):
                progress(f"{name}, encoders {encoders}")
                task = Task(
                    "edge-gemma",
                    str(folder),
                    mode="listen",
                    n_ctx=n_ctx,
                    n_threads=n_threads or len(usable_cpus()),
                    clips=tuple(str(clip) for clip in clips[:CLIPS_OF_A_CONVERSATION]),
                    settings=_held(encoders),
                )
                run = measure(task)
                if not run.ok:
                    raise RuntimeFailure(f"{name}: {run.outcome.describe()}")
                for phase in ("listen", "decode"):
                    row = {"model": name, "encoders": encoders, "phase": phase}
                    section.rows.append(row | _phase(run, phase))
    return section


def _held(encoders: Encoders) -> tuple[tuple[str, object], ...]:
    """What a plan is asked for. Copied weights cannot be let go while one listens."""
    copies: tuple[tuple[str, object], ...] = (("repack", False),)
    return (("encoders", encoders), *(copies if encoders == "hear first" else ()))


def hear_first(
    bundles: Sequence[Path],
    *,
    board: str = "pi-4-2gb",
    seconds: float = 6.0,
    n_predict: int = 16,
    n_threads: int = 1,
    rounds: int = 3,
    progress: Progress = silent,
) -> Section:
    """Spoken turns as a board plans them where it hears first, under a hard limit of what that
    board has to spend and from a cold cache; beside the same settings with the encoder resident and
    no limit. Raises RuntimeFailure.
    """
    section = Section("hear first")
    with keeping(section):
        for folder in bundles:
            name = Bundle.open(folder).manifest.name
            task = Task(
                "edge-gemma",
                str(folder),
                mode="speech",
                n_ctx=0,
                n_threads=n_threads,
                n_predict=n_predict,
                rounds=rounds,
                device=board,
                audio_s=seconds,
                settings=_held("hear first"),
            )
            limit_bytes = load_profile(board).usable_bytes
            progress(f"{name}, hearing first under {format_bytes(limit_bytes)}")
            held = measure(task, Limits(limit_bytes))
            if not held.ok:
                raise RuntimeFailure(f"{name}: {held.outcome.describe()}")
            progress(f"{name}, the encoder resident, no limit")
            named = {key: held.result["settings"][key] for key in _SAME_SETTINGS}
            named["encoders"] = "resident"
            free = replace(task, n_ctx=named.pop("n_ctx"), device="auto")
            resident = measure(replace(free, settings=tuple(named.items())), cold_start=True)
            if not resident.ok:
                raise RuntimeFailure(f"{name}: {resident.outcome.describe()}")
            section.rows += [_turn_row(name, run) for run in (held, resident)]
            section.note(*held.outcome.notes)
    return section


_SAME_SETTINGS = ("n_ctx", "n_ubatch", "kv_type", "repack", "rescore")


def _turn_row(name: str, run: Run) -> Row:
    limit_bytes = run.outcome.limit_bytes
    limit = f"{run.outcome.kind}, {format_bytes(limit_bytes)}" if limit_bytes else "none"
    listening, answering = _phase(run, "listen"), _phase(run, "decode")
    return {
        "model": name,
        "encoders": run.result["settings"]["encoders"],
        "limit": limit,
        "n_ctx": run.result["settings"]["n_ctx"],
        "planned_bytes": run.planned_peak_bytes,
        "peak_pss_bytes": run.peak_pss_bytes,
        "error": run.planned_peak_bytes / run.peak_pss_bytes - 1,
        "listen_planned_bytes": listening["planned_bytes"],
        "listen_pss_bytes": listening["peak_pss_bytes"],
        "decode_pss_bytes": answering["peak_pss_bytes"],
        **medians([run], "begin_s", "ttft_s", "turn_s"),
        "read_bytes": run.median("read_bytes"),
        "oom_kills": run.outcome.oom_kills,
        "max_usage_bytes": run.outcome.max_usage_bytes,
    }


def _phase(run: Run, name: str) -> Row:
    planned = sum(n for _, n, _, phases in run.result["items"] if name in phases)
    peaks = [phase["peak_pss_bytes"] for phase in run.phases if phase["name"] == name]
    if not peaks:
        raise RuntimeFailure(f"the clips held no speech: the phase {name} never began")
    return {
        "planned_bytes": planned,
        "peak_pss_bytes": max(peaks),
        "error": planned / max(peaks) - 1,
    }


def soak(
    bundles: Sequence[Path],
    *,
    clips: Sequence[Path],
    minutes: float = 60.0,
    n_threads: int = 0,
    progress: Progress = silent,
) -> Section:
    """The clips in a loop through detection and encoder, as fast as it goes: what grew, what slowed
    down, what a microphone would have lost.
    """
    section = Section("soak")
    with keeping(section):
        for folder in bundles:
            name = Bundle.open(folder).manifest.name
            progress(f"{name}: {minutes:g} minutes of sound")
            task = Task(
                ENCODER,
                str(folder),
                mode="soak",
                n_threads=n_threads or len(usable_cpus()),
                clips=tuple(str(clip) for clip in clips),
                minutes=minutes,
            )
            run = measure(task, timeout_s=SOAK_TIMEOUT_S)
            if not run.ok:
                raise RuntimeFailure(f"{name}: {run.outcome.describe()}")
            section.rows.append({"model": name, **run.result["rounds"][0]})
            section.note(f"{name}: it took {run.outcome.seconds:.0f} s")
    return section


def hangover_ms() -> int:
    """How long after the last word speech detection says that it was the last: what a hands-free
    turn waits beside the wait for the first token.
    """
    from edge_gemma.hearing.utterances import SpeechDetector

    detector = SpeechDetector(probability=lambda chunk: float(np.abs(chunk).max() > 0.1))
    detector.push(np.full(RATE_HZ // PACKET * PACKET, 0.5, np.float32))
    n = 0
    while detector.speaking:
        detector.push(np.zeros(PACKET, np.float32))
        n += PACKET
    return round(1000 * n / RATE_HZ)
