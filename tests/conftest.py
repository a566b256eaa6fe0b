"""Fixtures that the doctests and several test files share."""

from __future__ import annotations

import pytest

from checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A Gemma 3 text checkpoint of a few MB with the reference answers in reference/g3text-text.npz."""
    return write_checkpoint("g3text", tmp_path_factory.mktemp("g3text"))
