"""batch: a file of requests, answered together."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import (
    BundleOption,
    JsonOption,
    LoadingLine,
    note,
    open_bundle,
    print_json,
)
from edge_gemma.cli.options import LOADING, LoadingOptions, grouped
from edge_gemma.cli.serve import ParallelOption

if TYPE_CHECKING:
    from edge_gemma.model import Model
    from edge_gemma.serve.batch import BatchLine, Outcome


def register(app: typer.Typer) -> None:
    app.command("batch")(grouped(batch))


def batch(
    requests: Annotated[
        Path, typer.Argument(metavar="IN.jsonl", help="Requests as OpenAI's batches have them.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Their answers.")],
    bundle: BundleOption = None,
    parallel: ParallelOption = 1,
    loading: LoadingOptions = LOADING,
    as_json: JsonOption = False,
) -> None:
    """Answer a file of requests. OpenAI's batch lines, several at a time. An output that is there
    already is gone on with; a request that is refused is a line of the output, too.
    """
    from edge_gemma.errors import MissingExtra
    from edge_gemma.model import load

    try:
        from edge_gemma.serve.batch import answered, in_order, read_lines
    except ImportError:
        raise MissingExtra("Answering a batch", "serve") from None

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    lines = read_lines(requests)
    found = open_bundle(bundle or _one_model(lines))
    if bundle is None or {line.body.get("model") for line in lines} != {found.manifest.name}:
        for line in lines:  # an installed name is not always the bundle's own
            line.body["model"] = found.manifest.name
        note(f"{found.manifest.name} answers all lines")
    done = answered(out)
    left = [line for line in lines if line.custom_id not in done]
    if done:
        note(f"{out} has {len(lines) - len(left)} answers already; {len(left)} are left")
    embeds = found.manifest.embedding is not None
    request = dataclasses.replace(
        loading.request((), structured=not embeds) if not _has_media(left) else loading.request(),
        n_seq_max=1 if embeds else parallel,
    )
    if left:
        with LoadingLine() as bar:
            model = load(found, device=loading.device, request=request, on_progress=bar.fraction)
        with model:
            _run(model, left, out, parallel)
    _replace(out, b"".join(in_order(out)))
    statuses = [entry["response"]["status_code"] for entry in answered(out).values()]
    n_failed = sum(status != 200 for status in statuses)
    if as_json:
        print_json({"answers": len(statuses), "failed": n_failed, "out": str(out)})
    else:
        print(f"{out}: {len(statuses)} answers, {n_failed} of them errors")


def _run(model: Model, left: list[BatchLine], out: Path, parallel: int) -> None:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from edge_gemma.serve.batch import run
    from edge_gemma.serve.http import make_app
    from edge_gemma.serve.service import Service

    columns = (MofNCompleteColumn(), TextColumn("answered"), TimeRemainingColumn(compact=True))
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(left))

        def done(outcome: Outcome) -> None:
            progress.advance(task)
            if outcome.status != 200:
                progress.console.print(f"{outcome.custom_id}: HTTP {outcome.status}", markup=False)

        async def answer() -> None:
            service = Service(model, max_waiting=parallel + 1)
            try:
                # one more than there are lanes: the next is there when one ends
                await run(make_app(service), left, out, parallel + 1, done)
            finally:
                await service.close(0)

        asyncio.run(answer())


def _one_model(lines: list[BatchLine]) -> str:
    from edge_gemma.errors import UsageError

    names = {str(line.body.get("model", "")) for line in lines}
    if len(names) != 1 or "" in names:
        shown = ", ".join(sorted(name or "none" for name in names)[:5])
        raise UsageError(f"the lines name {len(names)} models ({shown}); say --bundle")
    return names.pop()


def _has_media(lines: list[BatchLine]) -> bool:
    return any("image" in str(line.body) or "audio" in str(line.body) for line in lines)


def _replace(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
