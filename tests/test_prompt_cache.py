"""Kept prompts: what was prefilled once is restored, exactly, and nothing damaged or foreign ever
is.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edge_gemma
from edge_gemma import PlanRequest, Rows, Sampling, Tokens
from edge_gemma.conversation.positions import Positions
from edge_gemma.conversation.prompt_cache import PromptCache, shared
from edge_gemma.conversation.prompt_files import MAGIC, PromptFiles, prompt_scope
from edge_gemma.plan.records import Settings
from edge_gemma.units import MiB

SHORT = Sampling(seed=11, max_tokens=8)
CODES = np.arange(1000, 1400)


def loaded(bundle, folder, *, n_seq_max=1, n_ctx=1024, cache=32 * MiB, n_ubatch=None):
    request = PlanRequest(
        n_threads=1, n_seq_max=n_seq_max, prompt_cache_bytes=cache, n_ubatch=n_ubatch
    )
    return edge_gemma.load(bundle, n_ctx=n_ctx, request=request, prompt_folder=folder)


def prompt(n: int, seed: int = 0) -> list[Tokens]:
    return [Tokens([2, *np.random.default_rng(seed).integers(300, 500, n - 1).tolist()])]


def ids(chunks) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def prefilled(end) -> int:
    return end.usage.prompt_tokens - end.usage.reused_tokens


# --- with a model


def test_a_new_process_takes_a_stable_beginning_from_disk_to_the_bit(tiny_bundle, tmp_path):
    begin, rest = prompt(700), [Tokens([310, 311, 312])]
    with loaded(tiny_bundle, tmp_path) as model, model.session() as session:
        session.replace([*begin, *rest], n_stable=700)
        cold = session.logits()
    assert len(list(tmp_path.iterdir())) == 2  # the beginning, and the whole when it was closed
    for path in tmp_path.iterdir():
        if f"-{703 - 1}-" in path.name or f"-{703}-" in path.name:
            path.unlink()
    with loaded(tiny_bundle, tmp_path) as model, model.session() as session:
        session.replace([*begin, *rest], n_stable=700)
        warm = session.logits()
        assert session._n_prefilled == len(rest[0])
        session.replace([*begin, Tokens([399, 398])])
        assert session._cached == 700  # from memory, now
    assert np.array_equal(cold, warm)


def test_three_conversations_in_turns_on_one_sequence_prefill_only_what_is_new(tiny_bundle):
    with loaded(tiny_bundle, None) as model:
        systems = [f"You are number {i}. " + "word " * 80 for i in range(3)]
        chats = [model.chat(system=system) for system in systems]
        for turn in range(3):
            for chat in chats:
                before = chat.session.length
                end = list(chat.send(f"turn {turn}", SHORT))[-1]
                grown = end.usage.prompt_tokens - before
                if turn:
                    assert prefilled(end) <= grown + 1
        for chat in chats:
            chat.close()


def test_parked_conversations_go_on_to_the_bit(tiny_bundle):
    """One whose sequence was taken away between its turns, and one that was alone."""

    def talk(model, disturb):
        with model.session() as session:
            session.replace(prompt(600), n_stable=100)
            said = [ids(session.generate(SHORT))]
            for turn in range(2):
                if disturb:
                    with model.session() as other:
                        other.append(prompt(90, seed=turn + 5))
                session.append([Tokens([330 + turn] * 40)])
                said.append(ids(session.generate(SHORT)))
            return said, session.logits()

    with loaded(tiny_bundle, None) as model:
        alone = talk(model, disturb=False)
    with loaded(tiny_bundle, None) as model:
        disturbed = talk(model, disturb=True)
    assert alone[0] == disturbed[0] and np.array_equal(alone[1], disturbed[1])


def test_an_edited_turn_goes_back_to_the_nearest_window(tiny_bundle):
    n_window = 512
    with loaded(tiny_bundle, None, n_ctx=2048) as model, model.session() as session:
        assert session._context._model.n_swa < n_window
        begin = prompt(1100)
        session.replace(begin)
        list(session.generate(Sampling(max_tokens=300, seed=1, temperature=3.0)))
        session.append([Tokens([310] * 300)])
        again = [Tokens([*begin[0].ids[:-50], *[320] * 60])]
        reused = session.replace(again)
        assert reused >= 1024
        found = session.logits()
    with loaded(tiny_bundle, None, n_ctx=2048) as model, model.session() as session:
        session.replace(again)
        assert np.array_equal(session.logits(), found)


def test_another_sequence_takes_a_state_up(tiny_bundle):
    with loaded(tiny_bundle, None, n_seq_max=2) as model:
        with model.session() as first:
            first.replace(prompt(300), n_stable=200)
            expected = first.logits()
            with model.session() as second:
                assert second.replace(prompt(300), n_stable=200) == 0  # it has no sequence yet
                assert np.array_equal(second.logits(), expected)
                assert second._n_prefilled <= 100


def test_rows_are_part_of_what_is_compared(tiny_bundle):
    with loaded(tiny_bundle, None) as model:
        rng, n_embd = np.random.default_rng(1), model.decoder.n_embd
        rows, others = (Rows(rng.standard_normal((80, n_embd), dtype=np.float32)) for _ in "ab")
        with model.session() as session:
            session.replace([Tokens([2]), rows, Tokens([310] * 60)])
            expected = session.logits()
            session.replace([Tokens([2]), others, Tokens([310] * 60)])
            assert session._cached <= 1
            session.logits()
            assert session.replace([Tokens([2]), rows, Tokens([310] * 60)]) >= 139
            # one row and sixty round differently
            np.testing.assert_allclose(session.logits(), expected, atol=0.02)


def test_a_state_the_engine_refuses_is_forgotten_and_the_prompt_prefilled(tiny_bundle, caplog):
    with loaded(tiny_bundle, None) as model:
        begin = prompt(200)
        model.sequences.prompts.keep(Positions(begin).codes()[:150], b"no state at all")
        with model.session() as session, caplog.at_level(logging.WARNING):
            session.replace(begin)
            logits = session.logits()
            assert session._n_prefilled == 200
    assert "refused" in caplog.text
    with loaded(tiny_bundle, None) as model, model.session() as session:
        session.replace(begin)
        assert np.array_equal(session.logits(), logits)


def test_a_batch_takes_what_is_kept_and_keeps_nothing(tiny_bundle, tmp_path):
    with loaded(tiny_bundle, tmp_path, n_seq_max=2) as model:
        with model.session() as session:
            session.replace(prompt(300), n_stable=280)
            session.logits()
        held = model.sequences.prompts.total_bytes
        prompts = [[*prompt(300), Tokens([n])] for n in (310, 311)]
        ends = [chunk for _, chunk in model.generate_batch(prompts, SHORT) if chunk.finish_reason]
        assert all(end.usage.reused_tokens >= 280 for end in ends)
        assert model.sequences.prompts.total_bytes == held


def test_another_bundle_never_takes_a_state(tiny_bundle, tmp_path):
    with loaded(tiny_bundle, tmp_path) as model, model.session() as session:
        session.replace(prompt(400), n_stable=300)
        session.logits()
    with loaded(tiny_bundle, tmp_path, n_ubatch=64) as model, model.session() as session:
        assert session.replace(prompt(400)) == 0  # another setting
        session.logits()
        assert session._n_prefilled == 400
    settings = Settings(n_ctx=512)
    scopes = {
        prompt_scope("a", settings, "1"),
        prompt_scope("b", settings, "1"),
        prompt_scope("a", settings, "2"),
        prompt_scope("a", Settings(n_ctx=512, kv_type="q8_0"), "1"),
    }
    assert len(scopes) == 4


def test_the_plan_counts_the_cache_and_gives_it_up_first(tiny_bundle):
    def plan(**asked):
        return edge_gemma.plan_bundle(
            tiny_bundle, n_ctx=512, request=PlanRequest(n_threads=1, **asked)
        )

    without, named, left = plan(), plan(prompt_cache_bytes=MiB), plan(prompt_cache_bytes=None)
    assert named.total_bytes == without.total_bytes + MiB
    assert left.settings.prompt_cache_bytes > 0 and not left.concessions
    tight = plan(prompt_cache_bytes=None, budget_bytes=left.needed_bytes - 1)
    assert 0 < tight.settings.prompt_cache_bytes < left.settings.prompt_cache_bytes
    none = plan(prompt_cache_bytes=None, budget_bytes=without.needed_bytes)
    assert none.settings.prompt_cache_bytes == 0 and none.settings.n_ubatch == 256
    assert none.concessions == ("no prompt cache: more is prefilled again",)
    refused = plan(prompt_cache_bytes=1 << 50)
    assert not refused.fits and "prompt cache" in refused.refusal


def test_memory_stays_inside_what_was_planned(tiny_bundle):
    with loaded(tiny_bundle, None, cache=3 * MiB) as model:
        for seed in range(6):
            with model.session() as session:
                session.replace(prompt(400, seed), n_stable=300)
                session.logits()
            assert 0 < model.sequences.prompts.total_bytes <= 3 * MiB


# --- without one


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_shared_is_the_common_beginning(a, b):
    n = shared(np.array(a, np.int64), np.array(b, np.int64))
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])


def test_a_window_serves_with_a_sequence_or_a_state_that_reaches_as_far():
    cache = PromptCache(10**6)
    cache.keep_window(CODES[:100], b"window")
    assert cache.find(CODES) is None and cache.find(CODES, n_live=99) is None
    found = cache.find(CODES, n_live=150)
    assert (found.position, found.state) == (100, None)
    cache.keep(CODES[:120], b"state")
    edited = np.concatenate([CODES[:110], [7]])
    found = cache.find(edited)
    assert found.position == 100 and found.state.data == b"state"
    assert cache.find(CODES).position == 120


def test_what_was_used_longest_ago_goes_first():
    cache = PromptCache(3 * (100 + 8 * 10))
    prompts = [np.full(10, i) for i in range(4)]
    for codes in prompts[:3]:
        cache.keep(codes, bytes(100))
    cache.find(prompts[0])
    cache.keep(prompts[3], bytes(100))
    assert [cache.find(codes) is not None for codes in prompts] == [True, False, True, True]
    assert not cache.make_room(10**6)


def test_windows_do_not_crowd_states_out():
    cache = PromptCache(3 * (100 + 8 * 10))
    states = [np.full(10, i) for i in range(2)]
    for codes in states:
        cache.keep(codes, bytes(100))
    for i in range(20):
        cache.keep_window(np.full(10, 100 + i), bytes(100))
    assert all(cache.find(codes) is not None for codes in states)
    assert cache.find(np.full(11, 119), n_live=10) is not None


def test_a_longer_state_takes_the_place_of_its_beginnings():
    cache = PromptCache(10**6)
    cache.keep(CODES[:100], b"short")
    cache.keep(CODES[:200], b"long")
    assert cache.find(CODES).position == 200 and cache.find(CODES[:150]) is None


def test_files_come_back_as_they_were_and_only_to_their_scope(tmp_path):
    files = PromptFiles("scope", tmp_path)
    files.put(CODES, b"state" * 100)
    files.put(CODES[:300], b"other")
    files.close()
    found = files.longest(np.concatenate([CODES, [1, 2]]))
    assert found.n_positions == 400 and found.read() == b"state" * 100
    assert files.longest(CODES[:350]).read() == b"other"
    assert files.longest(CODES, longer_than=400) is None
    assert PromptFiles("another", tmp_path).longest(CODES) is None
    assert all(path.stat().st_mode & 0o077 in (0, 0o044) for path in tmp_path.iterdir())


@pytest.mark.parametrize("where", ["magic", "length", "header", "state", "end", "short", "empty"])
def test_damage_is_noticed_and_the_file_removed(tmp_path, caplog, where):
    files = PromptFiles("scope", tmp_path)
    files.write(CODES, bytes(range(256)) * 4)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    at = {"magic": 3, "length": len(MAGIC), "header": len(MAGIC) + 60, "state": len(data) - 500}
    if where in at:
        data[at[where]] ^= 1 << 4
    path.write_bytes({"end": data + b"x", "short": data[:-1], "empty": b""}.get(where, data))
    with caplog.at_level(logging.WARNING):
        assert files.longest(CODES).read() is None
    assert "damaged" in caplog.text and not path.exists()
    assert PromptCache(10**6, files).find(CODES) is None


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_any_flipped_bit_is_noticed(tmp_path_factory, at, bit):
    folder = tmp_path_factory.mktemp("flip")
    files = PromptFiles("scope", folder)
    files.write(CODES[:300], bytes(2000))
    (path,) = folder.iterdir()
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    assert files.longest(CODES).read() is None


def test_a_file_under_another_ones_name_is_not_taken(tmp_path):
    files = PromptFiles("scope", tmp_path)
    files.write(CODES[:300], b"one")
    (one,) = tmp_path.iterdir()
    files.write(CODES[5:305], b"two")
    (two,) = set(tmp_path.iterdir()) - {one}
    two.replace(one)
    assert files.longest(CODES).read() is None


def test_the_folder_never_holds_more_than_its_cap(tmp_path):
    files = PromptFiles("scope", tmp_path, cap_bytes=30_000)
    for i in range(8):
        files.write(CODES[i:] + 0, bytes(5000))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 30_000
    files.write(CODES, bytes(5000))
    assert files.longest(CODES) is not None


def test_a_disk_that_refuses_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    files = PromptFiles("scope", tmp_path / "file" / "folder")
    files.put(CODES, b"state")
    files.close()
    assert files.longest(CODES) is None


WRITER = """
import sys, numpy as np
from pathlib import Path
from edge_gemma.conversation.prompt_files import PromptFiles
files = PromptFiles("scope", Path(sys.argv[1]), cap_bytes=40 << 20)
print("ready", flush=True)
n = int(sys.argv[2])
while True:
    codes = np.arange(n, n + 300)
    files.write(codes, bytes([n % 256]) * (4 << 20))
    print("written", flush=True)
    n += 1
