"""Run a command inside a memory limit the kernel enforces, and say afterwards what it took.

In: an argument list and :class:`Limits`. Out: :class:`Outcome` (exit status, the limit's kind,
highest usage, OOM kills, major faults). What it does not know: models. The strongest limit this
machine permits is taken, and named:

- ``cgroup v2`` / ``cgroup v1``: all memory of the process, its file pages included, like a board of
  that size; needs root or a delegated group;
- ``rlimit``: anonymous memory alone (``prlimit --data``); file pages are not limited, so it is the
  weaker test;
- ``none``: no limit was asked for, or the system has neither.

A page is charged to the group that read it first. A file that is already cached would cost the
child nothing, so name it under ``cold_files``.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.units import MiB, format_bytes

ROOT = Path("/sys/fs/cgroup")
_PREFIX = "edge-gemma-"
_numbers = itertools.count()

# Runs in the child before the command: joins the groups, sets the limits, dies with its parent,
# then becomes the command. A program of its own rather than preexec_fn, which may deadlock where
# the parent has threads (the sampler is one).
_LAUNCHER = """
import ctypes, json, os, resource, signal, sys
setup, argv = json.loads(sys.argv[1]), sys.argv[2:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != setup["parent"]: sys.exit(1)
for group in setup["groups"]:
    with open(group + "/cgroup.procs", "w") as file: file.write(str(os.getpid()))
if setup["cpus"]: os.sched_setaffinity(0, setup["cpus"])
if setup["data_bytes"]: resource.setrlimit(resource.RLIMIT_DATA, (setup["data_bytes"],) * 2)
if not setup["may_lock"]:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20,) * 2)
    # PR_CAPBSET_DROP, CAP_IPC_LOCK: gone at the exec below, for root too
    ctypes.CDLL(None).prctl(24, 14, 0, 0, 0)
os.execvp(argv[0], argv)
"""


def usable_cpus() -> list[int]:
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )


@dataclass(frozen=True)
class Limits:
    """``memory_bytes`` 0: none.

    ``cpus``: which cores may be used (empty: all). ``quota``: cores' worth of time (0: no quota).
    ``may_lock`` False: no right to lock memory beyond 8 MiB, as an ordinary user has it on most
    systems.
    """

    memory_bytes: int = 0
    cpus: tuple[int, ...] = ()
    quota: float = 0.0
    may_lock: bool = True

    def __post_init__(self):
        if self.memory_bytes and self.memory_bytes < 16 * MiB:
            raise UsageError(
                f"a memory limit of {format_bytes(self.memory_bytes)} is below what Python "
                "itself needs; at least 16 MiB"
            )
        if missing := set(self.cpus) - set(usable_cpus()):
            raise UsageError(
                f"CPU {min(missing)} is not among those this process may use: {usable_cpus()}"
            )


NO_LIMITS = Limits()


@dataclass
class Outcome:
    """How a capped run went. ``kind`` names the limit that held; ``notes`` says what could not be
    limited, in plain words.
    """

    kind: str
    limit_bytes: int
    returncode: int | None = None
    seconds: float = 0.0
    max_usage_bytes: int = (
        0  # the group's own peak, page cache included; 0 where the kernel keeps none
    )
    oom_kills: int = 0
    major_faults: int = 0
    timed_out: bool = False
    error_tail: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.returncode == 0

    def describe(self) -> str:
        if self.oom_kills:
            return (
                f"killed by the kernel: out of memory under {format_bytes(self.limit_bytes)} "
                f"({self.kind})"
            )
        if self.timed_out:
            return f"stopped after {self.seconds:.0f} s"
        if self.ok:
            return "done"
        lines = self.error_tail.strip().splitlines()
        return f"failed (status {self.returncode}): {lines[-1] if lines else 'no message'}"


def drop_cache(*paths: str | os.PathLike) -> None:
    """Let go of the cached pages of files nobody has mapped, so that the next reader pays for them.
    Needs no rights.
    """
    for path in paths:
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            os.fdatasync(file)  # dirty pages stay
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            pass
        finally:
            os.close(file)


# --- groups ---


@dataclass
class Group:
    """One control group of ours, version 1 or 2."""

    path: Path
    version: int

    def read(self, name: str) -> str:
        try:
            return (self.path / name).read_text()
        except OSError:
            return ""

    def write(self, name: str, value: object) -> None:
        (self.path / name).write_text(str(value))

    def counters(self) -> tuple[int, int]:
        """(highest usage in bytes, processes killed for memory)."""
        if self.version == 1:
            peak, events = self.read("memory.max_usage_in_bytes"), self.read("memory.oom_control")
        else:
            peak, events = (
                self.read("memory.peak"),
                self.read("memory.events"),
            )  # memory.peak since Linux 5.19
        kills = [
            int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill ")
        ]
        return int(peak or 0), sum(kills)

    def remove(self) -> None:
        for _ in range(100):
            for pid in self.read("cgroup.procs").split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except OSError:
                    pass
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.05)  # the kernel still buries the dead


def _homes(controller: str) -> Iterator[tuple[Path, int]]:
    """Folders in which a group with this controller might be made, the nearest to our own first."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controller in controllers.split(","):
            yield ROOT / controllers / own.lstrip("/"), 1
            yield ROOT / controllers, 1
        elif not controllers:
            root = ROOT / "unified" if (ROOT / "unified").is_dir() else ROOT
            # a v2 group with processes of its own cannot hand controllers to children, hence also
            # its parents
            for folder in (root / own.lstrip("/"), *(root / own.lstrip("/")).parents):
                if folder == root or root in folder.parents:
                    yield folder, 2


