"""What several commands share: single options, notes and JSON, a progress line, and streams that
Ctrl-C can stop.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import typer

T = TypeVar("T")

BundleArg = Annotated[
    str,
    typer.Argument(
        metavar="BUNDLE",
        help="A bundle's folder, or the name of an installed one (`edge-gemma ls`).",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        "-d",
        help="A device profile (`edge-gemma profiles`), a profile file, or auto: this machine.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout, for programs.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show llama.cpp's log.")]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show a traceback for errors.", hidden=True)
]


def open_bundle(name: str):
    from edge_gemma.bundles.folder import Bundle
    from edge_gemma.store.installed import resolve

    return Bundle.open(resolve(name))


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False, default=_plain), flush=True)


def _plain(value: object):
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


class ProgressLine:
    """One line on a terminal's stderr that overwrites itself; nothing where stderr is no terminal."""

    def __init__(self, label: str, total: int = 0):
        self._label, self._total, self._done = label, total, 0
        self._shown = sys.stderr.isatty()
        self._next = 0.0

    def fraction(self, value: float) -> bool:
        if self._shown and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.1
            sys.stderr.write(f"\r{self._label} {100 * value:3.0f} % ")
            sys.stderr.flush()
        return True

    def add(self, n_bytes: int) -> None:
        self._done += n_bytes
        self.fraction(self._done / self._total if self._total else 0.0)

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_) -> None:
        self.clear()


def parse_lora(values: list[str] | None) -> list[tuple[str, float]]:
    """``adapter.gguf`` or ``adapter.gguf:0.5`` → (path, scale)."""
    from edge_gemma.errors import UsageError

    adapters = []
    for value in values or ():
        path, colon, scale = value.rpartition(":")
        try:
            adapters.append((path, float(scale)) if colon and path else (value, 1.0))
        except ValueError:
            if not Path(value).exists():
                raise UsageError(
                    f"cannot read --lora {value!r}; write it like adapter.gguf or adapter.gguf:0.5"
                ) from None
            adapters.append((value, 1.0))
    return adapters


def interruptible(chunks: Iterator[T], cancel: Callable[[], None]) -> Iterator[T]:
    """Items of a blocking iterator, driven by a worker thread, so that Ctrl-C is heard while native
    code runs. The first one cancels, and the rest (the last chunk with its figures) still comes; a
    second one raises KeyboardInterrupt.

    The signal is caught, not raised: an exception could land anywhere in the caller, past the point
    where it still knows that a worker is inside the model it is about to close.
    """
    items: queue.Queue = queue.Queue()
    end = object()
    presses = 0

    def work() -> None:
        try:
            for item in chunks:
                items.put(item)
            items.put(end)
        except BaseException as error:
            items.put(error)

    def on_interrupt(*_) -> None:
        nonlocal presses
        presses += 1
        cancel()
        if presses > 1:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, on_interrupt)
    worker = threading.Thread(target=work, name="generate", daemon=True)
    worker.start()
    try:
        while (item := items.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        if worker.is_alive():  # left early: the model must not be closed under it
            cancel()
            worker.join()
        signal.signal(signal.SIGINT, previous)
