"""edge-gemma assistant init, run, test and log; the unit; an LED and a button."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import types
from pathlib import Path

import msgspec
import numpy as np
import pulse
import pytest
import soundfile
from test_commands import run  # noqa: F401  (a fixture)

from edge_gemma.assistant.settings import FILE_NAME, Settings, new_file
from edge_gemma.assistant.timers import Timers
from edge_gemma.assistant.transcript import Transcript, follow, read_transcript
from edge_gemma.cli.assistant_unit import UNIT_NAME, user_unit
from edge_gemma.hearing.sound import read_audio

EXAMPLE = Path(__file__).parent.parent / "examples" / "assistant_led_button.py"
needs_server = pytest.mark.skipif(pulse.missing() is not None, reason=str(pulse.missing()))


def configured(folder, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"tools": [], "voice": "none", "echo": "off", "persona": ""} | settings
    (folder / FILE_NAME).write_text(new_file(msgspec.convert(settings, Settings)))
    return folder


# --- init ---


@pytest.fixture
def no_store(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_GEMMA_HOME", str(tmp_path / "store"))


def test_init_writes_and_does_not_overwrite(run, hearing_bundle, tmp_path, no_store):  # noqa: F811
    folder = tmp_path / "shelf"
    code, out, err = run("assistant", "init", folder, "--bundle", hearing_bundle.folder)
    assert code == 0 and out.splitlines() == [f"{folder / FILE_NAME}", f"{folder / UNIT_NAME}"]
    assert f"systemctl --user enable --now {folder / UNIT_NAME}" in err and "enable-linger" in err
    config = folder / FILE_NAME
    assert tomllib.loads(config.read_text())["bundle"] == str(hearing_bundle.folder)
    unit = (folder / UNIT_NAME).read_text()
    assert f"assistant run {folder}\n" in unit and "Type=notify" in unit and "MemoryMax=" in unit
    config.write_text("mine")
    code, out, err = run("assistant", "init", folder)
    assert code == 2 and f"{config} is there already; --force replaces it" in err
    assert config.read_text() == "mine"
    code, out, err = run("assistant", "init", folder, "--force")
    assert code == 0 and "write which model answers into" in err
    code, out, err = run("assistant", "init", folder, "--force", "--json")
    assert code == 0 and json.loads(out)["bundle"] == ""
    assert "MemoryMax=" not in (folder / UNIT_NAME).read_text()


def test_init_takes_the_bundle_that_is_installed(run, hearing_bundle, tmp_path, no_store):  # noqa: F811
    shutil.copytree(hearing_bundle.folder, tmp_path / "store" / "bundles" / "ears")
    code, out, _ = run("assistant", "init", tmp_path / "a", "--json")
    assert code == 0 and json.loads(out)["bundle"] == "ears"


def test_init_by_default_in_the_user_s_configuration(run, tmp_path, monkeypatch, no_store):  # noqa: F811
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert run("assistant", "init")[0] == 0
    assert (tmp_path / "edge-gemma" / "assistant" / FILE_NAME).exists()


def test_init_refusals(run, tmp_path, no_store):  # noqa: F811
    code, _, err = run("assistant", "init", tmp_path / "a", "--bundle", "no-such")
    assert code == 3 and "no-such" in err and not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    code, _, err = run("assistant", "init", tmp_path / "file" / "a")
    assert code == 2 and "cannot make the folder" in err


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_reads_the_unit(tmp_path):
    unit = tmp_path / UNIT_NAME
    command = [sys.executable, "-m", "edge_gemma", "assistant", "run", '/x/a "b" 100%']
    unit.write_text(user_unit(command, 1 << 30))
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", str(unit)],
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr


# --- refusals of the others ---


@pytest.mark.parametrize("command", ["run", "log"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "holds no assistant.toml; make one with: edge-gemma assistant init"),
        ("tone = true", "tone is no setting; did you mean tones"),
        ("tones = 1", "tones: expected true or false, got a whole number"),
        ("tones", "is no TOML"),
    ],
)
def test_nonsense_in_the_configuration(run, tmp_path, command, text, reason):  # noqa: F811
    if text is not None:
        (tmp_path / FILE_NAME).write_text(text)
    code, out, err = run("assistant", command, tmp_path)
    assert code == 2 and reason in err and out == ""


@pytest.mark.parametrize(
    ("settings", "code", "reason"),
    [
        ({}, 2, "names no bundle"),
        ({"bundle": "no-such"}, 3, "no-such"),
        ({"persona": "x"}, 2, "there is no persona 'x'"),
        ({"tools": ["no.py"]}, 2, "no.py is no file"),
        ({"hooks": "no.py"}, 2, "no.py is no hooks file"),
        ({"wake_word": "hey_nobody", "bundle": "HERE"}, 2, "is no wake word"),
        ({"voice": "no.onnx", "bundle": "HERE"}, 2, "piper"),
    ],
)
def test_run_refuses_before_anything_is_loaded(
    run,  # noqa: F811
    hearing_bundle,
    tmp_path,
    monkeypatch,
    settings,
    code,
    reason,
):
    monkeypatch.setattr("edge_gemma.assistant.parts.find_sound_device", lambda *_: None)
    monkeypatch.setenv("EDGE_GEMMA_HOME", str(tmp_path / "store"))
    if settings.get("bundle") == "HERE":
        settings = settings | {"bundle": str(hearing_bundle.folder)}
    found, _, err = run("assistant", "run", configured(tmp_path / "a", **settings))
    assert found == code and reason in err
    Timers(tmp_path / "a" / "state").close()  # the folder is free again


def test_run_is_refused_where_another_one_runs(run, hearing_bundle, tmp_path):  # noqa: F811
    folder = configured(tmp_path, bundle=str(hearing_bundle.folder))
    with Timers(folder / "state"):
        code, _, err = run("assistant", "run", folder)
    assert code == 2 and "another assistant runs with the folder" in err


# --- test ---


def test_the_steps_of_test(run, hearing_bundle, tmp_path, monkeypatch):  # noqa: F811
    for name in ("Speaker", "Microphone"):
        monkeypatch.setattr(f"edge_gemma.assistant.checks.{name}", Broken)
    (tmp_path / "led.py").write_text("def connect(press): ...")
    folder = configured(
        tmp_path, bundle=str(hearing_bundle.folder), tools=["builtin"], hooks="led.py"
    )
    code, out, err = run("assistant", "test", folder, "--json")
    found = json.loads(out)
    assert code == 1 and not found["ok"]
    steps = {step["step"]: step for step in found["steps"]}
    wrong = {name for name, step in steps.items() if not step["ok"]}
    assert wrong == {"loudspeaker", "microphone"}
    assert list(steps) == [
        *("configuration", "model", "state folder", "tools", "hooks", "wake word", "voice", "echo"),
        *("loudspeaker", "microphone"),
    ]
    assert "planned" in steps["model"]["found"] and steps["tools"]["found"] == "builtin"
    assert "edge-gemma devices" in steps["microphone"]["todo"]
    code, out, err = run("assistant", "test", folder)
    assert code == 1 and "WRONG  OSError: broken" in out and "→ edge-gemma devices" in out


class Broken:
    def __init__(self, *_):
        raise OSError("broken")


def test_everything_that_test_finds_wrong(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("EDGE_GEMMA_HOME", str(tmp_path / "store"))
    for name in ("Speaker", "Microphone"):
        monkeypatch.setattr(f"edge_gemma.assistant.checks.{name}", Broken)
    (tmp_path / "bad.py").write_text("1 / 0")
    settings = {"tools": ["bad.py"], "hooks": "bad.py", "wake_word": "x", "voice": "x.onnx"}
    folder = configured(tmp_path, bundle="no-such", **settings)
    with Timers(folder / "state"):
        code, out, _ = run("assistant", "test", folder, "--json")
    steps = {step["step"]: step for step in json.loads(out)["steps"]}
    assert code == 1 and [name for name, step in steps.items() if step["ok"]] == [
        "configuration",
        "echo",
    ]
    assert "another assistant runs" in steps["state folder"]["found"]
    assert all(step["todo"] for step in steps.values() if not step["ok"])
    (folder / FILE_NAME).write_text("x = 1")
    code, out, _ = run("assistant", "test", folder, "--json")
    assert code == 1 and len(json.loads(out)["steps"]) == 1


def test_a_text_only_bundle_is_found_wrong(run, tiny_bundle, tmp_path, monkeypatch):  # noqa: F811
    for name in ("Speaker", "Microphone"):
        monkeypatch.setattr(f"edge_gemma.assistant.checks.{name}", Broken)
    folder = configured(tmp_path, bundle=str(tiny_bundle))
    _, out, _ = run("assistant", "test", folder, "--json")
    assert "no audio encoder, so it cannot hear" in json.loads(out)["steps"][1]["found"]


# --- log ---


def test_log_shows_the_transcript(run, tmp_path):  # noqa: F811
    folder = configured(tmp_path, transcript=True)
    code, out, err = run("assistant", "log", folder)
    assert code == 0 and out == "" and "holds no transcript" in err
    transcript = Transcript(folder / "state", 1 << 20)
    transcript.write("user", seconds=1.25)
    transcript.write("assistant", "Once upon\na time", interrupted=True)
    code, out, err = run("assistant", "log", folder)
    first, second = out.splitlines()
    assert first.endswith("user       (1.2 s of speech)")
    assert second.endswith("assistant  Once upon a time …") and second[:2] == "20"
    code, out, err = run("assistant", "log", folder, "--json")
    assert json.loads(out.splitlines()[1])["interrupted"] is True
    configured(tmp_path)
    code, out, err = run("assistant", "log", folder)
    assert code == 0 and "no transcript is kept: write transcript = true" in err


def test_a_transcript_is_bounded_and_followed(tmp_path):
    transcript = Transcript(tmp_path, 4000)
    for number in range(100):
        transcript.write("assistant", f"{number} {'x' * 50}")
        sizes = [path.stat().st_size for path in tmp_path.glob("*.jsonl")]
        assert sum(sizes) <= 4000
    kept = [int(line.text.split()[0]) for line in read_transcript(tmp_path)]
    assert kept == list(range(100 - len(kept), 100)) and len(kept) > 15
    seen, done = [], threading.Event()

    def watch():
        for line in follow(tmp_path, lambda: not done.is_set()):
            seen.append(int(line.text.split()[0]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(100, 130):
        transcript.write("assistant", f"{number} {'x' * 50}")
        time.sleep(0.02)
    until = time.monotonic() + 20
    while (not seen or seen[-1] < 129) and time.monotonic() < until:
        time.sleep(0.05)
    done.set()
    watcher.join()
    assert seen == list(range(seen[0], 130)) and seen[0] <= 100


def test_a_line_that_a_power_cut_broke(tmp_path):
    transcript = Transcript(tmp_path, 4000)
    transcript.write("assistant", "whole")
    path = tmp_path / "transcript.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"at": "2026-11-2')
    transcript.write("assistant", "next \ud800")
    assert [line.text for line in read_transcript(tmp_path)] == ["whole", "next ?"]


def test_a_transcript_that_cannot_be_written(tmp_path):
    transcript = Transcript(tmp_path, 4000)
    (tmp_path / "transcript.jsonl").mkdir()
    transcript.write("assistant", "a")
    assert "cannot write" in transcript.problem


# --- an LED and a button ---


@pytest.fixture(params=["gpiozero", "stand-in"])
def pins(request, monkeypatch):
    """gpiozero with its mock pins where it is installed, and a stand-in with its names."""
    if request.param == "gpiozero":
        gpiozero = pytest.importorskip("gpiozero")
        from gpiozero.pins.mock import MockFactory

        monkeypatch.setattr(gpiozero.Device, "pin_factory", MockFactory())
        yield lambda hooks: gpiozero.Device.pin_factory.pin(27).drive_low()
        gpiozero.Device.pin_factory.reset()
        return

    class LED:
        def __init__(self, pin):
            self.is_lit, self.pin = False, pin

        def on(self):
            self.is_lit = True

        def off(self):
            self.is_lit = False

        def blink(self, on_time, off_time):
            self.is_lit = True

    class Button:
        def __init__(self, pin, bounce_time):
            self.when_pressed = None

    module = types.SimpleNamespace(LED=LED, Button=Button)
    monkeypatch.setitem(sys.modules, "gpiozero", module)
    yield lambda hooks: hooks.button.when_pressed()


def test_the_example_of_an_led_and_a_button(pins):
    names = runpy.run_path(str(EXAMPLE))
    pressed = threading.Event()
    on_state = names["connect"](pressed.set)
    lit = {}
    for state in names["LIGHTS"]:
        on_state(state)
        time.sleep(0.02)
        lit[state] = bool(on_state.led.is_lit)
    assert not lit.pop("asleep") and lit["listening"] and lit["following"] and lit["hearing"]
    pins(on_state)
    assert pressed.wait(5)
    on_state("asleep")


# --- run, with sound ---


@pytest.fixture
def server(tmp_path):
    (tmp_path / "pulse").mkdir()
    found = pulse.VirtualMicrophone(tmp_path / "pulse")
    found.start()
    found.running = []
    yield found
    for running in found.running:  # of a test that failed
        running.process.kill()
    found.kill()


class Running:
    """``assistant run --json`` in a process, and what it printed."""

    def __init__(self, folder, server, **environment):
        self.records, self._seen = [], threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edge_gemma", "assistant", "run", str(folder), "--json"],
            env=os.environ | server.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        server.running.append(self)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        for line in self.process.stdout:
            with self._seen:
                self.records.append(json.loads(line))
                self._seen.notify_all()

    @property
    def states(self):
        return [record["state"] for record in self.records if record["kind"] == "state"]

    def until(self, found, timeout=60):
        with self._seen:
            assert self._seen.wait_for(lambda: found(self), timeout), self.records

    def asked(self, server, question):
        """Play it, again where the wake word was missed, as espeak-ng's is now and then."""
        for _ in range(3):
            n = len(self.states)
            server.play(question).wait(60)
            time.sleep(1)
            if "listening" in self.states[n:]:
                return
        raise AssertionError(f"the wake word was missed three times: {self.records}")

    def until_kind(self, kind):
        self.until(lambda running: any(r["kind"] == kind for r in running.records))

    def until_state(self, *states):
        """These, one after the other, since the last call; another one may have followed."""
        n, first = len(states), getattr(self, "_looked_to", 0)

        def found(running):
            starts = range(first, len(running.states) - n + 1)
            return [at for at in starts if tuple(running.states[at : at + n]) == states]

        self.until(found)
        self._looked_to = found(self)[0] + n - 1

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        code = self.process.wait(30)
        self._thread.join()
        self.process.stdout.close()
        with self.process.stderr:
            self.err = self.process.stderr.read()
        return code


