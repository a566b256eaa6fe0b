"""A vocabulary cut to a few languages: the same logits for every token that stays, the same tokens
for every text that is made of them, and nothing lost for the others but length.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import REFERENCE, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import cli

import edge_gemma
from edge_gemma.bundles.folder import Bundle
from edge_gemma.convert.pipeline import Conversion, convert, prepare
from edge_gemma.convert.trim import languages
from edge_gemma.convert.trim.choice import Chooser, Wanted
from edge_gemma.convert.trim.cut import imported, read_gguf_vocabulary, read_kept, trim
from edge_gemma.convert.trim.merges import Merges
from edge_gemma.engines.llama.tokenizer import Tokenizer
from edge_gemma.errors import BundleError, RuntimeFailure, UsageError
from edge_gemma.plan.records import PlanRequest
from edge_gemma.prompts.cut_vocabulary import cut_vocabulary_note
from edge_gemma.spans import Rows, Tokens
from edge_gemma.store.importer import import_gguf

TOLERANCE = {"g3text": 0.01, "g3mm": 0.01, "g3n": 0.04}  # of specs, as in test_convert.py
SMALL = Conversion(quant="f32", verify=False, audio="none", vision="none")


# --- the real vocabulary ---


@pytest.fixture(scope="module")
def whole(sample_gguf, tmp_path_factory) -> Bundle:
    return import_gguf(sample_gguf, tmp_path_factory.mktemp("whole") / "270m")


@pytest.fixture(scope="module")
def english(whole, tmp_path_factory) -> Bundle:
    return trim(whole, tmp_path_factory.mktemp("cut") / "en", Wanted(("en",))).bundle


@pytest.fixture(scope="module")
def kept(english) -> np.ndarray:
    found = read_kept(english)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def tokenizers(whole, english):
    with Tokenizer(whole.decoder_path) as before, Tokenizer(english.decoder_path) as after:
        yield before, after


@pytest.mark.compat(
    kind="gguf",
    what="a vocabulary cut to languages (`edge-gemma trim`), real Gemma 3 270M",
    happens="half the bytes; the logits of every token that stays are the same to the bit",
)
def test_real_weights_answer_the_same_to_the_bit(whole, english):
    """The receipt compares the logits of every kept token at each position of a text that chose
    nothing; a cut that changed one would have been refused.
    """
    figures = english.manifest.vocabulary.receipt["en"]
    assert figures["equal_rows"] >= 150
    assert figures["identical"] > 0.99
    before, after = figures["bits_per_character_before"], figures["bits_per_character_after"]
    assert after <= before * 1.005
    assert english.total_bytes() < 0.55 * whole.total_bytes()
    english.verify()


def test_what_was_cut_away_is_told(english):
    receipt = english.manifest.vocabulary.receipt
    assert receipt["ru"]["tokens_per_character_after"] > 0.8
    assert receipt["ru"]["identical"] < 0.2
    assert "bits_per_character_before" not in receipt["ru"]


@pytest.mark.parametrize("text", languages.measuring_texts().values())
def test_texts_of_kept_tokens_are_tokenized_as_before(tokenizers, kept, text):
    """Line by line: wherever the whole vocabulary needs no token that went, nothing differs."""
    before, after = tokenizers
    stays = set(kept.tolist())
    lines = [line for line in text.splitlines() if stays.issuperset(before.tokenize(line))]
    for line in lines:
        assert [int(kept[token]) for token in after.tokenize(line)] == before.tokenize(line)


def test_closure_holds_for_any_join_of_kept_pieces(whole, tokenizers, kept):
    before, after = tokenizers
    vocabulary = read_gguf_vocabulary(whole)
    stays = set(kept.tolist())
    pieces = [
        vocabulary.tokens[i].decode().replace("▁", " ") for i in kept if vocabulary.types[i] == 1
    ]

    @settings(max_examples=500, deadline=None)
    @given(st.lists(st.sampled_from(pieces), min_size=1, max_size=12))
    def same(parts: list[str]) -> None:
        text = "".join(parts)
        ids = before.tokenize(text)
        if stays.issuperset(ids):
            assert [int(kept[token]) for token in after.tokenize(text)] == ids

    same()


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=60))
def test_any_text_comes_back_through_bytes(english_model, text):
    # the vocabulary writes a space as ▁, so one of these comes back as the other, cut or whole
    text = text.encode("utf-8", "replace").decode().replace("▁", " ")
    assert english_model.detokenize(english_model.tokenize(text), special=True) == text


@pytest.fixture(scope="module")
def english_model(english):
    with edge_gemma.load(english, n_ctx=256) as model:
        yield model


def test_foreign_text_is_told_and_familiar_text_is_not(english_model):
    part = english_model.bundle.manifest.vocabulary

    def note_of(text):
        pieces = [english_model.decoder.piece(id) for id in english_model.tokenize(text)]
        return cut_vocabulary_note(part, text, pieces)

    said = note_of("Столица Франции — это город на реке")
    assert "cut to en" in said
    assert "characters" in said
    for text in ("The capital of France", "12345678901234567890", "Straße nach Köln", ""):
        assert note_of(text) is None


@pytest.mark.slow
def test_three_languages_each_with_held_back_text(whole, tmp_path):
    made = trim(whole, tmp_path / "three", Wanted(("en", "German", "sl")), measure=False).bundle
    assert made.manifest.vocabulary.languages == ("en", "de", "sl")
    for language in ("en", "de", "sl"):
        figures = made.manifest.vocabulary.receipt[language]
        assert figures["identical"] > 0.97, language
        ratio = figures["tokens_per_character_after"] / figures["tokens_per_character_before"]
        assert ratio < 1.01, language


@pytest.mark.slow
def test_the_unused_tokens_alone_cost_nothing(whole):
    vocabulary = read_gguf_vocabulary(whole)
    with Tokenizer(whole.decoder_path) as tokenizer:
        choice = Chooser(vocabulary, tokenizer, Wanted(("all",))).choice()
    gone = set(range(len(vocabulary.tokens))) - set(choice.kept.tolist())
    assert len(gone) > 6000
    assert all(vocabulary.tokens[i].startswith(b"<unused") for i in gone)


# --- merges ---


def test_the_way_to_a_piece_is_that_of_the_tokenizer(gemma_tokenize, whole):
    """Our reading of the merges ends where llama.cpp's tokenizer ends."""
    vocabulary = read_gguf_vocabulary(whole)
    merges = Merges(vocabulary.tokens, vocabulary.scores)
    rng = np.random.default_rng(3)
    normal = np.flatnonzero(vocabulary.types == 1)
    n_reached = 0
    for i in rng.choice(normal, 2000, replace=False):
        text = vocabulary.tokens[i].decode()
        path = merges.path(text)
        ids = gemma_tokenize(text.replace("▁", " "), False)
        reached = len(text) == 1 or (bool(path) and path[-1] == text)
        assert reached == (ids == [i]), text
        n_reached += reached
    assert n_reached > 1900


