"""Checkpoint → bundle: the decoder answers as transformers does, whatever the checkpoint's age and
packing.
"""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
from checkpoints import REFERENCE, recipe, write_checkpoint

from edge_gemma.bundles.folder import Bundle
from edge_gemma.convert.checkpoint import Checkpoint
from edge_gemma.convert.gemma import map_tensors, read_dims
from edge_gemma.convert.pipeline import Conversion, convert, prepare
from edge_gemma.errors import (
    CheckpointError,
    RuntimeFailure,
    UnsupportedModel,
    UsageError,
)
from edge_gemma.plan.records import Settings

F32 = Conversion(quant="f32", verify=False, audio="none", vision="none")
# Logits against transformers (float32): exact up to summation for gemma3; for gemma3n llama.cpp's
# f16 GELU table and its top-k statistics
TOLERANCE = {"g3text": 0.01, "g3mm": 0.01, "g3n": 0.04}


def no_towers(name: str) -> bool:
    return "_tower" not in name


def logits_of(bundle: Bundle, ids) -> np.ndarray:
    from edge_gemma.engines.llama import decoder as decode
    from edge_gemma.spans import Tokens

    decoder = decode.Decoder(bundle.decoder_path, Settings(n_ctx=512, n_ubatch=512, n_threads=2))
    try:
        context = decoder.context(n_outputs=512)
        return np.concatenate(list(context.evaluate([Tokens(tuple(int(i) for i in ids))])))
    finally:
        decoder.close()


def check_against_reference(name: str, bundle: Bundle) -> None:
    reference = np.load(REFERENCE / f"{name}-text.npz")
    logits = logits_of(bundle, reference["input_ids"])
    expected = reference["logits_last8"]
    assert np.abs(logits[-8:] - expected).max() < TOLERANCE[name]
    first, second = -np.sort(-expected, axis=1)[:, :2].T
    clear = first - second > TOLERANCE[name]  # ties within the tolerance may fall either way
    assert clear.sum() >= 6
    np.testing.assert_array_equal(logits[-8:].argmax(1)[clear], expected.argmax(1)[clear])
    x = logits[:-1].astype(np.float64)
    log_p = (
        x
        - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))
        - x.max(1, keepdims=True)
    )
    nll = -log_p[np.arange(len(x)), reference["input_ids"][1:]].mean()
    assert abs(nll - float(reference["nll"])) < 1e-3


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The F32 bundle of each reference recipe from one plain file with tokenizer.model."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {}
    for name in ("g3text", "g3mm", "g3n"):
        write_checkpoint(name, folder / name, keep=no_towers)
        made[name] = convert(folder / name, folder / f"{name}-f32", F32).bundle
    return made


@pytest.mark.parametrize("name", ["g3text", "g3mm", "g3n"])
def test_f32_decoder_answers_as_transformers(bundles, name):
    check_against_reference(name, bundles[name])


OLD_NAMES = {
    "g3text": lambda name: name.replace("model.", "language_model.model.", 1),
    "g3n": lambda name: (
        name.replace("model.language_model.", "language_model.model.", 1)
        if "language_model" in name
        else name.removeprefix("model.")
    ),
}


