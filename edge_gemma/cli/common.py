"""What several commands share: options that make a request, a load with progress, and streams that Ctrl-C can stop."""

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

BundleArg = Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle's folder, or the name of an installed one (`edge-gemma ls`).")]
DeviceOption = Annotated[str, typer.Option("--device", help="A device profile (`edge-gemma profiles`), a profile file, or auto: this machine.")]
BudgetOption = Annotated[str | None, typer.Option("--budget", help="Memory to stay inside, like 2GiB or 420MiB. Default: what the device has to give.")]
CtxOption = Annotated[int | None, typer.Option("--ctx", help="Context in tokens. Default: up to 4096, less if that is what fits.")]
UbatchOption = Annotated[int | None, typer.Option("--ubatch", help="Tokens per prefill step. Default: 256, less if that is what fits.")]
KvOption = Annotated[str | None, typer.Option("--kv", help="Type of the KV cache: f16, q8_0 or q4_0.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", "-t", help="Threads. Default: the fast cores we may use.")]
RepackOption = Annotated[bool | None, typer.Option("--repack/--no-repack", help="Copy weights into the CPU's fast layout. Default: if that fits.")]
GpuOption = Annotated[int | None, typer.Option("--gpu-layers", help="Layers on the GPU, −1 for all; needs a llama.cpp built for it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for programs.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show llama.cpp's log.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.", hidden=True)]


def make_request(ctx, ubatch, kv, threads, repack, gpu_layers, encoders: tuple[str, ...] | None = None, budget: str | None = None):
    from ..plan import Request
    from ..units import parse_bytes

    return Request(
        budget_bytes=None if budget is None else parse_bytes(budget), n_ctx=ctx, n_ubatch=ubatch, kv_type=kv,
        n_threads=threads, repack=repack, n_gpu_layers=gpu_layers, encoders=encoders,
    )  # fmt: skip


def open_bundle(name: str):
    from ..bundle import Bundle
    from ..store import resolve

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

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_) -> None:
        self.clear()


def parse_lora(values: list[str] | None) -> list[tuple[str, float]]:
    """``adapter.gguf`` or ``adapter.gguf:0.5`` → (path, scale)."""
    from ..errors import UsageError

    adapters = []
    for value in values or ():
        path, colon, scale = value.rpartition(":")
        try:
            adapters.append((path, float(scale)) if colon and path else (value, 1.0))
        except ValueError:
            if not Path(value).exists():
                raise UsageError(f"cannot read --lora {value!r}; write it like adapter.gguf or adapter.gguf:0.5") from None
            adapters.append((value, 1.0))
    return adapters


def interruptible(chunks: Iterator[T], cancel: Callable[[], None]) -> Iterator[T]:
    """Items of a blocking iterator, driven by a worker thread, so that Ctrl-C is heard while native code runs. The first one
    cancels, and the rest (the last chunk with its figures) still comes; a second one raises KeyboardInterrupt.

    The signal is caught, not raised: an exception could land anywhere in the caller, past the point where it still knows
    that a worker is inside the model it is about to close.
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
