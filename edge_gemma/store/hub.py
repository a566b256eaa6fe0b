"""A reference on the Hugging Face hub → a bundle in the store.

The only module that imports huggingface_hub.

In: ``ORG/NAME[@REVISION][:FILE.gguf | :FOLDER | :QUANT]`` or the address of such a page. Out: a
verified :class:`Bundle`. Nothing leaves the machine unless :func:`pull` has to fetch something:
what is installed, or lies in the hub's own cache, is used without a word. huggingface_hub gives
listings, authentication and transfer. Partial files and resuming are ours, because its own
hf_hub_download deletes what it had when a download is interrupted; so the transfer goes through its
non-public ``http_get``, and pyproject.toml caps its version.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote

import msgspec

from edge_gemma.bundles.folder import Bundle, sha256_file
from edge_gemma.bundles.manifest import MANIFEST, MAX_MANIFEST_BYTES, decode_manifest
from edge_gemma.errors import (
    BundleError,
    EdgeGemmaError,
    HashMismatch,
    HubError,
    RuntimeFailure,
    UsageError,
)
from edge_gemma.files import written_whole
from edge_gemma.store.installed import (
    PULLED,
    Pulled,
    bundles,
    check_name,
    home,
    ls,
    read_pulled,
)
from edge_gemma.units import MiB, format_bytes

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

MARGIN_BYTES = 64 * MiB  # left free on the disk
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REFERENCE = re.compile(
    rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[^:\s]+))?(?::(?P<path>[^\s]+))?"
)
_URL = re.compile(
    rf"https?://(?:huggingface\.co|hf\.co)/({_PART}/{_PART})(?:/(?:blob|resolve|tree)/([^/\s]+)(?:/([^\s?]*))?)?(?:\?\S*)?/?"
)

Progress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all)


@dataclass(frozen=True)
class Reference:
    """What to pull.

    >>> parse_reference("org/name@v1:model-Q4_0.gguf")
    Reference(repository='org/name', revision='v1', path='model-Q4_0.gguf')
    """

    repository: str
    revision: str = "main"
    path: str = ""  # a GGUF, a folder with a bundle, or part of a GGUF's name; "" to find out


def parse_reference(text: str) -> Reference:
    """``org/name``, ``org/name@revision``, ``org/name:file.gguf``, or the address of a page on
    huggingface.co. Raises UsageError.

    >>> parse_reference("https://huggingface.co/org/name/blob/main/a/b.gguf")
    Reference(repository='org/name', revision='main', path='a/b.gguf')
    """
    text = text.strip()
    if match := _URL.fullmatch(text):
        found = Reference(match[1], unquote(match[2] or "main"), unquote(match[3] or "").strip("/"))
    elif match := _REFERENCE.fullmatch(text.removeprefix("hf.co/").removeprefix("huggingface.co/")):
        found = Reference(
            match["repository"], match["revision"] or "main", (match["path"] or "").strip("/")
        )
    else:
        raise UsageError(
            f"cannot read {text!r} as a model on the hub; write it like org/name, "
            "org/name:file.gguf or org/name@revision"
        )
    if (
        ".." in PurePosixPath(found.path).parts
        or ".." in found.repository
        or "\\" in found.path
        or "\0" in found.path
    ):
        raise UsageError(f"the path {found.path!r} leads out of the repository")
    return found


@dataclass
class _Listing:
    """What a repository holds at one commit; ``cached`` is the folder of the hub's own cache that
    has it already, if any.
    """

    commit: str
    files: dict[str, tuple[int, str | None]]  # path → (bytes, sha256 of large files)
    cached: Path | None = None
    problem: EdgeGemmaError | None = field(default=None)  # why the hub was not asked


def pull(
    reference: str,
    *,
    name: str | None = None,
    force: bool = False,
    relayout: bool = False,
    endpoint: str | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> Bundle:
    """Install a bundle, or a GGUF as a bundle, and return it; what is installed already is returned
    without asking the hub.

    ``name`` is the name in the store (default: that of the file, folder or repository). ``force``
    fetches and replaces. ``relayout`` rewrites a GGUF cold-first. An interrupted pull goes on where
    it stopped when it is called again. Raises UsageError (the reference, a name that is taken),
    HubError (network, access, disk full), HashMismatch, BundleError.
    """
    wanted = parse_reference(reference)
    if name is not None:
        check_name(name)
    if not force and (installed := _installed(wanted, name)):
        return Bundle.open(installed)
    listing = _listing(wanted, endpoint)
    folder, gguf = _choose(wanted, listing)
    name = check_name(name or _default_name(wanted, folder, gguf))
    target = bundles() / name
    pulled = Pulled(wanted.repository, listing.commit, gguf or folder)
    work = _download_folder(wanted, listing, folder)
    with _disk_errors(home()), _locked(work):
        if target.exists() and not force:
            there = read_pulled(target)
            if there == pulled:  # another process was faster
                return Bundle.open(target)
            raise UsageError(
                f"{name!r} is installed already, from "
                f"{there.repository if there else 'elsewhere'}; use --name for another name, "
                "--force to replace it"
            )
        if gguf:
            _fetch(wanted, listing, [gguf], work, endpoint, on_progress)
            bundle = _install_gguf(
                wanted, listing, gguf, work / gguf, target, force, relayout, on_progress
            )
        else:
            bundle = _install_bundle(wanted, listing, folder, work, target, endpoint, on_progress)
        with written_whole(bundle.folder / PULLED) as file:
            file.write(msgspec.json.encode(pulled))
        shutil.rmtree(work, ignore_errors=True)
    return bundle


def _download_folder(wanted: Reference, listing: _Listing, part: str) -> Path:
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
    listing = _listing(wanted, endpoint)
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
    if listing.cached and all((listing.cached / path).is_file() for path in files):
        return listing.cached
    work = _download_folder(wanted, listing, "checkpoint")
    with _disk_errors(home()), _locked(work):
        _fetch(wanted, listing, files, work, endpoint, on_progress)
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
        if (
            wanted.path in ("", pulled.path)
            or wanted.path.lower() in PurePosixPath(pulled.path).name.lower()
        ):
            return entry.folder
    return None


def _choose(wanted: Reference, listing: _Listing) -> tuple[str, str]:
    """(folder of a bundle, "") or ("", GGUF file)."""
    where = f"{wanted.repository}@{listing.commit[:7]}"
    if wanted.path in listing.files and wanted.path.endswith(".gguf"):
        return "", _whole(wanted.path)
    folder = wanted.path.removesuffix(MANIFEST).strip("/")
    if f"{folder}/{MANIFEST}".lstrip("/") in listing.files:
        return folder, ""
    ggufs = [
        path
        for path in sorted(listing.files)
        if path.endswith(".gguf") and not re.search(r"mmproj|imatrix", path, re.IGNORECASE)
    ]
    listed = ", ".join(f"{path} ({format_bytes(listing.files[path][0])})" for path in ggufs[:20])
    if wanted.path:
        if listing.problem:
            raise listing.problem
        fitting = [
            path
            for path in ggufs
            if path.startswith(f"{wanted.path}/")
            or wanted.path.lower() in PurePosixPath(path).name.lower()
        ]
        if len(fitting) != 1:
            raise HubError(
                f"{where} has {len(fitting) or 'no'} file{'s' * (len(fitting) != 1)} for "
                f"{wanted.path!r}; its GGUF files: {listed or 'none'}"
            )
        return "", _whole(fitting[0])
    if len(ggufs) == 1:
        return "", _whole(ggufs[0])
    if ggufs:
        raise HubError(
            f"{where} has {len(ggufs)} GGUF files; name one, like "
            f"{wanted.repository}:{ggufs[0]}. There are: {listed}"
        )
    if listing.problem:
        raise listing.problem
    if any(path.endswith(".safetensors") for path in listing.files):
        raise HubError(
            f"{where} is a checkpoint, neither a bundle nor a GGUF; make a bundle of it: "
            f"edge-gemma convert {wanted.repository} OUT"
        )
    raise HubError(
        f"{where} has neither a {MANIFEST} nor a GGUF; it holds "
        f"{', '.join(sorted(listing.files)[:8]) or 'nothing'}"
    )


def _whole(path: str) -> str:
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path):
        raise HubError(
            f"{path} is one part of a split GGUF, which this version does not join; pull an "
            "unsplit one"
        )
    return path


def _default_name(wanted: Reference, folder: str, gguf: str) -> str:
    text = (
        PurePosixPath(gguf).stem
        if gguf
        else PurePosixPath(folder).name
        if folder
        else wanted.repository.split("/")[1]
    )
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:128]


# ---- installing


def _install_bundle(
    wanted: Reference,
    listing: _Listing,
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
    _fetch(wanted, listing, [inside(MANIFEST)], work, endpoint, lambda what, done, total: None)
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
    _fetch(wanted, listing, [inside(name) for name in manifest.files], work, endpoint, on_progress)
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


def _install_gguf(
    wanted: Reference,
    listing: _Listing,
    gguf: str,
    path: Path,
    target: Path,
    force: bool,
    relayout: bool,
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

    if (
        relayout or force
    ):  # the import hashes the file as well: one reading of it is enough where nothing is replaced
        check()
    target.parent.mkdir(parents=True, exist_ok=True)
    origin = f"{wanted.repository}@{listing.commit[:7]}:{gguf}"
    try:
        bundle = import_gguf(
            path,
            target,
            relayout=relayout,
            overwrite=force,
            name=target.name,
            origin=origin,
            progress=_counter(on_progress, "importing", size),
        )
    except BundleError:
        check()  # if what arrived is damaged, that is the news
        raise
    if expected and not relayout and bundle.manifest.source.sha256 != expected:
        shutil.rmtree(target)
        check()
    return bundle


def _counter(on_progress: Progress, what: str, total: int) -> Callable[[int], None]:
    done = 0

    def add(n: int) -> None:
        nonlocal done
        done += n
        on_progress(what, done, total)

    return add


# ---- fetching


def _fetch(
    wanted: Reference,
    listing: _Listing,
    paths: list[str],
    work: Path,
    endpoint: str | None,
    on_progress: Progress,
) -> None:
    """Each file of ``paths`` into ``work``, from the hub's cache where it has it, else by HTTP with
    resuming.
    """
    total = sum(listing.files[path][0] for path in paths)
    missing = sum(
        listing.files[path][0] - _have(work / path) for path in paths if not _cached(listing, path)
    )
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free
    if missing + MARGIN_BYTES > free:
        raise HubError(
            f"{wanted.repository} needs {format_bytes(missing)} more on the disk of "
            f"{home()}, where {format_bytes(free)} are free; make room or set EDGE_GEMMA_HOME"
        )
    done = 0
    for path in paths:
        size, _ = listing.files[path]
        target = work / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.stat().st_size != size:
            if cached := _cached(listing, path):
                _link(cached, target)
            else:
                if listing.problem:
                    raise listing.problem
                report = partial(_report, on_progress, done, total)
                _download(wanted, listing, path, target, endpoint, report)
        done += size
        on_progress("downloading", done, total)


def _report(on_progress: Progress, before: int, total: int, n_bytes: int) -> None:
    on_progress("downloading", before + n_bytes, total)


def _have(target: Path) -> int:
    for path in (target, target.with_name(target.name + ".part")):
        if path.exists():
            return path.stat().st_size
    return 0


def _cached(listing: _Listing, path: str) -> Path | None:
    found = listing.cached / path if listing.cached else None
    return (
        found.resolve()
        if found and found.is_file() and found.stat().st_size == listing.files[path][0]
        else None
    )


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class _Counted(io.BufferedWriter):
    """A file that says how far it is, and goes on at the end of what it has."""

    def __init__(self, path: Path, on_size: Callable[[int], None]):
        super().__init__(io.FileIO(path, "a"))
        self._on_size = on_size

    def write(self, data: ReadableBuffer) -> int:
        n = super().write(data)
        self._on_size(self.tell())
        return n


def _download(
    wanted: Reference,
    listing: _Listing,
    path: str,
    target: Path,
    endpoint: str | None,
    on_size: Callable[[int], None],
) -> None:
    """One file into ``target``, through ``target.part`` that survives an interruption."""
    size, _ = listing.files[path]
    part = target.with_name(target.name + ".part")
    if part.exists() and part.stat().st_size > size:
        part.unlink()
    with _hub_errors(wanted, path), _Counted(part, on_size) as file:
        if size > file.tell():
            from huggingface_hub import hf_hub_url
            from huggingface_hub.file_download import http_get

            # exported at run time, and not for type checkers
            from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

            url = hf_hub_url(wanted.repository, path, revision=listing.commit, endpoint=endpoint)
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(library_name="edge-gemma"),
                expected_size=size,
            )
        file.flush()
        os.fsync(file.fileno())
    part.replace(target)


def _listing(wanted: Reference, endpoint: str | None) -> _Listing:
    """Ask the hub; when it cannot be reached, what its cache on this machine holds of that
    revision.
    """
    _quiet()
    cached = _cache_folder(wanted)
    try:
        with _hub_errors(wanted):
            from huggingface_hub import HfApi

            info = HfApi(endpoint=endpoint, library_name="edge-gemma").model_info(
                wanted.repository, revision=wanted.revision, files_metadata=True, timeout=30
            )
    except _Unreachable as error:
        if cached is None:
            raise
        held = [path for path in cached.rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(cached)): path.stat().st_size for path in held}
        return _Listing(
            cached.name, {path: (size, None) for path, size in sizes.items()}, cached, error
        )
    files = {
        s.rfilename: (s.size or 0, s.lfs.sha256 if s.lfs else None)
        for s in info.siblings or []
        if not set(PurePosixPath(s.rfilename).parts) & {"..", "/"}
    }
    if info.sha is None or not re.fullmatch(r"[0-9a-f]{7,64}", info.sha):
        raise HubError(
            f"the hub names no commit for {wanted.repository}@{wanted.revision} (it says "
            f"{info.sha!r}); is HF_ENDPOINT right?"
        )
    return _Listing(info.sha, files, cached if cached and cached.name == info.sha else None)


def _cache_folder(wanted: Reference) -> Path | None:
    """``models--org--name/snapshots/COMMIT`` of the hub's own cache, if this revision is in it."""
    with contextlib.suppress(ImportError):
        from huggingface_hub.constants import HF_HUB_CACHE

        repository = Path(HF_HUB_CACHE) / f"models--{wanted.repository.replace('/', '--')}"
        with contextlib.suppress(OSError):
            commit = (
                (repository / "refs" / wanted.revision).read_text().strip()
                if (repository / "refs" / wanted.revision).is_file()
                else wanted.revision
            )
            if (
                re.fullmatch(r"[0-9a-f]{40}", commit)
                and (repository / "snapshots" / commit).is_dir()
            ):
                return repository / "snapshots" / commit
    return None


