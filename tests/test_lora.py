"""PEFT adapters: merged and applied at run time they say the same, and what llama.cpp would not
apply is refused by name.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from checkpoints import recipe, values, write_checkpoint, write_safetensors

from edge_gemma.convert.gemma import read_dims
from edge_gemma.convert.lora import convert_lora, read_adapter
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.engines.llama import decoder as decode
from edge_gemma.errors import CheckpointError, UnsupportedModel, UsageError
from edge_gemma.plan.records import Settings
from edge_gemma.spans import Tokens

IDS = tuple(range(2, 60))
PEFT = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 12,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
}


def write_adapter(folder, modules: dict[str, tuple[int, int]], *, rank=4, **changes):
    """``modules``: name → (out, in)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    tensors = []
    for module, (out, columns) in modules.items():
        tensors.append(
            (
                f"base_model.model.{module}.lora_A.weight",
                0.2 * rng.standard_normal((rank, columns), dtype=np.float32),
            )
        )
        tensors.append(
            (
                f"base_model.model.{module}.lora_B.weight",
                0.2 * rng.standard_normal((out, rank), dtype=np.float32),
            )
        )
    write_safetensors(folder / "adapter_model.safetensors", tensors, "F32")
    (folder / "adapter_config.json").write_text(json.dumps(PEFT | changes))
    return folder, dict(tensors)


def logits(path, lora=()):
    decoder = decode.Decoder(
        path, Settings(n_ctx=128, n_ubatch=128, n_threads=1, repack=False), lora=lora
    )
    try:
        return np.concatenate(list(decoder.context(n_outputs=128).evaluate([Tokens(IDS)])))
    finally:
        decoder.close()


MODULES = {
    "model.layers.1.self_attn.q_proj": (256, 256),
    "model.layers.4.mlp.down_proj": (256, 768),
}
F32 = dict(quant="f32", verify=False)


