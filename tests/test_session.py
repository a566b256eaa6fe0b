"""Sessions and chats on a real small model: nothing is prefilled twice, nothing is lost, and a full
context says so.
"""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import edge_gemma
from edge_gemma import PlanRequest, Rows, Sampling, Tokens
from edge_gemma.conversation.fitting import fit
from edge_gemma.errors import (
    BundleError,
    Cancelled,
    ContextFull,
    EdgeGemmaError,
    RuntimeFailure,
    UsageError,
)
from edge_gemma.machine.footprint import footprint
from edge_gemma.messages import Message
from edge_gemma.units import MiB


@pytest.fixture(scope="module", params=["llama", "onnx"])
def tiny_model(request, tiny_model):
    """Every test here with both engines."""
    return tiny_model if request.param == "llama" else request.getfixturevalue("onnx_model")


def loaded_again(model, **wanted):
    """The bundle of ``model`` once more, in the same engine."""
    request = PlanRequest(n_threads=1, engine=model.plan.settings.engine, **wanted)
    return edge_gemma.load(model.bundle, n_ctx=256, request=request)


SHORT = Sampling(seed=11, max_tokens=8)  # greedy would repeat one token: the weights are random
WORDS = [f"word{i} and some more of it" for i in range(200)]


def text(chunks) -> str:
    return "".join(chunk.text for chunk in chunks)


def ids(chunks) -> list[int]:
    return [i for chunk in chunks for i in chunk.token_ids]


def test_a_prompt_that_extends_an_earlier_one_reuses_its_cache(tiny_model):
    prompt = "a longer text to begin with"
    first = list(tiny_model.generate(prompt, SHORT))
    n = first[-1].usage.prompt_tokens
    again = list(tiny_model.generate(prompt, SHORT))
    assert (
        ids(again) == ids(first) and again[-1].usage.reused_tokens == n - 1
    )  # the last position is decoded for its logits
    more = list(tiny_model.generate(prompt + " and more of it", SHORT))
    assert 0 < more[-1].usage.reused_tokens < more[-1].usage.prompt_tokens


def test_reuse_answers_as_a_fresh_cache_does(tiny_model):
    shared, other = "the same beginning of two prompts", "the same beginning of three questions"
    with tiny_model.session() as fresh:
        fresh.append(tiny_model.spans(other))
        expected = ids(fresh.generate(SHORT))
    list(tiny_model.generate(shared, SHORT))
    assert ids(tiny_model.generate(other, SHORT)) == expected


def test_turns_are_prefilled_once(tiny_model):
    with tiny_model.chat() as chat:
        before = 0
        for i in range(4):
            end = list(chat.send(WORDS[i], Sampling(max_tokens=5, seed=i)))[-1]
            # all that was there before is reused; only the last generated token was never decoded
            assert end.usage.reused_tokens >= before - 1
            before = chat.session.length


def test_appending_piece_by_piece_holds_what_one_prompt_holds(tiny_model):
    """A product over one row and one over many round differently on some CPUs (by 0.002 of a
    deviation of 0.8 here), so not the same bits.
    """
    tokens = tiny_model.tokenize("one two three four five six")
    with tiny_model.session() as whole, tiny_model.session() as pieces:
        whole.append([Tokens([2, *tokens])])
        expected = likely(whole)
        pieces.append([Tokens([2])])
        for token in tokens:
            pieces.append([Tokens([token])])
        found = likely(pieces)
        assert found.keys() == expected.keys()
        assert max(abs(found[token] - expected[token]) for token in expected) < 0.02


def likely(session) -> dict[int, float]:
    """The log-probabilities of the eight likeliest next tokens."""
    (first, *_) = [
        entry
        for chunk in session.generate(Sampling(temperature=0, max_tokens=1, logprobs=8))
        for entry in chunk.logprobs
    ]
    return dict(first.top)


def test_two_sessions_share_one_place_in_the_cache(tiny_model):
    with tiny_model.session() as a, tiny_model.session() as b:
        a.append(tiny_model.spans(WORDS[0]))
        b.append(tiny_model.spans(WORDS[1]))
        first_a, first_b = ids(a.generate(SHORT)), ids(b.generate(SHORT))
        second_a = ids(a.generate(SHORT))
    with tiny_model.session() as alone:
        alone.append(tiny_model.spans(WORDS[0]))
        assert ids(alone.generate(SHORT)) == first_a != first_b
        assert ids(alone.generate(SHORT)) == second_a


