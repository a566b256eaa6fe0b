"""Hear first, then decode: an open encoder and the decoder's mapped weights are never in memory
together, and the answers are those of the usual mode.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from test_listen import GREEDY, loudness, silence, speech
from test_service import served, text_of
from test_spoken import clip, expected, question, spoken

import edge_gemma
from edge_gemma import cli
from edge_gemma.conversation.listener import Listener
from edge_gemma.conversation.live_turn import LiveTurn
from edge_gemma.conversation.transcription import ListenOptions, transcribe
from edge_gemma.errors import MediaError, UsageError
from edge_gemma.hearing.utterances import SpeechDetector
from edge_gemma.machine.footprint import resident_bytes
from edge_gemma.messages import Audio, Image
from edge_gemma.options import Sampling
from edge_gemma.plan.records import PlanRequest
from edge_gemma.serve.answer import GenerationRequest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux gives pages back"
)


@pytest.fixture(scope="module")
def first(hearing_bundle):
    """The model of ``hearing_model``, loaded to hear first; its weights rest."""
    request = PlanRequest(n_threads=1, encoders="hear first")
    with edge_gemma.load(hearing_bundle, n_ctx=1024, request=request) as model:
        assert model.plan.settings.encoders == "hear first"
        yield model


def hot_bytes(model) -> int:
    """Of the weights that every token reads, what this process holds where the file is mapped."""
    tensors = model.bundle.manifest.decoder.tensors
    ranges = [(t.offset, t.nbytes) for t in tensors if t.use == "matmul"]
    return resident_bytes(model.bundle.decoder_path, ranges)


@contextmanager
def watched(model, monkeypatch):
    """(open encoders, weights in memory) at every step of the encoder and of the decoder."""
    seen: dict[str, set[tuple[bool, bool]]] = {"encoder": set(), "decoder": set()}
    whole = sum(t.nbytes for t in model.bundle.manifest.decoder.tensors if t.use == "matmul")

    def note(who):
        seen[who].add((bool(model.senses.open_encoders), hot_bytes(model) > whole // 4))

    context = model.sequences.context
    decode, step = context.decode, context.decode_step

    def decoding(*arguments, **named):
        note("decoder")
        return decode(*arguments, **named)

    def stepping(*arguments, **named):
        note("decoder")
        return step(*arguments, **named)

    import edge_gemma.hearing.encoder as encoding

    run = encoding.AudioEncoder.run

    def running(encoder, feeds):
        note("encoder")
        return run(encoder, feeds)

    with monkeypatch.context() as patch:
        patch.setattr(context, "decode", decoding)
        patch.setattr(context, "decode_step", stepping)
        patch.setattr(encoding.AudioEncoder, "run", running)
        yield seen


def live(model, samples, *, cut_at=0):
    with model.chat() as chat:
        turn = LiveTurn(chat, "Write it down.", max_tokens=8)
        for start in range(0, len(samples), 1600):
            turn.push(samples[start : start + 1600])
            if start == cut_at > 0:
                turn.cut()
            if start == 9600:  # a pause, but not the end
                over = turn.expect_end(ask=True)
                assert (over is None) == model.senses.hears_first
        turn.finish()
        return [id for chunk in turn.generate(GREEDY) for id in chunk.token_ids]


@pytest.mark.parametrize("cut_at", [0, 16000])
@pytest.mark.compat(
    kind="board",
    what="a bundle that hears on a board that cannot hold its encoder beside the decoder's weights",
    happens="it hears first: the encoder is closed before the weights are read again; the tokens "
    "are those of the usual mode",
)
def test_a_spoken_turn_gives_the_tokens_of_the_usual_mode(
    first, hearing_model, monkeypatch, cut_at
):
    samples = clip(2.5)
    with watched(first, monkeypatch) as seen:
        tokens = live(first, samples, cut_at=cut_at)
    assert tokens and tokens == live(hearing_model, samples, cut_at=cut_at)
    # an encoder that is open has the weights' memory, and nothing is decoded before it is closed
    assert seen == {"encoder": {(True, False)}, "decoder": {(False, True)}}
    assert first.senses.open_encoders == ()


def test_clips_of_messages_and_a_second_turn(first, hearing_model, monkeypatch):
    clips = [clip(1.2), clip(0.7)]

    def told(model):
        with model.chat(pad_audio=False) as chat:
            for samples in clips:
                for _ in chat.send(["What?", Audio(samples)], GREEDY):
                    pass
            for _ in chat.send("And without a sound?", GREEDY):
                pass
            return [message.content for message in chat.messages if message.role == "assistant"]

    with watched(first, monkeypatch) as seen:
        answers = told(first)
    assert answers == told(hearing_model)
    assert seen == {"encoder": {(True, False)}, "decoder": {(False, True)}}


def test_a_clip_of_a_message_leaves_no_encoder_open_where_the_plan_holds_none(hearing_bundle):
    """ "One at a time": the plan counts an encoder while it is in use, not while answering."""
    request = PlanRequest(n_threads=1, encoders="one at a time")
    with edge_gemma.load(hearing_bundle, n_ctx=1024, request=request) as model:
        chat = model.chat()
        for _ in chat.send([Audio(speech(0.5)), "what?"], GREEDY):
            assert model.senses.open_encoders == ()


def test_soft_tokens_wait_and_an_encoder_that_is_asked_for_again_is_opened_again(first):
    rows = first.encode_audio(clip(1.0))
    assert first.senses.open_encoders == ("audio",)
    before = hot_bytes(first)
    list(first.evaluate("abc", rows="last"))
    assert first.senses.open_encoders == () and hot_bytes(first) > 4 * before
    assert np.array_equal(first.encode_audio(clip(1.0)), rows)
    assert hot_bytes(first) <= before


def test_a_conversation_by_voice(first, hearing_model, monkeypatch):
    """The encoder is open again before the next utterance, not after its first word."""
    samples = np.concatenate([speech(1), silence(1), speech(1), silence(1)])

    def held(model):
        blocks = (samples[i : i + 512] for i in range(0, len(samples), 512))
        detector = SpeechDetector(probability=loudness)
        with model.chat() as chat:
            listener = Listener(chat, blocks, ListenOptions(sampling=GREEDY), detector=detector)
            records = list(listener.records())
        assert not [record.text for record in records if record.kind == "failed"]
        return [record.text for record in records if record.kind == "turn"]

    with watched(first, monkeypatch) as seen:
        answers = held(first)
    assert len(answers) == 2 and answers == held(hearing_model)
    assert seen == {"encoder": {(True, False)}, "decoder": {(False, True)}}
    assert first.senses.open_encoders == ("audio",)


def test_a_file_of_several_utterances(first, hearing_model):
    samples = np.concatenate([speech(0.8), silence(1), speech(0.8, seed=1), silence(1)])

    def written(model):
        blocks = (samples[i : i + 512] for i in range(0, len(samples), 512))
        detector = SpeechDetector(probability=loudness)
        with model.chat() as chat:
            options = ListenOptions(sampling=GREEDY)
            return [s.text for s in transcribe(chat, blocks, "Write.", options, detector)]

    texts = written(first)
    assert len(texts) == 2 and texts == written(hearing_model)


def test_a_turn_that_is_abandoned_leaves_the_conversation_as_it_was(first):
    with first.chat() as chat:
        turn = LiveTurn(chat, "What?")
        turn.push(clip(1.0))
        turn.abandon()
        assert chat.messages == []
        assert [chunk for chunk in chat.send("Hi", GREEDY)][-1].finish_reason
        assert first.senses.open_encoders == ()


def test_spoken_turns_of_a_server(first, hearing_model):
    """What is spoken while another answer runs waits for its lane: a decode would close the encoder
    under it.
    """
    samples = clip()
    endless = Sampling(max_tokens=600, temperature=0, grammar="root ::= [a-z] root")

    async def talk(service):
        alone = await spoken(service, samples)
        running = service.submit(GenerationRequest(prompt="a", sampling=endless))
        await anext(running)
        async with service.listen(question()) as answer:
            for start in range(0, len(samples), 1600):
                assert await answer.push(samples[start : start + 1600]) == 0
            assert first.senses.open_encoders == ()
            await answer.finish()
            with pytest.raises(UsageError, match="spoken to its end"):
                await answer.push(samples)
            running.cancel()
            await running.__aexit__()
            behind = [chunk async for chunk in answer]
        return alone, behind

    alone, behind = served(first, talk)
    assert text_of(alone) == text_of(behind) == expected(hearing_model, samples)


def test_broken_samples_that_waited_end_their_turn_alone(first):
    broken = np.full(16000, np.nan, np.float32)
    endless = Sampling(max_tokens=600, temperature=0, grammar="root ::= [a-z] root")

    async def talk(service):
        running = service.submit(GenerationRequest(prompt="a", sampling=endless))
        await anext(running)
        async with service.listen(question()) as answer, service.listen(question()) as long:
            await answer.push(broken)
            await answer.finish()
            with pytest.raises(MediaError, match="more than 30 s"):
                await long.push(clip(31.0))
            running.cancel()
            await running.__aexit__()
            with pytest.raises(MediaError, match="NaN|finite"):
                await asyncio.wait_for(anext(answer), 20)
        return await spoken(service, clip())

    assert text_of(served(first, talk))


def test_pictures_are_seen_first_too(looking_bundle, cat_png):
    def told(model):
        with model.chat() as chat:
            chunks = chat.send([Image(cat_png), "What is this?"], GREEDY)
            return [id for chunk in chunks for id in chunk.token_ids]

    request = PlanRequest(n_threads=1, encoders="hear first")
    with edge_gemma.load(looking_bundle, n_ctx=512, request=request) as model:
        resting = hot_bytes(model)
        assert len(model.encode_image(Image(cat_png))) and hot_bytes(model) <= resting
        tokens = told(model)
        assert model.senses.open_encoders == () and hot_bytes(model) > 4 * resting
    with edge_gemma.load(looking_bundle, n_ctx=512, request=PlanRequest(n_threads=1)) as usual:
        assert tokens == told(usual)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PlanRequest(encoders="hear first", n_seq_max=2), "there are 2 sequences"),
        (PlanRequest(encoders="sometimes"), "'sometimes' is unknown"),
    ],
)
def test_what_cannot_hear_first_is_refused_by_name(hearing_bundle, request_, message):
    with pytest.raises(UsageError, match=message):
        edge_gemma.plan_bundle(hearing_bundle, request=request_)


def said(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, arguments)])
    out, error = capsys.readouterr()
    return int(end.value.code or 0), out, error


def test_the_command_tells_the_mode_its_price_and_both_phases(hearing_bundle, capsys):
    plan = ("plan", hearing_bundle.folder, "--ctx", "512")
    code, out, _ = said(capsys, *plan, "--encoders", "hear-first", "--device", "pi-4-2gb")
    assert code == 0 and "conceded: hear first, then decode" in out
    assert "this board's card that reads 43 MB/s" in out
    assert "in use while an encoder is open" in out
    _, out, _ = said(capsys, *plan, "--encoders", "hear-first", "--json")
    assert json.loads(out)["settings"]["encoders"] == "hear first"
    _, out, _ = said(capsys, *plan)
    assert "hear first" not in out
    code, _, error = said(capsys, *plan, "--encoders", "later")
    assert code == 2 and "resident, one-at-a-time, hear-first" in error
