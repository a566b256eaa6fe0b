"""Limits on real child processes. Where the machine permits no cgroup, those tests skip."""

import os
import signal
import subprocess
import sys
import time

import pytest

from edge_gemma.benchmarks import caps
from edge_gemma.benchmarks.caps import Limits, run, usable_cpus
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.units import MiB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux limits")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def ours() -> list:
    return [
        path
        for home, _ in caps._homes("memory")
        if home.is_dir()
        for path in home.glob(f"edge-gemma-{os.getpid()}-*")
    ]


@pytest.fixture
def groups():
    with caps._limited(Limits(64 * MiB), True) as held:
        if not held.kind.startswith("cgroup"):
            pytest.skip("no permission to make a memory cgroup")
    return held.kind


def test_what_fits_runs_and_its_usage_is_known(groups):
    lines = []
    outcome = run(
        python("b = bytearray(60 << 20); print('fits'); print('yes')"),
        Limits(128 * MiB),
        on_line=lines.append,
    )
    assert outcome.ok and lines == ["fits", "yes"] and outcome.kind == groups
    assert 60 * MiB < outcome.max_usage_bytes < 128 * MiB and outcome.oom_kills == 0
    assert ours() == []


def test_what_does_not_fit_is_killed_and_reported(groups):
    outcome = run(python("b = bytearray(300 << 20)"), Limits(100 * MiB))
    assert not outcome.ok and outcome.oom_kills == 1
    assert outcome.describe() == f"killed by the kernel: out of memory under 100 MiB ({groups})"
    assert ours() == []


def test_file_pages_are_charged_when_the_cache_was_dropped(groups, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(48 * MiB))
    outcome = run(
        python(f"open({str(path)!r}, 'rb').read(40 << 20)[::4096]"),
        Limits(256 * MiB),
        cold_files=[path],
    )
    assert outcome.max_usage_bytes > 80 * MiB  # 40 anonymous and 40 of page cache


def test_without_cgroups_it_falls_back_and_says_so():
    outcome = run(python("b = bytearray(300 << 20)"), Limits(100 * MiB), permit_groups=False)
    assert outcome.kind == "rlimit" and not outcome.ok and "MemoryError" in outcome.error_tail
    assert "no permission to make a memory cgroup" in outcome.notes[0]
    assert run(python("b = bytearray(30 << 20)"), Limits(100 * MiB), permit_groups=False).ok


def test_cores_are_limited():
    lines = []
    one = usable_cpus()[:1]
    run(
        python("import os; print(sorted(os.sched_getaffinity(0)))"),
        Limits(cpus=tuple(one)),
        on_line=lines.append,
    )
    assert lines == [str(one)]


def test_no_right_to_lock_memory():
    lines = []
    code = (
        "import ctypes; room = ctypes.create_string_buffer(16 << 20); "
        "print(ctypes.CDLL(None).mlock(room, 16 << 20))"
    )
    assert run(python(code), Limits(may_lock=False), on_line=lines.append).ok
    assert lines == ["-1"]


def test_an_exception_ends_the_child_and_removes_its_group():
    pids = []

    def interrupt(line):
        pids.append(int(line))
        if len(pids) == 2:
            raise KeyboardInterrupt

    code = (
        "import os, subprocess, sys, time\np = subprocess.Popen([sys.executable, '-c', 'import "
        "time; time.sleep(60)'])\nprint(os.getpid(), flush=True); print(p.pid, flush=True); "
        "time.sleep(60)"
    )
    with pytest.raises(KeyboardInterrupt):
        run(python(code), Limits(256 * MiB), on_line=interrupt)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids) and ours() == []


def test_a_killed_parent_takes_its_child_along(tmp_path):
    code = (
        f"from edge_gemma.benchmarks.caps import run; run([{sys.executable!r}, '-c', 'import os, "
        "time; print(os.getpid(), flush=True); time.sleep(60)'], on_line=lambda l: print(l, "
        "flush=True))"
    )
    parent = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_timeout():
    outcome = run(python("import time; time.sleep(60)"), timeout_s=0.5)
    assert outcome.timed_out and not outcome.ok and outcome.describe().startswith("stopped after")


def test_refusals():
    with pytest.raises(UsageError, match="below what Python itself needs"):
        Limits(1 * MiB)
    with pytest.raises(UsageError, match="CPU 4095 is not among those"):
        Limits(cpus=(4095,))
    with pytest.raises(RuntimeFailure, match="cannot start no-such-command: not found"):
        run(["no-such-command"])
    outcome = run(python("import sys; print('broken', file=sys.stderr); sys.exit(3)"))
    assert outcome.describe() == "failed (status 3): broken"