@pytest.mark.parametrize("name", ["g3text", "g3n"])
def test_age_shards_and_tokenizer_file_change_no_byte(bundles, name, tmp_path):
    """Old names in three shards with tokenizer.json, KV of the sharing layers left out: the same
    logits; but for what is never read, the same bytes.
    """
    data = recipe(name) | {"copy": ["tokenizer.json"]}
    n_owners = 20
    sharing = [f"layers.{i}.self_attn." for i in range(n_owners, 30)] if name == "g3n" else []
    unread = [layer + module for layer in sharing for module in ("k_proj", "v_proj", "k_norm")]

    def shared(tensor: str) -> bool:
        return any(part in tensor for part in unread)

    folder = write_checkpoint(
        data,
        tmp_path / "old",
        keep=lambda tensor: no_towers(tensor) and not shared(tensor),
        n_shards=3,
    )
    for path in folder.glob("*.safetensors"):
        path.unlink()
    write_renamed(data, folder, name, shared)
    bundle = convert(folder, tmp_path / "out", F32).bundle
    mine, theirs = bundle.manifest.decoder, bundles[name].manifest.decoder
    assert [(t.name, t.type, t.shape, t.use) for t in mine.tensors] == [
        (t.name, t.type, t.shape, t.use) for t in theirs.tensors
    ]
    a, b = bundle.decoder_path.read_bytes(), bundles[name].decoder_path.read_bytes()
    unused = [tensor.name for tensor in mine.tensors if tensor.use == "unused"]
    assert len(unused) == (30 if name == "g3n" else 0)
    for tensor, other in zip(mine.tensors, theirs.tensors, strict=True):
        data = a[tensor.offset : tensor.offset + tensor.nbytes]
        expected = b[other.offset : other.offset + other.nbytes]
        assert data == (bytes(len(data)) if tensor.name in unused else expected), tensor.name
    check_against_reference(name, bundle)


def write_renamed(data, folder, name, shared):
    """The draw of a tensor depends on its name, so the values are drawn first and renamed when
    written.
    """
    from checkpoints import values, write_safetensors

    family = "gemma3n" if name == "g3n" else "gemma3"
    tensors = [
        (t, values(t, tuple(s), data["seed"], family))
        for t, s in data["tensors"].items()
        if no_towers(t) and not shared(t)
    ]
    weight_map = {}
    for k in range(3):
        file = f"model-{k + 1:05d}-of-00003.safetensors"
        part = [(OLD_NAMES[name](t), x) for t, x in tensors[k::3]]
        write_safetensors(folder / file, part)
        weight_map |= {t: file for t, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_manifest_of_gemma_3n(bundles):
    manifest = bundles["g3n"].manifest
    assert manifest.family == "gemma3n" and not manifest.instruct
    uses = {tensor.name: tensor.use for tensor in manifest.decoder.tensors}
    assert uses["per_layer_token_embd.weight"] == "lookup" and uses["token_embd.weight"] == "matmul"
    assert [name for name, use in uses.items() if use == "unused"][
        0
    ] == "blk.20.attn_k.weight" and sum(use == "unused" for use in uses.values()) == 30
    order = [
        {"unused": 0, "lookup": 1, "matmul": 2}[tensor.use] for tensor in manifest.decoder.tensors
    ]
    assert order == sorted(order), "cold tensors come first"
    expected = {
        "start_of_image": 10,
        "end_of_image": 768,
        "image_soft": 769,
        "start_of_audio": 11,
        "end_of_audio": 896,
        "audio_soft": 897,
        "bos": 2,
    }
    assert expected.items() <= manifest.special_tokens.items()
    assert manifest.special_rows == ("end_of_image", "end_of_audio", "audio_padding")
    rows = np.load(bundles["g3n"].folder / "special_rows.npy")
    assert rows.shape == (3, 256) and rows.dtype == np.float32
    np.testing.assert_allclose(
        np.square(rows).mean(1), 1, atol=1e-3
    )  # the last step is an RMS norm
    bundles["g3n"].verify()


def test_every_tensor_is_mapped_or_skipped_with_a_reason(tmp_path):
    write_checkpoint("g3n", tmp_path / "c")
    checkpoint = Checkpoint.open(tmp_path / "c")
    mapping = map_tensors(checkpoint, read_dims(checkpoint.config))
    used = {part.name for source in mapping.sources for part in source.parts} - {None}
    assert used | set(mapping.skipped) == set(checkpoint.names()) and not used & set(
        mapping.skipped
    )
    reasons = set(mapping.skipped.values())
    assert reasons == {
        f"the {tower} tower, not part of the decoder" for tower in ("audio", "vision")
    }


def small(tmp_path, keep=lambda name: True, config=None, text=None):
    """The gemma3 reference with its config changed."""
    data = recipe("g3text")
    data["config"] |= config or {}
    return write_checkpoint(data, tmp_path / "small", keep=keep)


@pytest.mark.parametrize(
    "config, error, message",
    [
        (
            {"model_type": "gemma4"},
            UnsupportedModel,
            r"model_type 'gemma4' .*supported are gemma3 \(270M, 1B, 4B\) and gemma3n",
        ),
        ({"model_type": "gemma2"}, UnsupportedModel, "model_type 'gemma2'"),
        ({"model_type": "llama"}, UnsupportedModel, "model_type 'llama'"),
        ({"use_bidirectional_attention": True}, CheckpointError, "has no modules.json"),
        (
            {"num_hidden_layers": 8, "layer_types": None},
            CheckpointError,
            "lacks the tensor 'model.language_model.layers.7",
        ),
        ({"num_hidden_layers": 8}, CheckpointError, "layer_types has 7 entries for 8 layers"),
        (
            {"num_hidden_layers": 6},
            CheckpointError,
            "'model.layers.6.input_layernorm.weight' is not one that a gemma3 of 6 layers has",
        ),
        (
            {"hidden_size": 512},
            CheckpointError,
            r"has shape \[768, 256\], config.json asks for \[768, 512\]",
        ),
        ({"vocab_size": 0}, CheckpointError, "vocab_size is 0, expected a whole number"),
        ({"num_hidden_layers": 10**9}, CheckpointError, "num_hidden_layers is"),
        (
            {"hidden_activation": "silu"},
            UnsupportedModel,
            "hidden_activation is 'silu'; llama.cpp runs gemma3 with 'gelu_pytorch_tanh'",
        ),
        (
            {"query_pre_attn_scalar": 64},
            UnsupportedModel,
            "query_pre_attn_scalar is 64; llama.cpp runs gemma3 with 128",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2}}},
            UnsupportedModel,
            "rope type 'yarn'",
        ),
        ({"intermediate_size": [768] * 6 + [512]}, UnsupportedModel, "one width for all"),
        ({"num_key_value_heads": 3}, CheckpointError, "2 heads cannot share 3"),
    ],
)
def test_a_config_that_cannot_be_converted_is_refused(tmp_path, config, error, message):
    with pytest.raises(error, match=message):
        prepare(small(tmp_path, config=config), F32)


