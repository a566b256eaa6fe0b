"""Listening: live prefill equals the whole prompt, long utterances, barge-in, and logits against
transformers.
"""

import threading
import time
from dataclasses import replace

import hearing
import numpy as np
import pytest
import soundfile

from edge_gemma.conversation.listener import Listener
from edge_gemma.conversation.live_turn import LiveTurn
from edge_gemma.conversation.transcription import ListenOptions, ask, transcribe
from edge_gemma.conversation.voice import Voice
from edge_gemma.errors import DeviceLost, MediaError, RuntimeFailure, UnsupportedModel
from edge_gemma.hearing.samples import BLOCK_SAMPLES
from edge_gemma.hearing.utterances import SpeechDetector, VadSettings
from edge_gemma.messages import Audio, Message
from edge_gemma.options import Sampling
from edge_gemma.prompts.prompt import read_special_rows
from edge_gemma.senses import Senses
from edge_gemma.spans import Rows, Tokens

REFERENCE = hearing.reference()
GREEDY = Sampling(temperature=0, max_tokens=6)
LOUD = VadSettings()


def loudness(chunk):
    return float(np.abs(chunk).max() > 0.3)


def speech(seconds, seed=0):
    rng = np.random.default_rng(seed)
    return (0.5 * np.sign(rng.standard_normal(int(seconds * 16000)))).astype(np.float32)


def silence(seconds):
    return np.zeros(int(seconds * 16000), np.float32)


@pytest.mark.parametrize("seconds", ["0.9", "6.3"])
def test_audio_prompts_give_the_logits_of_transformers(hearing_model, seconds):
    """Reference mode: 188 rows and the end row injected. The rest is llama.cpp's f16 GELU table:
    0.04 at a deviation of 0.8.
    """
    ids, want = REFERENCE[f"audio_prompt_{seconds}"].tolist(), REFERENCE[f"audio_logits_{seconds}"]
    special = read_special_rows(hearing_model.bundle)
    soft = hearing_model.encode_audio(REFERENCE[f"wave_{seconds}"])
    first, n = ids.index(897), ids.count(897)
    assert n == 188 and ids[first + n] == 896
    rows = np.concatenate(
        [soft, np.tile(special["audio_padding"], (n - len(soft), 1)), special["end_of_audio"][None]]
    )
    spans = [Tokens(ids[:first]), Rows(rows), Tokens(ids[first + n + 1 :])]
    total = sum(len(span) for span in spans)
    logits = np.concatenate(list(hearing_model.evaluate(spans, rows=range(total - 4, total))))
    assert np.abs(logits - want).max() < 0.04
    top = np.sort(want, axis=1)
    clear = top[:, -1] - top[:, -2] > 0.08
    assert clear.any() and (logits.argmax(axis=1) == want.argmax(axis=1))[clear].all()


def test_samples_in_memory_and_files_of_them(hearing_model, tmp_path):
    wave = REFERENCE["wave_0.9"]
    expected = hearing_model.encode_audio(wave)
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    for source in (wave.tolist(), tmp_path / "a.wav", (tmp_path / "a.wav").read_bytes()):
        assert np.array_equal(hearing_model.encode_audio(source), expected)
    for nothing in (np.zeros(0, np.float32), []):
        with pytest.raises(MediaError, match="holds no samples"):
            hearing_model.encode_audio(nothing)