# --- the reference recipes ---


def small_text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("the model hears and answers\n")
    return path


@pytest.mark.parametrize("name", ["g3text", "g3mm", "g3n"])
def test_a_cut_checkpoint_answers_as_transformers_on_kept_ids(name, tmp_path):
    checkpoint = write_checkpoint(name, tmp_path / "c", keep=lambda tensor: "_tower" not in tensor)
    reference = np.load(REFERENCE / f"{name}-text.npz")
    ids = [int(i) for i in reference["input_ids"]]
    wanted = Wanted(files=(small_text(tmp_path),))
    bundle = convert(checkpoint, tmp_path / "b", replace_trim(wanted, needed=ids)).bundle
    kept = read_kept(bundle)
    n_whole = bundle.manifest.vocabulary.n_whole
    new = {int(old): i for i, old in enumerate(kept)}
    usable = [i for i in ids if i in new]
    whole = convert(checkpoint, tmp_path / "w", SMALL).bundle
    got, expected = logits_of(bundle, [new[i] for i in usable]), logits_of(whole, usable)
    np.testing.assert_array_equal(got, expected[:, kept])
    if len(usable) == len(ids):  # every token of the reference's text stays
        assert np.abs(got[-8:] - reference["logits_last8"][:, kept]).max() < TOLERANCE[name]
    assert len(kept) <= n_whole


def replace_trim(wanted: Wanted, needed) -> Conversion:
    return Conversion(
        quant="f32", verify=False, audio="none", vision="none", trim=wanted, name="same"
    )


def logits_of(bundle: Bundle, ids) -> np.ndarray:
    with edge_gemma.load(bundle, n_ctx=512, request=PlanRequest(n_threads=1)) as model:
        return np.concatenate(list(model.evaluate([Tokens(tuple(ids))])))


def test_sound_and_pictures_are_answered_the_same(hearing_bundle, tmp_path):
    """Embedding rows take PLE row 0, which stays; end-of-audio tokens follow to their new ids."""
    cut = trim(hearing_bundle, tmp_path / "cut", Wanted(("all",)), measure=False).bundle
    kept = read_kept(cut)
    assert len(kept) < cut.manifest.vocabulary.n_whole
    for name, token in cut.manifest.special_tokens.items():
        assert kept[token] == hearing_bundle.manifest.special_tokens[name], name
    found = []
    for bundle, ids in ((hearing_bundle, None), (cut, kept)):
        with edge_gemma.load(bundle, n_ctx=512, request=PlanRequest(n_threads=1)) as model:
            rows = model.encode_audio(np.sin(np.arange(16000) / 20).astype(np.float32) / 4)
            text = Tokens(tuple(model.tokenize("the")))
            logits = np.concatenate(list(model.evaluate([text, Rows(rows), text])))
            found.append(logits if ids is not None else logits[:, kept])
    np.testing.assert_array_equal(*found)


