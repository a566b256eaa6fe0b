"""What a GGUF says about itself: every key of every wrong kind is refused by name, and what is
accepted runs in llama.cpp, which aborts the process on what it asserts.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ggufs
import pytest
from ggufs import (
    ARRAY,
    BOOL,
    FLOAT32,
    FLOAT64,
    INT32,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    Parts,
    array,
    scalar,
)

from edge_gemma.benchmarks.dev.synthetic import tiny_gguf
from edge_gemma.bundles.description import describe
from edge_gemma.errors import BundleError, UnsupportedModel

# Loads each file as a bundle of it is loaded, decodes 38 tokens, and says which it was before
# llama.cpp could abort.
RUN_EACH = """
import sys
import numpy as np
from edge_gemma.bundles.description import describe
from edge_gemma.engines.llama.decoder import Decoder
from edge_gemma.engines.llama.weights import overrides
from edge_gemma.plan.records import Settings
from edge_gemma.spans import Tokens

for path in sys.stdin.read().splitlines():
    print(path, end=" ", flush=True)
    settings, known = Settings(n_ctx=128, n_ubatch=64), overrides(describe(path))
    decoder = Decoder(path, settings, overrides=known)
    logits = np.concatenate(list(decoder.context(n_outputs=64).evaluate([Tokens(range(2, 40))])))
    decoder.close()
    print("finite" if np.isfinite(logits).all() else "NaN", flush=True)
"""


@pytest.fixture(scope="module", params=["gemma3", "gemma3n"])
def parts(request, tmp_path_factory) -> Parts:
    folder = tmp_path_factory.mktemp("whole")
    made = Parts.read(tiny_gguf(folder / "x.gguf", request.param, chat_template="{{ messages }}"))
    family = request.param
    # what the tiny file leaves out and other files have
    return (
        made.with_value("general.type", scalar(STRING, "model"))
        .with_value("general.license", scalar(STRING, "gemma"))
        .with_value("general.alignment", scalar(UINT32, 32))
        .with_value("split.count", scalar(ggufs.UINT16, 0))
        .with_value(f"{family}.rope.dimension_count", made.pairs[f"{family}.attention.key_length"])
        .with_value(f"{family}.rope.freq_base_swa", scalar(FLOAT32, 10_000.0))
        .with_value(f"{family}.rope.scaling.type", scalar(STRING, "linear"))
        .with_value(f"{family}.rope.scaling.factor", scalar(FLOAT32, 8.0))
        .with_value(f"{family}.rope.scaling.finetuned", scalar(BOOL, False))
        .with_value(f"{family}.attention.causal", scalar(BOOL, True))
        .with_value(f"{family}.attention.max_alibi_bias", scalar(FLOAT32, 0.0))
        .with_value(f"{family}.expert_count", scalar(UINT32, 0))
        .with_value(f"{family}.vocab_size", scalar(UINT32, 512))
    )


def wrong_types() -> dict[str, bytes]:
    """Values that are of the right type for no key, or for few."""
    return {
        "text": scalar(STRING, "seven"),
        "empty text": scalar(STRING, ""),
        "negative": scalar(INT32, -1),
        "NaN": scalar(FLOAT32, math.nan),
        "infinite": scalar(FLOAT32, math.inf),
        "negative fraction": scalar(FLOAT32, -2.5),
        "zero fraction": scalar(FLOAT32, 0.0),
        "huge fraction": scalar(FLOAT32, 3e38),
        "fraction": scalar(FLOAT32, 2.5),
        "double": scalar(FLOAT64, 1.0),
        "byte": scalar(UINT8, 1),
        "bool": scalar(BOOL, True),
        "false": scalar(BOOL, False),
        "zero": scalar(UINT32, 0),
        "one": scalar(UINT32, 1),
        "largest": scalar(UINT32, 0xFFFFFFFF),
        "huge": scalar(UINT64, 1 << 63),
        "array of one": array(UINT32, [1]),
        "empty array": array(UINT32, []),
        "empty array of bool": array(BOOL, []),
        "empty array of text": array(STRING, []),
        "array of bool": array(BOOL, [True, False]),
        "array of NaN": array(FLOAT32, [math.nan] * 3),
        "array of text": array(STRING, ["a", "b"]),
        "long array of numbers": array(UINT32, [1] * 5000),
        "array of arrays": array(ARRAY, [])[:-8] + bytes(8),
    }


def kind(typed: bytes) -> bytes:
    """The type of a typed value; of an array with the type of its items."""
    return typed[: 8 if typed[0] == ARRAY else 4]


def variants(parts: Parts) -> Iterator[tuple[str, str, Parts]]:
    """(key, what was done to it, the file) for every key and every change."""
    for key in parts.pairs:
        yield key, "missing", parts.with_value(key, None)
        for name, value in wrong_types().items():
            yield key, name, parts.with_value(key, value)


def outcomes(parts: Parts, folder: Path) -> tuple[list[Path], list[str]]:
    """(files that were accepted, what is wrong with the refusals)."""
    accepted, complaints = [], []
    for n, (key, change, file) in enumerate(variants(parts)):
        path = file.write(folder / f"{n:04}-{key}-{change.replace(' ', '-')}.gguf", weights=False)
        try:
            describe(path)
            accepted.append(file.write(path))
            continue
        except BundleError as error:
            said = str(error)
        except Exception as error:
            complaints.append(f"{key} {change}: {error!r}")
            continue
        path.unlink()
        if str(path) not in said:
            complaints.append(f"{key} {change}: the file is not named: {said}")
        same_type = kind(parts.pairs[key]) == kind(wrong_types().get(change, b"none"))
        # a count that is missing has a default, which the tensors' shapes then contradict
        contradicted = change == "missing" and "the header's numbers say" in said
        if not same_type and not contradicted and key not in said.replace(str(path), ""):
            complaints.append(f"{key} {change}: the key is not named: {said}")
    return accepted, complaints


def run_each(paths: list[Path]) -> list[str]:
    """What llama.cpp makes of each file, a line each; the last one is where it ended."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    lines = done.stdout.splitlines()
    if done.returncode:
        lines.append(f"ended with {done.returncode}: {done.stderr[-2000:]}")
    return lines


