"""What commands that answer share: load with a progress line, stream to the terminal, print at the
end what it took.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import typer

from edge_gemma.cli.common import (
    INTERRUPTED,
    LoadingLine,
    interruptible,
    note,
    open_bundle,
    parse_scaled,
    print_json,
)
from edge_gemma.cli.options import LoadingOptions
from edge_gemma.units import format_bytes

if TYPE_CHECKING:
    from edge_gemma.bundles.manifest import Sense
    from edge_gemma.conversation.stream import Chunk
    from edge_gemma.model import Model
    from edge_gemma.options import Logprob


def load_model(
    bundle: str,
    loading: LoadingOptions,
    senses: tuple[Sense, ...] | None = None,
    *,
    structured: bool = False,
) -> tuple[Model, float]:
    """Plan and load; returns the model and the seconds it took.

    ``structured``: answers will be held to a schema.
    """
    from edge_gemma import load
    from edge_gemma.engines.llama import library as llama

    llama.set_verbose(loading.verbose)
    started = time.perf_counter()
    with LoadingLine() as line:
        model = load(
            open_bundle(bundle),
            device=loading.device,
            request=loading.request(senses, structured=structured),
            lora=[parse_scaled(text, "--lora") for text in loading.lora or ()],
            on_progress=line.fraction,
        )
    for text in (*model.plan.concessions, *model.plan.notes):
        note(f"plan: {text}")
    return model, time.perf_counter() - started


@dataclasses.dataclass(frozen=True)
class Answer:
    """``end`` is the last chunk; None when the answer never began."""

    text: str
    logprobs: list[Logprob]
    end: Chunk | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an answer took: seconds to load and in all, the planned and the measured peak."""

    load_s: float
    wall_s: float
    planned_bytes: int
    measured_bytes: int


def stream(chunks: Iterator[Chunk], cancel: Callable[[], None], *, quiet: bool = False) -> Answer:
    """Print an answer as it comes (not with ``quiet``). Ctrl-C stops it; what came is kept."""
    return collect(interruptible(chunks, cancel), quiet=quiet)


def collect(chunks: Iterator[Chunk], *, quiet: bool = False) -> Answer:
    """:func:`stream` in this thread: Ctrl-C is the caller's."""
    text: list[str] = []
    logprobs: list[Logprob] = []
    end: Chunk | None = None
    for chunk in chunks:
        text.append(chunk.text)
        logprobs += chunk.logprobs
        if chunk.finish_reason:
            end = chunk
        if not quiet:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    return Answer("".join(text), logprobs, end)


def finish(answer: Answer, cost: Cost, *, as_json: bool, stats: bool) -> None:
    """The last object of ``--json``, or the line of ``--stats``. Leaves with code 130 when Ctrl-C
    ended the answer.
    """
    end = answer.end
    if as_json:
        print_json(_record(answer, cost))
    else:
        print()
        if stats and end is not None and end.usage:
            note(stats_line(end, cost))
    if end is None or end.finish_reason == "cancelled":
        raise typer.Exit(INTERRUPTED)


def _record(answer: Answer, cost: Cost) -> dict[str, object]:
    end = answer.end
    timings: dict[str, object] = {"load_s": cost.load_s, "wall_s": cost.wall_s}
    if end is not None and end.timings:
        timings |= dataclasses.asdict(end.timings)
    record: dict[str, object] = {
        "text": answer.text,
        "finish_reason": end.finish_reason if end else "cancelled",
        "usage": end.usage if end else None,
        "timings": timings,
        "memory": {
            "planned_peak_bytes": cost.planned_bytes,
            "peak_pss_bytes": cost.measured_bytes,
        },
    }
    if answer.logprobs:
        record["logprobs"] = answer.logprobs
    return record


def stats_line(end: Chunk, cost: Cost | None = None) -> str:
    """The figures of an answer in one line."""
    parts = [] if cost is None else [f"load {cost.load_s:.1f} s"]
    timings, usage = end.timings, end.usage
    if timings and usage:
        ttft_ms = None if timings.ttft_s is None else timings.ttft_s * 1000
        parts += [
            f"first token {_rate(ttft_ms, 'ms')}",
            f"prefill {_rate(timings.prefill_tok_s, 'tok/s')} ({usage.prompt_tokens} tokens, "
            f"{usage.reused_tokens} reused)",
            f"decode {_rate(timings.decode_tok_s, 'tok/s')} ({usage.completion_tokens} tokens)",
        ]
    if cost is not None:
        parts.append(
            f"memory planned {format_bytes(cost.planned_bytes)}, measured "
            f"{format_bytes(cost.measured_bytes)}"
        )
    if usage:
        parts.append(f"seed {usage.seed}")
    return " · ".join([*parts, end.finish_reason or ""])


def _rate(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.1f} {unit}"
