"""What people's files do here, as a table: docs/compatibility.md out of the tests themselves.

    python tests/compatibility.py           writes the page (also: make docs)
    python tests/compatibility.py --check   says when it is stale (part of make check)

Every row is a test with ``@pytest.mark.compat(kind=…, what=…, happens=…)``: a layout or file
that somebody has, and what happens to it. A row without a passing test cannot be: the page is made
from what pytest collects, and the suite runs it.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
KINDS = {
    "checkpoint": "Checkpoints",
    "adapter": "Adapters",
    "gguf": "GGUFs from elsewhere, and pulling them",
    "family": "Models that are Gemma 3 underneath",
    "schema": "Structured output",
    "calls": "Function calls",
    "sound": "Sound",
    "talk": "Tools, timers and the assistant",
    "picture": "Pictures",
    "path": "Paths",
    "client": "Clients of the server",
    "board": "Small boards",
}
HEAD = """# Real files: what happens to each

Each row is a test: `pytest -k NAME`. This page is written by `python tests/compatibility.py` from
the tests' own marks. A row marked *slow* runs by name (`pytest -m slow -k NAME`).
"""


class _Collector:
    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.items = list(items)


def rows() -> Iterator[tuple[str, str, str, str]]:
    """(kind, what, happens, test) of every mark, in the order of the tests."""
    collector = _Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        # -m overrides the suite's own "not slow": slow rows are rows too
        options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow"]
        code = pytest.main([*options, str(Path(__file__).parent)], plugins=[collector])
    if code:
        raise SystemExit(f"the tests cannot be collected (pytest's exit code {int(code)})")
    seen: set[tuple[str, str, str, str]] = set()
    for item in collector.items:
        for mark in item.iter_markers("compat"):
            name = item.name.partition("[")[0]
            if item.get_closest_marker("slow"):
                name += " *(slow)*"
            row = (mark.kwargs["kind"], mark.kwargs["what"], mark.kwargs["happens"], name)
            if row not in seen:
                seen.add(row)
                yield row


def page() -> str:
    by_kind: dict[str, list[tuple[str, str, str]]] = {kind: [] for kind in KINDS}
    for kind, *row in rows():
        by_kind[kind].append((row[0], row[1], row[2]))
    text = HEAD
    for kind, found in by_kind.items():
        if found:
            text += f"\n## {KINDS[kind]}\n\n| what | what happens | test |\n|---|---|---|\n"
            text += "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in found)
    return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(arguments: list[str]) -> None:
    made = page()
    if arguments == ["--check"]:
        if not PAGE.exists() or PAGE.read_text("utf-8") != made:
            raise SystemExit(f"{PAGE.name} is stale; write it with: make docs")
    elif arguments:
        raise SystemExit(__doc__)
    else:
        PAGE.write_text(made, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
