"""The tree of commands. Importing it imports typer, which takes a while on a small board: see
``main``.
"""

from __future__ import annotations

import importlib

import typer

GROUPS = ("demo", "text", "bundles", "system", "store", "convert", "see", "hear", "bench")

app = typer.Typer(
    name="edge-gemma",
    help="Gemma 3n and small Gemma 3, offline, inside a planned memory budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done · 2 usage · 3 bad bundle or checkpoint · 4 refused by the plan · 5 "
    "download · 6 audio or image · 7 failed while running · 130 Ctrl-C",
)
for group in GROUPS:
    importlib.import_module(f".{group}", __package__).register(app)
