"""A real capture through PortAudio from a virtual microphone: what was said is what arrives, and a
server that dies and comes back.

Capture runs in a child process, whose environment points to the test's own sound server.
"""

import json
import os
import subprocess
import sys
import threading
import wave

import numpy as np
import pulse
import pytest

from edge_gemma.hearing.sound import read_audio

pytestmark = pytest.mark.skipif(pulse.missing() is not None, reason=str(pulse.missing()))

# Records N seconds; says on stdout when it listens, and one JSON line for everything that happens.
# Samples go to a file at the end.
CHILD = """
import json, sys, threading, time
import numpy as np
from edge_gemma.hearing.devices import Microphone
from edge_gemma.errors import DeviceLost
from edge_gemma.hearing.utterances import SpeechDetector

def say(**record):
    print(json.dumps(record), flush=True)

out, seconds, device = sys.argv[1], float(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None
blocks, detector, n = [], SpeechDetector(), 0
with Microphone(device) as mic:
    say(kind="listening", name=mic.name)
    until, read = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        try:
            block = mic.read(timeout_s=0.1)
        except DeviceLost as error:
            say(kind="lost", text=str(error), after_s=time.monotonic() - last)
            detector = SpeechDetector()
            while time.monotonic() < until:
                time.sleep(0.2)
                try:
                    mic.reopen()
                except DeviceLost:
                    continue
                say(kind="back")
                break
            continue
        if len(block):
            last = time.monotonic()
        blocks.append(block)
        for event in detector.push(block):
            say(kind=event.kind, at=event.at)
    dropped = mic.dropped_blocks
others = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
say(kind="end", dropped=dropped, threads=others)
np.save(out, np.concatenate(blocks))
"""


class Recorder:
    def __init__(self, server, folder, seconds):
        self.out = folder / "captured.npy"
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(self.out), str(seconds)],
            env=os.environ | server.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.records = []
        self._seen = threading.Condition()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        for line in self.process.stdout:
            with self._seen:
                self.records.append(json.loads(line))
                self._seen.notify_all()
        with self._seen:
            self.records.append({"kind": "closed"})
            self._seen.notify_all()

    def wait(self, *kinds, timeout=30):
        with self._seen:
            assert self._seen.wait_for(
                lambda: any(r["kind"] in (*kinds, "closed") for r in self.records), timeout
            ), self.records
        found = [r for r in self.records if r["kind"] in kinds]
        assert found, self.process.stderr.read()
        return found[-1]

    def finish(self):
        assert self.process.wait(60) == 0, self.process.stderr.read()
        self._thread.join()
        self.process.stdout.close(), self.process.stderr.close()
        return np.load(self.out)


@pytest.fixture
def microphone(tmp_path):
    server = pulse.VirtualMicrophone(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def spoken(tmp_path):
    """A sentence of espeak-ng at 16 kHz with half a second of silence on both sides, as a file for
    the virtual microphone.
    """
    speech = tmp_path / "speech.wav"
    subprocess.run(
        [
            "espeak-ng",
            "-v",
            "en",
            "-w",
            str(speech),
            "The quick brown fox jumps over the lazy dog.",
        ],
        check=True,
    )
    samples = read_audio(speech)
    path = tmp_path / "say.wav"
    padded = np.concatenate([np.zeros(8000), samples, np.zeros(8000)])
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes((padded * 32767).astype("<i2").tobytes())
    return path


def test_what_is_captured_is_what_was_played(microphone, spoken, tmp_path):
    recorder = Recorder(microphone, tmp_path, 7)
    assert recorder.wait("listening")["name"]
    microphone.play(spoken).wait(30)
    captured = recorder.finish()
    played = read_audio(spoken)

    # Where it lies: the best match by correlation, then every sample compared.
    n = 1 << int(np.ceil(np.log2(len(captured) + len(played))))
    correlation = np.fft.irfft(np.fft.rfft(captured, n) * np.conj(np.fft.rfft(played, n)), n)
    at = int(correlation[: len(captured)].argmax())
    window = captured[at : at + len(played)]
    assert len(window) == len(played)
    np.testing.assert_allclose(window, played, atol=2 / 32768)

    end = recorder.wait("end")
    assert end["dropped"] == 0 and end["threads"] == []
    events = {
        r["kind"]: r["at"] / 16000
        for r in recorder.records
        if r["kind"] in ("start", "end") and "at" in r
    }
    loud = np.flatnonzero(np.abs(played) > 0.02)
    assert abs(events["start"] - (at + loud[0]) / 16000) < 0.1
    assert abs(events["end"] - (at + loud[-1]) / 16000) < 0.1


def test_a_server_that_dies_is_noticed_and_recovered_from(microphone, spoken, tmp_path):
    recorder = Recorder(microphone, tmp_path, 14)
    recorder.wait("listening")
    player = microphone.play(spoken)
    recorder.wait("start")
    microphone.kill()
    player.wait(10)
    lost = recorder.wait("lost", timeout=5)
    assert "is gone" in lost["text"] and lost["after_s"] < 1.0
    microphone.start()
    recorder.wait("back", timeout=8)
    before = len([r for r in recorder.records if r["kind"] == "start"])
    microphone.play(spoken).wait(30)
    recorder.finish()
    assert len([r for r in recorder.records if r["kind"] == "start"]) > before
    assert recorder.wait("end")["threads"] == []
