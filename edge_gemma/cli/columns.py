"""Rows → aligned columns. Nothing is cut or wrapped: names are there to be copied."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]]) -> str:
    """
    >>> print(columns([("name", "size"), ("tiny", "2 MiB")]))
    name  size
    tiny  2 MiB
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
