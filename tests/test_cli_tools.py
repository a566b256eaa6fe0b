"""--tools on the command line, and the tool files in examples/. A scripted decoder stands in for
the model (scripted.py).
"""

from __future__ import annotations

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from scripted import ScriptedDecoder
from test_listen import blocks, loudness, silence, speech

import edge_gemma
from edge_gemma import FunctionCall, Sampling
from edge_gemma.assistant.tool_loop import ToolLoop
from edge_gemma.assistant.tools import Toolbox
from edge_gemma.cli import main
from edge_gemma.hearing import devices
from edge_gemma.hearing.utterances import SpeechDetector

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = ("--threads", "1", "--ctx", "4096")


@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture
def scripted(monkeypatch):
    """Every chat from now on says what the script says."""
    make = edge_gemma.Model.chat

    def script(*texts):
        def chat(model, **options):
            made = make(model, **options)
            ScriptedDecoder(made, texts)
            return made

        monkeypatch.setattr(edge_gemma.Model, "chat", chat)

    return script


GRAMS = FunctionCall("in_grams", {"amount": 2, "what": "cup of flour"})
OVEN = FunctionCall("oven", {"degrees_celsius": 200})


def test_run_with_a_tool_file(run, tiny_bundle, scripted):
    scripted(GRAMS, "240 grams.")
    kitchen = EXAMPLES / "kitchen_tools.py"
    code, out, err = run("run", tiny_bundle, "Two cups?", "--tools", kitchen, *SHORT)
    assert code == 0 and out == "240 grams.\n"
    assert "(in grams (amount: 2, what: cup of flour) → 240 grams)" in err


def test_run_does_nothing_dangerous(run, tiny_bundle, scripted):
    scripted(OVEN)
    kitchen = EXAMPLES / "kitchen_tools.py"
    code, out, err = run("run", tiny_bundle, "Heat it", "--tools", kitchen, *SHORT)
    assert code == 0 and "Say yes or no." in out and "nobody can say yes here" in err
    assert "→" not in err


def test_chat_asks_in_the_next_line(run, tiny_bundle, scripted, monkeypatch):
    scripted(OVEN, "It heats.")
    monkeypatch.setattr("sys.stdin", io.StringIO("Heat the oven\nyes\n/exit\n"))
    code, out, err = run("chat", tiny_bundle, "--tools", EXAMPLES / "kitchen_tools.py", *SHORT)
    assert code == 0 and out.splitlines() == [
        "Shall I really do this: oven (degrees_celsius: 200)? Say yes or no.",
        "It heats.",
    ]
    assert "→ the oven goes to 200 degrees)" in err


@pytest.mark.parametrize("command", ["run", "chat", "listen"])
def test_a_bad_file_is_refused_before_loading(run, tiny_bundle, tmp_path, command, monkeypatch):
    monkeypatch.setattr(edge_gemma, "load", None)
    monkeypatch.setattr(devices, "find_sound_device", lambda *_: None)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    bad = tmp_path / "bad.py"
    bad.write_text("def f(x): 'Doc.'")
    code, _, err = run(command, tiny_bundle, "--tools", bad)
    assert code == 2 and "bad.py, line 1: f: its parameter 'x' has no type hint" in err


def test_options_that_exclude_each_other(run, tiny_bundle, tmp_path, monkeypatch):
    kitchen = EXAMPLES / "kitchen_tools.py"
    code, _, err = run("run", tiny_bundle, "x", "--raw", "--tools", kitchen)
    assert code == 2 and "give --tools or one of --raw" in err
    code, _, err = run("run", tiny_bundle, "x", "--tools", "builtin")
    assert code == 2 and "needs: edge-gemma listen" in err
    monkeypatch.setattr(devices, "find_sound_device", lambda *_: None)
    code, _, err = run("listen", tiny_bundle, "--tools", kitchen, "--state", tmp_path)
    assert code == 2 and "--state is for --tools builtin" in err


