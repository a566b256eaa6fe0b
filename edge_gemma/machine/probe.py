"""What a machine has: a shipped profile, a profile file, or this machine probed.

In: a name (``auto``, ``pi-5-4gb``, ``my-board.toml``). Out: a frozen :class:`Device`. This module
reads ``/proc`` and ``/sys``; it does not know models, bundles or llama.cpp (whether llama.cpp was
built for a GPU is for ``engines.llama.library`` to say).
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from edge_gemma.machine.device import Device, load_profile
from edge_gemma.machine.footprint import RUNTIME_ANON_BYTES, footprint, load_psutil

# /proc/cpuinfo's words → the words of repack.toml (ggml_cpu_has_*)
_FEATURES = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "amx_int8": "amx_int8",
    "f16c": "f16c",
    "fma": "fma",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "asimdhp": "fp16",
    "sve": "sve",
    "bf16": "bf16",
}
# "CPU part" of Arm's own designs (implementer 0x41), Arm's main ID register
_ARM_PARTS = {
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD0D: "Cortex-A77",
    0xD41: "Cortex-A78",
    0xD42: "Cortex-A78AE",
    0xD40: "Neoverse-V1",
    0xD44: "Cortex-X1",
    0xD49: "Neoverse-N2",
    0xD4B: "Cortex-A78C",
    0xD4F: "Neoverse-V2",
}


def find_device(name: str = "auto") -> Device:
    """The machine to plan for: ``auto`` is :func:`this_machine`, any other name a profile. Raises
    UsageError.

    >>> find_device("laptop-8gb").board
    'x86-64 laptop'
    """
    return this_machine() if name == "auto" else load_profile(name)


def machine_for(device: str | Device) -> Device:
    """The machine to plan for when the run is on this one: a profile's memory, bounded by what this
    machine has. Raises UsageError.

    >>> machine_for("pi-5-4gb").usable_bytes <= this_machine().usable_bytes + (1 << 20)
    True
    """
    host = this_machine()
    if device == "auto":
        return host
    found = load_profile(device) if isinstance(device, str) else device
    return replace(
        found,
        available_bytes=min(found.available_bytes, host.usable_bytes + found.reserve_bytes),
        can_release=host.can_release,
        page_bytes=host.page_bytes,
        n_threads=min(found.n_threads, host.n_threads),
    )


def this_machine() -> Device:
    """This machine as a plan sees it, the one view of it for ``plan``, ``load`` and ``doctor``.

    Python and the libraries are loaded already and hold memory. A plan counts them, so what they
    hold is added to what the kernel calls free; else it would be charged twice.
    """
    host = probe()
    spent = min(footprint(exact=False).anon_bytes, RUNTIME_ANON_BYTES)
    headroom = None if host.headroom_bytes is None else host.headroom_bytes + spent
    return replace(
        host,
        available_bytes=min(host.available_bytes + spent, host.total_bytes),
        headroom_bytes=headroom,
    )


def probe(
    root: str | Path = "/", affinity: Iterable[int] | None = None, page_bytes: int | None = None
) -> Device:
    """Read this machine as it is at this moment; :func:`this_machine` is what to plan with.

    ``root`` stands in for ``/`` of ``/proc`` and ``/sys``; ``affinity`` for the CPUs we may run on.

    >>> here = probe()
    >>> here.name, 0 < here.usable_bytes <= here.total_bytes
    ('auto', True)
    """
    root = Path(root)
    cpus = tuple(sorted(affinity)) if affinity is not None else _allowed_cpus()
    total, available = _memory(root)
    limit, headroom = _memory_limit(root)
    if limit is not None and limit >= total:
        limit = headroom = None
    big = _big_cpus(root, cpus)
    zram, swap = _swaps(root)
    model, features = _cpu(root)
    return Device(
        name="auto",
        board=_board(root),
        total_bytes=total,
        available_bytes=available,
        limit_bytes=limit,
        headroom_bytes=headroom,
        page_bytes=page_bytes or _page_bytes(),
        cpus=cpus,
        big_cpus=big,
        n_threads=_threads(root, cpus, big),
        cpu=model,
        cpu_features=features,
        gpu=_gpu(root),
        can_release=sys.platform == "linux",
        zram_bytes=zram,
        swap_bytes=swap,
        memory_cgroup=_memory_cgroup(root),
    )


def read_text(path: Path) -> str:
    """A small kernel file, or "" when it is absent, unreadable or vanished meanwhile."""
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace").strip("\0\n ")
    except OSError:
        return ""


def _fields(text: str) -> dict[str, int]:
    """``name[:] number …`` lines (meminfo, memory.stat)."""
    found = {}
    for line in text.splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdecimal():
            found[words[0]] = int(words[1])
    return found


def _id_list(text: str) -> set[int]:
    """``0-3,6`` → {0, 1, 2, 3, 6}."""
    ids: set[int] = set()
    for first, last in re.findall(r"\b([0-9]{1,5})(?:-([0-9]{1,5}))?\b", text):
        ids.update(range(int(first), int(last or first) + 1))
    return ids


def _allowed_cpus() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    psutil = load_psutil()  # macOS has no affinity, Windows its own
    process = psutil.Process()
    return tuple(
        process.cpu_affinity()
        if hasattr(process, "cpu_affinity")
        else range(psutil.cpu_count() or 1)
    )


def _page_bytes() -> int:
    import mmap

    return mmap.PAGESIZE


def _memory(root: Path) -> tuple[int, int]:
    """(total, available) bytes, swap and zram not among them."""
    info = _fields(read_text(root / "proc/meminfo"))
    if "MemTotal" not in info:
        memory = load_psutil().virtual_memory()
        return memory.total, memory.available
    old_kernel = (
        info.get("MemFree", 0)
        + info.get("Cached", 0)
        + info.get("Buffers", 0)
        - info.get("Shmem", 0)
    )
    return info["MemTotal"] * 1024, max(0, info.get("MemAvailable", old_kernel)) * 1024


def _swaps(root: Path) -> tuple[int, int]:
    """(zram, disk) bytes of swap in use as such."""
    sizes = [0, 0]
    for line in read_text(root / "proc/swaps").splitlines()[1:]:
        words = line.split()
        if len(words) >= 3 and words[2].isdecimal():
            sizes["zram" not in words[0]] += int(words[2]) * 1024
    return sizes[0], sizes[1]


def _cgroup_folders(root: Path, controller: str) -> tuple[int, list[Path]]:
    """(1 or 2, folders): the folder of our cgroup for ``controller`` and its ancestors up to the
    mount, innermost first.

    A container sees a part of the tree: the mount's own root (mountinfo's fourth field) is taken
    off the path first.
    """
    paths: dict[str, str] = {}
    for line in read_text(root / "proc/self/cgroup").splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            paths |= dict.fromkeys(fields[1].split(","), fields[2])  # version 2 names none
    unified = None
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        mount, kind = left.split(), right.split()
        if len(mount) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup" and controller in kind[2].split(",") and controller in paths:
            return 1, list(_ancestors(root, mount[4], mount[3], paths[controller]))
        if kind[0] == "cgroup2" and "" in paths:
            unified = list(_ancestors(root, mount[4], mount[3], paths[""]))
    return 2, unified or []


def _ancestors(root: Path, mount: str, mounted: str, path: str) -> Iterator[Path]:
    try:
        inside = PurePosixPath(path).relative_to(mounted)
    except ValueError:
        inside = PurePosixPath()  # another namespace's path: the mount itself is all we see
    if ".." in inside.parts:
        inside = PurePosixPath()
    base = root / mount.lstrip("/")
    while inside.parts:
        if (folder := base / inside).is_dir():
            yield folder
        inside = inside.parent
    yield base


def _number(folder: Path, name: str) -> int | None:
    text = read_text(folder / name)
    return int(text) if text.isdecimal() else None


def _memory_limit(root: Path) -> tuple[int | None, int | None]:
    """(limit, headroom) bytes over our cgroup and all its ancestors, or (None, None).

    Headroom counts file pages as reclaimable. ``memory.high`` is a limit too: above it the kernel
    stalls us.
    """
    version, folders = _cgroup_folders(root, "memory")
    limits: list[int] = []
    headrooms: list[int] = []
    reclaimable: tuple[str, ...]
    for folder in folders:
        stat = _fields(read_text(folder / "memory.stat"))
        if version == 2:
            written = [_number(folder, name) for name in ("memory.max", "memory.high")]
            used = _number(folder, "memory.current")
            reclaimable = ("active_file", "inactive_file", "slab_reclaimable")
        else:
            written = [
                _number(folder, "memory.limit_in_bytes"),
                stat.get("hierarchical_memory_limit"),
            ]
            used = _number(folder, "memory.usage_in_bytes")
            reclaimable = ("total_active_file", "total_inactive_file")
        # version 1 writes "no limit" as a number near 2**63
        found = [n for n in written if n is not None and n < 1 << 60]
        if found:
            cached = sum(stat.get(name, 0) for name in reclaimable)
            limits.append(min(found))
            headrooms.append(min(found) - max(0, (used or 0) - cached))
    return (min(limits), max(0, min(headrooms))) if limits else (None, None)


def _memory_cgroup(root: Path) -> bool:
    """Whether the kernel has the memory controller on (Raspberry Pi OS starts with
    ``cgroup_disable=memory``).
    """
    for line in read_text(root / "proc/cgroups").splitlines():
        words = line.split()
        if words[:1] == ["memory"]:
            return words[-1] == "1"
    _, folders = _cgroup_folders(root, "memory")
    return any("memory" in read_text(folder / "cgroup.controllers").split() for folder in folders)


def _cpu_quota(root: Path) -> float | None:
    """The smallest CPU quota of our cgroup and its ancestors, in CPUs."""
    version, folders = _cgroup_folders(root, "cpu")
    quotas = []
    for folder in folders:
        words = (
            read_text(folder / "cpu.max").split()
            if version == 2
            else [read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")]
        )
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))  # "max" and -1 mean none
    return min(quotas, default=None)


def _big_cpus(root: Path, cpus: tuple[int, ...]) -> tuple[int, ...]:
    """The fast ones: Arm's ``cpu_capacity`` within 80 % of the largest; Intel hybrids name their
    performance cores.
    """
    performance = _id_list(read_text(root / "sys/devices/cpu_core/cpus")) & set(cpus)
    if performance:
        return tuple(sorted(performance))
    capacity: dict[int, int] = {}
    for cpu in cpus:
        value = _number(root / f"sys/devices/system/cpu/cpu{cpu}", "cpu_capacity")
        if value is None:
            return cpus
        capacity[cpu] = value
    fastest = max(capacity.values(), default=0)
    return tuple(cpu for cpu in cpus if capacity[cpu] >= 0.8 * fastest)


def _threads(root: Path, cpus: tuple[int, ...], big: tuple[int, ...]) -> int:
    """One thread per fast physical core; a quota below that bounds it, since a throttled thread
    holds up all others.
    """
    cores = set()
    for cpu in big:
        siblings = _id_list(
            read_text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        )
        cores.add(frozenset(siblings) if cpu in siblings else frozenset([cpu]))
    quota = _cpu_quota(root)
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def _cpu(root: Path) -> tuple[str, tuple[str, ...]]:
    """(model, features). Features are those every core has."""
    text = read_text(root / "proc/cpuinfo")
    words = [
        set(line.split(":", 1)[1].split())
        for line in text.splitlines()
        if re.match(r"(flags|Features)\s*:", line)
    ]
    shared = set.intersection(*words) if words else set()
    features = tuple(dict.fromkeys(name for word, name in _FEATURES.items() if word in shared))
    if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
        return match[1].strip(), features
    parts = [
        int(part, 16)
        for part in re.findall(r"^CPU part\s*:\s*(0x[0-9a-fA-F]+)", text, re.MULTILINE)
    ]
    names = [
        f"{parts.count(part)} × {_ARM_PARTS.get(part, hex(part))}" for part in dict.fromkeys(parts)
    ]
    return ", ".join(names), features or _assumed_features(text)


@functools.cache
def cpu_kind() -> str:
    """A text that differs wherever libraries may choose other kernels: architecture, model, every
    feature the kernel lists.
    """
    import platform

    text = read_text(Path("/proc/cpuinfo"))
    names = r"^(?:model name|flags|Features|CPU (?:implementer|architecture|variant|part))\s*:.*$"
    lines = sorted(set(re.findall(names, text, re.MULTILINE)))
    return "\n".join((platform.machine(), *(lines or [platform.processor()])))


def _assumed_features(cpuinfo: str) -> tuple[str, ...]:
    """Without /proc/cpuinfo (macOS, Windows): the set that plans the most repacked copies, so that
    a plan errs upwards.
    """
    import platform

    if cpuinfo:
        return ()
    return (
        ("neon", "dotprod", "i8mm")
        if platform.machine().lower() in ("arm64", "aarch64")
        else ("avx2",)
    )


def _board(root: Path) -> str:
    for path in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        if model := read_text(root / path):
            return model
    vendor, product = (
        read_text(root / f"sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name")
    )
    if product:
        return product if product.startswith(vendor) else f"{vendor} {product}"
    import platform

    return f"{platform.machine()} machine"


def _gpu(root: Path) -> str | None:
    """An NVIDIA GPU with its driver: the one kind that llama.cpp's own wheels and our profiles
    speak of.
    """
    if (
        "Jetson" in read_text(root / "proc/device-tree/model")
        and (root / "dev/nvhost-gpu").exists()
    ):
        return "NVIDIA Jetson GPU (shares the memory)"
    for folder in sorted((root / "proc/driver/nvidia/gpus").glob("*")):
        if match := re.search(r"^Model:\s*(.+)$", read_text(folder / "information"), re.MULTILINE):
            return match[1].strip()
    return None
