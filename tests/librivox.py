"""Five clips of real human speech with transcripts:

LibriVox readings in pocketsphinx' source package (BSD licence).

Fetched once with pip into ``.cache/librivox`` (or taken from the folder ``EDGE_GEMMA_LIBRIVOX``);
never shipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "pocketsphinx==5.1.1"
CACHE = Path(__file__).parent.parent / ".cache" / "librivox"


@dataclass(frozen=True)
class Clip:
    path: Path
    transcript: str


def clips() -> list[Clip]:
    """Raises OSError or subprocess.SubprocessError where the package cannot be had."""
    folder = Path(os.environ.get("EDGE_GEMMA_LIBRIVOX", CACHE))
    if not any(folder.glob("*.wav")):
        _fetch(folder)
    transcripts = {}
    for line in (folder / "transcription").read_text().splitlines():
        text, _, name = line.rpartition("(")
        transcripts[name.rstrip(")").strip()] = text.replace("<s>", "").replace("</s>", "").strip()
    return [Clip(path, transcripts[path.stem]) for path in sorted(folder.glob("*.wav"))]


def _fetch(folder: Path) -> None:
    """``pip download`` of a source package runs its build backend for the metadata, so that is
    installed first, in a throw-away environment.
    """
    with tempfile.TemporaryDirectory() as temporary:
        python = str(Path(temporary) / "venv" / "bin" / "python")
        run = dict(check=True, capture_output=True, timeout=300)
        subprocess.run([sys.executable, "-m", "venv", str(Path(temporary) / "venv")], **run)
        subprocess.run([python, "-m", "pip", "install", "-q", "scikit-build-core", "cython"], **run)
        download = [
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "-d",
            temporary,
            PACKAGE,
        ]
        subprocess.run([python, "-m", "pip", *download], **run)
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            for member in archive:
                if member.isfile() and "/test/data/librivox/" in member.name:
                    data = archive.extractfile(member).read()
                    (folder / Path(member.name).name).write_bytes(data)
