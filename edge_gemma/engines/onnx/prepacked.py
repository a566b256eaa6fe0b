"""Weights as onnxruntime packs them, kept in a file: mapped, they are clean pages that the kernel
may take back and processes share, where packing at every load makes memory of one's own.

In: a bundle with an ONNX decoder. Out: the graph to open in its stead, or None. A packed file is of
one onnxruntime on one kind of CPU: both are in its folder's name, so another machine or release
packs anew. It is made beside its place and moved there whole; before, its logits are compared with
the bundle's own, to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import uuid
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np

from edge_gemma.bundles.folder import Bundle, sha256_file
from edge_gemma.bundles.manifest import OnnxPart
from edge_gemma.engines.onnx.graph_file import read_graph_file
from edge_gemma.engines.onnx.runtime import open_decoder, probe_logits
from edge_gemma.errors import BundleError, RuntimeFailure, first_line
from edge_gemma.files import cache_folder, written_whole
from edge_gemma.machine.probe import cpu_kind
from edge_gemma.plan.onnx_costs import packed_bytes
from edge_gemma.units import MiB, format_bytes

GRAPH, DATA, ABOUT = "decoder.onnx", "decoder.onnx.data", "about.json"
_MARGIN_BYTES = 64 * MiB
_MAX_ABOUT_BYTES = 1 << 16
_MAX_KEPT = 4  # bundles, CPUs and releases together; the least recently made go
_STALE_S = 3600  # a half-made folder of a process that is gone


class _About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bundle: str  # its name, for people
    graph_sha256: str
    data_bytes: int


def kept_in(bundle: Bundle, part: OnnxPart) -> Path | None:
    """The folder that is this bundle's on this machine, made or not; None without onnxruntime."""
    try:
        release = metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        return None
    names = sorted(name for name in bundle.manifest.files if name.startswith(part.file))
    weights = "".join(bundle.manifest.files[name].sha256 for name in names)
    key = hashlib.sha256("\n".join((weights, release, cpu_kind())).encode()).hexdigest()
    return cache_folder("prepacked") / key[:32]


def find_prepacked(bundle: Bundle, part: OnnxPart) -> Path | None:
    """The graph over packed weights, where a whole one is kept that nobody else could have written.
    Plans ask for it, so its operators are looked at by whoever opens it.
    """
    folder = kept_in(bundle, part)
    if folder is None:
        return None
    try:
        if not all(_is_ours(folder / name) for name in (".", GRAPH, DATA, ABOUT)):
            return None
        with open(folder / ABOUT, "rb") as file:
            about = msgspec.json.decode(file.read(_MAX_ABOUT_BYTES), type=_About)
        if (folder / DATA).stat().st_size != about.data_bytes:
            return None
        if sha256_file(folder / GRAPH) != about.graph_sha256:
            return None
    except (OSError, ValueError):
        return None
    return folder / GRAPH


def kept_bytes(bundle: Bundle, part: OnnxPart) -> int:
    """Of the packed weights alone, in the file that :func:`find_prepacked` finds; 0 without one."""
    graph = find_prepacked(bundle, part)
    if graph is None:
        return 0
    unpacked = bundle.manifest.files[f"{part.file}.data"].size
    return max(1, graph.with_name(DATA).stat().st_size - unpacked)


def needed_bytes(part: OnnxPart) -> int:
    """On the disk: onnxruntime keeps the weights as they were beside the packed ones."""
    return part.weights_bytes + packed_bytes(part) + _MARGIN_BYTES


def make_prepacked(bundle: Bundle, part: OnnxPart, n_threads: int) -> Path:
    """Pack and keep; what is kept already stays, unless it was damaged. Memory: the packed weights
    once, as at a load without. Raises RuntimeFailure (the disk; logits that differ), BundleError,
    MissingExtra.
    """
    target = kept_in(bundle, part)
    if target is None:
        raise RuntimeFailure("onnxruntime is not installed, so nothing can be packed")
    read_graph_file(bundle.path(part.file), bundle.path(f"{part.file}.data"))
    making = target.parent / f".making-{uuid.uuid4().hex[:8]}"
    try:
        making.mkdir(parents=True, mode=0o700)
        _check_disk(part, making)
        _write(bundle, part, making, n_threads)
        if target.exists() and find_prepacked(bundle, part) is None:
            shutil.rmtree(target)  # damaged
        _move(making, target)
        _let_old_go(target)
    except OSError as error:
        raise RuntimeFailure(f"cannot keep packed weights in {target}: {error.strerror}") from None
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return target / GRAPH


def _write(bundle: Bundle, part: OnnxPart, folder: Path, n_threads: int) -> None:
    source = bundle.path(part.file)
    try:
        session = open_decoder(source, n_threads=n_threads, save_packed=folder / GRAPH)
    except BundleError as error:
        raise RuntimeFailure(
            f"onnxruntime could not write packed weights below {folder.parent}: {first_line(error)}"
        ) from None
    expected = probe_logits(session)
    del session  # before the file is opened: packed weights are in memory once
    if not np.array_equal(
        expected, probe_logits(open_decoder(folder / GRAPH, n_threads=n_threads))
    ):
        raise RuntimeFailure(
            "packed weights gave other logits than the bundle's own; they were thrown away"
        )
    for name in (GRAPH, DATA):
        (folder / name).chmod(0o600)
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    about = _About(
        bundle.manifest.name, sha256_file(folder / GRAPH), (folder / DATA).stat().st_size
    )
    with written_whole(folder / ABOUT) as out:
        out.write(msgspec.json.format(msgspec.json.encode(about)))


def _move(making: Path, target: Path) -> None:
    """Another process may have been first: its files are as good, and may be mapped."""
    try:
        making.rename(target)
    except OSError:
        if not (target / ABOUT).is_file():
            raise


def _is_ours(path: Path) -> bool:
    """Not a link, ours, and written by nobody else."""
    found = path.lstat()
    others = found.st_mode & 0o022
    is_ours = not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    return is_ours and not others and not path.is_symlink()


def _check_disk(part: OnnxPart, folder: Path) -> None:
    needed, free = needed_bytes(part), shutil.disk_usage(folder).free
    if free < needed:
        raise RuntimeFailure(
            f"packed weights need {format_bytes(needed)} below {folder.parent}, where "
            f"{format_bytes(free)} are free; set XDG_CACHE_HOME to another disk, or do without"
        )


def _let_old_go(newest: Path) -> None:
    """The oldest folders beyond a few, and what a killed process left."""
    found = [path for path in newest.parent.iterdir() if path != newest]
    made = sorted((path for path in found if path.name[0] != "."), key=_age_s)
    stale = [path for path in found if path.name[0] == "." and _age_s(path) > _STALE_S]
    for path in (*made[_MAX_KEPT - 1 :], *stale):
        shutil.rmtree(path, ignore_errors=True)


def _age_s(path: Path) -> float:
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime
    return 0.0


def forget_prepacked(bundle: Bundle, part: OnnxPart) -> int:
    """Remove what is kept of this bundle on this machine; bytes that are free again."""
    folder = kept_in(bundle, part)
    if folder is None or not folder.is_dir():
        return 0
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder, ignore_errors=True)
    return n_bytes
