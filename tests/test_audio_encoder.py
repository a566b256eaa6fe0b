"""The converted audio encoder against transformers: whole clips, 10 ms packets, random packets;
precisions; bad checkpoints.
"""

import json

import hearing
import numpy as np
import pytest
from checkpoints import recipe, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.benchmarks.dev import audio_reference
from edge_gemma.bundles.folder import Bundle
from edge_gemma.convert.audio import AudioConfig, write_audio_encoder
from edge_gemma.convert.checkpoint import Checkpoint
from edge_gemma.convert.special_rows import hard_rows
from edge_gemma.errors import (
    BundleError,
    CheckpointError,
    MediaError,
    RuntimeFailure,
    UnsupportedModel,
)
from edge_gemma.hearing.encoder import AudioEncoder

REFERENCE = hearing.reference()


@pytest.fixture(scope="module")
def encoder(encoder_bundle):
    with AudioEncoder(Bundle.open(encoder_bundle), n_threads=1) as encoder:
        yield encoder


def in_packets(encoder, wave, bounds):
    stream = encoder.stream()
    return np.concatenate(
        [
            *(stream.push(wave[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)),
            stream.finish(),
        ]
    )


@pytest.mark.parametrize("seconds", ["0.9", "6.3"])
def test_soft_tokens_equal_transformers(encoder, seconds):
    wave, want = REFERENCE[f"wave_{seconds}"], REFERENCE[f"audio_soft_{seconds}"]
    whole = encoder.encode(wave)
    assert whole.shape == want.shape and whole.dtype == np.float32
    assert np.abs(whole - want).max() < 3e-5
    assert np.array_equal(
        in_packets(encoder, wave, [*range(0, len(wave), 160), len(wave)]), whole
    )  # 10 ms


@pytest.mark.parametrize("seconds", ["0.9", "6.3"])
def test_the_numpy_reference_equals_transformers(audio_checkpoint, seconds):
    """What `benchmarks.dev.audio_reference` holds the full-size encoder against; 0.9 s ends on an
    odd number of rows.
    """
    soft = audio_reference.encode(audio_checkpoint, REFERENCE[f"wave_{seconds}"])
    assert (
        soft.shape == REFERENCE[f"audio_soft_{seconds}"].shape
        and np.abs(soft - REFERENCE[f"audio_soft_{seconds}"]).max() < 1e-5
    )


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 100_800), max_size=60))
def test_random_packets_give_the_same_bits(encoder, cuts):
    wave = REFERENCE["wave_6.3"]
    soft = in_packets(encoder, wave, [0, *sorted(cuts), len(wave)])
    assert np.abs(soft - REFERENCE["audio_soft_6.3"]).max() < 3e-5
    assert np.array_equal(soft, encoder.encode(wave))


# in memory; a third of this small tower is never quantized
@pytest.mark.parametrize(
    "precision, smallest, largest, rms",
    [
        ("f16", 0.95, 1.05, 1e-4),
        ("int8", 0.0, 0.5, 0.03),
        ("int8-block", 0.0, 0.5, 0.03),
        ("int4-block", 0.0, 0.5, 0.25),
    ],
)
def test_precisions(audio_checkpoint, encoder_bundle, tmp_path, precision, smallest, largest, rms):
    bundle = hearing.encoder_bundle(audio_checkpoint, tmp_path / "bundle", precision)
    wave, want = REFERENCE["wave_6.3"], REFERENCE["audio_soft_6.3"]
    f32_bytes = Bundle.open(encoder_bundle).manifest.audio.weights_bytes
    assert smallest < bundle.manifest.audio.weights_bytes / f32_bytes < largest
    with AudioEncoder(bundle, n_threads=1) as encoder:
        soft = encoder.encode(wave)
        assert np.sqrt(np.mean((soft - want) ** 2) / np.mean(want**2)) < rms
        rng = np.random.default_rng(5)
        for _ in range(3):
            cuts = sorted(rng.integers(0, len(wave), 50).tolist())
            assert np.array_equal(in_packets(encoder, wave, [0, *cuts, len(wave)]), soft)


def test_tokens_come_while_the_clip_is_still_running(encoder):
    """480 ms steps: after 0.6 s the first three tokens are out, and they are the final ones."""
    wave = REFERENCE["wave_6.3"]
    stream = encoder.stream()
    early = stream.push(wave[:9600])
    assert len(early) == 3 and np.array_equal(early, encoder.encode(wave)[:3])


@pytest.mark.parametrize(
    "n, k", [(0, 0), (1, 0), (512, 0), (513, 1), (2560, 1), (16000, 7), (480_000, 188)]
)
def test_lengths(encoder, n, k):
    assert encoder.encode(np.zeros(n, np.float32)).shape == (k, 256)


