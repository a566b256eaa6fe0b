"""Candidates of a coarse output head, scored again with the token embedding."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import write_checkpoint

from edge_gemma import PlanRequest, Sampling, Tokens, load
from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import finer_head_rows
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.engines.llama import rescoring
from edge_gemma.errors import UsageError

HEAD = """about = "a coarse head"
matrix = "F32"
head = "{head}"
lookup = "Q8_0"
kept = "F32"
untied = true
"""


@pytest.fixture(scope="module", params=["g3text", "g3n"])
def bundles(request, tmp_path_factory):
    """(head in Q4_0, head in F32) of the same weights; both look tokens up in Q8_0."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_checkpoint(request.param, folder / "checkpoint")
    made = []
    for head in ("Q4_0", "F32"):
        (folder / f"{head.lower()}.toml").write_text(HEAD.format(head=head))
        options = Conversion(
            quant=str(folder / f"{head.lower()}.toml"), audio="none", vision="none", verify=False
        )
        made.append(convert(checkpoint, folder / head, options).bundle)
    return made


def logits(bundle: Bundle, ids, **request):
    with load(bundle, n_ctx=256, request=PlanRequest(**request)) as model:
        return np.concatenate(list(model.evaluate([Tokens(ids)])))


def assert_close(some, others):
    """At the ids that are candidates either way: which of two equal ones is the last to be taken is
    left to chance.
    """
    best = np.argsort(-others)[:100]
    np.testing.assert_allclose(some[best], others[best], atol=2e-2)


IDS = (2, *range(10, 40))


def test_candidates_get_the_finer_heads_logits(bundles):
    """The embedding's 8 bits are nearer to the whole head than 4 bits are, wherever a token has a
    chance; everything else stays as the small head said.
    """
    coarse, whole = bundles
    plain = logits(coarse, IDS, rescore=False)
    better = logits(coarse, IDS)
    exact = logits(whole, IDS)
    for before, after, truth in zip(plain, better, exact, strict=True):
        ids = rescoring.candidates(before)
        others = np.setdiff1d(np.arange(len(before)), ids)
        assert np.array_equal(before[others], after[others])
        wrong = np.abs(before[ids] - truth[ids]).mean()
        assert np.abs(after[ids] - truth[ids]).mean() < max(0.3 * wrong, 1e-4)


def test_the_same_logits_token_by_token_and_in_lanes(bundles):
    """Blocks, single steps and several sequences in one pass are all scored again."""
    coarse, _ = bundles
    whole = logits(coarse, IDS)
    with load(coarse, n_ctx=256, request=PlanRequest(n_seq_max=2)) as model:
        context = model.decoder.context()
        for sequence in (0, 1):
            context.decode(sequence, 0, Tokens(IDS[:-1]), "last")
            assert_close(context.logits(), whole[-2])
        context.decode_step([(s, len(IDS) - 1, IDS[-1:]) for s in (0, 1)])
        for row in (0, 1):
            assert_close(context.logits(row), whole[-1])


def test_forced_tokens_before_the_last_one_are_decoded_too(bundles):
    coarse, _ = bundles
    whole = logits(coarse, IDS)
    with load(coarse, n_ctx=256, request=PlanRequest(n_seq_max=2)) as model:
        context = model.decoder.context(n_outputs=8)
        for sequence in (0, 1):
            context.decode(sequence, 0, Tokens(IDS[:20]))
        context.decode_step([(0, 20, IDS[20:24]), (1, 20, IDS[20:21])])
        assert [context.length(sequence) for sequence in (0, 1)] == [24, 21]
        assert_close(context.logits(0), whole[23])
        assert_close(context.logits(1), whole[20])
        context.decode_step([(0, 24, IDS[24:27])], every=True)
        for row in range(3):
            assert_close(context.logits(row), whole[24 + row])


