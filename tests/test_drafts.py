"""Several tokens in a pass: drafts out of the text itself, and what a schema forces. Neither may
change what is said.
"""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edge_gemma
from edge_gemma import PlanRequest, Sampling, Tokens
from edge_gemma.conversation.drafts import NGRAM, Lookup, PassCosts
from edge_gemma.errors import UsageError

GREEDY = Sampling(temperature=0, max_tokens=60)
# a prompt that says everything several times: the model does, too
REPEATING = [Tokens([2, *range(300, 312), *range(300, 312), *range(300, 306)])]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"const": "set_temperature"},
        "parameters": {
            "type": "object",
            "properties": {"room": {"enum": ["hall", "kitchen"]}, "on": {"type": "boolean"}},
            "required": ["room", "on"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "parameters"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["llama", "onnx"])
def models(request, both_bundle):
    """The same model without drafts and with them, in each engine."""
    tiny_bundle, engine = both_bundle, request.param
    request = PlanRequest(n_threads=1, engine=engine)
    drafting = PlanRequest(n_threads=1, n_draft=7, engine=engine)
    with (
        edge_gemma.load(tiny_bundle, n_ctx=512, request=request) as plain,
        edge_gemma.load(tiny_bundle, n_ctx=512, request=drafting) as drafts,
    ):
        yield plain, drafts


def answered(model, prompt, sampling):
    chunks = list(model.generate(prompt, sampling))
    return [token for chunk in chunks for token in chunk.token_ids], chunks[-1]


@pytest.fixture
def always(monkeypatch):
    """Drafts at every chance, whatever they cost."""
    monkeypatch.setattr(Lookup, "_may_spend", lambda self: True)


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(temperature=0, max_tokens=60, logprobs=2),
        Sampling(temperature=0, max_tokens=60, repeat_penalty=1.05),
        Sampling(temperature=0.3, seed=5, max_tokens=60),
        Sampling(temperature=0, max_tokens=17),
    ],
)
def test_drafts_change_the_passes_and_not_the_answer(models, always, sampling):
    plain, drafts = models
    expected, _ = answered(plain, REPEATING, sampling)
    found, end = answered(drafts, REPEATING, sampling)
    assert found == expected
    usage = end.usage
    assert 0 <= usage.accepted_tokens <= usage.drafted_tokens
    assert usage.completion_tokens <= usage.n_passes + usage.accepted_tokens + 1
    if sampling.repeat_penalty == 1 and sampling.temperature == 0 and sampling.max_tokens == 60:
        assert usage.accepted_tokens and usage.n_passes < usage.completion_tokens


def test_an_answer_goes_on_behind_a_rejected_draft(models, always):
    """What the cache holds afterwards is what was said."""
    plain, drafts = models
    said = []
    for model in (plain, drafts):
        with model.session() as session:
            session.append(REPEATING)
            first = [t for chunk in session.generate(GREEDY) for t in chunk.token_ids]
            assert session._context.length(session._sequence) == session._cached
            session.append([Tokens([310, 311, 312])])
            second = [t for chunk in session.generate(GREEDY) for t in chunk.token_ids]
            said.append((first, second))
    assert said[0] == said[1]


def test_drafts_end_at_the_end_of_the_context(models, always, monkeypatch):
    _, drafts = models
    monkeypatch.setattr(drafts.decoder, "is_end", lambda token: False)
    with drafts.session() as session:
        session.append([Tokens([2, *(list(range(300, 310)) * 49)])])
        end = list(session.generate(Sampling(max_tokens=400, temperature=0)))[-1]
        assert end.finish_reason == "context" and session.length == 512


def test_a_batch_does_without_drafts(tiny_bundle, always):
    request = PlanRequest(n_threads=1, n_seq_max=2, n_draft=7)
    with edge_gemma.load(tiny_bundle, n_ctx=256, request=request) as model:
        batch = model.generate_batch([REPEATING, REPEATING], GREEDY)
        ends = [chunk for _, chunk in batch if chunk.finish_reason]
    assert all(end.usage.drafted_tokens == 0 for end in ends)


def test_the_plan_counts_the_rows_of_a_draft(tiny_bundle):
    def planned(n_draft):
        request = PlanRequest(n_threads=1, n_draft=n_draft)
        return edge_gemma.plan_bundle(tiny_bundle, n_ctx=512, request=request)

    n_vocab = edge_gemma.Bundle.open(tiny_bundle).manifest.decoder.n_vocab
    assert planned(7).total_bytes - planned(0).total_bytes == 7 * 4 * n_vocab
    for n in (-1, 65):
        with pytest.raises(UsageError, match="drafts of"):
            planned(n)


