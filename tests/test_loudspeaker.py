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
