"""The Arm machine's pure parts; building and booting it takes minutes and QEMU: docs/measure.md."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import psutil
import pytest

from edge_gemma.benchmarks.dev import armvm
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.units import MiB


def test_the_job_is_this_checkout_laid_out_as_installed():
    with tarfile.open(fileobj=io.BytesIO(armvm._job("echo hello\n"))) as archive:
        names = set(archive.getnames())
        assert archive.extractfile("job.sh").read() == b"echo hello\n"
    assert {
        "edge_gemma/plan/ladder.py",
        "edge_gemma/benchmarks/worker.py",
        "edge_gemma/convert/decoder.py",
        "edge_gemma/device_profiles/pi-5-4gb.toml",
        "tests/conftest.py",
        "pyproject.toml",
    } <= names
    assert not any("__pycache__" in name for name in names)


def test_core_tests_exist():
    files = [path.stem for path in (Path(armvm._checkout()) / "tests").glob("test_*.py")]
    chosen = [stem for stem in files if any(word in stem for word in armvm.CORE_TESTS)]
    assert {"test_memory", "test_caps", "test_synthetic"} <= set(
        chosen
    ) and "test_microphone" not in chosen


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(
        UsageError,
        match="no machine in .*; make one with: python -m edge_gemma.benchmarks.dev.armvm build",
    ):
        next(armvm.boot(tmp_path, "true"))
    monkeypatch.setattr(
        armvm.shutil,
        "which",
        lambda tool: None if tool in ("debootstrap", "cpio") else "/usr/bin/" + tool,
    )
    with pytest.raises(
        UsageError, match="apt-get install --no-install-recommends debootstrap cpio$"
    ):
        armvm.build(tmp_path)
    with pytest.raises(RuntimeFailure, match=r"sh failed \(status 3\): broken"):
        armvm._call("sh", "-c", "echo broken >&2; exit 3")


def test_a_terminated_command_takes_the_machine_along(tmp_path):
    """The machine is a process of its own; what stands for it here says who it is and sleeps."""
    (tmp_path / "root.ext4").touch()
    machine = tmp_path / "qemu-system-aarch64"
    machine.write_text("#!/bin/sh\necho $$\nexec sleep 60\n")
    machine.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(
        [sys.executable, "-m", "edge_gemma.benchmarks.dev.armvm", "run", str(tmp_path), "true"],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    ) as command:
        pid = int(command.stdout.readline())
        command.terminate()
        assert command.wait(30) == 143
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_rows_show_memory_and_no_speed():
    row = {
        "model": "e2b",
        "n_ctx": 1024,
        "limit_bytes": 2048 * MiB,
        "limit": "cgroup v2",
        "outcome": "done",
        "oom_kills": 0,
        "planned_peak_bytes": 1500 * MiB,
        "peak_pss_bytes": 1520 * MiB,
        "anon_bytes": 1400 * MiB,
        "error": 1500 / 1520 - 1,
    }
    text = armvm.memory_table(
        [
            row,
            {
                "model": "e4b",
                "n_ctx": 1024,
                "limit_bytes": 3072 * MiB,
                "outcome": "killed by the kernel",
                "oom_kills": 1,
            },
        ]
    )
    assert (
        "| e2b | 1024 | 2048 | done | 0 | 1500 | 1520 | 1400 | -1.3% |" in text
        and "| 1 | – | – | – | – |" in text
        and "tok/s" not in text
    )
    assert "off by -1.3%" in armvm.row_text(row)


def test_guest_prints_one_line_of_json_a_case(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(armvm, "CASES", (("absent", 64 * MiB, 128, 8, 2),))
    armvm.guest(["absent"])
    line = capsys.readouterr().out
    assert line.startswith(armvm.RESULT) and '"outcome": "failed' in line