def test_a_pass_larger_than_the_ubatch_is_refused(models):
    plain, _ = models
    with pytest.raises(UsageError, match="n_ubatch"):
        plain.sequences.context.decode_step([(0, 0, [300] * 300)])


# --- without a model


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9))
def test_a_draft_is_what_followed_before(keys, n_room):
    lookup = Lookup(PassCosts(), 8)
    for end in range(1, len(keys) + 1):
        draft = lookup.propose(keys[:end], n_room)
        assert len(draft) <= n_room
        if draft:
            found = keys[end - NGRAM : end] + draft
            places = range(end - NGRAM)
            assert any(keys[i : i + len(found)] == found for i in places if i + len(found) <= end)


def test_rows_are_never_proposed():
    lookup = Lookup(PassCosts(), 8)
    keys = [1, 2, 3, ("rows", 0), ("rows", 1), 4, 1, 2, 3]
    assert lookup.propose(keys, 8) == []


def test_drafts_that_are_rejected_stop_before_they_cost_much():
    """Whatever a pass costs, and however often the n-grams come again."""
    costs = PassCosts()
    costs.record(1, 0.01)
    costs.record(4, 0.01 * 2.2)
    lookup, spent, n_tokens = Lookup(costs, 15), 0.0, 0
    keys = [1, 2, 3] * 5
    while n_tokens < 300:
        draft = lookup.propose(keys, 15)
        spent += costs.of(1 + len(draft))
        lookup.judged(len(draft), 0)
        n_tokens += 1
    assert spent / n_tokens < 1.03


def test_drafts_that_are_accepted_grow():
    lookup = Lookup(PassCosts(), 15)
    keys, sizes = [*range(50)] * 2, []
    at = 53
    while at < 95:
        draft = lookup.propose(keys[:at], 15)
        lookup.judged(len(draft), len(draft))
        sizes.append(len(draft))
        at += len(draft) + 1
    assert sizes[:3] == [3, 7, 15] and all(a <= b for a, b in pairwise(sizes[:3]))


# --- what a schema forces


def test_forced_tokens_take_no_pass_of_their_own(tiny_model):
    sampling = Sampling(schema=SCHEMA, max_tokens=200, seed=3)
    ids, end = answered(tiny_model, "Set it.", sampling)
    said = json.loads(tiny_model.detokenize(ids))
    assert said["name"] == "set_temperature" and said["parameters"]["room"] in ("hall", "kitchen")
    usage = end.usage
    assert usage.forced_tokens > usage.completion_tokens // 2
    assert usage.n_passes + usage.forced_tokens <= usage.completion_tokens + 2


def test_forced_tokens_longer_than_an_ubatch(tiny_bundle):
    text = "a long constant " * 20
    schema = {"const": {"text": text, "end": "x"}}
    request = PlanRequest(n_threads=1, n_ubatch=16, n_seq_max=2)
    sampling = Sampling(schema=schema, max_tokens=500, temperature=0)
    with edge_gemma.load(tiny_bundle, n_ctx=1024, request=request) as model:
        ids, _ = answered(model, "go", sampling)
        assert json.loads(model.detokenize(ids)) == schema["const"]
        found: dict[int, list[int]] = {}
        for index, chunk in model.generate_batch(["go", "gone"], sampling):
            found.setdefault(index, []).extend(chunk.token_ids)
        assert all(json.loads(model.detokenize(f)) == schema["const"] for f in found.values())


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_forced_tokens_count_as_tokens(tiny_model, max_tokens):
    ids, end = answered(tiny_model, "go", Sampling(schema=SCHEMA, max_tokens=max_tokens, seed=1))
    assert len(ids) == max_tokens and end.finish_reason == "length"


def test_a_stop_string_ends_forced_tokens(tiny_model):
    sampling = Sampling(schema=SCHEMA, max_tokens=200, seed=1, stop=("temperature",))
    chunks = list(tiny_model.generate("go", sampling))
    assert "".join(chunk.text for chunk in chunks) == '{"name": "set_'
    assert chunks[-1].finish_reason == "stop_string"


def test_log_probabilities_are_there_for_every_token(tiny_model):
    """So nothing is forced without having been computed."""
    sampling = Sampling(schema=SCHEMA, max_tokens=200, seed=3, logprobs=1)
    chunks = list(tiny_model.generate("go", sampling))
    assert chunks[-1].usage.forced_tokens == 0
    assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)


