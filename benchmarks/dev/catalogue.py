"""``edge_gemma/plan/catalogue.json``: what each published model takes in each recipe, so that
``edge-gemma recommend`` can plan models that are not on the machine.

    python -m edge_gemma.benchmarks.dev.catalogue OUT.json

In: shapes of the real checkpoints (``synthetic.SHAPES``) and the recipes. Out: the type of every
tensor, as the converter would choose it. A test holds the file against the recipes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from edge_gemma.benchmarks.dev.synthetic import SHAPES, Shape
from edge_gemma.bundles.description import GEMMA3N_KV_LAYERS
from edge_gemma.bundles.folder import Bundle
from edge_gemma.convert.gemma import Cut, Dims, Mapping, mapping_table
from edge_gemma.convert.recipe import choose_types, read_recipe
from edge_gemma.convert.trim.choice import Chooser, Wanted
from edge_gemma.convert.trim.cut import read_gguf_vocabulary
from edge_gemma.convert.trim.languages import languages
from edge_gemma.engines.llama.tokenizer import Tokenizer

RECIPES = ("edge", "edge_fast", "q4_k_m", "q8_0")
# how far a recipe's answers lie from the whole weights': mean KL divergence, real 270M, with an
# importance matrix for the edge recipes (docs/convert.md)
KLD = {"edge": 0.0448, "edge_fast": 0.0858, "q4_k_m": 0.0057, "q8_0": 0.0032}
# tokens of Gemma's vocabulary cut to one language (count_languages; wordfreq 3.1)
BASE_TOKENS = 8256
# fmt: off
LANGUAGES = {
    "ar": 17024, "bg": 22016, "bn": 27584, "ca": 55168, "cs": 37184, "da": 42176, "de":
    54528, "el": 24512, "en": 98176, "es": 56704, "fa": 18560, "fi": 33856, "fil": 52736,
    "fr": 62336, "he": 12544, "hi": 31552, "hu": 37824, "id": 50048, "is": 35392, "it":
    53760, "ja": 36608, "ko": 24896, "lt": 32192, "lv": 30400, "mk": 22976, "ms": 49664,
    "nb": 53120, "nl": 60352, "pl": 38144, "pt": 61312, "ro": 46208, "ru": 25024, "sh":
    36608, "sk": 38528, "sl": 36416, "sv": 51264, "ta": 23616, "tr": 35328, "uk": 24960,
    "ur": 16320, "vi": 32832, "zh": 34176, "code": 24832,
}
# fmt: on
# (title, its repository, billions of parameters at work for a token, an encoder for pictures)
MODELS = {
    "270m": ("Gemma 3 270M", "google/gemma-3-270m-it", 0.27, None),
    "1b": ("Gemma 3 1B", "google/gemma-3-1b-it", 1.0, None),
    "e2b": ("Gemma 3n E2B", "google/gemma-3n-E2B-it", 1.9, "mobilenetv5"),
    "4b": ("Gemma 3 4B", "google/gemma-3-4b-it", 3.9, "siglip"),
    "e4b": ("Gemma 3n E4B", "google/gemma-3n-E4B-it", 4.0, "mobilenetv5"),
}


def main() -> None:
    out = Path(sys.argv[1])
    out.write_text(json.dumps(catalogue(), indent=1, ensure_ascii=False) + "\n", "utf-8")


def catalogue() -> dict[str, object]:
    return {
        "kld": KLD,
        "base_tokens": BASE_TOKENS,
        "languages": LANGUAGES,
        "models": {key: _model(key) for key in MODELS},
    }


def count_languages(bundle: Bundle) -> tuple[int, dict[str, int]]:
    """(tokens that every set has, language → tokens of a vocabulary cut to it), of a bundle with
    Gemma's whole vocabulary: what the two constants above are.
    """
    vocabulary = read_gguf_vocabulary(bundle)
    found, smallest = {}, len(vocabulary.tokens)
    with Tokenizer(bundle.decoder_path) as tokenizer:
        for code in languages():
            chooser = Chooser(vocabulary, tokenizer, Wanted((code,)))
            found[code] = len(chooser.choice().kept)
            smallest = min(smallest, chooser.smallest)
    return smallest, found


def _model(key: str) -> dict[str, object]:
    title, repository, parameters, tower = MODELS[key]
    dims = _dims(SHAPES[key])
    owners = dims.sliding[:GEMMA3N_KV_LAYERS] if dims.family == "gemma3n" else dims.sliding
    return {
        "title": title,
        "repository": repository,
        "parameters": parameters,
        "family": dims.family,
        "dims": dims.table() | {"ple_width": dims.ple_width},
        "n_ctx_train": dims.n_ctx_train,
        "sliding_window": dims.sliding_window,
        "kv_layers": ["sliding" if slides else "global" for slides in owners],
        "hears": dims.family == "gemma3n",
        "vision": tower,
        "types": {name: _types(dims, name) for name in RECIPES},
    }


def _dims(shape: Shape) -> Dims:
    is_3n = shape.family == "gemma3n"
    sliding = tuple(i % shape.period < shape.period - 1 for i in range(shape.n_layer))
    return Dims(
        family=shape.family,  # type: ignore[arg-type]
        n_layer=shape.n_layer,
        n_embd=shape.n_embd,
        n_ff=shape.n_ff,
        n_head=shape.n_head,
        n_head_kv=shape.n_head_kv,
        head_dim=shape.head_dim,
        n_vocab=shape.n_vocab,
        n_ctx_train=shape.n_ctx_train,
        sliding_window=shape.sliding_window,
        sliding=sliding,
        rms_eps=1e-6,
        rope_base=1e6,
        rope_base_sliding=1e4,
        rope_factor=shape.rope_factor,
        softcap=30.0 if is_3n else 0.0,
        tied=True,
        ple_width=256 if is_3n else 0,
        ple_vocab=262144 if is_3n else 0,
        n_kv_shared=shape.n_layer - GEMMA3N_KV_LAYERS if is_3n else 0,
    )


def _types(dims: Dims, name: str) -> dict[str, str | dict[str, list[int]]]:
    """Kind of tensor → its type, or type → layers where they differ."""
    recipe = read_recipe(name)
    cut = Cut(tuple(range(dims.n_layer)), dims.n_ff)
    sources = tuple(mapping_table(dims, dims, cut, None, recipe.untied))
    tied = not any(source.name == "output.weight" for source in sources)
    chosen, _ = choose_types(recipe, Mapping(replace(dims, tied=tied), sources, {}))
    kinds: dict[str, dict[str, list[int]]] = {}
    result: dict[str, str | dict[str, list[int]]] = {}
    for tensor, kind in chosen.items():
        parts = tensor.split(".")
        if parts[0] == "blk":
            kinds.setdefault(parts[2], {}).setdefault(kind, []).append(int(parts[1]))
        else:
            result[parts[0]] = kind
    for kind_name, layers in kinds.items():
        result[kind_name] = next(iter(layers)) if len(layers) == 1 else layers
    return result


if __name__ == "__main__":
    main()
