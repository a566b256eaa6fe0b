"""Reading safetensors: whatever is in the file, the answer is right or a CheckpointError that names
what is wrong.
"""

from __future__ import annotations

import json
import re
import struct

import numpy as np
import pytest
from checkpoints import bf16, recipe, values, write_checkpoint, write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.convert.checkpoint import Checkpoint, canonical_name, read_header
from edge_gemma.errors import CheckpointError


def raw_safetensors(path, header, data=b"", length=None):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + data)
    return path


def folder_with(tmp_path, header, data=b"", length=None):
    (tmp_path / "config.json").write_text("{}")
    raw_safetensors(tmp_path / "model.safetensors", header, data, length)
    return tmp_path


ONE = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


@pytest.mark.parametrize(
    "dtype, rounded",
    [
        ("BF16", bf16),
        ("F16", lambda x: x.astype(np.float16).astype(np.float32)),
        ("F32", lambda x: x),
    ],
)
def test_reads_every_dtype_exactly_whole_and_by_rows(tmp_path, dtype, rounded):
    source = recipe("g3text")
    folder = write_checkpoint(source, tmp_path, dtype=dtype, keep=lambda name: "layers.0" in name)
    checkpoint = Checkpoint.open(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    expected = rounded(values(name, (256, 768), source["seed"], "gemma3"))
    canonical = "model.language_model.layers.0.mlp.down_proj.weight"
    assert checkpoint.shape(canonical) == (256, 768)
    np.testing.assert_array_equal(checkpoint.read(canonical), expected)
    np.testing.assert_array_equal(checkpoint.read(canonical, slice(100, 103)), expected[100:103])
    np.testing.assert_array_equal(checkpoint.read(canonical, slice(250, None)), expected[250:])
    assert checkpoint.read(canonical, slice(5, 5)).shape == (0, 768)


def test_shards_read_like_one_file(tmp_path):
    keep = lambda name: "layers.1." in name  # noqa: E731
    one = Checkpoint.open(write_checkpoint("g3text", tmp_path / "one", keep=keep))
    three = Checkpoint.open(write_checkpoint("g3text", tmp_path / "three", keep=keep, n_shards=3))
    assert sorted(one.names()) == sorted(three.names())
    for name in one.names():
        np.testing.assert_array_equal(one.read(name), three.read(name))


def test_reads_a_file_the_safetensors_library_wrote(tmp_path):
    from safetensors.numpy import save_file

    weights = {
        "model.norm.weight": np.arange(6, dtype=np.float16),
        "lm_head.weight": np.ones((3, 2), np.float32),
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    np.testing.assert_array_equal(
        checkpoint.read("model.language_model.norm.weight"), weights["model.norm.weight"]
    )
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), weights["lm_head.weight"])


@pytest.mark.parametrize(
    "stored, canonical",
    [
        ("model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        (
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
            "model.vision_tower.encoder.layers.0.mlp.fc1.bias",
        ),
        (
            "vision_tower.timm_model.conv_stem.conv.weight",
            "model.vision_tower.timm_model.conv_stem.conv.weight",
        ),
        (
            "multi_modal_projector.mm_input_projection_weight",
            "model.multi_modal_projector.mm_input_projection_weight",
        ),
        ("audio_tower.conformer.0.norm.weight", "model.audio_tower.conformer.0.norm.weight"),
        ("model.embed_audio.embedding.weight", "model.embed_audio.embedding.weight"),
        ("model.altup_projections.0.weight", "model.language_model.altup_projections.0.weight"),
        ("model.unknown.weight", "model.unknown.weight"),
    ],
)
def test_names_of_every_age_become_one(stored, canonical):
    assert canonical_name(stored) == canonical
    assert canonical_name(canonical) == canonical


