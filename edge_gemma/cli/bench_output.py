"""What becomes of a benchmark's figures: printed, kept, compared, made into a page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_gemma.cli.common import Progress, check_parents, note, print_json

if TYPE_CHECKING:
    from edge_gemma.benchmarks.regress import Change
    from edge_gemma.benchmarks.sections import Section

REGRESSED = 1  # exit code when --against found something worse

ReportOption = Annotated[
    Path | None,
    typer.Option("--report", help="Also write this HTML page, with PNG and JSON beside it."),
]
SaveOption = Annotated[Path | None, typer.Option("--save", help="Keep the figures in this file.")]
AgainstOption = Annotated[
    Path | None,
    typer.Option(
        "--against",
        help="Compare with a file kept earlier; exit code 1 when something got worse by more than "
        "the noise.",
    ),
]
RepeatsOption = Annotated[
    int,
    typer.Option(
        "--repeats",
        min=1,
        max=100,
        help="Interleaved runs; medians are shown with half their range.",
    ),
]


@dataclass(frozen=True)
class Output:
    """What becomes of the figures."""

    json: bool
    report: Path | None
    save: Path | None
    against: Path | None


def write_page(
    path: Path, sections: Sequence[Section], machine: dict[str, Any], notes: Sequence[str]
) -> None:
    from edge_gemma.benchmarks.report import write_report

    written = write_report(path, sections, machine, notes)
    note(f"wrote {', '.join(str(file) for file in written)}")


def print_changes(changes: Sequence[Change], notes: Sequence[str], every: bool = False) -> None:
    shown = [str(change) for change in changes if every or change.verdict != "same"]
    for text in [*notes, *shown]:
        print(f"- {text}")
    if changes and all(change.verdict == "same" for change in changes):
        print(f"- {len(changes)} figures, none of them changed by more than the noise")


def finish_run(job: Callable[[Progress], list[Section]], output: Output) -> None:
    """Run, print, keep, compare. What was measured before a Ctrl-C is printed and kept as well."""
    from edge_gemma.benchmarks import regress
    from edge_gemma.benchmarks.machine import Calm, describe_machine

    machine = describe_machine()
    machine["command"] = shlex.join(["edge-gemma", *sys.argv[1:]])
    machine["date"] = date.today().isoformat()
    # a wrong file is told before an hour of measuring
    before = regress.read(output.against) if output.against else None
    check_parents(output.save, output.report)
    with Calm() as calm, Progress() as progress:
        sections = job(progress)
    machine["warnings"] = calm.warnings()
    changes, notes = regress.compare(before, sections, machine) if before else ([], [])
    if output.save:
        regress.save(output.save, sections, machine)
    if output.report:
        write_page(output.report, sections, machine, machine["warnings"])
    if output.json:
        found = regress.to_json(sections, machine)
        print_json(found | {"changes": changes, "notes": notes})
    else:
        print(machine["text"])
        for section in sections:
            print("\n" + section.markdown())
        for text in machine["warnings"]:
            print(f"- {text}")
        print_changes(changes, notes)
    if any(section.stopped for section in sections):
        raise KeyboardInterrupt
    if any(change.verdict == "worse" for change in changes):
        raise typer.Exit(REGRESSED)
