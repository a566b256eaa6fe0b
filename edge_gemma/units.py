"""Sizes as people write them, bytes as programs count them."""

from __future__ import annotations

import re

from edge_gemma.errors import UsageError

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": KiB,
    "mib": MiB,
    "gib": GiB,
    "k": KiB,
    "m": MiB,
    "g": GiB,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """``"2GiB"``, ``"512 MiB"``, ``"1.5G"`` or a plain number of bytes → bytes. Raises UsageError.

    >>> parse_bytes("2GiB")
    2147483648
    """
    if isinstance(text, int):
        if text < 0:
            raise UsageError(f"a size cannot be negative, got {text}")
        return text
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _FACTORS:
        raise UsageError(
            f"cannot read {text!r} as a size; write it like 2GiB, 512MiB or 1500000000"
        )
    return int(float(match[1]) * _FACTORS[match[2].lower()])


def format_bytes(n: int) -> str:
    """Bytes → MiB or GiB with the unit written.

    >>> format_bytes(1572864)
    '1.5 MiB'
    """
    if abs(n) >= GiB:
        return f"{n / GiB:.2f} GiB"
    if abs(n) >= 100 * MiB:
        return f"{n / MiB:.0f} MiB"
    if abs(n) >= MiB // 10:
        return f"{n / MiB:.1f} MiB"
    return f"{n / KiB:.1f} KiB" if abs(n) >= KiB else f"{n} B"
