"""The arrows between rooms and the walls around foreign libraries, over the syntax tree."""

from __future__ import annotations

import re

import pytest
import rooms

GRAPH = rooms.module_graph()


def test_every_room_is_in_the_table():
    found = {rooms.room_of(module) for module in GRAPH}
    assert found - {"", "device_profiles"} == set(rooms.ROOMS)


def test_no_cycle_between_modules_or_rooms():
    assert rooms.cycles(GRAPH) == []
    assert rooms.cycles(rooms.room_graph(GRAPH)) == []


@pytest.mark.parametrize("room", rooms.ROOMS)
def test_a_room_imports_only_what_stands_before_it(room):
    allowed = set(rooms.ROOMS[: rooms.ROOMS.index(room)]) | {room}
    for module, targets in GRAPH.items():
        if rooms.room_of(module) == room:
            wrong = sorted(t for t in targets if rooms.room_of(t) not in allowed)
            assert not wrong, f"{module} imports {', '.join(wrong)}"


def test_few_floors():
    graph = rooms.room_graph(GRAPH)
    assert max(rooms.floors(graph).values()) <= 10


def test_the_runtime_never_imports_the_converter_or_the_benchmarks():
    for module, targets in GRAPH.items():
        if rooms.room_of(module) in rooms.RUNTIME:
            found = {rooms.room_of(target) for target in targets} & {"convert", "benchmarks"}
            assert not found, f"{module} imports {found}"


@pytest.mark.parametrize("library", rooms.WALLS)
def test_a_foreign_library_stays_behind_its_wall(library):
    """In the shipped runtime; benchmarks measure the libraries themselves."""
    wall = rooms.WALLS[library]
    inside = 0
    for module, path in rooms.modules().items():
        if rooms.room_of(module) == "benchmarks":
            continue
        uses = any(name.partition(".")[0] == library for name in rooms.imports(path))
        assert not uses or module.startswith(wall), f"{module} imports {library}"
        inside += uses
    assert inside


# `low` and `sd` are llama_cpp and sounddevice, which offer no public way to what is needed
PRIVATE = re.compile(r"\b(?!self\b|cls\b|low\b|sd\b|_)(\w+)\._(?!_)[a-z]\w*")


def test_nobody_reaches_into_another_classs_underscores():
    """``other._name`` outside its module, in the runtime. Methods on ``self`` are one's own."""
    found = []
    for module, path in rooms.modules().items():
        if rooms.room_of(module) not in rooms.RUNTIME:
            continue
        text = path.read_text("utf-8")
        for match in PRIVATE.finditer(text):
            name = match[0].partition(".")[2]
            defined_here = re.search(rf"(self\.{name}\b.*=|def {name}\b|^{name}\b)", text, re.M)
            if not defined_here:
                found.append(f"{module}: {match[0]}")
    assert not found, found


def test_the_command_prints_the_floors(capsys):
    rooms.main()
    out = capsys.readouterr().out
    assert "cycles between modules: 0, between rooms: 0" in out
