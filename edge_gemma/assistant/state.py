"""Small files that outlive a restart: written whole, read back with nothing believed.

In: a folder and a msgspec type. Out: its value, or what stands in where the file is missing or
broken. A broken file is kept beside it under another name, and told.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from edge_gemma.errors import RuntimeFailure, UsageError, first_line
from edge_gemma.files import written_whole

_MAX_BYTES = 1 << 20
T = TypeVar("T")


def made_folder(path: Path) -> Path:
    """Raises UsageError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {path}: {error.strerror}") from None
    return path


def read_state(path: Path, kind: type[T], otherwise: T) -> tuple[T, str]:
    """The file's value, and what was wrong with it ("" where nothing was). Raises UsageError for a
    file that is there and may not be read.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError("it is larger than 1 MiB")
        return msgspec.json.decode(data, type=kind), ""
    except FileNotFoundError:
        return otherwise, ""
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        kept = path.with_name(path.name + ".broken")
        try:
            path.replace(kept)
        except OSError:
            kept = path
        return otherwise, f"{path.name} was broken ({first_line(error)}); it is kept as {kept}"


def write_state(path: Path, value: object) -> None:
    """Raises RuntimeFailure."""
    try:
        data = msgspec.json.format(msgspec.json.encode(value))
    except (TypeError, ValueError) as error:
        raise RuntimeFailure(f"cannot write {path}: {first_line(error)}") from None
    with written_whole(path) as file:
        file.write(data)
