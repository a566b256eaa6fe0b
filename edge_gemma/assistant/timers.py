"""Timers and alarms that ring, also after a restart.

In: a folder. Out: :class:`Ring` for each whose time has come. Every change is on the disk before it
is confirmed; a power cut loses none. Wherever the clock is set to while this runs, a timer of ten
minutes takes ten minutes, and an alarm at seven rings at seven by the clock.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from os import PathLike
from pathlib import Path
from typing import Annotated, Literal

import filelock
import msgspec

from edge_gemma.assistant.state import made_folder, read_state, write_state
from edge_gemma.errors import RuntimeFailure, UsageError

MISSED_AFTER_S = 60.0  # later than this is told as missed
MAX_TIMERS = 100
MAX_SECONDS = 366 * 24 * 3600
_MAX_LABEL_CHARS = 100
_JUMP_S = 2.0  # what a clock that is set differs by at least; slewing is less

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e11)]  # what datetime can show


class Timer(msgspec.Struct, frozen=True):
    """``at_s`` is Unix time; ``seconds`` is what a timer was set to, 0 for an alarm; a ``daily``
    alarm comes back.
    """

    id: int
    kind: Literal["timer", "alarm"]
    at_s: _Seconds
    label: str = ""
    seconds: _Seconds = 0.0
    daily: bool = False


class Ring(msgspec.Struct, frozen=True):
    """A timer whose time has come, ``late_s`` seconds ago. ``missed``: nothing could ring then."""

    timer: Timer
    late_s: float

    @property
    def missed(self) -> bool:
        return self.late_s > MISSED_AFTER_S


class _Saved(msgspec.Struct):
    """The file. ``saved_s`` is the clock when it was written: a board without a battery may start
    with an earlier one.
    """

    saved_s: float = 0.0
    next_id: int = 1
    timers: list[Timer] = []


def steady_clock() -> float:
    """Seconds that no setting of the clock changes, and that a sleeping machine counts, too."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Timers:
    """The timers in ``folder/timers.json``. From any thread. A second process on the same folder is
    refused. Close it.

    ``problem`` says what was wrong with the file, "" where nothing was. Raises UsageError (the
    folder is in use or may not be written).

    >>> timers = Timers(getfixture("tmp_path"), clock=lambda: 1000.0)
    >>> timer = timers.set(600, "tea")
    >>> timers.due(), [timer.label for timer in timers.all()]
    ([], ['tea'])
    >>> timers.close()
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = steady_clock,
    ):
        self._path = made_folder(Path(folder)) / "timers.json"
        self._clock, self._steady = clock, steady
        self._lock = threading.RLock()
        lock = self._path.with_suffix(".lock")
        self._in_use = filelock.FileLock(lock, timeout=0, thread_local=False)
        try:
            self._in_use.acquire()
        except filelock.Timeout:
            raise UsageError(
                f"another assistant runs with the folder {folder}; end it, or give this one a "
                "folder of its own"
            ) from None
        except OSError as error:
            raise UsageError(f"cannot write in {folder}: {error.strerror}") from None
        try:
            saved, self.problem = read_state(self._path, _Saved, _Saved())
        except UsageError:
            self._in_use.release()
            raise
        self._next_id = max([saved.next_id, *(timer.id + 1 for timer in saved.timers)])
        self._offset_s = clock() - steady()  # how it stood when last looked at
        self._timers = {timer.id: timer for timer in saved.timers[:MAX_TIMERS]}
        self._loaded = set(self._timers)  # set before this process began
        # by how much later than at_s those ring: the clock stands before the time of saving
        self._shift_s = {
            timer.id: _shift_s(timer, clock(), saved.saved_s)
            for timer in saved.timers
            if timer.kind == "timer"
        }
        self._late_s: dict[int, float] = {}  # of those that were due when first looked at

    def set(self, seconds: float, label: str = "") -> Timer:
        """A timer from now. Raises UsageError (1 s … 366 days, at most 100), RuntimeFailure (the
        disk).
        """
        if not 1 <= seconds <= MAX_SECONDS:
            raise UsageError(f"a timer of {seconds:g} seconds; expected 1 second to 366 days")
        return self._added("timer", self._clock() + seconds, label, seconds=seconds)

    def set_alarm(self, at_s: float, label: str = "", *, daily: bool = False) -> Timer:
        """An alarm at a time of the clock (Unix time). Raises as :meth:`set`."""
        ahead_s = at_s - self._clock()
        if not 0 < ahead_s <= MAX_SECONDS:
            raise UsageError(f"an alarm {ahead_s:.0f} seconds from now; expected up to 366 days")
        return self._added("alarm", at_s, label, daily=daily)

    def _added(
        self,
        kind: Literal["timer", "alarm"],
        at_s: float,
        label: str,
        *,
        seconds: float = 0.0,
        daily: bool = False,
    ) -> Timer:
        with self._lock:
            self._follow_clock()
            if len(self._timers) >= MAX_TIMERS:
                raise UsageError(f"there are {MAX_TIMERS} timers already; cancel some first")
            label = " ".join(label.split())[:_MAX_LABEL_CHARS]
            label = label.encode("utf-8", "replace").decode()
            timer = Timer(self._next_id, kind, at_s, label, seconds, daily)
            self._timers[timer.id] = timer
            self._next_id += 1
            try:
                self._save()
            except RuntimeFailure:
                del self._timers[timer.id]
                raise
            return timer

    def cancel(self, timer: Timer) -> bool:
        """Whether it was still there. Raises RuntimeFailure; it is gone all the same."""
        with self._lock:
            found = self._timers.pop(timer.id, None)
            if found is not None:
                self._save()
            return found is not None

    def all(self) -> list[Timer]:
        """The next to ring first; ``at_s`` by the clock as it stands now."""
        with self._lock:
            self._follow_clock()
            now = [
                msgspec.structs.replace(timer, at_s=self._rings_at(timer))
                for timer in self._timers.values()
            ]
            return sorted(now, key=lambda timer: timer.at_s)

    def due(self) -> list[Ring]:
        """Those whose time has come, the oldest first, until :meth:`done` is called for each. Cheap
        enough for every block of sound.
        """
        with self._lock:
            self._follow_clock()
            now = self._clock()
            found = []
            for timer in self._timers.values():
                late_s = now - self._rings_at(timer)
                if late_s >= 0 or timer.id in self._late_s:
                    found.append(Ring(timer, self._late_s.setdefault(timer.id, late_s)))
            return sorted(found, key=lambda ring: ring.timer.at_s)

    def done(self, timer: Timer) -> None:
        """It rang, or was told. A daily alarm is set for its next day. What the disk refuses is in
        ``problem``: it would ring again after a restart.
        """
        with self._lock:
            found = self._timers.pop(timer.id, None)
            if found is None:
                return
            self._late_s.pop(found.id, None)
            if found.daily:
                self._timers[found.id] = _on_its_next_day(found, self._clock())
            self._save_or_tell()

    def close(self) -> None:
        """Another process may have the folder. The timers stay in it."""
        self._in_use.release()

    def __enter__(self) -> Timers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rings_at(self, timer: Timer) -> float:
        return timer.at_s + self._shift_s.get(timer.id, 0.0)

    def _follow_clock(self) -> None:
        """Where the clock was set, move the timers (not the alarms) by as much."""
        offset_s = self._clock() - self._steady()
        jump_s = offset_s - self._offset_s
        if abs(jump_s) < _JUMP_S:
            return
        self._offset_s = offset_s
        for timer in self._timers.values():
            if timer.kind == "alarm" or timer.id in self._late_s:
                continue
            shift_s = self._shift_s.get(timer.id, 0.0) + jump_s
            if timer.id in self._loaded and jump_s > 0:
                # the clock has found the right time, which at_s was made by
                shift_s = min(0.0, shift_s)
            self._shift_s[timer.id] = shift_s
        if any(timer.id not in self._loaded for timer in self._timers.values()):
            self._save_or_tell()  # what was set by the clock of before

    def _save_or_tell(self) -> None:
        try:
            self._save()
        except RuntimeFailure as error:
            self.problem = str(error)

    def _save(self) -> None:
        timers = [
            timer
            if timer.id in self._loaded
            else msgspec.structs.replace(timer, at_s=self._rings_at(timer))
            for timer in self._timers.values()
        ]
        write_state(self._path, _Saved(self._clock(), self._next_id, timers))


def _shift_s(timer: Timer, now_s: float, saved_s: float) -> float:
    """0, or less where the clock stands before the time of saving: a timer never takes longer than
    it was set to.
    """
    return min(0.0, now_s - saved_s, now_s + timer.seconds - timer.at_s)


def _on_its_next_day(timer: Timer, now_s: float) -> Timer:
    """The same time of day, after both its last day and now."""
    last = datetime.fromtimestamp(timer.at_s)
    days = max(1, math.ceil((now_s - timer.at_s) / 86400))
    at = last + timedelta(days=days)
    while at.timestamp() <= now_s:
        at += timedelta(days=1)
    return msgspec.structs.replace(timer, at_s=at.timestamp())
