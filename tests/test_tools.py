"""Tools out of functions and files: schemas, checked arguments, and whatever a tool may do."""

from __future__ import annotations

import enum
import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any, Literal

import pytest

from edge_gemma import FunctionCall, tool_schema
from edge_gemma.assistant.tool import MAX_CHARS, dangerous
from edge_gemma.assistant.tools import Tool, Toolbox, ToolError
from edge_gemma.errors import UsageError


def call(toolbox, name, **parameters):
    return toolbox.call(FunctionCall(name, parameters))


def tool_file(folder, text, name="tools.py"):
    path = folder / name
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return path


# ---- schemas


class Room(enum.Enum):
    KITCHEN = "kitchen"
    HALL = "hall"


@dataclass
class Colour:
    red: int
    green: int = 0


def test_a_signature_becomes_a_schema():
    def light(
        room: Room,
        level: Annotated[int, "per cent"],
        mode: Literal["warm", "cold"] = "warm",
        colour: Colour | None = None,
        names: list[str] = [],  # noqa: B006
    ) -> str:
        """Switch a light.

        Args: as above.
        """
        return f"{room.name} {level} {mode} {colour} {names}"

    toolbox = Toolbox([light])
    (spec,) = toolbox.specs
    assert spec["description"] == "Switch a light.\n\nArgs: as above."
    properties = spec["parameters"]["properties"]
    assert properties["level"] == {"type": "integer", "description": "per cent"}
    assert properties["mode"] == {"enum": ["cold", "warm"], "default": "warm"}
    assert properties["room"]["enum"] == ["hall", "kitchen"]
    assert spec["parameters"]["required"] == ["room", "level"]
    assert "$ref" not in json.dumps(spec)
    assert tool_schema(toolbox.specs)["properties"]["name"] == {"const": "light"}
    done = call(toolbox, "light", room="hall", level="20", colour={"red": 3})
    assert done.ok and done.text == "HALL 20 warm Colour(red=3, green=0) []"
    for wrong in ({"room": "attic", "level": 1}, {"room": "hall"}, {"x": 1}, {"level": None}):
        refused = call(toolbox, "light", **wrong)
        assert not refused.ok and refused.text.startswith("Error: light was not called: ")
    assert call(toolbox, "lamp").note == "there is no tool 'lamp'; there are: light"


def test_async_functions_and_defaults_that_no_json_fits():
    marker = object()

    async def wait(marker: Any = marker) -> bool:
        "Wait a little."
        return marker is not None

    assert call(Toolbox([wait]), "wait").text == "true"


def no_hint(x):
    "No hint."


def no_docstring(x: int) -> None:
    pass


def many(*x: int) -> None:
    "Many."


def keywords(**x: int) -> None:
    "Keywords."


def before(x: int, /) -> None:
    "Positional."


def odd(x: threading.Event) -> None:
    "Something no JSON fits."


def unknown(x: NoSuchName) -> None:  # noqa: F821
    "A hint that does not exist."


@dataclass
class Nested:
    inside: list[Nested]


def recursive(x: Nested) -> None:
    "Holds itself."


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (no_hint, "its parameter 'x' has no type hint; write x: str"),
        (no_docstring, "has no docstring, so a model cannot know"),
        (many, "a tool's parameters have names"),
        (keywords, "a tool's parameters have names"),
        (before, "a tool's parameters have names"),
        (odd, "has a parameter that no JSON fits"),
        (unknown, "has hints that cannot be read"),
        (recursive, "holds itself"),
        (len, "takes obj; a tool"),
        (object(), "has no docstring"),
    ],
)
def test_functions_that_are_no_tools(function, says):
    with pytest.raises(UsageError, match=says):
        Toolbox([function])


# ---- files

GOOD = """
import os
from typing import Annotated

def add(a: int, b: Annotated[int, "the other"] = 1) -> int:
    "Add."
    return a + b

def _helper(x):
    return x

def wipe() -> None:
    "Wipe the disk."
wipe.dangerous = "Shall I wipe it?"
wipe.timeout_s = 2
"""