def test_every_key_of_every_wrong_kind_is_refused_by_name_or_runs(parts, tmp_path):
    accepted, complaints = outcomes(parts, tmp_path)
    assert complaints == []
    assert len(accepted) > 30
    assert [line for line in run_each(accepted) if not line.endswith(" finite")] == []


def test_the_file_as_it_is_runs(parts, tmp_path):
    path = parts.write(tmp_path / "x.gguf")
    assert describe(path).chat_template == "{{ messages }}"
    assert run_each([path]) == [f"{path} finite"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("split.count", scalar(ggufs.UINT16, 3), "one part of a split GGUF"),
        ("general.type", scalar(STRING, "adapter"), "is of type 'adapter'"),
        ("general.architecture", scalar(STRING, "clip"), "is a vision projector"),
        ("tokenizer.ggml.model", scalar(STRING, "gpt2"), r"model is 'gpt2' .*sentencepiece"),
        ("tokenizer.ggml.tokens", scalar(UINT32, 512), r"tokens is 512 \(uint32\)"),
        ("tokenizer.ggml.tokens", array(STRING, ["a"] * 9), r"scores is .*; expected 9 entries"),
        ("tokenizer.ggml.scores", array(FLOAT32, [0.0] * 511), "scores is .*expected 512 entries"),
        ("tokenizer.ggml.scores", array(FLOAT32, [math.nan] * 512), "scores is .*expected finite"),
        ("tokenizer.ggml.token_type", array(INT32, [1] * 513), "token_type is .*512 entries"),
        ("tokenizer.ggml.eos_token_id", scalar(UINT32, 512), "eos_token_id is 512 .*from 0 to 511"),
        ("tokenizer.ggml.eot_token_id", scalar(UINT32, 512), "eot_token_id is 512 .*from 0 to 511"),
        ("tokenizer.chat_template", scalar(UINT32, 1), r"chat_template is 1 \(uint32\)"),
        (
            "rope.scaling.type",
            scalar(STRING, "spiral"),
            "type is 'spiral' .*none or linear or yarn",
        ),
        ("attention.causal", scalar(BOOL, False), "causal is False"),
        ("expert_count", scalar(UINT32, 8), "expert_count is 8"),
        ("attention.sliding_window_pattern", scalar(STRING, "6"), "pattern is '6' .*uint32"),
        ("attention.sliding_window_pattern", scalar(INT32, -6), r"pattern is -6 \(int32\)"),
        ("attention.sliding_window_pattern", scalar(FLOAT32, 5.5), r"pattern is 5.5 \(float32\)"),
        ("attention.sliding_window_pattern", scalar(UINT32, 1), "at least one sliding layer"),
        ("attention.sliding_window_pattern", array(BOOL, [True] * 3), "pattern is .*entries"),
        ("attention.sliding_window_pattern", array(BOOL, []), r"pattern is \[\] .*entries"),
        ("attention.layer_norm_rms_epsilon", scalar(FLOAT32, 0.0), "epsilon is 0.0"),
        ("context_length", scalar(UINT32, 0), r"context_length is 0 .*from 1 to 16777216"),
    ],
)
def test_absurd_values_are_refused_with_what_was_expected(parts, tmp_path, key, value, message):
    family = "gemma3n" if "gemma3n.block_count" in parts.pairs else "gemma3"
    if key not in parts.pairs:
        key = f"{family}.{key}"
    path = parts.with_value(key, value).write(tmp_path / "x.gguf")
    with pytest.raises((BundleError, UnsupportedModel), match=message):
        describe(path)


