"""What a process takes in memory, as the kernel counts it.

In: a process id (this one unless told). Out: :class:`Footprint` (now), :class:`PeakSampler` (over
time), :func:`mapping_of` and :func:`resident_bytes` (which pages of a file are held). This module
does not know models or plans.

Why PSS: a shared page is counted by its share, so the figures of several processes add up to what
the machine lost. Why anonymous and file-backed apart: clean file pages can be dropped under
pressure and read again, anonymous ones only swapped. Source of the counters: proc(5),
Documentation/filesystems/proc.rst.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from edge_gemma.errors import MissingExtra
from edge_gemma.units import KiB, MiB

# What a process holds with this package and llama.cpp loaded and no model: PSS, measured on x86-64
# Linux, CPython 3.11, by `edge-gemma bench run base`; and 4 MiB that the first answer brings
# (modules that are imported then, the interpreter's heap), by `edge-gemma bench run plan`.
RUNTIME_ANON_BYTES = 40 * MiB
RUNTIME_FILE_BYTES = 15 * MiB
PAGE_BYTES = mmap.PAGESIZE  # 16 KiB on a Raspberry Pi 5
# bit 63 of a pagemap entry (uint64): the page is in memory
# (Documentation/admin-guide/mm/pagemap.rst)
_PRESENT = 1 << 63
# <asm-generic/mman-common.h>; the last since Linux 5.14
MADV_RANDOM, MADV_WILLNEED, MADV_DONTNEED, MADV_POPULATE_READ = 1, 3, 4, 22
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
if _libc is not None:
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True)
class Footprint:
    """Bytes of one process.

    ``anon_bytes + file_bytes`` is ``pss_bytes``, but for shared memory. ``exact`` is false where
    the kernel keeps no proportional counts (no smaps_rollup): PSS is then the RSS, which is never
    less.
    """

    rss_bytes: int
    pss_bytes: int
    anon_bytes: int
    file_bytes: int
    swap_bytes: int = 0
    exact: bool = True


def footprint(pid: int | None = None, *, exact: bool = True) -> Footprint:
    """The footprint of process ``pid`` (default: this one).

    ``exact`` walks the page tables, about 1 ms per 100 MiB mapped. Without it the kernel's counters
    are read, which costs microseconds and knows no sharing: RSS stands in the place of PSS.
    Raises ProcessLookupError when the process is gone, MissingExtra (off Linux, without psutil).

    >>> now = footprint()
    >>> 0 < now.anon_bytes <= now.rss_bytes
    True
    >>> footprint(exact=False).exact
    False
    """
    return _proportional(pid) if exact else _counters(pid)


def _proportional(pid: int | None) -> Footprint:
    # psutil's memory_full_info reads the whole of smaps, which takes ten times as long as the
    # kernel's own sum in smaps_rollup and tells nothing of anonymous and file-backed shares.
    try:
        with open(f"/proc/{pid or 'self'}/smaps_rollup", "rb") as file:
            found = _fields(file.read())
        rss, pss = found["Rss"], found["Pss"]
    except (FileNotFoundError, PermissionError, KeyError):
        return _counters(pid)
    except OSError as error:  # ESRCH: the process ended between open and read
        raise ProcessLookupError(f"process {pid} is gone") from error
    anon = found.get("Pss_Anon", found.get("Anonymous", 0))  # Pss_Anon since Linux 5.9
    return Footprint(
        rss,
        pss,
        min(anon, pss),
        max(0, pss - anon - found.get("Pss_Shmem", 0)),
        found.get("SwapPss", found.get("Swap", 0)),
    )


def _counters(pid: int | None) -> Footprint:
    try:
        with open(f"/proc/{pid or 'self'}/status", "rb") as file:
            found = _fields(file.read())
    except (FileNotFoundError, ProcessLookupError):
        if sys.platform == "linux":
            raise ProcessLookupError(f"process {pid} is gone") from None
        return _psutil(pid)
    rss, anon = found.get("VmRSS", 0), found.get("RssAnon", 0)
    return Footprint(rss, rss, anon, found.get("RssFile", 0), found.get("VmSwap", 0), exact=False)


def load_psutil() -> ModuleType:
    """psutil, which is installed where /proc is not there to read. Raises MissingExtra."""
    try:
        import psutil
    except ImportError:
        raise MissingExtra("Reading how busy the CPUs are, or memory off Linux,", "bench") from None
    return psutil


def _fields(text: bytes) -> dict[str, int]:
    """``Name:   123 kB`` lines → bytes."""
    found = {}
    for line in text.splitlines():
        parts = line.split()
        if len(parts) == 3 and parts[2] == b"kB":
            found[parts[0].rstrip(b":").decode()] = int(parts[1]) * KiB
    return found


def _psutil(pid: int | None) -> Footprint:
    """macOS and Windows: one number is to be had, the resident set."""
    psutil = load_psutil()
    try:
        rss = psutil.Process(pid).memory_info().rss
    except psutil.NoSuchProcess:
        raise ProcessLookupError(f"process {pid} is gone") from None
    return Footprint(rss, rss, rss, 0, exact=False)


def reset_peak(pid: int | None = None) -> bool:
    """Start the kernel's own high-water mark (VmHWM) anew; False where that is not permitted."""
    try:
        Path(f"/proc/{pid or 'self'}/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def high_water_bytes(pid: int | None = None) -> int:
    """The kernel's own RSS peak since the start of the process or :func:`reset_peak`: misses
    nothing between two samples.
    """
    try:
        return _fields(Path(f"/proc/{pid or 'self'}/status").read_bytes()).get("VmHWM", 0)
    except OSError:
        return 0


def trim_heap() -> None:
    """Hand back what was freed but is kept by the C library for later. Does nothing where it has no
    such call (only glibc does).
    """
    if _libc is not None and hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def madvise(start: int, length: int, advice: int) -> None:
    """Advice only, and only Linux takes it: a kernel that will not leaves the pages where they are,
    and the measured figures show it.
    """
    assert _libc is not None
    _libc.madvise(start, length, advice)


def drop_cached(paths: Iterable[str | os.PathLike]) -> None:
    """Let the page cache forget these files, as far as nobody has them mapped: pages that would
    take the place of others which are read again sooner. Does nothing where the system has no such
    call, and for a file that is not there.
    """
    for path in paths:
        try:
            with open(path, "rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            continue


def major_faults(pid: int | None = None) -> int:
    """Page faults that had to read the disk, since the start of the process."""
    try:
        return int(Path(f"/proc/{pid or 'self'}/stat").read_bytes().rpartition(b") ")[2].split()[9])
    except OSError:
        return 0


@dataclass(frozen=True)
class Mapping:
    """One range of addresses ``[start, end)`` that shows a file from byte ``offset`` on."""

    start: int
    end: int
    offset: int


def let_mapping_go(path: str | os.PathLike) -> int:
    """Give back the pages of this process's mappings of a file; what is read again comes back from
    the page cache. Pages that were written to are left alone. Returns bytes of mappings; 0 where
    there are none, or where no page can be given back (only Linux can).
    """
    if _libc is None:
        return 0
    written = _written_mappings()
    n_bytes = 0
    for piece in mapping_of(path):
        if piece.start not in written:
            madvise(piece.start, piece.end - piece.start, MADV_DONTNEED)
            n_bytes += piece.end - piece.start
    return n_bytes


def _written_mappings() -> set[int]:
    """Addresses of this process's mappings with pages of their own."""
    found, start = set(), 0
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):  # a mapping: its addresses, then its fields
            start = int(first.partition("-")[0], 16)
        elif first == "Anonymous:" and rest.split()[0] != "0":
            found.add(start)
    return found


def mapping_of(path: str | os.PathLike, pid: int | None = None) -> list[Mapping]:
    """Where a process has the file mapped, by device and inode (a renamed or linked file is still
    found). Empty when nowhere.

    >>> mapping_of("/etc/hostname")
    []
    """
    try:
        found = os.stat(path)
        maps = Path(f"/proc/{pid or 'self'}/maps").read_text(errors="replace")
    except OSError:
        return []
    device, inode = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}", str(found.st_ino)
    named, by_inode = os.path.realpath(path), []
    for line in maps.splitlines():
        parts = line.split(maxsplit=5)
        # overlay file systems report another device in maps than in stat, so the name counts as
        # well
        if (
            len(parts) > 4
            and parts[4] == inode
            and (parts[3] == device or (len(parts) > 5 and parts[5] == named))
        ):
            start, end = (int(address, 16) for address in parts[0].split("-"))
            by_inode.append(Mapping(start, end, int(parts[2], 16)))
    return by_inode