@needs_server
def test_it_runs_until_it_is_told_to_end(hearing_bundle, server, tmp_path):
    """Ready is told to systemd; SIGTERM is a clean end, Ctrl-C its usual code."""
    settings = {"bundle": str(hearing_bundle.folder), "transcript": True}
    folder = configured(tmp_path / "a", **settings, wake_word="none", model={"threads": 1})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        running = Running(folder, server, NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert manager.recv(4096).startswith(b"READY=1\nSTATUS=listening to ")
        assert running.end() == 0
        assert manager.recv(4096).startswith(b"STOPPING=1")
    assert running.states == ["away", "listening"]
    running = Running(folder, server)
    running.until_kind("ready")
    assert running.end(signal.SIGINT) == 130
    assert "power cut" not in running.err
    assert [line.who for line in read_transcript(folder / "state")] == ["start", "end"] * 2


def said(folder, *parts):
    """espeak-ng's words and seconds of silence, as a file for the virtual microphone."""
    samples = []
    for part in parts:
        if isinstance(part, str):
            wav = folder / "part.wav"
            subprocess.run(["espeak-ng", "-v", "en", "-w", str(wav), part], check=True)
            samples.append(read_audio(wav))
        else:
            samples.append(np.zeros(int(part * 16000), np.float32))
    path = folder / f"{abs(hash(parts))}.wav"
    soundfile.write(path, np.concatenate(samples), 16000, subtype="PCM_16")
    return path


@needs_server
@pytest.mark.slow
@pytest.mark.compat(
    kind="talk",
    what="`assistant run` with a real wake word model, espeak-ng for the voice and for the user, "
    "kill -9 and a new start",
    happens="wakes, answers, hears a second question without the word, sleeps; so again after the "
    "restart",
)
def test_a_day_in_its_life(hearing_bundle, server, tmp_path):
    folder = configured(
        tmp_path / "a",
        bundle=str(hearing_bundle.folder),
        voice="en",
        echo="auto",
        follow_up_s=4,
        transcript=True,
        resume=True,
        model={"threads": 1, "max_tokens": 12},
    )
    question = said(tmp_path, 0.3, "Okay Nabu", 1.0, "What is the weather like in Paris?", 1.5)
    another = said(tmp_path, 0.3, "And what about the city of London tomorrow?", 1.5)
    running = Running(folder, server)
    running.until_kind("ready")
    server.play(another).wait(60)
    time.sleep(1)
    assert running.states == ["away", "asleep"]
    running.asked(server, question)
    running.until_state("listening", "hearing", "answering", "following")
    running.until_state("following", "asleep")
    assert running.process.poll() is None
    assert running.end(signal.SIGKILL) == -signal.SIGKILL
    running = Running(folder, server)
    running.until_kind("ready")
    notes = [record["text"] for record in running.records if record["kind"] == "note"]
    assert any("power cut" in note for note in notes)
    assert any("going on with the conversation of before" in note for note in notes)
    running.asked(server, question)
    running.until_state("answering", "following")
    assert running.end() == 0
    whos = [line.who for line in read_transcript(folder / "state")]
    assert whos.count("start") == 2 and whos.count("end") == 1 and whos.count("user") >= 2


@needs_server
@pytest.mark.slow
@pytest.mark.compat(
    kind="talk",
    what="a sound server that ends under an assistant and is started again",
    happens="away, then back; the next question is answered aloud, and its own voice is not heard",
)
def test_a_sound_server_that_ends(hearing_bundle, server, tmp_path):
    model = {"threads": 1, "max_tokens": 12}
    settings = {"bundle": str(hearing_bundle.folder), "voice": "en", "echo": "auto"}
    folder = configured(tmp_path / "a", **settings, model=model)
    question = said(tmp_path, 0.3, "Okay Nabu", 1.0, "What is the weather like in Paris?", 1.5)
    running = Running(folder, server)
    running.until_kind("ready")
    server.kill()
    running.until_kind("lost")
    server.start()
    running.until_kind("back")
    running.asked(server, question)
    running.until_state("hearing", "answering", "following")
    assert running.end() == 0
    kinds = [record["kind"] for record in running.records]
    assert "turn" in kinds and "interrupted" not in kinds


@needs_server
@pytest.mark.slow
@pytest.mark.compat(
    kind="talk",
    what="two assistants on one microphone (of a sound server), each with its own folder",
    happens="both hear; a second one on the same folder is refused",
)
def test_two_assistants_on_one_microphone(hearing_bundle, server, tmp_path):
    settings = {"bundle": str(hearing_bundle.folder), "wake_word": "none"}
    model = {"threads": 1, "max_tokens": 8}
    folders = [configured(tmp_path / name, **settings, model=model) for name in ("a", "b")]
    both = [Running(folder, server) for folder in folders]
    for running in both:
        running.until_kind("ready")
    third = Running(folders[0], server)
    assert third.process.wait(60) == 2 and third.end() == 2
    assert "another assistant runs with the folder" in third.err
    server.play(said(tmp_path, 0.3, "What is the weather like in Paris?", 1.0)).wait(60)
    for running in both:
        running.until_kind("turn")
        assert running.end() == 0