def test_listen_with_the_builtin_tools(run, hearing_bundle, scripted, tmp_path, monkeypatch):
    """The command itself: a microphone that is scripted, a loudspeaker that records."""
    from edge_gemma.conversation import listener as module

    played = []

    class Microphone:
        name, dropped_blocks, n_waiting = "scripted", 0, 0

        def __init__(self, name):
            sound = np.concatenate([silence(0.3), speech(1), silence(1.2)])
            self.left = iter(blocks(sound))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, timeout_s):
            block = next(self.left, None)
            if block is not None:
                return block
            if len(played) > 1:
                raise KeyboardInterrupt
            return np.zeros(512, np.float32)

    class Speaker:
        def __init__(self, name, played=None):
            pass

        def play(self, samples, rate_hz):
            played.append(len(samples))
            return True

        def stop(self):
            pass

        close = stop

    monkeypatch.setattr(devices, "Microphone", Microphone)
    monkeypatch.setattr(module, "Microphone", Microphone)
    monkeypatch.setattr(devices, "Speaker", Speaker)
    monkeypatch.setattr(devices, "find_sound_device", lambda *_: None)
    monkeypatch.setattr(
        module, "SpeechDetector", lambda vad: SpeechDetector(vad, probability=loudness)
    )
    scripted(FunctionCall("set_timer", {"seconds": 1, "label": "tea"}), "It is set.")
    options = ("--tools", "builtin", "--tools", EXAMPLES / "kitchen_tools.py")
    code, out, err = run(
        "listen", hearing_bundle.folder, *options, "--state", tmp_path / "state", *SHORT,
        "--echo-cancel", "off", "--ctx", "8192",
    )  # fmt: skip
    assert code == 0 and "tools: time_and_date, set_timer" in err and "in_grams" in err
    assert "(set timer (seconds: 1, label: tea) → set: timer 1 'tea' at" in err
    assert out.startswith("It is set.\nThe timer tea is over.\n")
    assert set(played) == {19200} and (tmp_path / "state" / "timers.json").exists()


# ---- Home Assistant's REST


class HomeAssistant(BaseHTTPRequestHandler):
    """A stand-in for its REST interface, by developers.home-assistant.io/docs/api/rest: services
    change states, and answer with those that changed.
    """

    def do_GET(self):
        self._answered("/api/states/", self._state)

    def do_POST(self):
        self._answered("/api/services/", self._service)

    def _answered(self, begin, answer):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != "Bearer abc":
            return self._say(401, "401: Unauthorized")
        if not self.path.startswith(begin):
            return self._say(404, "404: Not Found")
        return self._say(*answer(self.path.removeprefix(begin), data))

    def _state(self, entity, data):
        states = self.server.states
        if entity not in states:
            return 404, {"message": "Entity not found."}
        return 200, {"entity_id": entity, "state": states[entity]}

    def _service(self, service, data):
        entity = json.loads(data)["entity_id"]
        new = {"light/turn_on": "on", "light/turn_off": "off", "lock/unlock": "unlocked"}[service]
        self.server.states[entity] = new
        return 200, [{"entity_id": entity, "state": new}]

    def _say(self, status, value):
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def home_assistant(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), HomeAssistant)
    server.states = {"light.kitchen": "off", "lock.front_door": "locked"}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HA_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HA_TOKEN", "abc")
    yield server.states
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.compat(
    kind="talk",
    what="Home Assistant's REST by examples/home_assistant.json (a local stand-in answers)",
    happens="lights are switched, states are told, a door is unlocked after a yes",
)
def test_home_assistant(tiny_bundle, home_assistant):
    toolbox = Toolbox.from_file(EXAMPLES / "home_assistant.json")
    light = {"entity_id": "light.kitchen", "service": "turn_on"}
    script = [
        FunctionCall("light", light),
        FunctionCall("state", {"entity_id": "light.kitchen"}),
        "The kitchen light is on.",
        FunctionCall("unlock", {"entity_id": "lock.front_door"}),
        "The door is open.",
        FunctionCall("state", {"entity_id": "light.attic"}),
        "There is no such light.",
    ]
    request = edge_gemma.PlanRequest(n_ctx=8192, n_threads=1)
    told = []
    with (
        edge_gemma.load(tiny_bundle, request=request) as model,
        model.chat(tools=toolbox.specs) as chat,
    ):
        ScriptedDecoder(chat, script)
        loop = ToolLoop(chat, toolbox)

        def say(text):
            chunks = loop.send(text, Sampling(seed=1), tell=told.append)
            return "".join(chunk.text for chunk in chunks)

        assert say("Light, please") == "The kitchen light is on."
        assert home_assistant["light.kitchen"] == "on" and '"state": "on"' in told[1]
        assert say("Unlock the door").startswith("Shall I really do this: unlock (entity_id: lock.")
        assert home_assistant["lock.front_door"] == "locked"
        assert say("Yes.") == "The door is open."
        assert home_assistant["lock.front_door"] == "unlocked"
        assert say("And the attic?") == "There is no such light."
        assert told[-1].endswith(
            'state was refused: 404 Not Found {"message": "Entity not found."}'
        )


def test_home_assistant_without_its_address_or_with_a_wrong_token(home_assistant, monkeypatch):
    monkeypatch.setenv("HA_TOKEN", "wrong")
    toolbox = Toolbox.from_file(EXAMPLES / "home_assistant.json")
    refused = toolbox.call(FunctionCall("state", {"entity_id": "light.kitchen"}))
    assert refused.note == "state was refused: 401 Unauthorized 401: Unauthorized"
    monkeypatch.delenv("HA_URL")
    with pytest.raises(edge_gemma.errors.UsageError, match="the environment variable HA_URL"):
        Toolbox.from_file(EXAMPLES / "home_assistant.json")
