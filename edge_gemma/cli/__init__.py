"""The command line: each command parses, calls one function and prints.

One module per group of commands; each has ``register(app)`` and imports what it needs inside the
command, so that ``edge-gemma --help`` starts fast. Exit codes: 0 done, 2 usage, 3 bad bundle or
checkpoint, 4 refused by the plan, 5 download, 6 audio or image input, 7 failed while running, 130
Ctrl-C.
"""

from __future__ import annotations

import sys


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

        app(args=arguments, prog_name="edge-gemma", obj=flags)
    except EdgeGemmaError as error:
        if flags.debug:
            raise
        print(f"edge-gemma: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # while importing: a command ends by itself
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
