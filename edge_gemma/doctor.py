"""What this machine is, what is installed on it, and what would make it serve better: facts, then
advice in plain words.

In: nothing (or a root that stands in for ``/``). Out: a :class:`Report`. This module changes
nothing; it reads, asks llama.cpp what it was built with, and looks packages up without importing
them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.requirements import Requirement

from edge_gemma.bundles.gguf import TYPE_IDS
from edge_gemma.errors import EdgeGemmaError
from edge_gemma.hearing.sound_server import SoundServer, sound_server
from edge_gemma.machine.device import Device
from edge_gemma.machine.probe import probe, read_text, this_machine
from edge_gemma.machine.repack import repack_rules, repacked
from edge_gemma.store.installed import home
from edge_gemma.units import GiB, MiB, format_bytes

# extra → what it is for; which packages it needs is in the installed package's own metadata
PURPOSES = {
    "hear": "audio input",
    "see": "images",
    "video": "video files",
    "camera": "USB cameras",
    "voice": "spoken answers, wake words, an assistant that does not hear itself",
    "kokoro": "Kokoro voices",
    "convert": "converting checkpoints",
    "trim": "word lists, to cut a vocabulary to languages",
    "onnx": "the second engine (--engine onnx)",
    "serve": "serving other programs",
    "bench": "benchmarks",
    "plots": "benchmark pictures",
    "sample": "the demo's model",
}
# extra → shared library → its Debian package; no package metadata knows these
LIBRARIES = {"hear": {"portaudio": "libportaudio2"}}
_PROBE_SHAPE = (2048, 8192)  # a row of 8 K-quant blocks, rows a multiple of every rule's
CUDA_LINE = (
    "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-cache-dir --no-binary "
    "llama-cpp-python llama-cpp-python"
)
NATIVE_LINE = (
    "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
)


@dataclass(frozen=True)
class Llama:
    """The installed llama.cpp. ``repacks`` are the weight types it copies on this machine, asked of
    its own loader.
    """

    version: str
    gpu: bool
    repacks: tuple[str, ...]


@dataclass(frozen=True)
class Extra:
    name: str
    purpose: str
    missing_packages: tuple[str, ...]
    missing_libraries: tuple[str, ...]  # Debian package names


@dataclass(frozen=True)
class Report:
    device: Device
    system: str
    python: str
    governor: str  # of the CPU frequency; "" where there is none
    power: tuple[str, ...]  # what a Raspberry Pi's firmware complains of
    microphones: tuple[str, ...]
    sound_server: SoundServer | None
    llama: Llama | None
    llama_problem: str
    extras: tuple[Extra, ...]
    store: Path
    store_free_bytes: int
    store_on_sd: bool
    may_lock_memory: bool
    advice: tuple[str, ...]


def examine(
    root: str | Path = "/",
    *,
    device: Device | None = None,
    llama: Callable[[], Llama] | None = None,
    have: Callable[[str], bool] | None = None,
) -> Report:
    """Look at everything once.

    ``root`` stands in for ``/`` of /proc and /sys, ``llama`` and ``have`` for what is installed.

    >>> report = examine()
    >>> report.device.name
    'auto'
    """
    root = Path(root)
    if device is None:
        device = this_machine() if root == Path("/") else probe(root)
    problem, found = "", None
    try:
        found = (llama or ask_llama)()
    except EdgeGemmaError as error:
        problem = str(error)
    store = home()
    on_disk = _existing(store)
    report = Report(
        device=device,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        governor=read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        power=_power(root),
        microphones=_microphones(root),
        sound_server=sound_server() if root == Path("/") else None,
        llama=found,
        llama_problem=problem,
        extras=_extras(have or _have),
        store=store,
        store_free_bytes=shutil.disk_usage(on_disk).free,
        store_on_sd=_on_sd(root, on_disk),
        may_lock_memory=_may_lock(root),
        advice=(),
    )
    return replace(report, advice=tuple(_advice(root, report)))


def ask_llama() -> Llama:
    """Version, GPU support and repacked types of the installed llama.cpp. Raises EdgeGemmaError
    when it cannot be loaded.
    """
    from edge_gemma.engines.llama import library as llama

    gpu = llama.supports_gpu()
    return Llama(
        importlib.metadata.version("llama-cpp-python"),
        gpu,
        tuple(
            name
            for name in repack_rules()
            if name in TYPE_IDS and llama.repacks(TYPE_IDS[name], *_PROBE_SHAPE)
        ),
    )


def expected_repacks(device: Device) -> tuple[str, ...]:
    """The weight types llama.cpp copies on such a CPU when it was built for it."""
    return tuple(
        name for name in repack_rules() if repacked(name, _PROBE_SHAPE, device.cpu_features)
    )


def _have(name: str) -> bool:
    """Whether a distribution, or a shared library written ``lib:NAME``, is installed."""
    if name.startswith("lib:"):
        from ctypes.util import find_library

        return find_library(name.removeprefix("lib:")) is not None
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def required_packages(extra: str) -> tuple[str, ...]:
    """The distributions that an extra adds on this platform, as this package's metadata lists
    them. Empty where the package was not installed by an installer.
    """
    try:
        lines = importlib.metadata.requires("edge-gemma") or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    found = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            continue  # of the package itself, whatever the extra
        if marker.evaluate({"extra": extra}):
            found.append(requirement.name)
    return tuple(found)


def _extras(have: Callable[[str], bool]) -> tuple[Extra, ...]:
    found = []
    for name, purpose in PURPOSES.items():
        packages, libraries = required_packages(name), LIBRARIES.get(name, {})
        if packages:
            absent = tuple(package for package in packages if not have(package))
            to_install = tuple(libraries[key] for key in libraries if not have(f"lib:{key}"))
            found.append(Extra(name, purpose, absent, to_install))
    return tuple(found)


def _power(root: Path) -> tuple[str, ...]:
    """The throttling flags of a Raspberry Pi's firmware (vcgencmd get_throttled)."""
    text = read_text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    flags = int(text, 16) if re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", text) else 0
    meaning = {
        0: "under-voltage now",
        2: "throttled now",
        3: "too hot now",
        16: "under-voltage since boot",
        18: "throttled since boot",
        19: "was too hot since boot",
    }
    return tuple(words for bit, words in meaning.items() if flags >> bit & 1)