def test_a_python_file(tmp_path):
    toolbox = Toolbox.from_file(tool_file(tmp_path, GOOD))
    assert [spec["name"] for spec in toolbox.specs] == ["add", "wipe"]
    assert call(toolbox, "add", a=2).text == "3"
    assert toolbox.question(FunctionCall("wipe")) == "Shall I wipe it?"
    assert not toolbox.question(FunctionCall("add"))
    assert not toolbox.question(FunctionCall("nothing"))
    only = Toolbox.from_file(tool_file(tmp_path, GOOD + '__all__ = ["add"]'))
    assert len(only) == 1


@pytest.mark.compat(
    kind="talk",
    what="--tools with a file that is not Python, raises, or has functions without hints",
    happens="refused before the model is loaded, with file, line and what is missing",
)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def (", r"tools.py, line 1, could not be run: SyntaxError"),
        (b"\x7fELF\x02\x01\x00\x00\xff", "could not be run: SyntaxError"),
        ("import nothing_like_it", r"line 1, could not be run: ModuleNotFoundError"),
        ("\n\n1/0", r"line 3, could not be run: ZeroDivisionError"),
        ("raise SystemExit(3)", "could not be run: SystemExit"),
        ("", "defines no public function"),
        ("x = 3\nfrom os.path import join", "defines no public function"),
        ("def f(x): 'Doc.'", r"tools.py, line 1: f: its parameter 'x' has no type hint"),
        ("def f(x: int): pass", "line 1: f has no docstring"),
        ("def f(): 'D.'\nf.timeout_s = 'long'", "timeout_s is 'long'"),
        ("def f(): 'D.'\nf.dangerous = 3", "dangerous is 3"),
        ("def f(): 'D.'\ng = f\n__all__ = ['f', 'g']", "two tools are called 'f'"),
    ],
)
def test_files_that_are_no_tools(tmp_path, text, says):
    with pytest.raises(UsageError, match=says):
        Toolbox.from_file(tool_file(tmp_path, text))


def test_paths_that_are_no_tool_files(tmp_path):
    for path in (tmp_path, tmp_path / "missing.py", "https://example.org/tools.py"):
        with pytest.raises(UsageError, match="is no file; tools come from a local"):
            Toolbox.from_file(path)
    with pytest.raises(UsageError, match="expected FILE.py or FILE.json"):
        Toolbox.from_file(tool_file(tmp_path, "x", "tools.toml"))


def test_a_name_twice_in_two_files(tmp_path):
    first = Toolbox.from_file(tool_file(tmp_path, GOOD))
    with pytest.raises(UsageError, match="two tools are called 'add'"):
        _ = first + Toolbox.from_file(tool_file(tmp_path, GOOD, "again.py"))


# ---- what a tool may do


def raising() -> None:
    "Raise."
    raise KeyError("no such\nlamp")


def telling() -> None:
    "Raise for the user."
    raise ToolError("the lamp does not answer")


def leaving() -> None:
    "Leave."
    raise SystemExit(1)


def interrupting() -> None:
    "As Ctrl-C."
    raise KeyboardInterrupt


def deep() -> None:
    "Recurse."
    deep()


def big() -> str:
    "10 MB."
    return "x" * 10_000_000


def big_list() -> list[int]:
    "A list of 10 MB."
    return list(range(1_500_000))


def not_json() -> object:
    "No JSON."
    return threading.Event()


def circular() -> list[Any]:
    "Holds itself."
    found: list[Any] = []
    found.append(found)
    return found


def surrogate() -> str:
    "Half a pair."
    return "a\ud800b"


def structure() -> Colour:
    "A dataclass."
    return Colour(1)


HARMLESS = Toolbox(
    [raising, telling, leaving, interrupting, deep]
    + [big, big_list, not_json, circular, surrogate, structure]
)