def test_the_sliding_layers_are_the_ones_that_llama_cpp_makes(parts, tmp_path):
    described = describe(parts.write(tmp_path / "x.gguf"))
    family, n_layer = described.family, described.decoder.n_layer
    key = f"{family}.attention.sliding_window_pattern"
    paths = []
    for name, value, kinds in (
        ("period", scalar(UINT32, 4), ["sliding", "sliding", "sliding", "global"] * 8),
        ("none global", scalar(UINT32, 0), ["sliding"] * 30),
        ("list", array(BOOL, [i % 2 == 0 for i in range(n_layer)]), ["sliding", "global"] * 15),
        ("all sliding", array(BOOL, [True] * n_layer), ["sliding"] * 30),
    ):
        path = parts.with_value(key, value).write(tmp_path / f"{name.replace(' ', '-')}.gguf")
        found = describe(path).decoder.kv_layers
        assert found == tuple(kinds[: len(found)]), name
        paths.append(path)
    assert run_each(paths) == [f"{path} finite" for path in paths]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_two_wrong_keys_at_once_are_refused_or_run(parts, tmp_path, seed):
    chosen, accepted = random.Random(seed), []
    values = list(wrong_types().values())
    for n in range(1500):
        file = parts
        for key in chosen.sample(sorted(parts.pairs), 2):
            file = file.with_value(key, chosen.choice([None, *values]))
        path = file.write(tmp_path / f"{n:04}.gguf", weights=False)
        try:
            describe(path)
            accepted.append(file.write(path))
        except BundleError:
            path.unlink()
    assert [line for line in run_each(accepted) if not line.endswith(" finite")] == []


def test_layers_that_share_kv_find_it_in_a_layer_of_their_kind(tmp_path):
    """llama.cpp aborts where a layer without KV of its own would read a cache of the other kind."""
    parts = Parts.read(tiny_gguf(tmp_path / "x.gguf", "gemma3n"))
    key = "gemma3n.attention.sliding_window_pattern"
    path = parts.with_value(key, scalar(UINT32, 3)).write(tmp_path / "period.gguf")
    with pytest.raises(UnsupportedModel, match=r"pattern is 3 .*layers 19 sliding and 20 global"):
        describe(path)


def test_gemma3n_as_it_is_published(tmp_path):
    """The types that llama.cpp's converter writes: a count as a float, widths layer by layer, −inf
    where a layer has no sparsity.
    """
    parts = Parts.read(tiny_gguf(tmp_path / "x.gguf", "gemma3n"))
    for key, value in (
        ("attention.shared_kv_layers", scalar(FLOAT32, 2.0)),
        ("feed_forward_length", array(INT32, [256] * 22)),
        ("activation_sparsity_scale", array(FLOAT32, [1.6448535] * 10 + [-math.inf] * 12)),
    ):
        parts = parts.with_value(f"gemma3n.{key}", value)
    path = parts.write(tmp_path / "published.gguf")
    assert describe(path).decoder.n_ff == 256 and len(describe(path).decoder.kv_layers) == 20
    assert run_each([path]) == [f"{path} finite"]
    path = parts.with_value("gemma3n.attention.shared_kv_layers", scalar(FLOAT32, 2.5)).write(path)
    with pytest.raises(UnsupportedModel, match="shared_kv_layers is 2.5 .*a whole number"):
        describe(path)
