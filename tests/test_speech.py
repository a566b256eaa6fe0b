"""Spoken answers: clauses, synthesizers, and a voice that can be stopped."""

import os
import shutil
import sys
import threading
import types

import numpy as np
import pytest

from edge_gemma.conversation import voice as voices
from edge_gemma.conversation.clauses import Clauses, spoken_form
from edge_gemma.conversation.voice import Voice, espeak, kokoro, piper, read_wav
from edge_gemma.errors import DeviceLost, MissingExtra, RuntimeFailure, UsageError


def cut(*pieces, language="en"):
    clauses = Clauses(language)
    found = [c for piece in pieces for c in clauses.push(piece)] + list(clauses.finish())
    return [clause.text for clause in found]


def test_clauses_come_whole_and_in_time():
    found = cut("First. Second", "! Third? Fou", "rth\nFifth")
    assert found == ["First.", "Second!", "Third?", "Fourth", "Fifth"]
    assert cut("Version 3.5 is", " out.") == ["Version 3.5 is out."]
    assert cut("I met Dr. Smith. He is well.") == ["I met Dr. Smith.", "He is well."]
    assert cut("你好。我很好！", "再见") == ["你好。", "我很好！", "再见"]
    assert cut("", "  \n\n ") == []


def test_the_first_clause_is_short():
    long = "The ferry that leaves at noon goes to the island and comes back in the evening. Yes."
    first, *rest = cut(long)
    assert len(first) <= 48 and " ".join([first, *rest]) == long
    text = "Well, as far as I know, the ferry leaves at noon, and it is late."
    assert cut(text)[0] == "Well, as far as I know,"
    clauses = Clauses()
    found = [c.text for c in clauses.push(text)]  # before its end is known
    assert found == ["Well, as far as I know,"]
    assert [c.text for c in clauses.push("", hungry=True)] == ["the ferry leaves at noon,"]


def test_a_text_without_stops_is_spoken_all_the_same():
    found = cut("word, " * 200)
    assert (
        len(found) > 2
        and all(len(s) <= 400 for s in found)
        and " ".join(found).split() == ["word,"] * 200
    )


def test_every_clause_says_which_part_of_the_answer_it_is():
    text = "**Hello** there, *you*. See [this](https://x.org/a)!\n\n"
    text += "- one\n- two 😀\n```\ncode\n```\nEnd."
    for size in (1, 3, 1000):
        clauses, found = Clauses(), []
        for at in range(0, len(text), size):
            found += clauses.push(text[at : at + size])
        found += clauses.finish()
        assert " ".join(c.text for c in found) == "Hello there, you. See this! one two End."
        ends = [c.end for c in found]
        assert ends == sorted(ends) and ends[-1] >= len(text)
        link = next(clause for clause in found if clause.text.startswith("See"))
        assert text[: link.end].rstrip().endswith("/a)!")


@pytest.mark.parametrize(
    "text, language, expected",
    [
        ("# A *small* `title`", "en", "A small title"),
        ("| a | b |", "en", "a, b"),
        ("|---|---|", "en", ""),
        ("👍🏽 🇵🇹 1️⃣ ok ☀️", "en", "1 ok"),
        ("It is 1 °C or 21°C", "en", "It is 1 degree Celsius or 21 degrees Celsius"),
        ("100 km/h, 3.5 kg, 5 m", "en", "100 kilometres per hour, 3.5 kilograms, 5 metres"),
        ("3,5 kg und 20 °C", "de", "3,5 Kilogramm und 20 Grad Celsius"),
        ("5 km", "xx", "5 km"),
        ("at 5 mins, 5 months, A5 m", "en", "at 5 mins, 5 months, A5 m"),
        ("50 % of €5 at 12:30", "en", "50 % of €5 at 12:30"),
        ("see https://www.example.org/a?b=c now", "en", "see example.org now"),
        ("a < b and snake_case * 2", "en", "a < b and snake_case * 2"),
        ("<b>bold</b><br>", "en", "bold"),
        ("*** --- ...", "en", ""),
        ("\x00\ud800\ufffd", "en", ""),
    ],
)
def test_what_a_voice_reads(text, language, expected):
    assert spoken_form(text, language) == expected


def test_nonsense_goes_through_the_clauses():
    rng = np.random.default_rng(5)
    signs = list("ab .,!?\n*`#|-[]()<>_~😀° 5kmC\u200d\u0600。")
    for _ in range(200):
        text = "".join(rng.choice(signs, 80))
        clauses = Clauses()
        assert all(clause.text for clause in [*clauses.push(text), *clauses.finish()])


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
    assert voice.said == "Hello there. And goodbye"


