"""GGUF files of other people's making: what they leave out or say wrongly is repaired and said, or
refused by name. Each file is made byte by byte from one that is right.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from ggufs import BOOL, FLOAT32, INT32, STRING, UINT16, UINT32, Parts, array, scalar, text
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import edge_gemma
from edge_gemma.benchmarks.dev.synthetic import tiny_gguf
from edge_gemma.bundles.description import describe
from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.gguf import read_header, read_strings
from edge_gemma.cli.app import app
from edge_gemma.engines.llama import check
from edge_gemma.engines.llama.decoder import Decoder
from edge_gemma.engines.llama.weights import overrides
from edge_gemma.errors import BundleError, UnsupportedModel
from edge_gemma.messages import Message
from edge_gemma.options import Sampling
from edge_gemma.plan.records import Settings
from edge_gemma.prompts.prompt import Prompt
from edge_gemma.spans import Tokens
from edge_gemma.store.importer import import_gguf
from edge_gemma.store.repairs import NO_REPAIRS, _rope, find_repairs
from edge_gemma.store.rewrite import rewritten

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


def varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def block(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


@pytest.fixture(scope="module")
def reference(sample_gguf):
    """Gemma's vocabulary in the sentencepiece library (sentencepiece_model.proto's fields)."""
    meta = read_header(sample_gguf)
    words = [*read_strings(sample_gguf, meta.metadata["tokenizer.ggml.tokens"])]
    scores, types = (
        np.fromfile(sample_gguf, code, len(words), offset=meta.offsets[f"tokenizer.ggml.{key}"])
        for key, code in (("scores", "<f4"), ("token_type", "<i4"))
    )
    kinds = {b"<unk>": 2, b"<pad>": 3, b"<eos>": 3, b"<bos>": 3}
    pieces = []
    for word, score, kind in zip(words, scores, types, strict=True):
        kind = kinds.get(word, 4 if kind == 3 else int(kind))
        word = word.replace(b" ", "▁".encode()) if kind == 4 else word
        fields = block(1, word) + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, kind)
        pieces.append(block(1, fields))
    roles = b"".join(number(40 + i, id) for i, id in enumerate((3, 2, 1, 0)))
    names = b"".join(block(45 + i, words[id]) for i, id in enumerate((3, 2, 1, 0)))
    trainer = number(3, 2) + number(35, 1) + roles + names  # BPE with bytes
    normalizer = block(1, b"identity") + number(3, 0) + number(4, 0) + number(5, 1)
    model = b"".join([*pieces, block(2, trainer), block(3, normalizer)])
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.mark.compat(
    kind="gguf",
    what="`<mask>`, `<unused7>` and HTML typed in a prompt",
    happens="their own tokens, as sentencepiece has them",
)
def test_typed_text_reaches_its_own_tokens(real_decoder, reference):
    for typed in TEXTS:
        typed = typed.replace("<bos>", "<bos >")  # a control token: letters, on purpose
        assert real_decoder.tokenize(typed) == reference.encode(typed), typed
    assert real_decoder.tokenize("<unused7><mask>") == [13, 4]
    assert [real_decoder.piece(id) for id in (13, 4, 2)] == [b"<unused7>", b"<mask>", b""]


@settings(max_examples=300)
@given(
    st.lists(
        st.sampled_from("</s> <s> </ s> < > <b> <mask> <unused7> <unused99999> a é 日".split())
        | st.sampled_from([" ", "  ", "\n", "\n\n", "\t", "the "])
        | st.text(max_size=4).filter(lambda text: "▁" not in text),
        max_size=12,
    )
)
def test_any_text_is_tokenized_as_sentencepiece_does(real_decoder, reference, parts):
    typed = "".join(parts)
    assert real_decoder.tokenize(typed) == reference.encode(typed)


def test_llama_cpp_takes_no_other_text_for_an_end(real_decoder):
    low, vocab = real_decoder._low, real_decoder.vocab
    taken = {id for id in range(real_decoder.n_vocab) if low.llama_vocab_is_eog(vocab, id)}
    assert taken == {1, 106, *real_decoder._texts.values()}


def test_a_grammar_does_not_end_at_s(real_decoder):
    """llama.cpp's grammar allows what it takes for an end where the text is complete."""
    sampler = real_decoder.sampler(Sampling(temperature=0, grammar='root ::= "a"'))
    row = np.zeros(real_decoder.n_vocab, np.float32)
    row[236746] = 5
    assert sampler.sample(row) == 236746
    row[212], row[106] = 9, 1
    assert sampler.sample(row) == 106
    sampler.close()


