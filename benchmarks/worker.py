"""The measured process: load one model with one system, do what the task's mode says, tell when
each phase begins.

In: a :class:`~edge_gemma.benchmarks.systems.Task` as JSON on the command line. Out: JSON lines on
standard output: ``{"phase": …}`` as each phase begins, one ``{"result": …}``. It measures time
only; the parent (``measure.py``) watches its memory, so that watching costs this process nothing.
What it does not know: limits, other runs, reports.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_gemma.benchmarks.systems import OWN, System, Task
from edge_gemma.errors import UsageError

Round = dict[str, Any]
Mode = Callable[[System], list[Round]]

# Own text, repeated as far as a prompt needs; a base model continues it without ever ending.
PASSAGE = (
    "The harbour wakes before the town does. Nets are carried down the steps, the ice is "
    "broken with short spades, and the first boats leave "
    "while the lamps along the quay are still lit. By seven the fish market is loud: crates "
    "are weighed, prices are shouted and written on slates, "
    "and two cats wait under the same table as every morning. The ferry comes at eight with "
    "schoolchildren, a post bag and the newspapers from the "
    "mainland. At noon the wind usually turns, the flags change sides, and whoever has "
    "painted a fence hopes that the dust stays on the road. "
)
SETTLE_S = 0.25  # after a load the parent looks at the memory; outside everything that is timed

# mode → the function that gives its rounds; each module is imported only by its own modes, so that
# no other run pays memory for it
MODES = {
    "generate": "edge_gemma.benchmarks.worker:generate_rounds",
    "start": "edge_gemma.benchmarks.start:start_rounds",
    "text": "edge_gemma.benchmarks.turns:typed_rounds",
    "speech": "edge_gemma.benchmarks.turns:spoken_rounds",
    "speech, encoded after its end": "edge_gemma.benchmarks.turns:spoken_rounds",
    "conversation": "edge_gemma.benchmarks.turns:picture_turns",
    "listen": "edge_gemma.benchmarks.turns:listened_rounds",
    "encode": "edge_gemma.benchmarks.encoders:step_rounds",
    "soak": "edge_gemma.benchmarks.encoders:soak_rounds",
    "picture": "edge_gemma.benchmarks.encoders:picture_rounds",
}


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def find_mode(name: str) -> Mode:
    module, _, function = MODES[name].partition(":")
    found: Mode = getattr(importlib.import_module(module), function)
    return found


def find_system(name: str) -> type[System]:
    """A system by its name, or one from elsewhere as ``module:Class``. Raises UsageError."""
    if name in OWN:
        return OWN[name]
    # late: what a rival needs (sockets, HTTP) must not count as memory of ours
    from edge_gemma.benchmarks import rivals

    if name in rivals.SYSTEMS:
        return rivals.SYSTEMS[name]
    module, colon, class_name = name.partition(":")
    if not colon:
        raise UsageError(rivals.missing(name))
    found: type[System] = getattr(importlib.import_module(module), class_name)
    return found


def prompt_ids(system: System, n: int) -> list[int]:
    """Exactly ``n`` ids of the passage, over and over."""
    ids: list[int] = []
    text = PASSAGE
    while len(ids) < n:
        ids = system.tokenize(text)
        text += PASSAGE
    return ids[:n]


def run(task: Task) -> None:
    begin = time.perf_counter()
    say(phase="load")
    system = find_system(task.system)(task)
    imported = time.perf_counter()
    system.load()
    load_s = time.perf_counter() - imported
    say(phase="loaded", load_s=load_s, **system.facts())
    time.sleep(SETTLE_S)
    rounds = find_mode(task.mode)(system)
    say(result={"load_s": load_s, "start_s": imported - begin, "rounds": rounds, **system.facts()})
    say(phase="exit")
    time.sleep(SETTLE_S)
    system.close()


def generate_rounds(system: System) -> list[Round]:
    """A prompt, then tokens one by one; each round from nothing."""
    task = system.task
    if task.audio_s or task.image_px:
        for phase in system.perceive():
            say(phase=phase)
    ids = prompt_ids(system, task.n_prompt)
    rounds = []
    for turn in range(task.rounds):
        if turn:  # another text each round: nothing of the last one may be reused
            ids = [*ids[:1], *ids[2:], ids[1]]
        say(phase="prefill")
        start = time.perf_counter()
        stamps: list[float] = []
        for _ in system.generate(ids, task.n_predict):
            if not stamps:
                say(phase="decode")
            stamps.append(time.perf_counter())
        rounds.append(_token_times(len(ids), start, stamps))
    return rounds


def _token_times(n_prompt: int, start: float, stamps: list[float]) -> Round:
    ttft_s, decode_s = stamps[0] - start, stamps[-1] - stamps[0]
    between = [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
    return {
        "ttft_s": ttft_s,
        "prefill_tok_s": n_prompt / ttft_s,
        "decode_tok_s": (len(stamps) - 1) / decode_s if decode_s else None,
        "n_decoded": len(stamps),
        "worst_token_s": max(between, default=0.0),
    }


if __name__ == "__main__":
    task = Task.from_json(sys.argv[1])
    if not Path(task.path).exists():
        sys.exit(f"nothing at {task.path}")
    run(task)