def test_white_space_is_free_on_request(tiny_model):
    free = {**SCHEMA, "x-guidance": {"whitespace_flexible": True}}
    ids, end = answered(tiny_model, "go", Sampling(schema=free, max_tokens=300, seed=3))
    fixed = answered(tiny_model, "go", Sampling(schema=SCHEMA, max_tokens=300, seed=3))[1]
    assert end.usage.forced_tokens < fixed.usage.forced_tokens
    if end.finish_reason == "stop":
        assert json.loads(tiny_model.detokenize(ids))


# --- calls in free text

TOOLS = [
    {
        "name": name,
        "parameters": {
            "type": "object",
            "properties": {"room": {"enum": ["hall", "kitchen"]}, "on": {"type": "boolean"}},
            "required": ["room", "on"],
            "additionalProperties": False,
        },
    }
    for name in ("set_lamp", "set_fan")
]


class Said:
    """A model whose answer begins as it is told: its own wishes come behind that."""

    def __init__(self, monkeypatch, model, text):
        from edge_gemma.engines.llama.sampler import Sampler

        told = iter(model.tokenize(text))
        choose = Sampler._choose

        def chosen(sampler, logits, *, grammar_first):
            token = None if sampler._constraint is not None else next(told, None)
            return choose(sampler, logits, grammar_first=grammar_first) if token is None else token

        monkeypatch.setattr(Sampler, "_choose", chosen)


@pytest.mark.parametrize(
    "begun",
    [
        '{"name": "',
        'I will do that.\n{"name": "set_f',
        '```json\n{"name": "',
        '[{"name": "',
        '{ "name" : "',
        '{\n  "name": "set_lamp',
    ],
)
def test_a_call_that_begins_is_held_to_its_schema(tiny_model, monkeypatch, begun):
    Said(monkeypatch, tiny_model, begun)
    sampling = Sampling(call_schema=edge_gemma.tool_schema(TOOLS), max_tokens=200, seed=2)
    ids, end = answered(tiny_model, "go", sampling)
    said = tiny_model.detokenize(ids)
    opened = begun[: begun.index('name"') + 5]
    opened += begun[len(opened) : begun.index('"', len(opened)) + 1]
    assert said.startswith(opened) and end.usage.forced_tokens > 0
    call, _ = json.JSONDecoder().raw_decode(said[said.index("{") :])
    assert call["name"] in ("set_lamp", "set_fan") and set(call) == {"name", "parameters"}
    assert call["parameters"]["room"] in ("hall", "kitchen")


@pytest.mark.parametrize("begun", ['{"name": "Peter', 'say {"name": "', "a text", '{"nam'])
def test_what_is_no_call_stays_free(tiny_model, monkeypatch, begun):
    Said(monkeypatch, tiny_model, begun)
    sampling = Sampling(call_schema=edge_gemma.tool_schema(TOOLS), max_tokens=40, seed=2)
    _, end = answered(tiny_model, "go", sampling)
    # a name is first taken for a function's where one may begin so
    assert end.usage.forced_tokens == 0 or begun.startswith('{"name": "')


def test_text_goes_on_freely_behind_a_call(tiny_model, monkeypatch):
    whole = '{"name": "set_fan", "parameters": {"room": "hall", "on": true}}'
    Said(monkeypatch, tiny_model, '{"name": "')
    sampling = Sampling(call_schema=edge_gemma.tool_schema(TOOLS), max_tokens=120, seed=2)
    ids, end = answered(tiny_model, "go", sampling)
    said = tiny_model.detokenize(ids)
    _, stop = json.JSONDecoder().raw_decode(said)
    assert len(said) > stop or end.finish_reason == "stop", whole


def test_tools_that_cannot_be_held_to_are_said_and_left_free(tiny_model, monkeypatch, caplog):
    Said(monkeypatch, tiny_model, '{"name": "')
    bad = {"type": "object", "properties": {"name": {"not": {"const": 1}}}}
    sampling = Sampling(call_schema=bad, max_tokens=30, seed=2)
    answered(tiny_model, "go", sampling)
    assert "not held to their schema" in caplog.text


def test_drafts_that_are_left_to_the_plan_are_conceded(tiny_bundle):
    def planned(**asked):
        request = PlanRequest(n_threads=1, **asked)
        return edge_gemma.plan_bundle(tiny_bundle, n_ctx=512, request=request)

    left, without = planned(n_draft=None), planned()
    assert left.settings.n_draft > 0 and left.total_bytes > without.total_bytes
    tight = planned(n_draft=None, budget_bytes=left.needed_bytes - 1)
    assert tight.settings.n_draft == 0 and len(tight.concessions) == 1
    assert "no drafts" in tight.concessions[0]
