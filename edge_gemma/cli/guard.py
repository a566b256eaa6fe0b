"""tokens and usage: who may talk to a server, and what they used."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from edge_gemma.cli.common import JsonOption, note, print_json, table

FileOption = Annotated[
    Path,
    typer.Option("--token-file", help="A file with a token a line; requests need one of them."),
]
NameArg = Annotated[str, typer.Argument(metavar="NAME", help="Whose token it is.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Who may talk to a server.")
    group.command()(add)
    group.command()(remove)
    group.command("list")(list_tokens)
    app.add_typer(group, name="tokens")
    app.command()(usage)


def _module(name: str) -> ModuleType:
    """A module of the guard. Raises MissingExtra."""
    from edge_gemma.errors import MissingExtra

    try:
        return importlib.import_module(f"edge_gemma.serve.guard.{name}")
    except ImportError:
        raise MissingExtra("Serving", "serve") from None


def _tokens() -> ModuleType:
    return _module("tokens")


def add(
    name: NameArg, token_file: FileOption = Path("tokens"), as_json: JsonOption = False
) -> None:
    """Make a token, print it once, and keep its hash under NAME.

    A running server takes it after SIGHUP.
    """
    token = _tokens().add_token(token_file, name)
    if as_json:
        print_json({"name": name, "token": token})
    else:
        print(token)
    note(f"{token_file} has a hash of it under the name {name}; it is not shown again")


def remove(
    name: NameArg, token_file: FileOption = Path("tokens"), as_json: JsonOption = False
) -> None:
    """Take the token of NAME away. A running server forgets it after SIGHUP."""
    _tokens().remove_token(token_file, name)
    if as_json:
        print_json({"removed": name})
    note(f"{token_file} has no token of {name} any more")


def list_tokens(token_file: FileOption = Path("tokens"), as_json: JsonOption = False) -> None:
    """List the names in a token file."""
    known = _tokens().read_tokens(token_file)
    if as_json:
        print_json({"tokens": [{"name": each.name, "hashed": not each.plain} for each in known]})
        return
    rows = [(each.name, "as it is" if each.plain else "hashed") for each in known]
    print(table([("name", "kept"), *rows]))


def usage(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The guard's usage file.")],
    as_json: JsonOption = False,
) -> None:
    """Show what each caller of a server used."""
    import msgspec

    found = _module("usage").read_usage(file)
    if as_json:
        print_json({name: msgspec.structs.asdict(used) for name, used in found.items()})
        return
    head = ("name", "requests", "refused", "prompt tokens", "tokens", "seconds", "last")
    rows = [
        (
            name,
            str(used.requests),
            str(used.refused),
            str(used.prompt_tokens),
            str(used.completion_tokens),
            f"{used.seconds:.1f}",
            used.last,
        )
        for name, used in sorted(found.items())
    ]
    print(table([head, *rows], right=(1, 2, 3, 4, 5)))
