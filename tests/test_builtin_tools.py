"""The assistant's own tools: what they say, what they keep, and nonsense from the model."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime, timedelta

import pytest

from edge_gemma import FunctionCall
from edge_gemma.assistant import builtin_tools as module
from edge_gemma.assistant.builtin_tools import ShoppingList, builtin_tools
from edge_gemma.assistant.timers import Timers
from edge_gemma.assistant.tool import Tool
from edge_gemma.errors import RuntimeFailure


@pytest.fixture
def timers(tmp_path):
    with Timers(tmp_path) as opened:
        yield opened


@pytest.fixture
def call(timers, tmp_path):
    toolbox = builtin_tools(timers, tmp_path)
    return lambda name, **parameters: toolbox.call(FunctionCall(name, parameters))


def test_time_and_date(call):
    text = call("time_and_date").text
    assert re.fullmatch(r"\d\d:\d\d, \w+day, \d{4}-\d\d-\d\d, time zone .+", text)


def test_timers_by_call(call, timers):
    assert call("set_timer", minutes="1.5", label="tea").text.startswith("set: timer 1 'tea' at ")
    assert timers.all()[0].seconds == 90
    call("set_timer", hours=1, label="Bread")
    listed = json.loads(call("list_timers").text)
    assert len(listed) == 2 and "'tea'" in listed[0] and "left" in listed[1]
    unclear = call("cancel_timer")
    assert not unclear.ok and "'Bread'" in unclear.note
    assert call("cancel_timer", label="bread").text.startswith("cancelled: timer 2 'Bread'")
    assert call("cancel_timer", label="1").ok and timers.all() == []
    call("set_timer", seconds=60)
    assert call("cancel_timer").ok  # the only one needs no name
    call("set_timer", seconds=60)
    call("set_timer", seconds=60)
    assert call("cancel_timer", label="all").ok and timers.all() == []
    assert call("cancel_timer", label="all").note == "no timer 'all' was found; set are: none"


def test_alarms_by_call(call, timers):
    soon = datetime.now() + timedelta(minutes=61)
    assert call("set_alarm", time=f"{soon:%H:%M}", label="call", daily=True).ok
    (alarm,) = timers.all()
    assert alarm.daily and 0 < alarm.at_s - datetime.now().timestamp() <= 61 * 60
    past = datetime.now() - timedelta(minutes=1)
    call("set_alarm", time=f"{past:%H:%M}")
    assert timers.all()[1].at_s - datetime.now().timestamp() > 23 * 3600 - 60  # tomorrow
    day = datetime.now().date() + timedelta(days=40)
    assert call("set_alarm", time="07:30", date=str(day)).ok
    assert datetime.fromtimestamp(timers.all()[2].at_s).date() == day


@pytest.mark.compat(
    kind="talk",
    what="timers and alarms that make no sense: 0 seconds, 25:00, the 31st of February, yesterday",
    happens="refused in a sentence to the model that says what is expected",
)
@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("set_timer", {}, "expected 1 second to 366 days"),
        ("set_timer", {"minutes": -3}, "expected 1 second to 366 days"),
        ("set_timer", {"hours": 1e308}, "expected 1 second to 366 days"),
        ("set_timer", {"minutes": "three"}, "Expected `float`, got `str`"),
        ("set_alarm", {"time": "25:00"}, "expected HH:MM like 07:30"),
        ("set_alarm", {"time": "noon"}, "expected HH:MM like 07:30"),
        ("set_alarm", {"time": "07:00", "date": "2027-02-31"}, "expected HH:MM"),
        ("set_alarm", {"time": "07:00", "date": "2020-01-01"}, "expected up to 366 days"),
        ("set_alarm", {"time": "07:00", "date": "9999-12-31"}, "expected"),
        ("set_alarm", {}, "missing required field `time`"),
        ("set_volume", {"per_cent": 101}, "Expected `int` <= 100"),
        ("shopping_list", {"action": "burn"}, "Invalid enum value 'burn'"),
        ("shopping_list", {"action": "add", "items": "milk"}, "Expected `array | null`"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(call, timers, name, parameters, says):
    result = call(name, **parameters)
    assert not result.ok and says in result.note and timers.all() == []


def test_a_shopping_list_outlives_a_restart(call, tmp_path):
    assert json.loads(call("shopping_list", action="read").text) == {"list": []}
    call("shopping_list", action="add", items=["milk", "  two  eggs ", "", "Milk"])
    told = json.loads(call("shopping_list", action="remove", items=["MILK", "bread"]).text)
    assert told == {"list": ["two eggs"], "not_on_it": ["bread"]}
    again = ShoppingList(tmp_path)
    assert again.shopping_list("read") == {"list": ["two eggs"]}
    assert again.shopping_list("clear") == {"list": []}
    assert ShoppingList(tmp_path).shopping_list("read") == {"list": []}


def test_a_shopping_list_that_is_full_or_broken(tmp_path, monkeypatch):
    shopping = ShoppingList(tmp_path)
    shopping.shopping_list("add", ["x" * 1000])
    assert len(shopping.shopping_list("read")["list"][0]) == 100
    with pytest.raises(Exception, match="at most 200"):
        shopping.shopping_list("add", [str(n) for n in range(500)])

    def refuse(path, value):
        raise RuntimeFailure("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_state", refuse)
        with pytest.raises(RuntimeFailure):
            shopping.shopping_list("clear")
    assert len(shopping.shopping_list("read")["list"]) == 1  # not said, not done
    (tmp_path / "shopping.json").write_text('["mi')
    broken = ShoppingList(tmp_path)
    assert "shopping.json was broken" in broken.problem
    told = broken.shopping_list("read")
    assert told["list"] == [] and "shopping.json was broken" in told["note"]
    assert broken.shopping_list("read") == {"list": []}


def test_what_can_you_do(timers, tmp_path):
    lamp = Tool("lamp", "Switch the lamp.\nMore of it.", {}, lambda _: None)
    toolbox = builtin_tools(timers, tmp_path, [lamp])
    told = json.loads(toolbox.call(FunctionCall("what_can_you_do")).text)
    assert "Switch the lamp." in told and "Set a timer that rings after a while." in told
    assert len(json.dumps(builtin_tools(timers, tmp_path).specs)) < 3000  # every prompt holds it


# ---- volume


def program(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


PACTL = """
case "$1" in
  get-sink-volume) /bin/cat {0}/now ;;
  set-sink-volume) echo "Volume: front-left: 1 / $3 / -7 dB" > {0}/now ;;
  *) echo "no such command" >&2; exit 1 ;;
