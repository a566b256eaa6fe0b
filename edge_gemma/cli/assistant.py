"""assistant: one that lives on a shelf, by a file of settings."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import (
    INTERRUPTED,
    BundleOption,
    ForceOption,
    JsonOption,
    note,
    print_json,
    table,
)
from edge_gemma.cli.listen import show_heard

if TYPE_CHECKING:
    from edge_gemma.assistant.checks import Check
    from edge_gemma.assistant.settings import Settings
    from edge_gemma.assistant.shelf import Shown
    from edge_gemma.assistant.transcript import Line

FolderArg = Annotated[
    Path | None,
    typer.Argument(
        metavar="[FOLDER]",
        help="The assistant's folder, with its assistant.toml. Default: "
        "~/.config/edge-gemma/assistant.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="An assistant that lives on a shelf.")
    group.command()(init)
    group.command()(run)
    group.command()(test)
    group.command()(log)
    app.add_typer(group, name="assistant")


def _folder(given: Path | None) -> Path:
    if given is None:
        home = os.environ.get("XDG_CONFIG_HOME")
        given = (Path(home) if home else Path.home() / ".config") / "edge-gemma" / "assistant"
    return given.absolute()


# --- init ---


def init(
    folder: FolderArg = None,
    bundle: BundleOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write assistant.toml and a unit for systemd. Nothing is started."""
    from edge_gemma.assistant.settings import FILE_NAME, Settings, new_file, read_home
    from edge_gemma.assistant.state import made_folder
    from edge_gemma.cli.assistant_unit import UNIT_NAME, user_unit
    from edge_gemma.errors import UsageError
    from edge_gemma.files import written_whole

    folder = _folder(folder)
    config, unit = folder / FILE_NAME, folder / UNIT_NAME
    for file in (config, unit):
        if file.exists() and not force:
            raise UsageError(f"{file} is there already; --force replaces it")
    settings = Settings(bundle=_bundle_name(bundle))
    made_folder(folder)
    with written_whole(config) as opened:
        opened.write(new_file(settings).encode())
    planned_bytes = _planned_bytes(read_home(folder).settings, folder)
    command = [sys.executable, "-m", "edge_gemma", "assistant", "run", str(folder)]
    with written_whole(unit) as opened:
        opened.write(user_unit(command, planned_bytes).encode())
    if as_json:
        print_json({"folder": folder, "config": config, "unit": unit, "bundle": settings.bundle})
        return
    print(f"{config}\n{unit}")
    if not settings.bundle:
        note(f'write which model answers into {config}: bundle = "NAME" (edge-gemma ls)')
    note(
        f"check it:              edge-gemma assistant test {folder}\n"
        f"try it:                edge-gemma assistant run {folder}\n"
        f"start it by itself:    systemctl --user enable --now {unit}\n"
        "also without a login:  loginctl enable-linger"
    )


def _bundle_name(given: str | None) -> str:
    """As assistant.toml names it: a folder by its whole path. Without one, the only installed
    bundle that hears. Raises UsageError, BundleError.
    """
    from edge_gemma.cli.common import open_bundle
    from edge_gemma.store.installed import ls

    if given is None:
        hearing = [entry.name for entry in ls() if entry.hears and not entry.problem]
        return hearing[0] if len(hearing) == 1 else ""
    open_bundle(given)
    return str(Path(given).absolute()) if Path(given).is_dir() else given


def _planned_bytes(settings: Settings, folder: Path) -> int | None:
    """None where there is no bundle yet, or it does not fit."""
    from edge_gemma.assistant.parts import find_bundle, plan_request
    from edge_gemma.assistant.settings import Home
    from edge_gemma.errors import EdgeGemmaError
    from edge_gemma.model import plan_bundle

    try:
        bundle = find_bundle(Home(folder, settings))
        plan = plan_bundle(bundle, request=plan_request(settings))
    except EdgeGemmaError:
        return None
    return plan.total_bytes if plan.fits else None


# --- run ---


def run(folder: FolderArg = None, as_json: JsonOption = False) -> None:
    """Run it until Ctrl-C or SIGTERM. Whatever is lost meanwhile is waited for."""
    from edge_gemma.assistant.settings import read_home
    from edge_gemma.assistant.shelf import Assistant
    from edge_gemma.engines.llama import library as llama
    from edge_gemma.serve.systemd import Notifier

    home = read_home(_folder(folder))
    llama.set_verbose(False)
    notifier = Notifier()

    def show(shown: Shown) -> None:
        if shown.kind == "ready":
            notifier.ready(f"listening to {shown.text}")
        if as_json:
            print_json(shown)
        elif shown.kind == "state":
            note(f"({shown.state})")
        elif shown.kind == "note":
            note(shown.text)
        else:
            show_heard(shown)

    with _signals() as came:

        def alive() -> None:
            notifier.alive()
            if came:
                assistant.stop()

        with Assistant(home, show=show, alive=alive) as assistant:
            note(f"loading {home.settings.bundle}")
            assistant.run()
            notifier.stopping()
    if signal.SIGINT in came:
        raise typer.Exit(INTERRUPTED)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Those of SIGINT and SIGTERM that came; a second SIGINT raises KeyboardInterrupt.

    The handler does nothing else: it may come while a lock is held that stopping takes.
    """
    came: list[int] = []

    def on_signal(number: int, *_: object) -> None:
        came.append(number)
        if came.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    caught = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, on_signal) for number in caught}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- test ---


def test(folder: FolderArg = None, as_json: JsonOption = False) -> None:
    """Check step by step what it needs. Plays two tones, listens for a second."""
    from edge_gemma.assistant.checks import checks

    done: list[Check] = []
    for check in checks(_folder(folder)):
        done.append(check)
        if not as_json:
            note(f"{check.step} …")
    if as_json:
        print_json({"ok": all(check.ok for check in done), "steps": done})
    else:
        print(table([row for check in done for row in _rows(check)]))
    if not all(check.ok for check in done):
        raise typer.Exit(1)


def _rows(check: Check) -> list[tuple[str, str, str]]:
    rows = [(check.step, "ok" if check.ok else "WRONG", check.found)]
    if not check.ok and check.todo:
        rows.append(("", "", f"→ {check.todo}"))
    return rows


# --- log ---


def log(
    folder: FolderArg = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with what is said, until Ctrl-C.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what was said, where a transcript is kept."""
    from edge_gemma.assistant.settings import read_home
    from edge_gemma.assistant.transcript import follow as followed
    from edge_gemma.assistant.transcript import read_transcript

    home = read_home(_folder(folder))
    if not home.settings.transcript:
        note("no transcript is kept: write transcript = true into assistant.toml")
    n = 0
    for line in followed(home.state) if follow else read_transcript(home.state):
        n += 1
        if as_json:
            print_json(_line_record(line))
        else:
            print(_shown(line), flush=True)
    if not n:
        note(f"{home.state} holds no transcript")


def _line_record(line: Line) -> dict[str, object]:
    import msgspec

    return msgspec.structs.asdict(line)


def _shown(line: Line) -> str:
    text = " ".join(line.text.split())
    if line.interrupted:
        text += " …"
    if line.seconds:
        text = f"({line.seconds:.1f} s of speech)"
    return f"{line.at[:19].replace('T', ' ')}  {line.who:9}  {text}".rstrip()
