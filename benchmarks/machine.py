"""The machine a figure was made on: what it is, how fast its memory is, and whether it was calm.

In: nothing. Out: :func:`describe_machine` (one line and its parts), :func:`bandwidth` (bytes per
second), :class:`Calm` (clock, heat, use before and after). What it does not know: models.
"""

from __future__ import annotations

import platform
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_gemma.benchmarks.caps import usable_cpus
from edge_gemma.bundles.manifest import Manifest
from edge_gemma.machine.footprint import load_psutil
from edge_gemma.units import GiB, MiB, format_bytes

CPUS = "/sys/devices/system/cpu"
THROTTLED = "/sys/devices/platform/soc/soc:firmware/get_throttled"  # Raspberry Pi


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip("\0\n ")
    except OSError:
        return ""


def describe_machine() -> dict[str, Any]:
    """Parts, and ``text``: one line that belongs under every table.

    >>> describe_machine()["text"] != ""
    True
    """
    import numpy

    from edge_gemma.machine.probe import probe

    here = probe()
    cpu, n_cores = here.cpu or platform.processor() or platform.machine(), len(usable_cpus())
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    python, llama_cpp = platform.python_version(), _version("llama-cpp-python")
    told = ("avx2", "avx512", "neon", "dotprod", "i8mm")
    features = " ".join(feature for feature in here.cpu_features if feature in told)
    return {
        "cpu": cpu,
        "board": here.board,
        "cores": n_cores,
        "memory_bytes": here.total_bytes,
        "limit_bytes": here.limit_bytes,
        "page_bytes": here.page_bytes,
        "features": list(here.cpu_features),
        "system": system,
        "python": python,
        "numpy": numpy.__version__,
        "llama_cpp": llama_cpp,
        "onnxruntime": _version("onnxruntime"),
        "text": (
            f"{cpu}, {n_cores} cores ({features}), {format_bytes(here.total_bytes)}, {system}, "
            f"Python {python}, llama-cpp-python {llama_cpp}"
        ),
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def bandwidth(n_threads: int, *, size_bytes: int = 256 * MiB, seconds: float = 1.0) -> float:
    """Bytes per second that ``n_threads`` cores together read from memory: the ceiling of decoding,
    which reads every weight once a token.

    Each thread sums its own block, larger than any cache, with numpy (which lets go of the
    interpreter's lock); best of the passes.

    >>> bandwidth(1, size_bytes=1 << 20, seconds=0.01) > 0
    True
    """
    import numpy as np

    blocks = [np.ones(size_bytes // n_threads // 8, np.int64) for _ in range(n_threads)]
    best = 0.0
    until = time.perf_counter() + seconds
    while True:
        # bitwise or reads each word once and does next to nothing with it
        threads = [threading.Thread(target=np.bitwise_or.reduce, args=(block,)) for block in blocks]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        now = time.perf_counter()
        best = max(best, sum(block.nbytes for block in blocks) / (now - begin))
        if now >= until:
            return best


def bytes_per_token(manifest: Manifest) -> int:
    """Weights a decoder reads for each token it writes: every matmul tensor once (a bundle's
    manifest).
    """
    return sum(tensor.nbytes for tensor in manifest.decoder.tensors if tensor.use == "matmul")


@dataclass
class Calm:
    """Watches clock and heat over a benchmark. ``warnings()`` says what may have spoilt it.

    >>> with Calm() as calm:
    ...     pass
    >>> isinstance(calm.warnings(), list)
    True
    """

    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Calm:
        # a load average would still count a benchmark that has just ended
        self.before = self._state() | {"busy": load_psutil().cpu_percent(0.5) / 100}
        return self

    def __exit__(self, *_) -> None:
        self.after = self._state()

    @staticmethod
    def _state() -> dict[str, Any]:
        clocks = [
            int(text)
            for cpu in usable_cpus()
            if (text := _read(f"{CPUS}/cpu{cpu}/cpufreq/scaling_cur_freq")).isdigit()
        ]
        heat = [
            int(text) / 1000
            for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*"))
            if (text := _read(f"{zone}/temp")).lstrip("-").isdigit()
        ]
        return {
            "clock_mhz": max(clocks) // 1000 if clocks else None,
            "celsius": max(heat) if heat else None,
            "governor": _read(f"{CPUS}/cpu0/cpufreq/scaling_governor") or None,
            "throttled": _read(THROTTLED) or None,
        }

    def warnings(self) -> list[str]:
        found = []
        before, after = self.before, self.after
        busy, governor = before.get("busy", 0), before.get("governor")
        if busy > 0.1:
            found.append(
                f"the machine was busy when it began ({busy:.0%} of its cores in use); expect "
                "slower and less steady figures"
            )
        clock, later = before.get("clock_mhz"), after.get("clock_mhz")
        if clock and later and later < 0.9 * clock:
            found.append(
                f"the clock fell from {clock} to {later} MHz on the way: thermal throttling or a "
                "power limit"
            )
        celsius = after.get("celsius")
        if celsius and celsius >= 80:
            found.append(f"{celsius:.0f} °C at the end; a Raspberry Pi slows down from 80 °C on")
        if (bits := after.get("throttled")) and int(bits, 16) & 0xF:
            found.append(f"the firmware reports throttling or low voltage (get_throttled {bits})")
        if governor not in (None, "performance"):
            found.append(f"the CPU governor is {governor!r}; `performance` gives steadier figures")
        return found


if __name__ == "__main__":
    print(describe_machine()["text"], file=sys.stderr)
    for n in range(1, len(usable_cpus()) + 1):
        print(f"{n} threads: {bandwidth(n) / GiB:.1f} GiB/s")
