"""Both vision towers against transformers and timm, at every precision and input size; and what the
converter refuses.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import seeing
from checkpoints import REFERENCE, write_checkpoint

from edge_gemma.bundles.folder import Bundle, file_entry
from edge_gemma.bundles.manifest import encode_manifest
from edge_gemma.convert.checkpoint import Checkpoint
from edge_gemma.convert.vision import write_vision_encoder
from edge_gemma.errors import (
    BundleError,
    CheckpointError,
    RuntimeFailure,
    UnsupportedModel,
    UsageError,
)
from edge_gemma.seeing.encoder import ImageEncoder
from edge_gemma.seeing.picture import Picture


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean() / expected.var()))


def encode(bundle: Bundle, pixels: np.ndarray, size: int | None = None) -> np.ndarray:
    part = bundle.manifest.vision
    with ImageEncoder(bundle, size=size) as encoder:
        return encoder.encode(Picture(pixels).array(encoder.size, part.mean, part.std))


@pytest.fixture(scope="module")
def mnv5(tmp_path_factory):
    return seeing.tower_checkpoint("mnv5", tmp_path_factory.mktemp("mnv5"))


def test_siglip_equals_transformers(seeing_bundle):
    answers = seeing.reference("g3mm")
    for seed in (6, 7):
        found = encode(Bundle.open(seeing_bundle), seeing.picture(seed))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, answers[f"soft_{seed}"], atol=1e-4)  # measured: 2e-6


@pytest.mark.parametrize("size", [768, 512, 256])
def test_mobilenet_of_narrow_blocks_equals_timm(mnv5, tmp_path, size):
    bundle = seeing.encoder_bundle(mnv5, tmp_path / "bundle")
    assert bundle.manifest.vision.image_sizes[0] == 768
    np.testing.assert_allclose(
        encode(bundle, seeing.picture(5), size), seeing.reference("mnv5")[f"soft_{size}"], atol=1e-4
    )


@pytest.mark.parametrize(("precision", "limit"), [("f16", 2e-3), ("int8", 6e-2)])
def test_smaller_precisions_stay_near(siglip_checkpoint, mnv5, tmp_path, precision, limit):
    siglip, mobilenet = (
        seeing.encoder_bundle(checkpoint, tmp_path / name, precision)
        for name, checkpoint in (("siglip", siglip_checkpoint), ("mobilenet", mnv5))
    )
    assert (
        relative_rms(encode(siglip, seeing.picture(6)), seeing.reference("g3mm")["soft_6"]) < limit
    )
    assert (
        relative_rms(
            encode(mobilenet, seeing.picture(5), 256), seeing.reference("mnv5")["soft_256"]
        )
        < limit
    )
    full = seeing.encoder_bundle(siglip_checkpoint, tmp_path / "full")
    assert (
        siglip.manifest.vision.weights_bytes
        < (0.55 if precision == "f16" else 0.45) * full.manifest.vision.weights_bytes
    )


def test_one_kind_of_layer_can_be_quantized_alone(siglip_checkpoint, tmp_path):
    sizes = {}
    for name, only in (("none", "no such layer"), ("mlp", r"mlp\.fc"), ("all", None)):
        (tmp_path / name).mkdir()
        sizes[name] = write_vision_encoder(
            siglip_checkpoint, tmp_path / name, "int8", only=only
        ).weights_bytes
    (tmp_path / "f32").mkdir()
    assert (
        sizes["all"]
        < sizes["mlp"]
        < sizes["none"]
        == write_vision_encoder(siglip_checkpoint, tmp_path / "f32", "f32").weights_bytes
    )


def test_the_first_stages_of_mobilenet_are_never_in_8_bits(mnv5, tmp_path):
    sizes = {}
    for name, only in (("as converted", None), ("all", "")):
        (tmp_path / name).mkdir()
        sizes[name] = write_vision_encoder(mnv5, tmp_path / name, "int8", only=only).weights_bytes
    assert sizes["as converted"] > sizes["all"]


def test_manifest_entry_is_true(seeing_bundle, mnv5, tmp_path):
    bundle = Bundle.open(seeing_bundle)
    part = bundle.manifest.vision
    assert (part.kind, part.n_embd, part.n_soft_tokens, part.image_sizes, part.mean, part.std) == (
        "siglip",
        256,
        16,
        (224,),
        0.5,
        0.5,
    )
    assert set(bundle.manifest.files) == {
        "decoder.gguf",
        "vision_encoder.onnx",
        "vision_encoder.onnx.data",
    }
    assert part.weights_bytes <= bundle.total_bytes() < part.weights_bytes + (4 << 20)
    assert set(part.activation_bytes) == {"224"} and part.activation_bytes["224"] > 1 << 20
    other = seeing.encoder_bundle(mnv5, tmp_path / "mnv5").manifest.vision
    assert (other.kind, other.n_soft_tokens, other.image_sizes, other.mean, other.std) == (
        "mobilenetv5",
        256,
        (768, 512, 256),
        0.0,
        1.0,
    )
    assert list(other.activation_bytes) == ["768", "512", "256"]
    assert (
        other.activation_bytes["768"]
        > other.activation_bytes["512"]
        > other.activation_bytes["256"]
    )


def test_writing_is_deterministic(siglip_checkpoint, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_vision_encoder(siglip_checkpoint, tmp_path / name, "f16")
    for file in ("vision_encoder.onnx", "vision_encoder.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.slow
def test_the_whole_mobilenet_equals_timm(tmp_path):
    """332 million parameters: about a minute on two cores."""
    bundle = seeing.encoder_bundle(
        seeing.tower_checkpoint("g3n", tmp_path / "checkpoint"), tmp_path / "bundle"
    )
    answers = seeing.reference("g3n")
    for seed in (5, 8):
        np.testing.assert_allclose(
            encode(bundle, seeing.picture(seed)), answers[f"soft_{seed}"], atol=1e-3
        )  # measured: 4e-6


# ---- refusals


def test_bad_precision_and_size(siglip_checkpoint, seeing_bundle, tmp_path):
    with pytest.raises(
        UsageError,
        match="unknown precision 'int4' for a vision encoder; choose one of f32, f16, int8, or "
        "none",
    ):
        write_vision_encoder(siglip_checkpoint, tmp_path, "int4")
    with pytest.raises(
        UsageError, match="pictures of 768 px were asked for; this encoder takes 224"
    ):
        ImageEncoder(Bundle.open(seeing_bundle), size=768)


def test_checkpoints_that_cannot_see(tiny_checkpoint, siglip_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="has no vision_config"):
        write_vision_encoder(Checkpoint.open(tiny_checkpoint), tmp_path, "f32")
    empty = Checkpoint(tmp_path, siglip_checkpoint.config, [])
    with pytest.raises(CheckpointError, match="neither SigLIP nor MobileNetV5 tensors"):
        write_vision_encoder(empty, tmp_path, "f32")
    recipe = json.loads((REFERENCE / "g3mm.json").read_text())
    recipe["config"]["vision_config"]["hidden_act"] = "relu"
    other = Checkpoint.open(
        write_checkpoint(
            recipe, tmp_path / "relu", keep=lambda name: "vision" in name or "multi_modal" in name
        )
    )
    with pytest.raises(CheckpointError, match="not supported: hidden_act relu"):
        write_vision_encoder(other, tmp_path, "f32")
    recipe["config"]["vision_config"] |= {"hidden_act": "gelu_pytorch_tanh", "image_size": 448}
    other = Checkpoint.open(
        write_checkpoint(
            recipe, tmp_path / "448", keep=lambda name: "vision" in name or "multi_modal" in name
        )
    )
    with pytest.raises(
        CheckpointError,
        match="position table has 256 rows; 448 px in patches of 14 px need 1024",
    ):
        write_vision_encoder(other, tmp_path, "f32")


def test_missing_tensor_and_other_architecture(mnv5, tmp_path):
    entries = [
        entry
        for name, entry in mnv5.entries.items()
        if not name.endswith("blocks.3.1.attn.value.proj.weight")
    ]
    with pytest.raises(
        CheckpointError, match="lacks the tensor .*blocks.3.1.attn.value.proj.weight"
    ):
        write_vision_encoder(Checkpoint(mnv5.folder, mnv5.config, entries), tmp_path, "f32")
    config = mnv5.config | {"vision_config": {"architecture": "mobilenetv6"}}
    with pytest.raises(CheckpointError, match="the vision tower is 'mobilenetv6'"):
        write_vision_encoder(
            Checkpoint(mnv5.folder, config, mnv5.entries.values()), tmp_path, "f32"
        )


def test_bundles_that_cannot_see_or_are_not_what_they_say(seeing_bundle, encoder_bundle, tmp_path):
    with pytest.raises(UnsupportedModel, match="has no vision encoder, so it cannot see"):
        ImageEncoder(Bundle.open(encoder_bundle))
    other = Bundle.open(seeing_bundle)
    for name in other.manifest.files:
        (tmp_path / name).write_bytes((seeing_bundle / name).read_bytes())
    (tmp_path / "vision_encoder.onnx").write_bytes(b"not a graph")
    files = {name: file_entry(tmp_path / name) for name in other.manifest.files}
    import msgspec

    (tmp_path / "manifest.json").write_bytes(
        encode_manifest(msgspec.structs.replace(other.manifest, files=files))
    )
    with pytest.raises(BundleError, match="onnxruntime cannot open"):
        ImageEncoder(Bundle.open(tmp_path))
    part = msgspec.structs.replace(other.manifest.vision, n_soft_tokens=64)
    (tmp_path / "vision_encoder.onnx").write_bytes(
        (seeing_bundle / "vision_encoder.onnx").read_bytes()
    )
    files = {name: file_entry(tmp_path / name) for name in other.manifest.files}
    (tmp_path / "manifest.json").write_bytes(
        encode_manifest(msgspec.structs.replace(other.manifest, files=files, vision=part))
    )
    with pytest.raises(BundleError, match="is not the vision encoder its manifest describes"):
        ImageEncoder(Bundle.open(tmp_path))


def test_closed(seeing_bundle):
    encoder = ImageEncoder(Bundle.open(seeing_bundle))
    encoder.close()
    with pytest.raises(RuntimeFailure, match="was closed"):
        encoder.encode(np.zeros((1, 3, 224, 224), np.float32))
    with (
        ImageEncoder(Bundle.open(seeing_bundle)) as encoder,
        pytest.raises(RuntimeFailure, match="onnxruntime failed while running"),
    ):
        encoder.encode(np.zeros((1, 3, 100, 100), np.float32))
