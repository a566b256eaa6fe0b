"""generation_config.json: what ends an answer and how it is sampled, from the checkpoint's files to
the model that was loaded.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import msgspec
import pytest
from checkpoints import write_checkpoint

import edge_gemma
from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import SamplingDefaults, encode_manifest
from edge_gemma.cli.options import SamplingOptions
from edge_gemma.convert.checkpoint import read_json
from edge_gemma.convert.generation_config import Answers, read_answers
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.convert.vocabulary import read_vocabulary
from edge_gemma.errors import CheckpointError, UsageError

N = 768
GOOGLE = {"do_sample": True, "eos_token_id": [1, 9], "top_k": 64, "top_p": 0.95}
compat = pytest.mark.compat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(
        "g3text", tmp_path_factory.mktemp("answers"), keep=lambda name: "norm" in name
    )


def answers(folder, generation, **config) -> Answers:
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not None:
        path.write_text(generation if isinstance(generation, str) else json.dumps(generation))
    config = read_json(folder / "config.json") | config
    return read_answers(folder, config, read_vocabulary(folder, config, N))


@pytest.mark.parametrize(
    "generation, config, ends",
    [
        (None, {}, (1, 9)),  # <eos> and <end_of_turn>
        ({"eos_token_id": 1}, {}, (1, 9)),
        ({"eos_token_id": [1, 9, 50]}, {}, (1, 9, 50)),  # as FunctionGemma's third
        (None, {"eos_token_id": [1, 9, 60]}, (1, 9, 60)),
        ({"eos_token_id": [50]}, {"eos_token_id": 9}, (9, 1, 50)),  # eos named <end_of_turn>
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": [70]}}, (70, 9, 1)),
    ],
)
def test_ends(folder, generation, config, ends):
    found = answers(folder, generation, **config)
    assert found.end_tokens == ends and found.sampling is None and found.notes == ()


def test_an_end_without_a_row_is_ignored_with_a_note(folder):
    found = answers(folder, {"eos_token_id": [1, N, N + 1]})
    assert found.end_tokens == (1, 9)
    assert found.notes == tuple(
        f"the end token {i} has no row in the table; ignored" for i in (N, N + 1)
    )


@pytest.mark.parametrize(
    "generation, expected",
    [
        (GOOGLE, {"top_k": 64, "top_p": 0.95}),
        (
            {"temperature": 0.3, "repetition_penalty": 1.1},
            dict(temperature=0.3, repeat_penalty=1.1),
        ),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"min_p": 0.05, "top_k": 20.0}, {"min_p": 0.05, "top_k": 20}),
    ],
)
def test_sampling_defaults(folder, generation, expected):
    assert answers(folder, generation).sampling == SamplingDefaults(**expected)


@pytest.mark.parametrize(
    "key, value", [("temperature", "hot"), ("top_k", 2.5), ("top_p", 1.5), ("min_p", True)]
)
def test_a_value_that_cannot_be_is_ignored_with_a_note(folder, key, value):
    found = answers(folder, {key: value})
    assert found.sampling is None
    assert found.notes == (f"generation_config.json: {key} is {value!r}, which cannot be; ignored",)


def test_a_damaged_file_is_refused(folder):
    with pytest.raises(CheckpointError, match="generation_config.json holds no valid JSON"):
        answers(folder, "{")


@compat(
    kind="checkpoint",
    what="generation_config.json with its own end tokens and sampling",
    happens="kept in the bundle; counts where nothing else is asked for",
)
def test_they_reach_the_bundle(tmp_path):
    folder = write_checkpoint("g3text", tmp_path / "checkpoint")
    own = GOOGLE | {"eos_token_id": [1, 9, 50], "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(own))
    made = convert(folder, tmp_path / "bundle", Conversion(quant="q8_0", verify=False)).bundle
    manifest = Bundle.open(made.folder).manifest
    assert manifest.end_tokens == (1, 9, 50)
    assert manifest.sampling == SamplingDefaults(temperature=0.7, top_k=64, top_p=0.95)


@pytest.fixture(scope="module")
def greedy_bundle(tiny_bundle, tmp_path_factory):
    """The tiny bundle, whose authors sample greedily."""
    folder = tmp_path_factory.mktemp("greedy") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    manifest = Bundle.open(folder).manifest
    greedy = SamplingDefaults(temperature=0.0, top_k=7)
    data = encode_manifest(msgspec.structs.replace(manifest, sampling=greedy))
    (folder / "manifest.json").write_bytes(data)
    return folder


def test_a_model_samples_as_its_authors_say(greedy_bundle, tiny_bundle):
    def text(chunks) -> str:
        return "".join(chunk.text for chunk in chunks)

    request = edge_gemma.PlanRequest(n_ctx=256, n_threads=1)
    with edge_gemma.load(greedy_bundle, request=request) as model:
        assert model.sampling() == edge_gemma.Sampling(temperature=0.0, top_k=7)
        own = model.sampling(max_tokens=6, temperature=0.5)
        assert own == edge_gemma.Sampling(temperature=0.5, top_k=7, max_tokens=6)
        with pytest.raises(TypeError):
            model.sampling(temprature=0.5)
        with pytest.raises(UsageError, match="top_p is 2"):
            model.sampling(top_p=2)
        greedy = edge_gemma.Sampling(temperature=0, max_tokens=64)
        expected = text(model.generate("The", greedy))
        for _ in range(2):  # given none: greedy, whatever the seed
            assert text(model.generate("The")).startswith(expected)
            with model.session() as session:
                session.append(model.spans("The"))
                assert text(session.generate()).startswith(expected)
            (end,) = {index for index, _ in model.generate_batch(["The"])}
            assert end == 0
        with model.chat() as one, model.chat() as other:
            assert text(one.send("Hi")) == text(other.send("Hi"))
    with edge_gemma.load(tiny_bundle, request=request) as model:
        assert model.sampling() == edge_gemma.Sampling()


def test_the_command_line_takes_them_over(greedy_bundle):
    asked = SamplingOptions(max_tokens=5).sampling(str(greedy_bundle))
    assert asked == edge_gemma.Sampling(temperature=0.0, top_k=7, max_tokens=5)
    changed = dataclasses.replace(SamplingOptions(), temperature=0.9, top_k=0)
    assert changed.sampling(str(greedy_bundle)) == edge_gemma.Sampling(
        temperature=0.9, top_k=0, max_tokens=256
    )