@pytest.mark.parametrize("pad_audio", [False, True])
def test_a_live_turn_holds_exactly_the_whole_prompt(hearing_model, pad_audio):
    """Pushed packet by packet, a turn's positions are those of the prompt made at once, and so is
    its answer.
    """
    wave = REFERENCE["wave_6.3"]
    with hearing_model.chat(pad_audio=pad_audio) as live:
        turn = LiveTurn(live, "Transcribe this", pad_audio=pad_audio)
        for k in range(0, len(wave), 1000):
            turn.push(wave[k : k + 1000])
        n_early = turn.n_rows
        turn.finish()
        n_live = live.session.length
        text = "".join(chunk.text for chunk in turn.generate(GREEDY))
        rows = hearing_model.encode_audio(wave)
        assert (
            36 <= n_early <= turn.n_rows == len(rows) == 40
        )  # all but the tail was in before the end
    with hearing_model.chat(pad_audio=pad_audio) as whole:
        answer = "".join(
            chunk.text for chunk in whole.send(["Transcribe this", Audio(rows=rows)], GREEDY)
        )
        spans = hearing_model.prompt.spans(
            [Message("user", ["Transcribe this", Audio(rows=rows)])], pad_audio=pad_audio
        )
        assert n_live == sum(len(span) for span in spans)
        assert (
            [m.role for m in live.messages]
            == [m.role for m in whole.messages]
            == ["user", "assistant"]
        )
        assert _near(text, answer)


def test_after_the_last_sample_two_passes_are_left(hearing_model, monkeypatch):
    """A pass over the weights is what waiting costs: one for the last rows and the end row, one for
    the rest of the prompt and its logits.
    """
    passes: list[tuple[str, int]] = []
    decode = hearing_model.sequences.context.decode
    monkeypatch.setattr(
        hearing_model.sequences.context,
        "decode",
        lambda *a: passes.append((type(a[2]).__name__, len(a[2]))) or decode(*a),
    )
    wave = REFERENCE["wave_6.3"]
    with hearing_model.chat(pad_audio=False) as chat:
        turn = LiveTurn(chat, "Transcribe this")
        for k in range(0, 96_000, 1000):
            turn.push(wave[k : k + 1000])
        assert (
            passes[3:] == [("Rows", 3)] * 11
        )  # one for each step; the first came behind the held-back end of the instruction
        early = turn.n_rows
        passes.clear()
        turn.push(wave[96_000:])
        turn.finish()
        for _ in turn.generate(GREEDY):
            break
        assert (
            early == 36
            and [kind for kind, _ in passes] == ["Rows", "Tokens"]
            and passes[0][1] == 1 + 4 + 1
        )  # held back, the tail, the end row


def _near(a, b):
    """Different ubatch splits round differently (specs): the first token must agree, the rest may
    drift.
    """
    return a[:1] == b[:1]


def test_a_second_turn_continues_the_conversation(hearing_model):
    with hearing_model.chat() as chat:
        list(chat.send("Hello", GREEDY))
        before = chat.session.length
        turn = LiveTurn(chat, "And this?")
        turn.push(REFERENCE["wave_0.9"])
        turn.finish()
        assert (
            chat.session.length > before
        )  # appended behind the first turn, which was not prefilled again
        end = list(turn.generate(GREEDY))[-1]
        assert (
            end.usage.reused_tokens >= before - 1
        )  # the last token of an answer is decoded when it is needed
        list(chat.send("Go on", GREEDY))
        assert [m.role for m in chat.messages] == ["user", "assistant"] * 3


def test_turns_forgotten_for_speech_are_reported(hearing_model):
    """As for text: the last chunk says how many went, and only whole turns go."""
    wave = REFERENCE["wave_6.3"]
    with hearing_model.chat(system="Keep this.") as chat:
        dropped = 0
        for _ in range(14):
            turn = LiveTurn(chat, "What is this? " * 4, max_tokens=GREEDY.max_tokens)
            turn.push(wave)
            turn.finish()
            dropped += list(turn.generate(GREEDY))[-1].usage.dropped_turns
        assert dropped > 0 and chat.messages[0].content == "Keep this."
        assert len(chat.messages) == 1 + 2 * (14 - dropped)


