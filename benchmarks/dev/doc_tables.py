"""The documentation's tables, written from kept figures.

    python -m edge_gemma.benchmarks.dev.doc_tables           writes them (`make docs`)
    python -m edge_gemma.benchmarks.dev.doc_tables --check   says which are stale (`make check`)

In: ``docs/data/NAME.json`` and pages with ``<!-- table: NAME -->`` … ``<!-- end -->``. Out: the
pages, a table and its source between the marks. A file is what `edge-gemma bench … --save` wrote,
or ``{"source": {"command", "machine", "date"}, "head": […], "rows": [[…], …]}``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_gemma.benchmarks import regress
from edge_gemma.benchmarks.sections import markdown_table
from edge_gemma.errors import EdgeGemmaError, UsageError

CHECKOUT = Path(__file__).resolve().parents[2]
MARKED = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
SOURCE = ("command", "machine", "date")


def table(path: Path) -> str:
    """The Markdown of one file: its table and where the figures are from. Raises UsageError."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if data.get("format") == regress.FORMAT:
        machine = data["machine"]
        command = f"`{machine['command']}`" if "command" in machine else ""
        source = {"command": command, "machine": machine["text"], "date": machine.get("date")}
        tables = [section.tables[0] for section in regress.sections(data)]
    else:
        source, tables = data.get("source", {}), [_written_table(path, data)]
    if missing := [key for key in SOURCE if not source.get(key)]:
        raise UsageError(f"{path} does not say its {', '.join(missing)}")
    origin = f"{source['command']}; {source['machine']}; {source['date']}"
    return "\n\n".join([*map(markdown_table, tables), f"<sub>{origin}</sub>"])


def _written_table(path: Path, data: dict[str, Any]) -> list[list[str]]:
    rows = [data.get("head", []), *data.get("rows", [])]
    if any(len(row) != len(rows[0]) for row in rows) or not rows[0]:
        raise UsageError(f"{path}: each row needs a cell for each of the head's {len(rows[0])}")
    return rows


def written(page: str, data: Path) -> str:
    """A page with every marked table as its file says.

    >>> written("no tables here", getfixture("tmp_path"))
    'no tables here'
    """

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- table: {name} -->\n{table(data / f'{name}.json')}\n<!-- end -->"

    return MARKED.sub(replaced, page)


def pages(root: Path) -> Iterator[tuple[Path, str, str]]:
    """(page, as it is, as it should be). Raises UsageError for a file that no page shows."""
    shown: set[str] = set()
    data = root / "docs" / "data"
    for path in sorted([*root.glob("docs/*.md"), *root.glob("README.md")]):
        text = path.read_text("utf-8")
        shown |= set(MARKED.findall(text))
        yield path, text, written(text, data)
    if unused := sorted({path.stem for path in data.glob("*.json")} - shown):
        raise UsageError(f"no page shows docs/data: {', '.join(unused)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    options = parser.parse_args()
    stale = [(path, text) for path, before, text in pages(CHECKOUT) if before != text]
    for path, text in stale:
        if options.check:
            print(f"{path.relative_to(CHECKOUT)} is stale; type: make docs", file=sys.stderr)
        else:
            path.write_text(text, "utf-8")
            print(path.relative_to(CHECKOUT))
    if options.check and stale:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except EdgeGemmaError as error:
        sys.exit(f"doc_tables: {error}")