def test_the_next_clause_is_synthesized_while_one_is_played():
    """The player waits until the second clause was synthesized: with one thread it would wait for
    ever.
    """
    second = threading.Event()

    def synthesize(text):
        if text == "Second.":
            second.set()
        return np.zeros(16, np.float32), 16000

    voice = Voice(synthesize, lambda samples, rate_hz: second.wait(10))
    voice.push("First. Second. ")
    voice.finish()
    voice.join()
    assert second.is_set() and voice.spoken == ["First.", "Second."]


@pytest.mark.parametrize(
    "n_heard, said",
    [(0, "First."), (99, "First."), (500, "First. And two"), (1000, "First. And two is more.")],
)
def test_what_was_said_is_counted_by_the_samples_played(n_heard, said):
    playing, stopped = threading.Event(), threading.Event()

    def play(samples, rate_hz):
        if len(samples) < 1000:
            return True
        playing.set()
        return not stopped.wait(10)

    def synthesize(text):
        return np.zeros(10 if text == "First." else 1000, np.float32), 16000

    voice = Voice(synthesize, play, stopped.set, heard=lambda: n_heard)
    voice.push("First. And two is more. Three was never reached.")
    assert playing.wait(10)
    assert voice.said == said
    voice.stop()
    voice.join()
    assert voice.said == said


def test_a_failing_synthesizer_is_kept_not_thrown():
    def broken(text):
        raise RuntimeFailure("no sound came out")

    voice = Voice(broken, lambda samples, rate_hz: True)
    voice.push("Hello. ")
    voice.finish()
    voice.join()
    assert str(voice.error) == "no sound came out"


@pytest.mark.parametrize(
    "sound, message",
    [
        (1, "the voice failed: TypeError"),
        ((np.zeros((2, 2)), 16000), r"expected samples \[n\].*got shape \[2, 2\]"),
        ((np.full(9, np.nan), 16000), "finite"),
        ((np.zeros(9), 0), "a rate above 0"),
        ((["a"], 16000), "the voice failed: ValueError"),
    ],
)
def test_a_callable_that_gives_nonsense_ends_the_speaking_and_no_more(sound, message):
    voice = Voice(lambda text: sound, lambda samples, rate_hz: True)
    voice.push("Hello. ")
    voice.finish()
    voice.join()
    with pytest.raises(RuntimeFailure, match=message):
        raise voice.error
    voice.push("More. ")  # the answer goes on
    voice.stop()


def test_a_loudspeaker_that_fails_does_not_hang_the_answer():
    def play(samples, rate_hz):
        raise DeviceLost("no loudspeaker found")

    voice = Voice(lambda text: (np.zeros(9, np.float32), 16000), play)
    voice.push("First. Second. Third. Fourth. Fifth. Sixth. ")
    voice.finish()
    voice.join()
    assert "no loudspeaker" in str(voice.error) and voice.said == ""


def test_kokoro_through_a_stand_in(monkeypatch, tmp_path):
    """A module with the interface of kokoro-onnx 0.6."""
    module = types.ModuleType("kokoro_onnx")

    class Kokoro:
        def __init__(self, model_path, voices_path):
            if not os.path.exists(model_path):
                raise FileNotFoundError(model_path)

        def get_voices(self):
            return ["af_heart", "bm_daniel"]

        def create(self, text, voice, speed=1.0, lang="en-us"):
            return np.full(len(text), 0.5, np.float32), 24000

    module.Kokoro = Kokoro
    monkeypatch.setitem(sys.modules, "kokoro_onnx", module)
    with pytest.raises(UsageError, match="is not a Kokoro voice"):
        kokoro(tmp_path / "a.onnx", tmp_path / "voices.bin")
    (tmp_path / "a.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="'x' is no voice of .*; choose one of: af_heart, bm_d"):
        kokoro(tmp_path / "a.onnx", tmp_path / "voices.bin", "x")
    samples, rate_hz = kokoro(tmp_path / "a.onnx", tmp_path / "voices.bin")("Hello")
    assert rate_hz == 24000 and samples.tolist() == [0.5] * 5
    monkeypatch.setitem(sys.modules, "kokoro_onnx", None)
    with pytest.raises(MissingExtra, match=r"edge-gemma\[kokoro\]"):
        kokoro(tmp_path / "a.onnx", tmp_path / "voices.bin")


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
