"""What was said, as JSON lines in a folder: opt-in, bounded, readable while it grows.

In: lines as they are said. Out: transcript.jsonl, and transcript.1.jsonl with what was before it;
both together are no larger than asked. A power cut costs the line that was being written.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec

from edge_gemma.assistant.state import made_folder
from edge_gemma.errors import UsageError

NAME, OLDER = "transcript.jsonl", "transcript.1.jsonl"
_MAX_CHARS = 20_000  # of one text
_POLL_S = 0.2
Who = Literal["user", "assistant", "notice", "tool", "note", "start", "end"]


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """``at`` is local time with its zone. ``interrupted``: ``text`` is what was heard of it.
    ``seconds`` that an utterance took, whose words nobody wrote down.
    """

    at: str
    who: Who
    text: str = ""
    interrupted: bool = False
    seconds: float = 0.0


class Transcript:
    """Writes lines. From any thread. What the disk refuses is in ``problem``, and ends nothing.

    Raises UsageError (the folder cannot be made).
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int):
        self._path = made_folder(Path(folder)) / NAME
        self._max_bytes = max_bytes // 2  # of one file; the other holds what was before
        self._lock = threading.Lock()
        self.problem = ""

    def write(
        self, who: Who, text: str = "", *, interrupted: bool = False, seconds: float = 0.0
    ) -> None:
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        text = text[:_MAX_CHARS].encode("utf-8", "replace").decode()
        data = msgspec.json.encode(Line(at, who, text, interrupted, round(seconds, 1))) + b"\n"
        with self._lock:
            try:
                self._append(data)
            except OSError as error:
                self.problem = f"cannot write {self._path}: {error.strerror or error}"

    def _append(self, data: bytes) -> None:
        with open(self._path, "ab+") as file:
            size = file.tell()
            torn = size > 0 and not _ends_a_line(file, size)
            if size + len(data) <= self._max_bytes:
                file.write(b"\n" * torn + data)
                file.flush()
                os.fsync(file.fileno())
                return
        self._path.replace(self._path.with_name(OLDER))
        with open(self._path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _ends_a_line(file, size: int) -> bool:
    file.seek(size - 1)
    return file.read(1) == b"\n"


def read_transcript(folder: Path) -> Iterator[Line]:
    """What is there now, the oldest first; lines that a power cut broke are left out. Raises
    UsageError for a file that may not be read.
    """
    for name in (OLDER, NAME):
        yield from _lines(_read(folder / name))


def follow(folder: Path, going_on: Callable[[], bool] = lambda: True) -> Iterator[Line]:
    """:func:`read_transcript`, and what is said from then on. Ends only by ``going_on``."""
    yield from _lines(_read(folder / OLDER))
    path, at, inode = folder / NAME, 0, 0
    while going_on():
        found = path.stat() if path.exists() else None
        if found is not None and (found.st_ino != inode or found.st_size < at):
            if inode and found.st_ino != inode:  # the rest of what was moved away meanwhile
                yield from _lines(_read(folder / OLDER, at))
            at, inode = 0, found.st_ino
        data = _read(path, at)
        whole = data[: data.rfind(b"\n") + 1]
        at += len(whole)
        yield from _lines(whole)
        if not whole:
            time.sleep(_POLL_S)


def _read(path: Path, at: int = 0) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(at)
            return file.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _lines(data: bytes) -> Iterator[Line]:
    for line in data.split(b"\n"):
        if line:
            try:
                yield msgspec.json.decode(line, type=Line)
            except (ValueError, RecursionError):
                continue
