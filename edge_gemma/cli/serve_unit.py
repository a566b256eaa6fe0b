"""serve --print-unit: this very command as a service of systemd."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from edge_gemma.cli.common import note

PrintUnitOption = Annotated[
    bool,
    typer.Option(
        "--print-unit",
        help="Load nothing; print what systemd's unit needs of this command and its plan.",
    ),
]
_TAKE_FILES = ("--token-file", "--guard", "--watch", "--tls-cert", "--tls-key", "--device", "-d")
_HIDDEN = ("/home", "/root", "/run/user")  # by ProtectHome= of packaging/systemd


def show_unit(bundle: str, folder: Path, needed_bytes: int, *, to_network: bool) -> None:
    """Print it. ``bundle`` is how the command line names ``folder``."""
    from edge_gemma.serve.systemd_unit import drop_in

    words = service_words(sys.argv[1:], bundle, folder)
    for path in (str(folder.resolve()), sys.executable):
        if any(path.startswith(f"{home}/") for home in _HIDDEN):
            note(f"the service will not see {path}: keep it out of {', '.join(_HIDDEN)}")
    command = [sys.executable, "-m", "edge_gemma", *words]
    typer.echo(drop_in(command, needed_bytes, to_network=to_network), nl=False)


def service_words(words: Sequence[str], bundle: str, folder: Path) -> list[str]:
    """The command line for any working folder: files by their whole paths."""
    found: list[str] = []
    before = ""
    for word in words:
        option, equals, value = word.partition("=")
        if word == bundle and before not in _TAKE_FILES:
            found.append(str(folder.resolve()))
        elif before in _TAKE_FILES:
            found.append(_whole(word))
        elif equals and option in _TAKE_FILES:
            found.append(f"{option}={_whole(value)}")
        elif word != "--print-unit":
            found.append(word)
        before = word
    return found


def _whole(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).exists() else path
