"""``edge-gemma bench talk``: a spoken conversation, timed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.bench_output import (
    AgainstOption,
    Output,
    RepeatsOption,
    ReportOption,
    SaveOption,
    finish_run,
)
from edge_gemma.cli.common import BundlesArg, JsonOption, Progress

if TYPE_CHECKING:
    from edge_gemma.benchmarks.sections import Section


def talk(
    bundles: BundlesArg,
    voice: Annotated[
        str, typer.Option("--espeak-voice", help="The espeak-ng voice that answers.")
    ] = "en",
    minutes: Annotated[
        float,
        typer.Option("--minutes", min=0, max=600, help="Of own speech in the room; 0: none of it."),
    ] = 10.0,
    repeats: RepeatsOption = 5,
    as_json: JsonOption = False,
    report: ReportOption = None,
    save: SaveOption = None,
    against: AgainstOption = None,
) -> None:
    """From the end of speech to the first sound. And what it hears of itself."""
    from edge_gemma.benchmarks import talk as benchmarks
    from edge_gemma.store.installed import resolve

    folders = [Path(resolve(name)) for name in bundles]

    def job(progress: Progress) -> list[Section]:
        say = progress.stage
        found = [benchmarks.talk(folders, voice=voice, repeats=repeats, progress=say)]
        if minutes:
            found.append(benchmarks.hearing_itself(minutes=minutes, progress=say))
            found.append(benchmarks.wake_words(minutes=min(5.0, minutes), progress=say))
        return found

    finish_run(job, Output(as_json, report, save, against))
