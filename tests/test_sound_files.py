"""Sound files as recorders, phones and browsers leave them: read to their end, or refused with what
is missing.
"""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import subprocess
import time

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from soundfiles import (
    RATE_HZ,
    chunk,
    encoded,
    likeness,
    ogg_pages,
    pcm,
    rf64,
    voice,
    wav,
    write_av,
)

from edge_gemma.errors import MediaError, MediaWarning, MissingExtra, UsageError
from edge_gemma.hearing.containers import Window
from edge_gemma.hearing.mixing import Mixer
from edge_gemma.hearing.sound import AudioFile, read_audio

VOICE = voice()
PCM = pcm(VOICE)
HEARD = np.frombuffer(PCM, "<i2").astype(np.float32) / 32768


def sound(what: str, happens: str):
    return pytest.mark.compat(kind="sound", what=what, happens=happens)


def heard(data: bytes) -> tuple[np.ndarray, list[str]]:
    """The samples of a file's bytes, and what was noted."""
    with AudioFile(data) as file:
        samples = np.concatenate(list(file.blocks()))
        return samples, file.notes


UNWRITTEN = "its header does not say how long it is .*read to its end"
READ_TO_ITS_END = "read to its end, with a note"


@sound("WAV whose sizes were never written (recorder killed)", READ_TO_ITS_END)
@pytest.mark.parametrize(
    ("riff_bytes", "data_bytes"),
    [
        (0, 0),
        (36, 0),
        (0xFFFFFFFF, 0),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0, 0xFFFFFFFF),
        (0x7FFFFFFF, 0x7FFFFFFF - 36),
        (0x80000024, 0x80000000),
        (0, 512),
        (0xFFFFFFFF, 511),
        (0xFFFFFFFF, 0xFFFFFFFF - 36),
    ],
)
def test_wav_with_sizes_never_written(riff_bytes, data_bytes):
    samples, notes = heard(wav(PCM, riff_bytes=riff_bytes, data_bytes=data_bytes))
    assert np.array_equal(samples, HEARD)
    (note,) = notes
    with pytest.warns(MediaWarning, match=UNWRITTEN):
        read_audio(wav(PCM, riff_bytes=riff_bytes, data_bytes=data_bytes))
    assert "the recorder was stopped" in note


@sound("WAV whose recorder was killed inside a sample", READ_TO_ITS_END)
@pytest.mark.parametrize("sizes", [0, 0xFFFFFFFF])
def test_wav_that_ends_inside_a_sample(sizes):
    samples, notes = heard(wav(PCM[:-1], riff_bytes=sizes, data_bytes=sizes))
    assert np.array_equal(samples, HEARD[:-1]) and len(notes) == 1


@sound("WAV with an odd size, other chunks before and behind", "read")
def test_wav_with_an_odd_size_and_other_chunks():
    after = chunk(b"LIST", b"INFOx") + chunk(b"id3 ", b"ID3" + bytes(30))
    for data in (
        wav(PCM, after=after),
        wav(PCM, before=chunk(b"JUNK", bytes(27)), after=after),
        wav(PCM + b"\0", data_bytes=len(PCM) + 1, after=b"\0" + after),
        wav(PCM + b"\0", data_bytes=len(PCM) + 1),
        wav(PCM, riff_bytes=1, after=after),
    ):
        samples, notes = heard(data)
        assert np.array_equal(samples, HEARD) and not notes


