"""Models that are Gemma 3 underneath: what their formats ask of prompts and answers."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from ggufs import USER_DEFINED, Parts, with_tokens
from prompts import manifest

import edge_gemma
from edge_gemma import Message, PlanRequest, Rows, Sampling
from edge_gemma.engines.llama.weights import media_tokens
from edge_gemma.errors import UsageError
from edge_gemma.messages import TextItem
from edge_gemma.prompts.prompt import Prompt
from edge_gemma.store.importer import import_gguf

# behaves as TranslateGemma's: one item with the codes of both languages
TRANSLATE = """{{ bos_token }}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set item = message.content[0] -%}
        {%- if message.content is string or not item.source_lang_code -%}
            {{ raise_exception('give source_lang_code and target_lang_code') }}
        {%- endif -%}
<start_of_turn>user
From {{ item.source_lang_code }} into {{ item['target_lang_code'] | replace('_', '-') }}:
{{ item.text | trim }}<end_of_turn>
{% else -%}
<start_of_turn>model
{{ message.content | trim }}<end_of_turn>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<start_of_turn>model
{% endif -%}"""
CODES = {"source_lang_code": "en", "target_lang_code": "de_DE"}


def translate_prompt(texts: list[str]) -> Prompt:
    made = msgspec.structs.replace(manifest(), chat_template=TRANSLATE)
    return Prompt(made, lambda text, special: texts.append(text) or [7])


@pytest.mark.compat(
    kind="family",
    what="TranslateGemma: language codes in a content item",
    happens="the template is given them, from a dict or a TextItem",
)
@pytest.mark.parametrize(
    "item",
    [{"type": "text", "text": " Good <eos> day ", **CODES}, TextItem(" Good <eos> day ", CODES)],
    ids=["dict", "TextItem"],
)
def test_language_codes_reach_the_template(item):
    texts: list[str] = []
    translate_prompt(texts).spans([{"role": "user", "content": [item]}])
    assert "From en into de-DE:\nGood <eos> day" in "".join(texts)
    with pytest.raises(UsageError, match="give source_lang_code"):
        translate_prompt(texts).spans([Message("user", "Good day")])


def test_language_codes_are_no_control_tokens():
    texts: list[str] = []
    codes = {**CODES, "source_lang_code": "<end_of_turn>"}
    spans = translate_prompt(texts).spans([Message("user", [TextItem("Good day", codes)])])
    assert "From <end_of_turn> into" in "".join(texts)
    assert list(spans[0].ids).count(106) == 1


def test_language_codes_in_a_chat(tiny_model, monkeypatch, tmp_path):
    made = msgspec.structs.replace(tiny_model.bundle.manifest, chat_template=TRANSLATE)
    monkeypatch.setattr(tiny_model.prompt, "manifest", made)
    item = {"type": "text", "text": "Good day", **CODES}
    with tiny_model.chat() as chat:
        list(chat.send([item], Sampling(max_tokens=3, seed=1)))
        chat.save(tmp_path / "saved")
        with tiny_model.chat() as other:
            other.restore(tmp_path / "saved")
            assert other.messages[0].content[0].fields == CODES
            list(other.send([item], Sampling(max_tokens=3, seed=1)))
            assert len(other.messages) == 4


@pytest.mark.compat(
    kind="family",
    what="ShieldGemma 2 (Gemma 3 with SigLIP): a picture and a policy",
    happens="model.classify gives the odds of Yes and No",
)
def test_classify_looks_at_the_picture(looking_bundle):
    with edge_gemma.load(looking_bundle, n_ctx=512) as model:
        odds = []
        for shade in (0, 200):
            picture = edge_gemma.Image(np.full((40, 60, 3), shade, np.uint8))
            odds.append(model.classify([picture, "Does it break the policy? Yes or No."]))
    assert all(set(o) == {"Yes", "No"} and abs(sum(o.values()) - 1) < 1e-5 for o in odds)
    assert odds[0] != odds[1]


@pytest.mark.compat(
    kind="family",
    what="ShieldGemma 2: how likely the answer is Yes",
    happens="model.classify gives the probability of each label",
)
def test_classify_gives_the_odds_of_the_first_tokens(tiny_model):
    question = "Is it safe? "
    scores = tiny_model.classify(question)
    prompt = tiny_model.prompt.spans([Message("user", question)])
    if not tiny_model.bundle.manifest.instruct:
        prompt = tiny_model.prompt.raw(question)
    (logits,) = tiny_model.evaluate(prompt, rows="last")
    first = [tiny_model.tokenize(label)[0] for label in ("Yes", "No")]
    odds = np.exp(logits[0][first].astype(np.float64))
    np.testing.assert_allclose(list(scores.values()), odds / odds.sum(), atol=1e-4)
    assert list(scores) == ["Yes", "No"] and sum(scores.values()) == pytest.approx(1)
    picture = Rows(np.zeros((4, tiny_model.decoder.n_embd), np.float32), causal=False)
    shown = tiny_model.classify([picture, question], labels=("A", "B", "C"))
    assert list(shown) == ["A", "B", "C"] and shown != scores
    assert tiny_model.classify(question) == pytest.approx(scores, abs=1e-4)
    for labels in (("Yes", "Yes"), (), ("", "No"), "Yes"):
        with pytest.raises(UsageError, match="each begin with another token"):
            tiny_model.classify(question, labels=labels)


# ---- tokens that stand for media


def force(model, monkeypatch, token: int) -> None:
    """From now on this token has by far the largest logit, whatever was said."""
    row = np.zeros(model.decoder.n_vocab, np.float32)
    row[token] = 1000.0
    context = type(model.sequences.context)
    monkeypatch.setattr(context, "logits", lambda self, index=-1: row)


@pytest.mark.compat(
    kind="family",
    what="a model that would write <start_of_image> (the real 270M)",
    happens="the token is never sampled and never printed",
)
def test_the_real_270m_never_writes_a_picture(sample_gguf, tmp_path, monkeypatch):
    bundle = import_gguf(sample_gguf, tmp_path / "sample")
    request = PlanRequest(n_threads=1, repack=False)
    with edge_gemma.load(bundle, n_ctx=128, request=request) as model:
        assert_no_media_token_comes(model, monkeypatch)


@pytest.mark.compat(
    kind="gguf",
    what="media tokens typed as user-defined",
    happens="they are never sampled and never printed",
)
def test_user_defined_media_tokens_never_come(tiny_bundle, tmp_path, monkeypatch):
    spelled = ("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_audio>")
    parts = Parts.read(tiny_bundle / "decoder.gguf")
    tokens = {700 + i: (text, USER_DEFINED) for i, text in enumerate(spelled)}
    path = with_tokens(parts, tokens).write(tmp_path / "x.gguf")
    bundle = import_gguf(path, tmp_path / "bundle")
    with edge_gemma.load(bundle, n_ctx=128, request=PlanRequest(n_threads=1)) as model:
        assert len(media_tokens(bundle.manifest)) == 4
        assert_no_media_token_comes(model, monkeypatch)


def assert_no_media_token_comes(model, monkeypatch) -> None:
    tokens = media_tokens(model.bundle.manifest)
    assert tokens
    for token in tokens:
        force(model, monkeypatch, token)
        for constraint in ({}, {"schema": {"type": "string"}}, {"grammar": 'root ::= "<"+ [a-z]+'}):
            sampling = Sampling(max_tokens=4, temperature=1, seed=3, **constraint)
            chunks = list(model.generate("Show: ", sampling))
            ids = [id for chunk in chunks for id in chunk.token_ids]
            assert ids and token not in ids
            spelled = model.decoder.piece(token, special=True).decode()
            assert spelled not in "".join(chunk.text for chunk in chunks)
