"""What commands that answer share: load with a progress line, stream to the terminal, say at the
end what it took.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from edge_gemma.cli.common import (
    ProgressLine,
    interruptible,
    note,
    open_bundle,
    parse_lora,
    print_json,
)
from edge_gemma.cli.options import Loading

if TYPE_CHECKING:
    from edge_gemma.bundles.manifest import Sense


def load_model(bundle: str, loading: Loading, senses: tuple[Sense, ...] | None = None):
    """Plan and load; returns (model, seconds)."""
    from edge_gemma import load
    from edge_gemma.engines.llama import library as llama

    llama.set_verbose(loading.verbose)
    started = time.perf_counter()
    with ProgressLine("loading") as line:
        model = load(
            open_bundle(bundle),
            device=loading.device,
            request=loading.request(senses),
            lora=parse_lora(loading.lora),
            on_progress=line.fraction,
        )
    for text in (*model.plan.concessions, *model.plan.notes):
        note(f"plan: {text}")
    return model, time.perf_counter() - started


@dataclasses.dataclass
class Answer:
    text: str
    logprobs: list
    end: object  # the last chunk; None when the answer never began


def stream(chunks: Iterator, cancel: Callable[[], None], *, quiet: bool = False) -> Answer:
    """Print an answer as it comes (not with ``quiet``). Ctrl-C stops it; what came is kept."""
    text, logprobs, end = [], [], None
    for chunk in interruptible(chunks, cancel):
        text.append(chunk.text)
        logprobs += chunk.logprobs
        end = chunk if chunk.finish_reason else end
        if not quiet:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    return Answer("".join(text), logprobs, end)


def finish(
    answer: Answer,
    load_s: float,
    wall_s: float,
    planned_bytes: int,
    measured_bytes: int,
    *,
    as_json: bool,
    stats: bool,
) -> None:
    """The last object of ``--json``, or the line of ``--stats``. Leaves with code 130 when Ctrl-C
    ended the answer.
    """
    end = answer.end
    memory = {"planned_peak_bytes": planned_bytes, "peak_pss_bytes": measured_bytes}
    if as_json:
        timings = {
            "load_s": load_s,
            "wall_s": wall_s,
            **(dataclasses.asdict(end.timings) if end.timings else {}),
        }
        result = {
            "text": answer.text,
            "finish_reason": end.finish_reason,
            "usage": end.usage,
            "timings": timings,
            "memory": memory,
        }
        print_json(result | ({"logprobs": answer.logprobs} if answer.logprobs else {}))
    else:
        print()
        if stats and end.usage:
            note(stats_line(end, load_s, memory))
    if end.finish_reason == "cancelled":
        import typer

        raise typer.Exit(130)


def stats_line(end, load_s: float | None = None, memory: dict | None = None) -> str:
    from edge_gemma.units import format_bytes

    def rate(value, unit):
        return "–" if value is None else f"{value:.1f} {unit}"

    t, u = end.timings, end.usage
    parts = [] if load_s is None else [f"load {load_s:.1f} s"]
    parts += [
        f"first token {rate(t.ttft_s and t.ttft_s * 1000, 'ms')}",
        f"prefill {rate(t.prefill_tok_s, 'tok/s')} ({u.prompt_tokens} tokens, "
        f"{u.reused_tokens} reused)",
    ]
    parts.append(f"decode {rate(t.decode_tok_s, 'tok/s')} ({u.completion_tokens} tokens)")
    if memory:
        parts.append(
            f"memory planned {format_bytes(memory['planned_peak_bytes'])}, measured "
            f"{format_bytes(memory['peak_pss_bytes'])}"
        )
    return " · ".join([*parts, f"seed {u.seed}", end.finish_reason])