@pytest.mark.compat(
    kind="talk",
    what="a tool that raises, leaves, recurses, or returns what is not JSON",
    happens="a sentence for the model and the user; the conversation goes on",
)
@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("raising", "raising failed with KeyError: 'no such\\nlamp'"),
        ("telling", "the lamp does not answer"),
        ("leaving", "leaving failed with SystemExit: 1"),
        ("interrupting", "interrupting failed with KeyboardInterrupt: KeyboardInterrupt"),
        ("deep", "deep failed with RecursionError: maximum recursion depth exceeded"),
        ("not_json", "not_json returned a Event, which is not JSON"),
        ("circular", "circular returned a list, which is not JSON"),
    ],
)
def test_tools_that_fail(name, note):
    result = call(HARMLESS, name)
    assert (result.ok, result.note, result.text) == (False, note, f"Error: {note}")


def test_calls_leave_no_thread():
    for _ in range(5):
        for spec in HARMLESS.specs:
            call(HARMLESS, spec["name"])
    assert not [t for t in threading.enumerate() if t.name == "edge-gemma-tool"]


def test_results_that_are_text():
    assert call(HARMLESS, "surrogate").text == "a?b"
    assert call(HARMLESS, "structure").text == '{"red":1,"green":0}'
    assert Toolbox([no_result]).call(FunctionCall("no_result")).text == "done"


def no_result() -> None:
    "Nothing."


@pytest.mark.compat(
    kind="talk",
    what="a tool that returns 10 MB",
    happens=f"the first {MAX_CHARS} characters are used, and it is told",
)
@pytest.mark.parametrize("name", ["big", "big_list"])
def test_a_result_of_10_mb(name):
    result = call(HARMLESS, name)
    assert result.ok and len(result.text) < MAX_CHARS + 100
    assert (
        result.note.endswith("characters; the first 4000 are used") and result.note in result.text
    )


@pytest.mark.compat(
    kind="talk",
    what="a tool that hangs",
    happens="given up after its time-out (10 s unless it says otherwise); one thread stays behind, "
    "and the tool is refused until it ends",
)
def test_a_tool_that_hangs():
    gate = threading.Event()
    toolbox = Toolbox([Tool("hang", "Hang.", {}, lambda _: gate.wait(60) and None, timeout_s=0.05)])
    assert call(toolbox, "hang").note == "hang did not answer within 0.05 seconds"
    for _ in range(3):
        assert call(toolbox, "hang").note == "hang still hangs in the call before"
    stuck = [t for t in threading.enumerate() if t.name == "edge-gemma-tool"]
    assert len(stuck) == 1 and stuck[0].daemon
    gate.set()
    stuck[0].join(20)
    assert call(toolbox, "hang").text == "done"


def test_a_call_that_the_user_interrupts():
    gate, stopped = threading.Event(), threading.Event()

    def run(_):
        stopped.set()
        gate.wait(60)

    toolbox = Toolbox([Tool("slow", "Slow.", {}, run, timeout_s=60)])
    began = time.monotonic()
    result = toolbox.call(FunctionCall("slow"), stopped)
    gate.set()
    assert result.note == "the user interrupted; slow may still be going on"
    assert time.monotonic() - began < 30


@dangerous
def unlock() -> None:
    "Unlock the door."


def test_what_is_dangerous_is_asked():
    assert Toolbox([unlock]).question(FunctionCall("unlock")) is True


# ---- HTTP


class House(BaseHTTPRequestHandler):
    """Says what it was asked; some paths misbehave."""

    def do_POST(self):
        n = int(self.headers.get("Content-Length") or 0)
        asked = {
            "method": self.command,
            "path": self.path,
            "token": self.headers.get("Authorization"),
            "body": json.loads(self.rfile.read(n) or b"null"),
        }
        if self.path == "/big":
            return self._say(200, b"x" * 10_000_000)
        if self.path == "/refuse":
            return self._say(401, b'{"message": "no token"}')
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
            return None
        if self.path == "/hang":
            self.server.gate.wait(60)
        if self.path == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"abc")
            return None
        return self._say(200, json.dumps(asked).encode())

    do_GET = do_PUT = do_DELETE = do_POST

    def _say(self, status, data):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        try:
            self.wfile.write(data)
        except ConnectionError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def house():
    server = ThreadingHTTPServer(("127.0.0.1", 0), House)
    server.gate = threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()