Setting = tuple[str, object, bool]  # file, value, whether the group is useless without it


def _make(controller: str, settings: dict[int, list[Setting]]) -> Group | None:
    """A fresh group with the settings for its version, ``(file, value, required)``; None where that
    is not permitted.
    """
    for home, version in _homes(controller):
        if not home.is_dir():
            continue
        _bury_stale(home, version)
        if version == 2 and controller not in _text(home / "cgroup.subtree_control").split():
            try:
                (home / "cgroup.subtree_control").write_text(f"+{controller}")
            except OSError:
                continue
        group = Group(home / f"{_PREFIX}{os.getpid()}-{next(_numbers)}", version)
        try:
            group.path.mkdir()
        except OSError:
            continue
        try:
            for name, value, required in settings[version]:
                try:
                    group.write(name, value)
                except OSError:
                    if required:
                        raise
            return group
        except OSError:
            group.remove()
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _bury_stale(home: Path, version: int) -> None:
    """Groups of a run that was killed before it could clean up."""
    for path in home.glob(f"{_PREFIX}*-*"):
        owner = path.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            Group(path, version).remove()


NO_MEMORY_GROUP = (
    "no permission to make a memory cgroup: only anonymous memory is limited (prlimit --data), "
    "file pages are not. For a true limit run as root, or as: systemd-run --user --scope -p "
    "MemoryMax=… edge-gemma bench …"
)
QUOTA_PERIOD_US = 100_000


@dataclass
class _Held:
    """The limits of one run while it lasts."""

    kind: str = "none"
    groups: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@contextmanager
def _limited(limits: Limits, permit_groups: bool) -> Iterator[_Held]:
    """The limits, set. The groups are removed afterwards, whatever happens."""
    held = _Held()
    try:
        if limits.memory_bytes:
            _limit_memory(held, limits.memory_bytes, permit_groups)
        if limits.quota and limits.quota < len(limits.cpus or usable_cpus()):
            _limit_time(held, limits.quota, permit_groups)
        yield held
    finally:
        for group in held.groups:
            group.remove()


def _limit_memory(held: _Held, n_bytes: int, permit_groups: bool) -> None:
    first: list[Setting] = [
        ("memory.limit_in_bytes", n_bytes, True),
        ("memory.memsw.limit_in_bytes", n_bytes, False),
        ("memory.swappiness", 0, False),
    ]
    second: list[Setting] = [("memory.max", n_bytes, True), ("memory.swap.max", 0, False)]
    group = _make("memory", {1: first, 2: second}) if permit_groups else None
    if group:
        held.groups.append(group)
        held.kind = f"cgroup v{group.version}"
    elif sys.platform == "linux":
        held.kind = "rlimit"
        held.notes.append(NO_MEMORY_GROUP)
    else:
        held.notes.append(
            f"{sys.platform} has no memory limit for one process; the run was not limited"
        )


