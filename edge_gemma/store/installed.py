"""The store: where named bundles live, so that ``edge-gemma run gemma-3-270m`` needs no path.

In: a name or a path. Out: a bundle folder, or the list of those installed. ``$EDGE_GEMMA_HOME``
(default ``~/.local/share/edge-gemma``) holds ``bundles/NAME/`` and, while something is being
pulled, ``downloads/``. This module knows no network and no model; ``hub`` fills the
store.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_gemma.bundles.folder import Bundle
from edge_gemma.errors import BundleError, RuntimeFailure, UsageError

PULLED = "pulled.json"  # beside the manifest: where a bundle of the store came from
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Pulled(msgspec.Struct, frozen=True):
    """Where a bundle was pulled from."""

    repository: str
    commit: str
    path: str  # the GGUF or subfolder in the repository, "" for its root


@dataclass(frozen=True)
class Entry:
    """One bundle of the store. ``problem`` says why it cannot be used, if so."""

    name: str
    folder: Path
    size_bytes: int
    family: str = ""
    instruct: bool = False
    hears: bool = False
    sees: bool = False
    origin: str = ""
    problem: str = ""


def home() -> Path:
    """``$EDGE_GEMMA_HOME``, or ``$XDG_DATA_HOME/edge-gemma``, or ``~/.local/share/edge-gemma``.
    Nothing is created.
    """
    if chosen := os.environ.get("EDGE_GEMMA_HOME"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "edge-gemma"


def bundles() -> Path:
    return home() / "bundles"


def check_name(name: str) -> str:
    """A name that is a plain folder name. Raises UsageError.

    >>> check_name("gemma-3n-E2B-it")
    'gemma-3n-E2B-it'
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for a bundle; use letters, digits, . _ - (at most 128)"
        )
    return name


def resolve(name_or_path: str | os.PathLike) -> Path:
    """A path that exists, or the folder of the installed bundle with that name. Raises BundleError
    with the nearest names.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    name = str(name_or_path)
    if _NAME.fullmatch(name) and (bundles() / name).is_dir():
        return bundles() / name
    names = [entry.name for entry in ls()]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    known = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"installed are: {', '.join(names) or 'none'}."
    )
    raise BundleError(
        f"no bundle {name!r}: neither a path nor a name in {bundles()}; {known} `edge-gemma "
        "pull ORG/NAME` installs one"
    )


def ls() -> list[Entry]:
    """The installed bundles by name, those that cannot be used among them."""
    try:
        folders = sorted(
            folder
            for folder in bundles().iterdir()
            if folder.is_dir() and _NAME.fullmatch(folder.name)
        )
    except OSError:
        return []
    return [_entry(folder) for folder in folders]


def _entry(folder: Path) -> Entry:
    size = sum(n for _, n in _files(folder))
    try:
        manifest = Bundle.open(folder).manifest
    except (BundleError, OSError) as error:
        return Entry(folder.name, folder, size, problem=str(error))
    pulled = read_pulled(folder)
    origin = (
        f"{pulled.repository}@{pulled.commit[:7]}{':' * bool(pulled.path)}{pulled.path}"
        if pulled
        else manifest.source.origin
    )
    return Entry(
        folder.name,
        folder,
        size,
        manifest.family,
        manifest.instruct,
        manifest.audio is not None,
        manifest.vision is not None,
        origin,
    )


def read_pulled(folder: Path) -> Pulled | None:
    try:
        return msgspec.json.decode((folder / PULLED).read_bytes(), type=Pulled)
    except (OSError, msgspec.DecodeError):
        return None


def find(name: str) -> Path:
    """The folder of the installed bundle ``name``. Raises BundleError when there is none,
    UsageError for a path.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not the name of an installed bundle; `edge-gemma ls` lists them. "
            "Folders elsewhere are yours to delete"
        )
    folder = bundles() / name
    if not folder.is_dir():
        raise BundleError(
            f"no bundle {name!r} is installed; installed are: "
            f"{', '.join(entry.name for entry in ls()) or 'none'}"
        )
    return folder


def rm(name: str) -> int:
    """Delete an installed bundle; returns the bytes it took. Raises as :func:`find` does."""
    folder = find(name)
    size = sum(n for _, n in _files(folder))
    _delete(folder)
    return size


def unfinished() -> list[tuple[str, int]]:
    """(name, bytes) of downloads that were begun and not finished."""
    try:
        folders = sorted(folder for folder in (home() / "downloads").iterdir() if folder.is_dir())
    except OSError:
        return []
    return [(folder.name, sum(n for _, n in _files(folder))) for folder in folders]


def rm_unfinished() -> int:
    """Delete what unfinished downloads left; returns the bytes."""
    found = unfinished()
    for name, _ in found:
        _delete(home() / "downloads" / name)
    return sum(n for _, n in found)


def _delete(folder: Path) -> None:
    """First out of sight in one step, then gone: a crash in between leaves no half bundle under its
    name.
    """
    aside = folder.with_name(f".removed-{uuid.uuid4().hex[:8]}")
    try:
        folder.rename(aside)
        for stale in folder.parent.glob(".removed-*"):
            shutil.rmtree(stale)
    except OSError as error:
        raise RuntimeFailure(f"cannot delete {folder}: {error.strerror or error}") from error


def _files(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.stat().st_size
