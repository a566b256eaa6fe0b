"""Prompts with pictures, several pictures, and pictures beside sound: logits against transformers,
both families.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import seeing
from checkpoints import REFERENCE, recipe, write_checkpoint

from edge_gemma.bundles.folder import Bundle
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.engines.llama.decoder import Decoder
from edge_gemma.plan.records import Settings
from edge_gemma.prompts.prompt import read_special_rows
from edge_gemma.seeing.picture import Picture
from edge_gemma.seeing.soft_tokens import PictureEncoder
from edge_gemma.spans import Rows, Tokens

# transformers and llama.cpp differ by llama.cpp's f16 GELU table, and for Gemma 3n its top-k
# statistics, at logits of deviation ~1
TOLERANCE = {"g3mm": 0.02, "g3n": 0.04}


def logits_of(bundle: Bundle, spans: list, n_last: int) -> np.ndarray:
    n = sum(map(len, spans))
    decoder = Decoder(bundle.decoder_path, Settings(n_ctx=1024, n_ubatch=256, n_threads=2))
    try:
        return np.concatenate(
            list(decoder.context(n_outputs=256).evaluate(spans, range(n - n_last, n)))
        )
    finally:
        decoder.close()


def spans_of(ids: np.ndarray, media: dict[int, list[Rows]], rows: dict[int, np.ndarray]) -> list:
    """A reference prompt's ids as spans: each run of a soft token's id is the next of its
    ``media``, each id in ``rows`` an injected row.
    """
    spans, media, position = [], {token: list(found) for token, found in media.items()}, 0
    while position < len(ids):
        token = int(ids[position])
        if token in media:
            span = media[token].pop(0)
        elif token in rows:
            span = Rows(rows[token][None])
        else:
            span = Tokens([token])
        assert (ids[position : position + len(span)] == token).all()
        spans.append(span)
        position += len(span)
    assert not any(media.values())
    return spans


def check(name: str, bundle: Bundle, key: str, spans: list) -> None:
    expected = seeing.reference(name)[f"logits_{key}"]
    found = logits_of(bundle, spans, len(expected))
    assert np.abs(found - expected).max() < TOLERANCE[name]
    first, second = -np.sort(-expected, axis=1)[:, :2].T
    clear = first - second > TOLERANCE[name]
    np.testing.assert_array_equal(found.argmax(1)[clear], expected.argmax(1)[clear])


@pytest.fixture(scope="module")
def gemma3n(tmp_path_factory) -> Bundle:
    """Without the towers: their soft tokens come from the reference."""
    folder = tmp_path_factory.mktemp("g3n")
    checkpoint = write_checkpoint(
        "g3n", folder / "checkpoint", keep=lambda name: "_tower" not in name
    )
    return convert(checkpoint, folder / "bundle", Conversion(quant="f32", verify=False)).bundle


@pytest.mark.parametrize(("key", "seeds"), [("one", [6]), ("two", [6, 7])])
def test_gemma3_looks_at_pictures(looking_bundle, key, seeds):
    """From the pixels on: encoder and decoder of one converted bundle."""
    config = recipe("g3mm")["config"]
    with PictureEncoder(looking_bundle) as encoder:
        pictures = [
            Rows(encoder.encode(Picture(seeing.picture(seed))), causal=False) for seed in seeds
        ]
    spans = spans_of(
        seeing.reference("g3mm")[f"ids_{key}"], {config["image_token_index"]: pictures}, {}
    )
    check("g3mm", looking_bundle, key, spans)


def test_gemma3_pictures_must_see_themselves(looking_bundle):
    """The causal mask is wrong for them: the test above would notice."""
    reference, config = seeing.reference("g3mm"), recipe("g3mm")["config"]
    spans = spans_of(
        reference["ids_one"],
        {config["image_token_index"]: [Rows(reference["soft_6"], causal=True)]},
        {},
    )
    assert (
        np.abs(logits_of(looking_bundle, spans, 4) - reference["logits_one"]).max()
        > 2 * TOLERANCE["g3mm"]
    )


@pytest.mark.parametrize(
    ("key", "seeds"), [("one", [5]), ("two", [5, 8]), ("image_audio", [5]), ("audio_image", [5])]
)
def test_gemma3n_looks_and_listens(gemma3n, key, seeds):
    reference, config = seeing.reference("g3n"), recipe("g3n")["config"]
    special = read_special_rows(gemma3n)
    with np.load(REFERENCE / "g3n-audio.npz") as audio:
        heard = audio["audio_soft_0.9"].reshape(-1, 256)
    padding = np.repeat(special["audio_padding"][None], 188 - len(heard), axis=0)
    media = {
        config["image_token_id"]: [Rows(reference[f"soft_{seed}"]) for seed in seeds],
        config["audio_token_id"]: [Rows(np.concatenate([heard, padding]))]
        if "audio" in key
        else [],
    }
    rows = {
        config["eoi_token_id"]: special["end_of_image"],
        config["eoa_token_id"]: special["end_of_audio"],
    }
    check("g3n", gemma3n, key, spans_of(reference[f"ids_{key}"], media, rows))


def test_a_converted_bundle_says_what_it_sees_with(looking_bundle):
    part = looking_bundle.manifest.vision
    assert (part.kind, part.precision, part.n_embd) == (
        "siglip",
        "f32",
        looking_bundle.manifest.decoder.n_embd,
    )
    assert {"vision_encoder.onnx", "vision_encoder.onnx.data"} <= set(looking_bundle.manifest.files)
    tokens = looking_bundle.manifest.special_tokens
    config = json.loads((REFERENCE / "g3mm.json").read_text())["config"]
    assert (tokens["start_of_image"], tokens["end_of_image"], tokens["image_soft"]) == (
        10,
        config["eoi_token_index"],
        config["image_token_index"],
    )