def _microphones(root: Path) -> tuple[str, ...]:
    lines = read_text(root / "proc/asound/pcm").splitlines()
    return tuple(
        line.split(":")[1].strip() for line in lines if line.count(":") >= 2 and "capture" in line
    )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _on_sd(root: Path, path: Path) -> bool:
    """Whether ``path`` lies on an SD card or eMMC (mmcblk), by the longest mount point that holds
    it.
    """
    best, device = "", ""
    for line in read_text(root / "proc/mounts").splitlines():
        words = line.split()
        if (
            len(words) > 1
            and path.resolve().is_relative_to(words[1])
            and len(words[1]) >= len(best)
        ):
            best, device = words[1], words[0]
    return "mmcblk" in device


def _may_lock(root: Path) -> bool:
    """Whether this process may lock a whole model file's mapping: CAP_IPC_LOCK (bit 14), or a
    memlock limit above any model here.
    """
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", read_text(root / "proc/self/status"), re.M)
    limit = re.search(r"^Max locked memory\s+(\w+)", read_text(root / "proc/self/limits"), re.M)
    return bool(capabilities and int(capabilities[1], 16) >> 14 & 1) or bool(
        limit and (limit[1] == "unlimited" or int(limit[1]) >= 16 * GiB)
    )


def _advice(root: Path, report: Report) -> Iterator[str]:
    """One sentence or two each, the most useful first; commands stand at the end of a line, ready
    to be copied.
    """
    yield from _advice_on_builds(report)
    if any("now" in words for words in report.power):
        yield (
            f"The firmware reports: {', '.join(report.power)}. The board runs slower than it "
            "could; use the official power supply, and cool it."
        )
    yield from _advice_on_memory(root, report.device)
    yield from _advice_on_clocks(root, report)
    yield from _advice_on_the_store(report)
    yield from _advice_on_extras(root, report)


def _advice_on_builds(report: Report) -> Iterator[str]:
    device, llama = report.device, report.llama
    if sys.maxsize < 1 << 32:
        yield (
            "This is a 32-bit Python; Gemma needs a 64-bit system (on a Raspberry Pi: the "
            "64-bit Raspberry Pi OS)."
        )
    if llama is None:
        yield (
            f"llama.cpp cannot be used: {report.llama_problem}. Install it with: pip install "
            "llama-cpp-python"
        )
        return
    slow = set(expected_repacks(device)) - set(llama.repacks)
    if slow:
        yield (
            "llama.cpp was built for a lesser CPU than this one: it lacks the fast "
            f"kernels for {', '.join(sorted(slow))}. "
            f"Build it on this machine: {NATIVE_LINE}"
        )
    if device.gpu and not llama.gpu:
        yield (
            f"There is a GPU ({device.gpu}) but llama.cpp was built without it. To use "
            f"it: {CUDA_LINE}"
        )


