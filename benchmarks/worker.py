"""The measured process: load one model with one system, read a prompt, write tokens, tell when each
begins.

In: a :class:`~edge_gemma.benchmarks.systems.Task` as JSON on the command line. Out: JSON lines on
standard output: ``{"phase": …}`` as each phase begins, one ``{"result": …}``. It measures time
only; the parent (``measure.py``) watches its memory, so that watching costs this process nothing.
What it does not know: limits, other runs, reports.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from edge_gemma.benchmarks.systems import OWN, System, Task, sound

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
SETTLE_S = 0.25  # after a load the parent takes its bearings; outside everything that is timed


def say(**fields) -> None:
    print(json.dumps(fields), flush=True)


def find_system(name: str) -> type[System]:
    if name in OWN:
        return OWN[name]
    from edge_gemma.benchmarks import (
        rivals,  # late: what a rival needs (sockets, HTTP) must not count as memory of ours
    )

    return rivals.SYSTEMS[name]


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
    if task.mode == "generate" and (task.audio_s or task.image_px):
        for phase in system.perceive():
            say(phase=phase)
    if task.mode != "generate":
        rounds = answer_latency(system)
    else:
        rounds = generate_rounds(system)
    say(result={"load_s": load_s, "start_s": imported - begin, "rounds": rounds, **system.facts()})
    say(phase="exit")
    time.sleep(SETTLE_S)
    system.close()


def generate_rounds(system: System) -> list[dict]:
    """A prompt, then tokens one by one; each round from nothing."""
    task = system.task
    ids = prompt_ids(system, task.n_prompt)
    rounds = []
    for turn in range(task.rounds):
        ids = (
            [*ids[:1], *ids[2:], ids[1]] if turn else ids
        )  # another text each round: nothing of the last one may be reused
        say(phase="prefill")
        start = time.perf_counter()
        stamps = []
        for _ in system.generate(ids, task.n_predict):
            if not stamps:
                say(phase="decode")
            stamps.append(time.perf_counter())
        decode_s = stamps[-1] - stamps[0]
        rounds.append(
            {
                "ttft_s": stamps[0] - start,
                "prefill_tok_s": len(ids) / (stamps[0] - start),
                "decode_tok_s": (len(stamps) - 1) / decode_s if decode_s else None,
                "n_decoded": len(stamps),
                "worst_token_s": max((b - a for a, b in zip(stamps, stamps[1:])), default=0.0),
            }
        )
    return rounds


def answer_latency(system: System) -> list[dict]:
    """From the end of what the user says to the first token of the answer.

    ``speech``: ``audio_s`` seconds in packets of 80 ms, each encoded and prefilled as it comes; the
    clock starts when the last packet arrives. Packets are handed over as fast as they are dealt
    with, so nothing waits; ``rtf`` tells whether real time would have. ``text``: a conversation of
    ``n_prompt`` tokens stands in the cache; the clock starts with a new turn of 32.
    """
    from edge_gemma import Audio, Rows, Sampling, Tokens
    from edge_gemma.messages import Message

    task, model = system.task, system.model
    first_token = Sampling(temperature=0, max_tokens=task.n_predict)
    rounds = []
    for turn in range(task.rounds):
        with model.session() as session:
            if task.mode == "speech":
                samples = sound(task.audio_s)
                packets = [samples[i : i + 1280] for i in range(0, len(samples), 1280)]
                before, after = model.prompt.listening(
                    [Message("user", [Audio(), "Answer what was said."])], pad_audio=task.pad_audio
                )
                say(phase="listen")
                session.append(before)
                stream, n_rows, begin = model.encoder("audio").stream(), 0, time.perf_counter()
                for packet in packets[:-1]:
                    if len(rows := stream.push(packet)):
                        session.append([Rows(rows)])
                        n_rows += len(rows)
                start = time.perf_counter()
                found = [stream.push(packets[-1]), stream.finish()]
                spans = [Rows(rows) for rows in found if len(rows)]
                session.append([*spans, *after(n_rows + sum(len(span) for span in spans))])
                rtf = (start - begin) / task.audio_s
                stream.close()
            else:
                ids = prompt_ids(system, task.n_prompt + 33)
                del ids[1 + turn]  # another text each round
                say(phase="prefill")
                if task.n_prompt:
                    session.append([Tokens(ids[:-32])])
                start, rtf = time.perf_counter(), None
                session.append([Tokens(ids[-32:])])
            say(phase="decode")
            chunks = iter(session.generate(first_token))
            while not next(chunks).token_ids:
                pass
            first = time.perf_counter()
            for _ in chunks:
                pass
            rounds.append({"ttft_s": first - start, "rtf": rtf})
    return rounds


if __name__ == "__main__":
    task = Task.from_json(sys.argv[1])
    if not Path(task.path).exists():
        sys.exit(f"nothing at {task.path}")
    run(task)
