"""Real repositories' layouts (replicas.py): each converts to what the published layout of its
family converts to, and says what it left out and why.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import REFERENCE
from prompts import CONVERSATIONS, TEMPLATE
from replicas import LAYOUTS, Repository, changed, channel_last

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.gguf import read_header
from edge_gemma.convert.checkpoint import Checkpoint, checkpoint_name
from edge_gemma.convert.convolutions import channel_first
from edge_gemma.convert.pipeline import Conversion, Result, convert, prepare
from edge_gemma.engines.llama import decoder as decode
from edge_gemma.errors import CheckpointError, UnsupportedModel
from edge_gemma.plan.records import Settings
from edge_gemma.prompts.prompt import Prompt
from edge_gemma.prompts.template import render
from edge_gemma.spans import Tokens

F32 = Conversion(quant="f32", audio="f32", vision="f32", verify=False)
ENCODERS = {"g3text": {}, "g3mm": {"vision": "f32"}, "g3n": {"audio": "f32"}}
PLAIN = {"g3text": "g270m_it", "g3mm": "g4b_it", "g3n": "g3n_it"}
NO_ROW = (
    "'<image_soft_token>' (768) has no row in the table of 768; ignored: the model cannot use them"
)
# layout → its notes, where they are not those of the plain one
NOTES = {
    "g270m_transformers_5": [],
    "g1b_tokenizer_model_alone": [],
    "g1b_stale_index": [
        "model.safetensors.index.json lists model-00001-of-00002.safetensors while "
        "model.safetensors is there whole; the index is ignored",
        NO_ROW,
    ],
    "g270m_function": [
        "'<image_soft_token>' (768) and 1 more tokens have no row in the table of 768; ignored: "
        "the model cannot use them"
    ],
    "g1b_language_model": [
        NO_ROW,
        "config.json gives image_soft the id 768, which has no row in the table of 768; ignored",
    ],
    "g4b_mlx_vlm": ["1 convolution is stored channel-last (as MLX does) and read channel-first"],
    "g4b_trimmed": [
        "config.json gives image_soft the id 769, which has no row in the table of 768; ignored"
    ],
    "g3n_mlx_vlm": ["4 convolutions are stored channel-last (as MLX does) and read channel-first"],
    "g3n_differences": [],
    "g270m_untied_in_config": [
        "config.json says tie_word_embeddings false, but there is no lm_head.weight: the token "
        "embedding is the output head, as in every published Gemma",
        NO_ROW,
    ],
}
EQUAL_HEAD = "the output head, which is the token embedding"
BUFFER = "a buffer that is computed, not learnt"
SKIPPED = {
    "g1b_mlx": {"lm_head.weight": EQUAL_HEAD},
    "g1b_index_omits_head": {"lm_head.weight": EQUAL_HEAD},
    "g1b_language_model": {"lm_head.weight": EQUAL_HEAD},
    "g4b_deepspeed": {"lm_head.weight": EQUAL_HEAD},
    "g3n_head_written": {"lm_head.weight": EQUAL_HEAD},
    "g4b_position_ids": {"vision_tower.vision_model.embeddings.position_ids": BUFFER},
    "g1b_buffers": {
        "model.rotary_emb.inv_freq": BUFFER,
        "model.rotary_emb_local.inv_freq": BUFFER,
        "model.embed_tokens.embed_scale": BUFFER,
    },
}
ENDS = {"g1b_unsloth": (9, 1), "g270m_function": (1, 9, 50)}
# decoders that hold other values than the plain one: fewer rows, or rounded to float16
NOT_EQUAL = ("g4b_trimmed", "g3n_f16")


def options(base: str) -> Conversion:
    return dataclasses.replace(F32, **({"audio": None, "vision": None} | ENCODERS[base]))


@functools.cache
def converted(name: str, folder: Path) -> Result:
    base, _, write = LAYOUTS[name]
    source = folder / name
    write(source)
    has_tower = any(
        "_tower." in tensor or "patch_embedding" in tensor
        for tensor in Checkpoint.open(source).names()
    )
    chosen = options(base) if has_tower else dataclasses.replace(F32, audio=None, vision=None)
    return convert(source, folder / f"{name}-bundle", chosen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("replicas")


def cases() -> list:
    """One case per layout, with its row in docs/compatibility.md."""
    found = []
    for name, (base, what, _) in LAYOUTS.items():
        happens = "converts"
        towers = {"g3mm": ", vision encoder included", "g3n": ", audio encoder included"}
        if name in ("g4b_text_only", "g3n_mlx_lm") or "g3n_text" in name or base == "g3text":
            happens += "; same tensors and tokens as the published layout"
        else:
            happens += f"; same tensors and tokens as the published layout{towers[base]}"
        if NOTES.get(name):
            happens += "; says how it was read" if "mlx" in name else "; says what was ignored"
        if name in SKIPPED:
            happens += "; says what was skipped"
        mark = pytest.mark.compat(kind="checkpoint", what=what, happens=happens)
        found.append(pytest.param(name, id=name, marks=mark))
    return found


def tensor_bytes(bundle: Bundle) -> dict[str, bytes]:
    data, manifest = bundle.decoder_path.read_bytes(), bundle.manifest
    return {
        t.name: data[t.offset : t.offset + t.nbytes]
        for t in manifest.decoder.tensors
        if t.use != "unused"
    }


def vocabulary_bytes(bundle: Bundle) -> bytes:
    """The key/value part of the GGUF, but for the model's name."""
    header = read_header(bundle.decoder_path)
    start, stop = header.kv_range
    return bundle.decoder_path.read_bytes()[start:stop].replace(
        bundle.manifest.name.encode(), b"NAME"
    )


