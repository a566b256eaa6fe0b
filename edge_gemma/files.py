"""Files that appear whole or not at all.

In: a path. Out: an open file whose bytes take the path's place in one step, once they are on the
disk.
"""

from __future__ import annotations

import mmap
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.units import KiB, MiB


def cache_folder(name: str) -> Path:
    """``$XDG_CACHE_HOME/edge-gemma/NAME``, or the same under ``~/.cache``. Nothing is created."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    return (Path(chosen) if chosen else Path.home() / ".cache") / "edge-gemma" / name


def state_folder(name: str) -> Path:
    """``$XDG_STATE_HOME/edge-gemma/NAME``, or the same under ``~/.local/state``: what must outlive
    a restart. Nothing is created.
    """
    chosen = os.environ.get("XDG_STATE_HOME")
    return (Path(chosen) if chosen else Path.home() / ".local" / "state") / "edge-gemma" / name


def read_bounded(path: str | os.PathLike[str], max_bytes: int, expected: str) -> bytes:
    """A small file that somebody else may have written. Raises UsageError: it cannot be read, or is
    larger; ``expected`` says what it should have been.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if len(data) > max_bytes:
        limit = f"{max_bytes // KiB} KiB" if max_bytes % MiB else f"{max_bytes // MiB} MiB"
        raise UsageError(f"{path} is larger than {limit}; expected {expected}")
    return data


def pages(n_bytes: int) -> memoryview:
    """Memory of its own, which the system has back at once when it is let go; what malloc was given
    back may stay with the process.

    >>> len(pages(5000))
    5000
    """
    if sys.platform == "win32":
        return memoryview(mmap.mmap(-1, n_bytes))
    return memoryview(mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that replaces ``path`` when the block ends without an error.

    The bytes go into a temporary file beside ``path``, reach the disk (fsync), and then take its
    name in one step. After an error in the block ``path`` is what it was before, and the temporary
    file is gone. Raises RuntimeFailure (path and reason) for what the disk refuses.

    >>> target = getfixture("tmp_path") / "figures.json"
    >>> with written_whole(target) as file:
    ...     _ = file.write(b"{}")
    >>> target.read_bytes()
    b'{}'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _reach_the_disk(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RuntimeFailure(f"cannot write {path}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _reach_the_disk(folder: Path) -> None:
    """A new name in ``folder`` outlives a power cut from here on. Not every system can be asked."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # a file system that knows no such thing
    finally:
        os.close(descriptor)