@pytest.mark.parametrize(
    "changes, scale",
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6.0),
        ({"alpha_pattern": {"q_proj": 4, "layers.4.mlp.down_proj": 4}}, 1.0),
    ],
)
def test_merged_equals_run_time_equals_the_formula(tiny_checkpoint, tmp_path, changes, scale):
    adapter, tensors = write_adapter(tmp_path / "adapter", MODULES, **changes)
    merged = convert(
        tiny_checkpoint, tmp_path / "merged", Conversion(**F32, merge=((adapter, 1.0),))
    ).bundle
    plain = convert(tiny_checkpoint, tmp_path / "plain", Conversion(**F32)).bundle
    assert convert_lora(adapter, tiny_checkpoint, tmp_path / "adapter.gguf") == []
    by_merge, by_adapter, without = (
        logits(merged.decoder_path),
        logits(plain.decoder_path, [(tmp_path / "adapter.gguf", 1.0)]),
        logits(plain.decoder_path),
    )
    assert np.abs(by_merge - without).max() > 0.5
    np.testing.assert_allclose(by_adapter, by_merge, atol=5e-3)
    data = recipe("g3text")
    weight = values("model.layers.1.self_attn.q_proj.weight", (256, 256), data["seed"], "gemma3")
    a, b = (
        tensors[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{x}.weight"] for x in "AB"
    )
    from checkpoints import bf16

    from edge_gemma.bundles.gguf import read_header

    tensor = read_header(merged.decoder_path).tensor("blk.1.attn_q.weight")
    written = np.frombuffer(
        merged.decoder_path.read_bytes(), np.float32, 256 * 256, tensor.offset
    ).reshape(256, 256)
    np.testing.assert_allclose(written, bf16(weight) + scale * b @ a, atol=1e-5)
    assert merged.manifest.recipe["merged"] == "adapter × 1"


def test_half_the_scale_is_half_the_change(tiny_checkpoint, tmp_path):
    adapter, _ = write_adapter(tmp_path / "adapter", MODULES)
    half = convert(
        tiny_checkpoint, tmp_path / "half", Conversion(**F32, merge=((adapter, 0.5),))
    ).bundle
    plain = convert(tiny_checkpoint, tmp_path / "plain", Conversion(**F32)).bundle
    convert_lora(adapter, tiny_checkpoint, tmp_path / "adapter.gguf")
    np.testing.assert_allclose(
        logits(plain.decoder_path, [(tmp_path / "adapter.gguf", 0.5)]),
        logits(half.decoder_path),
        atol=5e-3,
    )


def test_gemma_3n_targets(tmp_path):
    base = write_checkpoint("g3n", tmp_path / "g3n", keep=lambda name: "_tower" not in name)
    prefix = "model.language_model.layers"
    good = {
        f"{prefix}.2.laurel.linear_left": (64, 256),
        f"{prefix}.3.per_layer_projection": (256, 256),
        f"{prefix}.25.self_attn.k_proj": (128, 256),
    }
    notes = convert_lora(write_adapter(tmp_path / "good", good)[0], base, tmp_path / "good.gguf")
    assert notes == [
        "layers.25.self_attn.k_proj: a layer that shares its KV never computes this; left out"
    ]
    plain = convert(base, tmp_path / "plain", Conversion(**F32, audio="none", vision="none")).bundle
    merged = convert(
        base,
        tmp_path / "merged",
        Conversion(**F32, audio="none", vision="none", merge=((tmp_path / "good", 1.0),)),
    ).bundle
    np.testing.assert_allclose(
        logits(plain.decoder_path, [(tmp_path / "good.gguf", 1.0)]),
        logits(merged.decoder_path),
        atol=2e-2,
    )
    for module in (
        "per_layer_model_projection",
        "altup_projections.0",
        "altup_unembed_projections.1",
        "embed_tokens_per_layer",
        "embed_tokens",
    ):
        adapter, _ = write_adapter(tmp_path / "bad", {f"model.language_model.{module}": (256, 256)})
        with pytest.raises(
            UnsupportedModel,
            match=f"adapts 'model.language_model.{module}', which llama.cpp would not apply",
        ):
            convert_lora(adapter, base, tmp_path / "bad.gguf")
    adapter, _ = write_adapter(tmp_path / "bad", {f"{prefix}.0.altup.modality_router": (4, 256)})
    with pytest.raises(UnsupportedModel, match="altup.modality_router"):
        convert_lora(adapter, base, tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"peft_type": "PREFIX_TUNING"}, UnsupportedModel, "PREFIX_TUNING adapter"),
        ({"use_dora": True}, UnsupportedModel, "use_dora is True"),
        ({"bias": "all"}, UnsupportedModel, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedModel, r"modules_to_save is \['lm_head'\]"),
    ],
)
def test_more_than_plain_lora_is_refused(tiny_checkpoint, tmp_path, changes, error, message):
    adapter, _ = write_adapter(tmp_path / "adapter", MODULES, **changes)
    with pytest.raises(error, match=message):
        convert_lora(adapter, tiny_checkpoint, tmp_path / "out.gguf")


def test_broken_adapters_are_refused(tiny_checkpoint, tmp_path):
    dims = read_dims(recipe("g3text")["config"])
    with pytest.raises(CheckpointError, match="no adapter_config.json"):
        read_adapter(tmp_path, dims)
    adapter, _ = write_adapter(tmp_path / "shape", {"model.layers.0.self_attn.q_proj": (256, 128)})
    with pytest.raises(
        CheckpointError, match=r"A \[4, 128\] and B \[256, 4\]; the base's weight is \[256, 256\]"
    ):
        read_adapter(adapter, dims)
    adapter, _ = write_adapter(tmp_path / "layer", {"model.layers.7.self_attn.q_proj": (256, 256)})
    with pytest.raises(UnsupportedModel, match="layers.7.self_attn.q_proj"):
        read_adapter(adapter, dims)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle and is never opened"):
        read_adapter(adapter, dims)
    write_safetensors(
        adapter / "adapter_model.safetensors",
        [
            (
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
                np.zeros((4, 256), np.float32),
            )
        ],
    )
    with pytest.raises(CheckpointError, match="has only lora_A"):
        read_adapter(adapter, dims)
    write_safetensors(
        adapter / "adapter_model.safetensors",
        [
            ("base_model.model.model.embed_tokens.lora_embedding_A", np.zeros((4, 768), "f4")),
            ("base_model.model.model.embed_tokens.lora_embedding_B", np.zeros((256, 4), "f4")),
        ],
    )
    with pytest.raises(UnsupportedModel, match="lora_embedding_A' is not a low-rank pair"):
        read_adapter(adapter, dims)
    (tmp_path / "there.gguf").touch()
    with pytest.raises(UsageError, match="exists"):
        convert_lora(adapter, tiny_checkpoint, tmp_path / "there.gguf")