@pytest.mark.parametrize("rescore", [True, False])
def test_sequences_in_any_order_get_their_own_logits(bundles, rescore):
    """A batch is put in order for llama.cpp; what comes back is in the order that was asked for."""
    coarse, _ = bundles
    lengths = (20, 23, 26)
    whole = logits(coarse, IDS, rescore=rescore)
    request = PlanRequest(n_seq_max=3, rescore=rescore)
    with load(coarse, n_ctx=256, request=request) as model:
        context = model.decoder.context(n_outputs=8)
        for sequence, length in enumerate(lengths):
            context.decode(sequence, 0, Tokens(IDS[:length]))
        context.decode_step([(s, lengths[s], IDS[lengths[s] : lengths[s] + 1]) for s in (2, 0, 1)])
        for row, sequence in enumerate((2, 0, 1)):
            assert_close(context.logits(row), whole[lengths[sequence]])
        steps = [(2, 27, IDS[27:29]), (0, 21, IDS[21:24])]
        context.decode_step(steps, every=True)
        for row, position in enumerate((27, 28, 21, 22, 23)):
            assert_close(context.logits(row), whole[position])


def test_wanted_rows_alone_are_scored_too(bundles):
    coarse, _ = bundles
    with load(coarse, n_ctx=256) as model:
        context = model.decoder.context(n_outputs=64)
        wanted = np.concatenate(list(context.evaluate([Tokens(IDS)], range(20, 25))))
    for row, whole in zip(wanted, logits(coarse, IDS)[20:25], strict=True):
        assert_close(row, whole)


def test_what_is_generated_follows_the_finer_rows(bundles):
    coarse, _ = bundles
    with load(coarse, n_ctx=256) as model:
        session = model.session()
        session.append([Tokens(IDS)])
        sampling = Sampling(temperature=0, max_tokens=1, logprobs=1)
        chosen = [p for chunk in session.generate(sampling) for p in chunk.logprobs]
    row = logits(coarse, IDS)[-1].astype(np.float64)
    best = int(row.argmax())
    assert chosen[0].token_id == best
    share = row[best] - row.max() - np.log(np.exp(row - row.max()).sum())
    assert chosen[0].logprob == pytest.approx(share, abs=0.02)


def test_the_plan_counts_the_rows(bundles):
    coarse, whole = bundles
    with load(coarse, n_ctx=256) as model:
        names = [item.name for item in model.plan.items]
    assert "rows that score candidates again" in names
    assert finer_head_rows(whole.manifest.decoder) is None  # its head is no coarser
    with pytest.raises(UsageError, match="no finer rows"):
        load(whole, n_ctx=256, request=PlanRequest(rescore=True))


def test_a_bundle_from_before_the_field_is_left_alone(bundles, tiny_bundle):
    assert finer_head_rows(Bundle.open(tiny_bundle).manifest.decoder) is None


def test_a_head_of_its_own_is_never_replaced(tmp_path):
    """An untied checkpoint's lm_head holds other rows than its embedding."""
    from checkpoints import recipe, values, write_safetensors

    folder = write_checkpoint("g3text", tmp_path / "checkpoint")
    data = recipe("g3text")
    tensors = [(t, values(t, tuple(s), data["seed"], "gemma3")) for t, s in data["tensors"].items()]
    head = ("lm_head.weight", 2 * tensors[0][1])
    write_safetensors(folder / "model.safetensors", [*tensors, head])
    (tmp_path / "coarse.toml").write_text(HEAD.format(head="Q4_0"))
    options = Conversion(quant=str(tmp_path / "coarse.toml"), verify=False)
    decoder = convert(folder, tmp_path / "out", options).bundle.manifest.decoder
    assert not decoder.tied_head and not decoder.head_from_embedding


def test_rows_are_let_go(bundles):
    coarse, _ = bundles
    rescorer = rescoring.rescorer_of(
        coarse.decoder_path, coarse.manifest.family, coarse.manifest.decoder
    )
    assert rescorer is not None
    n_embd, n_vocab = coarse.manifest.decoder.n_embd, coarse.manifest.decoder.n_vocab
    rows = np.random.default_rng(0).standard_normal((20, n_vocab)).astype(np.float32)
    for row in rows:
        rescorer.rescore(row, np.ones(n_embd, np.float32))
    again = rows[0].copy()
    rescorer.trim()
    rescorer.rescore(again, np.ones(n_embd, np.float32))
    rescorer.close()