@pytest.mark.parametrize("name", cases())
def test_a_layout_converts_to_what_the_published_one_does(name, folder):
    base, _, _ = LAYOUTS[name]
    plain, result = converted(PLAIN[base], folder), converted(name, folder)
    expected, manifest = plain.bundle.manifest, result.bundle.manifest
    assert list(result.notes) == NOTES.get(name, list(plain.notes))
    assert result.skipped == SKIPPED.get(name, {})
    assert manifest.name == name and manifest.family == expected.family
    assert manifest.end_tokens == ENDS.get(name, (1, 9))
    assert manifest.decoder.tied_head
    if name not in NOT_EQUAL:
        ours, theirs = tensor_bytes(result.bundle), tensor_bytes(plain.bundle)
        assert ours.keys() == theirs.keys()
        assert [tensor for tensor in ours if ours[tensor] != theirs[tensor]] == []
    without_vision = manifest.vision is None or manifest.vision == expected.vision
    without_audio = manifest.audio is None or manifest.audio == expected.audio
    assert without_vision and without_audio
    for file, entry in manifest.files.items():
        if name not in NOT_EQUAL and file.endswith((".onnx", ".data")):
            assert entry.sha256 == expected.files[file].sha256, file


def test_towers_are_written_where_they_are(folder):
    """What the test above compares is there: 4B sees, E2B hears."""
    for name, (base, _, _) in LAYOUTS.items():
        manifest = converted(name, folder).bundle.manifest
        no_tower = name == "g4b_text_only" or "g3n_text" in name or name == "g3n_mlx_lm"
        assert (manifest.vision is not None) == (base == "g3mm" and not no_tower), name
        assert (manifest.audio is not None) == (base == "g3n" and not no_tower), name


def test_float16_storage_is_the_same_to_its_precision(folder):
    ours, theirs = (tensor_bytes(converted(n, folder).bundle) for n in ("g3n_f16", "g3n_it"))
    for tensor in theirs:
        np.testing.assert_allclose(
            np.frombuffer(ours[tensor], "f4"),
            np.frombuffer(theirs[tensor], "f4"),
            atol=4e-8,
            rtol=0,
        )


def test_a_table_that_was_cut_keeps_the_rows_it_has(folder):
    ours, theirs = (tensor_bytes(converted(n, folder).bundle) for n in ("g4b_trimmed", "g4b_it"))
    assert theirs["token_embd.weight"].startswith(ours["token_embd.weight"])
    assert "image_soft" not in converted("g4b_trimmed", folder).bundle.manifest.special_tokens


def test_sampling_defaults_are_taken_over(folder):
    for name in ("g1b_it", "g4b_it", "g3n_it"):
        sampling = converted(name, folder).bundle.manifest.sampling
        assert sampling is not None and (sampling.top_k, sampling.top_p) == (64, 0.95)
    assert converted("g1b_mlx", folder).bundle.manifest.sampling is None


BASE_WEIGHTS = ("g270m", "g4b_pt", "g1b_tokenizer_model_alone")
IDS = json.loads((REFERENCE / "replica-ids.json").read_text())


@pytest.mark.parametrize(
    "name", [pytest.param(name, id=name) for name in LAYOUTS if name not in BASE_WEIGHTS]
)
def test_prompts_are_transformers_ids(name, folder):
    """reference/make_replica_ids.py: transformers' tokenizer and template."""
    bundle = converted(name, folder).bundle
    assert bundle.manifest.instruct and bundle.manifest.chat_template == TEMPLATE
    settings = Settings(n_ctx=64, n_ubatch=32, n_threads=1, repack=False)
    decoder = decode.Decoder(bundle.decoder_path, settings)
    try:
        prompt = Prompt(bundle.manifest, decoder.tokenize)
        for conversation, expected in IDS.items():
            spans = prompt.spans(CONVERSATIONS[conversation])
            ids = [i for span in spans if isinstance(span, Tokens) for i in span.ids]
            assert ids == expected, conversation
    finally:
        decoder.close()


