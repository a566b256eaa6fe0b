"""The command line: each command parses, calls one function and prints.

One module per group of commands; each has ``register(app)`` and imports what it needs inside the
command, so that ``edge-gemma --help`` starts fast. Exit codes: 0 done, 2 usage, 3 bad bundle or
checkpoint, 4 refused by the plan, 5 download, 6 audio or image input, 7 failed while running, 130
Ctrl-C.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """What was done to a sound or picture so that it could be used, as a line on stderr."""
    from edge_gemma.errors import MediaWarning

    others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, MediaWarning):
            print(f"note: {message}", file=sys.stderr, flush=True)
        else:
            others(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", MediaWarning)
        warnings.showwarning = show
        yield


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: errors of ours become one message and their exit code, never a
    stack trace unless ``--debug`` or EDGE_GEMMA_DEBUG=1 asks for it.
    """
    from edge_gemma.cli.flags import Flags
    from edge_gemma.errors import EdgeGemmaError

    flags = Flags()
    try:
        # imported here: a small board takes seconds for it, and Ctrl-C must be quiet then too
        from edge_gemma.cli.app import app

        with _warnings_as_notes():
            app(args=arguments, prog_name="edge-gemma", obj=flags)
    except EdgeGemmaError as error:
        if flags.debug:
            raise
        print(f"edge-gemma: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # while importing: a command ends by itself
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
