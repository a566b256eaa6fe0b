"""What the commands share: options that mean the same everywhere, notes, progress, tables, JSON,
and streams that Ctrl-C can stop.

Results go to stdout, everything else (notes, progress, errors) to stderr, so that a pipe gets the
result alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from edge_gemma.bundles.folder import Bundle

T = TypeVar("T")
INTERRUPTED = 130  # exit code after Ctrl-C

# --- shell completion ---


def bundle_names(incomplete: str) -> list[str]:
    """The installed bundles that begin so."""
    from edge_gemma.store.installed import ls

    return [entry.name for entry in ls() if entry.name.startswith(incomplete)]


def profile_names(incomplete: str) -> list[str]:
    """auto and the shipped profiles that begin so."""
    from edge_gemma.machine.device import profile_names as shipped

    return [name for name in ("auto", *shipped()) if name.startswith(incomplete)]


# --- options: each is defined once, so that a name means the same in every command ---

_DEVICE = typer.Option(
    "--device",
    "-d",
    autocompletion=profile_names,
    help="A device profile (`edge-gemma profiles`), a profile file, or auto: this machine.",
)
_CTX = typer.Option(
    "--ctx", help="Context in tokens. Default: up to 4096, less if that is what fits."
)
_THREADS = typer.Option(
    "--threads",
    "-t",
    min=1,
    help="Threads. Default: all usable cores; for decoding, the fast ones.",
)

BundleArg = Annotated[
    str,
    typer.Argument(
        metavar="BUNDLE",
        autocompletion=bundle_names,
        help="A bundle's folder, or the name of an installed one (`edge-gemma ls`).",
    ),
]
BundleOption = Annotated[
    str | None,
    typer.Option(
        "--bundle",
        autocompletion=bundle_names,
        help="Who answers: a folder or an installed name. Default: the model that all lines of a "
        "batch name; for an assistant the installed one that hears.",
    ),
]
BundlesArg = Annotated[
    list[str],
    typer.Argument(
        metavar="BUNDLE…",
        autocompletion=bundle_names,
        help="Bundles: folders, or names of installed ones (`edge-gemma ls`).",
        show_default=False,
    ),
]
DeviceOption = Annotated[str, _DEVICE]
DevicesOption = Annotated[list[str] | None, _DEVICE]  # repeatable
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Memory to stay inside, like 2GiB or 420MiB. Default: what the device has to give.",
    ),
]
ContextOption = Annotated[int | None, _CTX]
LevelOption = Annotated[
    str,
    typer.Option(
        "--level",
        help="efficiency (little memory, a context of 2048 tokens), balanced (4096) or performance "
        "(up to 16384).",
    ),
]
ThreadsOption = Annotated[int | None, _THREADS]
ThreadCountsOption = Annotated[list[int] | None, _THREADS]  # repeatable
TokensOption = Annotated[
    int,
    typer.Option("--tokens", min=0, help="Use at most so many of the text's tokens; 0: all of it."),
]
VisionEncoderOption = Annotated[
    str | None,
    typer.Option(
        "--vision-encoder",
        help="The vision encoder's precision: f32, f16, int8 or none. Default: int8 from a "
        "checkpoint that has one, f16 from --mmproj.",
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="The bundle's name. Default: taken from its source."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
InstructOption = Annotated[
    bool,
    typer.Option(
        "--instruct",
        help="The weights follow turns although the GGUF has no chat template: Gemma's own is "
        "used.",
    ),
]
RelayoutOption = Annotated[
    bool,
    typer.Option(
        "--relayout",
        help="Rewrite a GGUF with its rarely read tensors first: the others then stay in memory "
        "best under a tight limit.",
    ),
]
FOR = (
    "What for. recommend: text, voice (it hears) or pictures (it sees). export: transformers.js, "
    "or onnxruntime-genai (Gemma 3)."
)
SystemOption = Annotated[str | None, typer.Option("--system", help="System text.")]
LanguageOption = Annotated[
    str | None,
    typer.Option(
        "--language",
        help="The language spoken, in English words, like German. Default: the model finds out.",
    ),
]
PadAudioOption = Annotated[
    bool,
    typer.Option(
        "--pad-audio/--short",
        help="Fill each clip to 188 rows as transformers does; --short answers sooner and may "
        "differ.",
    ),
]
StatsOption = Annotated[
    bool, typer.Option("--stats", help="Show time and memory after the answer.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show llama.cpp's log.")]


def open_bundle(name: str) -> Bundle:
    """The bundle at a folder or of an installed name. Raises BundleError, UsageError."""
    from edge_gemma.bundles.folder import Bundle
    from edge_gemma.store.installed import resolve

    return Bundle.open(resolve(name))


def parse_scaled(text: str, option: str) -> tuple[Path, float]:
    """``PATH`` or ``PATH:SCALE`` → (path, scale); a path that exists as written is one. Raises
    UsageError.

    >>> parse_scaled("adapter.gguf:0.5", "--lora")[1]
    0.5
    """
    from edge_gemma.errors import UsageError
    from edge_gemma.sources import exists, typed

    path, colon, scale_text = text.rpartition(":")
    if not colon or not path or exists(typed(text)):
        return Path(typed(text)), 1.0
    try:
        scale = float(scale_text)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise UsageError(f"cannot read {option} {text!r}; write it like PATH or PATH:0.5")
    return Path(typed(path)), scale


def check_parents(*files: Path | None) -> None:
    """Each file's folder must be there before hours of work end in it. Raises UsageError."""
    from edge_gemma.errors import UsageError

    for file in files:
        if file is not None and not file.parent.is_dir():
            raise UsageError(f"no folder {file.parent} to write {file.name} into")