def test_html_goes_on_with_the_real_weights(sample_gguf, tmp_path):
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


# ---- files that must be repaired in the bundle's copy


@pytest.fixture(scope="module", params=["gemma3", "gemma3n"])
def tiny(request, tmp_path_factory) -> Parts:
    folder = tmp_path_factory.mktemp("tiny")
    template = "<start_of_turn>{{ messages[0]['content'] }}<end_of_turn>"
    return Parts.read(tiny_gguf(folder / "x.gguf", request.param, chat_template=template))


def logits(path: Path) -> np.ndarray:  # [38, n_vocab]
    known = overrides(describe(path))
    decoder = Decoder(path, Settings(n_ctx=64, n_ubatch=64), overrides=known)
    try:
        context = decoder.context(n_outputs=64)
        return np.concatenate(list(context.evaluate([Tokens(tuple(range(2, 40)))])))
    finally:
        decoder.close()


def family_of(parts: Parts) -> str:
    return "gemma3n" if "gemma3n.block_count" in parts.pairs else "gemma3"


def imported(parts: Parts, folder: Path, **options) -> Bundle:
    path = parts.write(folder / "found.gguf")
    before = path.read_bytes()
    bundle = import_gguf(path, folder / "bundle", **options)
    bundle.verify()
    assert path.read_bytes() == before  # whoever's file it is, it stays as it was
    return bundle


def with_types(parts: Parts, types: dict[int, int]) -> Parts:
    key = "tokenizer.ggml.token_type"
    changed = bytearray(parts.pairs[key])
    for token, kind in types.items():
        struct.pack_into("<i", changed, 16 + 4 * token, kind)
    return parts.with_value(key, bytes(changed))


@pytest.mark.compat(
    kind="gguf",
    what="`<start_of_turn>`, `<end_of_turn>` and others as NORMAL tokens (Google's QAT GGUF)",
    happens="types corrected in the bundle's copy; said",
)
@pytest.mark.parametrize(
    ("types", "note"),
    [
        ({105: 1, 106: 1}, "'<start_of_turn>' as normal, '<end_of_turn>' as normal"),
        ({105: 1, 106: 1, 4: 1} | dict.fromkeys(range(6, 105), 1), "'<mask>' as normal"),
        ({105: 4, 106: 4}, ""),  # user-defined does no harm
        ({212: 3}, "'</s>' as control"),
        (dict.fromkeys(range(168, 238), 1), "'<table>' as normal"),
        (dict.fromkeys(range(107, 168), 3), r"'\n' as control"),
        (dict.fromkeys(range(107, 168), 1), r"'\n' as normal"),
        (dict.fromkeys(range(238, 494), 1), "'<0x00>' as normal"),
        ({5: 0}, "'[multimodal]' as undefined"),
    ],
)
def test_tokens_of_a_wrong_type_are_corrected(real, sample_gguf, tmp_path, types, note):
    path = with_types(real, types).write(tmp_path / "x.gguf", weights=False)
    found = find_repairs(path, read_header(path), describe(path))
    if not note:
        assert found == NO_REPAIRS
        return
    assert len(found.patches) == len(types)
    assert any(note in said for said in found.notes), found.notes
    rewritten(path, tmp_path / "copy.gguf", found)
    assert read_header(path).metadata.keys() == read_header(tmp_path / "copy.gguf").metadata.keys()
    assert ids_of(tmp_path / "copy.gguf") == ids_of(sample_gguf)
    decoder = Decoder(tmp_path / "copy.gguf", Settings(n_ctx=64, repack=False))
    right = ["<start_of_turn>", "<end_of_turn>", "<unused0>", "<table>"]
    assert [decoder.tokenize(text, True) for text in right] == [[105], [106], [6], [168]]
    assert decoder.piece(212) == b"</s>" and decoder.piece(107) == b"\n"
    assert decoder.piece(238) == b"\0"
    decoder.close()


