"""serve/spoken.py and the lanes: turns that are spoken into a service while others are answered."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from test_service import collected, served, text_of

import edge_gemma
from edge_gemma.conversation.transcription import ListenOptions, ask
from edge_gemma.errors import ContextFull, MediaError, ServiceBusy, UnsupportedModel, UsageError
from edge_gemma.messages import Audio, Message
from edge_gemma.options import Sampling
from edge_gemma.serve.answer import GenerationRequest

GREEDY = Sampling(max_tokens=8, temperature=0)
ENDLESS = Sampling(max_tokens=600, temperature=0, grammar="root ::= [a-z] root")


@pytest.fixture(scope="module")
def hearing(hearing_bundle):
    """The reference Gemma 3n that hears, with two sequences."""
    request = edge_gemma.PlanRequest(n_threads=1, n_seq_max=2)
    with edge_gemma.load(hearing_bundle, n_ctx=1024, request=request) as model:
        yield model


def clip(seconds=2.0):
    t = np.arange(int(16000 * seconds)) / 16000
    return (np.sin(900 * t) * np.sin(3 * t) / 2).astype(np.float32)


def question(text="What?", **options):
    message = Message("user", [text, Audio()])
    return GenerationRequest([message], sampling=GREEDY, urgent=True, pad_audio=False, **options)


async def spoken(service, samples, request=None, n=1600):
    async with service.listen(request or question()) as answer:
        for start in range(0, len(samples), n):
            await answer.push(samples[start : start + n])
        await answer.finish()
        return [chunk async for chunk in answer]


def expected(model, samples, text="What?"):
    with model.chat() as chat:
        blocks = [samples[i : i + 1600] for i in range(0, len(samples), 1600)]
        return text_of(ask(chat, blocks, text, ListenOptions(sampling=GREEDY)))


def test_a_spoken_turn_is_answered_as_the_library_answers_it(hearing):
    samples = clip()

    async def talk(service):
        return await spoken(service, samples), service.health()

    chunks, health = served(hearing, talk)
    assert text_of(chunks) == expected(hearing, samples) and chunks[-1].usage.prompt_tokens > 12
    assert (health.n_answered, health.n_failed, health.n_running) == (1, 0, 0)


def test_what_was_spoken_is_prefilled_while_it_is_spoken(hearing):
    """After the last sample only the encoder's tail and the end of the prompt are left."""
    samples = clip(4.0)

    async def talk(service):
        async with service.listen(question()) as answer:
            await answer.push(samples)
            while service.slots()[0].prompt_tokens < 20:
                await asyncio.sleep(0.005)
            [slot] = service.slots()
            assert slot.state == "listening" and slot.urgent
            await answer.finish()
            return [chunk async for chunk in answer]

    assert text_of(served(hearing, talk)) == expected(hearing, samples)


def test_a_lane_is_kept_for_speech(hearing):
    """Texts take the others, however many wait."""
    samples = clip()

    async def talk(service):
        texts = [service.submit(GenerationRequest(prompt="a", sampling=ENDLESS)) for _ in range(3)]
        await anext(texts[0])
        assert [answer.place for answer in texts] == [0, 1, 2]
        chunks = await spoken(service, samples)
        waiting = service.health().n_waiting
        for answer in texts:
            answer.cancel()
        return chunks, waiting

    chunks, waiting = served(hearing, talk, n_urgent=1)
    assert waiting == 2 and text_of(chunks) == expected(hearing, samples)


def test_speech_goes_before_text_in_the_queue(hearing):
    order = []

    async def noted(name, coroutine):
        await coroutine
        order.append(name)

    async def talk(service):
        running = [
            service.submit(GenerationRequest(prompt="a", sampling=ENDLESS)) for _ in range(2)
        ]
        await anext(running[1])
        text = asyncio.create_task(noted("text", collected(service, prompt="b", sampling=GREEDY)))
        await asyncio.sleep(0.01)
        speech = asyncio.create_task(noted("speech", spoken(service, clip(0.5))))
        while service.health().n_waiting < 2:
            await asyncio.sleep(0.005)
        running[0].cancel()
        await speech
        running[1].cancel()
        await text

    served(hearing, talk)
    assert order == ["speech", "text"]


def test_two_speak_at_once_and_a_third_leaves(hearing):
    one, two = clip(1.5), clip(2.5)[::-1].copy()

    async def leaves(service):
        async with service.listen(question()) as answer:
            await answer.push(clip(1.0))

    async def talk(service):
        results = await asyncio.gather(spoken(service, one), spoken(service, two), leaves(service))
        while service.health().n_running:
            await asyncio.sleep(0.005)
        again = await spoken(service, one)
        return results, again, service.health()

    (first, second, _), again, health = served(hearing, talk)
    assert text_of(first) == text_of(again) == expected(hearing, one)
    assert text_of(second) == expected(hearing, two)
    assert health.n_cancelled == 1 and health.n_failed == 0


def test_what_cannot_be_heard_is_refused(hearing, tiny_model):
    async def talk(service):
        for broken in (np.full(1600, np.nan, np.float32), np.zeros((2, 4), np.float32)):
            with pytest.raises(MediaError):
                await spoken(service, broken)
        with pytest.raises(MediaError, match="30 s"):
            await spoken(service, np.zeros(31 * 16000, np.float32), n=16000)
        with pytest.raises(ContextFull):
            await spoken(service, clip(), question("word " * 1200))
        for message in ("a", ["a"], ["a", Audio(), Audio()], ["a", Audio(), Audio(clip())]):
            with pytest.raises(UsageError):
                service.listen(GenerationRequest([Message("user", message)]))
        async with service.listen(question()) as answer:
            await answer.push(clip())
            await answer.finish()
            with pytest.raises(UsageError, match="to its end"):
                await answer.push(clip())
        return await spoken(service, clip())

    assert text_of(served(hearing, talk)) == expected(hearing, clip())

    async def deaf(service):
        with pytest.raises(UnsupportedModel):
            service.listen(question())

    served(tiny_model, deaf)
    with pytest.raises(UsageError, match="n_seq_max"):
        served(tiny_model, deaf, n_urgent=1)


def test_closing_in_the_middle_of_a_spoken_turn(hearing):
    async def talk():
        from edge_gemma.serve.service import Service

        service = Service(hearing)
        answer = service.listen(question())
        await answer.push(clip())
        closed = await service.close(timeout_s=0.05)
        with pytest.raises(ServiceBusy, match="cut off"):
            await anext(answer)
        return closed

    assert asyncio.run(talk())


def test_others_are_answered_while_a_clip_is_encoded(hearing, monkeypatch):
    """The encoder has a thread of its own."""
    import threading

    release = threading.Event()
    encode = hearing.senses.encode_audio

    def slow(source):
        assert release.wait(20)
        return encode(source)

    monkeypatch.setattr(hearing.senses, "encode_audio", slow)
    messages = [Message("user", ["What?", Audio(clip(0.5))])]

    async def talk(service):
        heard = asyncio.create_task(collected(service, messages=messages, sampling=GREEDY))
        while not service.slots():
            await asyncio.sleep(0.005)
        assert service.slots()[0].state == "encoding"
        left = service.submit(GenerationRequest(messages, sampling=GREEDY))
        text = await collected(service, prompt="quick", sampling=GREEDY, urgent=True)
        left.cancel()
        release.set()
        return text, await heard, service.health()

    text, heard, health = served(hearing, talk)
    assert text[-1].finish_reason and heard[-1].finish_reason
    assert health.n_running == 0 and health.n_cancelled == 1
