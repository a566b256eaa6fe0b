"""The tree of commands. Importing it imports typer, which takes a while on a small board: see
``main``.
"""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from edge_gemma.cli.flags import Flags
from edge_gemma.cli.options import complete

GROUPS = tuple(
    """demo text embed bundles system recommend store convert export trim tune see hear listen
    assistant personas serve guard watch batch bench""".split()
)
EXIT_CODES = (
    "Exit codes: 0 done · 2 usage · 3 bad bundle or checkpoint · 4 refused by the plan · 5 "
    "download · 6 audio or image · 7 failed while running · 130 Ctrl-C"
)


def _set_debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.ensure_object(Flags).debug = True
    return value


def _print_version(on: bool) -> None:
    if on:
        from edge_gemma import __version__

        print(f"edge-gemma {__version__}")
        raise typer.Exit()


DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug",
        is_eager=True,
        callback=_set_debug,
        envvar="EDGE_GEMMA_DEBUG",
        help="Show a traceback for errors.",
    ),
]
VersionOption = Annotated[
    bool,
    typer.Option(
        "--version", is_eager=True, callback=_print_version, help="Print the version and stop."
    ),
]

app = typer.Typer(
    name="edge-gemma",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=EXIT_CODES,
)


@app.callback()
def edge_gemma(debug: DebugOption = False, version: VersionOption = False) -> None:
    """Gemma 3n and small Gemma 3, offline, inside a planned memory budget."""


def _finish(tree: typer.Typer) -> None:
    for command in tree.registered_commands:
        if command.callback is not None:
            command.callback = complete(command.callback, DebugOption)
    for group in tree.registered_groups:
        if group.typer_instance is not None:
            group.typer_instance.callback()(_group)
            _finish(group.typer_instance)


def _group(debug: DebugOption = False) -> None:
    """Options between the name of a group and the name of its command."""


for group in GROUPS:
    importlib.import_module(f".{group}", __package__).register(app)
_finish(app)
