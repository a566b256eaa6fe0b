"""pull, ls, rm: the named bundles of this machine."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

JSON = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def bundle_names(incomplete: str) -> list[str]:
    """Shell completion: the installed bundles."""
    from edge_gemma.store.installed import ls

    return [entry.name for entry in ls() if entry.name.startswith(incomplete)]


def register(app: typer.Typer) -> None:
    app.command()(pull)
    app.command("ls")(list_)
    app.command()(rm)


def pull(
    reference: Annotated[
        str,
        typer.Argument(
            help="ORG/NAME, ORG/NAME@REVISION, ORG/NAME:FILE.gguf, ORG/NAME:Q4_0, or the page's "
            "address."
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(help="Name in the store; default: that of the file or repository."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Fetch again and replace what is installed.")] = False,
    relayout: Annotated[
        bool, typer.Option(help="Rewrite a GGUF cold-first (see `import --relayout`).")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Install a bundle, or a GGUF as a bundle, from the Hugging Face hub.

    Goes on where an interrupted pull stopped; checks every hash; asks the hub nothing when the
    model is installed already.
    """
    from edge_gemma.store.hub import pull as fetch
    from edge_gemma.units import format_bytes

    bar = _Bar()
    try:
        bundle = fetch(reference, name=name, force=force, relayout=relayout, on_progress=bar)
    except KeyboardInterrupt:
        bar.close()
        print(
            f"\nstopped; what arrived is kept. Go on with: edge-gemma pull {reference}",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    finally:
        bar.close()
    manifest = bundle.manifest
    if as_json:
        print(
            json.dumps(
                {
                    "name": bundle.folder.name,
                    "path": str(bundle.folder),
                    "size_bytes": bundle.total_bytes(),
                    "family": manifest.family,
                    "fetched": bar.used,
                    "licence": manifest.source.licence,
                }
            )
        )
        return
    licence = (
        "Gemma Terms of Use (ai.google.dev/gemma/terms)"
        if manifest.source.licence.lower() == "gemma"
        else manifest.source.licence
    )
    print(f"licence: {licence}", file=sys.stderr)
    print(
        f"{bundle.folder.name}: {manifest.family}, {format_bytes(bundle.total_bytes())}, "
        f"{'installed' if bar.used else 'already there'}. Try: edge-gemma run "
        f'{bundle.folder.name} "Hello"'
    )


class _Bar:
    """A progress bar on stderr, drawn only once there is something to wait for."""

    def __init__(self):
        self.used, self._progress, self._task, self._what = False, None, None, ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self.used = True
            self._progress = Progress(
                TextColumn("{task.description:<11}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._progress.start()
        if what != self._what:
            self._task, self._what = self._progress.add_task(what, total=total), what
        self._progress.update(self._task, completed=done, total=total)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def list_(as_json: JSON = False) -> None:
    """List the installed bundles."""
    from edge_gemma.store.installed import bundles, ls, unfinished
    from edge_gemma.units import format_bytes

    entries, begun = ls(), unfinished()
    if as_json:
        print(
            json.dumps(
                {
                    "folder": str(bundles()),
                    "bundles": [
                        {
                            "name": e.name,
                            "path": str(e.folder),
                            "family": e.family,
                            "size_bytes": e.size_bytes,
                            "instruct": e.instruct,
                            "hears": e.hears,
                            "sees": e.sees,
                            "origin": e.origin,
                            "problem": e.problem,
                        }
                        for e in entries
                    ],
                    "unfinished": [{"name": name, "size_bytes": size} for name, size in begun],
                }
            )
        )
        return
    if not entries:
        print(
            f"no bundles in {bundles()}. Install one: edge-gemma pull ORG/NAME, or try "
            "`edge-gemma demo`",
            file=sys.stderr,
        )
    else:
        from edge_gemma.cli.columns import columns

        rows = [("name", "family", "size", "does", "from")]
        for e in entries:
            does = (
                " ".join(
                    word
                    for word, yes in (("chat", e.instruct), ("hear", e.hears), ("see", e.sees))
                    if yes
                )
                or "complete"
            )
            rows.append(
                (
                    e.name,
                    e.family,
                    format_bytes(e.size_bytes),
                    "broken" if e.problem else does,
                    e.origin,
                )
            )
        print(columns(rows))
    for e in entries:
        if e.problem:
            print(f"{e.name}: {e.problem}", file=sys.stderr)
    if begun:
        size = format_bytes(sum(size for _, size in begun))
        print(
            f"{len(begun)} unfinished download{'s' * (len(begun) > 1)} ({size}): the same "
            "`pull` goes on; `edge-gemma rm --unfinished` deletes",
            file=sys.stderr,
        )


def rm(
    names: Annotated[
        list[str] | None, typer.Argument(help="Installed bundles.", autocompletion=bundle_names)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Delete what unfinished downloads left.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Delete installed bundles."""
    from edge_gemma.errors import UsageError
    from edge_gemma.store import installed as store
    from edge_gemma.units import format_bytes

    if not names and not unfinished:
        raise UsageError("name the bundles to delete (`edge-gemma ls`), or pass --unfinished")
    known = {entry.name: entry.size_bytes for entry in store.ls()}
    for name in names or []:
        store.find(name)
    if names and not yes:
        listed = ", ".join(f"{name} ({format_bytes(known[name])})" for name in names)
        if not sys.stdin.isatty():
            raise UsageError(f"this would delete {listed}; pass --yes to do so without being asked")
        if not typer.confirm(f"delete {listed}?", err=True):
            raise typer.Exit(0)
    freed = {name: store.rm(name) for name in names or []}
    if unfinished:
        freed["unfinished downloads"] = store.rm_unfinished()
    if as_json:
        print(json.dumps({"deleted": freed, "freed_bytes": sum(freed.values())}))
    else:
        for name, size in freed.items():
            print(f"deleted {name}, {format_bytes(size)}", file=sys.stderr)