def test_an_abandoned_turn_forgets_nothing(hearing_model):
    with hearing_model.chat() as chat:
        list(chat.send("Hello", GREEDY))
        before = list(chat.messages)
        turn = LiveTurn(chat, "And this?")
        turn.push(REFERENCE["wave_0.9"])
        turn.abandon()
        assert chat.messages == before
        assert list(chat.send("Go on", GREEDY))[-1].finish_reason
        with pytest.raises(RuntimeFailure, match="no turn is being spoken"):
            chat.end_turn()


def test_a_text_in_the_middle_of_a_spoken_turn_ends_it(hearing_model):
    with hearing_model.chat() as chat:
        turn = LiveTurn(chat, "And this?")
        list(chat.send("Never mind", GREEDY))
        with pytest.raises(RuntimeFailure, match="no turn is being spoken"):
            turn.push(REFERENCE["wave_0.9"])
        assert [m.content for m in chat.messages if m.role == "user"] == ["Never mind"]


def test_a_spoken_turn_after_one_that_was_stopped_before_its_answer(hearing_model):
    """The conversation is rendered anew then, with the soft tokens of the first turn in it."""
    wave = REFERENCE["wave_0.9"]
    with hearing_model.chat(pad_audio=False) as chat:
        for expected in (2, 4):
            turn = LiveTurn(chat, "And this?")
            turn.push(wave)
            turn.finish()
            list(turn.generate(GREEDY))
            chat._continues = False  # as after an answer without words
            assert len(chat.messages) == expected
        spans = hearing_model.prompt.spans(chat.messages[:3], pad_audio=False)
        assert (
            sum(len(span) for span in spans) < chat.session.length
            and chat.messages[0].content[1].rows.shape[0] == 6
        )


def test_a_cut_turn_holds_both_clips(hearing_model):
    wave = REFERENCE["wave_0.9"]
    with hearing_model.chat() as chat:
        turn = LiveTurn(chat, "Both")
        turn.push(wave)
        turn.cut()
        turn.push(wave)
        turn.finish()
        n = chat.session.length
        list(turn.generate(GREEDY))
        rows = hearing_model.encode_audio(wave)
        spans = hearing_model.prompt.spans(
            [Message("user", ["Both", Audio(rows=rows), Audio(rows=rows)])], pad_audio=False
        )
        assert n == sum(len(span) for span in spans)
        assert [len(part.rows) for part in chat.messages[0].content[1:]] == [6, 6]


def test_transcribe_gives_a_segment_per_utterance_with_times(hearing_model):
    x = np.concatenate([silence(1), speech(2), silence(2), speech(1), silence(1)])
    with hearing_model.chat() as chat:
        detector = SpeechDetector(probability=loudness)
        found = list(
            transcribe(
                chat,
                (x[k : k + 4000] for k in range(0, len(x), 4000)),
                options=ListenOptions(sampling=GREEDY),
                detector=detector,
            )
        )
    assert [(round(s.start_s, 1), round(s.end_s, 1)) for s in found] == [(1.0, 3.0), (5.0, 6.0)]
    assert all(isinstance(s.text, str) for s in found)


def test_transcribe_cuts_what_is_longer_than_a_clip_and_loses_nothing(hearing_model):
    x = np.concatenate([speech(45), silence(1)])
    with hearing_model.chat() as chat:
        found = list(
            transcribe(
                chat,
                [x],
                options=ListenOptions(sampling=Sampling(temperature=0, max_tokens=2)),
                detector=SpeechDetector(probability=loudness),
            )
        )
    assert (
        len(found) == 2
        and found[0].end_s == found[1].start_s <= 30
        and abs(found[1].end_s - 45) < 0.1
    )


def test_silence_and_nothing_give_no_segments(hearing_model):
    with hearing_model.chat() as chat:
        for x in (silence(3), silence(0), np.zeros(1, np.float32)):
            assert list(transcribe(chat, [x])) == []


def test_ask_answers_a_question_about_a_sound(hearing_model):
    with hearing_model.chat() as chat:
        chunks = list(
            ask(chat, [REFERENCE["wave_0.9"]], "What is this?", ListenOptions(sampling=GREEDY))
        )
    assert chunks[-1].finish_reason and chunks[-1].usage.completion_tokens


