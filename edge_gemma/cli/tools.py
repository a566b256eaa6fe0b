"""--tools: what the model may call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import note
from edge_gemma.sources import typed

if TYPE_CHECKING:
    from edge_gemma.assistant.talk_tools import TalkTools
    from edge_gemma.assistant.tools import Toolbox

BUILTIN = "builtin"
ToolsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tools",
        metavar="FILE",
        help="Tools the model may call. FILE.py: a local program of yours that is run here; its "
        "public functions with type hints and docstrings are the tools. FILE.json: HTTP calls "
        "to programs of yours. builtin (listen): time, timers and alarms, volume, a shopping list. "
        "Repeatable.",
    ),
]
StateOption = Annotated[
    str | None,
    typer.Option(
        "--state",
        metavar="FOLDER",
        help="Where timers and lists of --tools builtin are kept over a restart.",
    ),
]


def tools_of(files: Sequence[str] | None) -> Toolbox | None:
    """Of chat and run. Raises UsageError."""
    from edge_gemma.assistant.talk_tools import tools_of_files
    from edge_gemma.errors import UsageError

    if files and BUILTIN in files:
        raise UsageError(
            "--tools builtin sets timers that ring, which needs: edge-gemma listen. Here, give a "
            "FILE.py or FILE.json"
        )
    return tools_of_files([typed(file) for file in files or ()])


@contextlib.contextmanager
def opened_tools(files: Sequence[str] | None, state: str | None) -> Iterator[TalkTools | None]:
    """Of listen: open the state folder, read the files; None without ``--tools``. Raises
    UsageError.
    """
    from edge_gemma.assistant.talk_tools import talk_tools
    from edge_gemma.assistant.timers import Timers
    from edge_gemma.errors import UsageError
    from edge_gemma.files import state_folder

    others = [typed(file) for file in files or () if file != BUILTIN]
    if not files or BUILTIN not in files:
        if state is not None:
            raise UsageError("--state is for --tools builtin: nothing else is kept")
        yield talk_tools(others)
        return
    folder = Path(typed(state)) if state is not None else state_folder("assistant")
    with Timers(folder) as timers:
        found = talk_tools(others, timers, folder)
        assert found is not None
        note(f"tools: {', '.join(tool.name for tool in found.toolbox.tools)}; kept in {folder}")
        yield found
