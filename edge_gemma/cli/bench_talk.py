"""``edge-gemma bench talk`` and ``bench loop``: a spoken conversation, timed, and for hours."""

from __future__ import annotations

from collections.abc import Callable
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
    turn_model: Annotated[
        str | None,
        typer.Option(
            "--turn-model", help="A text model that says at a pause whether all was said."
        ),
    ] = None,
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
            found += _pauses(turn_model, say)
        return found

    finish_run(job, Output(as_json, report, save, against))


def _pauses(turn_model: str | None, say: Callable[[str], None]) -> list[Section]:
    from edge_gemma.benchmarks.turn_taking import turn_taking
    from edge_gemma.conversation.turn_end import TurnEnd
    from edge_gemma.model import load

    if turn_model is None:
        return turn_taking(progress=say)
    with (
        load(turn_model, n_ctx=512) as model,
        TurnEnd(model.session(), model.prompt) as turn_end,
    ):
        return turn_taking(turn_over=turn_end.probability, progress=say)


def loop(
    bundles: BundlesArg,
    hours: Annotated[float, typer.Option("--hours", min=0.01, max=100, help="Of sound.")] = 2.0,
    clips: Annotated[
        Path | None,
        typer.Option("--clips", help="A folder with recordings of speech."),
    ] = None,
    real_time: Annotated[
        bool, typer.Option("--real-time", help="At the pace of a room, not as fast as it goes.")
    ] = False,
    as_json: JsonOption = False,
    report: ReportOption = None,
    save: SaveOption = None,
    against: AgainstOption = None,
) -> None:
    """A conversation for hours. Does anything grow, or get lost? Microphone and sound server are
    cut off at random. espeak-ng's voices speak unless there are --clips.
    """
    from edge_gemma.benchmarks import talk_loop
    from edge_gemma.store.installed import resolve

    folders = [Path(resolve(name)) for name in bundles]
    speech = talk_loop.recordings(clips)

    def job(progress: Progress) -> list[Section]:
        return [
            talk_loop.section(
                folders, speech, minutes=60 * hours, real_time=real_time, progress=progress.stage
            )
        ]

    finish_run(job, Output(as_json, report, save, against))
