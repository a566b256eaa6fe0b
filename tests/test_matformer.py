"""E4B → E2B: the converter's slice against a few independent lines of numpy on the whole
checkpoint.
"""

from __future__ import annotations

import json
import re

import pytest
from checkpoints import recipe, values, write_checkpoint, write_safetensors

from edge_gemma.convert.pipeline import Conversion, convert, prepare
from edge_gemma.errors import UnsupportedModel, UsageError

SMALL = Conversion(
    quant="q8_0", verify=False, audio="none", vision="none", slice="e2b", name="same"
)


def e4b_recipe() -> dict:
    """The reference 3n with 35 layers and twice the FFN, as E4B is to E2B."""
    data = recipe("g3n")
    text = data["config"]["text_config"]
    text |= {
        "num_hidden_layers": 35,
        "num_kv_shared_layers": 15,
        "intermediate_size": [512] * 35,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    }
    text["activation_sparsity_pattern"] = [0.95] * 10 + [0.0] * 25
    shapes = {
        name: shape
        for name, shape in data["tensors"].items()
        if "layers." not in name and "_tower" not in name
    }
    shapes["model.language_model.embed_tokens_per_layer.weight"][1] = shapes[
        "model.language_model.per_layer_model_projection.weight"
    ][0] = 35 * 256
    for name, shape in data["tensors"].items():
        if "language_model.layers.0." in name:
            for i in range(35):
                shapes[name.replace("layers.0.", f"layers.{i}.")] = [
                    512 if n == 768 else n for n in shape
                ]
    return data | {"tensors": shapes}


def slice_by_hand(data: dict, folder) -> None:
    """What MatFormer's E2B is, said once more: half the FFN from the front, layers 20–24 out, the
    rest renumbered.
    """
    keep = [*range(20), *range(25, 35)]
    tensors = {}
    for name, shape in data["tensors"].items():
        x = values(name, tuple(shape), data["seed"], "gemma3n")
        if match := re.search(r"layers\.(\d+)\.", name):
            if int(match[1]) not in keep:
                continue
            name = name.replace(match[0], f"layers.{keep.index(int(match[1]))}.")
        if "gate_proj" in name or "up_proj" in name:
            x = x[:256]
        if "down_proj" in name:
            x = x[:, :256]
        if "embed_tokens_per_layer" in name:
            x = x.reshape(len(x), 35, 256)[:, keep].reshape(len(x), -1)
        if "per_layer_model_projection" in name:
            x = x.reshape(35, 256, -1)[keep].reshape(30 * 256, -1)
        tensors[name] = x
    config = json.loads(json.dumps(data["config"]))
    text = config["text_config"]
    text |= {
        "num_hidden_layers": 30,
        "num_kv_shared_layers": 10,
        "intermediate_size": [256] * 30,
        "layer_types": [text["layer_types"][i] for i in keep],
    }
    text["activation_sparsity_pattern"] = [text["activation_sparsity_pattern"][i] for i in keep]
    write_checkpoint(data, folder, keep=lambda name: False)
    write_safetensors(folder / "model.safetensors", tensors.items())
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def e4b(tmp_path_factory):
    return write_checkpoint(e4b_recipe(), tmp_path_factory.mktemp("e4b") / "e4b")


def test_the_slice_is_byte_for_byte_the_sliced_checkpoint(e4b, tmp_path):
    slice_by_hand(e4b_recipe(), tmp_path / "e2b")
    by_hand = convert(
        tmp_path / "e2b",
        tmp_path / "by-hand",
        Conversion(quant="q8_0", verify=False, audio="none", vision="none", name="same"),
    ).bundle
    sliced = convert(e4b, tmp_path / "sliced", SMALL).bundle
    assert sliced.decoder_path.read_bytes() == by_hand.decoder_path.read_bytes()
    assert (
        sliced.manifest.decoder == by_hand.manifest.decoder
        and sliced.manifest.recipe["slice"] == "e2b"
    )


def test_a_file_says_the_same(e4b, tmp_path):
    (tmp_path / "mine.toml").write_text("ffn = 256\ndrop_layers = [20, 21, 22, 23, 24]\n")
    named, filed = (
        prepare(e4b, SMALL),
        prepare(
            e4b,
            Conversion(quant="q8_0", audio="none", slice=str(tmp_path / "mine.toml"), name="same"),
        ),
    )
    assert named.layout.header == filed.layout.header and named.mapping == filed.mapping
    assert {reason for name, reason in named.mapping.skipped.items() if "layers.2" in name} == {
        "a layer that the slice leaves out"
    }


@pytest.mark.parametrize(
    "text, error, message",
    [
        (
            "ffn = [256, 512]",
            UnsupportedModel,
            r"FFN widths \[256, 512\]; llama.cpp reads one width",
        ),
        ("ffn = 513", UsageError, "ffn is 513; this checkpoint has 512"),
        ("ffn = 0", UsageError, "ffn is 0"),
        (
            "drop_layers = [18, 20]",
            UnsupportedModel,
            "drops layer 18; layers 0 to 19 own the KV cache",
        ),
        ("drop_layers = [35]", UsageError, "must name layers 0 to 34"),
        ("drop_layers = [20, 20]", UsageError, "each once"),
        ("widths = 3", UsageError, "is not a slice"),
        ("ffn = ", UsageError, "is not a slice"),
    ],
)
def test_rules_are_checked_before_work_starts(e4b, tmp_path, text, error, message):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(error, match=message):
        prepare(e4b, Conversion(quant="q8_0", slice=str(tmp_path / "mine.toml")))


def test_what_cannot_be_sliced_is_refused(e4b, tiny_checkpoint, tmp_path):
    with pytest.raises(UnsupportedModel, match="this checkpoint is a gemma3"):
        prepare(tiny_checkpoint, SMALL)
    write_checkpoint("g3n", tmp_path / "e2b", keep=lambda name: "_tower" not in name)
    with pytest.raises(UsageError, match="is an E2B already"):
        prepare(tmp_path / "e2b", SMALL)
    with pytest.raises(UsageError, match="expected e2b, or a TOML file"):
        prepare(e4b, Conversion(slice="e3b"))