@pytest.mark.parametrize(
    "header, data, length, message",
    [
        (ONE, b"\0" * 24, 1 << 60, "claims 1152921504606846976 bytes"),
        (ONE, b"\0" * 23, None, "truncated or damaged"),
        (ONE, b"\0" * 25, None, "truncated or damaged"),
        (b"\xff\xfe", b"", None, "no valid JSON"),
        (b"[" * 50_000 + b"]" * 50_000, b"", None, "no valid JSON"),
        (b"[]", b"", None, "expected an object"),
        (b'{"a": 1, "a": 2}', b"", None, "a name occurs twice"),
        (
            {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}},
            b"\0" * 20,
            None,
            "needs 24 bytes, its offsets give 20",
        ),
        (
            {"a": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}},
            b"\0" * 24,
            None,
            "malformed",
        ),
        (
            {"a": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 24]}},
            b"\0" * 24,
            None,
            "malformed",
        ),
        (
            {"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 6]}},
            b"\0" * 6,
            None,
            "malformed",
        ),
        (
            {"a": {"dtype": "Q9", "shape": [6], "data_offsets": [0, 24]}},
            b"\0" * 24,
            None,
            "malformed",
        ),
        (
            ONE | {"b": {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]}},
            b"\0" * 24,
            None,
            "'b' overlaps the tensor before it",
        ),
        (
            ONE | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [28, 32]}},
            b"\0" * 32,
            None,
            "'b' leaves a gap before it",
        ),
        (
            {"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}},
            b"\0" * 4,
            None,
            "'a' has type I8; expected one of F64, F32, F16, BF16",
        ),
        (
            {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}},
            b"\0" * 4,
            None,
            "take the original bf16 one",
        ),
        (
            {
                "model.norm.weight": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
                "language_model.model.norm.weight": {
                    "dtype": "F16",
                    "shape": [1],
                    "data_offsets": [2, 4],
                },
            },
            b"\0" * 4,
            None,
            "is there twice",
        ),
    ],
)
def test_a_broken_file_is_refused_with_the_reason(tmp_path, header, data, length, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Checkpoint.open(folder_with(tmp_path, header, data, length))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_named(tmp_path, poison):
    weights = np.ones((4, 8), np.float32)
    weights[2, 3] = poison
    write_safetensors(tmp_path / "model.safetensors", [("model.norm.weight", weights)])
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("model.language_model.norm.weight", slice(0, 2))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' holds NaN or infinity"):
        checkpoint.read("model.language_model.norm.weight")


def test_large_finite_values_are_not_mistaken_for_infinity(tmp_path):
    weights = np.full(64, 3e38, np.float32)
    write_safetensors(tmp_path / "model.safetensors", [("model.norm.weight", weights)], "F32")
    (tmp_path / "config.json").write_text("{}")
    np.testing.assert_array_equal(
        Checkpoint.open(tmp_path).read("model.language_model.norm.weight"), weights
    )


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="pickle .*never read here"):
        Checkpoint.open(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a LoRA adapter"):
        Checkpoint.open(tmp_path)
    folder = folder_with(tmp_path, ONE, b"\0" * 24)
    with pytest.raises(CheckpointError, match="lacks the tensor 'b'"):
        Checkpoint.open(folder).read("b")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config.json"):
        Checkpoint.open(folder)


def test_shard_trouble_is_named(tmp_path):
    folder = write_checkpoint("g3text", tmp_path, keep=lambda name: "layers.0" in name, n_shards=2)
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    second = folder / "model-00002-of-00002.safetensors"
    second.rename(folder / "away")
    with pytest.raises(
        CheckpointError, match="the shard model-00002-of-00002.safetensors is missing"
    ):
        Checkpoint.open(folder)
    index.unlink()
    with pytest.raises(CheckpointError, match="shard 2 of 2 is missing"):
        Checkpoint.open(folder)
    (folder / "away").rename(second)
    assert len(Checkpoint.open(folder).names()) == 13
    weight_map = json.loads(good)["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.x.weight": second.name}}))
    with pytest.raises(CheckpointError, match="places tensor 'model.x.weight' in model-00002"):
        Checkpoint.open(folder)
    index.write_text(json.dumps({"weight_map": dict(list(weight_map.items())[1:])}))
    with pytest.raises(CheckpointError, match="does not place there"):
        Checkpoint.open(folder)
    index.write_text(
        json.dumps({"weight_map": weight_map | {"model.x.weight": "../secret.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="plain name"):
        Checkpoint.open(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
tensor_like = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F64", "I8", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 5) | st.integers(), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 64) | st.integers(), max_size=3) | json_values,
    }
)


@settings(max_examples=300)
@given(
    header=st.binary(max_size=200)
    | st.dictionaries(st.text(max_size=6), tensor_like | json_values, max_size=4).map(
        lambda d: json.dumps(d).encode()
    ),
    length=st.none() | st.integers(0, (1 << 64) - 1),
    data=st.binary(max_size=64),
)
def test_any_bytes_are_read_or_refused(tmp_path_factory, header, length, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    raw_safetensors(path, header, data, length)
    try:
        entries = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert (
            sum(entry.nbytes for entry in entries)
            + min((entry.offset for entry in entries), default=path.stat().st_size)
            == path.stat().st_size
        )
