"""The tools an assistant has without a file: time, timers and alarms, volume, a shopping list, and
what it can do.

In: timers and the folder they are kept in. Out: functions for a :class:`Toolbox`. Descriptions are
short: every turn's prompt holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal

import msgspec

from edge_gemma.assistant import volume
from edge_gemma.assistant.state import made_folder, read_state, write_state
from edge_gemma.assistant.timers import Timer, Timers
from edge_gemma.assistant.tool import Tool, ToolError
from edge_gemma.assistant.tools import Toolbox

_MAX_ITEMS = 200
_MAX_ITEM_CHARS = 100
_PerCent = Annotated[int, msgspec.Meta(ge=0, le=100)]


def builtin_tools(
    timers: Timers, folder: str | PathLike[str], others: Iterable[Tool] = ()
) -> Toolbox:
    """All of them, and ``others`` behind them. ``folder`` holds the shopping list. Raises
    UsageError.
    """
    shopping = ShoppingList(folder)
    functions: list[Callable[..., Any]] = [
        time_and_date,
        *_timer_tools(timers),
        set_volume,
        shopping.shopping_list,
    ]
    mine = Toolbox([*functions, *others])

    def what_can_you_do() -> list[str]:
        """What you can do for the user."""
        return [str(spec["description"]).split("\n")[0] for spec in mine.specs]

    return Toolbox([*mine.tools, what_can_you_do])


def time_and_date() -> str:
    """The time of day, the weekday and the date."""
    now = datetime.now().astimezone()
    return f"{now:%H:%M}, {now:%A}, {now:%Y-%m-%d}, time zone {now:%Z}"


def set_volume(
    per_cent: _PerCent | None = None,
    change: Annotated[int, msgspec.Meta(ge=-100, le=100)] | None = None,
) -> str:
    """Set the loudness to per_cent (0 to 100), or change it by so much; neither tells it."""
    if change is not None and per_cent is None:
        per_cent = max(0, min(100, volume.get_volume() + change))
    if per_cent is None:
        return f"{volume.get_volume()} per cent"
    return f"{volume.set_volume(per_cent)} per cent now"


def _timer_tools(timers: Timers) -> list[Callable[..., Any]]:
    def set_timer(hours: float = 0, minutes: float = 0, seconds: float = 0, label: str = "") -> str:
        """Set a timer that rings after a while."""
        timer = timers.set(3600 * hours + 60 * minutes + seconds, label)
        return f"set: {_told(timer)}"

    def set_alarm(
        time: Annotated[str, "HH:MM, 24 hours"],
        label: str = "",
        daily: bool = False,
        date: Annotated[str, "YYYY-MM-DD; empty: the next time it is so late"] = "",
    ) -> str:
        """Set an alarm that rings at a time of day."""
        timer = timers.set_alarm(_moment(time, date), label, daily=daily)
        return f"set: {_told(timer)}"

    def list_timers() -> list[str]:
        """The timers and alarms that are set."""
        return [_told(timer) for timer in timers.all()]

    def cancel_timer(label: Annotated[str, "its label or number, or all"] = "") -> str:
        """Cancel a timer or an alarm."""
        chosen = _chosen(timers.all(), label)
        for timer in chosen:
            timers.cancel(timer)
        return "cancelled: " + "; ".join(map(_told, chosen))

    return [set_timer, set_alarm, list_timers, cancel_timer]


def _told(timer: Timer) -> str:
    at = datetime.fromtimestamp(timer.at_s)
    day = "every day" if timer.daily else f"{at:%A %Y-%m-%d}"
    label = f" {timer.label!r}" if timer.label else ""
    left_s = max(0, round(timer.at_s - datetime.now().timestamp()))
    return (
        f"{timer.kind} {timer.id}{label} at {at:%H:%M:%S} {day}, {timedelta(seconds=left_s)} left"
    )


def _moment(time: str, date: str) -> float:
    """Unix time of a time of day. Raises ToolError."""
    now = datetime.now()
    try:
        of_day = datetime.strptime(time.strip(), "%H:%M").time()
        day = datetime.strptime(date.strip(), "%Y-%m-%d").date() if date.strip() else now.date()
        at = datetime.combine(day, of_day)
        if not date.strip() and at <= now:
            at += timedelta(days=1)
        return at.timestamp()
    except (ValueError, OverflowError, OSError):
        raise ToolError(
            f"no alarm was set for {date} {time}: expected HH:MM like 07:30, and a date like "
            "2026-12-24"
        ) from None


def _chosen(timers: list[Timer], label: str) -> list[Timer]:
    """Those meant by a label, a number or "all"; without one the only one. Raises ToolError."""
    wanted = label.strip().casefold()
    if wanted == "all":
        found = timers
    elif not wanted:
        found = timers[:1] if len(timers) == 1 else []
    else:
        named = [timer for timer in timers if timer.label.casefold() == wanted]
        found = named or [timer for timer in timers if str(timer.id) == wanted]
    if found:
        return found
    set_ones = "; ".join(map(_told, timers)) or "none"
    raise ToolError(f"no timer {label!r} was found; set are: {set_ones}")


class ShoppingList:
    """The list in ``folder/shopping.json``. Raises UsageError; ``problem`` is what was wrong with
    the file, "" where nothing was; the next call tells it.
    """

    def __init__(self, folder: str | PathLike[str]):
        self._path, self._lock = made_folder(Path(folder)) / "shopping.json", Lock()
        self._items, self.problem = read_state(self._path, list[str], [])

    def shopping_list(
        self, action: Literal["read", "add", "remove", "clear"], items: list[str] | None = None
    ) -> dict[str, Any]:
        """Read, add to, remove from or clear the shopping list."""
        wanted = [" ".join(item.split())[:_MAX_ITEM_CHARS] for item in items or [] if item.strip()]
        with self._lock:
            before = list(self._items)
            missing = self._change(action, wanted)
            if self._items != before:
                try:
                    write_state(self._path, self._items)
                except Exception:
                    self._items = before
                    raise
            told: dict[str, Any] = {"list": list(self._items)}
            problem, self.problem = self.problem, ""  # told once
        notes = {"not_on_it": missing, "note": problem}
        return told | {key: value for key, value in notes.items() if value}

    def _change(self, action: str, wanted: list[str]) -> list[str]:
        """Returns what was to be removed and is not on the list."""
        there = {item.casefold() for item in self._items}
        if action == "clear":
            self._items = []
        elif action == "add":
            new = {item.casefold(): item for item in wanted if item.casefold() not in there}
            if len(self._items) + len(new) > _MAX_ITEMS:
                raise ToolError(f"the list has {len(self._items)} items; at most {_MAX_ITEMS}")
            self._items = [*self._items, *new.values()]
        elif action == "remove":
            gone = {item.casefold() for item in wanted}
            self._items = [item for item in self._items if item.casefold() not in gone]
            return [item for item in wanted if item.casefold() not in there]
        return []
