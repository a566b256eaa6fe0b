"""The bundle: a folder with ``manifest.json`` and the artifacts it names.

The one contract between converting and running.

In: a folder. Out: a :class:`Bundle` whose manifest was validated and whose files were checked (size
and header at load, full hashes on :meth:`Bundle.verify`). This module does not know
llama.cpp, onnxruntime or where a bundle came from.

No model fact is guessed from a file or model name: what the runtime needs to know is a field below.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from edge_gemma.bundles.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    File,
    Manifest,
    check_manifest,
    decode_manifest,
    encode_manifest,
)
from edge_gemma.errors import BundleError, HashMismatch, RuntimeFailure, UsageError
from edge_gemma.files import written_whole
from edge_gemma.units import MiB

_CHUNK = 4 * MiB


class Bundle:
    """A validated bundle folder.

    >>> bundle = Bundle.open(getfixture("tiny_bundle"))
    >>> bundle.manifest.family
    'gemma3'
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Bundle:
        """Read and validate the manifest, and check that each file is there with its size. Raises
        BundleError.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not folder.exists():
            raise BundleError(
                f"no bundle at {folder}; `edge-gemma ls` lists the installed ones, "
                "`edge-gemma import FILE.gguf OUT` makes one"
            )
        if not path.is_file():
            hint = (
                " This looks like a GGUF: `edge-gemma import FILE.gguf OUT` makes a bundle of it."
                if folder.suffix == ".gguf"
                else ""
            )
            raise BundleError(
                f"{folder} has no {MANIFEST}, so it is not a bundle (or its making was "
                f"interrupted).{hint}"
            )
        if (n := path.stat().st_size) > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} has {n} bytes; a manifest has at most {MAX_MANIFEST_BYTES}")
        bundle = cls(folder, decode_manifest(path.read_bytes()))
        bundle.check_sizes()
        return bundle

    def path(self, name: str) -> Path:
        """The file ``name`` of the manifest. Refuses a link that leads out of the folder for
        anything but a hard link.
        """
        path = self.folder / name
        if path.is_symlink() and not _is_cache_link(path):
            target = path.resolve()
            if not target.is_relative_to(self.folder.resolve()):
                raise BundleError(
                    f"{path} is a link to {target}, outside the bundle; copy the file in"
                )
        return path

    @property
    def decoder_path(self) -> Path:
        return self.path(self.manifest.decoder.file)

    def check_sizes(self) -> None:
        for name, file in self.manifest.files.items():
            path = self.path(name)
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                raise BundleError(
                    f"{self.folder} lacks {name}, which its manifest lists ({file.size} "
                    "bytes); import or pull it again"
                ) from None
            if size != file.size:
                raise BundleError(
                    f"{path} has {size} bytes, its manifest says {file.size}: truncated or "
                    "replaced; import or pull it again"
                )

    def check_header(self) -> None:
        """Hash the GGUF's header (a few MB, mostly vocabulary). Raises HashMismatch before
        llama.cpp reads a byte of it.
        """
        decoder = self.manifest.decoder
        with open(self.decoder_path, "rb") as file:
            found = hashlib.sha256(file.read(decoder.header_bytes)).hexdigest()
        if found != decoder.header_sha256:
            raise HashMismatch(
                f"the header of {self.decoder_path} was changed or damaged; import or pull it again"
            )

    def verify(self, progress: Callable[[int], None] = lambda n_bytes: None) -> None:
        """Hash every file in full. Raises HashMismatch naming the first that differs; ``progress``
        gets bytes as they are read.
        """
        for name, file in self.manifest.files.items():
            found = sha256_file(self.path(name), progress)
            if found != file.sha256:
                raise HashMismatch(
                    f"{self.path(name)} has sha256 {found}, its manifest says {file.sha256}: "
                    "the file was changed or damaged"
                )

    def total_bytes(self) -> int:
        return sum(file.size for file in self.manifest.files.values())


def _is_cache_link(path: Path) -> bool:
    """The hub cache keeps blobs beside snapshots and links them; such a link stays inside one
    `models--…` folder.
    """
    for parent in path.absolute().parents:
        if parent.name.startswith("models--"):
            return path.resolve().is_relative_to(parent.resolve())
    return False


def sha256_file(path: Path, progress: Callable[[int], None] = lambda n_bytes: None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def file_entry(path: Path, progress: Callable[[int], None] = lambda n_bytes: None) -> File:
    return File(size=path.stat().st_size, sha256=sha256_file(path, progress))


class BundleWriter:
    """Makes a bundle whole or not at all: a temporary sibling folder, manifest last, then one
    rename.

    >>> out = getfixture("tmp_path") / "new"
    >>> with BundleWriter(out) as writer:
    ...     _ = (writer.folder / "decoder.gguf").write_bytes(b"...")
    ...     # writer.commit(manifest) would publish it; without that call the folder vanishes again
    >>> out.exists()
    False
    """

    def __init__(self, out: str | os.PathLike, *, overwrite: bool = False):
        self.out = Path(out).absolute()
        if self.out.exists() and not overwrite:
            raise UsageError(
                f"{self.out} exists; choose another folder or pass --force to replace it"
            )
        self.folder = self.out.parent / f".{self.out.name}.partial-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> BundleWriter:
        for stale in self._stale():
            shutil.rmtree(stale, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True)
            (self.folder / ".pid").write_text(str(os.getpid()))
        except OSError as error:
            raise RuntimeFailure(f"cannot write in {self.out.parent}: {error.strerror}") from error
        return self

    def _stale(self) -> Iterator[Path]:
        """Leftovers of a killed run for the same output whose process is gone."""
        for folder in self.out.parent.glob(f".{self.out.name}.partial-*"):
            try:
                os.kill(int((folder / ".pid").read_text()), 0)
            except PermissionError:
                continue  # somebody else's, alive
            except (OSError, ValueError):
                yield folder

    def commit(self, manifest: Manifest) -> Bundle:
        check_manifest(manifest)
        with written_whole(self.folder / MANIFEST) as file:
            file.write(encode_manifest(manifest))
        self.publish()
        return Bundle.open(self.out)

    def publish(self) -> None:
        """The folder takes its place as it is, also without a manifest."""
        (self.folder / ".pid").unlink(missing_ok=True)
        if self.out.exists():  # overwrite was asked for: the old one leaves in one step, too
            old = self.folder.with_name(self.folder.name.replace("partial", "old"))
            self.out.rename(old)
            self.folder.rename(self.out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.folder.rename(self.out)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # gone already after commit
        if isinstance(error, OSError):
            free = shutil.disk_usage(self.out.parent).free
            raise RuntimeFailure(
                f"cannot write {self.out}: {error.strerror or error} ({free / MiB:.0f} MiB "
                "free there); nothing was left behind"
            ) from error