def http_tools(folder, *entries):
    full = [{"name": f"t{i}", "description": "D.", **entry} for i, entry in enumerate(entries)]
    return Toolbox.from_file(tool_file(folder, json.dumps(full), "tools.json"))


def test_http_tools(tmp_path, house, monkeypatch):
    monkeypatch.setenv("HOUSE_TOKEN", "secret\n")
    headers = {"Authorization": "Bearer ${HOUSE_TOKEN}"}
    toolbox = http_tools(
        tmp_path,
        {"url": house + "/light", "headers": headers, "parameters": {"required": ["on"]}},
        {"url": house + "/states/{entity}", "method": "GET"},
        {"url": house + "/off", "dangerous": True},
    )
    posted = json.loads(call(toolbox, "t0", on=True).text)
    assert posted["body"] == {"on": True} and posted["token"] == "Bearer secret"
    assert call(toolbox, "t0").note == "t0 was not called: missing is on"
    got = json.loads(call(toolbox, "t1", entity="a/../b?c", since=3).text)
    assert (got["method"], got["path"]) == ("GET", "/states/a%2F..%2Fb%3Fc?since=3")
    assert call(toolbox, "t1", entity="..").note == "the parameter 'entity' is '..'"
    assert call(toolbox, "t1").note == "the parameter 'entity' is missing"
    assert toolbox.question(FunctionCall("t2")) is True


def test_http_tools_that_fail(tmp_path, house):
    paths = ("/big", "/refuse", "/redirect", "/cut")
    toolbox = http_tools(
        tmp_path,
        *({"url": house + path} for path in paths),
        {"url": house + "/hang", "timeout_s": 0.2},
        {"url": "http://127.0.0.1:9/"},
        {"url": "http://no.such.name.invalid/"},
    )
    results = [call(toolbox, f"t{i}") for i in range(7)]
    assert results[0].ok and "the first 4000 are used" in results[0].note
    notes = [result.note for result in results[1:]]
    assert notes[0] == 't1 was refused: 401 Unauthorized {"message": "no token"}'
    assert notes[1].startswith("t2 was refused: 302")
    assert all(
        note.startswith(f"t{i} could not be reached: ") for i, note in enumerate(notes[2:], 3)
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "Expected `array`, got `object`"),
        ("[", "truncated"),
        ("[]", "the array is empty"),
        ('[{"name": "a"}]', "missing required field `description`"),
        ("[" * 100_000, "holds no tools"),
        (b"\xff\xfe", "holds no tools"),
        ([{"url": "ftp://x"}], "expected http:// or https://"),
        ([{"url": "http://{host}/x"}], "lets the model choose the host"),
        ([{"url": "http://["}], "is no address"),
        ([{"url": "file:///etc/passwd"}], "expected http:// or https://"),
        ([{"url": "http://x", "colour": 1}], "unknown field `colour`"),
        ([{"url": "http://x", "method": "BREW"}], "Invalid enum value 'BREW'"),
        ([{"url": "http://x", "timeout_s": -1}], "timeout_s is -1"),
        ([{"url": "http://x", "headers": {"A": "${NO_SUCH_VARIABLE_HERE}"}}], "NO_SUCH_VARIABLE"),
        ([{"url": "http://x", "headers": {"A": "b\r\nC: d"}}], "holds a line break"),
        ([{"url": "http://x", "parameters": {"type": "string"}}], '"type": "object"'),
        ([{"url": "http://x", "name": "two words"}], "a tool needs a name of letters"),
        ([{"url": "http://x", "name": "a"}, {"url": "http://x", "name": "a"}], "two tools"),
    ],
)
def test_json_files_that_are_no_tools(tmp_path, text, says):
    if isinstance(text, list):
        text = json.dumps([{"name": "a", "description": "D.", **entry} for entry in text])
    with pytest.raises(UsageError, match=says):
        Toolbox.from_file(tool_file(tmp_path, text, "tools.json"))
