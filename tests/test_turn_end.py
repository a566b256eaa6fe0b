"""The end of a turn: expected in a silence, taken back exactly; pauses that adapt."""

import hearing
import numpy as np
import pytest
from test_listen import GREEDY, blocks, live, loudness, run, silence, speech

from edge_gemma.conversation.listener import Listener
from edge_gemma.conversation.live_turn import LiveTurn
from edge_gemma.conversation.transcription import ListenOptions
from edge_gemma.conversation.turn_end import TurnEnd
from edge_gemma.errors import Cancelled, ContextFull, UsageError
from edge_gemma.hearing.pauses import Clues, Habit, PauseRule
from edge_gemma.hearing.utterances import SpeechDetector, VadSettings

WAVE = hearing.reference()["wave_6.3"]


@pytest.fixture
def passes(hearing_model, monkeypatch):
    """(kind, positions) of each pass over the weights."""
    found, context = [], hearing_model.sequences.context
    decode, step = context.decode, context.decode_step
    monkeypatch.setattr(
        context, "decode", lambda *a: found.append((type(a[2]).__name__, len(a[2]))) or decode(*a)
    )
    monkeypatch.setattr(
        context, "decode_step", lambda *a, **k: found.append(("step", 1)) or step(*a, **k)
    )
    return found


def text_of(turn):
    return "".join(chunk.text for chunk in turn.generate(GREEDY))


@pytest.mark.compat(
    kind="talk", what="A pause that was the end", happens="nothing is left to compute behind it"
)
def test_behind_an_expected_end_the_first_token_needs_no_pass(hearing_model, passes):
    with hearing_model.chat(pad_audio=False) as chat:
        turn = LiveTurn(chat, "Transcribe this")
        turn.push(WAVE)
        turn.finish()
        n, plain = chat.session.length, text_of(turn)
    with hearing_model.chat(pad_audio=False) as chat:
        turn = LiveTurn(chat, "Transcribe this")
        turn.push(WAVE)
        passes.clear()
        assert turn.expect_end() is None and chat.expects_end
        assert [kind for kind, _ in passes] == ["Rows", "Tokens"]  # as without, but sooner
        passes.clear()
        turn.push(np.zeros(0, np.float32))  # the end itself brings no samples
        turn.finish()
        chunks = turn.generate(GREEDY)
        first = next(chunks)
        assert not passes and chat.session.length == n + 1
        assert first.text + "".join(chunk.text for chunk in chunks) == plain
        assert [len(part.rows) for part in chat.messages[0].content[1:]] == [40]


def test_speech_that_goes_on_takes_an_expected_end_back(hearing_model, passes):
    with hearing_model.chat(pad_audio=False) as chat:
        turn = LiveTurn(chat, "Transcribe this")
        turn.push(WAVE[:50_000])
        turn.push(WAVE[50_000:])
        expected = list(passes)
        turn.finish()
        keys, plain = list(chat.session.keys), text_of(turn)
    passes.clear()
    with hearing_model.chat(pad_audio=False) as chat:
        turn = LiveTurn(chat, "Transcribe this")
        turn.push(WAVE[:50_000])
        before, n_before = len(passes), chat.session.length
        for _ in range(3):
            turn.expect_end(ask=True)
        done = len(passes)
        turn.push(WAVE[50_000:50_001])
        assert not chat.expects_end and chat.session.length == n_before
        turn.push(WAVE[50_001:])
        assert passes[:before] + passes[done:] == expected  # no pass is repeated
        turn.finish()
        assert list(chat.session.keys) == keys  # rows by their digests: bit for bit
        assert text_of(turn) == plain


def test_an_expected_end_at_a_cut_or_with_a_full_context(hearing_model, monkeypatch):
    with hearing_model.chat(pad_audio=False) as chat:
        turn = LiveTurn(chat, "Both")
        turn.push(WAVE)
        turn.expect_end()
        turn.cut()
        turn.push(WAVE[:16000])
        turn.expect_end()
        turn.finish()
        text_of(turn)
        assert [len(part.rows) for part in chat.messages[0].content[1:]] == [40, 7]
    with hearing_model.chat(pad_audio=False) as chat:
        turn = LiveTurn(chat, "Both")
        turn.push(WAVE)
        before = list(chat.session.keys)
        for error in (ContextFull("full"), Cancelled(0)):
            with monkeypatch.context() as patch:
                patch.setattr(chat.session, "prefill_whole", lambda error=error: _raise(error))
                with pytest.raises(type(error)):
                    turn.expect_end()
            assert list(chat.session.keys) == before and not chat.expects_end
        turn.finish()
        assert text_of(turn) is not None


def _raise(error):
    raise error


def test_the_model_is_asked_for_the_end(hearing_model, passes):
    with hearing_model.chat(pad_audio=False) as chat:
        turn = LiveTurn(chat, "Transcribe this")
        turn.push(WAVE)
        passes.clear()
        over = turn.expect_end(ask=True)
        assert over is not None and 0 <= over <= 1
        assert [kind for kind, _ in passes] == ["Rows", "Tokens", "Tokens"]
        turn.finish()
        text_of(turn)


def test_a_forked_clip_ends_by_itself(hearing_model):
    encoder = hearing_model.chat().senses.audio()
    plain, stream = encoder.encode(WAVE), encoder.stream()
    rows = [stream.push(WAVE[:40_000])]
    half = np.concatenate([rows[0], stream.fork().finish()])
    assert np.array_equal(half, encoder.encode(WAVE[:40_000]))
    rows += [stream.push(WAVE[40_000:]), stream.finish()]
    assert np.array_equal(np.concatenate(rows), plain)