@sound("WAV that is cut", "read to its end; the note names the promised length")
def test_wav_that_is_cut(tmp_path):
    data = wav(PCM)
    (tmp_path / "cut.wav").write_bytes(data[: 44 + len(PCM) // 2])
    with pytest.warns(MediaWarning, match="cut.wav: ends at 1.0 s; its header promises 2.0 s"):
        assert np.array_equal(read_audio(tmp_path / "cut.wav"), HEARD[:RATE_HZ])
    with pytest.raises(
        MediaError, match="no samples, though its header promises 2.0 s; it was cut"
    ):
        read_audio(data[:44])


@sound("WAV with sound behind the size of its header", "what is not read is said")
def test_wav_with_sound_behind_its_size():
    samples, notes = heard(wav(PCM, riff_bytes=36 + 32000, data_bytes=32000))
    assert np.array_equal(samples, HEARD[:16000])
    assert "its header says 1.0 s; the 32000 bytes behind (1.0 s, if they are" in notes[0]
    samples, notes = heard(wav(PCM) + wav(PCM))
    assert np.array_equal(samples, HEARD) and "its header says 2.0 s; the 64044" in notes[0]


@sound("WAV, AIFF or Ogg behind an ID3 tag", "read whole")
def test_other_files_behind_a_tag():
    tag = b"ID3\4\0\0\0\0\1\0" + bytes(128)
    aiff, ogg = encoded(VOICE, "AIFF", "PCM_16"), encoded(VOICE, "OGG", "VORBIS")
    for data in (wav(PCM), aiff, ogg):
        assert np.array_equal(heard(tag + data)[0], heard(data)[0])


@sound("RF64 whose sizes were never written", READ_TO_ITS_END)
@pytest.mark.parametrize("size", [0, 2**64 - 1])
def test_rf64_with_sizes_never_written(size):
    samples, notes = heard(rf64(PCM, riff_bytes=size, data_bytes=size, n_samples=size))
    assert np.array_equal(samples, HEARD) and len(notes) == 1
    right = rf64(PCM, riff_bytes=80 + len(PCM), data_bytes=len(PCM), n_samples=len(VOICE))
    samples, notes = heard(right)
    assert np.array_equal(samples, HEARD) and not notes


@sound("AU, AIFF, CAF and W64 whose sizes were never written", "read to their end")
def test_other_containers_with_sizes_never_written():
    au = bytearray(encoded(VOICE, "AU", "PCM_16"))
    for size in (0, 0xFFFFFFFF):
        au[8:12] = struct.pack(">I", size)
        assert len(heard(bytes(au))[0]) == len(VOICE)
    aiff = bytearray(encoded(VOICE, "AIFF", "PCM_16"))
    common, data = aiff.index(b"COMM"), aiff.index(b"SSND")
    for at in (4, common + 10, data + 4):
        aiff[at : at + 4] = bytes(4)
    assert len(heard(bytes(aiff))[0]) == len(VOICE)
    w64 = bytearray(encoded(VOICE, "W64", "PCM_16"))
    data = w64.index(b"data")
    for size in (bytes(8), b"\xff" * 8):
        w64[16:24] = w64[data + 16 : data + 24] = size
        assert len(heard(bytes(w64))[0]) == len(VOICE)
    caf = bytearray(encoded(VOICE, "CAF", "PCM_16"))
    at = caf.index(b"data", 20)
    caf[at + 4 : at + 12] = b"\xff" * 8  # CAF's own way to say that it is not known
    assert len(heard(bytes(caf))[0]) == len(VOICE)


@sound("FLAC with an unknown length", "read to its end")
def test_flac_of_unknown_length(tmp_path):
    data = bytearray(encoded(VOICE, "FLAC"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    tag = b"ID3\4\0\0\0\0\1\0" + bytes(128)
    expected, _ = heard(encoded(VOICE, "FLAC"))
    for spelled in (bytes(data), tag + bytes(data)):
        samples, notes = heard(spelled)
        assert np.array_equal(samples, expected) and not notes
    (tmp_path / "a.flac").write_bytes(data)
    assert np.array_equal(read_audio(tmp_path / "a.flac"), expected)
    (tmp_path / "long.flac").write_bytes(_unknown_length(encoded(np.tile(VOICE, 16), "FLAC")))
    with pytest.raises(MediaError, match="long.flac has more than 30 s, the model's limit"):
        read_audio(tmp_path / "long.flac")


def _unknown_length(flac: bytes) -> bytes:
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


@sound("FLAC that is cut", "read to its end, with a note")
@pytest.mark.parametrize("spell", [bytes, _unknown_length])
def test_flac_that_is_cut(spell):
    data = spell(encoded(VOICE, "FLAC"))
    samples, notes = heard(data[: 3 * len(data) // 4])
    assert RATE_HZ < len(samples) < 2 * RATE_HZ and "It is truncated" in notes[0]
    assert np.array_equal(samples, heard(encoded(VOICE, "FLAC"))[0][: len(samples)])


@sound("chained Ogg (Vorbis, Opus)", "every piece is read")
@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_chained_ogg(tmp_path, codec):
    first, second = voice(1.5), voice(1.0)[::-1].copy()
    pieces = [encoded(samples, "OGG", codec) for samples in (first, second)]
    apart = np.concatenate([heard(piece)[0] for piece in pieces])
    together, notes = heard(b"".join(pieces))
    assert np.array_equal(together, apart) and not notes and len(together) == 40_000
    (tmp_path / "chained.ogg").write_bytes(b"".join(pieces))
    assert np.array_equal(read_audio(tmp_path / "chained.ogg"), apart)
    cut, notes = heard(b"".join(pieces)[:-50])
    assert len(first) <= len(cut) < len(together) and "It is truncated" in notes[0]


@sound("FLAC or MP3 files joined byte by byte", "every one is read")
@pytest.mark.parametrize("kind", ["FLAC", "MP3"])
def test_joined_files(kind):
    pieces = [encoded(voice(1.5), kind), encoded(voice(1.0)[::-1].copy(), kind)]
    apart = np.concatenate([heard(piece)[0] for piece in pieces])
    together, notes = heard(b"".join(pieces))
    assert len(apart) == 40_000 and np.array_equal(together, apart) and not notes
    alone, _ = heard(pieces[0] + b"TAG" + bytes(125))  # ID3v1 is no sound
    assert np.array_equal(alone, apart[: len(alone)])


def test_chained_ogg_of_different_rates_and_channels():
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([voice(1, 44100)] * 2, 1), 44100, "VORBIS", format="OGG")
    samples, notes = heard(encoded(voice(1), "OGG", "VORBIS") + buffer.getvalue())
    assert len(samples) == pytest.approx(32_000, abs=3) and not notes
    assert likeness(samples[16_000:], voice(1)) > 0.99


@sound("Ogg cut anywhere, also before its second page", "read to the cut, or refused: no sound")
@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_ogg_cut_anywhere(codec):
    data = encoded(voice(6), "OGG", codec)
    whole = len(heard(data)[0])
    pages = ogg_pages(data)
    cuts = {*pages[1:], *(page + 20 for page in pages), len(data) // 2, len(data) - 1}
    told = []
    for cut in sorted(cuts):
        try:
            samples, notes = heard(data[:cut])
        except MediaError as error:
            assert "cut before its sound" in str(error)
            told.append(0)
            continue
        assert 0 < len(samples) < whole and "It is truncated" in notes[0]
        told.append(len(samples))
    assert told == sorted(told) and told[0] == 0 < told[-1]


# ---- channels


@sound("stereo with opposite phases", "the louder channel is heard, with a note")
@pytest.mark.parametrize("gain", [1.0, 0.9, 0.7])
def test_opposite_phases(tmp_path, gain):
    path = tmp_path / "opposite.wav"
    soundfile.write(path, np.stack([gain * VOICE, -VOICE], axis=1), RATE_HZ, subtype="FLOAT")
    channel, expected = (1, VOICE) if gain == 1 else (2, -VOICE)
    with pytest.warns(MediaWarning, match=f"opposite phases.*channel {channel} is heard"):
        assert np.array_equal(read_audio(path), expected)


def test_opposite_phases_on_a_direct_current_and_at_any_time():
    mixer = Mixer()
    both = np.stack([VOICE, VOICE], axis=1)
    assert np.array_equal(mixer.mono(both), VOICE) and mixer.note is None
    opposite = np.stack([VOICE + 0.1, 0.1 - VOICE], axis=1)
    assert np.abs(mixer.mono(opposite)).max() > 0.9 * np.abs(VOICE).max()
    assert "channel 1" in mixer.note or "channel 2" in mixer.note
    assert np.array_equal(mixer.mono(both), VOICE)


@given(st.integers(2, 8), st.integers(0, 10_000), st.floats(-0.8, 1.0))
def test_the_mean_is_kept_unless_channels_cancel(channels, seed, correlation):
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.1, 4000)
    frames = rng.normal(0, 0.1, (4000, channels))
    weight = abs(correlation) if channels > 2 else correlation
    frames[:, -1] = weight * shared + np.sqrt(1 - weight**2) * frames[:, -1]
    frames[:, 0] = shared
    frames = frames.astype(np.float32)
    mixer = Mixer()
    assert np.array_equal(mixer.mono(frames), frames.mean(axis=1)) and mixer.note is None


@sound("one channel of several silent", "the mean of the channels")
def test_a_silent_channel_is_part_of_the_mean():
    samples, notes = heard(wav(pcm(np.stack([VOICE, 0 * VOICE], axis=1).ravel()), channels=2))
    assert np.array_equal(samples, HEARD / 2) and not notes


# ---- samples


@sound("a file without samples", "refused by every command alike")
@pytest.mark.parametrize(
    "data",
    [
        wav(b""),
        wav(b"", riff_bytes=0),
        wav(b"", riff_bytes=0xFFFFFFFF, data_bytes=0xFFFFFFFF),
        wav(b"", after=chunk(b"LIST", b"INFO")),
        wav(b"\1"),
        b"fLaC\x80\0\0\x22" + encoded(VOICE, "FLAC")[8:42],
        encoded(np.zeros(0), "AIFF", "PCM_16"),
        encoded(np.zeros(0), "OGG", "VORBIS"),
    ],
    ids=["wav", "riff 0", "unwritten", "list", "one byte", "flac", "aiff", "ogg"],
)
def test_no_samples(data):
    with pytest.raises(MediaError, match="samples|cut before its sound"):
        read_audio(data)
    with pytest.raises(MediaError, match="samples|cut before its sound"), AudioFile(data) as file:
        list(file.blocks())


@sound("float samples beyond ±1", "divided by their peak, with a note")
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize("peak", [1.5, 20.0, 32768.0])
def test_float_samples_beyond_one(subtype, peak):
    wave = (VOICE / np.abs(VOICE).max() * peak).astype(np.float32)
    expected = re.escape(f"its samples reach {peak:.4g}, beyond ±1; they were divided")
    with pytest.warns(MediaWarning, match=expected):
        samples = read_audio(encoded(wave, "WAV", subtype))
    assert np.abs(samples).max() == pytest.approx(1) and likeness(samples, VOICE) > 0.99999
    within, notes = heard(encoded(VOICE, "WAV", subtype))
    assert np.array_equal(within, VOICE) and not notes


@sound("float samples that are NaN, infinite or absurd", "refused with their time and channel")
@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "infinity"), (1e30, "1e")])
def test_samples_that_are_no_numbers(value, name):
    frames = np.stack([VOICE, VOICE], axis=1)
    frames[8000, 1] = value
    for subtype in ("FLOAT", "DOUBLE"):
        with pytest.raises(MediaError, match=rf"holds {name}.* at 0\.500 s, channel 2"):
            AudioFile(encoded(frames, "WAV", subtype))


@sound("8, 24, 32 bits, A-law, µ-law, ADPCM; 1 to 8 channels; 8 to 192 kHz", "heard")
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "ALAW", "ULAW", "IMA_ADPCM"])
@pytest.mark.parametrize(("rate_hz", "channels"), [(8000, 1), (44100, 2), (96000, 8), (192000, 1)])
def test_sample_formats_channels_and_rates(subtype, rate_hz, channels):
    if subtype == "IMA_ADPCM":
        channels = min(channels, 2)
    buffer = io.BytesIO()
    frames = np.repeat(voice(1, rate_hz)[:, None], channels, axis=1)
    soundfile.write(buffer, frames, rate_hz, subtype, format="WAV")
    samples, notes = heard(buffer.getvalue())
    assert likeness(samples, voice(1)) > 0.97 and not notes
    assert len(samples) == pytest.approx(RATE_HZ, rel=0.03)