def _quiet() -> None:
    """No telemetry, no progress bars of its own; and plain HTTP, whose memory is bounded and whose
    partial files can be resumed.
    """
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)
    import logging

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """One process at a time on one download; a second one waits and then finds the bundle's parts
    there.
    """
    # exported at run time, and not for type checkers
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    work.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(work.with_name(f".{work.name}.lock")):
        yield


# ---- errors


class _Unreachable(HubError):
    """The hub did not answer; the cache may still help."""


@contextlib.contextmanager
def _disk_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HubError(
                f"the disk of {where} is full; make room and run the same command again, it "
                "goes on where it stopped"
            ) from error
        raise RuntimeFailure(f"cannot write below {where}: {error.strerror or error}") from error


@contextlib.contextmanager
def _hub_errors(wanted: Reference, path: str = "") -> Iterator[None]:
    """huggingface_hub's errors → ours, each with what to do next."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

    what = f"{wanted.repository}{':' * bool(path)}{path}"
    try:
        yield
    except EdgeGemmaError:
        raise
    except OfflineModeIsEnabled as error:
        raise _Unreachable(
            f"HF_HUB_OFFLINE is set, and {what} is neither installed nor in the hub's cache; "
            "unset it to pull"
        ) from error
    except (HfHubHTTPError, EntryNotFoundError) as error:
        raise _http_error(error, wanted, path, what) from error
    except Exception as error:
        ours = _transfer_error(error, what)
        if ours is None:
            raise
        raise ours from error


def _http_error(
    error: HfHubHTTPError | EntryNotFoundError, wanted: Reference, path: str, what: str
) -> HubError:
    """What the hub answered."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{wanted.repository}"
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{what} is gated: accept the Gemma licence at {page} with your account, then "
            "`hf auth login` (or set HF_TOKEN) and pull again"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"there is no {wanted.repository} on the hub, or it is private. Check the name; "
            "for a private or gated one `hf auth login` (or set HF_TOKEN) first"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{wanted.repository} has no revision {wanted.revision!r}; see {page}/tree/main"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(
            f"{wanted.repository} has no file {path!r} at {wanted.revision!r}; see "
            f"{page}/tree/{wanted.revision}"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return HubError(
            f"the hub denies access to {what} ({status}): accept the licence at {page}, "
            "check your token with `hf auth whoami`"
        )
    if status == 429:
        return HubError(
            f"the hub limits how often it may be asked (429) for {what}; wait a few "
            "minutes, then run the same command again"
        )
    return _Unreachable(
        f"the hub answered {status} for {what}; try again later, what has arrived is kept"
    )


def _transfer_error(error: Exception, what: str) -> HubError | None:
    """What went wrong on the way, or None where it is neither the disk nor the network."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return HubError(
            f"the disk of {home()} is full; make room and run the same command again, it "
            "goes on where it stopped"
        )
    if "Consistency check failed" in str(error):
        return HubError(
            f"{what} broke off before its end; run the same command again, it goes on "
            "where it stopped"
        )
    library = type(error).__module__.partition(".")[0].rstrip("0123456789")
    if library in ("httpx", "httpcore", "requests") or isinstance(error, ConnectionError):
        return _Unreachable(
            f"cannot reach the hub for {what} ({type(error).__name__}: {error}). Check "
            "the network and run the same command again; what has arrived is kept. "
            "Installed bundles (`edge-gemma ls`) work offline"
        )
    return None
