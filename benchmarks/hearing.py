"""What hearing costs: encoder steps, a spoken conversation's memory, an hour without growth.

In: a bundle that hears; for some, recordings. Out: sections of rows. The wait for an answer is
``speed.latency``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_gemma.benchmarks.caps import usable_cpus
from edge_gemma.benchmarks.inputs import PACKET
from edge_gemma.benchmarks.measure import Run, interleave, measure, median_of, medians
from edge_gemma.benchmarks.memory import keeping
from edge_gemma.benchmarks.sections import Progress, Row, Section, counted, silent
from edge_gemma.benchmarks.systems import Task
from edge_gemma.bundles.folder import Bundle
from edge_gemma.errors import RuntimeFailure
from edge_gemma.hearing.samples import RATE_HZ

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
    with the audio encoder open all the time, and with it let go while answering. Two clips go
    through speech detection, encoder, prefill and 48 tokens of answer each. Raises RuntimeFailure.
    """
    section = Section("listening")
    with keeping(section):
        for folder in bundles:
            name = Bundle.open(folder).manifest.name
            for one_encoder in (False, True):
                encoders = "one at a time" if one_encoder else "resident"
                progress(f"{name}, encoders {encoders}")
                task = Task(
                    "edge-gemma",
                    str(folder),
                    mode="listen",
                    n_ctx=n_ctx,
                    n_threads=n_threads or len(usable_cpus()),
                    clips=tuple(str(clip) for clip in clips[:CLIPS_OF_A_CONVERSATION]),
                    one_encoder=one_encoder,
                )
                run = measure(task)
                if not run.ok:
                    raise RuntimeFailure(f"{name}: {run.outcome.describe()}")
                for phase in ("listen", "decode"):
                    row = {"model": name, "encoders": encoders, "phase": phase}
                    section.rows.append(row | _phase(run, phase))
    return section


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
