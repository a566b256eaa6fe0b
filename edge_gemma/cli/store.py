"""pull, ls, rm: the named bundles of this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import (
    INTERRUPTED,
    ForceOption,
    InstructOption,
    JsonOption,
    NameOption,
    Progress,
    RelayoutOption,
    bundle_names,
    note,
    print_json,
    table,
)
from edge_gemma.units import format_bytes

if TYPE_CHECKING:
    from edge_gemma.store.installed import Entry

GEMMA_TERMS = "Gemma Terms of Use (ai.google.dev/gemma/terms)"


def register(app: typer.Typer) -> None:
    app.command("pull")(pull)
    app.command("ls")(list_)
    app.command("rm")(rm)


def pull(
    reference: Annotated[
        str,
        typer.Argument(
            help="ORG/NAME, ORG/NAME@REVISION, ORG/NAME:FILE.gguf, ORG/NAME:Q4_0, or the page's "
            "address."
        ),
    ],
    name: NameOption = None,
    force: ForceOption = False,
    relayout: RelayoutOption = False,
    instruct: InstructOption = False,
    as_json: JsonOption = False,
) -> None:
    """Install a bundle or a GGUF from the Hugging Face hub.

    Goes on where an interrupted pull stopped; checks every hash; asks the hub nothing when the
    model is installed already.
    """
    from edge_gemma.store.pull import pull as fetch

    try:
        with Progress() as progress:
            bundle = fetch(
                reference,
                name=name,
                force=force,
                relayout=relayout,
                instruct=instruct,
                on_progress=progress.bytes,
            )
    except KeyboardInterrupt:
        note(f"\nstopped; what arrived is kept. Go on with: edge-gemma pull {reference}")
        raise typer.Exit(INTERRUPTED) from None
    manifest, installed_as, size_bytes = bundle.manifest, bundle.folder.name, bundle.total_bytes()
    licence = manifest.source.licence
    if as_json:
        print_json(
            {
                "name": installed_as,
                "path": bundle.folder,
                "size_bytes": size_bytes,
                "family": manifest.family,
                "fetched": progress.started,
                "licence": licence,
                "notes": manifest.notes,
            }
        )
        return
    for said in manifest.notes if progress.started else ():
        note(f"note: {said}")
    note(f"licence: {GEMMA_TERMS if licence.lower() == 'gemma' else licence}")
    state = "installed" if progress.started else "already there"
    print(
        f"{installed_as}: {manifest.family}, {format_bytes(size_bytes)}, {state}. "
        f'Try: edge-gemma run {installed_as} "Hello"'
    )


def list_(as_json: JsonOption = False) -> None:
    """List the installed bundles."""
    from edge_gemma.store.installed import bundles, ls, unfinished

    entries, begun = ls(), unfinished()
    if as_json:
        print_json(
            {
                "folder": bundles(),
                "bundles": [_record(entry) for entry in entries],
                "unfinished": [{"name": name, "size_bytes": size} for name, size in begun],
            }
        )
        return
    if entries:
        print(table([("name", "family", "size", "does", "from"), *map(_row, entries)], right=(2,)))
    else:
        note(
            f"no bundles in {bundles()}. Install one: edge-gemma pull ORG/NAME, or try "
            "`edge-gemma demo`"
        )
    for entry in entries:
        if entry.problem:
            note(f"{entry.name}: {entry.problem}")
    if begun:
        size = format_bytes(sum(size for _, size in begun))
        note(
            f"{len(begun)} unfinished download{'s' * (len(begun) > 1)} ({size}): the same "
            "`pull` goes on; `edge-gemma rm --unfinished` deletes"
        )


def _record(entry: Entry) -> dict[str, object]:
    return {
        "name": entry.name,
        "path": entry.folder,
        "family": entry.family,
        "size_bytes": entry.size_bytes,
        "instruct": entry.instruct,
        "hears": entry.hears,
        "sees": entry.sees,
        "origin": entry.origin,
        "problem": entry.problem,
    }


def _row(entry: Entry) -> Sequence[str]:
    abilities = [("chat", entry.instruct), ("hear", entry.hears), ("see", entry.sees)]
    does = " ".join(word for word, able in abilities if able) or "complete"
    if entry.problem:
        does = "broken"
    return entry.name, entry.family, format_bytes(entry.size_bytes), does, entry.origin


def rm(
    names: Annotated[
        list[str] | None, typer.Argument(help="Installed bundles.", autocompletion=bundle_names)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Delete what unfinished downloads left.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete installed bundles."""
    from edge_gemma.errors import UsageError
    from edge_gemma.store import installed as store

    if not names and not unfinished:
        raise UsageError("name the bundles to delete (`edge-gemma ls`), or pass --unfinished")
    known = {entry.name: entry.size_bytes for entry in store.ls()}
    for name in names or ():
        store.find(name)
    if names and not yes:
        listed = ", ".join(f"{name} ({format_bytes(known[name])})" for name in names)
        if not sys.stdin.isatty():
            raise UsageError(f"this would delete {listed}; pass --yes to do so without being asked")
        _confirm(f"delete {listed}?")
    freed = {name: store.rm(name) for name in names or ()}
    if unfinished:
        freed["unfinished downloads"] = store.rm_unfinished()
    if as_json:
        print_json({"deleted": freed, "freed_bytes": sum(freed.values())})
    else:
        for name, size in freed.items():
            note(f"deleted {name}, {format_bytes(size)}")


def _confirm(question: str) -> None:
    """Ask at the terminal; leave on no, and on Ctrl-C."""
    try:
        if not typer.confirm(question, err=True):
            raise typer.Exit(0)
    except typer.Abort:
        note("")
        raise typer.Exit(INTERRUPTED) from None