@sound("mp3 behind garbage, zeros or a large ID3 tag, or cut", "heard; the cut is said")
def test_mp3_behind_other_things():
    mp3 = encoded(VOICE, "MP3")
    tag = b"ID3\3\0\0" + bytes([0, 8, 0, 0]) + bytes(1 << 17)
    noise = np.random.default_rng(1).bytes(3000).replace(b"\xff", b"\0")
    for before in (b"", tag, bytes(5000), noise):
        samples, notes = heard(before + mp3)
        assert likeness(samples, VOICE) > 0.99 and not notes
    samples, notes = heard(mp3[: len(mp3) // 2])
    assert 8000 < len(samples) < 24_000 and "its header promises 2.0 s. It is truncated" in notes[0]


# ---- what phones send


# container, codec, rate, layout, least likeness (1: lossless)
LOSSLESS, GOOD, NARROW = 0.9999, 0.97, 0.6
CONTAINERS = [
    ("ipod", "aac", 44100, "stereo", GOOD),
    ("mp4", "aac", 16000, "mono", GOOD),
    ("mov", "aac", 48000, "mono", GOOD),
    ("adts", "aac", 16000, "mono", GOOD),
    ("latm", "aac", 44100, "mono", GOOD),
    ("3gp", "aac", 8000, "mono", GOOD),
    ("3gp", "amr_nb", 8000, "mono", NARROW),
    ("amr", "amr_nb", 8000, "mono", NARROW),
    ("3g2", "aac", 22050, "mono", GOOD),
    ("webm", "libopus", 48000, "mono", GOOD),
    ("matroska", "libopus", 48000, "stereo", GOOD),
    ("matroska", "flac", 16000, "mono", LOSSLESS),
    ("matroska", "pcm_s16le", 16000, "mono", LOSSLESS),
    ("matroska", "pcm_f32le", 16000, "mono", LOSSLESS),
    ("mov", "alac", 16000, "mono", LOSSLESS),
    ("ipod", "alac", 44100, "stereo", LOSSLESS),
    ("mov", "pcm_s16be", 16000, "mono", LOSSLESS),
    ("caf", "pcm_s16be", 16000, "mono", LOSSLESS),
    ("caf", "alac", 16000, "mono", 0.97),
    ("asf", "wmav2", 44100, "mono", GOOD),
    ("asf", "wmav1", 44100, "mono", GOOD),
    ("ac3", "ac3", 48000, "stereo", GOOD),
    ("eac3", "eac3", 48000, "stereo", GOOD),
    ("mp2", "mp2", 16000, "mono", GOOD),
    ("mp3", "libmp3lame", 16000, "mono", GOOD),
    ("mp3", "libmp3lame", 44100, "stereo", GOOD),
    ("ogg", "libopus", 48000, "mono", GOOD),
    ("ogg", "flac", 16000, "mono", LOSSLESS),
    ("flac", "flac", 16000, "mono", LOSSLESS),
    ("wv", "wavpack", 16000, "mono", LOSSLESS),
    ("tta", "tta", 16000, "mono", LOSSLESS),
    ("aiff", "pcm_s16be", 16000, "mono", LOSSLESS),
    ("au", "pcm_s16be", 16000, "mono", LOSSLESS),
    ("wav", "adpcm_ima_wav", 16000, "mono", GOOD),
    ("wav", "adpcm_ms", 16000, "mono", GOOD),
    ("wav", "pcm_alaw", 8000, "mono", GOOD),
    ("wav", "pcm_mulaw", 8000, "mono", GOOD),
    ("wav", "pcm_u8", 16000, "mono", GOOD),
    ("wav", "pcm_s24le", 48000, "stereo", LOSSLESS),
    ("wav", "pcm_s32le", 16000, "mono", LOSSLESS),
    ("wav", "pcm_f64le", 16000, "mono", LOSSLESS),
    ("wav", "g726", 8000, "mono", 0.9),
    ("w64", "pcm_s16le", 16000, "mono", LOSSLESS),
    ("mpegts", "aac", 44100, "mono", GOOD),
    ("mpeg", "mp2", 44100, "mono", GOOD),
    ("avi", "libmp3lame", 44100, "mono", GOOD),
    ("flv", "aac", 44100, "mono", GOOD),
    ("rm", "ac3", 48000, "stereo", GOOD),
    ("nut", "pcm_s16le", 16000, "mono", LOSSLESS),
    ("nut", "pcm_s16le", 16000, "hexadecagonal", LOSSLESS),  # 16 channels
    ("sox", "pcm_s32le", 16000, "mono", LOSSLESS),
]


@sound("m4a, aac, mp4, webm, 3gp, amr, wma and 45 other containers and codecs", "the same is heard")
@pytest.mark.parametrize(
    ("container", "codec", "rate_hz", "layout", "least"),
    CONTAINERS,
    ids=[f"{row[0]}-{row[1]}-{row[2]}" for row in CONTAINERS],
)
def test_whatever_ffmpeg_writes_is_heard(tmp_path, container, codec, rate_hz, layout, least):
    path = tmp_path / "recording.wav"  # no name decides what a file is
    write_av(path, VOICE, container, codec, rate_hz, layout)
    with AudioFile(path) as file:
        samples = np.concatenate(list(file.blocks()))
        assert file.notes == []
    assert likeness(samples, VOICE) > least
    assert len(samples) == pytest.approx(len(VOICE), abs=2600)
    same, _ = heard(path.read_bytes())
    assert np.array_equal(same, samples)


@sound("mp4 or m4a that is cut", "without its index (moov) refused, with it read to the cut")
def test_mp4_that_is_cut(tmp_path):
    path = tmp_path / "a.m4a"
    write_av(path, VOICE, "ipod", "aac", 16000, "mono")
    data = path.read_bytes()
    assert data.index(b"mdat") < data.index(b"moov")
    path.write_bytes(data[: data.index(b"moov") - 4])
    with pytest.raises(MediaError, match=r"a.m4a is an MP4 recording without its index \(moov\)"):
        AudioFile(path)


@pytest.mark.parametrize("movflags", ["faststart", "frag_keyframe+empty_moov+default_base_moof"])
def test_mp4_that_is_cut_behind_its_index(tmp_path, movflags):
    path = tmp_path / "a.m4a"
    write_av(path, np.tile(VOICE, 4), "mp4", "aac", 16000, "mono", movflags=movflags)
    data = path.read_bytes()
    samples, notes = heard(data[: 7 * len(data) // 10])
    assert 16_000 < len(samples) < 112_000 and likeness(samples, np.tile(VOICE, 4)) > 0.7
    assert "It is truncated" in notes[0]


@sound("webm, aac or ts that is cut", "read to the cut")
@pytest.mark.parametrize(("container", "codec"), [("webm", "libopus"), ("adts", "aac")])
def test_a_stream_that_is_cut(tmp_path, container, codec):
    path = tmp_path / "a"
    write_av(path, VOICE, container, codec, 48000, "mono")
    data = path.read_bytes()
    samples, _ = heard(data[: len(data) // 2])
    assert 8_000 < len(samples) < 24_000 and likeness(samples, VOICE[: len(samples)]) > 0.9


def test_damaged_packets_are_left_out(tmp_path):
    path = tmp_path / "a"
    write_av(path, VOICE, "adts", "aac", 48000, "mono")
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 3, len(data) // 3 + 400):
        data[at] ^= 0x5A
    samples, _ = heard(bytes(data))
    assert likeness(samples, VOICE) > 0.5


def test_without_pyav(monkeypatch, tmp_path):
    path = tmp_path / "a.m4a"
    write_av(path, VOICE, "ipod", "aac", 16000, "mono")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingExtra, match=r"a.m4a is MP4; reading it needs .*edge-gemma\[hear\]"):
        AudioFile(path)
    with pytest.raises(MediaError, match="is not a sound file that can be read"):
        AudioFile(b"no sound" * 100)


@pytest.mark.slow
@sound("what the ffmpeg program writes", "the same is heard")
def test_whatever_the_ffmpeg_program_writes_is_heard(tmp_path):
    from shutil import which

    if which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed")
    (tmp_path / "in.wav").write_bytes(wav(PCM))
    endings = "m4a mp4 aac 3gp webm mka mkv ogg opus oga flac wav aiff au caf wma ac3 mp2 mp3 ts"
    for ending in (*endings.split(), "avi", "flv", "mov", "wv", "tta", "w64", "amr", "rm", "nut"):
        out = tmp_path / f"out.{ending}"
        rate = ["-ar", "8000"] if ending in ("3gp", "amr") else []
        command = ["ffmpeg", "-loglevel", "error", "-i", tmp_path / "in.wav", *rate, out]
        if subprocess.run(command, capture_output=True).returncode == 0:
            samples, _ = heard(out.read_bytes())
            assert likeness(samples, VOICE) > NARROW, ending


# ---- data URIs


@sound("data:audio/…;base64,…, BytesIO, bytes", "heard as the file it holds")
def test_data_uris():
    for kind, data in (("wav", wav(PCM)), ("ogg", encoded(VOICE, "OGG", "VORBIS"))):
        uri = f"data:audio/{kind};base64,{base64.b64encode(data).decode()}"
        assert np.array_equal(read_audio(uri), read_audio(data))
    data = wav(PCM)
    for source in (io.BytesIO(data), bytearray(data), memoryview(data)):
        assert np.array_equal(read_audio(source), HEARD)
    with pytest.raises(UsageError, match="must be opened for bytes"):
        read_audio(io.StringIO("text"))
    with pytest.raises(UsageError, match="a sound is a path.*got int"):
        read_audio(7)
    with pytest.raises(MediaError, match="holds image/png; expected audio/"):
        read_audio("data:image/png;base64,AAAA")


# ---- nonsense


@sound("text, a picture, a program, zeros or noise called .wav", "refused, with what it is")
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"this is no sound\n" * 100, "it is text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "it is a PNG picture"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "it is a JPEG picture"),
        (b"%PDF-1.7\n" + bytes(100), "it is a PDF"),
        (b"PK\3\4" + bytes(100), "it is a ZIP archive"),
        (b"\x7fELF" + bytes(range(256)) * 100, "it is a program"),
        (bytes(100_000), "it is zeros"),
        (b"GGUF" + bytes(1000), "it is a GGUF model"),
        (np.random.default_rng(0).bytes(50_000), "Format not recognised|Invalid data"),
        (b"RIFF", "recognised|Invalid|malformed|End of file|text"),
        (wav(PCM)[:30], "Invalid data|No 'data' chunk"),
    ],
)
def test_what_is_no_sound(tmp_path, data, what):
    for name in ("a.wav", "a.mp3", "a.aac", "a.ac3", "a.m4a"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError, match=f"is not a sound file that can be read .*({what})"):
            read_audio(tmp_path / name)


@sound("a folder, pipe, device or file of 10 GB without content", "refused at once")
def test_what_is_no_file_or_too_large(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    sparse = tmp_path / "sparse.mp3"
    with open(sparse, "wb") as file:
        file.truncate(10 << 30)
    started = time.monotonic()
    for path, message in (
        (tmp_path / "pipe.wav", "is a pipe, not a file"),
        (tmp_path / "folder.wav", "is a directory"),
        ("/dev/zero", "is a device, not a file"),
        (tmp_path / "none.wav", "there is no sound file at"),
        (sparse, "is not a sound file that can be read"),
    ):
        with pytest.raises(MediaError, match=message):
            read_audio(path)
    with open(sparse, "r+b") as file:
        file.write(wav(b"", riff_bytes=0, data_bytes=0))
    with pytest.raises(MediaError, match="has more than 30 s"):
        read_audio(sparse)
    assert time.monotonic() - started < 5


@settings(max_examples=60)
@given(st.data())
def test_any_damage_is_heard_or_refused(data):
    """Nothing but MediaError comes out of a damaged file."""
    kind = data.draw(st.sampled_from(sorted(DAMAGED)))
    broken = bytearray(DAMAGED[kind])
    for _ in range(data.draw(st.integers(1, 8))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(broken)))
    try:
        samples, _ = heard(bytes(broken[:cut]))
    except MediaError:
        return
    assert samples.dtype == np.float32 and np.isfinite(samples).all()


DAMAGED = {
    "wav": wav(pcm(voice(0.3))),
    "float": encoded(voice(0.3), "WAV", "FLOAT"),
    "flac": encoded(voice(0.3), "FLAC"),
    "vorbis": encoded(voice(0.3), "OGG", "VORBIS"),
    "opus": encoded(voice(0.3), "OGG", "OPUS"),
    "mp3": encoded(voice(0.3), "MP3"),
    "caf": encoded(voice(0.3), "CAF", "PCM_16"),
}


@given(st.binary(max_size=80), st.data())
def test_a_window_reads_as_its_patched_bytes(content, data):
    patches = tuple(
        data.draw(st.lists(st.tuples(st.integers(0, 90), st.binary(max_size=9)), max_size=2))
    )
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)))
    expected = bytearray(content)
    for offset, patch in patches:
        for at, byte in enumerate(patch, offset):
            if at < len(expected):
                expected[at] = byte
    window = Window(io.BytesIO(content), start, end, patches)
    assert window.read() == bytes(expected[start:end]) and window.at_end
    position = data.draw(st.integers(0, 100))
    window.seek(position)
    assert window.read(7) == bytes(expected[start:end][position : position + 7])