def test_a_prompt_of_normal_control_tokens_is_right_even_uncorrected(real, tmp_path):
    """A bundle that an earlier version imported: its manifest knows the ids."""
    path = with_types(real, {105: 1, 106: 1}).write(tmp_path / "x.gguf", weights=False)
    tokens = {"bos": 2, "eos": 1, "start_of_turn": 105, "end_of_turn": 106}
    decoder = Decoder(path, Settings(n_ctx=64, repack=False), controls=[*tokens.values()])
    manifest = SimpleNamespace(
        special_tokens=tokens, chat_template=None, family="gemma3", vision=None
    )
    (span,) = Prompt(manifest, decoder.tokenize).spans([Message("user", "Hi <end_of_turn>")])
    assert span.ids[:3] == (2, 105, 2364) and span.ids.count(106) == 1
    assert decoder.piece(105) == b""
    decoder.close()


@pytest.mark.compat(
    kind="gguf",
    what="vision tensors in the decoder's file (Ollama)",
    happens="the decoder is taken; what was left is said",
)
def test_vision_inside_is_left_out(tiny, tmp_path):
    inside = tiny.with_tensors(
        {
            "v.patch_embedding.weight": ((14, 14, 3, 8), 1, bytes(14 * 14 * 3 * 8 * 2)),
            "mm.mm_soft_emb_norm.weight": ((8,), 0, bytes(32)),
            "a.conv1.weight": ((3, 3), 0, bytes(36)),
        }
    )
    right = tiny.write(tmp_path / "right.gguf")
    bundle = imported(inside, tmp_path)
    manifest = bundle.manifest
    assert [t.name for t in read_header(bundle.decoder_path).tensors if t.name[:2] == "v."] == []
    assert manifest.source.sha256 is None and manifest.vision is None
    assert any("3 tensors of an encoder for pictures" in said for said in manifest.notes)
    assert any("--mmproj" in said for said in manifest.notes)
    np.testing.assert_array_equal(logits(right), logits(bundle.decoder_path))


@pytest.mark.compat(kind="gguf", what="norms in F16 or BF16", happens="widened to F32; said")
@pytest.mark.parametrize("kind", [1, 30])
def test_norms_are_widened(tiny, tmp_path, kind):
    def narrow(data: bytes) -> bytes:
        values = np.frombuffer(data, "<f4")
        if kind == 1:
            return values.astype("<f2").tobytes()
        return (values.view("<u4") >> 16).astype("<u2").tobytes()

    found = tiny.with_tensors(
        {
            name: (shape, kind, narrow(data))
            for name, (shape, was, data) in tiny.tensors().items()
            if len(shape) == 1 and was == 0
        }
    )
    with pytest.raises(UnsupportedModel, match="llama.cpp computes norms in F32"):
        describe(found.write(tmp_path / "x.gguf"))
    bundle = imported(found, tmp_path)
    norms = [t for t in bundle.manifest.decoder.tensors if len(t.shape) == 1]
    assert {t.type for t in norms} == {"F32"}
    assert any(f"{len(norms)} norms were widened" in said for said in bundle.manifest.notes)
    assert np.isfinite(logits(bundle.decoder_path)).all()


