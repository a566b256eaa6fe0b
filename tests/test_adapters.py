"""What PEFT saves besides plain LoRA: pattern keys in every spelling, DoRA, embeddings, heads,
towers, whole modules. Merged as PEFT's own formulas say, or refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import bf16, recipe, values, write_checkpoint, write_safetensors
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.convert.adapter import matching_pattern, open_adapter
from edge_gemma.convert.checkpoint import HEAD, Checkpoint
from edge_gemma.convert.gemma import EMBEDDING, PREFIX, read_dims
from edge_gemma.convert.lora import Merged, convert_lora, read_adapter
from edge_gemma.convert.pipeline import Conversion, convert, prepare
from edge_gemma.errors import CheckpointError, EdgeGemmaError, UnsupportedModel

Q_PROJ = f"{PREFIX}layers.1.self_attn.q_proj.weight"
F32 = Conversion(quant="f32", verify=False)


def compat(what: str, happens: str) -> pytest.MarkDecorator:
    return pytest.mark.compat(kind="adapter", what=what, happens=happens)


def drawn(name: str, *shape: int) -> np.ndarray:
    seed = sum(name.encode())
    return 0.1 * np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def pair(module: str, out: int, columns: int, rank: int = 4) -> dict[str, np.ndarray]:
    """lora_A and lora_B of a linear layer, as PEFT names them."""
    name = f"base_model.model.{module}"
    return {
        f"{name}.lora_A.weight": drawn(f"{module}A", rank, columns),
        f"{name}.lora_B.weight": drawn(f"{module}B", out, rank),
    }


def write(folder: Path, tensors: dict[str, np.ndarray], **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    write_safetensors(folder / "adapter_model.safetensors", tensors.items(), "F32")
    return folder


def merged(checkpoint: Path, adapter: Path, scale: float = 1.0) -> tuple[Merged, Checkpoint]:
    base = Checkpoint.open(checkpoint)
    return Merged(base, read_dims(base.config), ((adapter, scale),)), base


# --- alpha_pattern and rank_pattern ---

# how a module is called by the transformers that trained it
SPELLINGS = ("model.layers.1", "language_model.model.layers.1", "model.language_model.layers.1")
KEYS = {
    "q_proj": True,
    "self_attn.q_proj": True,
    "{full}.self_attn.q_proj": True,
    "^{full}.self_attn.q_proj$": True,
    "layers.1.self_attn.q_proj": True,
    r".*\.1\..*q_proj": True,
    "layers.[01].self_attn.(q|k)_proj": True,
    "_proj": False,
    "layers.1": False,
    "^layers.1.self_attn.q_proj": False,
    "proj": False,
    "k_proj": False,
    "layers.11.self_attn.q_proj": False,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "key, applies",
    [
        pytest.param(
            key,
            applies,
            marks=compat(
                f"alpha_pattern and rank_pattern with the key `{key.format(full=SPELLINGS[0])}`",
                "the pattern's" if applies else "the default, as PEFT does; said",
            ),
        )
        for key, applies in KEYS.items()
    ],
)
def test_a_pattern_applies_where_peft_applies_it(tmp_path, spelling, key, applies):
    key = key.format(full=spelling)
    module = f"{spelling}.self_attn.q_proj"
    folder = write(tmp_path, pair(module, 256, 256), alpha_pattern={key: 40})
    adapter = open_adapter(folder)
    assert adapter.pairs[0].scale == (10.0 if applies else 2.0)
    assert adapter.pairs[0].module == f"{PREFIX}layers.1.self_attn.q_proj"
    said = [f"alpha_pattern {key!r} matches no module of the adapter; PEFT ignores it too"]
    assert list(adapter.notes) == ([] if applies else said)
    ranked = write(tmp_path, pair(module, 256, 256, rank=2), rank_pattern={key: 2}, r=4)
    if applies:
        assert open_adapter(ranked).pairs[0].scale == 4.0
    else:  # PEFT cannot load it either
        with pytest.raises(CheckpointError, match="has rank 2, adapter_config.json says 4"):
            open_adapter(ranked)


parts = st.sampled_from(["model", "layers", "1", "11", "self_attn", "q_proj", "k_proj", "mlp", "x"])
names = st.lists(parts, min_size=1, max_size=6).map(".".join)
keys = st.one_of(
    names,
    names.map(re.escape),
    names.map(lambda name: f"^{name}$"),
    names.map(lambda name: f".*{name}"),
    st.tuples(names, names).map("|".join),
    st.sampled_from(["(q|k)_proj", r"layers\.\d+\.\w+", ".*", "", "q_proj$", r"\d+"]),
)


@given(name=names, patterns=st.lists(keys, max_size=4))
def test_the_rule_for_any_key(name, patterns):
    """PEFT's: the first key that, behind a dot or at the start, matches to the name's end."""
    expected = next(
        (key for key in patterns if re.match(rf"(.*\.)?({key})$", name)),
        None,
    )
    assert matching_pattern(patterns, name) == expected


@given(name=names, patterns=st.lists(keys, max_size=4))
def test_the_rule_is_pefts(name, patterns):
    other = pytest.importorskip("peft.utils.other", reason="peft is not installed")
    found = matching_pattern(patterns, name)
    # PEFT gives the name itself where no key matches
    assert (name if found is None else found) == other.get_pattern_key(patterns, name)


def test_a_pattern_that_is_no_expression_is_refused(tmp_path):
    module = pair("model.layers.1.self_attn.q_proj", 256, 256)
    with pytest.raises(CheckpointError, match=r"pattern '\[' is no regular expression"):
        open_adapter(write(tmp_path, module, alpha_pattern={"[": 4}))
    with pytest.raises(CheckpointError, match="the alpha_pattern.'q_proj'. of .* is 'much'"):
        open_adapter(write(tmp_path, module, alpha_pattern={"q_proj": "much"}))
    with pytest.raises(CheckpointError, match="alpha_pattern is .'q_proj'.; expected an object"):
        open_adapter(write(tmp_path, module, alpha_pattern=["q_proj"]))


# --- merged by PEFT's formulas ---


@compat(
    "DoRA", "folded by --merge; refused for --lora, where llama.cpp would leave the lengths out"
)
def test_dora(tiny_checkpoint, tmp_path):
    module = "model.layers.1.self_attn.q_proj"
    tensors = pair(module, 256, 256)
    magnitude = 1 + np.abs(drawn("m", 256))
    name = f"base_model.model.{module}.lora_magnitude_vector"
    adapter = write(tmp_path / "a", {**tensors, name: magnitude}, use_dora=True)
    changed, base = merged(tiny_checkpoint, adapter)
    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
    moved = base.read(Q_PROJ) + 2.0 * b @ a
    expected = magnitude[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(changed.read(Q_PROJ), expected, atol=1e-6)
    np.testing.assert_allclose(changed.read(Q_PROJ, slice(7, 90)), expected[7:90], atol=1e-6)
    with pytest.raises(UnsupportedModel, match="use_dora is True; only plain LoRA"):
        convert_lora(adapter, tiny_checkpoint, tmp_path / "a.gguf")
    with pytest.raises(UnsupportedModel, match="q_proj' with DoRA at scale 0.5; only the whole"):
        merged(tiny_checkpoint, adapter, 0.5)
    with pytest.raises(UnsupportedModel, match="several adapters change .* one of them is DoRA"):
        other = write(tmp_path / "b", tensors)
        Merged(base, read_dims(base.config), ((adapter, 1.0), (other, 1.0)))
    halved = write(tmp_path / "c", tensors, use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora is True, but .* has no magnitude vector"):
        merged(tiny_checkpoint, halved)


def embedding_pair(rank: int = 4) -> dict[str, np.ndarray]:
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    return {f"{name}A": drawn("A", rank, 768), f"{name}B": drawn("B", 256, rank)}


HEAD_NOTE = "so the output head is no longer the token embedding"


@compat("LoRA on the token embedding", "folded by --merge, the head apart; refused for --lora")
def test_lora_on_the_embedding_leaves_the_head(tiny_checkpoint, tmp_path):
    tensors = embedding_pair()
    # PEFT stores the embedding that it began from as well
    seed = recipe("g3text")["seed"]
    base_rows = bf16(values("model.embed_tokens.weight", (768, 256), seed, "gemma3"))
    saved = {"base_model.model.model.embed_tokens.base_layer.weight": base_rows}
    adapter = write(tmp_path / "a", tensors | saved)
    changed, base = merged(tiny_checkpoint, adapter)
    a, b = tensors.values()
    np.testing.assert_allclose(changed.read(EMBEDDING), base_rows + 2.0 * (b @ a).T, atol=1e-6)
    rows = slice(700, 768)
    np.testing.assert_allclose(changed.read(EMBEDDING, rows), changed.read(EMBEDDING)[rows])
    np.testing.assert_array_equal(changed.read(HEAD), base_rows)
    assert changed.separate_head and HEAD in changed.names() and HEAD_NOTE in changed.notes[0]
    result = convert(
        tiny_checkpoint, tmp_path / "out", Conversion(**vars(F32) | {"merge": ((adapter, 1.0),)})
    )
    assert not result.bundle.manifest.decoder.tied_head
    assert HEAD_NOTE in result.notes[0]
    with pytest.raises(UnsupportedModel, match="'model.language_model.embed_tokens.lora_embedd"):
        convert_lora(adapter, tiny_checkpoint, tmp_path / "a.gguf")
    tied = write(tmp_path / "tied", tensors, ensure_weight_tying=True)
    assert not merged(tiny_checkpoint, tied)[0].separate_head


@compat("LoRA on lm_head", "folded by --merge into a head of its own; refused for --lora")
def test_lora_on_the_head_leaves_the_embedding(tiny_checkpoint, tmp_path):
    tensors = pair("lm_head", 768, 256)
    adapter = write(tmp_path / "a", tensors)
    changed, base = merged(tiny_checkpoint, adapter)
    a, b = tensors.values()
    np.testing.assert_allclose(changed.read(HEAD), base.read(EMBEDDING) + 2.0 * b @ a, atol=1e-6)
    np.testing.assert_array_equal(changed.read(EMBEDDING), base.read(EMBEDDING))
    assert changed.separate_head and "changes lm_head," in changed.notes[0]
    with pytest.raises(UnsupportedModel, match="adapts 'lm_head'.* --merge folds others"):
        convert_lora(adapter, tiny_checkpoint, tmp_path / "a.gguf")


@compat("modules_to_save", "whole modules replace the base's with --merge; refused for --lora")
@pytest.mark.parametrize("inner", ["", ".modules_to_save", ".modules_to_save.default"])
def test_modules_to_save(tiny_checkpoint, tmp_path, inner):
    norm, head = drawn("norm", 256), drawn("head", 768, 256)
    saved = {
        f"base_model.model.model.norm{inner}.weight": norm,
        f"base_model.model.lm_head{inner}.weight": head,
    }
    adapter = write(
        tmp_path / "a",
        saved | pair("model.layers.1.self_attn.q_proj", 256, 256),
        modules_to_save=["norm", "lm_head"],
    )
    changed, base = merged(tiny_checkpoint, adapter)
    np.testing.assert_array_equal(changed.read(f"{PREFIX}norm.weight"), norm)
    np.testing.assert_array_equal(changed.read(HEAD, slice(3, 9)), head[3:9])
    assert changed.separate_head
    half, _ = merged(tiny_checkpoint, adapter, 0.5)
    middle = (norm + base.read(f"{PREFIX}norm.weight")) / 2
    np.testing.assert_allclose(half.read(f"{PREFIX}norm.weight"), middle, atol=1e-6)
    with pytest.raises(UnsupportedModel, match=r"modules_to_save is \['norm', 'lm_head'\]"):
        convert_lora(adapter, tiny_checkpoint, tmp_path / "a.gguf")
    # the config may have forgotten what the file holds
    forgotten = write(tmp_path / "b", saved)
    with pytest.raises(UnsupportedModel, match="is not a low-rank pair .*saved module"):
        read_adapter(forgotten, read_dims(base.config))


def test_an_enlarged_vocabulary_is_refused(tiny_checkpoint, tmp_path):
    name = "base_model.model.model.embed_tokens.weight"
    adapter = write(tmp_path, {name: drawn("more", 770, 256)})
    with pytest.raises(CheckpointError, match=r"shape \[770, 256\], .*was the vocabulary enlarged"):
        merged(tiny_checkpoint, adapter)


@compat("LoRA on SigLIP", "folded into the vision encoder by --merge; refused for --lora")
def test_lora_on_the_vision_tower(tmp_path):
    base = write_checkpoint("g3mm", tmp_path / "base")
    module = "model.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj"
    tensors = pair(module, 128, 128)
    adapter = write(tmp_path / "a", tensors)
    changed, checkpoint = merged(base, adapter)
    name = "model.vision_tower.encoder.layers.1.self_attn.q_proj.weight"
    a, b = tensors.values()
    np.testing.assert_allclose(changed.read(name), checkpoint.read(name) + 2 * b @ a, atol=1e-6)
    options = Conversion(quant="q8_0", vision="f32", merge=((adapter, 1.0),))
    result = convert(base, tmp_path / "out", options)
    plain = convert(base, tmp_path / "plain", Conversion(quant="q8_0", vision="f32", verify=False))
    files = [made.bundle.manifest.files for made in (result, plain)]
    data = "vision_encoder.onnx.data"
    assert files[0][data].sha256 != files[1][data].sha256
    assert files[0]["decoder.gguf"].sha256 == files[1]["decoder.gguf"].sha256
    with pytest.raises(UnsupportedModel, match="vision_tower.* llama.cpp would not apply"):
        convert_lora(adapter, base, tmp_path / "a.gguf")


@compat(
    "LoRA on the audio tower, convolutions included", "folded into the audio encoder by --merge"
)
def test_lora_on_the_audio_tower(tmp_path):
    base = write_checkpoint("g3n", tmp_path / "base", keep=lambda name: "vision" not in name)
    tower = "model.audio_tower."
    linear = pair(f"{tower}conformer.0.attention.post", 64, 64)
    conv = f"base_model.model.{tower}subsample_conv_projection.conv_1.conv"
    convolution = {
        f"{conv}.lora_A.weight": drawn("cA", 4, 32, 3, 3),
        f"{conv}.lora_B.weight": drawn("cB", 16, 4, 1, 1),
    }
    projection = pair("model.embed_audio.embedding_projection", 256, 64)
    adapter = write(tmp_path / "a", linear | convolution | projection)
    changed, checkpoint = merged(base, adapter)
    name = f"{tower}subsample_conv_projection.conv_1.conv.weight"
    a, b = convolution.values()
    kernel = np.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    np.testing.assert_allclose(changed.read(name), checkpoint.read(name) + 2 * kernel, atol=1e-6)
    rows = slice(2, 5)
    np.testing.assert_allclose(changed.read(name, rows), changed.read(name)[rows], atol=1e-6)
    out = tmp_path / "out"
    options = Conversion(quant="q8_0", audio="f32", verify=False, merge=((adapter, 1.0),))
    hard = np.load(convert(base, out, options).bundle.folder / "special_rows.npy")
    plain = convert(base, tmp_path / "plain", Conversion(quant="q8_0", verify=False)).bundle
    assert np.abs(hard - np.load(plain.folder / "special_rows.npy")).max() > 0.01
    grouped = f"base_model.model.{tower}conformer.0.lconv1d.depthwise_conv1d"
    taps = {
        f"{grouped}.lora_A.weight": drawn("gA", 4, 64, 5),
        f"{grouped}.lora_B.weight": drawn("gB", 64, 4, 1),
    }
    with pytest.raises(CheckpointError, match=r"base's weight is \[64, 1, 5\]"):
        merged(base, write(tmp_path / "grouped", taps))


def test_3n_key_and_value_that_are_never_computed(tmp_path):
    """transformers 5 does not save them, so an adapter for them changes nothing."""
    base = write_checkpoint(
        "g3n",
        tmp_path / "base",
        keep=lambda name: "_tower" not in name and not re.search(r"\.2\d\.self_attn\.[kv]_", name),
    )
    adapter = write(
        tmp_path / "a", pair("model.language_model.layers.25.self_attn.k_proj", 128, 256)
    )
    changed, _ = merged(base, adapter)
    assert "layers.25.self_attn.k_proj: a layer that shares its KV" in changed.notes[0]


@compat("rsLoRA", "alpha / √r, folded and at run time")
def test_rslora_with_patterns(tmp_path):
    folder = write(
        tmp_path,
        pair("model.layers.0.mlp.up_proj", 768, 256, rank=9),
        use_rslora=True,
        rank_pattern={"up_proj": 9},
        alpha_pattern={"up_proj": 6},
    )
    assert open_adapter(folder).pairs[0].scale == 2.0


# --- refused by name ---

MODULE = "base_model.model.model.layers.1.self_attn.q_proj"
PAIR = pair("model.layers.1.self_attn.q_proj", 256, 256)


def refused(
    what: str, message: str, extra: dict[str, np.ndarray] | None = None, **config: object
) -> object:
    mark = compat(what, "refused by name, with the way out")
    return pytest.param(config, extra or {}, message, id=what, marks=mark)


@pytest.mark.parametrize(
    "config, extra, message",
    [
        refused("a bias on lora_B", "lora_bias is True", lora_bias=True),
        refused(
            "a bias on lora_B that the config does not name",
            "q_proj.lora_B.bias' is no part of a low-rank pair",
            {f"{MODULE}.lora_B.bias": drawn("bias", 256)},
        ),
        refused(
            "trainable_token_indices", "trainable_token_indices is .5.", trainable_token_indices=[5]
        ),
        refused("PiSSA, OLoRA, CorDA, LoftQ", "init_lora_weights is 'pissa_niter_4'",
                init_lora_weights="pissa_niter_4"),
        refused("layer_replication", "layer_replication is", layer_replication=[[0, 4], [2, 5]]),
        refused("aLoRA", "alora_invocation_tokens is", alora_invocation_tokens=[1, 2]),
        refused("QALoRA", "use_qalora is True", use_qalora=True),
        refused("target_parameters", "target_parameters is", target_parameters=["experts"]),
        refused("another method (IA3, LoHa, prefix …)", "is a IA3 adapter", peft_type="IA3"),
        refused(
            "a module that the base does not have",
            "adapts 'model.language_model.layers.40.mlp.up_proj', which the base does not have",
            pair("model.layers.40.mlp.up_proj", 768, 256),
        ),
        refused(
            "a saved module that the base does not have",
            "score.weight' is not one that the base has",
            {"base_model.model.score.weight": drawn("score", 2, 256)},
        ),
        refused(
            "parts of a sharded model (ZeRO-3, FSDP)",
            r"has A \[0\] and B \[256, 4\], which make no product",
            {f"{MODULE}.lora_A.weight": np.zeros(0, np.float32)},
        ),
        refused(
            "DoRA on an embedding",
            "has only lora_A, lora_B|DoRA, which can be folded into matrices only",
            embedding_pair()
            | {"base_model.model.model.embed_tokens.lora_magnitude_vector": drawn("m", 1, 256),
               f"{MODULE}.lora_magnitude_vector": drawn("m", 256)},
            use_dora=True,
        ),
    ],
)  # fmt: skip
def test_what_no_merge_can_fold_is_refused(tiny_checkpoint, tmp_path, config, extra, message):
    adapter = write(tmp_path / "a", PAIR | extra, **config)
    with pytest.raises(EdgeGemmaError, match=message):
        merged(tiny_checkpoint, adapter)


@compat("an adapter of mlx-lm", "refused: fuse it first")
def test_an_mlx_adapter_is_named(tiny_checkpoint, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    with pytest.raises(UnsupportedModel, match="adapter of mlx-lm, not of PEFT; fuse it first"):
        merged(tiny_checkpoint, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    write_safetensors(tmp_path / "adapters.safetensors", PAIR.items())
    with pytest.raises(UnsupportedModel, match="adapter of mlx-lm"):
        merged(tiny_checkpoint, tmp_path)


WRAPPERS: dict[str, Callable[[str], str]] = {
    "as PEFT saves": lambda name: name,
    "without base_model.model.": lambda name: name.removeprefix("base_model.model."),
    "the adapter's name in the keys": lambda name: name.replace(".weight", ".default.weight"),
    "torch.compile": lambda name: name.replace("model.layers", "_orig_mod.model.layers"),
    "FSDP": lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
}


@pytest.mark.parametrize(
    "rename",
    [
        pytest.param(rename, id=what, marks=compat(f"names: {what}", "read"))
        for what, rename in WRAPPERS.items()
    ],
)
def test_names_of_every_wrapper(tiny_checkpoint, tmp_path, rename):
    adapter = write(
        tmp_path / "a",
        {rename(name): x for name, x in PAIR.items()},
        alpha_pattern={"^model.layers.1.self_attn.q_proj$": 40},
    )
    changed, base = merged(tiny_checkpoint, adapter)
    a, b = PAIR.values()
    np.testing.assert_allclose(changed.read(Q_PROJ), base.read(Q_PROJ) + 10 * b @ a, atol=1e-5)


def test_notes_reach_the_user(tiny_checkpoint, tmp_path):
    adapter = write(tmp_path / "a", PAIR, alpha_pattern={"v_proj": 40})
    options = Conversion(quant="f32", verify=False, merge=((adapter, 1.0),))
    note = "alpha_pattern 'v_proj' matches no module of the adapter; PEFT ignores it too"
    assert prepare(tiny_checkpoint, options).notes == (note,)
    assert convert_lora(adapter, tiny_checkpoint, tmp_path / "a.gguf") == [note]


# --- against PEFT itself ---


def _randomised(model) -> None:
    """B and magnitudes are drawn: PEFT begins with what changes nothing."""
    import torch

    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_" in name or "modules_to_save" in name:
            drawn_values = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * ("modules" in name) + 0.05 * drawn_values
        elif "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)


PEFT_KINDS = {
    "plain LoRA": dict(target_modules=["q_proj", "down_proj"]),
    "rsLoRA with patterns": dict(
        target_modules=["q_proj", "k_proj", "up_proj"],
        use_rslora=True,
        rank_pattern={"^model.layers.2.self_attn.q_proj$": 9, "layers.3.*k_proj": 3},
        alpha_pattern={"up_proj": 5, "model.layers.[24].self_attn.(q|k)_proj": 11},
    ),
    "DoRA": dict(target_modules=["v_proj", "gate_proj"], use_dora=True),
    "LoRA on the embedding": dict(target_modules=["embed_tokens", "q_proj"]),
    "LoRA on the head": dict(target_modules=["lm_head", "q_proj"]),
    "modules_to_save": dict(target_modules=["o_proj"], modules_to_save=["norm", "lm_head"]),
    "the embedding saved": dict(target_modules=["o_proj"], modules_to_save=["embed_tokens"]),
}
ONLY_MERGED = ("DoRA", "embedding", "head", "modules_to_save")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the training libraries' own
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=compat(f"{kind}, saved by PEFT", "merged: PEFT's own logits"))
        for kind in PEFT_KINDS
    ],
)
def test_merged_is_what_peft_computes(tmp_path, kind):
    for library in ("torch", "transformers", "peft"):
        pytest.importorskip(library, reason="PEFT's own logits need torch, transformers and peft")
    from peft import LoraConfig, get_peft_model
    from peft_models import base_model, logits_here, logits_of_peft
    from replicas import LAYOUTS

    checkpoint, adapter = tmp_path / "base", tmp_path / "adapter"
    LAYOUTS["g270m_it"][2](checkpoint)
    model = get_peft_model(
        base_model(checkpoint), LoraConfig(r=8, lora_alpha=12, **PEFT_KINDS[kind])
    )
    _randomised(model)
    model.save_pretrained(adapter)
    expected, plain = logits_of_peft(checkpoint, adapter), logits_of_peft(checkpoint, None)
    assert np.abs(expected - plain).max() > 0.3
    is_plain = not any(part in kind for part in ONLY_MERGED)
    found = logits_here(checkpoint, adapter, tmp_path, at_run_time=is_plain)
    for logits in found:
        np.testing.assert_allclose(logits, expected, atol=0.01)