def test_trimming_and_converting_give_the_same_weights(tmp_path):
    """From a checkpoint or from its bundle: the same rows, quantized alike."""
    checkpoint = write_checkpoint("g3n", tmp_path / "c", keep=lambda name: "_tower" not in name)
    options = Conversion(quant="q4_0", verify=False, audio="none", vision="none", name="same")
    whole = convert(checkpoint, tmp_path / "whole", options).bundle
    cut = trim(whole, tmp_path / "cut", Wanted(("all",)), measure=False).bundle
    import dataclasses

    directly = dataclasses.replace(options, trim=Wanted(("all",)))
    made = convert(checkpoint, tmp_path / "made", directly).bundle
    assert made.decoder_path.read_bytes() == cut.decoder_path.read_bytes()
    assert made.manifest.decoder == cut.manifest.decoder
    assert made.manifest.special_tokens == cut.manifest.special_tokens
    assert made.manifest.end_tokens == cut.manifest.end_tokens


def test_a_slice_an_onnx_decoder_and_a_receipt_go_with_it(tmp_path):
    from test_matformer import e4b_recipe

    checkpoint = write_checkpoint(e4b_recipe(), tmp_path / "c")
    text = tmp_path / "text.txt"
    text.write_text("the model hears and answers what was said. " * 400)
    options = Conversion(
        quant="q8_0",
        slice="e2b",
        decoder="both",
        trim=Wanted(files=(text,)),
        check=text,
        check_tokens=600,
        n_threads=1,
        audio="none",
        vision="none",
        name="same",
    )
    bundle = convert(checkpoint, tmp_path / "b", options).bundle
    manifest = bundle.manifest
    assert manifest.decoder.n_vocab == manifest.onnx.embeddings.n_rows < 1024
    assert manifest.onnx.per_layer.n_rows == manifest.decoder.n_vocab
    assert manifest.vocabulary.receipt["en"]["equal_rows"] > 0
    assert manifest.quality["tokens"] > 500
    assert not list(bundle.folder.glob(".*"))


def test_an_onnx_decoder_is_left_out_and_said(tmp_path):
    checkpoint = write_checkpoint("g3text", tmp_path / "c")
    options = Conversion(quant="f32", verify=False, decoder="both", onnx_quant="f32")
    whole = convert(checkpoint, tmp_path / "whole", options).bundle
    result = trim(whole, tmp_path / "cut", Wanted(("all",)), measure=False)
    assert result.bundle.manifest.onnx is None
    assert any("ONNX decoder was left out" in said for said in result.notes)
    assert not [name for name in result.bundle.manifest.files if "onnx" in name or "rows" in name]


def test_a_cut_embedding_model_gives_the_same_vectors(embedding_bundle, tmp_path):
    """Its logits do not exist, so nothing is measured while it is cut: here is what is compared."""
    path = tmp_path / "words.txt"
    path.write_text("the model hears and answers\n")
    whole = Bundle.open(embedding_bundle)
    cut = trim(whole, tmp_path / "cut", Wanted(files=(path,))).bundle
    assert cut.manifest.decoder.n_vocab < whole.manifest.decoder.n_vocab
    assert not any("equal_rows" in figures for figures in cut.manifest.vocabulary.receipt.values())
    vectors = []
    for folder in (embedding_bundle, cut.folder):
        with edge_gemma.load(folder, request=PlanRequest(n_threads=1)) as model:
            vectors.append(
                [model.embed(["the model hears"], kind=kind) for kind in ("query", "document")]
            )
    assert np.array_equal(*vectors)


def test_two_files_of_one_name_are_both_read(tiny_bundle, tmp_path):
    paths = []
    for folder, text in (("a", "the model"), ("b", "was heard")):
        paths.append(tmp_path / folder / "words.txt")
        paths[-1].parent.mkdir()
        paths[-1].write_text(text)
    whole = Bundle.open(tiny_bundle)
    both = chooser_of(whole, Wanted(files=tuple(paths)))
    assert both.choice().files == ("words.txt", "words.txt")
    parts = [chooser_of(whole, Wanted(files=(path,))).choice() for path in paths]
    assert set(both.choice().kept) >= set(parts[0].kept) & set(parts[1].kept)
    assert {token for token, _ in both._used} == {
        token for path in paths for token, _ in chooser_of(whole, Wanted(files=(path,)))._used
    }


