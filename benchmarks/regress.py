"""What got worse since the last time, by more than the noise.

In: sections measured now, and a file of earlier ones. Out: a list of :class:`Change`. Noise is what
both runs themselves showed (half the range of their repeats), twice over, and never less than a
floor: 2 % for memory, 5 % for time and speed. What it does not know: how anything was measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_gemma.benchmarks.sections import KINDS, Row, Section
from edge_gemma.errors import UsageError
from edge_gemma.files import written_whole
from edge_gemma.units import MiB

Machine = dict[str, Any]  # as describe_machine gives it
FORMAT = "edge-gemma-bench"
FLOOR_BYTES, FLOOR_TIME = 0.02, 0.05


@dataclass(frozen=True)
class Change:
    """One measured field of one row. ``change`` is relative to before; ``verdict`` is worse, better
    or same.
    """

    kind: str
    row: str
    field: str
    before: float
    now: float
    change: float
    noise: float
    verdict: str

    def __str__(self) -> str:
        before, now = (
            f"{v / MiB:.0f} MiB" if self.field.endswith("_bytes") else f"{v:.4g}"
            for v in (self.before, self.now)
        )
        return (
            f"{self.verdict:>6}  {self.kind} {self.row}: {self.field.removesuffix('_bytes')} "
            f"{before} → {now} ({self.change:+.1%}, noise {self.noise:.1%})"
        )


def to_json(sections: Sequence[Section], machine: Machine) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": 1,
        "machine": machine,
        "sections": [
            {
                "title": section.title,
                "key": section.key,
                "better": section.better,
                **asdict(section),
            }
            for section in sections
        ],
    }


def save(path: Path, sections: Sequence[Section], machine: Machine) -> None:
    """Whole or not at all; replaces what was there."""
    with written_whole(path) as file:
        file.write(json.dumps(to_json(sections, machine), indent=1).encode())


def read(path: Path) -> dict[str, Any]:
    """An earlier file. Raises UsageError."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; `bench … --save {path}` makes one"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if (
        not isinstance(found, dict)
        or found.get("format") != FORMAT
        or not isinstance(found.get("sections"), list)
    ):
        raise UsageError(f"{path} was not written by `bench --save`")
    if found.get("version") != 1:
        raise UsageError(
            f"{path} has version {found.get('version')}, this edge-gemma reads 1; upgrade it "
            "or measure anew"
        )
    return found


def sections(found: dict[str, Any]) -> list[Section]:
    """The sections of a file that was read. Raises UsageError."""
    names = Section.__dataclass_fields__
    try:
        return [
            Section(**{name: value for name, value in old.items() if name in names})
            for old in found["sections"]
            if old["kind"] in KINDS
        ]
    except (TypeError, KeyError) as error:
        raise UsageError(f"the file is damaged: {error}") from None


def compare(
    before: dict[str, Any], sections: Sequence[Section], machine: Machine
) -> tuple[list[Change], list[str]]:
    """(changes, notes). Speeds of two machines are not compared; memory is, where page size and CPU
    features agree.
    """
    notes = []
    other = before["machine"]
    same_cpu = _agree(other, machine, "cpu", "cores")
    if not same_cpu:
        notes.append(
            f"measured on another machine before ({other.get('text', 'unknown')}): times and "
            "speeds are not compared"
        )
    same_memory = _agree(other, machine, "page_bytes", "features")
    if not same_memory:
        notes.append(
            "page size or CPU features differ, and with them what is repacked: memory is not "
            "compared"
        )
    earlier = {
        (old["kind"], _name(old["key"], row)): row
        for old in before["sections"]
        for row in old["rows"]
    }
    changes = []
    for section in sections:
        comparable = {True: same_memory, False: same_cpu or section.kind == "quality"}
        for row in section.rows:
            name = _name(section.key, row)
            old = earlier.get((section.kind, name))
            if old is None:
                notes.append(f"{section.kind} {name} was not measured before")
                continue
            for field, better in section.better.items():
                measured_twice = old.get(field) and row.get(field)
                if measured_twice and comparable[field.endswith("_bytes")]:
                    changes.append(_change(section.kind, name, field, better, old, row))
    return changes, notes


def _agree(one: Machine, other: Machine, *keys: str) -> bool:
    return all(one.get(key) == other.get(key) for key in keys)


def _name(key: Sequence[str], row: Row) -> str:
    return ", ".join(
        f"{row.get(field):g}" if isinstance(row.get(field), float) else str(row.get(field))
        for field in key
    )


def _change(kind: str, name: str, field: str, better: int, old: Row, row: Row) -> Change:
    floor = FLOOR_BYTES if field.endswith("_bytes") else FLOOR_TIME
    spreads = old.get(f"{field}_spread", 0.0) + row.get(f"{field}_spread", 0.0)
    noise = max(floor, 2 * spreads)
    change = row[field] / old[field] - 1
    verdict = "same" if abs(change) <= noise else "better" if change * better > 0 else "worse"
    return Change(kind, name, field, old[field], row[field], change, noise, verdict)
