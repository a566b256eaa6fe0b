"""What a machine has, as the plan sees it: a shipped profile, a profile file, or (see probe) this
machine.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import msgspec

from edge_gemma.errors import UsageError
from edge_gemma.units import MiB, format_bytes, parse_bytes


@dataclass(frozen=True)
class Device:
    """A machine as the plan sees it.

    Bytes are bytes; zram and swap are listed and never counted as memory.

    >>> pi = load_profile("pi-5-4gb")
    >>> pi.page_bytes, pi.n_threads, pi.usable_bytes < pi.available_bytes < pi.total_bytes
    (16384, 4, True)
    """

    name: str
    board: str
    total_bytes: int  # MemTotal: what the kernel hands out, not what is soldered on
    available_bytes: int  # MemAvailable: free, or reclaimable without swapping
    limit_bytes: int | None = None  # the smallest memory limit of our cgroup and its ancestors
    headroom_bytes: int | None = (
        None  # what those limits leave: limit minus what cannot be reclaimed there
    )
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
    decode_gb_s: float | None = None  # at which a decoder was seen to read its weights (10⁹ bytes)
    read_mb_s: float | None = None  # at which its disk (a memory card) reads a file (10⁶ bytes)

    @property
    def reserve_bytes(self) -> int:
        """Left to the rest of the system: 1/32 of memory, at least 16 MiB (a Zero 2 W), at most 512
        MiB.
        """
        return min(max(self.total_bytes // 32, 16 * MiB), 512 * MiB)

    @property
    def usable_bytes(self) -> int:
        """What a plan may spend: available memory after the reserve, or what the cgroup leaves; the
        smaller wins.

        A cgroup's limit is ours alone, so nothing is held back from it.
        """
        free = max(0, self.available_bytes - self.reserve_bytes)
        return free if self.headroom_bytes is None else max(0, min(free, self.headroom_bytes))


PROFILES = "edge_gemma.device_profiles"


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
    decode_gb_s: float | None = None
    read_mb_s: float | None = None
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


def profile_names() -> list[str]:
    """The shipped profiles, smallest board first."""
    names = [
        p.name.removesuffix(".toml")
        for p in resources.files(PROFILES).iterdir()
        if p.name.endswith(".toml") and p.name != "repack.toml"
    ]
    return sorted(names, key=lambda name: (load_profile(name).total_bytes, name))


def profile_notes(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(notes, sources) of a profile: what to know about the board, and who says so."""
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
        raise UsageError(
            f"profile {name}: big_cpus {list(profile.big_cpus)} are not among the cpus 0 … "
            f"{profile.cpus - 1}"
        )
    big = profile.big_cpus or cpus
    total, available, page = (
        parse_bytes(text) for text in (profile.total, profile.available, profile.page)
    )
    if not 0 < available <= total:
        raise UsageError(
            f"profile {name}: available is {profile.available} of a total of "
            f"{profile.total}; expected 0 < available ≤ total"
        )
    if page < 4096 or page & (page - 1):
        raise UsageError(
            f"profile {name}: page is {profile.page}; expected a power of two of at least 4 KiB"
        )
    return Device(
        name=Path(name).stem if name.endswith(".toml") else name,
        board=profile.board,
        total_bytes=total,
        available_bytes=available,
        page_bytes=page,
        cpus=cpus,
        big_cpus=big,
        n_threads=len(big),
        cpu=profile.cpu,
        cpu_features=profile.features,
        gpu=profile.gpu,
        zram_bytes=parse_bytes(profile.zram),
        memory_cgroup=profile.memory_cgroup,
        decode_gb_s=profile.decode_gb_s,
        read_mb_s=profile.read_mb_s,
    )


def _read_profile(name: str) -> _Profile:
    source = Path(name) if name.endswith(".toml") else resources.files(PROFILES) / f"{name}.toml"
    if (
        name == "repack"
        or not (name.endswith(".toml") or re.fullmatch(r"[\w.-]+", name))
        or not source.is_file()
    ):
        raise UsageError(
            f"no device profile {name!r}; there are: auto, {', '.join(profile_names())}; or "
            "give a file like my-board.toml"
        )
    try:
        return msgspec.convert(
            tomllib.loads(source.read_text(encoding="utf-8")), _Profile, strict=True
        )
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise UsageError(f"profile {name} cannot be read: {error}") from None


def describe(device: Device) -> str:
    """One line for people.

    >>> describe(load_profile("pi-5-4gb"))
    'pi-5-4gb: Raspberry Pi 5 Model B, 3.44 GiB usable of 3.89 GiB, 4 threads, neon dotprod'
    """
    features = " ".join(device.cpu_features) or "no special CPU features"
    cap = f" (limit {format_bytes(device.limit_bytes)})" if device.limit_bytes is not None else ""
    memory = (
        f"{format_bytes(device.usable_bytes)} usable of {format_bytes(device.total_bytes)}{cap}"
    )
    return (
        f"{device.name}: {device.board}, {memory}, {device.n_threads} "
        f"thread{'s' * (device.n_threads > 1)}, {features}"
    )