def resident_bytes(
    path: str | os.PathLike, ranges: Iterable[tuple[int, int]], pid: int | None = None
) -> int:
    """How much of the byte ranges ``(offset, nbytes)`` of a mapped file the process holds in
    memory; whole pages.

    >>> resident_bytes("/etc/hostname", [(0, 10)])
    0
    """
    total = 0
    mappings = mapping_of(path, pid)
    if not mappings:
        return 0
    try:
        with open(f"/proc/{pid or 'self'}/pagemap", "rb", buffering=0) as pagemap:
            for mapping in mappings:
                for offset, nbytes in ranges:
                    first = max(mapping.start, mapping.start + offset - mapping.offset)
                    last = min(mapping.end, mapping.start + offset + nbytes - mapping.offset)
                    if first < last:
                        total += (
                            _present_pages(pagemap, first // PAGE_BYTES, -(-last // PAGE_BYTES))
                            * PAGE_BYTES
                        )
    except OSError:
        return 0
    return total


def _present_pages(pagemap, first: int, last: int) -> int:
    import numpy as np  # late: the counters above need nothing

    present = 0
    pagemap.seek(first * 8)
    left = (last - first) * 8
    while left and (data := pagemap.read(min(left, 1 << 20))):
        left -= len(data)
        present += int(np.count_nonzero(np.frombuffer(data, np.uint64) >= _PRESENT))
    return present
