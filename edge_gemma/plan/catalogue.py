"""The published models and what each takes in each recipe, for plans of what is not on the machine.

In: ``catalogue.json``, written by ``benchmarks/dev/catalogue.py`` from the shapes of the real
checkpoints and the recipes. Out: :class:`Published`, and a :class:`Manifest` of any of them with
the bytes that a conversion would write; it names no file that exists.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from math import prod

import msgspec

from edge_gemma.bundles.description import expected_tensors
from edge_gemma.bundles.gguf import TYPE_SIZES
from edge_gemma.bundles.manifest import (
    SENSES,
    AudioPart,
    DecoderPart,
    Family,
    File,
    KvLayer,
    Manifest,
    Sense,
    Source,
    Tensor,
    VisionPart,
    VocabularyPart,
)
from edge_gemma.errors import UsageError
from edge_gemma.units import MiB

DECODER = "decoder.gguf"
HEADER_BYTES_PER_TOKEN = 24  # a piece, its score and its kind
# The int8 encoders of the full-size towers: their measured files and peaks (docs/hear.md, see.md)
_AUDIO = AudioPart(
    file="audio_encoder.onnx",
    precision="int8",
    n_embd=2048,
    weights_bytes=636 * MiB,
    activation_bytes=32 * MiB,
)
_VISION = {
    "siglip": VisionPart(
        file="vision_encoder.onnx",
        kind="siglip",
        precision="int8",
        n_embd=2560,
        n_soft_tokens=256,
        image_sizes=(896,),
        mean=0.5,
        std=0.5,
        weights_bytes=464 * MiB,
        activation_bytes={"896": 376 * MiB},
    ),
    "mobilenetv5": VisionPart(
        file="vision_encoder.onnx",
        kind="mobilenetv5",
        precision="int8",
        n_embd=2048,
        n_soft_tokens=256,
        image_sizes=(768, 512, 256),
        mean=0.0,
        std=1.0,
        weights_bytes=323 * MiB,
        activation_bytes={"768": 440 * MiB, "512": 280 * MiB, "256": 150 * MiB},
    ),
}


class Published(msgspec.Struct, frozen=True):
    """One model as its authors publish it. ``parameters``: billions at work for a token."""

    title: str
    repository: str
    parameters: float
    family: Family
    dims: dict[str, int]
    n_ctx_train: int
    sliding_window: int
    kv_layers: tuple[KvLayer, ...]
    hears: bool
    vision: str | None
    # recipe → kind of tensor → its type, or type → layers
    types: dict[str, dict[str, str | dict[str, list[int]]]]

    @property
    def senses(self) -> tuple[Sense, ...]:
        present = {"audio": self.hears, "vision": self.vision is not None}
        return tuple(sense for sense in SENSES if present[sense])


class Catalogue(msgspec.Struct, frozen=True):
    kld: dict[str, float]  # recipe → mean KL divergence from the whole weights, real 270M
    base_tokens: int  # that every cut vocabulary has
    languages: dict[str, int]  # language → tokens of a vocabulary cut to it alone, base included
    models: dict[str, Published]


@cache
def catalogue() -> Catalogue:
    """The shipped catalogue.

    >>> sorted(catalogue().models)
    ['1b', '270m', '4b', 'e2b', 'e4b']
    """
    data = (resources.files("edge_gemma.plan") / "catalogue.json").read_bytes()
    return msgspec.json.decode(data, type=Catalogue)


def cut_tokens(languages: Sequence[str]) -> int:
    """Tokens of a vocabulary cut to ``languages``, at most: what two of them share is counted
    twice. Raises UsageError (a language that there is no word list for).

    >>> 64_000 < cut_tokens(["en"]) < cut_tokens(["en", "sl"]) < 128_000
    True
    """
    known = catalogue()
    total = known.base_tokens
    for code in dict.fromkeys(languages):
        if code not in known.languages:
            near = difflib.get_close_matches(code, known.languages, 3, 0.3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UsageError(
                f"language {code!r} is not known; {hint}There are word lists for "
                f"{', '.join(known.languages)}"
            )
        total += known.languages[code] - known.base_tokens
    return total


def manifest_of(
    model: Published, recipe: str, senses: tuple[Sense, ...], languages: Sequence[str] = ()
) -> Manifest:
    """What converting ``model`` by ``recipe`` with the encoders of ``senses`` would write, its
    vocabulary cut to ``languages`` where there are any. Raises UsageError (an unknown one).
    """
    dims = dict(model.dims)
    if languages:
        dims["n_vocab"] = min(cut_tokens(languages), dims["n_vocab"])
    header = dims["n_vocab"] * HEADER_BYTES_PER_TOKEN
    tensors: list[Tensor] = []
    offset = header
    expected = expected_tensors(model.family, dims)
    types = model.types[recipe]
    if "output" in types:
        shape, _ = expected["token_embd.weight"]
        expected = expected | {
            "token_embd.weight": (shape, "lookup"),
            "output.weight": (shape, "matmul"),
        }
    for name, (shape, use) in expected.items():
        kind = _type(types, name)
        values, nbytes = TYPE_SIZES[kind]
        size = prod(shape) // values * nbytes
        tensors.append(Tensor(name, kind, shape, offset, size, use))
        offset += size
    decoder = DecoderPart(
        file=DECODER,
        n_ctx_train=model.n_ctx_train,
        sliding_window=model.sliding_window,
        kv_layers=model.kv_layers,
        tied_head="output" not in types,
        head_from_embedding="output" in types,
        header_bytes=header,
        header_sha256="0" * 64,
        tensors=tuple(tensors),
        **dims,
    )
    return Manifest(
        name=f"{model.title} {recipe}",
        family=model.family,
        instruct=True,
        decoder=decoder,
        source=Source(origin=model.repository),
        files={DECODER: File(size=offset, sha256="0" * 64)},
        audio=_AUDIO if "audio" in senses and model.hears else None,
        vision=_VISION[model.vision] if "vision" in senses and model.vision else None,
        recipe={"name": recipe},
        vocabulary=VocabularyPart(n_whole=model.dims["n_vocab"], languages=tuple(languages))
        if languages
        else None,
    )


def encoder_bytes(manifest: Manifest) -> int:
    """What the encoders of a bundle take on disk."""
    return sum(part.weights_bytes for part in (manifest.audio, manifest.vision) if part)


def _type(types: dict[str, str | dict[str, list[int]]], name: str) -> str:
    parts = name.split(".")
    if parts[0] != "blk":
        kind = types[parts[0]]
        assert isinstance(kind, str), name
        return kind
    found = types[parts[2]]
    if isinstance(found, str):
        return found
    return next(kind for kind, layers in found.items() if int(parts[1]) in layers)
