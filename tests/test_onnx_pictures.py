"""A Gemma 3's pictures in the ONNX engine: their rows attend to each other, as in transformers."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import seeing
from checkpoints import recipe, write_checkpoint
from test_image_prompts import spans_of

import edge_gemma
from edge_gemma.bundles.folder import Bundle
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.engines.onnx.masks import fill_masks
from edge_gemma.errors import UnsupportedModel, UsageError
from edge_gemma.plan.engines import engine_for
from edge_gemma.plan.records import PlanRequest
from edge_gemma.spans import Rows, Tokens

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("looking")
    options = Conversion(quant="f32", decoder="both", onnx_quant="f32", vision="f32", verify=False)
    checkpoint = write_checkpoint("g3mm", folder / "checkpoint")
    return convert(checkpoint, folder / "bundle", options).bundle


@pytest.fixture(scope="module")
def model(bundle):
    request = PlanRequest(n_threads=1, n_ubatch=256, senses=("vision",))
    with edge_gemma.load(bundle.folder, engine="onnx", n_ctx=1024, request=request) as loaded:
        yield loaded


def prompt(key: str, seeds: list[int], *, causal: bool = False) -> list:
    reference, image = seeing.reference("g3mm"), recipe("g3mm")["config"]["image_token_index"]
    pictures = [Rows(reference[f"soft_{seed}"], causal=causal) for seed in seeds]
    return spans_of(reference[f"ids_{key}"], {image: pictures}, {})


def last_rows(model, spans: list, n_last: int) -> np.ndarray:
    n = sum(map(len, spans))
    context = model.decoder.context(model.plan.settings, n_outputs=n_last)
    rows = np.concatenate(list(context.evaluate(spans, range(n - n_last, n))))
    context.close()
    return rows


@pytest.mark.parametrize(("key", "seeds"), [("one", [6]), ("two", [6, 7])])
def test_logits_behind_pictures_are_those_of_transformers(model, key, seeds):
    expected = seeing.reference("g3mm")[f"logits_{key}"]
    found = last_rows(model, prompt(key, seeds), len(expected))
    assert np.abs(found - expected).max() < TOLERANCE


def test_rows_that_may_not_see_each_other_answer_otherwise(model):
    expected = seeing.reference("g3mm")["logits_one"]
    found = last_rows(model, prompt("one", [6], causal=True), len(expected))
    assert np.abs(found - expected).max() > 0.04


def test_in_steps_and_behind_a_rewind_the_answer_is_the_same(model):
    spans = prompt("one", [6])
    expected = seeing.reference("g3mm")["logits_one"][-1]
    context = model.decoder.context(model.plan.settings)
    for _ in range(2):
        position = 0
        for span in spans:
            context.decode(0, position, span, outputs="last")
            position += len(span)
        assert np.abs(context.logits() - expected).max() < TOLERANCE
        assert context.rewind(0, 3) and context.length(0) == 3
        context.rewind(0, 0)
    context.close()


def test_a_picture_and_text_give_the_same_answer_in_both_engines(bundle, model):
    from edge_gemma.options import Sampling

    greedy = Sampling(temperature=0, max_tokens=8)

    def answer(loaded) -> list[int]:
        chunks = loaded.generate(prompt("one", [6]), greedy)
        return [token for chunk in chunks for token in chunk.token_ids]

    request = PlanRequest(n_threads=1, n_ubatch=256, senses=("vision",))
    with edge_gemma.load(bundle.folder, engine="llama", n_ctx=1024, request=request) as other:
        assert answer(model) == answer(other)


def test_masks_show_the_past_the_window_and_the_block():
    masks = np.full((2, 64), np.nan, np.float32)
    everywhere, sliding = fill_masks(masks, 3, 2, window=3, is_block=False)
    assert (everywhere == 0).tolist() == [[True] * 4 + [False], [True] * 5]
    assert (sliding == 0).tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    everywhere, sliding = fill_masks(masks, 3, 2, window=2, is_block=True)
    assert (everywhere == 0).all()
    assert (sliding == 0).tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert np.isnan(masks[:, 10:]).all()


def test_nonsense_is_refused(model):
    width, n = model.decoder.n_embd, model.plan.settings.n_ubatch + 1
    context = model.decoder.context(model.plan.settings)
    with pytest.raises(UsageError, match="attend to each other need n_ubatch"):
        context.decode(0, 0, Rows(np.zeros((n, width), np.float32), causal=False))
    block = Rows(np.zeros((4, width), np.float32), causal=False)
    with pytest.raises(UsageError, match="4 logits rows asked of a context made for 1"):
        list(context.evaluate([Tokens([2]), block]))
    assert len(list(context.evaluate([Tokens([2]), block], range(4, 5)))[0]) == 1
    context.close()


def test_a_causal_graph_does_not_look(bundle):
    part = msgspec.structs.replace(bundle.manifest.onnx, takes_masks=False)
    older = msgspec.structs.replace(bundle.manifest, onnx=part)
    request = PlanRequest(engine="onnx", senses=("vision",))
    with pytest.raises(UnsupportedModel, match="rows of a Gemma 3's picture attend to each other"):
        engine_for(older, request)
