"""Fixtures that the doctests and several test files share."""

from __future__ import annotations

import pytest

from checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A Gemma 3 text checkpoint of a few MB with the reference answers in reference/g3text-text.npz."""
    return write_checkpoint("g3text", tmp_path_factory.mktemp("g3text"))


@pytest.fixture(scope="session")
def audio_checkpoint(tmp_path_factory):
    """The audio tensors of the reference Gemma 3n, with the answers in reference/g3n-audio.npz."""
    import hearing

    return hearing.audio_checkpoint(tmp_path_factory.mktemp("g3n-audio") / "checkpoint")


@pytest.fixture(scope="session")
def encoder_bundle(audio_checkpoint, tmp_path_factory):
    """The folder of a bundle whose audio encoder is real (f32) and whose decoder is only a name."""
    import hearing

    return hearing.encoder_bundle(audio_checkpoint, tmp_path_factory.mktemp("encoder") / "bundle").folder