def _advice_on_memory(root: Path, device: Device) -> Iterator[str]:
    pi = device.board.startswith("Raspberry Pi")
    if not device.memory_cgroup:
        yield _cgroup_advice(root, pi)
    if device.limit_bytes is not None:
        yield (
            f"This process may use at most {format_bytes(device.limit_bytes)} (a cgroup "
            "limit), whatever the machine has; plans keep to that."
        )
    if device.n_threads < len(device.big_cpus) and len(device.big_cpus) > 1:
        yield (
            f"{device.n_threads} of {len(device.big_cpus)} CPUs will be used: one thread per "
            "physical core, within the CPU quota."
        )
    if device.zram_bytes:
        yield (
            f"{format_bytes(device.zram_bytes)} of the swap is zram, which lives in memory "
            "itself: it is not counted as memory, "
            "and weights hardly compress. Nothing to do."
        )
    if pi and 380 * MiB < device.total_bytes < 450 * MiB:
        yield (
            "The GPU keeps 64 MiB of this board. Headless, gpu_mem=16 in "
            "/boot/firmware/config.txt gives most of it back."
        )


def _advice_on_clocks(root: Path, report: Report) -> Iterator[str]:
    driver = read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver")
    raises_it_all_the_same = driver in ("intel_pstate", "amd-pstate-epp")
    if report.governor == "powersave" and not raises_it_all_the_same:
        yield (
            "The CPU runs at its lowest frequency (governor powersave). For speed: echo "
            "performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        )
    if not report.device.can_release:
        yield (
            f"{platform.system()} cannot give cold pages back: plans count the whole file, "
            "so models need more memory than on Linux."
        )


def _advice_on_the_store(report: Report) -> Iterator[str]:
    if report.store_free_bytes < 4 * GiB:
        yield (
            f"{format_bytes(report.store_free_bytes)} are free for models in {report.store}; "
            "E2B takes about 3.5 GiB. EDGE_GEMMA_HOME moves the store."
        )
    if not report.store_on_sd:
        return
    reads = (
        "the first load reads what every token needs, a third of E2B"
        if report.may_lock_memory
        else "the first load reads the whole file (about a minute for E2B)"
    )
    yield f"Models lie on an SD card: {reads}; a USB or NVMe disk is several times faster."
    if not report.may_lock_memory:  # weights.py maps a file empty where it may; none stays locked
        yield (
            "With the right to lock memory, loading reads a third of that and peaks "
            'lower: echo "$USER - memlock unlimited" | sudo tee '
            "/etc/security/limits.d/edge-gemma.conf, then log in again."
        )


def _advice_on_extras(root: Path, report: Report) -> Iterator[str]:
    for extra in report.extras:
        if extra.missing_libraries and not extra.missing_packages:
            yield f"For {extra.purpose}: sudo apt-get install {' '.join(extra.missing_libraries)}"
    can_hear = any(extra.name == "hear" and not extra.missing_packages for extra in report.extras)
    devices = root / "dev/snd"
    if not report.microphones or not can_hear or not devices.is_dir():
        return
    if not any(os.access(device, os.R_OK) for device in devices.glob("pcm*c")):
        yield (
            "There is a microphone, but this user may not open it: sudo usermod -aG audio "
            "$USER, then log in again."
        )


def _cgroup_advice(root: Path, pi: bool) -> str:
    say = (
        "The kernel runs with the memory cgroup off, so no memory limit can be set or tested "
        "here; models run all the same. "
    )
    for line in ("boot/firmware/cmdline.txt", "boot/cmdline.txt"):
        if pi and (root / line).exists():
            return (
                say
                + f"To turn it on: sudo sed -i '1s/$/ cgroup_enable=memory/' /{line} && sudo reboot"
            )
    if pi:
        return (
            say + "To turn it on, append cgroup_enable=memory to the one line of "
            "/boot/firmware/cmdline.txt and reboot."
        )
    return say + "To turn it on, add cgroup_enable=memory to the kernel's command line and reboot."