@pytest.mark.compat(
    kind="gguf",
    what="no `rope.freq_base`, or Ollama's keys for it",
    happens="written as the family has it; said",
)
def test_rope_bases_are_written(tiny, tmp_path):
    """llama.cpp would take 10,000 for all layers."""
    family = family_of(tiny)
    right = tiny.write(tmp_path / "right.gguf")
    ollama = {"rope.global.freq_base": 1e6, "rope.local.freq_base": 20_000.0}
    bare = tiny.with_value(f"{family}.rope.freq_base", None)
    assert not np.array_equal(logits(bare.write(tmp_path / "bare.gguf")), logits(right))
    bundle = imported(bare, tmp_path)
    np.testing.assert_array_equal(logits(bundle.decoder_path), logits(right))
    (note,) = bundle.manifest.notes[:1]
    assert note == f"{family}.rope.freq_base is missing; written as 1e+06"
    for name, value in ollama.items():
        bare = bare.with_value(f"{family}.{name}", scalar(FLOAT32, value))
    path = bare.write(tmp_path / "ollama.gguf")
    written = read_header(import_gguf(path, tmp_path / "other").decoder_path).metadata
    assert written[f"{family}.rope.freq_base"] == 1e6
    assert written[f"{family}.rope.freq_base_swa"] == 20_000.0


@pytest.mark.compat(
    kind="gguf",
    what="`final_logit_softcapping` 30 in a gemma3 (Ollama's converter)",
    happens="written as 0, said",
)
def test_gemma_2s_softcap_is_taken_out_of_a_gemma3(tiny, tmp_path):
    if family_of(tiny) == "gemma3n":  # has it, and llama.cpp knows
        assert imported(tiny, tmp_path).manifest.notes == ()
        return
    key = "gemma3.final_logit_softcapping"
    right = tiny.write(tmp_path / "right.gguf")
    bundle = imported(tiny.with_value(key, scalar(FLOAT32, 30.0)), tmp_path)
    assert read_header(bundle.decoder_path).metadata[key] == 0.0
    assert bundle.manifest.notes[0] == f"{key} is 30, which is Gemma 2's; written as 0"
    np.testing.assert_array_equal(logits(bundle.decoder_path), logits(right))


def test_a_4b_without_rope_scaling_gets_its_own():
    def described(n_layer: int):
        decoder = SimpleNamespace(n_layer=n_layer, n_embd=2560)
        return SimpleNamespace(family="gemma3", decoder=decoder)

    header = SimpleNamespace(metadata={"gemma3.rope.freq_base": 1e6})
    added, notes = _rope(header, described(34))
    assert added["gemma3.rope.scaling.factor"] == scalar(FLOAT32, 8.0)
    assert added["gemma3.rope.scaling.type"] == scalar(STRING, "linear")
    assert "linear, 8, as Gemma 3 4B has" in notes[0]
    assert _rope(header, described(26)) == ({}, [])


@pytest.mark.compat(
    kind="gguf", what="no `attention.value_length`", happens="taken from the tensors"
)
@pytest.mark.parametrize("name", ["value_length", "key_length"])
def test_the_size_of_a_head_comes_from_the_tensors(tiny, tmp_path, name):
    right = tiny.write(tmp_path / "right.gguf")
    bundle = imported(tiny.with_value(f"{family_of(tiny)}.attention.{name}", None), tmp_path)
    np.testing.assert_array_equal(logits(bundle.decoder_path), logits(right))
    with edge_gemma.load(bundle.folder, n_ctx=64) as model:
        *_, last = model.generate("The", Sampling(temperature=0, max_tokens=2))
        assert last.finish_reason in ("length", "stop")


# ---- templates


@pytest.mark.compat(
    kind="gguf",
    what="no chat template",
    happens="taken for base weights, said; `--instruct` takes Gemma's turns",
)
def test_no_template_is_said_and_instruct_is_the_way_out(tiny, tmp_path):
    path = tiny.with_value("tokenizer.chat_template", None).write(tmp_path / "x.gguf")
    base = import_gguf(path, tmp_path / "base").manifest
    assert not base.instruct
    assert "taken for base weights" in base.notes[-1] and "--instruct" in base.notes[-1]
    told = CliRunner().invoke(app, ["import", str(path), str(tmp_path / "tuned"), "--instruct"])
    assert "note: it has no chat template; Gemma's own turns are written" in told.stderr
    tuned = Bundle.open(tmp_path / "tuned").manifest
    assert tuned.instruct and tuned.chat_template is None
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "tuned")]).stdout
    assert "instruct" in told and "Gemma's own turns are written" in told


