"""One vocabulary from tokenizer.model and from tokenizer.json, and no crash on what is neither."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import sentencepiece
from checkpoints import REFERENCE
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.convert import vocabulary as v
from edge_gemma.errors import CheckpointError, RuntimeFailure

N = 768


def folder_of(tmp_path, *files):
    for file in files:
        shutil.copy(REFERENCE / file, tmp_path)
    return tmp_path


def same(a: v.Vocabulary, b: v.Vocabulary) -> None:
    assert a.tokens == b.tokens
    np.testing.assert_array_equal(a.scores, b.scores)
    np.testing.assert_array_equal(a.types, b.types)
    assert (a.special, a.add_space_prefix, a.chat_template) == (
        b.special,
        b.add_space_prefix,
        b.chat_template,
    )


def test_pieces_and_scores_are_the_sentencepiece_librarys(tmp_path):
    vocabulary = v.read_vocabulary(folder_of(tmp_path, "tokenizer.model"), {}, N)
    library = sentencepiece.SentencePieceProcessor(str(REFERENCE / "tokenizer.model"))
    plain = [i for i in range(N) if vocabulary.types[i] in (v.NORMAL, v.BYTE)]
    assert len(plain) > 700
    for i in plain:
        assert vocabulary.tokens[i].decode() == library.IdToPiece(i)
        assert vocabulary.scores[i] == library.GetScore(i)
    for i in range(N):
        assert (vocabulary.types[i] == v.BYTE) == library.IsByte(i)
    assert vocabulary.special == {"bos": 2, "eos": 1, "unk": 3, "pad": 0, "eot": 9}
    assert (
        vocabulary.types[[0, 1, 2, 3, 4, 5, 8, 9]].tolist() == [v.CONTROL] * 8
    )  # <unused0>, <start_of_turn> … steer
    assert (
        vocabulary.types[[10, 12, 13]].tolist() == [v.USER_DEFINED] * 3
    )  # <start_of_image>, newlines: always matched
    assert not vocabulary.add_space_prefix


def test_tokenizer_json_gives_the_same_vocabulary(tmp_path):
    """reference/tokenizer.json is transformers' own conversion of reference/tokenizer.model."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir(), (tmp_path / "c").mkdir()
    a = v.read_vocabulary(folder_of(tmp_path / "a", "tokenizer.model"), {}, N)
    b = v.read_vocabulary(folder_of(tmp_path / "b", "tokenizer.json"), {}, N)
    same(a, b)
    same(
        a, v.read_vocabulary(folder_of(tmp_path / "c", "tokenizer.model", "tokenizer.json"), {}, N)
    )