def _limit_time(held: _Held, quota: float, permit_groups: bool) -> None:
    quota_us = int(quota * QUOTA_PERIOD_US)
    first: list[Setting] = [
        ("cpu.cfs_period_us", QUOTA_PERIOD_US, True),
        ("cpu.cfs_quota_us", quota_us, True),
    ]
    second: list[Setting] = [("cpu.max", f"{quota_us} {QUOTA_PERIOD_US}", True)]
    if permit_groups and (group := _make("cpu", {1: first, 2: second})):
        held.groups.append(group)
    else:
        held.notes.append(f"no permission to limit CPU time to {quota:g} cores")


# --- running ---


def run(
    argv: Sequence[str],
    limits: Limits = NO_LIMITS,
    *,
    cold_files: Sequence[str | os.PathLike] = (),
    on_start: Callable[[int], None] = lambda pid: None,
    on_line: Callable[[str], None] = lambda line: None,
    timeout_s: float = 0.0,
    env: dict[str, str] | None = None,
    permit_groups: bool = True,
) -> Outcome:
    """Run ``argv`` to its end under ``limits``.

    ``on_line`` gets each line of its standard output as it comes, ``on_start`` its process id.

    An exception on the way (Ctrl-C too) ends the child and everything it started, removes the
    groups, and goes on to the caller. Raises RuntimeFailure when the command cannot be started.

    >>> lines = []
    >>> run([sys.executable, "-c", "print('hello')"], on_line=lines.append).ok, lines
    (True, ['hello'])
    """
    if shutil.which(argv[0]) is None:
        raise RuntimeFailure(f"cannot start {argv[0]}: not found")
    drop_cache(*cold_files)
    with _limited(limits, permit_groups) as held:
        setup = {
            "parent": os.getpid(),
            "groups": [str(group.path) for group in held.groups],
            "cpus": list(limits.cpus),
            "data_bytes": limits.memory_bytes if held.kind == "rlimit" else 0,
            "may_lock": limits.may_lock,
        }
        outcome = Outcome(held.kind, limits.memory_bytes, notes=held.notes)
        begin = time.perf_counter()
        with tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(
                [sys.executable, "-S", "-c", _LAUNCHER, json.dumps(setup), *argv],
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
                text=True,
                errors="replace",
            )
            watchdog = _Watchdog(child, timeout_s)
            try:
                on_start(child.pid)
                assert child.stdout is not None
                for line in child.stdout:
                    on_line(line.rstrip("\n"))
                _, status, usage = os.wait4(child.pid, 0)
                child.returncode = outcome.returncode = os.waitstatus_to_exitcode(status)
                outcome.major_faults = usage.ru_majflt
            finally:
                outcome.timed_out = watchdog.stop()
                _end(child)
                if child.stdout:
                    child.stdout.close()
            outcome.seconds = time.perf_counter() - begin
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4000))
            outcome.error_tail = errors.read().decode(errors="replace")
        for group in held.groups:
            peak, kills = group.counters()
            outcome.max_usage_bytes = max(outcome.max_usage_bytes, peak)
            outcome.oom_kills += kills
    return outcome


class _Watchdog:
    """Ends the child after ``timeout_s`` (0: never)."""

    def __init__(self, child: subprocess.Popen, timeout_s: float):
        self.fired = False
        self.timer = None
        if timeout_s:
            self.timer = threading.Timer(timeout_s, self._fire, [child])
            self.timer.daemon = True
            self.timer.start()

    def _fire(self, child: subprocess.Popen) -> None:
        self.fired = True
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except OSError:
            pass

    def stop(self) -> bool:
        if self.timer:
            self.timer.cancel()
            self.timer.join()
        return self.fired


def _end(child: subprocess.Popen) -> None:
    """No process of the child's session survives this call."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, kind)
        except OSError:
            break  # the session is empty
        if child.returncode is None:
            try:
                child.wait(3 if kind is signal.SIGTERM else None)
            except subprocess.TimeoutExpired:
                continue