def test_a_language_that_cannot_be_measured_is_told(tiny_bundle):
    choice = chooser_of(Bundle.open(tiny_bundle), Wanted(("hi",))).choice()
    assert any("no text of hi" in said for said in choice.notes)


def chooser_of(bundle: Bundle, wanted: Wanted) -> Chooser:
    with Tokenizer(bundle.decoder_path) as tokenizer:
        return Chooser(read_gguf_vocabulary(bundle), tokenizer, wanted)


# --- nonsense ---


def test_no_language_at_all_is_refused(tiny_bundle, tmp_path):
    done = cli("trim", tiny_bundle, tmp_path / "out", "--languages", "")
    assert done.returncode == 2
    assert "names none" in done.stderr


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(("slovenan",)), "did you mean slovenian"),
        (Wanted(("en", "all")), "stands alone"),
        (Wanted(("all",), files=(Path(__file__),)), "nothing to add"),
        (Wanted(keep_tokens=10), "too small"),
        (Wanted(keep_tokens=-1), "positive"),
        (Wanted(("en",), min_count=3), "none was given"),
        (Wanted(files=(Path("/nowhere/words.txt"),)), "cannot read"),
    ],
)
def test_what_cannot_be_is_refused(tiny_bundle, tmp_path, wanted, message):
    with pytest.raises(UsageError, match=message):
        trim(Bundle.open(tiny_bundle), tmp_path / "out", wanted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"\x7fELF\x02\x00\xff\xfe", b"one\0two", b"  \n"])
def test_a_word_list_that_is_no_text_is_refused(tiny_bundle, tmp_path, content):
    path = tmp_path / "list"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no text|no UTF-8 text"):
        trim(Bundle.open(tiny_bundle), tmp_path / "out", Wanted(files=(path,)))
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_was_cut_is_not_cut_again(tmp_path):
    checkpoint = write_checkpoint("g3n", tmp_path / "c", keep=lambda name: "_tower" not in name)
    whole = convert(checkpoint, tmp_path / "whole", SMALL).bundle
    cut = trim(whole, tmp_path / "cut", Wanted(("all",)), measure=False).bundle
    with pytest.raises(UsageError, match="was cut already \\("):
        trim(cut, tmp_path / "again", Wanted(("sl",)))


def test_a_full_disk_leaves_nothing(tiny_bundle, tmp_path, monkeypatch):
    from edge_gemma.convert.trim import cut

    monkeypatch.setattr(cut.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(RuntimeFailure, match="free; choose another folder"):
        trim(Bundle.open(tiny_bundle), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_twins_stay_together():
    merges = Merges([b"a", b"b", b"ab", b"ab"], np.array([-9, -9, -1, -2]))
    assert set(merges.group(2)) == {2, 3}


def test_a_manifest_with_an_impossible_vocabulary_is_refused(tiny_bundle, tmp_path):
    folder = tmp_path / "b"
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["vocabulary"] = {"n_whole": 3}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="kept_tokens.npy|cannot be cut"):
        Bundle.open(folder)


def test_word_lists_without_the_library_name_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wordfreq", None)
    languages._wordfreq.cache_clear()
    with pytest.raises(RuntimeFailure, match=r"edge-gemma\[trim\]"):
        languages.check_languages(("en",))
    languages._wordfreq.cache_clear()


# --- the command line ---


def test_a_gguf_is_cut_and_its_bundle_shows_it(tiny_bundle, tmp_path):
    words = small_text(tmp_path)
    gguf = Bundle.open(tiny_bundle).decoder_path
    with imported(gguf, tmp_path / "direct") as whole:
        result = trim(whole, tmp_path / "direct", measure=False)
    assert result.bundle.manifest.vocabulary.languages == ()
    done = cli("trim", gguf, tmp_path / "out", "--vocabulary", words, "--no-measure", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["languages"] == []
    assert "cut to words.txt" in cli("inspect", tmp_path / "out").stdout
    assert cli("trim", tmp_path / "out", tmp_path / "x").returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct", "out", "words.txt"]


def test_a_dry_run_offers_sizes(tmp_path):
    checkpoint = write_checkpoint("g3n", tmp_path / "c", keep=lambda name: "_tower" not in name)
    options = Conversion(quant="q8_0", trim=Wanted(("all",), offer_sizes=True))
    trimmed = prepare(checkpoint, options).trimmed
    whole, read_whole = trimmed.bytes_of(trimmed.n_whole)
    cut, read_cut = trimmed.bytes_of(len(trimmed.choice.kept))
    assert cut < whole
    assert read_cut < read_whole
    shown = cli("convert", checkpoint, tmp_path / "o", "--dry-run", "--keep-tokens", 832)
    assert "--keep-tokens" in shown.stdout
    assert not (tmp_path / "o").exists()
