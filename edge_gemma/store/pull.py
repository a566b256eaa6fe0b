"""A reference → a bundle in the store, or a checkpoint's folder.

In: ``ORG/NAME[@REVISION][:FILE.gguf | :FOLDER | :QUANT]`` or the address of such a page. Out: a
verified :class:`Bundle`. Nothing leaves the machine unless :func:`pull` has to fetch something:
what is installed, or lies in the hub's own cache, is used without a word.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_gemma.bundles.folder import Bundle, sha256_file
from edge_gemma.bundles.manifest import MANIFEST, MAX_MANIFEST_BYTES, decode_manifest
from edge_gemma.errors import BundleError, HashMismatch, HubError, UsageError
from edge_gemma.files import written_whole
from edge_gemma.store.hub import Progress, disk_errors, fetch, list_repository, locked
from edge_gemma.store.installed import PULLED, Pulled, bundles, check_name, home, ls, read_pulled
from edge_gemma.store.reference import (
    Listing,
    Reference,
    choose,
    default_name,
    is_meant,
    parse_reference,
)

# what sentence-transformers keeps beside the weights, one folder for each layer after them
_MODULE_FILE = re.compile(r"\d+_\w+/(config\.json|model\.safetensors)")


def pull(
    reference: str,
    *,
    name: str | None = None,
    force: bool = False,
    relayout: bool = False,
    instruct: bool = False,
    endpoint: str | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> Bundle:
    """Install a bundle, or a GGUF as a bundle, and return it; what is installed already is returned
    without asking the hub.

    ``name`` is the name in the store (default: that of the file, folder or repository). ``force``
    fetches and replaces. ``relayout`` rewrites a GGUF cold-first; ``instruct``: its weights follow
    turns although it has no chat template. An interrupted pull goes on where
    it stopped when it is called again. Raises UsageError (the reference, a name that is taken),
    HubError (network, access, disk full), HashMismatch, BundleError.
    """
    wanted = parse_reference(reference)
    if name is not None:
        check_name(name)
    if not force and (installed := _installed(wanted, name)):
        return _as_wanted(Bundle.open(installed), instruct)
    listing = list_repository(wanted, endpoint)
    folder, gguf = choose(wanted, listing)
    name = check_name(name or default_name(wanted, folder, gguf))
    target = bundles() / name
    pulled = Pulled(wanted.repository, listing.commit, gguf or folder)
    work = _download_folder(wanted, listing, folder)
    with disk_errors(home()), locked(work):
        if target.exists() and not force:
            there = read_pulled(target)
            if there == pulled:  # another process was faster
                return _as_wanted(Bundle.open(target), instruct)
            raise UsageError(
                f"{name!r} is installed already, from "
                f"{there.repository if there else 'elsewhere'}; use --name for another name, "
                "--force to replace it"
            )
        if gguf:
            fetch(wanted, listing, [gguf], work, endpoint, on_progress)
            options = _ImportOptions(force, relayout, instruct)
            bundle = _install_gguf(wanted, listing, gguf, work / gguf, target, options, on_progress)
        else:
            bundle = _install_bundle(wanted, listing, folder, work, target, endpoint, on_progress)
        with written_whole(bundle.folder / PULLED) as file:
            file.write(msgspec.json.encode(pulled))
        shutil.rmtree(work, ignore_errors=True)
    return bundle


def _as_wanted(installed: Bundle, instruct: bool) -> Bundle:
    if instruct and not installed.manifest.instruct:
        raise UsageError(
            f"{installed.folder.name!r} is installed already, as base weights; add --force to "
            "replace it by one that follows turns"
        )
    return installed


def _download_folder(wanted: Reference, listing: Listing, part: str) -> Path:
    """Where what arrives is kept until it is complete; ``part`` of the repository, "" for all."""
    name = f"{wanted.repository}@{listing.commit[:12]}" + (f"/{part}" if part else "")
    return home() / "downloads" / name.replace("/", "--")


def fetch_checkpoint(
    reference: str,
    *,
    endpoint: str | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> Path:
    """A repository's weights, config and tokenizer files as a folder, for `edge-gemma convert`;
    never its pickles. Raises HubError, UsageError.

    What the hub's own cache holds is used where it lies; the rest is kept below the store's
    downloads until it is removed there.
    """
    wanted = parse_reference(reference)
    listing = list_repository(wanted, endpoint)
    top = [path for path in listing.files if "/" not in path]
    files = [
        path
        for path in top
        if path.endswith((".safetensors", ".json", ".jinja")) or path == "tokenizer.model"
    ]
    if not any(path.endswith(".safetensors") for path in files):
        raise HubError(
            f"{wanted.repository} holds no safetensors; expected a Hugging Face checkpoint. "
            f"A GGUF is installed with `edge-gemma pull {wanted.repository}`"
        )
    files += [path for path in listing.files if _MODULE_FILE.fullmatch(path)]
    if listing.cached and all((listing.cached / path).is_file() for path in files):
        return listing.cached
    work = _download_folder(wanted, listing, "checkpoint")
    with disk_errors(home()), locked(work):
        fetch(wanted, listing, files, work, endpoint, on_progress)
    return work


def _installed(wanted: Reference, name: str | None) -> Path | None:
    """An installed bundle of this repository (and file, and commit where one was asked for)."""
    for entry in ls():
        pulled = read_pulled(entry.folder)
        if (
            entry.problem
            or pulled is None
            or pulled.repository != wanted.repository
            or name not in (None, entry.name)
        ):
            continue
        if wanted.revision not in ("main", pulled.commit) and not (
            len(wanted.revision) >= 7 and pulled.commit.startswith(wanted.revision)
        ):
            continue
        if wanted.path in ("", pulled.path) or is_meant(wanted.path, pulled.path):
            return entry.folder
    return None


def _install_bundle(
    wanted: Reference,
    listing: Listing,
    folder: str,
    work: Path,
    target: Path,
    endpoint: str | None,
    on_progress: Progress,
) -> Bundle:
    def inside(name: str) -> str:
        return f"{folder}/{name}".lstrip("/")

    if listing.files[inside(MANIFEST)][0] > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{inside(MANIFEST)} of {wanted.repository} has "
            f"{listing.files[inside(MANIFEST)][0]} bytes; a manifest has at most "
            f"{MAX_MANIFEST_BYTES}"
        )
    fetch(wanted, listing, [inside(MANIFEST)], work, endpoint, lambda what, done, total: None)
    try:
        manifest = decode_manifest((work / inside(MANIFEST)).read_bytes())
    except BundleError:
        (work / inside(MANIFEST)).unlink()  # it may only have been damaged on the way
        raise
    for name, file in manifest.files.items():
        size = listing.files.get(inside(name), (None, None))[0]
        if size != file.size:
            raise BundleError(
                f"{wanted.repository} has {inside(name)} with "
                f"{'no' if size is None else size} bytes, its manifest says {file.size}; the "
                "upload is incomplete"
            )
    fetch(wanted, listing, [inside(name) for name in manifest.files], work, endpoint, on_progress)
    bundle = Bundle.open(work / folder)
    try:
        bundle.verify(_counter(on_progress, "checking", bundle.total_bytes()))
    except HashMismatch as error:
        shutil.rmtree(work, ignore_errors=True)
        raise HashMismatch(
            f"what arrived is damaged and was deleted; pull it again. {error}"
        ) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = None
    if target.exists():
        aside = target.with_name(f".removed-{os.getpid()}")
        target.rename(aside)
    (work / folder).rename(target)
    if aside:
        shutil.rmtree(aside, ignore_errors=True)
    return Bundle.open(target)


@dataclass(frozen=True)
class _ImportOptions:
    force: bool
    relayout: bool
    instruct: bool


def _install_gguf(
    wanted: Reference,
    listing: Listing,
    gguf: str,
    path: Path,
    target: Path,
    options: _ImportOptions,
    on_progress: Progress,
) -> Bundle:
    from edge_gemma.store.importer import import_gguf

    size, expected = listing.files[gguf]

    def check() -> None:
        if (
            expected
            and (found := sha256_file(path, _counter(on_progress, "checking", size))) != expected
        ):
            path.unlink()
            raise HashMismatch(
                f"{gguf} arrived with sha256 {found}, the hub says {expected}: it is damaged "
                "and was deleted; pull it again"
            )

    # the import hashes the file as well: one reading of it is enough where nothing is replaced
    if options.relayout or options.force:
        check()
    target.parent.mkdir(parents=True, exist_ok=True)
    origin = f"{wanted.repository}@{listing.commit[:7]}:{gguf}"
    try:
        bundle = import_gguf(
            path,
            target,
            relayout=options.relayout,
            instruct=options.instruct,
            overwrite=options.force,
            name=target.name,
            origin=origin,
            progress=_counter(on_progress, "importing", size),
        )
    except BundleError:
        check()  # if what arrived is damaged, that is the news
        raise
    taken = bundle.manifest.source.sha256  # None where the bundle holds a corrected copy
    if expected and not options.relayout and taken != expected:
        if taken is not None:
            shutil.rmtree(target)
        try:
            check()
        except HashMismatch:
            shutil.rmtree(target, ignore_errors=True)
            raise
    return bundle


def _counter(on_progress: Progress, what: str, total: int) -> Callable[[int], None]:
    done = 0

    def add(n: int) -> None:
        nonlocal done
        done += n
        on_progress(what, done, total)

    return add