"""


def killed_while_writing(folder, times: int) -> None:
    for turn in range(times):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(turn * 1000)],
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout.readline() == "ready\n"
            if turn == 0:
                assert process.stdout.readline() == "written\n"
            time.sleep(0.02 + 0.013 * (turn % 17))
            process.kill()
    files = PromptFiles("scope", folder)
    n_read = 0
    for turn in range(times):
        for n in range(turn * 1000, turn * 1000 + 60):
            found = files.longest(np.arange(n, n + 300))
            if found is not None:
                assert found.read() == bytes([n % 256]) * (4 << 20)
                n_read += 1
    assert n_read


def test_a_killed_writer_leaves_nothing_that_is_taken(tmp_path):
    killed_while_writing(tmp_path, 3)


@pytest.mark.slow
def test_a_writer_killed_fifty_times(tmp_path):
    killed_while_writing(tmp_path, 50)


def parked_and_not(bundle, spans, **asked):
    """Logits behind a prompt that was interrupted by another, and of one that was not."""
    found = []
    for disturb in (False, True):
        with loaded(bundle, None, **asked) as model, model.session() as session:
            session.replace(spans[:-1])
            for _ in session.generate(Sampling(temperature=0, max_tokens=3)):
                pass
            if disturb:
                with model.session() as other:
                    other.append(prompt(100, seed=9))
            session.append(spans[-1:])
            found.append((session.logits(), session._n_prefilled))
    return found


def test_a_gemma_3n_with_soft_tokens_goes_on_to_the_bit(hearing_bundle):
    n_embd = hearing_bundle.manifest.decoder.n_embd
    rows = Rows(np.random.default_rng(3).standard_normal((90, n_embd), dtype=np.float32))
    spans = [*prompt(150), rows, Tokens([310] * 40), Tokens([320] * 20)]
    alone, parked = parked_and_not(hearing_bundle, spans)
    assert np.array_equal(alone[0], parked[0]) and parked[1] <= alone[1]


def test_rows_that_attend_to_each_other_are_never_cut(looking_bundle):
    n_embd = looking_bundle.manifest.decoder.n_embd
    rng = np.random.default_rng(3)
    block = Rows(rng.standard_normal((40, n_embd), dtype=np.float32), causal=False)
    spans = [*prompt(490), block, Tokens([310] * 30), Tokens([320] * 20)]
    alone, parked = parked_and_not(looking_bundle, spans)
    assert np.array_equal(alone[0], parked[0])
    with loaded(looking_bundle, None) as model, model.session() as session:
        session.replace(spans, n_stable=500)  # inside the block, as 512 is
        session.logits()
        assert model.sequences.prompts.total_bytes == 0
        session.replace([Tokens([2]), *spans], n_stable=491)  # where it begins
        session.logits()
        assert {kept.position for kept in model.sequences.prompts._kept} == {491, 580}


@pytest.mark.slow
def test_the_real_model_prefills_what_is_new(sample_gguf, tmp_path):
    """Three conversations in turns on one sequence, and an edited turn behind 3,000 tokens."""
    import inspect

    from edge_gemma.store.importer import import_gguf

    text = inspect.getsource(subprocess) + inspect.getsource(logging)
    folder = import_gguf(sample_gguf, tmp_path / "bundle", name="sample", origin="a test").folder
    greedy = Sampling(temperature=0, max_tokens=24)
    with loaded(folder, None, n_ctx=4096, cache=None) as model:
        parts = [text[i * 9000 :][:2500] for i in range(3)]
        chats = [model.chat(system=f"You know this file:\n{part}") for part in parts]
        for turn in range(3):
            for chat in chats:
                before = chat.session.length
                end = list(chat.send(f"What does part {turn} do?", greedy))[-1]
                if turn:
                    assert prefilled(end) <= end.usage.prompt_tokens - before + 1
        for chat in chats:
            chat.close()
        tokens = [2, *model.tokenize(text)][:3000]
        long_answer = Sampling(temperature=0, max_tokens=400)
        with model.session() as session:
            for question in ("What does it do?", "What does it return?"):
                asked = Tokens(model.tokenize(f"\nQuestion: {question}\nAnswer:"))
                session.replace([Tokens(tokens), asked])
                end = list(session.generate(long_answer))[-1]
            assert prefilled(end) <= 600


FILLED = """
import inspect, json, subprocess, sys
from pathlib import Path
import edge_gemma
from edge_gemma import PlanRequest, Sampling
from edge_gemma.machine.peak import PeakSampler

