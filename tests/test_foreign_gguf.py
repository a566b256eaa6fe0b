"""GGUF files of other people's making: what they leave out or say wrongly is repaired and said, or
refused by name. Each file is made byte by byte from one that is right.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ggufs import BOOL, INT32, UINT32, Parts, array, scalar

from edge_gemma.bundles.description import describe
from edge_gemma.engines.llama.decoder import Decoder
from edge_gemma.options import Sampling
from edge_gemma.plan.records import Settings

SPACE_KEY = "tokenizer.ggml.add_space_prefix"
TEXTS = (
    "The capital of France is",
    " leading",
    "two  spaces",
    "trailing ",
    "a\tb\t\tc",
    "line\n\n\nline",
    "\n",
    "   indented\n   twice",
    "def f(x):\n    return x ** 2\n",
    "Grüße aus Köln",
    "日本語のテキスト",
    "한국어 문장",
    "مرحبا بالعالم",
    "emoji 👩‍👩‍👧 and 🇩🇪",
    "<table><tr><td>1</td></tr></table>",
    "<s>struck</s> out",
    "</s>",
    "a</s>b </s></s>",
    "1234567890.50 €",
    "x" * 70,
    "e\u0301 and é",
    "\x00\x01",
    "<unused7> <mask> <bos>",
    "https://example.org/a?b=c#d",
)


@pytest.fixture(scope="module")
def real(sample_gguf) -> Parts:
    """The real Gemma 3 270M; `write(weights=False)` leaves its vocabulary and no weights."""
    return Parts.read(sample_gguf)


def ids_of(path: Path) -> list[list[int]]:
    decoder = Decoder(path, Settings(n_ctx=64, repack=False))
    try:
        return [decoder.tokenize(text) for text in TEXTS]
    finally:
        decoder.close()


# ---- ends of an answer


@pytest.fixture(scope="module")
def real_decoder(sample_gguf):
    decoder = Decoder(sample_gguf, Settings(n_ctx=64, repack=False))
    yield decoder
    decoder.close()


@pytest.mark.compat(
    kind="gguf", what="`</s>` (HTML in Gemma) in an answer", happens="text; the answer goes on"
)
def test_s_is_text_and_no_end(real_decoder):
    assert not real_decoder.is_end(212) and real_decoder.piece(212) == b"</s>"
    assert real_decoder.is_end(1) and real_decoder.is_end(106)
    assert real_decoder.piece(106) == b"" and real_decoder.piece(106, special=True)


@pytest.mark.compat(kind="gguf", what="`</s>` in a prompt", happens="its own token, 212")
def test_s_in_a_prompt_is_its_own_token(real_decoder):
    """As transformers 4.57.6 and 5.24 tokenize it with Gemma's tokenizer.json."""
    assert real_decoder.tokenize("a </s> b") == [236746, 236743, 212, 518]
    assert real_decoder.tokenize("</s></s>") == [212, 212]
    assert real_decoder.tokenize("a <s> b") == [236746, 236743, 203, 518]


def test_llama_cpp_takes_no_other_text_for_an_end(real_decoder):
    low, vocab = real_decoder._low, real_decoder.vocab
    taken = {id for id in range(real_decoder.n_vocab) if low.llama_vocab_is_eog(vocab, id)}
    assert taken == {1, 106, *real_decoder._texts.values()}


def test_a_grammar_does_not_end_at_s(real_decoder):
    """llama.cpp's grammar allows what it takes for an end where the text is complete."""
    import numpy as np

    sampler = real_decoder.sampler(Sampling(temperature=0, grammar='root ::= "a"'))
    row = np.zeros(real_decoder.n_vocab, np.float32)
    row[236746] = 5
    assert sampler.sample(row) == 236746
    row[212], row[106] = 9, 1
    assert sampler.sample(row) == 106
    sampler.close()


def test_html_goes_on_with_the_real_weights(sample_gguf, tmp_path):
    import edge_gemma
    from edge_gemma.store.importer import import_gguf

    folder = import_gguf(sample_gguf, tmp_path / "bundle").folder
    with edge_gemma.load(folder, n_ctx=128) as model:
        greedy = Sampling(temperature=0, max_tokens=8)
        *chunks, last = model.generate("Price: <s>$20.00", greedy)
        said = "".join(chunk.text for chunk in chunks)
        assert said.startswith("</s> <s>$") and last.finish_reason == "length"


@pytest.mark.compat(
    kind="gguf", what="eos_token_id 106, or end ids as a list", happens="ends at all, said"
)
@pytest.mark.parametrize(
    ("key", "value", "ends", "note"),
    [
        ("eos_token_id", scalar(UINT32, 106), (1, 106), "eos_token_id is 106; taken is <eos>, 1"),
        ("eos_token_id", scalar(UINT32, 2), (1, 106), "eos_token_id holds 2, which is bos"),
        ("eos_token_id", None, (1, 106), "eos_token_id is missing; <eos> is 1"),
        ("eos_token_ids", array(INT32, [1, 106, 48]), (1, 106, 48), "ends at token 48 too"),
        ("eot_token_id", scalar(UINT32, 50), (1, 106, 50), "ends at token 50 too, which"),
        ("bos_token_id", None, (1, 106), "bos_token_id is missing; <bos> is 2"),
        ("bos_token_id", scalar(UINT32, 1), (1, 106), "bos_token_id is 1; taken is <bos>, 2"),
        ("unknown_token_id", None, (1, 106), "unknown_token_id is missing; <unk> is 3"),
        ("padding_token_id", None, (1, 106), "padding_token_id is missing; <pad> is 0"),
        ("add_bos_token", scalar(BOOL, False), (1, 106), "add_bos_token is False; taken is True"),
        ("add_eos_token", scalar(BOOL, True), (1, 106), "add_eos_token is True; taken is False"),
    ],
)
def test_roles_come_from_the_spelling(real, tmp_path, key, value, ends, note):
    parts = real.with_value(f"tokenizer.ggml.{key}", value)
    described = describe(parts.write(tmp_path / "x.gguf", weights=False))
    assert described.end_tokens == ends
    tokens = described.special_tokens
    assert (tokens["pad"], tokens["eos"], tokens["bos"], tokens["unk"]) == (0, 1, 2, 3)
    assert (tokens["start_of_turn"], tokens["end_of_turn"]) == (105, 106)
    assert any(note in said for said in described.notes), described.notes


def test_the_right_file_has_no_notes(sample_gguf):
    assert describe(sample_gguf).notes == ()


# ---- spaces


@pytest.mark.compat(
    kind="gguf",
    what="no `tokenizer.ggml.add_space_prefix` (Ollama's converter), or true",
    happens="ids as Gemma's tokenizer makes them; said",
)
@pytest.mark.parametrize("value", [None, scalar(BOOL, True)])
def test_no_space_is_put_before_a_text(real, sample_gguf, tmp_path, value):
    path = real.with_value(SPACE_KEY, value).write(tmp_path / "x.gguf", weights=False)
    assert ids_of(path) == ids_of(sample_gguf)
    (note,) = describe(path).notes
    assert f"{SPACE_KEY} is {'missing' if value is None else True}; taken is False" in note
