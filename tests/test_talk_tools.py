"""Tools by voice. A scripted decoder stands in for the model (scripted.py): what is shown is the
way from an utterance to a call, over a restart, to the ring; not that real weights choose the call.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from scripted import ScriptedDecoder
from test_listen import blocks, live, loudness, silence, speech

import edge_gemma
from edge_gemma import FunctionCall, Sampling
from edge_gemma.assistant import ringing
from edge_gemma.assistant import timers as timers_module
from edge_gemma.assistant.builtin_tools import builtin_tools
from edge_gemma.assistant.phrases import Phrases
from edge_gemma.assistant.ringing import Ringing
from edge_gemma.assistant.timers import Timers
from edge_gemma.assistant.tool_loop import ToolLoop
from edge_gemma.assistant.tools import Tool, Toolbox
from edge_gemma.conversation.listener import Listener
from edge_gemma.conversation.notice import Notice
from edge_gemma.conversation.transcription import ListenOptions
from edge_gemma.conversation.voice import Voice
from edge_gemma.errors import DeviceLost
from edge_gemma.hearing.utterances import SpeechDetector

OPTIONS = ListenOptions(sampling=Sampling(seed=1))
UTTERANCE = np.concatenate([silence(0.3), speech(1), silence(1.2)])


@pytest.fixture(scope="module")
def model(hearing_bundle):
    """Room enough for descriptions: the tiny vocabulary has few long tokens."""
    request = edge_gemma.PlanRequest(n_ctx=8192, n_threads=1)
    with edge_gemma.load(hearing_bundle, request=request) as loaded:
        yield loaded


class Room:
    """A scripted microphone, a voice whose sound is counted, and a loudspeaker that records."""

    def __init__(self, monkeypatch, script):
        self.source, _ = live(script, monkeypatch)
        self.said: list[str] = []
        self.rung: list[int] = []

    def voice(self):
        def synthesize(text):
            self.said.append(text)
            return np.zeros(16, np.float32), 16000

        return Voice(synthesize, lambda samples, rate_hz: True)

    def play(self, samples, rate_hz):
        self.rung.append(len(samples))
        return True

    def hear(self, chat, **parts):
        """All records until the script is over and nothing is said any more."""
        listener = Listener(
            chat,
            self.source,
            OPTIONS,
            make_voice=self.voice,
            detector=SpeechDetector(probability=loudness),
            **parts,
        )
        self.source.at_end = lambda: None if listener.answering else listener.stop()
        return list(listener.records())


def wait(seconds):
    return lambda mic: time.sleep(seconds)


def until_said(mic):
    """The answer is over, as far as its thread goes."""
    for _ in range(600):
        if not [t for t in threading.enumerate() if t.name == "edge-gemma-answer"]:
            return
        time.sleep(0.05)


def set_a_timer_by_voice(folder, state):
    """In a process of its own: hear an utterance, call the tool, confirm, and wait to be killed."""
    request = edge_gemma.PlanRequest(n_ctx=8192, n_threads=1)
    with edge_gemma.load(folder, request=request) as model, Timers(state) as timers:
        toolbox = builtin_tools(timers, state)
        with model.chat(tools=toolbox.specs) as chat:
            call = FunctionCall("set_timer", {"seconds": 1, "label": "tea"})
            scripted_decoder = ScriptedDecoder(chat, [call, "The tea timer is set."])
            said = []

            def synthesize(text):
                said.append(text)
                return np.zeros(16, np.float32), 16000

            listener = Listener(
                chat,
                blocks(UTTERANCE),
                OPTIONS,
                make_voice=lambda: Voice(synthesize, lambda samples, rate_hz: True),
                detector=SpeechDetector(probability=loudness),
                responder=ToolLoop(chat, toolbox),
            )
            records = list(listener.records())
            assert not scripted_decoder.script
            found = [(r.kind, r.text) for r in records if r.kind in ("called", "turn")]
            print(json.dumps([found, said]), flush=True)
            time.sleep(600)


@pytest.mark.compat(
    kind="talk",
    what="a timer set by voice, the process killed (-9), a new one over the same folder (a "
    "scripted decoder stands in for the model)",
    happens="rings in the new process's loop and is said, until somebody speaks or twelve times",
)
def test_a_timer_set_by_voice_rings_after_a_restart(model, hearing_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(ringing, "N_RINGS", 2)
    monkeypatch.setattr(timers_module, "MISSED_AFTER_S", 3600)  # on a busy machine
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_talk_tools; "
        f"test_talk_tools.set_a_timer_by_voice({str(hearing_bundle.folder)!r}, {str(tmp_path)!r})"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        line = process.stdout.readline()
        process.kill()
    (called, turn), said = json.loads(line)
    assert called[1].startswith("set timer (seconds: 1, label: tea) → set: timer 1 'tea' at ")
    assert turn == ["turn", "The tea timer is set."]
    assert said == ["The tea timer is set."]  # and nothing of the call
    time.sleep(1)
    with Timers(tmp_path) as timers, model.chat() as chat:
        quiet = [*blocks(silence(0.5)), wait(0.05)] * 3
        room = Room(monkeypatch, quiet)
        records = room.hear(chat, notices=Ringing(timers, room.play, gap_s=0))
        assert [r.text for r in records if r.kind == "notice"] == ["The timer tea is over."] * 2
        assert room.rung == [19200] * 2 and room.said == ["The timer tea is over."] * 2
        assert timers.all() == []
    assert not [t for t in threading.enumerate() if t.name.startswith("edge-gemma")]


def test_speech_ends_the_ringing(model, tmp_path, monkeypatch):
    stop = threading.Event()
    with Timers(tmp_path) as timers, model.chat() as chat:
        ScriptedDecoder(chat, ["All right."])
        timers.set(1, "tea")
        ringing_on = threading.Event()

        def play(samples, rate_hz):
            ringing_on.set()
            stop.wait(30)
            return False

        def until_ringing(mic):
            for _ in range(200):
                if timers.due():
                    break
                time.sleep(0.05)

        def heard_ringing(mic):
            ringing_on.wait(30)

        script = [until_ringing, *blocks(silence(0.1)), heard_ringing, *blocks(UTTERANCE)]
        room = Room(monkeypatch, script)
        records = room.hear(chat, notices=Ringing(timers, play, stop.set))
        kinds = [record.kind for record in records]
        assert kinds.index("notice") < kinds.index("interrupted") < kinds.index("turn")
        assert timers.all() == [] and room.said == ["All right."]


def until_rung(mic):
    """The ring is over, as far as its thread goes."""
    for _ in range(600):
        if not [t for t in threading.enumerate() if t.name == "edge-gemma-notice"]:
            return
        time.sleep(0.05)


def test_speech_between_two_rings_ends_them_too(model, tmp_path, monkeypatch):
    """As where nothing takes the echo out: nothing is heard while it rings."""
    with Timers(tmp_path) as timers, model.chat() as chat:
        ScriptedDecoder(chat, ["All right."])
        timers.set(1, "tea")
        script = [wait(1.1), *blocks(silence(0.1)), until_rung, *blocks(UTTERANCE)]
        room = Room(monkeypatch, script)
        records = room.hear(chat, notices=Ringing(timers, room.play, gap_s=60))
        kinds = [record.kind for record in records]
        assert kinds.count("notice") == 1 and "interrupted" not in kinds
        assert kinds[-1] == "turn" and timers.all() == []


def test_what_was_missed_is_told_once(tmp_path):
    now = [1_000_000.0]
    with Timers(tmp_path, clock=lambda: now[0], steady=lambda: now[0]) as timers:
        timers.set(60)
        timers.set_alarm(now[0] + 120, "call")
    now[0] += 7400
    with Timers(tmp_path, clock=lambda: now[0], steady=lambda: now[0]) as timers:
        rings = Ringing(timers)
        notice = rings()
        assert notice.text == (
            "While I was off, this rang: a timer, 2 hours ago. "
            "While I was off, this rang: call, 2 hours ago."
        )
        notice.done(False)
        assert rings() is None and timers.all() == []


def test_a_broken_timers_file_is_told(tmp_path):
    (tmp_path / "timers.json").write_text('{"timers": [')
    with Timers(tmp_path) as timers:
        rings = Ringing(timers)
        assert "timers.json was broken" in rings().text
        assert rings() is None


@pytest.mark.compat(
    kind="talk",
    what="a timer that is over while the microphone or the loudspeaker is away",
    happens="rings all the same, or is shown",
)
def test_it_rings_without_microphone_or_loudspeaker(model, tmp_path, monkeypatch):
    monkeypatch.setattr(ringing, "N_RINGS", 1)

    def no_loudspeaker(samples, rate_hz):
        raise DeviceLost("no loudspeaker")

    with Timers(tmp_path) as timers, model.chat() as chat:
        timers.set(1, "tea")
        room = Room(monkeypatch, [wait(1.1), DeviceLost("unplugged"), wait(0.2)])
        records = room.hear(chat, notices=Ringing(timers, no_loudspeaker))
        texts = {record.kind: record.text for record in records}
        assert texts["notice"] == "The timer tea is over." and texts["failed"] == "no loudspeaker"
        assert timers.all() == []


def unlock_toolbox(done):
    return Toolbox([Tool("unlock", "Unlock.", {}, lambda _: done.append(1), dangerous=True)])


@pytest.mark.compat(
    kind="talk",
    what="a dangerous call by voice",
    happens="the question is spoken; the next utterance is transcribed, and counts without the "
    "wake word",
)
@pytest.mark.parametrize(("answer", "times"), [("Yes, please.", 1), ("No.", 0), ("Hm?", 0)])
def test_confirmation_by_voice(model, monkeypatch, answer, times):
    done: list[int] = []
    toolbox = unlock_toolbox(done)
    gated = []

    def gate(samples):  # the wake word was said before the first utterance only
        gated.append(len(samples))
        return len(gated) == 1

    with model.chat(tools=toolbox.specs) as chat:
        decoder = ScriptedDecoder(chat, [FunctionCall("unlock"), answer, "So be it."])
        room = Room(monkeypatch, [*blocks(UTTERANCE), until_said, *blocks(UTTERANCE)])
        loop = ToolLoop(chat, toolbox, languages=["en"])
        records = room.hear(chat, responder=loop, gate=gate)
        turns = [record.text for record in records if record.kind == "turn"]
        question = Phrases.of("en").say("ask", what="unlock")
        assert turns == [question, "So be it."] and len(done) == times
        assert " ".join(room.said) == f"{question} So be it." and not decoder.script
        roles = [message.role for message in chat.messages]
        assert roles == ["user", "assistant", "tool", "assistant"]


def test_no_answer_by_voice(model, monkeypatch):
    done: list[int] = []
    toolbox = unlock_toolbox(done)
    with model.chat(tools=toolbox.specs) as chat:
        ScriptedDecoder(chat, [FunctionCall("unlock")])
        loop = ToolLoop(chat, toolbox, confirm_within_s=-1)

        def notices():
            text = loop.overdue()
            return Notice(text) if text else None

        room = Room(monkeypatch, [*blocks(UTTERANCE), until_said, *blocks(silence(0.2))])
        records = room.hear(chat, responder=loop, notices=notices)
        assert [r.text for r in records if r.kind == "notice"] == [Phrases.of("en").say("undone")]
        assert not done and not loop.asks


@pytest.mark.compat(
    kind="talk",
    what="speech while a tool hangs",
    happens="heard at once; the call is told to the model as interrupted",
)
def test_barge_in_while_a_tool_hangs(model, monkeypatch):
    gate, begun = threading.Event(), threading.Event()

    def hang(_):
        begun.set()
        gate.wait(60)

    toolbox = Toolbox([Tool("hang", "Hang.", {}, hang, timeout_s=60)])
    with model.chat(tools=toolbox.specs) as chat:
        ScriptedDecoder(chat, ["Let me see.\n" + FunctionCall("hang").to_json(), "Well."])
        until_begun = [lambda mic: begun.wait(30)]
        room = Room(monkeypatch, [*blocks(UTTERANCE), *until_begun, *blocks(UTTERANCE)])
        records = room.hear(chat, responder=ToolLoop(chat, toolbox))
        gate.set()
        kinds = [record.kind for record in records]
        assert kinds.index("called") < kinds.index("interrupted") < kinds.index("turn")
        roles = [message.role for message in chat.messages]
        assert roles == ["user", "assistant", "tool", "user", "assistant"]
        assert "hang" in chat.messages[1].content  # the call is remembered as it was made