def test_a_busy_sequence_is_not_taken_away(tiny_model):
    with tiny_model.session() as a, tiny_model.session() as b:
        a.append(tiny_model.spans("abc"))
        running = a.generate(Sampling(max_tokens=50))
        next(running)
        with pytest.raises(RuntimeFailure, match="n_seq_max"):
            b.append(tiny_model.spans("a b c d"))
        running.close()
        b.replace(tiny_model.spans("a b c d"))
        assert ids(b.generate(SHORT))


def test_seeds_reproduce(tiny_model):
    runs = [
        ids(tiny_model.generate("once", Sampling(max_tokens=12, seed=seed))) for seed in (7, 7, 8)
    ]
    assert runs[0] == runs[1] != runs[2]
    end = list(tiny_model.generate("once", Sampling(max_tokens=12)))[-1]
    assert ids(tiny_model.generate("once", Sampling(max_tokens=12, seed=end.usage.seed)))


def test_a_full_context_forgets_the_oldest_turns_and_says_so(tiny_model):
    with tiny_model.chat(system="Keep this.") as chat:
        dropped = 0
        for word in WORDS[:40]:
            end = list(chat.send(word, Sampling(max_tokens=6, seed=1)))[-1]
            dropped += end.usage.dropped_turns
            assert chat.session.length <= chat.session.n_ctx
        assert dropped > 0 and chat.messages[0].content == "Keep this."
        assert len(chat.messages) < 2 * 40
        assert chat.messages[-2].content == WORDS[39]


def test_a_turn_that_can_never_fit_is_refused_and_taken_back_whole(tiny_model):
    """Nothing is forgotten for a turn that does not come about: not the turns before it, nor the
    cache.
    """
    with tiny_model.chat() as chat:
        for word in WORDS[:3]:
            list(chat.send(word, SHORT))
        before, length = list(chat.messages), chat.session.length
        assert len(before) == 6
        with pytest.raises(ContextFull, match="the last turn alone takes"):
            list(chat.send("x y z " * 400, SHORT))
        assert chat.messages == before and chat.session.length == length
        end = list(chat.send("still here", SHORT))[-1]
        assert end.usage.reused_tokens >= length - 1 and end.usage.dropped_turns == 0


def test_fitting_changes_nothing_it_is_given():
    talk = [Message(role, "x" * 10) for role in ("system", *("user", "assistant") * 3, "user")]
    kept = tuple(talk)
    fitted = fit(
        talk, render=list, length=lambda messages: 10 * len(messages), n_ctx=60, n_reserve=5
    )
    assert tuple(talk) == kept and fitted.dropped == 2  # 40 ≤ 45: a quarter is free
    assert fitted.messages == (talk[0], *talk[5:])


def test_a_prompt_longer_than_the_context_and_an_empty_one(tiny_model):
    with pytest.raises(ContextFull, match="the context holds 512"):
        list(tiny_model.generate("x y z " * 400, SHORT))
    with pytest.raises(UsageError, match="empty"):
        list(tiny_model.generate("", SHORT))
    with pytest.raises(UsageError, match="empty"):
        list(tiny_model.generate([], SHORT))
    with tiny_model.session() as session, pytest.raises(UsageError, match="nothing to continue"):
        list(session.generate(SHORT))


def test_the_end_of_the_context_is_a_finish_reason(tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model.decoder, "is_end", lambda token: False)
    with tiny_model.session() as session:
        session.append([Tokens([2, *([300] * 505)])])
        end = list(session.generate(Sampling(max_tokens=400, temperature=0)))[-1]
        assert end.finish_reason == "context" and session.length == 512
        assert end.usage.completion_tokens == 6


def test_cancel_stops_and_the_session_goes_on(tiny_model):
    with tiny_model.session() as session:
        session.append(tiny_model.spans(WORDS[0]))
        seen = []
        for chunk in session.generate(Sampling(max_tokens=400, seed=3)):
            seen += chunk.token_ids
            if len(seen) == 3:
                session.cancel()
        assert chunk.finish_reason in ("cancelled", "stop") and len(seen) == 3
        assert list(session.generate(SHORT))[-1].finish_reason != "cancelled"


def test_a_cancelled_prefill_takes_the_turn_back(tiny_model, monkeypatch):
    decode = tiny_model.sequences.context.decode
    with tiny_model.chat() as chat:
        list(chat.send("before", SHORT))

        def stopped(*arguments):
            chat.cancel()
            decode(*arguments)

        before = list(chat.messages)
        monkeypatch.setattr(tiny_model.sequences.context, "decode", stopped)
        (chunk,) = chat.send("x y z " * 60, SHORT)
        assert chunk.finish_reason == "cancelled" and chunk.usage is None
        assert chat.messages == before
        monkeypatch.undo()
        assert list(chat.send("again", SHORT))[-1].finish_reason
        assert [m.content for m in chat.messages if m.role == "user"] == ["before", "again"]


