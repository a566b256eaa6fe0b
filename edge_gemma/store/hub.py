"""The Hugging Face hub: what a repository holds, and its files on this disk.

The only module that imports huggingface_hub.

In: a :class:`~edge_gemma.store.reference.Reference`. Out: a listing, and fetched files. What lies
in the hub's own cache is used where it lies. huggingface_hub gives listings, authentication and
transfer. Partial files and resuming are ours, because its own hf_hub_download deletes what it had
when a download is interrupted; so the transfer goes through its non-public ``http_get``, and
pyproject.toml caps its version.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from edge_gemma.errors import EdgeGemmaError, HubError, RuntimeFailure
from edge_gemma.store.installed import home
from edge_gemma.store.reference import Listing, Reference
from edge_gemma.units import MiB, format_bytes

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

MARGIN_BYTES = 64 * MiB  # left free on the disk
Progress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all)


def fetch(
    wanted: Reference,
    listing: Listing,
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


def _cached(listing: Listing, path: str) -> Path | None:
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
    listing: Listing,
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


def list_repository(wanted: Reference, endpoint: str | None) -> Listing:
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
        return Listing(
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
    return Listing(info.sha, files, cached if cached and cached.name == info.sha else None)


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
def locked(work: Path) -> Iterator[None]:
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
def disk_errors(where: Path) -> Iterator[None]:
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