def test_records_of_a_session(hearing_model):
    x = np.concatenate([silence(1), speech(3), silence(1.5)])
    blocks = [x[k : k + BLOCK_SAMPLES] for k in range(0, len(x), BLOCK_SAMPLES)]
    with hearing_model.chat() as chat:
        listener = Listener(
            chat,
            blocks,
            ListenOptions(sampling=GREEDY),
            detector=SpeechDetector(probability=loudness),
        )
        records = list(listener.records())
    kinds = [r.kind for r in records]
    assert kinds[0] == "speech" and kinds.index("speech") < kinds.index("partial") < kinds.index(
        "silence"
    ) < kinds.index("turn")
    assert (
        abs(records[0].at_s - 1) < 0.05
        and abs(next(r for r in records if r.kind == "silence").at_s - 4) < 0.05
    )
    turn = records[kinds.index("turn")]
    assert (
        turn.text == "".join(r.text for r in records if r.kind == "text")
        and turn.wait_s > 0
        and turn.end.finish_reason
    )
    assert not [t for t in threading.enumerate() if t.name.startswith("edge-gemma")]


def live(script, monkeypatch):
    """A live Microphone whose blocks come from a script of arrays, callables and errors."""
    from edge_gemma.conversation import listener as listen

    class Scripted:
        name, dropped_blocks, n_waiting = "scripted", 0, 0

        def __init__(self):
            self.script = iter(script)
            self.reopened = 0
            self.at_end = lambda: None

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def read(self, timeout_s):
            item = next(self.script, None)
            if item is None:
                listener_stop.set()
                self.at_end()
                return np.zeros(0, np.float32)
            if isinstance(item, Exception):
                raise item
            if callable(item):
                item(self)
                return np.zeros(0, np.float32)
            return item

        def reopen(self):
            self.reopened += 1
            if self.reopened == 1:
                raise DeviceLost("still away")

    listener_stop = threading.Event()
    monkeypatch.setattr(listen, "Microphone", Scripted)
    monkeypatch.setattr(listen, "RETRY_S", 0.01)
    return Scripted(), listener_stop


def run(listener):
    """All records until the script is over and the last answer has come."""
    listener.source.at_end = lambda: None if listener.answering else listener.stop()
    return list(listener.records())


def blocks(x):
    return [x[k : k + BLOCK_SAMPLES] for k in range(0, len(x), BLOCK_SAMPLES)]


def test_speech_stops_an_answer(hearing_model, monkeypatch):
    """The voice would speak for ever; the second utterance silences it, and is answered in its
    turn.
    """
    voices = []

    def play(samples, rate_hz):
        voices[-1].gate.wait(30)
        return False

    def make_voice():
        gate = threading.Event()
        voice = Voice(lambda text: (np.zeros(10, np.float32), 16000), play, gate.set)
        voice.gate = gate
        voices.append(voice)
        return voice

    def until_speaking(mic):
        until = time.monotonic() + 20
        while not (voices and voices[-1].spoken) and time.monotonic() < until:
            time.sleep(0.01)

    def end_voice(mic):
        voices[-1].gate.set()

    script = [
        *blocks(np.concatenate([speech(1), silence(1)])),
        until_speaking,
        *blocks(np.concatenate([speech(1), silence(1)])),
        until_speaking,
        end_voice,
    ]
    source, stop = live(script, monkeypatch)
    with hearing_model.chat() as chat:
        sampling = Sampling(temperature=0, max_tokens=400)
        listener = Listener(
            chat,
            source,
            ListenOptions(sampling=sampling),
            make_voice=make_voice,
            detector=SpeechDetector(probability=loudness),
        )
        kinds = []
        for record in listener.records():
            kinds.append(record.kind)
            if record.kind == "silence" and kinds.count("silence") == 2:
                voices_before = len(voices)
            if stop.is_set() and not listener.answering:
                break
            if stop.is_set():
                listener.stop()
        assert (
            kinds.index("interrupted") > kinds.index("silence")
            and kinds.count("speech") == 2
            and kinds.count("silence") == 2
        )
        assert voices_before >= 1
    assert not [t for t in threading.enumerate() if t.name.startswith("edge-gemma")]