def test_a_missing_tensor_is_named(tmp_path):
    with pytest.raises(
        CheckpointError, match="lacks the tensor 'model.language_model.layers.3.mlp.up_proj.weight'"
    ):
        prepare(small(tmp_path, keep=lambda name: "layers.3.mlp.up_proj" not in name), F32)


def test_outputs_are_whole_or_absent(tmp_path, monkeypatch):
    folder = small(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UsageError, match="exists"):
        convert(folder, out, F32)
    out.rmdir()

    from edge_gemma.convert import decoder

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoder, "quantize_rows", full)
    with pytest.raises(
        RuntimeFailure,
        match=r"No space left on device \(\d+ MiB free there\); nothing was left behind",
    ):
        convert(folder, out, F32)
    assert not out.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_nan_in_the_weights_is_refused_and_leaves_nothing(tmp_path):
    folder = small(tmp_path)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-2:] = b"\xc0\x7f"  # a bf16 NaN in the last tensor
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        convert(folder, tmp_path / "out", F32)
    assert not (tmp_path / "out").exists()


def test_untied_checkpoints_keep_their_head(tmp_path):
    folder = small(tmp_path, config={"tie_word_embeddings": False})
    from checkpoints import values, write_safetensors

    data = recipe("g3text")
    tensors = [(t, values(t, tuple(s), data["seed"], "gemma3")) for t, s in data["tensors"].items()]
    write_safetensors(
        folder / "model.safetensors", [*tensors, ("lm_head.weight", 2 * tensors[0][1])]
    )
    bundle = convert(folder, tmp_path / "untied", F32).bundle
    assert not bundle.manifest.decoder.tied_head
    reference = np.load(REFERENCE / "g3text-text.npz")
    np.testing.assert_allclose(
        logits_of(bundle, reference["input_ids"])[-8:], 2 * reference["logits_last8"], atol=0.02
    )
    # config.json ties them, or says nothing: a head that differs is kept all the same, and said so
    for changes in ({}, {"tie_word_embeddings": None}):
        (folder / "config.json").write_text(json.dumps(data["config"] | changes))
        kept = convert(folder, tmp_path / "kept", F32)
        assert any(note.startswith("lm_head.weight differs from") for note in kept.notes)
        assert not kept.bundle.manifest.decoder.tied_head and "lm_head.weight" not in kept.skipped
        assert kept.bundle.decoder_path.read_bytes() == bundle.decoder_path.read_bytes()
        shutil.rmtree(tmp_path / "kept")
    write_safetensors(folder / "model.safetensors", [*tensors, ("lm_head.weight", tensors[0][1])])
    tied = convert(folder, tmp_path / "tied", F32)
    assert tied.skipped == {"lm_head.weight": "the output head, which is the token embedding"}
    assert tied.bundle.manifest.decoder.tied_head and tied.notes == ()


