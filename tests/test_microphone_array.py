"""A microphone with four channels that gives all of them at its own rate or nothing."""

from types import SimpleNamespace

import numpy as np
import pytest

from edge_gemma.errors import DeviceLost
from edge_gemma.hearing import devices
from edge_gemma.hearing.devices import Microphone

RATE_HZ = 48000


class _Refused(Exception):
    """As sounddevice.PortAudioError."""


class _Stream:
    def __init__(self, driver, options):
        self.driver, self.options = driver, options

    def start(self):
        self.driver.open.append(self)

    def abort(self, ignore_errors=True):
        pass

    def close(self, ignore_errors=True):
        self.driver.open.remove(self)

    def give(self, data):
        status = SimpleNamespace(input_overflow=False)
        for at in range(0, len(data), self.options["blocksize"]):
            block = data[at : at + self.options["blocksize"]]
            self.options["callback"](block, len(block), None, status)


class _Driver:
    """sounddevice with one device of four inputs, which takes ``channels`` and no others."""

    PortAudioError = _Refused

    def __init__(self, channels=4):
        self.channels, self.open, self.tried = channels, [], []
        self.default = SimpleNamespace(device=(0, None))

    def _terminate(self):
        pass

    _initialize = _terminate

    def query_devices(self, device=None, kind=None):
        found = {
            "index": 0,
            "name": "four in a row",
            "max_input_channels": 4,
            "max_output_channels": 0,
            "default_samplerate": RATE_HZ,
        }
        return found if kind else [found]

    def InputStream(self, **options):
        tried = options["samplerate"], options["channels"]
        self.tried.append(tried)
        if tried != (RATE_HZ, self.channels):
            raise _Refused("Invalid number of channels")
        return _Stream(self, options)


@pytest.fixture
def driver(monkeypatch):
    found = _Driver()
    monkeypatch.setattr(devices, "_sounddevice", lambda: found)
    monkeypatch.setattr(devices, "_open_streams", 0)
    return found


@pytest.mark.compat(
    kind="talk", what="A microphone with four channels", happens="their mean, at 16 kHz"
)
def test_four_channels_are_heard_as_their_mean(driver):
    at = np.arange(RATE_HZ) / RATE_HZ
    tone = 0.4 * np.sin(2 * np.pi * 440 * at)
    noise = np.random.default_rng(4).normal(0, 0.05, (RATE_HZ, 4))
    sound = (tone[:, None] + noise).astype(np.float32)
    with Microphone() as microphone:
        assert driver.tried == [(16000, 1), (48000, 1), (48000, 2), (48000, 4)]
        driver.open[0].give(sound)
        assert microphone.n_waiting == 32 and not microphone.dropped_blocks
        heard = np.concatenate([microphone.read(0.1) for _ in range(microphone.n_waiting)])
    assert not driver.open and heard.dtype == np.float32
    assert 0 <= 16000 - len(heard) < 400  # what the resampler still holds
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(len(heard)) / 16000)
    middle = slice(1000, len(heard) - 1000)
    lag = max(
        range(-40, 41), key=lambda n: float(np.dot(np.roll(heard, n)[middle], expected[middle]))
    )
    left = np.roll(heard, lag)[middle] - expected[middle]
    assert np.std(left) < 0.04  # of four channels' noise a half is left


def test_a_device_that_takes_nothing_is_told(driver):
    driver.channels = 3
    with pytest.raises(DeviceLost, match="four in a row.*cannot be opened"), Microphone():
        pass
    assert not driver.open
