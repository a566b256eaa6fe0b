"""How soon an answer starts, and how many tokens a pass gives: kept prompts, drafts, forced tokens.

In: bundles. Out: a section of rows, and the worker's mode that they come from. A kept prompt is
taken from memory, and from disk by a cache whose memory is empty, as in a new process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from edge_gemma.benchmarks.caps import usable_cpus
from edge_gemma.benchmarks.measure import Run, interleave, medians
from edge_gemma.benchmarks.memory import keeping
from edge_gemma.benchmarks.sections import Progress, Section, counted, silent
from edge_gemma.benchmarks.systems import System, Task
from edge_gemma.benchmarks.turns import ours_of
from edge_gemma.benchmarks.worker import Round, prompt_ids, say
from edge_gemma.bundles.folder import Bundle
from edge_gemma.conversation.prompt_cache import PromptCache
from edge_gemma.conversation.prompt_files import PromptFiles
from edge_gemma.conversation.stream import Usage
from edge_gemma.model import Model
from edge_gemma.options import Sampling
from edge_gemma.plan.records import MAX_DRAFT
from edge_gemma.spans import Tokens

QUESTION_TOKENS = 16  # behind the beginning that was kept
KEYS = ("cold_s", "memory_s", "disk_s", "tokens_per_pass", "forced_share")
CALL = {
    "type": "object",
    "properties": {
        "name": {"const": "set_temperature"},
        "parameters": {
            "type": "object",
            "properties": {
                "room": {"enum": ["kitchen", "living room", "bathroom"]},
                "target_temperature_celsius": {"type": "integer", "minimum": 5, "maximum": 30},
                "heating_mode": {"enum": ["eco", "comfort"]},
            },
            "required": ["room", "target_temperature_celsius", "heating_mode"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "parameters"],
    "additionalProperties": False,
}


def start(
    bundles: Sequence[Path],
    *,
    n_prompt: int = 2000,
    n_predict: int = 64,
    n_threads: int = 0,
    repeats: int = 3,
    progress: Progress = silent,
) -> Section:
    """Seconds to the first token behind a long beginning: prefilled, restored from memory, restored
    from disk; tokens that a pass over the weights gives where the answer quotes its prompt; and the
    share of a function call that its schema forces.
    """
    section = Section("start")
    section.note(
        f"{QUESTION_TOKENS} new tokens behind the beginning. Tokens per pass: greedy, behind a "
        "text that repeats itself; 1 is no draft accepted."
    )
    threads = n_threads or len(usable_cpus())
    settings = (("prompt_cache_bytes", None), ("n_draft", MAX_DRAFT), ("structured", True))
    with keeping(section):
        for folder in bundles:
            bundle = Bundle.open(folder)
            depth = min(n_prompt, bundle.manifest.decoder.n_ctx_train - n_predict - 64)
            task = Task(
                "edge-gemma",
                str(folder),
                n_ctx=-(-(depth + n_predict + 64) // 256) * 256,
                n_threads=threads,
                n_prompt=depth,
                n_predict=n_predict,
                rounds=2,
                mode="start",
                settings=settings,
            )
            runs: list[list[Run]] = [[]]
            progress(f"{bundle.manifest.name}: {repeats} runs of kept prompts")
            interleave([task], repeats, runs, steps=counted(progress))
            good = [run for run in runs[0] if run.ok]
            if good:
                row = {"model": bundle.manifest.name, "threads": threads, "depth": depth}
                section.rows.append(row | medians(good, *KEYS))
            elif runs[0]:
                section.note(f"{bundle.manifest.name}: {runs[0][0].outcome.describe()}")
    return section


def start_rounds(system: System) -> list[Round]:
    """Every round begins with another text, and with nothing kept."""
    ours, task = ours_of(system), system.task
    model = ours.model
    n_bytes = model.plan.settings.prompt_cache_bytes
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(task.rounds):
            ids = prompt_ids(system, task.n_prompt + 3 * QUESTION_TOKENS + task.rounds)
            del ids[1 + turn]
            begin, rest = ids[: task.n_prompt], ids[task.n_prompt :]
            questions = [rest[i * QUESTION_TOKENS :][:QUESTION_TOKENS] for i in range(3)]
            files = PromptFiles("bench", Path(folder) / str(turn))
            say(phase="prefill")
            _keep_in(model, PromptCache(n_bytes, files))
            cold_s = _first_token_s(model, begin, questions[0])
            memory_s = _first_token_s(model, begin, questions[1])
            files.close()
            _keep_in(model, PromptCache(n_bytes, files))
            disk_s = _first_token_s(model, begin, questions[2])
            say(phase="decode")
            quoted = _usage(model, begin[:512], Sampling(temperature=0, max_tokens=task.n_predict))
            call = Sampling(temperature=0, max_tokens=200, schema=CALL)
            called = _usage(model, begin[:32], call)
            rounds.append(
                {
                    "cold_s": cold_s,
                    "memory_s": memory_s,
                    "disk_s": disk_s,
                    "tokens_per_pass": quoted.completion_tokens / (quoted.n_passes + 1),
                    "forced_share": called.forced_tokens / called.completion_tokens,
                }
            )
    return rounds


def _keep_in(model: Model, prompts: PromptCache) -> None:
    model.sequences.prompts = prompts


def _first_token_s(model: Model, begin: list[int], question: list[int]) -> float:
    session = model.session()
    try:
        started = time.perf_counter()
        session.replace([Tokens(tuple(begin)), Tokens(tuple(question))], n_stable=len(begin))
        for _ in session.generate(Sampling(temperature=0, max_tokens=1)):
            return time.perf_counter() - started
        raise SystemExit("no token came")
    finally:
        session.close(keep=False)


def _usage(model: Model, ids: list[int], sampling: Sampling) -> Usage:
    session = model.session()
    try:
        session.replace([Tokens(tuple(ids))])
        (*_, end) = session.generate(sampling)
        assert end.usage is not None
        return end.usage
    finally:
        session.close(keep=False)