def test_an_untied_head_that_is_missing_is_the_embedding_and_said(tmp_path):
    """Trainers that untie in config.json alone save the shared matrix once."""
    prepared = prepare(small(tmp_path, config={"tie_word_embeddings": False}), F32)
    assert "output.weight" not in {source.name for source in prepared.mapping.sources}
    [note] = prepared.notes
    assert note.startswith("config.json says tie_word_embeddings false, but there is no lm_head")


def test_the_audio_tower_goes_into_the_bundle(tmp_path):
    folder = write_checkpoint("g3n", tmp_path / "g3n", keep=lambda name: "vision_tower" not in name)
    result = convert(folder, tmp_path / "out", Conversion(quant="q8_0", audio="int8"))
    manifest = result.bundle.manifest
    assert (
        manifest.audio.precision == "int8"
        and manifest.audio.n_embd == 256
        and manifest.vision is None
    )
    assert set(manifest.files) == {
        "decoder.gguf",
        "special_rows.npy",
        "audio_encoder.onnx",
        "audio_encoder.onnx.data",
    }
    assert result.sample  # it was loaded and asked for a few tokens
    with pytest.raises(UsageError, match="has no vision tower"):
        prepare(folder, Conversion(vision="int8"))
    with pytest.raises(UsageError, match="expected one of none, f32"):
        prepare(folder, Conversion(audio="int3"))


def test_the_vision_tower_goes_into_the_bundle(tmp_path):
    folder = write_checkpoint("g3mm", tmp_path / "g3mm")
    manifest = convert(
        folder, tmp_path / "out", Conversion(quant="q8_0", vision="f32", verify=False)
    ).bundle.manifest
    assert (
        manifest.vision.kind == "siglip"
        and manifest.vision.n_soft_tokens == 16
        and manifest.audio is None
    )
    assert {
        "start_of_image": 10,
        "end_of_image": 768,
        "image_soft": 769,
    }.items() <= manifest.special_tokens.items()
    assert manifest.special_rows == (), "end of image is an ordinary token of Gemma 3"


def test_matrices_of_one_type_lie_together(tmp_path):
    """What is read in place must not lie between what is copied: the kernel would map the copied
    ones' originals back in.
    """
    made = convert(
        write_checkpoint("g3text", tmp_path / "checkpoint"),
        tmp_path / "bundle",
        Conversion(quant="q4_k_m", verify=False),
    ).bundle
    hot = [
        t.type
        for t in sorted(made.manifest.decoder.tensors, key=lambda t: t.offset)
        if t.use == "matmul" and len(t.shape) == 2
    ]
    assert len(set(hot)) > 1 and len(list(itertools.groupby(hot))) == len(set(hot))