def test_a_template_of_turns_needs_their_tokens(tiny, tmp_path):
    words = tiny.pairs["tokenizer.ggml.tokens"]
    missing = words.replace(b"<start_of_turn>", b"<start_of_torn>")
    path = tiny.with_value("tokenizer.ggml.tokens", missing).write(tmp_path / "x.gguf")
    with pytest.raises(UnsupportedModel, match="no token <start_of_turn>, and its chat template"):
        import_gguf(path, tmp_path / "bundle")
    path = (
        tiny.with_value("tokenizer.ggml.tokens", missing)
        .with_value("tokenizer.chat_template", None)
        .write(tmp_path / "x.gguf")
    )
    assert not import_gguf(path, tmp_path / "bundle").manifest.instruct
    with pytest.raises(UnsupportedModel, match="<start_of_turn>, and --instruct needs it"):
        import_gguf(path, tmp_path / "other", instruct=True)


@pytest.mark.compat(
    kind="gguf",
    what="a template of another family's turns (ChatML)",
    happens="taken; what becomes letters is said",
)
def test_a_template_of_other_turns_is_taken_and_said(tiny, tmp_path):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    notes = imported(
        tiny.with_value("tokenizer.chat_template", scalar(STRING, source)), tmp_path
    ).manifest.notes
    assert notes == (
        "its chat template writes <|im_end|>, <|im_start|>, no token here: it becomes letters",
        "its chat template does not write <start_of_turn>, which Gemma was tuned with",
    )


@pytest.mark.compat(
    kind="gguf", what="a blob of Ollama's store without a name", happens="named after its folder"
)
def test_a_blob_is_named_after_its_folder(tiny, tmp_path):
    path = tiny.with_value("general.name", None).write(tmp_path / "sha256-00ff")
    assert import_gguf(path, tmp_path / "gemma").manifest.name == "gemma"
    assert import_gguf(path, tmp_path / "x", name="mine").manifest.name == "mine"
    named = tiny.with_value("general.name", None).write(tmp_path / "mine-Q4_0.gguf")
    for relayout in (False, True):
        bundle = import_gguf(named, tmp_path / f"out-{relayout}", relayout=relayout)
        assert bundle.manifest.name == "mine-Q4_0"


# ---- what stays refused, and says why


@pytest.mark.compat(
    kind="gguf", what="one part of a split file", happens="refused; how to join the parts"
)
def test_a_part_of_a_split_file_is_refused_with_the_way_out(tiny, tmp_path):
    path = tiny.with_value("split.count", scalar(UINT16, 2)).write(tmp_path / "x.gguf")
    with pytest.raises(UnsupportedModel, match=r"join the parts first \(llama-gguf-split --merge"):
        import_gguf(path, tmp_path / "bundle")


@pytest.mark.compat(
    kind="gguf", what="no `attention.sliding_window`", happens="refused by the key's name"
)
def test_a_gemma_without_a_window_is_refused(tiny, tmp_path):
    """llama.cpp would let no layer slide, and rotate the sliding ones like the global ones."""
    key = f"{family_of(tiny)}.attention.sliding_window"
    for value in (None, scalar(UINT32, 0)):
        with pytest.raises(UnsupportedModel, match=f"{key} is .*; expected"):
            describe(tiny.with_value(key, value).write(tmp_path / "x.gguf"))


@pytest.mark.compat(
    kind="gguf", what="a LoRA adapter, a Git LFS pointer, a web page", happens="refused by its kind"
)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page; download the file itself"),
        (b"PK\x03\x04 and more", "a zip archive; unpack it"),
    ],
)
def test_what_is_no_gguf_is_refused_by_its_kind(tmp_path, data, message):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(BundleError, match=message):
        import_gguf(tmp_path / "x.gguf", tmp_path / "bundle")


def test_an_adapter_is_refused_with_the_way_out(tiny, tmp_path):
    path = tiny.with_value("general.type", scalar(STRING, "adapter")).write(tmp_path / "x.gguf")
    with pytest.raises(UnsupportedModel, match="not a model; use it with its model: .*--lora FILE"):
        import_gguf(path, tmp_path / "bundle")