def test_a_lost_microphone_is_reported_and_taken_back(hearing_model, monkeypatch):
    script = [
        *blocks(speech(0.5)),
        DeviceLost("the microphone is gone"),
        *blocks(np.concatenate([speech(1), silence(1)])),
    ]
    source, _ = live(script, monkeypatch)
    with hearing_model.chat() as chat:
        listener = Listener(
            chat,
            source,
            ListenOptions(sampling=GREEDY),
            detector=SpeechDetector(probability=loudness),
        )
        records = run(listener)
        kinds = [r.kind for r in records]
        assert kinds[:2] == ["ready", "speech"] and "lost" in kinds and "back" in kinds
        assert (
            kinds.index("lost") < kinds.index("back") < len(kinds) - 1 - kinds[::-1].index("speech")
        )
        # what was being said when it was lost is answered, and so is what is said afterwards
        assert kinds.count("silence") == 2 and kinds.index("lost") < kinds.index("silence")
        assert kinds.count("turn") + kinds.count("interrupted") == 2 and "failed" not in kinds
        assert next(r for r in records if r.kind == "lost").text == "the microphone is gone"


def test_the_encoder_is_let_go_while_answering_where_the_plan_says_so(hearing_model, monkeypatch):
    """One at a time: open while someone speaks, closed from the first token to the last, open again
    for the next utterance.
    """
    plan = hearing_model.plan
    frugal = replace(plan.settings, encoders="one at a time")
    monkeypatch.setattr(hearing_model, "senses", Senses(hearing_model.bundle, frugal))
    open_while: dict[str, set[bool]] = {}
    real = hearing_model.decoder.is_end  # asked once for every sampled token
    monkeypatch.setattr(
        hearing_model.decoder,
        "is_end",
        lambda token: (
            open_while.setdefault("answering", set()).add(
                "audio" in hearing_model.senses.open_encoders
            )
            or real(token)
        ),
    )
    x = np.concatenate([speech(1), silence(1), speech(1), silence(1)])
    with hearing_model.chat() as chat:
        for record in Listener(
            chat,
            blocks(x),
            ListenOptions(sampling=GREEDY),
            detector=SpeechDetector(probability=loudness),
        ).records():
            if record.kind == "partial":
                open_while.setdefault("listening", set()).add(
                    "audio" in hearing_model.senses.open_encoders
                )
            assert record.kind != "failed", record
        assert len(chat.messages) == 4
    assert (
        open_while == {"listening": {True}, "answering": {False}}
        and "audio" in hearing_model.senses.open_encoders
    )


def test_a_wake_word_gates_each_utterance(hearing_model):
    said = iter([False] * 40 + [True] + [False] * 10_000)
    x = np.concatenate([speech(1), silence(1), speech(1), silence(1), speech(1), silence(1)])
    with hearing_model.chat() as chat:
        listener = Listener(
            chat,
            blocks(x),
            ListenOptions(sampling=GREEDY),
            gate=lambda block: next(said),
            detector=SpeechDetector(probability=loudness),
        )
        records = list(listener.records())
    assert [r.kind for r in records if r.kind in ("speech", "turn")] == ["speech", "turn"]


def test_a_text_only_bundle_is_refused(tiny_model):
    with (
        tiny_model.chat() as chat,
        pytest.raises(UnsupportedModel, match="no audio encoder, so it cannot hear"),
    ):
        LiveTurn(chat)


