"""How hot the machine is, and whether it slows itself down, as the kernel says it.

In: files under /sys. Out: degrees and reasons; nothing where the machine does not tell.
"""

from __future__ import annotations

import re
from pathlib import Path

from edge_gemma.machine.probe import read_text

_ROOT = Path("/")
_FLAGS = "sys/devices/platform/soc/soc:firmware/get_throttled"  # a Raspberry Pi's firmware
_NOW = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "too hot"}


def temperatures(root: Path = _ROOT) -> dict[str, float]:
    """°C by the name of the zone, as in "thermal_zone0 cpu-thermal"."""
    found = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        text = read_text(zone / "temp")
        if re.fullmatch(r"-?[0-9]{1,7}", text):
            kind = read_text(zone / "type")
            found[f"{zone.name} {kind}".strip()] = int(text) / 1000
    return found


def throttling(root: Path = _ROOT) -> dict[str, bool] | None:
    """Which reasons to be slow there are now; None where the firmware does not tell."""
    text = read_text(root / _FLAGS)
    if not re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", text):
        return None
    flags = int(text, 16)
    return {words: bool(flags >> bit & 1) for bit, words in _NOW.items()}


def throttle_count(root: Path = _ROOT) -> int | None:
    """How often cores were slowed down for heat since boot, where the CPU counts that (x86)."""
    cpus = root / "sys/devices/system/cpu"
    texts = [
        read_text(file) for file in cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    ]
    counts = [int(text) for text in texts if text.isdigit()]
    return sum(counts) if counts else None
