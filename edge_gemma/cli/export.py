"""`export`: a checkpoint as the folder that another program loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import (
    FOR,
    ForceOption,
    JsonOption,
    Progress,
    ThreadsOption,
    note,
    parse_scaled,
    print_json,
)
from edge_gemma.cli.convert import (
    CheckpointArg,
    DryRunOption,
    ImatrixOption,
    MergeOption,
    OnnxQuantOption,
    checkpoint_folder,
)
from edge_gemma.units import format_bytes

if TYPE_CHECKING:
    from edge_gemma.convert.export import Export


def register(app: typer.Typer) -> None:
    app.command("export")(export)


def export(
    checkpoint: CheckpointArg,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder, to be made.")],
    host: Annotated[str, typer.Option("--for", help=FOR)],
    onnx_quant: OnnxQuantOption = None,
    imatrix: ImatrixOption = None,
    merge: MergeOption = None,
    threads: ThreadsOption = None,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the folder that another program loads.

    Straight from the checkpoint and without PyTorch: graphs with the names that the program asks
    for, its configuration, and the checkpoint's own tokenizer files. Text only.
    """
    from edge_gemma.convert.export import export as run
    from edge_gemma.convert.export import plan_export
    from edge_gemma.convert.pipeline import Conversion, Report

    options = Conversion(
        onnx_quant=onnx_quant,
        imatrix=imatrix,
        merge=tuple(parse_scaled(text, "--merge") for text in merge or ()),
        overwrite=force,
        n_threads=threads or 0,
    )
    folder = checkpoint_folder(checkpoint)
    if dry_run:
        _show_plan(plan_export(folder, host, options), out, as_json)
        return
    with Progress() as progress:
        report = Report(progress.total, progress.add_bytes, progress.stage, progress.note)
        done = run(folder, out, host, options, report)
    if as_json:
        print_json(done)
        return
    print(
        f"{done.folder}: {', '.join(done.graphs)} for {done.host}, {format_bytes(done.bytes)} in "
        f"{done.seconds:.0f} s"
    )


def _show_plan(planned: Export, out: Path, as_json: bool) -> None:
    names = [graph.path for graph in planned.graphs]
    if as_json:
        print_json(
            {
                "out": out,
                "for": planned.host,
                "graphs": names,
                "recipe": planned.plan.recipe,
                "bytes": planned.total_bytes,
                "notes": planned.notes,
            }
        )
        return
    for said in planned.notes:
        note(said)
    print(
        f"{out}: {', '.join(names)} in {planned.plan.recipe}, at most "
        f"{format_bytes(planned.total_bytes)}; nothing was written"
    )
