"""A loudspeaker that takes one rate and two channels, or nothing."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from edge_gemma.errors import DeviceLost
from edge_gemma.hearing import devices
from edge_gemma.hearing.devices import Speaker


class _Refused(Exception):
    """As sounddevice.PortAudioError."""


class _Stream:
    """Calls back from a thread, as PortAudio does, and keeps what it was given."""

    latency = 0.01

    def __init__(self, driver, options):
        self.driver, self.options = driver, options
        self.n_channels = options["channels"]
        self._open = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self):
        self._open.set()
        self._thread.start()

    def _run(self):
        while self._open.is_set():
            out = np.zeros((441, self.n_channels), np.float32)
            self.options["callback"](out, len(out), None, None)
            self.driver.heard.append(out)
            time.sleep(0.001)

    def abort(self, ignore_errors=True):
        self._open.clear()
        self._thread.join()

    def close(self, ignore_errors=True):
        pass


class _Driver:
    PortAudioError = _Refused

    def __init__(self, only):
        self.only, self.tried, self.heard = only, [], []
        self.default = SimpleNamespace(device=(None, 0))

    def _terminate(self):
        pass

    _initialize = _terminate

    def query_devices(self, device=None, kind=None):
        found = {
            "index": 0,
            "name": "an old amplifier",
            "max_input_channels": 0,
            "max_output_channels": 2,
            "default_samplerate": 48000,  # which it does not take
        }
        return found if kind else [found]

    def OutputStream(self, **options):
        tried = options["samplerate"], options["channels"]
        self.tried.append(tried)
        if tried != self.only:
            raise _Refused("Invalid sample rate")
        return _Stream(self, options)


@pytest.mark.compat(
    kind="sound",
    what="a loudspeaker that takes 44.1 kHz alone, and says 48",
    happens="rates are tried; sound is resampled, and is what it was",
)
def test_a_loudspeaker_at_44100_hz_only(monkeypatch):
    driver = _Driver((44100, 2))
    monkeypatch.setattr(devices, "_sounddevice", lambda: driver)
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)).astype(np.float32)
    opened = []
    with Speaker(on_open=lambda: opened.append(1)) as speaker:
        assert speaker.rate_hz == 44100 and speaker.play(tone, 16000)
        speaker.wait()
    assert opened
    assert driver.tried == [(48000, 1), (48000, 2), (44100, 1), (44100, 2)]
    heard = np.concatenate(driver.heard)
    assert np.array_equal(heard[:, 0], heard[:, 1])
    loud = np.flatnonzero(np.abs(heard[:, 0]) > 0.01)
    assert abs((loud[-1] - loud[0]) / 44100 - 0.5) < 0.01
    power = np.abs(np.fft.rfft(heard[loud[0] : loud[-1], 0])) ** 2
    assert abs(np.argmax(power) * 44100 / (loud[-1] - loud[0]) - 440) < 3


def test_a_loudspeaker_that_takes_nothing(monkeypatch):
    monkeypatch.setattr(devices, "_sounddevice", lambda: _Driver(None))
    with pytest.raises(DeviceLost, match="'an old amplifier' cannot be opened .Invalid sample"):
        Speaker().play(np.zeros(10, np.float32), 16000)