text = inspect.getsource(subprocess)
request = PlanRequest(n_threads=1, prompt_cache_bytes=None)
with PeakSampler() as peak:
    model = edge_gemma.load(sys.argv[1], n_ctx=2048, request=request, prompt_folder=sys.argv[2])
    peak.rebase()
    for i in range(7):
        with model.chat(system=text[i * 3000 :][:2200]) as chat:
            for _ in chat.send("What is it?", Sampling(temperature=0, max_tokens=8)):
                pass
    kept = model.sequences.prompts.total_bytes
    model.close()
planned = model.plan
figures = peak.peak_pss_bytes, planned.total_bytes, kept, planned.settings.prompt_cache_bytes
print(json.dumps(figures))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_plan_with_a_full_cache(sample_gguf, tmp_path):
    """In a process of its own: what the tests' own takes is in no plan."""
    from edge_gemma.store.importer import import_gguf

    folder = import_gguf(sample_gguf, tmp_path / "bundle", name="sample", origin="a test").folder
    done = subprocess.run(
        [sys.executable, "-c", FILLED, str(folder), str(tmp_path / "prompts")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, planned, kept, planned_cache = json.loads(done.stdout)
    assert kept > 0.7 * planned_cache
    assert abs(peak / planned - 1) < 0.05, (peak, planned)


def test_a_long_prompt_comes_again_with_another_end(tiny_bundle, tmp_path):
    """And what is left open is kept when the model is closed."""
    ends = []
    for question in (310, 320):
        with loaded(tiny_bundle, tmp_path, n_ctx=2048) as model:
            spans = [*prompt(1100), Tokens([question] * 5)]
            ends.append(list(model.generate(spans, SHORT))[-1])
    assert [prefilled(end) for end in ends] == [1105, 1105 - 1024]
    kept = [int(path.name.split("-")[1]) for path in tmp_path.iterdir()]
    assert kept.count(1024) == 1 and len(kept) == 3


def test_a_server_with_one_lane_keeps_two_conversations(tiny_bundle, tmp_path):
    """Each request brings its whole conversation; a restarted server goes on."""
    import asyncio

    from edge_gemma import GenerationRequest, Message, Service

    system = Message("system", "Two people talk to you. " + "word " * 200)

    async def turn(service, messages, text):
        messages.append(Message("user", text))
        request = GenerationRequest(list(messages), sampling=SHORT)
        async with service.submit(request) as answer:
            chunks = [chunk async for chunk in answer]
        messages.append(Message("assistant", "".join(chunk.text for chunk in chunks)))
        return prefilled(chunks[-1])

    async def serve(model, talks, texts):
        service = Service(model)
        counts = [await turn(service, talk, text) for text in texts for talk in talks]
        await service.close()
        return counts

    talks = [[system], [system]]
    with loaded(tiny_bundle, tmp_path) as model:
        first, second, *others = asyncio.run(serve(model, talks, ["one", "two", "three"]))
    assert first > 100 > second and max(others) < 60
    with loaded(tiny_bundle, tmp_path) as model:
        restarted = asyncio.run(serve(model, talks, ["four"]))
    assert max(restarted) < 100  # the system text, and the conversation that was there at the end