@pytest.mark.parametrize("name", BASE_WEIGHTS)
def test_base_weights_are_told_apart(name, folder):
    assert not converted(name, folder).bundle.manifest.instruct


def test_our_template_behaves_as_the_models_own():
    """The models' templates are data under their licence and not part of this repository; where
    the folder with them lies beside the checkout, what they render is compared.
    """
    path = Path(__file__).parents[1] / ".." / "shared" / "replicas" / "templates.py"
    if not path.is_file():
        pytest.skip("shared/replicas/templates.py is not beside the checkout")
    spec = importlib.util.spec_from_file_location("templates", path)
    assert spec is not None and spec.loader is not None
    templates = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(templates)
    media = {f"@{kind}": {"type": kind, "text": ""} for kind in ("image", "audio")}
    for name, conversation in CONVERSATIONS.items():
        kinds = str(conversation)
        messages = [
            turn
            | {
                "content": turn["content"]
                if isinstance(turn["content"], str)
                else [media.get(i, {"type": "text", "text": i}) for i in turn["content"]]
            }
            for turn in conversation
        ]
        if "@audio" not in kinds:
            assert render(templates.G3, messages, True) == render(TEMPLATE, messages, True), name
        if "@image" not in kinds:
            assert render(templates.G3N, messages, True) == render(TEMPLATE, messages, True), name


# --- what is refused ---


def refused(base, what, change, error, message):
    mark = pytest.mark.compat(kind="checkpoint", what=what, happens="refused, with the way out")
    return pytest.param(base, change, error, message, id=what, marks=mark)


