"""Timers and alarms: they outlive the process, a broken file and a clock that is set anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import datetime

import pytest

from edge_gemma.assistant.timers import Timer, Timers
from edge_gemma.errors import RuntimeFailure, UsageError

NOON_S = datetime(2026, 11, 26, 12).timestamp()


class Clocks:
    """The clock on the wall and the steady one; ``set_by`` moves the first alone."""

    def __init__(self):
        self.wall_s, self.steady_s = NOON_S, 500.0

    def pass_by(self, seconds):
        self.wall_s += seconds
        self.steady_s += seconds

    def set_by(self, seconds):
        self.wall_s += seconds

    def timers(self, folder):
        return Timers(folder, clock=lambda: self.wall_s, steady=lambda: self.steady_s)


@pytest.fixture
def clocks():
    return Clocks()


def labels(rings):
    return [(ring.timer.label, ring.missed) for ring in rings]


def test_a_timer_rings_until_it_is_done(tmp_path, clocks):
    with clocks.timers(tmp_path / "new" / "folder") as timers:
        timers.set(600, "  tea\n now ")
        clocks.pass_by(599)
        assert timers.due() == []
        clocks.pass_by(1)
        assert labels(timers.due()) == labels(timers.due()) == [("tea now", False)]
        clocks.pass_by(300)  # it rings on and on: that is late, and nothing was missed
        (ring,) = timers.due()
        assert not ring.missed
        timers.done(ring.timer)
        assert timers.due() == timers.all() == []


@pytest.mark.compat(
    kind="talk",
    what="a timer, and a restart before it is over",
    happens="rings on time; while the power was off: told as missed",
)
def test_timers_outlive_a_restart(tmp_path, clocks):
    with clocks.timers(tmp_path) as timers:
        timers.set(600, "tea")
        timers.set(7200, "bread")
        timers.set_alarm(NOON_S + 1800, "call")
    clocks.pass_by(3600)  # off for an hour
    clocks.steady_s = 3.0
    with clocks.timers(tmp_path) as timers:
        assert labels(timers.due()) == [("tea", True), ("call", True)]
        for ring in timers.due():
            timers.done(ring.timer)
        clocks.pass_by(3600)
        assert labels(timers.due()) == [("bread", False)]


@pytest.mark.compat(
    kind="talk",
    what="kill -9 right behind the confirmation of a timer",
    happens="the timer is kept",
)
def test_a_process_that_is_killed_has_lost_nothing_it_confirmed(tmp_path):
    program = (
        "import sys, time; from edge_gemma.assistant.timers import Timers\n"
        "timers = Timers(sys.argv[1])\n"
        "for n in range(1, 100):\n"
        "    timers.set(60 + n, f'number {n}')\n"
        "    print(n, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        confirmed = 0
        while confirmed < 20:
            confirmed = int(process.stdout.readline())
        with pytest.raises(UsageError, match="another assistant runs with the folder"):
            Timers(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        confirmed = int((process.stdout.read().split() or [confirmed])[-1])
    with Timers(tmp_path) as timers:
        assert timers.problem == ""
        kept = {timer.label for timer in timers.all()}
        assert {f"number {n}" for n in range(1, confirmed + 1)} <= kept


@pytest.mark.parametrize("jump_s", [-7200, -5, 5, 7200, 1e6])
def test_a_clock_that_is_set_moves_no_timer(tmp_path, clocks, jump_s):
    with clocks.timers(tmp_path) as timers:
        timers.set(600, "tea")
        clocks.pass_by(300)
        clocks.set_by(jump_s)
        clocks.pass_by(299)
        assert timers.due() == []
        clocks.pass_by(1)
        assert labels(timers.due()) == [("tea", False)]
        clocks.set_by(-jump_s)
        assert labels(timers.due()) == [("tea", False)]  # what rings does not fall silent


def test_alarms_go_by_the_clock(tmp_path, clocks):
    with clocks.timers(tmp_path) as timers:
        timers.set_alarm(NOON_S + 3600, "call")
        clocks.set_by(-3600)
        clocks.pass_by(3600)
        assert timers.due() == []
        clocks.pass_by(3600)
        assert labels(timers.due()) == [("call", False)]
        timers.done(timers.due()[0].timer)
        clocks.set_by(-3600)
        assert timers.due() == []  # not a second time
        timers.set_alarm(clocks.wall_s + 60, "soon")
        clocks.set_by(3600)
        assert labels(timers.due()) == [("soon", True)]


def test_a_board_without_a_battery(tmp_path, clocks):
    """It starts with an old time, and finds the right one in the network later."""
    with clocks.timers(tmp_path) as timers:
        timers.set(600, "tea")
    clocks.pass_by(120)
    clocks.set_by(-86400)
    clocks.steady_s = 1.0
    with clocks.timers(tmp_path) as timers:
        (timer,) = timers.all()
        assert timer.at_s - clocks.wall_s == 600  # never more than it was set to
        clocks.pass_by(30)
        clocks.set_by(86400)
        (timer,) = timers.all()
        assert timer.at_s == NOON_S + 600  # as if nothing had been
        clocks.pass_by(450)
        assert labels(timers.due()) == [("tea", False)]
    # and one whose clock stays wrong through two restarts
    with clocks.timers(tmp_path) as timers:
        timers.done(timers.due()[0].timer)
        timers.set(600, "eggs")
    for _ in range(2):
        clocks.set_by(-86400)
        with clocks.timers(tmp_path) as timers:
            assert timers.all()[0].at_s - clocks.wall_s == 600
            timers.cancel(timers.set(5))  # writes the file with the wrong clock


def test_a_timer_set_before_the_clock_was_right(tmp_path, clocks):
    """A board that begins in 1970, finds the time in the network, and loses its power then."""
    clocks.wall_s = 5000.0
    with clocks.timers(tmp_path) as timers:
        timers.set(600, "tea")
        clocks.set_by(NOON_S)
        assert timers.due() == []
        clocks.pass_by(60)
    with clocks.timers(tmp_path) as timers:
        assert timers.all()[0].at_s == pytest.approx(clocks.wall_s + 540)


def test_a_daily_alarm_comes_back(tmp_path, clocks):
    with clocks.timers(tmp_path) as timers:
        timers.set_alarm(NOON_S + 60, "pills", daily=True)
        clocks.pass_by(60)
        timers.done(timers.due()[0].timer)
        assert [t.at_s for t in timers.all()] == [NOON_S + 60 + 86400] and timers.due() == []
    clocks.pass_by(3.5 * 86400)
    with clocks.timers(tmp_path) as timers:
        assert labels(timers.due()) == [("pills", True)]
        timers.done(timers.due()[0].timer)
        at = datetime.fromtimestamp(timers.all()[0].at_s)
        assert at > datetime.fromtimestamp(clocks.wall_s) and (at.hour, at.minute) == (12, 1)


@pytest.mark.compat(
    kind="talk",
    what="a timers file that is cut short or holds nonsense",
    happens="kept as timers.json.broken and told; the assistant starts without timers",
)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b'{"timers": [{"id": 1}]}',
        b'{"timers": [{"id": 1, "kind": "timer", "at_s": 1e300}]}',
        b'{"timers": [{"id": 1, "kind": "bomb", "at_s": 1}]}',
        b"\xff\x00\xfe",
        b"[" * 100_000,
        b" " * (1 << 21),
    ],
)
def test_a_broken_file(tmp_path, clocks, data):
    (tmp_path / "timers.json").write_bytes(data)
    with clocks.timers(tmp_path) as timers:
        assert "timers.json was broken" in timers.problem and timers.all() == []
        timers.set(5, "tea")
    assert (tmp_path / "timers.json.broken").read_bytes() == data
    with clocks.timers(tmp_path) as timers:
        assert timers.problem == "" and timers.all()[0].label == "tea"


def test_a_file_cut_at_every_byte(tmp_path, clocks):
    with clocks.timers(tmp_path) as timers:
        timers.set(600, "tea")
    data = (tmp_path / "timers.json").read_bytes()
    for n in range(0, len(data.rstrip()), 7):
        (tmp_path / "timers.json").write_bytes(data[:n])
        with clocks.timers(tmp_path) as timers:
            assert timers.problem and timers.all() == []


def test_what_cannot_be_a_timer(tmp_path, clocks):
    with clocks.timers(tmp_path) as timers:
        for seconds in (0, -5, 1e12, float("nan"), float("inf")):
            with pytest.raises(UsageError, match="expected 1 second to 366 days"):
                timers.set(seconds)
        for at_s in (NOON_S, NOON_S - 5, 1e300, float("nan")):
            with pytest.raises(UsageError, match="expected up to 366 days"):
                timers.set_alarm(at_s)
        timers.set(60, "x" * 10_000 + "\ud800")
        assert len(timers.all()[0].label) <= 100
        for _ in range(99):
            timers.set(60)
        with pytest.raises(UsageError, match="100 timers already"):
            timers.set(60)
        assert not timers.cancel(Timer(12345, "timer", 0.0))


def test_a_disk_that_refuses(tmp_path, clocks, monkeypatch):
    def refuse(path, value):
        raise RuntimeFailure(f"cannot write {path}: No space left on device")

    with clocks.timers(tmp_path) as timers:
        timers.set(60, "tea")
        monkeypatch.setattr("edge_gemma.assistant.timers.write_state", refuse)
        with pytest.raises(RuntimeFailure, match="No space left"):
            timers.set(60, "bread")
        assert [timer.label for timer in timers.all()] == ["tea"]  # not promised, not kept
        clocks.pass_by(60)
        timers.done(timers.due()[0].timer)
        assert "No space left" in timers.problem and timers.due() == []


def test_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make the folder"):
        Timers(tmp_path / "file" / "below")


def test_the_real_clocks(tmp_path):
    with Timers(tmp_path) as timers:
        timer = timers.set(1, "now")
        until = time.monotonic() + 20
        while not timers.due() and time.monotonic() < until:
            time.sleep(0.02)
        assert timers.due()[0].timer == timer