esac
"""


def test_volume_by_pactl(call, programs):
    (programs / "now").write_text("Volume: front-left: 36044 /  55% / -15.58 dB\n")
    program(programs, "pactl", PACTL.format(programs))
    assert call("set_volume").text == "55 per cent"
    assert call("set_volume", per_cent=30).text == "30 per cent now"
    assert call("set_volume", change=-50).text == "0 per cent now"


def test_volume_by_the_next_program_where_one_fails(call, programs):
    program(programs, "wpctl", 'echo "Could not connect to PipeWire" >&2; exit 2')
    program(programs, "amixer", 'echo "  Mono: Playback 20 [40%] [on]"')
    assert call("set_volume", per_cent=40).text == "40 per cent now"
    program(programs, "wpctl", 'echo "Volume: 0.35 [MUTED]"')
    assert call("set_volume").text == "35 per cent"


@pytest.mark.compat(
    kind="talk",
    what="the volume on a machine without wpctl, pactl and amixer, or without a loudspeaker",
    happens="refused, and the programs are named",
)
def test_no_volume(call, programs):
    assert call("set_volume", per_cent=5).note == (
        "the volume cannot be set: none of wpctl, pactl, amixer is installed on this machine"
    )
    program(programs, "pactl", 'echo "Connection refused" >&2; exit 1')
    program(programs, "amixer", "echo nothing")
    note = call("set_volume", per_cent=5).note
    assert "pactl: Connection refused; amixer: it did not say the volume" in note


def test_nothing_is_left_in_the_folder_but_its_files(call, tmp_path):
    call("set_timer", seconds=60)
    call("shopping_list", action="add", items=["milk"])
    assert set(os.listdir(tmp_path)) == {"timers.json", "timers.lock", "shopping.json"}