def test_merges_may_be_strings_and_reorder_scores(tmp_path):
    data = json.loads((REFERENCE / "tokenizer.json").read_text())
    data["model"]["merges"] = [
        " ".join(pair) for pair in data["model"]["merges"] if "\n" not in pair
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    old_style = v.read_vocabulary(tmp_path, {}, N)
    np.testing.assert_array_equal(
        old_style.scores, v.read_vocabulary(folder_of(tmp_path, "tokenizer.model"), {}, N).scores
    )
    (tmp_path / "tokenizer.model").unlink()
    merges = data["model"]["merges"]
    merges.insert(0, merges.pop(3))  # "▁t h" now learned first
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    swapped = v.read_vocabulary(tmp_path, {}, N)
    by_text = dict(zip(swapped.tokens, swapped.scores, strict=True))
    first = "".join(merges[0].split(" ")).encode()
    assert by_text[first] == 0.0 and by_text["\u2581t".encode()] == -1.0


def test_gemma_3s_gap_before_single_characters_is_kept():
    """Google's scores: −236,248 for the last merged piece, −236,280 for the first single character
    (id 236743).
    """
    n_special, n_merged = 494, 236249
    texts = [f"<s{i}>" for i in range(n_special)] + [f"m{i}" for i in range(n_merged)] + ["▁", "e"]
    types = [v.CONTROL] * n_special + [v.NORMAL] * (n_merged + 2)
    model = v._Model(vocab={}, merges=[(text[:1], text[1:]) for text in texts[n_special:-2]])
    scores = v._scores(REFERENCE, model, texts, types)
    assert (scores[494], scores[494 + n_merged - 1], scores[-2], scores[-1]) == (
        0.0,
        -236248.0,
        -236280.0,
        -236281.0,
    )


def test_added_tokens_padding_and_templates(tmp_path):
    folder = folder_of(tmp_path, "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "added_tokens_decoder": {
                    "770": {"content": "<image_soft_token>", "special": True},
                    "13": {"content": "▁▁x", "special": False},
                },
                "eos_token": {"content": "<end_of_turn>"},
                "chat_template": [
                    {"name": "tool_use", "template": "t"},
                    {"name": "default", "template": "d"},
                ],
            }
        )
    )
    vocabulary = v.read_vocabulary(folder, {"eos_token_id": [1, 9]}, 800)
    assert vocabulary.tokens[770] == b"<image_soft_token>" and vocabulary.types[770] == v.CONTROL
    assert vocabulary.tokens[13] == b"  x" and vocabulary.types[13] == v.USER_DEFINED
    assert vocabulary.tokens[769] == b"[PAD769]" and vocabulary.types[769] == v.UNUSED
    assert vocabulary.special["eos"] == 9
    assert vocabulary.chat_template == "d"
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert v.read_vocabulary(folder, {}, 800).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    "files, n_vocab, message",
    [
        ({}, N, "neither tokenizer.model nor tokenizer.json"),
        ({"tokenizer.model": b""}, N, "holds no pieces"),
        (
            {"tokenizer.model": b"\x0a\xff\xff\xff\xff\x0f"},
            N,
            "is not a sentencepiece model: Error parsing message",
        ),
        ({"tokenizer.model": b"\x0a\x02\x18\x63"}, N, "type 99"),
        ({"tokenizer.model": b"\x0a\x03\x0a\x01\xff"}, N, r"the text b'\\xff'"),
        ({"tokenizer.model": b"\x0a\x08\x0a\x01a\x15\x00\x00\xc0\x7f"}, N, "score nan"),
        ({"tokenizer.model": None}, 700, "768 tokens, config.json says vocab_size 700"),
        ({"tokenizer.json": b"{"}, N, "not a BPE tokenizer.json"),
        (
            {"tokenizer.json": b'{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}'},
            N,
            "not a BPE tokenizer.json",
        ),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0}}}'}, N, "byte fallback"),
        (
            {
                "tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 5}, '
                b'"byte_fallback": true}}'
            },
            N,
            "without gaps",
        ),
        (
            {
                "tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0}, '
                b'"byte_fallback": true}}'
            },
            N,
            "name no bos token",
        ),
        (
            {"tokenizer.model": None, "added_tokens.json": b'{"x": 99999999999}'},
            N,
            "the id 99999999999",
        ),
        (
            {
                "tokenizer.model": None,
                "tokenizer_config.json": b'{"added_tokens_decoder": {"3": 4}}',
            },
            N,
            "has no content",
        ),
    ],
)
def test_refusals(tmp_path, files, n_vocab, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(
            (REFERENCE / name).read_bytes() if content is None else content
        )
    with pytest.raises(CheckpointError, match=message):
        v.read_vocabulary(tmp_path, {}, n_vocab)


@pytest.mark.parametrize(
    "name, content",
    [
        ("added_tokens.json", {"<image_soft_token>": N}),
        ("added_tokens.json", {"<image_soft_token>": N + 32}),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {str(N): {"content": "<image_soft_token>", "special": True}}},
        ),
    ],
)
def test_a_token_behind_the_table_is_ignored_with_a_note(tmp_path, name, content):
    """Google's own 270M and 1B list <image_soft_token> one beyond their table."""
    folder = folder_of(tmp_path, "tokenizer.model")
    plain = v.read_vocabulary(folder, {}, N)
    (folder / name).write_text(json.dumps(content))
    vocabulary = v.read_vocabulary(folder, {}, N)
    same(plain, vocabulary)
    assert plain.notes == ()
    [note] = vocabulary.notes
    assert note.startswith("'<image_soft_token>' (") and f"no row in the table of {N}" in note
    wider = v.read_vocabulary(folder, {}, N + 64)  # with a row it is a token like any other
    assert b"<image_soft_token>" in wider.tokens and wider.notes == ()


@pytest.mark.parametrize("where", ["added_tokens", "vocab", "both", "vocab with a gap"])
def test_a_token_behind_the_table_in_tokenizer_json(tmp_path, where):
    folder = folder_of(tmp_path, "tokenizer.json")
    plain = v.read_vocabulary(folder, {}, N)
    data = json.loads((REFERENCE / "tokenizer.json").read_text())
    i = N + 5 if "gap" in where else N
    if where in ("added_tokens", "both"):
        added = {"id": i, "content": "<image_soft_token>", "special": True}
        data["added_tokens"].append(dict.fromkeys(data["added_tokens"][0], False) | added)
    if where != "added_tokens":
        data["model"]["vocab"]["<image_soft_token>"] = i
    (folder / "tokenizer.json").write_text(json.dumps(data))
    vocabulary = v.read_vocabulary(folder, {}, N)
    same(plain, vocabulary)
    assert len(vocabulary.notes) == 1 and f"'<image_soft_token>' ({i})" in vocabulary.notes[0]


def test_pieces_that_text_is_made_of_must_have_rows(tmp_path):
    folder = folder_of(tmp_path, "tokenizer.json")
    with pytest.raises(CheckpointError, match="768 tokens, config.json says vocab_size 767"):
        v.read_vocabulary(folder, {}, N - 1)