def test_a_cancelled_append_is_one_of_our_errors(tiny_model, monkeypatch):
    decode = tiny_model.sequences.context.decode
    with tiny_model.session() as session:

        def stopped(*arguments):
            session.cancel()
            decode(*arguments)

        monkeypatch.setattr(tiny_model.sequences.context, "decode", stopped)
        with pytest.raises(EdgeGemmaError) as stop:
            session.append(tiny_model.spans("x y z " * 60))
    assert isinstance(stop.value, Cancelled) and stop.value.position == 0
    assert stop.value.exit_code == 130


def test_another_sessions_cancel_does_not_end_an_answer(tiny_model):
    sampling = Sampling(max_tokens=12, temperature=0)
    with tiny_model.session() as session, tiny_model.session() as other:
        session.append(tiny_model.spans(WORDS[0]))
        expected = ids(session.generate(sampling))
        session.replace(tiny_model.spans(WORDS[0]))
        found = []
        for chunk in session.generate(sampling):
            found += chunk.token_ids
            other.cancel()
        assert found == expected


def test_save_and_restore_continue_the_same(tiny_model, tmp_path):
    with tiny_model.chat(system="S") as chat:
        list(chat.send("first", Sampling(max_tokens=6, seed=1)))
        chat.save(tmp_path / "talk")
        expected = text(chat.send("second", SHORT))
    with tiny_model.chat() as chat:
        chat.restore(tmp_path / "talk")
        assert [m.role for m in chat.messages] == ["system", "user", "assistant"]
        chunks = list(chat.send("second", SHORT))
        assert text(chunks) == expected and chunks[-1].usage.reused_tokens > 0


def test_a_saved_session_is_no_chat(tiny_model, tmp_path):
    """The chat refuses it, and goes on with its own turns."""
    with tiny_model.session() as session:
        session.append(tiny_model.spans("something else"))
        session.save(tmp_path / "session")
    with tiny_model.chat() as chat:
        list(chat.send("first", SHORT))
        before, expected = list(chat.messages), None
        with pytest.raises(BundleError, match="holds a session without turns"):
            chat.restore(tmp_path / "session")
        assert chat.messages == before
        list(chat.send("second", SHORT))
        expected = sum(map(len, tiny_model.prompt.spans(chat.messages[:3])))
        answer = len(tiny_model.tokenize(chat.messages[-1].content))
        assert abs(chat.session.length - expected - answer) <= 1  # both turns, nothing else


def test_rows_survive_saving(tiny_model, tmp_path):
    rows = Rows(
        np.random.default_rng(0).standard_normal((5, tiny_model.decoder.n_embd), dtype=np.float32)
    )
    with tiny_model.session() as session:
        session.append([Tokens([2]), rows, Tokens([9])])
        session.save(tmp_path / "s")
        expected = ids(session.generate(SHORT))
    with tiny_model.session() as session:
        session.restore(tmp_path / "s")
        assert ids(session.generate(SHORT)) == expected


def test_what_was_saved_is_checked_before_anything_is_restored(tiny_model, tmp_path):
    with tiny_model.session() as session:
        session.append(tiny_model.spans("abc def"))
        session.save(tmp_path / "s")
        data = (tmp_path / "s").read_bytes()
        for damaged, message in (
            (data[:-1], "checksum"),
            (b"x" + data, "not a saved conversation"),
            (data[:60] + b"\0" + data[61:], "checksum"),
            (b"", "not a saved"),
        ):
            (tmp_path / "d").write_bytes(damaged)
            with pytest.raises(BundleError, match=message):
                session.restore(tmp_path / "d")
        assert session.length > 0  # untouched
        with pytest.raises(BundleError, match="cannot read"):
            session.restore(tmp_path / "absent")
    with (
        loaded_again(tiny_model) as other,
        other.session() as session,
    ):  # another context: prefilled again, same answer
        session.restore(tmp_path / "s")
        assert session._cached == 0 and session.length > 0
        assert ids(session.generate(SHORT))
        other.sequences.identity = "0" * 64
        with pytest.raises(BundleError, match="another bundle"):
            session.restore(tmp_path / "s")


def test_a_batch_answers_each_prompt(tiny_model):
    prompts = ["one two", "three", "four five six", "seven", "eight nine"]
    with loaded_again(tiny_model, n_seq_max=3) as model:
        found: dict[int, list[int]] = {}
        greedy = Sampling(
            temperature=0, max_tokens=8
        )  # a batch sums in another order: enough to tip a draw, not a clear first
        for index, chunk in model.generate_batch(prompts, greedy):
            found.setdefault(index, []).extend(chunk.token_ids)
        alone = [ids(model.generate(p, greedy)) for p in prompts]
    assert sorted(found) == list(range(5))
    assert [found[i] for i in range(5)] == alone