def test_streams_do_not_touch_each_other(encoder):
    a, b = REFERENCE["wave_6.3"][:32000], REFERENCE["wave_6.3"][32000:64000]
    one, two, rows = encoder.stream(), encoder.stream(), [[], []]
    for k in range(0, 32000, 1000):
        rows[0].append(one.push(a[k : k + 1000]))
        rows[1].append(two.push(b[k : k + 1000]))
    assert np.array_equal(np.concatenate([*rows[0], one.finish()]), encoder.encode(a))
    assert np.array_equal(np.concatenate([*rows[1], two.finish()]), encoder.encode(b))


def test_a_closed_stream_or_encoder_says_so(encoder_bundle):
    encoder = AudioEncoder(Bundle.open(encoder_bundle), n_threads=1)
    stream = encoder.stream()
    stream.close()
    with pytest.raises(RuntimeFailure, match="this audio stream has ended"):
        stream.push(np.zeros(16000, np.float32))
    stream = encoder.stream()
    encoder.close()
    with pytest.raises(RuntimeFailure, match="this audio stream has ended"):
        stream.push(np.zeros(16000, np.float32))
    with pytest.raises(RuntimeFailure, match="encoder was closed"):
        encoder.stream()


def test_nan_is_refused_before_it_reaches_the_encoder(encoder):
    stream = encoder.stream()
    with pytest.raises(MediaError, match="NaN"):
        stream.push(np.array([np.nan], np.float32))


def test_hard_rows_are_the_padding_and_end_rows(audio_checkpoint):
    rows = hard_rows(audio_checkpoint, "model.embed_audio.", [0, 127])
    assert (
        rows.shape == (2, 256)
        and np.allclose(np.mean(rows**2, axis=1), 1, atol=1e-3)
        and not np.allclose(rows[0], rows[1])
    )
    with pytest.raises(CheckpointError, match=r"128 rows, asked for \[128\]"):
        hard_rows(audio_checkpoint, "model.embed_audio.", [128])


def test_a_checkpoint_without_audio(tmp_path, tiny_checkpoint):
    with pytest.raises(CheckpointError, match="has no audio tower.*--audio-encoder none"):
        write_audio_encoder(Checkpoint.open(tiny_checkpoint), tmp_path, "f32")


def changed(tmp_path, **changes) -> Checkpoint:
    """The reference checkpoint with other numbers in its audio_config."""
    copy = json.loads(json.dumps(recipe("g3n")))
    copy["config"]["audio_config"].update(changes)
    return Checkpoint.open(
        write_checkpoint(copy, tmp_path / "checkpoint", keep=lambda name: "audio" in name)
    )


def test_another_architecture_is_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match="conf_attention_context_right is 2"):
        write_audio_encoder(changed(tmp_path, conf_attention_context_right=2), tmp_path, "f32")


def test_shapes_that_belie_the_config_are_refused_by_name(tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"conv_0.conv.weight has shape \[32, 1, 3, 3\], audio_config implies \[8, 1, 3, 3\]",
    ):
        write_audio_encoder(changed(tmp_path, sscp_conv_channel_size=[8, 16]), tmp_path, "f32")


def test_a_malformed_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="audio_config is malformed .ValueError"):
        write_audio_encoder(changed(tmp_path, hidden_size="wide"), tmp_path, "f32")


def test_what_the_config_leaves_out_is_transformers_default(tmp_path):
    """Gemma3nAudioConfig's, and the earlier spelling sscp_conv_eps."""
    defaults = {
        "hidden_size": 1536,
        "conf_num_hidden_layers": 12,
        "conf_num_attention_heads": 8,
        "sscp_conv_channel_size": [128, 32],
    }
    whole = AudioConfig.of(changed(tmp_path / "whole", **defaults))
    data = recipe("g3n")
    for config in (None, {}, {"model_type": "gemma3n_audio"}, {"rms_norm_eps": None}):
        data["config"]["audio_config"] = config
        folder = write_checkpoint(data, tmp_path / "bare", keep=lambda name: "audio" in name)
        assert AudioConfig.of(Checkpoint.open(folder)) == whole
    own = {"sscp_conv_group_norm_eps": None, "sscp_conv_eps": 0.25}
    assert AudioConfig.of(changed(tmp_path / "early", **own)).group_norm_epsilon == 0.25
    with pytest.raises(CheckpointError, match=r"shape .*, audio_config implies \[128, 1, 3, 3\]"):
        write_audio_encoder(Checkpoint.open(folder), tmp_path, "f32")


def test_a_damaged_encoder_is_refused(encoder_bundle, tmp_path):
    bundle = Bundle.open(encoder_bundle)
    (tmp_path / "audio_encoder.onnx").write_bytes(b"\x08\x07garbage")
    with pytest.raises(BundleError, match="onnxruntime cannot open"):
        AudioEncoder(Bundle(tmp_path, bundle.manifest))


def test_a_bundle_without_audio_cannot_hear(encoder_bundle):
    import msgspec

    bundle = Bundle.open(encoder_bundle)
    deaf = Bundle(bundle.folder, msgspec.structs.replace(bundle.manifest, audio=None))
    with pytest.raises(UnsupportedModel, match="no audio encoder, so it cannot hear"):
        AudioEncoder(deaf)
