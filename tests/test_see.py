"""Seeing from the outside: the API, the describe command, importing with an mmproj, and twenty
pictures inside the plan.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import seeing
from checkpoints import recipe, write_checkpoint

import edge_gemma
from edge_gemma import cli
from edge_gemma.benchmarks.dev.mtmd import write_mmproj
from edge_gemma.benchmarks.seeing import conversation
from edge_gemma.cli.see import QUESTION, split
from edge_gemma.convert.checkpoint import Checkpoint
from edge_gemma.convert.mmproj import vision_writer
from edge_gemma.errors import (
    BundleError,
    MediaError,
    PlanRefused,
    UnsupportedModel,
)
from edge_gemma.seeing.picture import Picture
from edge_gemma.seeing.soft_tokens import PictureEncoder
from edge_gemma.store.importer import import_gguf

GREEDY = edge_gemma.Sampling(max_tokens=4, temperature=0)


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def photo(tmp_path):
    from PIL import Image

    Image.fromarray(seeing.picture(6)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_encode_image_and_a_message_with_pictures(looking_bundle, no_cache, photo, tmp_path):
    with edge_gemma.load(looking_bundle, n_ctx=512) as model:
        rows = model.encode_image(photo)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, seeing.reference("g3mm")["soft_6"], atol=1e-4)
        assert len(list((tmp_path / "cache" / "edge-gemma" / "soft-tokens").iterdir())) == 1
        with model.chat() as chat:
            texts = []
            for content in (
                ["What is this?", edge_gemma.Image(photo)],
                ["And this?", edge_gemma.Image(seeing.picture(7)), edge_gemma.Image(photo)],
            ):
                texts.append("".join(chunk.text for chunk in chat.send(content, GREEDY)))
            assert len(chat.messages) == 4 and len(texts) == 2
        with pytest.raises(MediaError, match="there is no image file"), model.chat() as chat:
            list(chat.send([edge_gemma.Image("nothing.jpg"), "?"], GREEDY))
        with (
            pytest.raises(
                PlanRefused,
                match=r"30 pictures take 30 × 22 = 660 tokens and 508 of the context are free: 23 "
                r"fit",
            ),
            model.chat() as chat,
        ):
            list(chat.send([*[edge_gemma.Image(photo)] * 30, "?"], GREEDY))


def test_a_text_bundle_refuses_pictures(tiny_bundle, photo):
    with edge_gemma.load(tiny_bundle, n_ctx=256) as model:
        with pytest.raises(UnsupportedModel, match="has no vision encoder, so it cannot see"):
            model.encode_image(photo)
        with (
            pytest.raises(UnsupportedModel, match="has no vision encoder, so it cannot see"),
            model.chat() as chat,
        ):
            list(chat.send([edge_gemma.Image(photo), "?"], GREEDY))


def test_plan_knows_the_encoder(looking_bundle):
    with edge_gemma.load(looking_bundle, n_ctx=512) as model:
        items = {item.name: item for item in model.plan.items}
    part = looking_bundle.manifest.vision
    assert (
        items["vision encoder weights"].bytes == part.weights_bytes
        and items["vision encoder weights"].kind == "file_hot"
    )
    assert items["vision encoder activations"].bytes == part.activation_bytes["224"] and items[
        "vision encoder activations"
    ].phases == ("look",)


def test_twenty_pictures_stay_inside_the_plan(looking_bundle):
    section = conversation(
        [looking_bundle.folder], n_pictures=20, n_ctx=256, image_px=300, n_threads=1
    )
    (row,) = section.rows
    assert row["turns_dropped"] > 0  # more pictures than the context holds at once
    assert row["peak_pss_bytes"] <= row["planned_peak_bytes"], row


# ---- describe


def test_splitting_words(photo):
    assert split([str(photo), "What?"]) == ([str(photo)], "What?")
    assert split([str(photo)]) == ([str(photo)], QUESTION)
    assert split([str(photo), "missing.JPG"]) == ([str(photo), "missing.JPG"], QUESTION)
    assert split([]) == ([], QUESTION)


def test_describe(capsys, looking_bundle, no_cache, photo, tmp_path):
    code, out, err = run(
        capsys,
        "describe",
        looking_bundle.folder,
        photo,
        photo,
        "Which is larger?",
        "--ctx",
        256,
        "-n",
        4,
        "--temperature",
        0,
        "--json",
    )
    result = json.loads(out)
    assert (
        code == 0
        and result["usage"]["prompt_tokens"] > 2 * 18
        and result["finish_reason"] in ("length", "stop")
    )
    assert result["memory"]["peak_pss_bytes"] > 0
    from PIL import Image

    frames = [Image.new("L", (16, 16), 40 * number) for number in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=1000)
    code, out, err = run(
        capsys, "describe", looking_bundle.folder, tmp_path / "a.gif", "--ctx", 256, "-n", 2
    )
    assert code == 0 and "is animated; its first frame is shown. --video" in err
    code, out, err = run(
        capsys,
        "describe",
        looking_bundle.folder,
        "What moves?",
        "--video",
        tmp_path / "a.gif",
        "--ctx",
        256,
        "-n",
        2,
        "--json",
    )
    assert code == 0 and json.loads(out)["usage"]["prompt_tokens"] > 4 * 18


@pytest.mark.compat(
    kind="picture",
    what="data:image/…;base64,… and quoted paths on the command line",
    happens="seen as the file",
)
def test_pictures_as_they_are_typed(capsys, looking_bundle, no_cache, photo, monkeypatch):
    import base64
    import io

    data = base64.b64encode(photo.read_bytes()).decode()
    uri = f"data:image/png;base64,{data}"
    spaced = photo.with_name("my photo.png")
    photo.rename(spaced)
    monkeypatch.setenv("HOME", str(photo.parent))
    short = ("--ctx", 256, "-n", 1)
    quoted = f"'{spaced}'"
    for command in (
        ("describe", looking_bundle.folder, uri, "~/my photo.png", "The same?"),
        ("run", looking_bundle.folder, "What?", "--image", quoted),
    ):
        code, _, err = run(capsys, *command, *short)
        assert code == 0, err
    lines = "/image ~/my photo.png what's this?\n/image none.png what?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, _, err = run(capsys, "chat", looking_bundle.folder, *short)
    assert code == 0 and "there is no image file at none.png" in err
    assert err.count("edge-gemma:") == 1


def test_describe_refusals(capsys, looking_bundle, tiny_bundle, photo, tmp_path):
    assert run(capsys, "describe", looking_bundle.folder)[0] == 2
    code, _, err = run(capsys, "describe", looking_bundle.folder, "nothing.jpg", "What?")
    assert code == 6 and "there is no image file at nothing.jpg" in err and "Traceback" not in err
    code, _, err = run(capsys, "describe", looking_bundle.folder, tmp_path, "What?")
    assert code == 6 and "is a directory" in err
    code, _, err = run(
        capsys, "describe", looking_bundle.folder, photo, "--size", 512, "--ctx", 256
    )
    assert code == 2 and "pictures of 512 px were asked for; this encoder takes 224" in err
    code, _, err = run(capsys, "describe", tiny_bundle, photo)
    assert code == 3 and "cannot see" in err
    code, _, err = run(
        capsys, "describe", looking_bundle.folder, *[photo] * 40, "?", "--ctx", "256"
    )
    assert code == 4 and "40 pictures take 40 × 22 = 880 tokens" in err and "fit" in err


# ---- import with an mmproj


def test_import_with_mmproj(sample_gguf, tmp_path):
    """The real Gemma 3 270M with an invented vision tower of its width."""
    data = recipe("g3mm")
    data["tensors"] |= {"model.multi_modal_projector.mm_input_projection_weight": [128, 640]}
    data["config"]["text_config"]["hidden_size"] = 640
    checkpoint = Checkpoint.open(
        write_checkpoint(
            data,
            tmp_path / "checkpoint",
            keep=lambda name: "vision" in name or "multi_modal" in name,
        )
    )
    write_mmproj(checkpoint, tmp_path / "mmproj.gguf", "f32")
    bundle = import_gguf(
        sample_gguf, tmp_path / "out", write_vision=vision_writer(tmp_path / "mmproj.gguf")
    )
    assert (
        bundle.manifest.vision.kind,
        bundle.manifest.vision.precision,
        bundle.manifest.vision.n_embd,
    ) == ("siglip", "f16", 640)
    bundle.verify()
    with PictureEncoder(bundle) as encoder:
        assert encoder.encode(Picture(seeing.picture(6))).shape == (16, 640)


def test_import_refuses_a_foreign_mmproj(siglip_checkpoint, sample_gguf, tmp_path):
    write_mmproj(siglip_checkpoint, tmp_path / "mmproj.gguf", "f32")
    with pytest.raises(
        BundleError, match="gives rows 256 wide, .* takes 640: they belong to different models"
    ):
        import_gguf(
            sample_gguf, tmp_path / "out", write_vision=vision_writer(tmp_path / "mmproj.gguf")
        )
    assert not (tmp_path / "out").exists()