@pytest.mark.compat(
    kind="gguf", what="more tokens listed than rows", happens="refused with both numbers"
)
def test_a_token_without_a_row_is_refused_with_the_numbers(tiny, tmp_path):
    words = tiny.pairs["tokenizer.ggml.tokens"]
    n = struct.unpack_from("<Q", words, 8)[0]
    longer = words[:8] + struct.pack("<Q", n + 1) + words[16:] + text("<extra>")
    found = tiny.with_value("tokenizer.ggml.tokens", longer)
    for key, item in (("scores", struct.pack("<f", 0)), ("token_type", struct.pack("<i", 1))):
        old = found.pairs[f"tokenizer.ggml.{key}"]
        value = old[:8] + struct.pack("<Q", n + 1) + old[16:] + item
        found = found.with_value(f"tokenizer.ggml.{key}", value)
    if family_of(tiny) == "gemma3":
        found = found.with_value("gemma3.vocab_size", None)
    with pytest.raises(BundleError, match=rf"shape .*{n}\], the header's numbers say .*{n + 1}\]"):
        import_gguf(found.write(tmp_path / "x.gguf"), tmp_path / "bundle")


@pytest.mark.compat(
    kind="gguf", what="weights in Q8_1, Q8_K, NVFP4 or Q1_0", happens="refused by the type's name"
)
@pytest.mark.parametrize(
    ("kind", "name"), [(9, "Q8_1"), (15, "Q8_K"), (40, "NVFP4"), (41, "Q1_0"), (31, "Q4_0_4_4")]
)
def test_types_that_are_not_read_are_named(tiny, tmp_path, kind, name):
    found = tiny.with_tensors({"blk.0.attn_q.weight": ((256, 256), kind, bytes(256 * 256))})
    with pytest.raises(UnsupportedModel, match=rf"'blk.0.attn_q.weight' is {name}, which"):
        import_gguf(found.write(tmp_path / "x.gguf"), tmp_path / "bundle")


# ---- the check


@pytest.mark.compat(
    kind="gguf", what="weights that llama.cpp computes no numbers with", happens="refused at import"
)
def test_numbers_that_are_none_are_refused(tiny, tmp_path):
    shape, kind, data = tiny.tensors()["output_norm.weight"]
    nan = np.full(len(data) // 4, np.nan, "<f4").tobytes()
    found = tiny.with_tensors({"output_norm.weight": (shape, kind, nan)})
    with pytest.raises(BundleError, match="x.gguf: llama.cpp refuses it: its first answer is not"):
        import_gguf(found.write(tmp_path / "x.gguf"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_an_abort_of_the_check_is_an_error_of_ours(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_CHILD", "import os; os.abort()")
    with pytest.raises(BundleError, match="x.gguf: llama.cpp stops with signal 6 on it"):
        import_gguf(tiny.write(tmp_path / "x.gguf"), tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [tmp_path / "x.gguf"]


@pytest.mark.slow
def test_the_check_of_a_large_file_fits_a_small_board(tmp_path):
    """E2B, 3.5 GB, without the right to lock memory, in 512 MiB."""
    from edge_gemma.benchmarks.caps import Limits, run
    from edge_gemma.benchmarks.dev.synthetic import full_gguf

    bundle = import_gguf(full_gguf(tmp_path / "e2b.gguf", "e2b"), tmp_path / "bundle")
    (tmp_path / "e2b.gguf").unlink()
    code = (
        "import sys; from edge_gemma.engines.llama import check; "
        "sys.stdin = open(sys.argv[1]); check.main(sys.argv[2])"
    )
    argv = [sys.executable, "-c", code, str(bundle.folder / "manifest.json"), str(bundle.folder)]
    limits = Limits(memory_bytes=512 << 20, may_lock=False)
    outcome = run(argv, limits, cold_files=[bundle.decoder_path])
    if outcome.kind == "none":
        pytest.skip("no memory limit can be set on this machine")
    assert outcome.ok, outcome.describe()
