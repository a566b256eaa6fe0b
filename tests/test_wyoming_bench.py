"""wyoming-bench, which nobody here wrote, in an environment of its own against a running server.

    pytest -m slow tests/test_wyoming_bench.py

``EDGE_GEMMA_WYOMING_BENCH`` names its program; without it it is installed into the temporary
folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from test_serve import make_speech
from test_wyoming import running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench():
    """``bench(…)`` → what it prints."""
    program = os.environ.get("EDGE_GEMMA_WYOMING_BENCH")
    if not program:
        folder = Path(tempfile.gettempdir()) / "edge-gemma-wyoming-bench"
        program = str(folder / "bin" / "wyoming-bench")
        if not Path(program).exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            pip = [folder / "bin" / "python", "-m", "pip", "install", "-q"]
            subprocess.run([*pip, "wyoming-bench"], check=True)

    def run(*arguments):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def server(hearing_bundle):
    with running("tcp://127.0.0.1:0", hearing_bundle.folder) as (_, port):
        yield f"127.0.0.1:{port}"


def test_info(bench, server):
    told = bench("info", server)
    assert "asr  edge-gemma (transcript streaming)" in told and "handle" in told
    if shutil.which("espeak-ng"):
        assert "tts  edge-gemma (synthesize streaming)" in told


@pytest.mark.compat(
    kind="client",
    what="wyoming-bench",
    happens="speech to text and back, whole and streamed, no run fails",
)
def test_speech_to_text(bench, server, tmp_path):
    make_speech(tmp_path / "data_01.wav")
    (tmp_path / "data_01.txt").write_text("what the tiny model cannot know")
    config = '{"language": "en"}'
    options = ("--rounds", "2", "--mode", "both", "--config", config, "--timeout", "60", "-v")
    said = bench("stt", "--corpus", str(tmp_path), *options, server)
    assert "FAIL" not in said and "NOT SUPPORTED" not in said and "unreachable" not in said, said
    for mode in ("non_streaming", "streaming"):
        assert len(re.findall(rf"\[{mode}\] r\d data_01 total=", said)) == 2, said


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng")
def test_text_to_speech(bench, server):
    said = bench("tts", "--rounds", "2", "--timeout", "60", "-v", server)
    assert "FAIL" not in said and "NOT SUPPORTED" not in said and "unreachable" not in said, said
