"""Spoken answers: sentences, synthesizers, and a voice that can be stopped."""

import shutil
import threading

import numpy as np
import pytest

from edge_gemma.conversation import voice as voices
from edge_gemma.conversation.voice import Sentences, Voice, espeak, piper, read_wav
from edge_gemma.errors import RuntimeFailure, UsageError


def cut(*pieces):
    sentences = Sentences()
    return [s for piece in pieces for s in sentences.push(piece)] + list(sentences.finish())


def test_sentences_come_whole_and_in_time():
    assert cut("One. Two", "! Three? Fo", "ur\nFive") == ["One.", "Two!", "Three?", "Four", "Five"]
    assert cut("Version 3.5 is", " out.") == ["Version 3.5 is out."]
    assert cut("", "  \n\n ") == []


def test_a_text_without_stops_is_spoken_all_the_same():
    found = cut("word, " * 200)
    assert (
        len(found) > 2
        and all(len(s) <= 400 for s in found)
        and " ".join(found).split() == ["word,"] * 200
    )


def test_a_voice_speaks_while_text_comes_and_stops_at_once():
    played, begun, gate = [], threading.Event(), threading.Event()

    def play(samples, rate_hz):
        played.append(len(samples))
        begun.set()
        return not gate.wait(10)

    voice = Voice(lambda text: (np.zeros(len(text), np.float32), 16000), play, gate.set)
    voice.push("First. Second. Thi")
    assert begun.wait(5) and played == [6]  # speaking before the text has ended
    voice.stop()
    voice.join()
    assert played == [6] and not voice.speaking


def test_a_voice_speaks_everything_when_left_alone():
    said = []
    voice = Voice(
        lambda text: (said.append(text), (np.zeros(1, np.float32), 16000))[1],
        lambda samples, rate_hz: True,
    )
    for piece in ("Hello the", "re. And", " goodbye"):
        voice.push(piece)
    voice.finish()
    voice.join()
    assert said == ["Hello there.", "And goodbye"]


def test_a_failing_synthesizer_is_kept_not_thrown():
    def broken(text):
        raise RuntimeFailure("no sound came out")

    voice = Voice(broken, lambda samples, rate_hz: True)
    voice.push("Hello. ")
    voice.finish()
    voice.join()
    assert str(voice.error) == "no sound came out"


needs_espeak = pytest.mark.skipif(
    shutil.which("espeak-ng") is None, reason="espeak-ng is not installed (make system)"
)


@needs_espeak
def test_espeak_speaks():
    samples, rate_hz = espeak("en")("Hello there, how are you?")
    assert (
        rate_hz == 22050 and 0.8 < len(samples) / rate_hz < 4 and 0.1 < np.abs(samples).max() <= 1
    )
    with pytest.raises(RuntimeFailure, match="espeak-ng could not speak"):
        espeak("zzzz")("Hello")


def test_missing_programs_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(voices.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="espeak-ng is not installed.*apt-get install espeak-ng"):
        espeak()
    with pytest.raises(UsageError, match="piper is not installed"):
        piper(tmp_path / "voice.onnx")


def test_piper_through_a_stand_in_program(monkeypatch, tmp_path):
    """A program with piper's interface: text on stdin, raw 16-bit samples on stdout."""
    program = tmp_path / "piper"
    program.write_text(
        '#!/bin/sh\n[ "$1" = -m ] && [ "$3" = --output-raw ] || exit 3\nread line; printf '
        "'\\000\\100\\000\\300'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    voice = tmp_path / "voice.onnx"
    with pytest.raises(UsageError, match="not a piper voice: cannot read its sample rate"):
        piper(voice)
    (tmp_path / "voice.onnx.json").write_text('{"audio": {"sample_rate": 22050}}')
    samples, rate_hz = piper(voice)("Hello")
    assert rate_hz == 22050 and samples.tolist() == [0.5, -0.5]


def test_what_is_no_wav_is_refused():
    with pytest.raises(RuntimeFailure, match="output is not a WAV"):
        read_wav(b"no wav")


@needs_espeak
def test_a_wake_word_is_heard():
    from edge_gemma.hearing.sound import Resampler
    from edge_gemma.hearing.wake_word import wake_word

    for text, expected in (("Alexa", True), ("Good morning", False)):
        samples, rate_hz = espeak("en")(text)
        samples = Resampler(rate_hz).push(samples, last=True)
        samples = np.concatenate(
            [np.zeros(16000, np.float32), samples, np.zeros(16000, np.float32)]
        )
        gate = wake_word("alexa")
        assert any([gate(samples[k : k + 512]) for k in range(0, len(samples), 512)]) is expected


def test_an_unknown_wake_word_is_refused_with_the_known_ones():
    from edge_gemma.hearing.wake_word import wake_word

    with pytest.raises(UsageError, match="'banana' is no wake word.*okay_nabu"):
        wake_word("banana")
