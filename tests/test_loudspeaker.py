"""A real loudspeaker stream and a real microphone through PortAudio, joined by a virtual sound
server: what is cut, what is counted, and the echo.
"""

import json
import os
import stat
import subprocess
import sys

import pulse
import pytest

from edge_gemma import FunctionCall
from edge_gemma.assistant.builtin_tools import builtin_tools
from edge_gemma.assistant.timers import Timers
from edge_gemma.errors import UsageError
from edge_gemma.hearing import sound_server

needs_server = pytest.mark.skipif(pulse.missing() is not None, reason=str(pulse.missing()))

# Plays a tone at 22,050 Hz and stops it; the microphone hears the loudspeaker. One JSON line.
CUT = """
import json, threading, time
import numpy as np
from edge_gemma.hearing.devices import Microphone, Speaker

speaker, whole = Speaker(), []
tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(5 * 22050) / 22050)).astype(np.float32)
with Microphone() as microphone:
    thread = threading.Thread(target=lambda: whole.append(speaker.play(tone, 22050)))
    thread.start()
    loud, stopped, n_heard, until = [], None, 0, time.monotonic() + 2.5
    while time.monotonic() < until:
        block = microphone.read(0.1)
        if len(block) and np.abs(block).max() > 0.1:
            loud.append(time.monotonic())
        if stopped is None and loud and time.monotonic() > loud[0] + 0.8:
            stopped, n_heard = time.monotonic(), speaker.n_heard
            speaker.stop()
thread.join()
speaker.close()
threads = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
print(json.dumps(dict(whole=whole, cut_s=loud[-1] - stopped, heard_s=n_heard / 22050,
                      sounded_s=stopped - loud[0], rate_hz=speaker.rate_hz, threads=threads)))
"""


@pytest.fixture
def server(tmp_path):
    found = pulse.VirtualMicrophone(tmp_path)
    found.start()
    yield found
    found.kill()


