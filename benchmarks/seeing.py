"""What seeing costs: one picture through the encoders of several systems, and a conversation.

In: folders with vision encoders, bundles that see. Out: sections of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edge_gemma.benchmarks.caps import usable_cpus
from edge_gemma.benchmarks.measure import Run, interleave, measure, median_of, medians
from edge_gemma.benchmarks.memory import keeping
from edge_gemma.benchmarks.sections import Progress, Row, Section, counted, silent
from edge_gemma.benchmarks.systems import Task
from edge_gemma.bundles.folder import Bundle
from edge_gemma.errors import RuntimeFailure

ENCODER = "edge-gemma vision encoder"


def pictures(
    folders: Sequence[Path],
    others: Sequence[Task] = (),
    *,
    image_px: int = 896,
    n_threads: int = 0,
    rounds: int = 3,
    repeats: int = 1,
    reference: str = "",
    progress: Progress = silent,
) -> Section:
    """One picture of ``image_px`` a side, ``rounds`` times after a warm-up in each process,
    processes interleaved: this project's encoders in ``folders``, and other systems' tasks (system,
    path, settings). ``reference``: the system from whose soft tokens the others' distance is taken
    (default: the first row's). Raises RuntimeFailure when no system encoded a picture.
    """
    section = Section("pictures")
    n_threads = n_threads or len(usable_cpus())
    tasks = [
        replace(task, mode="picture", image_px=image_px, n_threads=n_threads, rounds=rounds + 1)
        for task in (*(Task(ENCODER, str(folder)) for folder in folders), *others)
    ]
    runs: list[list[Run]] = [[] for _ in tasks]
    with keeping(section):
        interleave(tasks, repeats, runs, steps=counted(progress))
    probes: list[np.ndarray] = []
    for task, found in zip(tasks, runs, strict=True):
        if good := [run for run in found if run.ok]:
            section.rows.append(_picture_row(task, good))
            probes.append(np.array(good[0].result["rounds"][-1]["probe"]))
        elif found:  # llama.cpp aborts on some files; the others go on
            section.note(f"{task.system}, {Path(task.path).name}: {found[0].outcome.describe()}")
    if not section.rows and not section.stopped:
        raise RuntimeFailure(f"no system encoded a picture: {'; '.join(section.notes)}")
    systems = [row["system"] for row in section.rows]
    base = probes[systems.index(reference) if reference in systems else 0] if probes else None
    for row, probe in zip(section.rows, probes, strict=True):
        row["relative_rms"] = _distance(probe, base)
    return section


def _picture_row(task: Task, good: Sequence[Run]) -> Row:
    return {
        "system": task.system.rpartition(":")[2],
        "file": Path(task.path).name,
        **medians(good, "picture_s"),
        "cpu_s": median_of(good, "cpu_s"),
        "peak_pss_bytes": max(run.peak_pss_bytes for run in good),
        "anon_bytes": max(run.peak_anon_bytes for run in good),
    }


def _distance(probe: np.ndarray, base: np.ndarray | None) -> float | None:
    """Root mean square of the difference over the deviation of ``base``; None where a system hands
    out fewer rows.
    """
    if base is None or probe.shape != base.shape:
        return None
    return float(np.sqrt(((probe - base) ** 2).mean() / base.var()))


def conversation(
    bundles: Sequence[Path],
    *,
    n_pictures: int = 20,
    image_px: int = 768,
    n_ctx: int | None = None,
    n_threads: int = 0,
    n_predict: int = 8,
    progress: Progress = silent,
) -> Section:
    """Turns with one new picture and a question each, held against the plan. Raises RuntimeFailure
    for a run that fails.
    """
    section = Section("conversation")
    with keeping(section):
        for folder in bundles:
            name = Bundle.open(folder).manifest.name
            progress(f"{name}: {n_pictures} pictures")
            task = Task(
                "edge-gemma",
                str(folder),
                mode="conversation",
                n_ctx=n_ctx or 0,
                n_threads=n_threads,
                n_predict=n_predict,
                image_px=image_px,
                rounds=n_pictures,
            )
            run = measure(task)
            if not run.ok:
                raise RuntimeFailure(f"{name}: {run.outcome.describe()}")
            section.rows.append(
                {
                    "model": name,
                    "pictures": n_pictures,
                    "n_ctx": run.result["settings"]["n_ctx"],
                    "turns_dropped": run.result["rounds"][0]["turns_dropped"],
                    "planned_peak_bytes": run.planned_peak_bytes,
                    "peak_pss_bytes": run.peak_pss_bytes,
                    "error": run.planned_peak_bytes / run.peak_pss_bytes - 1,
                }
            )
    return section
