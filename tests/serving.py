"""A server in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Served:
    """A running ``edge-gemma serve``."""

    process: subprocess.Popen
    url: str
    name: str
    said: str = ""  # what it wrote before it was ready


def command(bundle: Path, *options: str) -> list[str]:
    served = ["serve", str(bundle), "--ctx", "1024", "--threads", "1", *options]
    return [sys.executable, "-m", "edge_gemma", *served]


@contextlib.contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Served]:
    """Run ``edge-gemma serve BUNDLE`` on a free port until the block ends."""
    process = subprocess.Popen(
        command(bundle, "--port", "0", *options),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            ready = re.match(r"ready: (\S+) serves (.+?), ", line)
            if ready:
                yield Served(process, ready[1], ready[2], "".join(said))
                break
        else:
            raise AssertionError("".join(said))
    finally:
        process.terminate()
        process.communicate(timeout=30)
