"""Word error rates: counting, datasets, and the whole command on stub ears."""

import sys

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.benchmarks.wer import dataset, errors, measure, words
from edge_gemma.errors import MediaError, MissingExtra, UsageError


def test_counting():
    assert errors([], []) == 0 and errors([], ["a"]) == 1 and errors(["a", "b"], []) == 2
    assert errors("a b c d".split(), "a x c".split()) == 2
    assert words("„Größe“, isn’t it?") == ["größe", "isn't", "it"]


def edit_distance(reference: list[str], heard: list[str]) -> int:
    """Levenshtein's, by its definition."""
    if not reference or not heard:
        return len(reference) + len(heard)
    *a, x = reference
    *b, y = heard
    return min(
        edit_distance(a, heard) + 1, edit_distance(reference, b) + 1, edit_distance(a, b) + (x != y)
    )


SENTENCES = st.lists(st.sampled_from(["a", "b", "it's"]), max_size=5)


@given(SENTENCES, SENTENCES)
def test_counting_is_the_edit_distance(reference, heard):
    assert errors(reference, heard) == edit_distance(reference, heard)


def test_without_jiwer_the_extra_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(MissingExtra, match=r"pip install 'edge-gemma\[bench\]'"):
        measure(lambda blocks: "hello", dataset(folder))


@pytest.fixture
def folder(tmp_path):
    for name in ("one", "two", "three", "none"):
        soundfile.write(tmp_path / f"{name}.wav", np.full(1600, 0.1), 16000)
    (tmp_path / "one.txt").write_text("Hello there.")
    (tmp_path / "a.trans.txt").write_text("two GOOD MORNING\n")
    (tmp_path / "transcription").write_text("<s> good night </s> (three)\n")
    return tmp_path


def test_every_kind_of_transcript_is_found(folder):
    assert [(path.stem, text.strip()) for path, text in dataset(folder)] == [
        ("one", "Hello there."),
        ("three", "good night"),
        ("two", "GOOD MORNING"),
    ]


def test_rate_of_stub_ears(folder):
    heard = iter(["hello here", "good night", None])

    def hear(blocks):
        assert sum(len(block) for block in blocks) == 1600
        if (text := next(heard)) is None:
            raise MediaError("cannot hear this")
        return text

    lines = []
    assert measure(hear, dataset(folder), lines.append) == {
        "wer": 0.5,
        "words": 6,
        "errors": 3,
        "files": 3,
        "failed": 1,
    }
    assert "two.wav: cannot hear this" in lines


def test_a_folder_without_transcripts_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no sound file with a transcript"):
        list(dataset(tmp_path))
    with pytest.raises(UsageError, match="is not a folder"):
        list(dataset(tmp_path / "nowhere"))
