"""`tune`: which engine and settings run a bundle fastest on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import BundleArg, JsonOption, note, open_bundle, print_json, table
from edge_gemma.errors import UsageError
from edge_gemma.units import format_bytes

if TYPE_CHECKING:
    from edge_gemma.tuning import Measured, Tuned


def register(app: typer.Typer) -> None:
    app.command("tune")(tune)


def tune(
    bundle: BundleArg,
    pack: Annotated[
        bool,
        typer.Option(
            "--pack/--no-pack",
            help="Keep the ONNX engine's packed weights in a file below ~/.cache/edge-gemma, where "
            "there is room: they are mapped then.",
        ),
    ] = True,
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove what was kept; measure nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what runs a bundle fastest here, and keep it.

    Both engines, where the bundle has both; then fewer threads and other prefill steps. What a
    command leaves open is as it was tuned, from then on. A coarser decoder is never chosen.
    """
    import msgspec

    from edge_gemma import tuning

    found = open_bundle(bundle)
    if forget:
        if not pack:
            raise UsageError("give --forget or --no-pack, not both")
        n_bytes = tuning.forget(found)
        if as_json:
            print_json({"bundle": found.manifest.name, "bytes": n_bytes})
        else:
            print(f"{found.manifest.name}: {format_bytes(n_bytes)} removed")
        return
    tuned = tuning.tune(found, pack=pack, tell=note)
    if as_json:
        print_json(msgspec.to_builtins(tuned))
        return
    _show(tuned)


def _show(tuned: Tuned) -> None:
    rows: list[tuple[str, ...]] = [
        ("engine", "threads", "step", "prefill tok/s", "decode tok/s", "turn s", "")
    ]
    rows += [_row(each, each == tuned.chosen) for each in tuned.measured]
    print(table(rows, right=range(1, 6)))
    for said in tuned.notes:
        note(said)


def _row(each: Measured, is_chosen: bool) -> tuple[str, ...]:
    return (
        each.engine,
        str(each.n_threads),
        str(each.n_ubatch),
        f"{each.prefill_tokens_per_s:.1f}",
        f"{each.decode_tokens_per_s:.1f}",
        f"{each.turn_s:.2f}",
        "← chosen" if is_chosen else "",
    )