def run(server, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | server.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_server
def test_a_sound_that_is_stopped_and_what_was_heard_of_it(server):
    """The tone goes out at the device's own 44.1 kHz; the bounds leave room for a busy machine."""
    found = run(server, "-c", CUT)
    assert found["whole"] == [False] and found["threads"] == [] and found["rate_hz"] == 44100
    assert found["cut_s"] < 0.5
    assert abs(found["heard_s"] - found["sounded_s"]) < 0.5


@needs_server
@pytest.mark.slow
def test_the_echo_test_through_real_devices(server):
    found = run(server, "-m", "edge_gemma", "devices", "--echo-test", "--json")
    assert found["state"] == "cancelling" and found["left_db"] < -15
    assert found["barge_ins"] == 0


@needs_server
def test_without_a_loudspeaker(server):
    """A server that ends while nothing plays: an error, no hang."""
    server.kill()
    done = subprocess.run(
        [sys.executable, "-m", "edge_gemma", "devices", "--echo-test"],
        env=os.environ | server.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "no loudspeaker found" in done.stderr or "no microphone found" in done.stderr


# as PulseAudio 16 and PipeWire 1.0 print them
PULSE = {
    "info": "Server Name: pulseaudio",
    "list short sources": "0\tmic\tmodule-alsa-card.c\ts16le 1ch 16000Hz\tRUNNING\n"
    "2\tmic.echo-cancel\tmodule-echo-cancel.c\tfloat32le 1ch 32000Hz\tIDLE\n"
    "3\tout.echo-cancel.monitor\tmodule-echo-cancel.c\tfloat32le 1ch 32000Hz\tIDLE",
    "list short sinks": "1\tout.echo-cancel\tmodule-echo-cancel.c\tfloat32le 1ch 32000Hz\tIDLE",
}
PIPEWIRE = {
    "info": "Server Name: PulseAudio (on PipeWire 1.0.5)",
    "list short sources": "57\techo-cancel-source\tPipeWire\tfloat32le 1ch 48000Hz\tSUSPENDED",
    "list short sinks": "58\techo-cancel-sink\tPipeWire\tfloat32le 1ch 48000Hz\tSUSPENDED",
}


def pactl(folder, monkeypatch, answers):
    """A stand-in program that prints what it was given."""
    program = folder / "pactl"
    lines = [
        f"if [ \"$*\" = '{asked}' ]; then cat <<'END'\n{said}\nEND\nexit 0; fi"
        for asked, said in answers.items()
    ]
    program.write_text("\n".join(["#!/bin/sh", *lines, "exit 1"]))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    "answers, source, sink",
    [
        (PULSE, "mic.echo-cancel", "out.echo-cancel"),
        (PIPEWIRE, "echo-cancel-source", "echo-cancel-sink"),
    ],
)
def test_the_sound_server_s_own_canceller(tmp_path, monkeypatch, answers, source, sink):
    pactl(tmp_path, monkeypatch, answers)
    pair = sound_server.require()
    assert (pair.source, pair.sink) == (source, sink)
    monkeypatch.setenv("PULSE_SOURCE", "")
    monkeypatch.setenv("PULSE_SINK", "")
    sound_server.use(pair)
    assert os.environ["PULSE_SOURCE"] == source and os.environ["PULSE_SINK"] == sink


def test_a_sound_server_without_its_canceller_or_none_at_all(tmp_path, monkeypatch):
    pactl(tmp_path, monkeypatch, {"info": PULSE["info"], "list short sources": "nonsense"})
    found = sound_server.sound_server()
    assert found.name == "pulseaudio" and found.echo_cancelled is None
    with pytest.raises(UsageError, match="pulseaudio has no echo canceller.*pactl load-module"):
        sound_server.require()
    pactl(tmp_path, monkeypatch, {})
    assert sound_server.sound_server() is None
    with pytest.raises(UsageError, match="no PulseAudio or PipeWire server answers"):
        sound_server.require()


# A timer that another process set rings; the microphone hears the loudspeaker. One JSON line.
RING = """
import json, sys, threading, time
import numpy as np
from edge_gemma.assistant.ringing import Ringing
from edge_gemma.assistant.tones import RATE_HZ
from edge_gemma.assistant.timers import Timers
from edge_gemma.hearing.devices import Microphone, Speaker

speaker, told = Speaker(), []
with Timers(sys.argv[1]) as timers, Microphone() as microphone:
    rings = Ringing(timers, speaker.play, speaker.stop)
    while (notice := rings()) is None:
        time.sleep(0.02)
    thread = threading.Thread(target=notice.ring)
    thread.start()
    heard, ended = [], None
    while ended is None or time.monotonic() < ended + 1:
        heard.append(microphone.read(0.1))
        if ended is None and not thread.is_alive():
            ended = time.monotonic()
    notice.done(True)
    notice.spoken_to()
    left = len(timers.all())
speaker.close()
sound = np.concatenate(heard)
power = np.abs(np.fft.rfft(sound)) ** 2
hz = np.argmax(power) * RATE_HZ / len(sound)
loud = np.abs(sound) > 0.05
print(json.dumps(dict(text=notice.text, hz=hz, loud_s=loud.sum() / RATE_HZ, left=left)))
"""


@needs_server
def test_a_timer_rings_on_a_real_loudspeaker(server, tmp_path):
    state = tmp_path / "state"
    with Timers(state) as timers:
        timers.set(1, "tea")
    found = run(server, "-c", RING, state)
    assert found["text"] == "The timer tea is over." and found["left"] == 0
    assert abs(found["hz"] - 880) < 10 and found["loud_s"] > 0.2


@needs_server
def test_the_volume_of_a_real_sound_server(server, tmp_path, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    with Timers(tmp_path / "state") as timers:
        toolbox = builtin_tools(timers, tmp_path / "state")
        for per_cent in (30, 0, 100):
            result = toolbox.call(FunctionCall("set_volume", {"per_cent": per_cent}))
            assert result.text == f"{per_cent} per cent now"
            assert toolbox.call(FunctionCall("set_volume")).text == f"{per_cent} per cent"
        server.kill()
        refused = toolbox.call(FunctionCall("set_volume", {"per_cent": 20}))
        assert not refused.ok and "Connection refused" in refused.note
