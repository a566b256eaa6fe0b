"""A Gemma 3 mmproj GGUF gives the encoder its checkpoint gives; and each refusal."""

from __future__ import annotations

import numpy as np
import pytest
import seeing

from edge_gemma.benchmarks.dev.mtmd import write_mmproj
from edge_gemma.bundles.gguf import read_header
from edge_gemma.convert.mmproj import Mmproj, vision_from_mmproj
from edge_gemma.convert.vision import write_vision_encoder
from edge_gemma.engines.onnx.runtime import open_onnx
from edge_gemma.errors import BundleError, UnsupportedModel

FC1 = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
NORM = "model.multi_modal_projector.mm_soft_emb_norm.weight"


@pytest.fixture(scope="module")
def mmproj(siglip_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("mmproj") / "mmproj.gguf"
    write_mmproj(siglip_checkpoint, path, "f32")
    return path


def soft_tokens(folder) -> np.ndarray:
    pixels = seeing.squeezed(seeing.picture(6), 224, 0.5, 0.5)
    return open_onnx(folder / "vision_encoder.onnx", n_threads=2, in_place=True).run(
        None, {"pixels": pixels}
    )[0]


def test_mmproj_equals_the_checkpoint(mmproj, siglip_checkpoint, tmp_path):
    part = vision_from_mmproj(mmproj, tmp_path, "f32")
    (tmp_path / "checkpoint").mkdir()
    assert part == write_vision_encoder(siglip_checkpoint, tmp_path / "checkpoint", "f32")
    np.testing.assert_allclose(
        soft_tokens(tmp_path), soft_tokens(tmp_path / "checkpoint"), atol=1e-5
    )
    np.testing.assert_allclose(soft_tokens(tmp_path), seeing.reference("g3mm")["soft_6"], atol=1e-4)


def test_slices_are_rows_of_the_whole(mmproj, siglip_checkpoint):
    tensors = Mmproj(mmproj)
    for name in ("model.vision_tower.post_layernorm.bias", FC1, NORM):
        whole = tensors.read(name)
        np.testing.assert_array_equal(whole, siglip_checkpoint.read(name))
        np.testing.assert_array_equal(tensors.read(name, slice(3, 9)), whole[3:9])
        assert whole.shape == tensors.shape(name)


def test_half_precision_mmproj(siglip_checkpoint, tmp_path):
    write_mmproj(siglip_checkpoint, tmp_path / "half.gguf", "f16")
    vision_from_mmproj(tmp_path / "half.gguf", tmp_path, "f32")
    np.testing.assert_allclose(soft_tokens(tmp_path), seeing.reference("g3mm")["soft_6"], atol=2e-3)


def test_old_files_with_swapped_names(mmproj, siglip_checkpoint, tmp_path):
    class Swapped:
        config = siglip_checkpoint.config

        def names(self):
            return [
                name.replace("fc1", "fc_").replace("fc2", "fc1").replace("fc_", "fc2")
                for name in siglip_checkpoint.names()
            ]

        def read(self, name):
            return siglip_checkpoint.read(
                name.replace("fc1", "fc_").replace("fc2", "fc1").replace("fc_", "fc2")
            )

    write_mmproj(Swapped(), tmp_path / "old.gguf", "f32")
    assert (
        read_header(tmp_path / "old.gguf").tensor("v.blk.0.ffn_up.weight").shape
        != read_header(mmproj).tensor("v.blk.0.ffn_up.weight").shape
    )
    vision_from_mmproj(tmp_path / "old.gguf", tmp_path, "f32")
    np.testing.assert_allclose(soft_tokens(tmp_path), seeing.reference("g3mm")["soft_6"], atol=1e-4)


def test_refusals(mmproj, tmp_path, sample_gguf):
    with pytest.raises(UnsupportedModel, match="holds the architecture 'gemma3'; a vision file"):
        Mmproj(sample_gguf)
    data = mmproj.read_bytes()
    (tmp_path / "other.gguf").write_bytes(
        data.replace(
            b"\x06\x00\x00\x00\x00\x00\x00\x00gemma3", b"\x06\x00\x00\x00\x00\x00\x00\x00pixtrl", 1
        )
    )
    with pytest.raises(
        UnsupportedModel, match="a projector of kind 'pixtrl'; 'gemma3' is what is supported"
    ):
        Mmproj(tmp_path / "other.gguf")
    (tmp_path / "short.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match="short.gguf"):
        Mmproj(tmp_path / "short.gguf")
    (tmp_path / "renamed.gguf").write_bytes(
        data.replace(b"mm.soft_emb_norm.weight", b"mm.soft_emb_norn.weight")
    )
    with pytest.raises(BundleError, match="lacks the tensor for .*mm_soft_emb_norm.weight"):
        vision_from_mmproj(tmp_path / "renamed.gguf", tmp_path, "f32")


def test_gemma3n_mmproj_is_sent_to_the_checkpoint(tmp_path):
    checkpoint = seeing.tower_checkpoint("mnv5", tmp_path / "checkpoint")
    checkpoint.config["text_config"] = {"hidden_size": 64}
    write_mmproj(checkpoint, tmp_path / "mnv5.gguf")
    with pytest.raises(
        UnsupportedModel, match="of kind 'gemma3nv'; .*converted from the checkpoint"
    ):
        Mmproj(tmp_path / "mnv5.gguf")
