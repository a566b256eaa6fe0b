"""serve/service.py: many conversations on one model, without HTTP."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

import edge_gemma
from edge_gemma.conversation.generation import TokenLoop
from edge_gemma.conversation.session import Session
from edge_gemma.errors import ContextFull, RuntimeFailure, ServiceBusy, UsageError
from edge_gemma.messages import Image, Message
from edge_gemma.options import Sampling
from edge_gemma.serve.answer import BUFFERED_CHUNKS, GenerationRequest
from edge_gemma.serve.service import Service
from edge_gemma.spans import Tokens

GREEDY = Sampling(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def lanes(tiny_bundle):
    """The tiny model with two sequences."""
    request = edge_gemma.PlanRequest(n_threads=1, n_seq_max=2)
    with edge_gemma.load(tiny_bundle, n_ctx=512, request=request) as model:
        yield model


def served(model, talk, **options):
    """Run ``talk(service)`` in an event loop; the service must close in time."""

    async def run():
        service = Service(model, **options)
        try:
            return await asyncio.wait_for(talk(service), 60)
        finally:
            assert await service.close(timeout_s=5)

    return asyncio.run(run())


async def collected(service, **request):
    async with service.submit(GenerationRequest(**request)) as answer:
        return [chunk async for chunk in answer]


def _all_of(loop):
    while loop.n_active:
        yield from loop.step()


def text_of(chunks):
    return "".join(chunk.text for chunk in chunks)


def test_answers_are_those_of_the_model_however_many_run_together(lanes):
    prompts = [f"prompt number {n}" for n in range(6)]

    async def talk(service):
        answers = [collected(service, prompt=prompt, sampling=GREEDY) for prompt in prompts]
        return await asyncio.gather(*answers), service.health()

    answers, health = served(lanes, talk)
    for prompt, chunks in zip(prompts, answers, strict=True):
        assert text_of(chunks) == text_of(lanes.generate(prompt, GREEDY))
        assert chunks[-1].usage.completion_tokens == len(
            [token for chunk in chunks for token in chunk.token_ids]
        )
    assert (health.n_answered, health.n_failed, health.n_running) == (6, 0, 0)
    assert health.ready and health.completion_tokens > 0


def test_a_conversation_is_answered_as_a_chat_answers(lanes):
    async def talk(service):
        return await collected(service, messages=[Message("user", "Hello")], sampling=GREEDY)

    chunks = served(lanes, talk)
    with lanes.chat() as chat:
        assert text_of(chunks) == text_of(chat.send("Hello", GREEDY))


def test_the_next_turn_of_a_conversation_reuses_its_cache(lanes):
    first = [Message("user", "a word " * 40)]
    other = [Message("user", "something else " * 40)]

    async def talk(service):
        answer = text_of(await collected(service, messages=first, sampling=GREEDY))
        await collected(service, messages=other, sampling=GREEDY)
        n_first = service.health().prompt_tokens
        more = [*first, Message("assistant", answer or "x"), Message("user", "and then?")]
        chunks = await collected(service, messages=more, sampling=GREEDY)
        return chunks[-1].usage, n_first

    usage, _ = served(lanes, talk)
    assert usage.reused_tokens > usage.prompt_tokens // 2


def test_a_full_queue_refuses_and_tells_the_place(lanes):
    endless = Sampling(max_tokens=400, temperature=0)

    async def talk(service):
        answers = [service.submit(GenerationRequest(prompt="a", sampling=endless))]
        while len(answers) < 5:
            answers.append(service.submit(GenerationRequest(prompt="a", sampling=endless)))
        assert [answer.place for answer in answers] == [0, 0, 1, 2, 3]
        with pytest.raises(ServiceBusy) as busy:
            service.submit(GenerationRequest(prompt="a"))
        assert busy.value.retry_after_s >= 1
        for answer in answers:
            answer.cancel()
        chunks = await collected(service, prompt="b", sampling=GREEDY)
        return chunks, service.health()

    chunks, health = served(lanes, talk, max_waiting=3)
    assert chunks[-1].finish_reason
    assert health.n_refused == 1 and health.n_cancelled >= 4


def test_a_reader_that_leaves_stops_its_generation_and_nobody_elses(lanes, monkeypatch):
    steps = []
    step = TokenLoop.step
    monkeypatch.setattr(TokenLoop, "step", lambda loop: steps.append(loop.n_active) or step(loop))
    never_ends = Sampling(max_tokens=450, grammar="root ::= [a-z] root")

    async def talk(service):
        other = asyncio.create_task(collected(service, prompt="ab", sampling=GREEDY))
        async with service.submit(GenerationRequest(prompt="xyz", sampling=never_ends)) as answer:
            await anext(answer)
        seen = len(steps)
        chunks = await other
        while service.health().n_running:
            await asyncio.sleep(0.005)
        return chunks, len(steps) - seen

    chunks, _ = served(lanes, talk)
    assert text_of(chunks) == text_of(lanes.generate("ab", GREEDY))
    assert len(steps) < 60  # of the 450 that were asked for


def test_a_reader_that_reads_nothing_holds_nobody_up(lanes):
    long = Sampling(max_tokens=200, temperature=0, grammar="root ::= [a-z] root")

    async def talk(service):
        slow = service.submit(GenerationRequest(prompt="slow", sampling=long))
        quick = await collected(service, prompt="quick", sampling=GREEDY)
        while service.health().n_running:
            await asyncio.sleep(0.005)
        async with slow:
            return quick, [chunk async for chunk in slow]

    quick, slow = served(lanes, talk)
    assert quick[-1].finish_reason
    assert len(slow) <= BUFFERED_CHUNKS
    assert text_of(slow) == text_of(lanes.generate("slow", long))
    assert sum(len(chunk.token_ids) for chunk in slow) == slow[-1].usage.completion_tokens


def test_a_lane_that_fails_fails_alone(lanes):
    impossible = Sampling(max_tokens=20, temperature=0, grammar='root ::= "a" "\\x00"')

    async def talk(service):
        good = collected(service, prompt="fine", sampling=GREEDY)
        bad = collected(service, prompt="bad", sampling=impossible)
        long = collected(service, prompt="word " * 600, sampling=GREEDY)
        results = await asyncio.gather(good, bad, long, return_exceptions=True)
        again = await collected(service, prompt="fine", sampling=GREEDY)
        return results, again, service.health()

    (good, bad, long), again, health = served(lanes, talk)
    assert text_of(good) == text_of(again) == text_of(lanes.generate("fine", GREEDY))
    assert isinstance(bad, RuntimeFailure) and "cannot be completed" in str(bad)
    assert isinstance(long, ContextFull)
    assert health.n_failed == 2 and health.n_answered == 2


def test_the_token_loop_goes_on_when_one_of_its_lanes_fails(lanes):
    """The loop itself: the failed lane has an error, the other its whole answer."""
    sequences = lanes.sequences
    loop = TokenLoop(sequences.decoder, sequences.context, sequences.weights)
    with Session(sequences) as one, Session(sequences) as two:
        for session in (one, two):
            session.replace([Tokens([2, 300, 301])])
        bad = loop.add(one, Sampling(max_tokens=20, grammar='root ::= "a" "\\x00"'))
        good = loop.add(two, GREEDY)
        ends = {lane.index: lane for lane, chunk in _all_of(loop)}
    assert bad.error is not None and ends[bad.index].generation.finish_reason == "failed"
    assert good.error is None and good.generation.finish_reason in ("length", "stop")


def test_a_conversation_beyond_the_context_is_refused_or_shortened(lanes):
    talk_so_far = []
    for n in range(12):
        talk_so_far += [Message("user", f"{n} " * 30), Message("assistant", "yes")]
    talk_so_far.append(Message("user", "so?"))

    async def talk(service):
        with pytest.raises(ContextFull, match="context holds 512"):
            await collected(service, messages=talk_so_far, sampling=GREEDY)
        return await collected(service, messages=talk_so_far, sampling=GREEDY, truncate=True)

    assert served(lanes, talk)[-1].usage.dropped_turns > 0


def test_what_cannot_mean_anything_is_refused(lanes):
    async def talk(service):
        for request in (GenerationRequest(), GenerationRequest([Message("user", "a")], "b")):
            with pytest.raises(UsageError):
                service.submit(request)
        picture = [Message("user", ["see", Image(b"x")])]
        with pytest.raises(edge_gemma.EdgeGemmaError):
            await collected(service, messages=picture)
        with pytest.raises(UsageError):
            await collected(service, prompt="a", sampling=Sampling(grammar="nonsense"))
        return await collected(service, prompt="a", sampling=GREEDY)

    assert served(lanes, talk)


def test_a_fault_inside_ends_what_runs_and_the_service_goes_on(lanes, monkeypatch):
    step, n = TokenLoop.step, []

    def broken(loop):
        n.append(1)
        if len(n) == 2:
            raise ZeroDivisionError("a fault")
        return step(loop)

    monkeypatch.setattr(TokenLoop, "step", broken)

    async def talk(service):
        with pytest.raises(RuntimeFailure, match="a fault"):
            await collected(service, prompt="a b c", sampling=GREEDY)
        return await collected(service, prompt="a b c", sampling=GREEDY)

    assert text_of(served(lanes, talk)) == text_of(lanes.generate("a b c", GREEDY))


def test_closing_refuses_what_waits_and_cuts_off_what_runs(lanes):
    endless = Sampling(max_tokens=450, grammar="root ::= [a-z] root")

    async def talk():
        service = Service(lanes)
        running = [service.submit(GenerationRequest(prompt="a", sampling=endless))]
        await anext(running[0])
        waiting = [service.submit(GenerationRequest(prompt="a", sampling=endless)) for _ in "abc"]
        started = time.perf_counter()
        closed = await service.close(timeout_s=0.05)
        took_s = time.perf_counter() - started
        with pytest.raises(ServiceBusy, match="cut off"):
            assert not [chunk.finish_reason async for chunk in running[0] if chunk.finish_reason]
        with pytest.raises(ServiceBusy):
            await anext(waiting[-1])
        with pytest.raises(ServiceBusy):
            service.submit(GenerationRequest(prompt="a"))
        return closed, took_s, service.health()

    closed, took_s, health = asyncio.run(talk())
    assert closed and took_s < 4
    assert not health.live and not health.ready
    assert not [t for t in threading.enumerate() if t.name == "edge-gemma-serve"]


def test_a_long_prompt_is_prefilled_between_the_tokens_of_others(lanes):
    """One ubatch at a time; the answers are those of a prompt that was prefilled whole."""
    sequences = lanes.sequences
    n_ubatch = sequences.context.settings.n_ubatch
    long = [Tokens([2, *range(300, 300 + n_ubatch + 100)])]
    expected = text_of(lanes.generate(long, GREEDY))
    endless = Sampling(max_tokens=40, temperature=0, grammar="root ::= [a-z] root")
    loop = TokenLoop(sequences.decoder, sequences.context, sequences.weights, shared=True)
    with Session(sequences) as one, Session(sequences) as two:
        one.replace([Tokens([2, 300, 301])])
        two.replace(long)
        first = loop.add(one, endless)
        loop.step()
        second = loop.add(two, GREEDY)
        produced = []
        while not second.prefilled:
            produced.append(loop.step())
        # a pass for each ubatch, and beside each a token of the other
        assert [sum(lane is first for lane, _ in step) for step in produced] == [1, 1]
        chunks = [chunk for lane, chunk in (*sum(produced, []), *_all_of(loop)) if lane is second]
    assert text_of(chunks) == expected
    assert chunks[-1].usage.prompt_tokens == n_ubatch + 101


def test_an_urgent_prompt_goes_before_others(lanes):
    sequences = lanes.sequences
    loop = TokenLoop(sequences.decoder, sequences.context, sequences.weights, shared=True)
    with Session(sequences) as one, Session(sequences) as two:
        for session in (one, two):
            session.replace([Tokens([2, 300, 301])])
        usual, urgent = loop.add(one, GREEDY), loop.add(two, GREEDY, urgent=True)
        loop.step()
        assert urgent.prefilled and not usual.prefilled
        loop.close()