@pytest.mark.parametrize("expect_end", [True, False])
def test_a_session_with_pauses_is_the_same_with_and_without(
    hearing_model, monkeypatch, passes, expect_end
):
    sound = np.concatenate([silence(0.5), speech(1), silence(0.4), speech(1), silence(1.5)])
    source, _ = live(blocks(sound), monkeypatch)
    with hearing_model.chat(pad_audio=False) as chat:
        listener = Listener(
            chat,
            source,
            ListenOptions(sampling=GREEDY, expect_end=expect_end),
            detector=SpeechDetector(probability=loudness),
        )
        records = run(listener)
    kinds = [record.kind for record in records]
    assert kinds.count("speech") == kinds.count("silence") == kinds.count("turn") == 1
    (message,) = [message for message in chat.messages if message.role == "user"]
    assert len(message.content[0].rows) == 18  # 2.9 s with what is kept around the words


def test_what_was_said_ends_a_turn_sooner_or_later(hearing_model, monkeypatch):
    """``turn_over`` is asked once at each pause, and decides which one is the end."""
    asked, says = [], [0.9, 0.0, 0.9]
    parts = [speech(1), silence(0.45), speech(1), silence(0.9), speech(1), silence(2)]
    source, _ = live(blocks(np.concatenate(parts)), monkeypatch)
    with hearing_model.chat(pad_audio=False) as chat:
        listener = Listener(
            chat,
            source,
            ListenOptions(sampling=GREEDY, vad=VadSettings(rule=PauseRule())),
            detector=SpeechDetector(VadSettings(rule=PauseRule()), loudness),
            turn_over=lambda: asked.append(1) or says[len(asked) - 1],
        )
        ends = [record.at_s for record in run(listener) if record.kind == "silence"]
    assert len(asked) == 3 and ends == pytest.approx([1, 4.35], abs=0.05)


def test_pauses_follow_their_clues():
    rule = PauseRule()
    assert rule.pause_s(Clues()) == rule.usual_s
    overs = [rule.pause_s(Clues(over=over)) for over in np.linspace(0, 1, 21)]
    assert overs == sorted(overs, reverse=True)
    assert (overs[0], overs[-1]) == (rule.longest_s, rule.shortest_s)
    assert rule.pause_s(Clues(inner_s=0.5)) == pytest.approx(0.65)
    assert rule.pause_s(Clues(inner_s=0.5, over=0.9)) == rule.shortest_s
    assert rule.pause_s(Clues(unsure=0.3)) == pytest.approx(0.9)
    assert rule.pause_s(Clues(unsure=0.3, over=0.0)) == rule.longest_s
    for usual_s in (0.1, 0.6, 5.0):
        assert PauseRule.around(usual_s).usual_s == usual_s
    for wrong in ({"usual_s": 0.1}, {"longest_s": 9}, {"shortest_s": 0}, {"usual_s": "long"}):
        with pytest.raises(UsageError):
            PauseRule(**wrong)


def test_a_pause_within_an_utterance_makes_the_next_one_longer():
    settings = VadSettings(end_s=0.6, rule=PauseRule())
    parts = [speech(1), silence(0.55), speech(1), silence(0.65), speech(1), silence(2)]
    sound = np.concatenate(parts)
    detector = SpeechDetector(settings, loudness)
    ends = [event for event in detector.push(sound) if event.kind == "end"]
    assert len(ends) == 1
    fixed = SpeechDetector(VadSettings(), loudness)
    assert len([event for event in fixed.push(sound) if event.kind == "end"]) == 2


@pytest.mark.parametrize("pause_s, sooner", [(0.2, True), (0.8, False)])
def test_the_pause_of_a_speaker_is_learned(pause_s, sooner):
    """Ten utterances with a pause each, 3 s apart: whoever pauses briefly waits less, whoever
    pauses long is cut off at first and then no more.
    """
    one = np.concatenate([speech(1), silence(pause_s), speech(1), silence(3)])
    detector = SpeechDetector(VadSettings(rule=PauseRule()), loudness)
    counts, waits = [], []
    for _ in range(10):
        events = []
        for number, block in enumerate(blocks(one)):
            found = [event for event in detector.push(block) if event.kind == "end"]
            events += [number * 512 / 16000 - (2 + pause_s) for _ in found]
        counts.append(len(events))
        waits.append(events[-1])
    assert counts[-5:] == [1] * 5 and (counts[0] == 1) == sooner
    assert (waits[-1] < 0.5) if sooner else (1 < waits[-1] < 1.3)
    other = detector.restarted()  # another stream of the same speaker, after a lost microphone
    ends = [event for event in other.push(np.concatenate([one, one])) if event.kind == "end"]
    assert len(ends) == 2


def test_habits_need_a_few_utterances():
    habit = Habit()
    habit.went_on(1.0)  # of what?
    for longest_s in (0.2, 0.2, 0.2):
        habit.add(longest_s)
    assert habit.pause_s is None
    habit.add(0.2)
    assert habit.pause_s == 0.2
    habit.went_on(0.9)
    assert habit.pause_s == 0.9
    rule = PauseRule()
    assert rule.pause_s(Clues(habit_s=0.9)) == pytest.approx(1.17)
    assert rule.pause_s(Clues(habit_s=0.0)) == rule.shortest_s
    assert rule.pause_s(Clues(habit_s=0.9, over=0.9)) == rule.shortest_s


def test_a_text_model_is_asked_for_the_end(hearing_model):
    with TurnEnd(hearing_model.session(), hearing_model.prompt) as turn_end:
        found = [turn_end.probability(text) for text in ("Set a timer for", "Set a timer for ten")]
        assert all(0 <= over <= 1 for over in found)
        assert turn_end.probability("Set a timer for.") == pytest.approx(found[0], abs=1e-3)
        assert turn_end.probability(" … ") == 0
        with pytest.raises(ContextFull):
            turn_end.probability("word " * 2000)