def test_the_chat_remembers_what_was_heard_of_an_answer(hearing_model):
    """The cache follows in the next turn: it holds the prompt of the shortened conversation."""
    with hearing_model.chat() as chat:
        for _ in chat.send("Hello", GREEDY):
            pass
        chat.heard_only(" Once upon ")
        assert [m.content for m in chat.messages] == ["Hello", "Once upon"]
        for _ in chat.send("And then?", GREEDY):
            pass
        prompt_tokens = chat.reply.end.usage.prompt_tokens
        spans = hearing_model.prompt.spans(chat.messages[:3])
        assert prompt_tokens == sum(map(len, spans))
        chat.heard_only("")  # nothing was said before it was cut off: a turn still has an answer
        assert chat.messages[-1].content == "…"
    with hearing_model.chat() as chat:
        chat.heard_only("nothing was asked")
        assert chat.messages == []


def test_a_listener_hears_through_the_echo_canceller_and_the_filters(hearing_model):
    """What the gate, the detector and the encoder get is what the filters let through."""
    from edge_gemma.hearing.echo import EchoCanceller

    sound, got = np.concatenate([speech(1), silence(1)]), []

    def halved(samples):
        got.append(samples)
        return samples * np.float32(0.5)

    def gate(samples):
        assert np.abs(samples).max(initial=0) <= 0.25
        return True

    with hearing_model.chat() as chat:
        listener = Listener(
            chat,
            blocks(sound),
            ListenOptions(sampling=GREEDY),
            detector=SpeechDetector(probability=lambda x: float(np.abs(x).max() > 0.2)),
            gate=gate,
            echo=EchoCanceller(),
            filters=[halved],
        )
        kinds = [record.kind for record in listener.records()]
    assert kinds.count("speech") == 1 and "turn" in kinds
    heard = np.concatenate(got)
    assert np.array_equal(heard, sound[: len(heard)]) and len(sound) - len(heard) < 256


