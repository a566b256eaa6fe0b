"""Log-mel against transformers, bit for bit, and however it is cut."""

import numpy as np
import pytest
from hearing import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.errors import MediaError
from edge_gemma.hearing.log_mel import LogMel, log_mel
from edge_gemma.hearing.samples import MAX_CLIP_SAMPLES

REFERENCE = reference()


@pytest.mark.parametrize("seconds", ["0.9", "6.3"])
def test_equals_transformers_bit_for_bit(seconds):
    assert np.array_equal(log_mel(REFERENCE[f"wave_{seconds}"]), REFERENCE[f"mel_{seconds}"])


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 14400), max_size=40))
def test_any_packets_give_the_same_bits(cuts):
    wave, mel = REFERENCE["wave_0.9"], LogMel()
    bounds = [0, *sorted(cuts), len(wave)]
    rows = [mel.push(wave[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert np.array_equal(np.concatenate([*rows, mel.finish()]), REFERENCE["mel_0.9"])


@pytest.mark.parametrize("n", [0, 1, 127, 128, 511, 512, 513, 640, 641, 672, 673, 800, 16000])
def test_row_count_is_the_specification_s(n):
    padded = -(-n // 128) * 128
    assert len(log_mel(np.zeros(n, np.float32))) == max(0, (padded - 513) // 160 + 1)


def test_thirty_seconds_are_the_limit():
    mel = LogMel()
    mel.push(np.zeros(MAX_CLIP_SAMPLES, np.float32))
    with pytest.raises(MediaError, match=r"more than 30 s \(30.0 s\).*cut it at pauses"):
        mel.push(np.zeros(1, np.float32))


@pytest.mark.parametrize(
    "samples, message",
    [
        (np.array([0.0, np.nan]), "hold NaN or infinity"),
        (np.array([0.0, np.inf], np.float32), "hold NaN or infinity"),
        (np.zeros((10, 2)), r"shape \(10, 2\); expected one channel"),
        (np.zeros(10, np.int16), "type int16; expected float32"),
        (np.full(10, 3000.0), "reach 3000; expected"),
    ],
)
def test_broken_samples_are_refused(samples, message):
    with pytest.raises(MediaError, match=message):
        log_mel(samples)


def test_clipped_and_silent_audio_is_finite():
    assert np.isfinite(log_mel(np.sign(np.sin(np.arange(4000.0))))).all()
    assert np.allclose(log_mel(np.zeros(4000)), np.log(1e-5))
