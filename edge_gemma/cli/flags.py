"""What was asked of every command alike. Knows no typer, so that ``main`` has it at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Flags:
    """``debug``: errors end in a traceback."""

    debug: bool = False
