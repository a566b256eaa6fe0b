"""Files appear whole or not at all."""

from __future__ import annotations

import errno

import pytest

from edge_gemma import files
from edge_gemma.errors import RuntimeFailure
from edge_gemma.files import written_whole


def test_the_bytes_take_the_name_in_one_step(tmp_path):
    path = tmp_path / "kept.json"
    path.write_bytes(b"old")
    with written_whole(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.json"]


def test_an_error_in_the_block_leaves_what_was_there(tmp_path):
    path = tmp_path / "kept.json"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), written_whole(path) as file:
        file.write(b"half")
        raise KeyError("something else")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.json"]


def test_a_full_disk_is_a_failure_with_path_and_reason(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    path = tmp_path / "kept.json"
    with pytest.raises(RuntimeFailure, match=r"kept\.json: No space left on device"):
        with written_whole(path) as file:
            file.write(b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RuntimeFailure, match="absent/kept.json: No such file or directory"):
        with written_whole(tmp_path / "absent" / "kept.json"):
            pass