# --- output ---


def note(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """One line of JSON on stdout. Dataclasses become objects, paths text; a figure that is not
    finite becomes null, because JSON has none.
    """
    print(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False), flush=True)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Rows → aligned columns; those named in ``right`` end flush. Nothing is cut or wrapped, so
    that names can be copied.

    >>> print(table([("name", "size"), ("tiny", "2 MiB"), ("small", "10 MiB")], right=[1]))
    name     size
    tiny    2 MiB
    small  10 MiB
    """
    flush = set(right)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(widths[i]) if i in flush else cell.ljust(widths[i])
            for i, cell in enumerate(row)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


class Progress:
    """What a long command is doing, on stderr: rich's bar on a terminal, plain lines elsewhere.

    A stage has a name and, where that is known, an amount: bytes (:meth:`add_bytes`,
    :meth:`bytes`) or steps (:meth:`steps`). Off a terminal a stage is one line when it begins and
    one every ten seconds. Nothing is drawn before the first stage.

    >>> with Progress() as progress:
    ...     progress.stage("quantizing", total_bytes=1 << 20)
    ...     progress.add_bytes(1 << 19)
    """

    LINE_EVERY_S = 10.0

    def __init__(self, text: str = "", total_bytes: int = 0) -> None:
        self.started = False
        self._text = ""
        self._done_bytes = self._total_bytes = 0
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._next_line_s = 0.0
        if text:
            self.stage(text, total_bytes)

    def stage(self, text: str, total_bytes: int = 0) -> None:
        """Something new begins."""
        self.started = True
        self._text = text
        self.total(total_bytes)
        if sys.stderr.isatty():
            self._draw(0, total_bytes, "")
        else:
            self._next_line_s = time.monotonic() + self.LINE_EVERY_S
            note(text)

    def total(self, total_bytes: int) -> None:
        """How many bytes the stage will take; none of them is done."""
        self._done_bytes, self._total_bytes = 0, total_bytes

    def add_bytes(self, n_bytes: int) -> None:
        self.bytes(self._text, self._done_bytes + n_bytes, self._total_bytes)

    def bytes(self, text: str, done_bytes: int, total_bytes: int) -> None:
        """So many bytes of ``text`` are done; another text than before is a new stage."""
        from edge_gemma.units import format_bytes

        if text != self._text:
            self.stage(text, total_bytes)
        self._done_bytes, self._total_bytes = done_bytes, total_bytes
        shown = format_bytes(done_bytes)
        if total_bytes:
            shown += f" of {format_bytes(total_bytes)}"
        self._show(done_bytes, total_bytes, shown)

    def steps(self, done: int, total: int) -> None:
        """So many steps of the stage are done."""
        self._show(done, total, f"{done} of {total}")

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is None:
            note(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, done: int, total: int, shown: str) -> None:
        if sys.stderr.isatty():
            self._draw(done, total, shown)
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + self.LINE_EVERY_S
            note(f"{self._text}: {shown}")

    def _draw(self, done: int, total: int, shown: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[shown]}", markup=False),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        if self._task is None or self._bar.tasks[0].description != self._text:
            if self._task is not None:
                self._bar.remove_task(self._task)  # its rate is not the new stage's
            self._task = self._bar.add_task(self._text, total=total or None, shown=shown)
        self._bar.update(self._task, completed=done, total=total or None, shown=shown)


class LoadingLine:
    """The share of a model that is loaded, as one line on a terminal that overwrites itself.

    Not :class:`Progress`: rich takes 2 MiB, and a plan's bytes are compared with what is measured.
    """

    EVERY_S = 0.1

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next_s = 0.0

    def fraction(self, value: float) -> bool:
        """0 … 1. Returns True: go on."""
        if self._terminal and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + self.EVERY_S
            self._write(f"\rloading {100 * value:3.0f} % ")
        return True

    def __enter__(self) -> LoadingLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


# --- Ctrl-C ---


class _End:
    """Behind the last item of a queue."""


def interruptible(chunks: Iterator[T], cancel: Callable[[], None]) -> Iterator[T]:
    """Items of a blocking iterator, driven by a worker thread, so that Ctrl-C is heard while native
    code runs. The first one cancels, and the rest (the last chunk with its figures) still comes; a
    second one raises KeyboardInterrupt.

    The signal is caught, not raised: an exception could land anywhere in the caller, past the point
    where it still knows that a worker is inside the model it is about to close.
    """
    items: queue.Queue[T | BaseException | _End] = queue.Queue()
    presses = 0

    def work() -> None:
        try:
            for item in chunks:
                items.put(item)
            items.put(_End())
        except BaseException as error:
            items.put(error)

    def on_interrupt(*_: object) -> None:
        nonlocal presses
        presses += 1
        cancel()
        if presses > 1:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, on_interrupt)
    worker = threading.Thread(target=work, name="generate", daemon=True)
    worker.start()
    try:
        while not isinstance(item := items.get(), _End):
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        if worker.is_alive():  # left early: the model must not be closed under it
            cancel()
            worker.join()
        signal.signal(signal.SIGINT, previous)