def test_each_prompt_of_a_batch_ends_with_usage_and_timings(tiny_model):
    prompts = ["one two", "three", "four five six"]
    with loaded_again(tiny_model, n_seq_max=2) as model:
        ends = {i: c for i, c in model.generate_batch(prompts, SHORT) if c.finish_reason}
        n_prompt = [sum(map(len, model.spans(prompt))) for prompt in prompts]
    assert sorted(ends) == [0, 1, 2]
    for index, end in ends.items():
        assert end.usage.prompt_tokens == n_prompt[index]
        assert end.timings.ttft_s > 0 and end.timings.prefill_tok_s > 0


def test_a_batch_can_be_cancelled(tiny_model):
    """From outside: those that run end as cancelled, those that wait do not begin."""
    prompts = ["one two", "three", "four five six", "seven"]
    with loaded_again(tiny_model, n_seq_max=2) as model:
        with model.generate_batch(prompts, Sampling(max_tokens=200, seed=1)) as batch:
            found = []
            for index, chunk in batch:
                found.append((index, chunk.finish_reason))
                if len(found) == 6:
                    batch.cancel()
        ends = {index: reason for index, reason in found if reason}
        assert ends == {0: "cancelled", 1: "cancelled"} and len(found) < 12
        assert ids(model.generate("one two", SHORT))  # the sequences were given back


def test_async_streams_and_stops_without_blocking_the_loop(tiny_model):
    async def run():
        ticks, out = 0, []

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        async for chunk in tiny_model.agenerate("abc", Sampling(max_tokens=6, temperature=0)):
            out += chunk.token_ids
        stopped = tiny_model.agenerate("abc", Sampling(max_tokens=400))
        await anext(stopped)
        await stopped.aclose()
        ticking.cancel()
        return ticks, out

    ticks, out = asyncio.run(run())
    assert ticks > 5 and out == ids(
        tiny_model.generate("abc", Sampling(max_tokens=6, temperature=0))
    )


def test_stop_strings_end_the_text_before_themselves(tiny_model):
    whole = text(tiny_model.generate("abc", Sampling(max_tokens=20, temperature=0)))
    stop = whole[4:7]
    chunks = list(tiny_model.generate("abc", Sampling(max_tokens=20, temperature=0, stop=(stop,))))
    assert text(chunks) == whole[: whole.index(stop)] and chunks[-1].finish_reason == "stop_string"


def test_evaluate_gives_the_rows_asked_for(tiny_model):
    tokens = [2, *tiny_model.tokenize("a text of some length to look at")]
    everything = np.concatenate(list(tiny_model.evaluate([Tokens(tokens)])))
    assert (
        everything.shape == (len(tokens), tiny_model.decoder.n_vocab)
        and everything.dtype == np.float32
    )
    part = np.concatenate(list(tiny_model.evaluate([Tokens(tokens)], rows=range(3, 6))))
    np.testing.assert_allclose(
        part, everything[3:6], atol=1e-5
    )  # fewer rows go through another kernel on some CPUs
    (last,) = tiny_model.evaluate([Tokens(tokens)], rows="last")
    np.testing.assert_allclose(last[0], everything[-1], atol=1e-4)
    with pytest.raises(UsageError, match="rows is"):
        list(tiny_model.evaluate("abc", rows="some"))


def test_function_calls_come_back_parsed(tiny_model):
    from edge_gemma.prompts.calls import tool_schema

    tools = [
        {
            "name": "lamp",
            "description": "switch a lamp",
            "parameters": {
                "type": "object",
                "properties": {"on": {"type": "boolean"}},
                "required": ["on"],
            },
        }
    ]
    with tiny_model.chat(tools=tools) as chat:
        list(chat.send("light", Sampling(max_tokens=200, temperature=0, schema=tool_schema(tools))))
        (call,) = chat.reply.calls
        assert call.name == "lamp" and isinstance(call.parameters["on"], bool)


@pytest.mark.slow
def test_a_thousand_turns_do_not_grow(tiny_model):
    with tiny_model.chat() as chat:
        for i in range(100):
            list(chat.send(WORDS[i % 200], Sampling(max_tokens=4, seed=i)))
        before = footprint().anon_bytes
        for i in range(1000):
            list(chat.send(WORDS[i % 200], Sampling(max_tokens=4, seed=i)))
        assert footprint().anon_bytes - before < 4 * MiB