def _four_bit(r: Repository) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rows, columns = r.tensors[name].shape
    r.tensors[name] = np.zeros((rows, columns // 8), np.uint32)
    r.metadata = {"format": "mlx"}


def _embedding(r: Repository) -> None:
    r.config |= {"architectures": ["Gemma3TextModel"], "use_bidirectional_attention": True}


def _mixed(r: Repository) -> None:
    r.config["text_config"]["intermediate_size"] = [256] * 20 + [512] * 2


def _unmerged(r: Repository) -> None:
    r.rename((r"(q_proj)\.weight", r"\1.base_layer.weight"))


def _patch_of_another_size(r: Repository) -> None:
    r.config["vision_config"]["patch_size"] = 16


def _no_kernel(r: Repository) -> None:
    name = "model.audio_tower.subsample_conv_projection.conv_1.conv.weight"
    r.tensors[name] = np.ascontiguousarray(r.tensors[name].transpose(0, 2, 1, 3))


@pytest.mark.parametrize(
    "base, change, error, message",
    [
        refused(
            "g3text", "mlx in 4 bits", _four_bit, CheckpointError, "has type U32.*original bf16"
        ),
        refused(
            "g3text", "an embedding model without modules.json", _embedding, CheckpointError,
            "has no modules.json: it lists the layers",
        ),
        refused(
            "g3n", "3n of mixed widths (MatFormer)", _mixed, UnsupportedModel, "--slice FILE"
        ),
        refused(
            "g3text", "a PEFT state that was not merged", _unmerged, CheckpointError,
            "not merged; call merge_and_unload",
        ),
        refused(
            "g3mm", "patches that config.json does not describe", _patch_of_another_size,
            CheckpointError, r"patch_embedding.weight' has shape .*asks for \[width, 3, 16, 16\]",
        ),
        refused(
            "g3n", "a kernel of neither layout", _no_kernel, CheckpointError,
            "conv_1.conv.weight' has shape .* neither channel-first .* nor channel-last",
        ),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_converted_is_refused(base, change, error, message, tmp_path):
    source = changed(base, change, tmp_path / "source")
    with pytest.raises(error, match=message):
        prepare(source, F32 if base == "g3mm" else Conversion(verify=False))


def test_an_unmerged_adapter_is_named(tmp_path):
    def change(r: Repository) -> None:
        r.tensors["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = np.zeros((4, 256))

    source = changed("g3text", change, tmp_path / "source")
    with pytest.raises(CheckpointError, match="not merged; call merge_and_unload"):
        prepare(source, F32.__class__(verify=False))


# --- names ---


@pytest.mark.compat(
    kind="checkpoint",
    what="a snapshot in the hub's cache",
    happens="the bundle is called after the repository, not the commit",
)
def test_a_snapshot_is_called_after_its_repository(tmp_path):
    snapshot = tmp_path / "models--google--gemma-3-1b-it" / "snapshots" / ("0a1b" * 10)
    LAYOUTS["g1b_it"][2](snapshot)
    manifest = convert(snapshot, tmp_path / "out", F32.__class__(verify=False)).bundle.manifest
    assert manifest.name == manifest.source.origin == "gemma-3-1b-it"
    assert checkpoint_name(tmp_path) == tmp_path.name
    (tmp_path / "link").symlink_to(snapshot)
    assert checkpoint_name(tmp_path / "link") == "gemma-3-1b-it"


def test_what_was_written_is_not_skipped(tmp_path):
    """And what was not is, with the reason."""
    source = tmp_path / "source"
    LAYOUTS["g4b_it"][2](source)
    seeing = prepare(source, F32.__class__(verify=False))
    assert seeing.skipped == {} and seeing.towers == {"vision": "int8"}
    blind = prepare(source, F32.__class__(verify=False, vision="none"))
    assert set(blind.skipped.values()) == {"the vision tower, not part of the decoder"}
    assert all("vision" in name or "multi_modal" in name for name in blind.skipped)


# --- channel-last convolutions ---

KERNELS = {
    "model.vision_tower.timm_model.conv_stem.conv.weight": (64, 3, 3, 3),
    "model.vision_tower.timm_model.blocks.0.0.conv_exp.weight": (256, 64, 3, 3),
    "model.vision_tower.timm_model.blocks.1.0.dw_start.conv.weight": (128, 1, 3, 3),
    "model.vision_tower.timm_model.blocks.1.0.pw_exp.conv.weight": (768, 128, 1, 1),
    "model.vision_tower.timm_model.blocks.2.9.attn.key.proj.weight": (64, 640, 1, 1),
    "model.audio_tower.subsample_conv_projection.conv_0.conv.weight": (128, 1, 3, 3),
    "model.audio_tower.subsample_conv_projection.conv_1.conv.weight": (32, 128, 3, 3),
    "model.audio_tower.conformer.0.lconv1d.depthwise_conv1d.weight": (1536, 1, 5),
    "model.vision_tower.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
}
CONFIG = {"vision_config": {"patch_size": 14}}


def last(shape):
    return (shape[0], *shape[2:], shape[1])


@pytest.mark.parametrize("framework", ["pt", "mlx", ""])
def test_every_kernel_is_recognised_by_its_shape(framework):
    assert channel_first(KERNELS, CONFIG, framework) == {}
    stored = {name: last(shape) for name, shape in KERNELS.items()}
    turned = channel_first(stored, CONFIG, framework)
    assert turned.keys() == KERNELS.keys()
    for name, axes in turned.items():
        assert tuple(stored[name][axis] for axis in axes) == KERNELS[name]


def test_a_kernel_of_three_equal_sides_follows_its_tower_or_the_framework():
    stem = {name: shape for name, shape in KERNELS.items() if "conv_stem" in name}
    assert channel_first(stem, CONFIG, "mlx").keys() == stem.keys()
    assert channel_first(stem, CONFIG, "pt") == {}
    # a tower of which each kernel tells for itself, whatever the file says
    some = {n: last(s) if "conv_exp" in n else s for n, s in KERNELS.items() if "timm" in n}
    turned = channel_first(some, CONFIG, "pt")
    assert turned.keys() == {n for n in some if "conv_exp" in n}


@pytest.mark.compat(
    kind="checkpoint",
    what="MobileNetV5 with channel-last convolutions (mlx-vlm 3n)",
    happens="read channel-first; the same encoder",
)
def test_mobilenetv5_reads_channel_last(tmp_path):
    """The tiny MobileNetV5 of the references, stored both ways."""
    import seeing
    from checkpoints import write_safetensors

    from edge_gemma.convert.vision import write_vision_encoder

    plain = seeing.tower_checkpoint("mnv5", tmp_path / "plain")
    tensors = {entry.stored: plain.read(name) for name, entry in plain.entries.items()}
    names = [name for name, x in tensors.items() if x.ndim == 4]
    assert len(names) > 20
    folder = tmp_path / "last"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(plain.config))
    write_safetensors(folder / "model.safetensors", channel_last(tensors, names).items(), "F32")
    turned = Checkpoint.open(folder)
    for name in plain.names():
        assert turned.shape(name) == plain.shape(name)
        np.testing.assert_array_equal(turned.read(name), plain.read(name))
        rows = slice(1, 3)
        np.testing.assert_array_equal(turned.read(name, rows), plain.read(name, rows))
    for checkpoint, out in ((plain, "a"), (turned, "b")):
        (tmp_path / out).mkdir()
        write_vision_encoder(checkpoint, tmp_path / out, "f32")
    data = "vision_encoder.onnx.data"
    assert (tmp_path / "a" / data).read_bytes() == (tmp_path / "b" / data).read_bytes()