def test_surplus_pieces_of_tokenizer_model_are_dropped(tmp_path):
    """Gemma 3n's tokenizer beside a text model whose table was cut."""
    folder = folder_of(tmp_path, "tokenizer.model")
    plain = v.read_vocabulary(folder, {}, N)
    piece = sentencepiece.sentencepiece_model_pb2.ModelProto.SentencePiece
    from sentencepiece import sentencepiece_model_pb2 as messages

    model = messages.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    for i in range(256):
        model.pieces.append(piece(piece=f"<unused{7000 + i}>", score=0.0, type=v.USER_DEFINED))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    vocabulary = v.read_vocabulary(folder, {}, N)
    same(plain, vocabulary)
    assert vocabulary.notes == (
        f"'<unused7000>' ({N}) and 255 more tokens have no row in the table of {N}; ignored: the "
        "model cannot use them",
    )


def test_a_special_id_behind_the_table_loses_its_role(tmp_path):
    folder = folder_of(tmp_path, "tokenizer.json")
    vocabulary = v.read_vocabulary(folder, {"pad_token_id": N + 1}, N)
    assert vocabulary.special["pad"] == 0  # as the vocabulary spells it
    assert vocabulary.notes == (
        f"config.json gives pad the id {N + 1}, outside the vocabulary of {N}; ignored",
    )
    eos = {"eos_token_id": [N + 2, 1]}  # the first that has a row
    assert v.read_vocabulary(folder, eos, N).special["eos"] == 1
    text = (folder / "tokenizer.json").read_text().replace("<eos>", "<soe>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="the eos token has id 5000, outside"):
        v.read_vocabulary(folder, {"eos_token_id": 5000}, N)


@settings(max_examples=60)
@given(
    tokens=st.dictionaries(
        st.text("abc<>_▁", min_size=2, max_size=9).map(lambda text: f"<{text}>"),
        st.integers(0, 3 * N),
        max_size=6,
    ),
    where=st.sampled_from(["added_tokens.json", "tokenizer_config.json"]),
    n_vocab=st.integers(N, 2 * N),
)
def test_any_tokens_beyond_any_table(tmp_path_factory, tokens, where, n_vocab):
    """Whatever is listed behind the end: the table has n_vocab rows, and every surplus is noted."""
    folder = tmp_path_factory.mktemp("beyond")
    folder_of(folder, "tokenizer.model")
    listed = {text: i for text, i in tokens.items() if i > 13}  # not over bos, eos, <end_of_turn>
    decoder = {str(i): {"content": text} for text, i in listed.items()}
    content = listed if where == "added_tokens.json" else {"added_tokens_decoder": decoder}
    (folder / where).write_text(json.dumps(content))
    vocabulary = v.read_vocabulary(folder, {}, n_vocab)
    assert len(vocabulary.tokens) == len(vocabulary.scores) == len(vocabulary.types) == n_vocab
    beyond = {i for i in listed.values() if i >= n_vocab}
    assert len(vocabulary.notes) == bool(beyond)
    if len(beyond) > 1:
        assert f"and {len(beyond) - 1} more tokens" in vocabulary.notes[0]


def test_a_file_too_large_to_be_a_vocabulary_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(v, "MAX_JSON_BYTES", 11_000)
    folder_of(tmp_path, "tokenizer.model")
    with pytest.raises(
        CheckpointError, match="tokenizer.model has 11.1 KiB; expected at most 10.7 KiB"
    ):
        v.read_vocabulary(tmp_path, {}, N)


MODEL = (REFERENCE / "tokenizer.model").read_bytes()


@settings(max_examples=200)
@given(
    data=st.binary(max_size=300)
    | st.builds(
        lambda at, new: MODEL[:at] + new + MODEL[at + len(new) :],
        st.integers(0, len(MODEL)),
        st.binary(max_size=8),
    )
    | st.builds(lambda n: MODEL[:n], st.integers(0, len(MODEL)))
)
def test_any_bytes_are_a_model_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.model"
    path.write_bytes(data)
    try:
        pieces, special, _ = v._from_sentencepiece(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert all(text and v.NORMAL <= kind <= v.BYTE for text, _, kind in pieces)
        assert all(0 <= i < len(pieces) for i in special.values())


def test_a_protobuf_older_than_sentencepiece_wants_is_said(tmp_path, monkeypatch):
    import sys

    from google.protobuf import runtime_version

    def too_old(*_):
        raise runtime_version.VersionError("gencode 9.0.0 runtime 7.0.0")

    monkeypatch.setattr(runtime_version, "ValidateProtobufRuntimeVersion", too_old)
    monkeypatch.delitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", raising=False)
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    with pytest.raises(RuntimeFailure, match="gencode 9.* pip install --upgrade protobuf"):
        v.read_vocabulary(folder_of(tmp_path, "tokenizer.model"), {}, N)


def test_a_real_vocabulary_comes_back_from_its_gguf(sample_gguf):
    """real_checkpoint.py writes the tokenizer.model that converters, ours and others',
    begin with.
    """
    from edge_gemma.benchmarks.dev.sample import tokenizer_model

    library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model(sample_gguf))
    assert (library.unk_id(), library.bos_id(), library.eos_id(), library.pad_id()) == (
        3,
        2,
        1,
        0,
    ) and library.vocab_size() == 262144
    assert (
        library.decode(library.encode("The rivers of Europe, 1º ☃")) == "The rivers of Europe, 1º ☃"
    )