def test_behind_a_gate_times_count_all_of_the_sound(hearing_model):
    """And an utterance begins behind the gate: not with the end of the one before."""
    opens = {3 * 16000 // BLOCK_SAMPLES, 8 * 16000 // BLOCK_SAMPLES}
    numbers = iter(range(10_000))
    x = np.concatenate([silence(4), speech(1), silence(4), speech(1), silence(1)])
    with hearing_model.chat(pad_audio=False) as chat:
        asked = []

        def gate(block):
            asked.append(next(numbers) + skipped())
            return asked[-1] in opens

        def skipped():
            """Blocks that were not asked about, because it was open."""
            return round(listener._listening._n_samples / BLOCK_SAMPLES) - len(asked)

        listener = Listener(
            chat,
            blocks(x),
            ListenOptions(sampling=GREEDY),
            gate=gate,
            detector=SpeechDetector(probability=loudness),
        )
        records = list(listener.records())
        starts = [r.at_s for r in records if r.kind == "speech"]
        assert starts == pytest.approx([4.0, 9.0], abs=0.05)
        turns = [m.content[0] for m in chat.messages if m.role == "user"]
        assert len(turns) == 2 and len(turns[0].rows) == len(turns[1].rows)


def test_an_answer_is_shown_while_it_comes_with_a_wake_word_too(hearing_model, monkeypatch):
    seen, gated = threading.Event(), iter([True])

    class Slow:
        asks = False

        def instruction(self, usual):
            return usual

        def answer(self, generate, sampling, stopped, tell):
            from edge_gemma.conversation.stream import Chunk

            time.sleep(0.3)  # the block that ended the utterance has been worked off
            yield Chunk("One ")
            assert seen.wait(5)
            yield Chunk("two.", finish_reason="stop")

        def spoken(self):
            pass

    said = np.concatenate([silence(0.1), speech(1), silence(1)])
    quiet = [b for _ in range(400) for b in (*blocks(silence(0.032)), lambda mic: time.sleep(0.02))]
    source, _ = live([*blocks(said), *quiet], monkeypatch)
    with hearing_model.chat() as chat:
        listener = Listener(
            chat,
            source,
            ListenOptions(sampling=GREEDY),
            gate=lambda block: next(gated, False),
            detector=SpeechDetector(probability=loudness),
            responder=Slow(),
        )
        for record in listener.records():
            if record.kind == "text":
                seen.set()
            if record.kind == "turn":
                listener.stop()
        assert seen.is_set() and record.text == "One two."


def test_attention_decides_block_by_block_and_cuts(hearing_model):
    """What is being said when it cuts is forgotten; too little speech is no turn."""
    x = np.concatenate([speech(1), silence(0.1), speech(1), silence(1), speech(0.15), silence(1)])

    class Attention:
        n, cut = 0, False

        def hears(self, samples):
            self.n += len(samples)
            return True

        def cuts(self):
            cuts, self.cut = not self.cut and self.n > 17000, self.cut or self.n > 17000
            return cuts

    with hearing_model.chat(pad_audio=False) as chat:
        listener = Listener(
            chat,
            blocks(x),
            ListenOptions(sampling=GREEDY, shortest_s=0.2),
            attention=Attention(),
            detector=SpeechDetector(probability=loudness),
        )
        records = list(listener.records())
        kinds = [r.kind for r in records if r.kind in ("speech", "silence", "turn", "ignored")]
        assert kinds == ["speech", "speech", "silence", "turn", "speech", "ignored"]
        (turn,) = [m.content[0] for m in chat.messages if m.role == "user"]
        assert len(turn.rows) < 12  # of the second second alone


@pytest.mark.parametrize("look_back_s", [0.0, 0.16])
def test_what_is_said_while_the_word_is_not_known_yet(hearing_model, look_back_s):
    """The gate opens 0.16 s into an utterance."""
    x = np.concatenate([silence(2.016), speech(2), silence(1)])
    numbers = iter(range(1000))
    with hearing_model.chat(pad_audio=False) as chat:
        listener = Listener(
            chat,
            blocks(x),
            ListenOptions(sampling=GREEDY, look_back_s=look_back_s),
            gate=lambda block: next(numbers) == 67,
            detector=SpeechDetector(probability=loudness),
        )
        records = list(listener.records())
        (start,) = [r.at_s for r in records if r.kind == "speech"]
        assert start == pytest.approx(2.176 - look_back_s, abs=0.001)
        (turn,) = [m.content[0] for m in chat.messages if m.role == "user"]
        expected = hearing_model.encode_audio(np.zeros(round((2.04 + look_back_s) * 16000)))
        assert abs(len(turn.rows) - len(expected)) <= 1


def test_stopping_ends_a_voice_too(hearing_model, monkeypatch):
    """Not only the decoding: what was decoded is not spoken to its end."""
    silenced, speaking = threading.Event(), threading.Event()

    def play(samples, rate_hz):
        speaking.set()
        assert silenced.wait(20)
        return False

    said = np.concatenate([silence(0.1), speech(1), silence(1)])
    source, _ = live([*blocks(said), lambda mic: speaking.wait(20)], monkeypatch)
    with hearing_model.chat() as chat:
        listener = Listener(
            chat,
            source,
            ListenOptions(sampling=Sampling(max_tokens=40, seed=1)),
            make_voice=lambda: Voice(
                lambda text: (np.zeros(10, np.float32), 16000), play, silenced.set
            ),
            detector=SpeechDetector(probability=loudness),
        )
        source.at_end = lambda: listener.stop() if speaking.is_set() else None
        started = time.monotonic()
        kinds = [record.kind for record in listener.records()]
    assert kinds[-1] == "interrupted" and "turn" not in kinds
    assert time.monotonic() - started < 15
    assert not [t for t in threading.enumerate() if t.name.startswith("edge-gemma")]
