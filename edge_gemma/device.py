"""What a machine has: a shipped profile, a profile file, or this machine probed.

In: a name (``auto``, ``pi-5-4gb``, ``my-board.toml``). Out: a frozen :class:`Device`. This room reads ``/proc``, ``/sys`` and
TOML tables; it does not know models, bundles or llama.cpp (whether llama.cpp was built for a GPU is for ``decode`` to say).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path, PurePosixPath

import msgspec

from .errors import UsageError
from .units import MiB, format_bytes, parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# /proc/cpuinfo's words → the words of repack.toml (ggml_cpu_has_*)
_FEATURES = {
    "avx2": "avx2", "avx512f": "avx512", "avx512_vnni": "avx512_vnni", "amx_int8": "amx_int8", "f16c": "f16c", "fma": "fma",
    "asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "asimdhp": "fp16", "sve": "sve", "bf16": "bf16",
}  # fmt: skip
# "CPU part" of Arm's own designs (implementer 0x41), Arm's main ID register
_ARM_PARTS = {
    0xD03: "Cortex-A53", 0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72", 0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD41: "Cortex-A78", 0xD42: "Cortex-A78AE",
    0xD40: "Neoverse-V1", 0xD44: "Cortex-X1", 0xD49: "Neoverse-N2", 0xD4B: "Cortex-A78C", 0xD4F: "Neoverse-V2",
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A machine as the plan sees it. Bytes are bytes; zram and swap are listed and never counted as memory.

    >>> pi = load_profile("pi-5-4gb")
    >>> pi.page_bytes, pi.n_threads, pi.usable_bytes < pi.available_bytes < pi.total_bytes
    (16384, 4, True)
    """

    name: str
    board: str
    total_bytes: int  # MemTotal: what the kernel hands out, not what is soldered on
    available_bytes: int  # MemAvailable: free, or reclaimable without swapping
    limit_bytes: int | None = None  # the smallest memory limit of our cgroup and its ancestors
    headroom_bytes: int | None = None  # what those limits leave: limit minus what cannot be reclaimed there
    page_bytes: int = 4096
    cpus: tuple[int, ...] = (0,)  # the ids we may run on
    big_cpus: tuple[int, ...] = ()  # those of them that are the fast ones; all, where all are alike
    n_threads: int = 1  # fast physical cores, bounded by the CPU quota
    cpu: str = ""
    cpu_features: tuple[str, ...] = ()  # avx2 avx512 … / neon dotprod i8mm …
    gpu: str | None = None  # the GPU the machine has; llama.cpp must be built for it
    can_release: bool = True  # Linux: cold file pages can be given back (madvise)
    zram_bytes: int = 0  # compressed swap lives in memory, so it adds none
    swap_bytes: int = 0  # on disk
    memory_cgroup: bool = True  # a memory limit can be set here

    @property
    def reserve_bytes(self) -> int:
        """Left to the rest of the system: 1/32 of memory, at least 16 MiB (a Zero 2 W), at most 512 MiB."""
        return min(max(self.total_bytes // 32, 16 * MiB), 512 * MiB)

    @property
    def usable_bytes(self) -> int:
        """What a plan may spend: available memory after the reserve, or what the cgroup leaves; the smaller wins.

        A cgroup's limit is ours alone, so nothing is held back from it.
        """
        free = max(0, self.available_bytes - self.reserve_bytes)
        return free if self.headroom_bytes is None else max(0, min(free, self.headroom_bytes))


# ---- profiles

_PROFILES = "edge_gemma.device_profiles"


class _Profile(msgspec.Struct, forbid_unknown_fields=True):
    """One file of device_profiles/. Sizes are text with units."""

    board: str
    cpu: str
    total: str
    available: str
    page: str
    cpus: int
    features: tuple[str, ...]
    memory_cgroup: bool
    big_cpus: tuple[int, ...] = ()
    gpu: str | None = None
    zram: str = "0"
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def profile_names() -> list[str]:
    """The shipped profiles, smallest board first."""
    names = [p.name.removesuffix(".toml") for p in resources.files(_PROFILES).iterdir() if p.name.endswith(".toml") and p.name != "repack.toml"]
    return sorted(names, key=lambda name: (load_profile(name).total_bytes, name))


def profile_notes(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(notes, sources) of a profile: what to know about the board, and where its figures come from."""
    profile = _read_profile(name)
    return profile.notes, profile.sources


def load_profile(name: str) -> Device:
    """The profile ``name`` (``pi-5-4gb``) or a profile file (``my-board.toml``). Raises UsageError.

    >>> load_profile("pi-zero-2w-512mb").cpu_features
    ('neon',)
    """
    profile = _read_profile(name)
    if not 0 < profile.cpus <= 1024:
        raise UsageError(f"profile {name}: cpus is {profile.cpus}, expected 1 … 1024")
    cpus = tuple(range(profile.cpus))
    if not set(profile.big_cpus) <= set(cpus):
        raise UsageError(f"profile {name}: big_cpus {list(profile.big_cpus)} are not among the cpus 0 … {profile.cpus - 1}")
    big = profile.big_cpus or cpus
    total, available, page = (parse_bytes(text) for text in (profile.total, profile.available, profile.page))
    if not 0 < available <= total:
        raise UsageError(f"profile {name}: available is {profile.available} of a total of {profile.total}; expected 0 < available ≤ total")
    if page < 4096 or page & (page - 1):
        raise UsageError(f"profile {name}: page is {profile.page}; expected a power of two of at least 4 KiB")
    return Device(
        name=Path(name).stem if name.endswith(".toml") else name, board=profile.board, total_bytes=total, available_bytes=available,
        page_bytes=page, cpus=cpus, big_cpus=big, n_threads=len(big), cpu=profile.cpu, cpu_features=profile.features, gpu=profile.gpu,
        zram_bytes=parse_bytes(profile.zram), memory_cgroup=profile.memory_cgroup,
    )  # fmt: skip


def _read_profile(name: str) -> _Profile:
    source = Path(name) if name.endswith(".toml") else resources.files(_PROFILES) / f"{name}.toml"
    if name == "repack" or not (name.endswith(".toml") or re.fullmatch(r"[\w.-]+", name)) or not source.is_file():
        raise UsageError(f"no device profile {name!r}; there are: auto, {', '.join(profile_names())}; or give a file like my-board.toml")
    try:
        return msgspec.convert(tomllib.loads(source.read_text(encoding="utf-8")), _Profile, strict=True)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise UsageError(f"profile {name} cannot be read: {error}") from None


def find_device(name: str = "auto") -> Device:
    """``auto`` probes this machine; any other name is a profile. Raises UsageError.

    >>> find_device("laptop-8gb").board
    'x86-64 laptop'
    """
    return probe() if name == "auto" else load_profile(name)


# ---- which weights llama.cpp copies


@cache
def repack_rules() -> dict[str, tuple[tuple[frozenset[str], int], ...]]:
    """type → ((CPU features, rows must be a multiple of), …), from repack.toml."""
    table = tomllib.loads((resources.files(_PROFILES) / "repack.toml").read_text(encoding="utf-8"))
    rules: dict[str, list] = {}
    for rule in table["rules"]:
        rules.setdefault(rule["type"], []).append((frozenset(rule["features"]), rule["rows"]))
    return {type: tuple(found) for type, found in rules.items()}


def repacked(type: str, shape: Iterable[int], cpu_features: Iterable[str]) -> bool:
    """Whether llama.cpp copies a matmul weight of ``type`` and ``shape`` (ggml order: row length first) into a repacked buffer.

    Source: device_profiles/repack.toml. A weight that is only looked up, never multiplied, is not copied: ask for matmuls.

    >>> repacked("Q4_0", (2048, 16384), ("avx2",)), repacked("Q8_0", (2048, 16384), ("avx2",))
    (True, False)
    >>> repacked("Q8_0", (2048, 16384), ("neon", "dotprod"))
    True
    """
    dims = list(shape)
    while len(dims) > 1 and dims[-1] == 1:  # ggml_n_dims
        dims.pop()
    features = frozenset(cpu_features)
    return len(dims) == 2 and any(needs <= features and dims[1] % rows == 0 for needs, rows in repack_rules().get(type, ()))


# ---- this machine


def probe(root: str | Path = "/", affinity: Iterable[int] | None = None, page_bytes: int | None = None) -> Device:
    """Read this machine. ``root`` stands in for ``/`` of ``/proc`` and ``/sys``; ``affinity`` for the CPUs we may run on.

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
        name="auto", board=_board(root), total_bytes=total, available_bytes=available, limit_bytes=limit, headroom_bytes=headroom,
        page_bytes=page_bytes or _page_bytes(), cpus=cpus, big_cpus=big, n_threads=_threads(root, cpus, big), cpu=model,
        cpu_features=features, gpu=_gpu(root), can_release=sys.platform == "linux", zram_bytes=zram, swap_bytes=swap,
        memory_cgroup=_memory_cgroup(root),
    )  # fmt: skip


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
    import psutil  # macOS has no affinity, Windows its own

    process = psutil.Process()
    return tuple(process.cpu_affinity() if hasattr(process, "cpu_affinity") else range(psutil.cpu_count() or 1))


def _page_bytes() -> int:
    import mmap

    return mmap.PAGESIZE


def _memory(root: Path) -> tuple[int, int]:
    """(total, available) bytes, swap and zram not among them."""
    info = _fields(read_text(root / "proc/meminfo"))
    if "MemTotal" not in info:
        import psutil

        memory = psutil.virtual_memory()
        return memory.total, memory.available
    old_kernel = info.get("MemFree", 0) + info.get("Cached", 0) + info.get("Buffers", 0) - info.get("Shmem", 0)
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
    """(1 or 2, folders): the folder of our cgroup for ``controller`` and its ancestors up to the mount, innermost first.

    A container sees a part of the tree: the mount's own root (mountinfo's fourth field) is taken off the path first.
    """
    paths = {}
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, names, path = (line.split(":", 2) + ["", ""])[:3]
        for name in names.split(",") if names else [""]:
            paths[name] = path
    unified = None
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup" and controller in kind[2].split(",") and controller in paths:
            return 1, list(_ancestors(root, fields[4], fields[3], paths[controller]))
        if kind[0] == "cgroup2" and "" in paths:
            unified = list(_ancestors(root, fields[4], fields[3], paths[""]))
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

    Headroom counts file pages as reclaimable. ``memory.high`` is a limit too: above it the kernel stalls us.
    """
    version, folders = _cgroup_folders(root, "memory")
    limits, headrooms = [], []
    for folder in folders:
        stat = _fields(read_text(folder / "memory.stat"))
        if version == 2:
            found = [_number(folder, "memory.max"), _number(folder, "memory.high")]
            used, cached = _number(folder, "memory.current"), ("active_file", "inactive_file", "slab_reclaimable")
        else:
            found = [_number(folder, "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
            used, cached = _number(folder, "memory.usage_in_bytes"), ("total_active_file", "total_inactive_file")
        found = [n for n in found if n is not None and n < 1 << 60]  # version 1 writes "no limit" as a number near 2**63
        if found:
            limits.append(min(found))
            headrooms.append(min(found) - max(0, (used or 0) - sum(stat.get(name, 0) for name in cached)))
    return (min(limits), max(0, min(headrooms))) if limits else (None, None)


def _memory_cgroup(root: Path) -> bool:
    """Whether the kernel has the memory controller on (Raspberry Pi OS starts with ``cgroup_disable=memory``)."""
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
        words = read_text(folder / "cpu.max").split() if version == 2 else [read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")]
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))  # "max" and -1 mean none
    return min(quotas, default=None)


def _big_cpus(root: Path, cpus: tuple[int, ...]) -> tuple[int, ...]:
    """The fast ones: Arm's ``cpu_capacity`` within 80 % of the largest; Intel hybrids name their performance cores."""
    performance = _id_list(read_text(root / "sys/devices/cpu_core/cpus")) & set(cpus)
    if performance:
        return tuple(sorted(performance))
    capacity = {cpu: _number(root / f"sys/devices/system/cpu/cpu{cpu}", "cpu_capacity") for cpu in cpus}
    if any(value is None for value in capacity.values()):
        return cpus
    return tuple(cpu for cpu in cpus if capacity[cpu] >= 0.8 * max(capacity.values()))


def _threads(root: Path, cpus: tuple[int, ...], big: tuple[int, ...]) -> int:
    """One thread per fast physical core; a quota below that bounds it, since a throttled thread holds up all others."""
    cores = set()
    for cpu in big:
        siblings = _id_list(read_text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
        cores.add(frozenset(siblings) if cpu in siblings else frozenset([cpu]))
    quota = _cpu_quota(root)
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def _cpu(root: Path) -> tuple[str, tuple[str, ...]]:
    """(model, features). Features are those every core has."""
    text = read_text(root / "proc/cpuinfo")
    words = [set(line.split(":", 1)[1].split()) for line in text.splitlines() if re.match(r"(flags|Features)\s*:", line)]
    shared = set.intersection(*words) if words else set()
    features = tuple(dict.fromkeys(name for word, name in _FEATURES.items() if word in shared))
    if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
        return match[1].strip(), features
    parts = [int(part, 16) for part in re.findall(r"^CPU part\s*:\s*(0x[0-9a-fA-F]+)", text, re.MULTILINE)]
    names = [f"{parts.count(part)} × {_ARM_PARTS.get(part, hex(part))}" for part in dict.fromkeys(parts)]
    return ", ".join(names), features or _assumed_features(text)


def _assumed_features(cpuinfo: str) -> tuple[str, ...]:
    """Without /proc/cpuinfo (macOS, Windows): the set that plans the most repacked copies, so that a plan errs upwards."""
    import platform

    if cpuinfo:
        return ()
    return ("neon", "dotprod", "i8mm") if platform.machine().lower() in ("arm64", "aarch64") else ("avx2",)


def _board(root: Path) -> str:
    for path in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        if model := read_text(root / path):
            return model
    vendor, product = (read_text(root / f"sys/class/dmi/id/{name}") for name in ("sys_vendor", "product_name"))
    if product:
        return product if product.startswith(vendor) else f"{vendor} {product}"
    import platform

    return f"{platform.machine()} machine"


def _gpu(root: Path) -> str | None:
    """An NVIDIA GPU with its driver: the one kind that llama.cpp's own wheels and our profiles speak of."""
    if "Jetson" in read_text(root / "proc/device-tree/model") and (root / "dev/nvhost-gpu").exists():
        return "NVIDIA Jetson GPU (shares the memory)"
    for folder in sorted((root / "proc/driver/nvidia/gpus").glob("*")):
        if match := re.search(r"^Model:\s*(.+)$", read_text(folder / "information"), re.MULTILINE):
            return match[1].strip()
    return None


def describe(device: Device) -> str:
    """One line for people.

    >>> describe(load_profile("pi-5-4gb"))
    'pi-5-4gb: Raspberry Pi 5 Model B, 3.44 GiB usable of 3.89 GiB, 4 threads, neon dotprod'
    """
    features = " ".join(device.cpu_features) or "no special CPU features"
    cap = f" (limit {format_bytes(device.limit_bytes)})" if device.limit_bytes is not None else ""
    memory = f"{format_bytes(device.usable_bytes)} usable of {format_bytes(device.total_bytes)}{cap}"
    return f"{device.name}: {device.board}, {memory}, {device.n_threads} thread{'s' * (device.n_threads > 1)}, {features}"
