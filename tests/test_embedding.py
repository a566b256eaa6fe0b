"""EmbeddingGemma: vectors are those of sentence-transformers, and nothing else is done with it."""

from __future__ import annotations

import functools
import json
import threading
from pathlib import Path

import embedding as made
import ggufs
import numpy as np
import pytest
from checkpoints import REFERENCE

import edge_gemma
from edge_gemma.bundles.description import describe
from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import is_loaded_to_multiply
from edge_gemma.cli import main
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.convert.recipe import Recipe
from edge_gemma.embedding import normalised
from edge_gemma.engines.llama import library, output_rows
from edge_gemma.engines.llama.decoder import Decoder
from edge_gemma.engines.llama.weights import repacked_here
from edge_gemma.errors import CheckpointError, EdgeGemmaError, UnsupportedModel, UsageError
from edge_gemma.machine.device import Device
from edge_gemma.machine.footprint import footprint
from edge_gemma.machine.probe import find_device
from edge_gemma.plan.costs import Costs
from edge_gemma.plan.ladder import make_plan
from edge_gemma.plan.records import PlanRequest, Settings
from edge_gemma.store.importer import import_gguf

MiB = 1 << 20
KINDS = {"query": "query", "document": "document", "none": None}
ONE_THREAD = PlanRequest(n_threads=1)


@functools.cache
def answers() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "gemma-embedding.npz") as stored:
        return dict(stored)


def cosines(vectors: np.ndarray, name: str) -> np.ndarray:
    return (vectors * normalised(answers()[name])).sum(axis=1)


@pytest.fixture(scope="module")
def model(embedding_bundle):
    with edge_gemma.load(embedding_bundle, request=ONE_THREAD) as loaded:
        yield loaded


@pytest.fixture
def checkpoint(embedding_checkpoint, tmp_path) -> Path:
    """A copy whose small files may be changed."""
    folder = tmp_path / "checkpoint"
    for path in sorted(embedding_checkpoint.rglob("*")):
        target = folder / path.relative_to(embedding_checkpoint)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            target.symlink_to(path)
        else:
            target.write_bytes(path.read_bytes())
    return folder


def change(path: Path, **values) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


# --- vectors ---


@pytest.mark.compat(
    kind="family",
    what="EmbeddingGemma, the whole repository",
    happens="converts with its dense layers; vectors are sentence-transformers' (cosine 0.99999)",
)
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_sentence_transformers(model, kind):
    vectors = model.embed(made.TEXTS, kind=KINDS[kind])
    assert vectors.shape == (len(made.TEXTS), 256) and vectors.dtype == np.float32
    assert cosines(vectors, f"small/{kind}").min() > 0.99999
    assert np.abs(vectors - answers()[f"small/{kind}"]).max() < 5e-4


@pytest.mark.compat(
    kind="family",
    what="EmbeddingGemma 300M, its real shape, f32 and q8_0",
    happens="cosine to sentence-transformers 0.9999 at f32, 0.999 at q8_0",
)
@pytest.mark.slow
def test_the_real_shape(tmp_path):
    folder = made.write_embedding(tmp_path / "checkpoint", "wide", dtype="F32")
    least = {"f32": 0.9999, None: 0.999}  # the default is q8_0
    for quant, bound in least.items():
        options = Conversion(quant=quant, verify=False)
        bundle = convert(folder, tmp_path / f"bundle-{quant}", options).bundle
        with edge_gemma.load(bundle, request=ONE_THREAD) as model:
            for kind, prompt in KINDS.items():
                found = cosines(model.embed(made.TEXTS, kind=prompt), f"wide/{kind}")
                assert found.min() > bound, (quant, kind)
    assert bundle.manifest.recipe["name"] == "q8_0"


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_are_those_of_transformers(model, kind):
    """Begin and end around each, spaces kept, tokens that are written out counted as such."""
    prompt = made.PROMPTS.get(KINDS[kind] or "", "")
    ids = [id for text in made.TEXTS for id in [2, *model.tokenize(prompt + text, True), 1, -1]]
    assert ids == answers()[f"ids/{kind}"].tolist()


def test_cut_vectors_are_normalised_again(model):
    vectors = model.embed(made.TEXTS, kind="query", dimensions=128)
    assert vectors.shape == (len(made.TEXTS), 128)
    assert cosines(vectors, "small/query 128").min() > 0.99999
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6


def test_a_text_alone_and_among_others_has_the_same_vector(model):
    together = model.embed(made.TEXTS * 8)  # more texts than one pass takes
    alone = np.concatenate([model.embed([text]) for text in made.TEXTS])
    assert (together.reshape(8, len(made.TEXTS), -1) * alone).sum(axis=-1).min() > 0.99999


def test_a_text_beyond_the_window_needs_its_end(model):
    """The last word of a text longer than the sliding window changes its vector: nothing is cut."""
    one, other = model.embed([made.LONG + "yes", made.LONG + "no"])
    assert 0.5 < one @ other < 0.99999


def test_no_texts_are_no_vectors(model):
    assert model.embed([]).shape == (0, 256)


def test_a_long_text_is_refused_or_cut(model):
    text = "river " * 3000
    with pytest.raises(UsageError, match=r"text 1 has \d+ tokens .* 2048 fit.*truncate=True"):
        model.embed(["short", text])
    ids = model.tokenize(text)[: 2048 - 2]
    kept = model.detokenize(ids)
    cut, whole = model.embed([text, kept], truncate=True)
    assert cut @ whole > 0.99999


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"texts": "a text"}, "a list of texts"),
        ({"texts": [b"bytes"]}, "a list of texts"),
        ({"texts": ["x"], "kind": "question"}, "kind is 'question'; .* query, document, STS"),
        ({"texts": ["x"], "dimensions": 100}, "dimensions is 100; .* 256, 128"),
        ({"texts": ["x"], "dimensions": True}, "dimensions is True"),
    ],
)
def test_what_embed_refuses(model, given, message):
    with pytest.raises(UsageError, match=message):
        model.embed(**given)


def test_it_generates_nothing(model):
    name = model.bundle.manifest.name
    for call in (
        lambda: list(model.generate("a")),
        lambda: model.chat(),
        lambda: model.session(),
        lambda: list(model.evaluate("a")),
        lambda: model.classify("a"),
        lambda: model.generate_batch(["a"]),
    ):
        with pytest.raises(UnsupportedModel, match=f"{name} embeds texts and generates none"):
            call()


def test_a_bundle_that_generates_embeds_nothing(tiny_model):
    with pytest.raises(UnsupportedModel, match="cannot embed; EmbeddingGemma can"):
        tiny_model.embed(["a"])


# --- converting ---


def test_what_the_bundle_says(embedding_bundle):
    manifest = Bundle.open(embedding_bundle).manifest
    part = manifest.embedding
    assert manifest.family == "gemma-embedding" and not manifest.instruct
    assert (part.width, part.dimensions, part.max_tokens) == (256, (256, 128), 2048)
    assert part.dense == ((256, 1024), (1024, 256)) and part.normalize and part.add_eos
    assert part.prompts == made.PROMPTS and part.default_prompt is None
    (table,) = [t for t in manifest.decoder.tensors if t.name == "token_embd.weight"]
    assert table.use == "lookup"
    described = describe(embedding_bundle / "decoder.gguf").embedding
    assert described.dense == part.dense and described.add_eos and described.add_bos


def test_a_default_prompt_is_used(checkpoint, tmp_path):
    change(checkpoint / "config_sentence_transformers.json", default_prompt_name="query")
    bundle = convert(checkpoint, tmp_path / "bundle", Conversion("f32", verify=False)).bundle
    with edge_gemma.load(bundle, n_ctx=1024, request=ONE_THREAD) as model:
        assert cosines(model.embed(made.TEXTS), "small/query").min() > 0.99999


def test_saved_by_sentence_transformers_6(checkpoint, tmp_path):
    """Pooling by one key, modules by their new paths, and no flags in tokenizer_config.json."""
    pooling = {"embedding_dimension": 256, "pooling_mode": "mean", "include_prompt": True}
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = json.loads((checkpoint / "modules.json").read_text())
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        module["type"] = f"sentence_transformers.sentence_transformer.modules.{kind}"
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    (checkpoint / "tokenizer_config.json").unlink()
    bundle = convert(checkpoint, tmp_path / "bundle", Conversion("f32", verify=False)).bundle
    part = bundle.manifest.embedding
    assert (part.add_bos, part.add_eos, part.pooling) == (True, True, "mean")


def test_without_tokenizer_json_the_flags_count(checkpoint, tmp_path):
    (checkpoint / "tokenizer.json").unlink()
    change(checkpoint / "tokenizer_config.json", add_eos_token=False)
    bundle = convert(checkpoint, tmp_path / "bundle", Conversion("f32", verify=False)).bundle
    assert not bundle.manifest.embedding.add_eos


def test_layer_kinds_out_of_the_pattern(checkpoint, tmp_path):
    kinds = ["full_attention", *["sliding_attention"] * 5, "full_attention"]
    change(checkpoint / "config.json", layer_types=kinds)
    bundle = convert(checkpoint, tmp_path / "bundle", Conversion("f32", verify=False)).bundle
    assert [kind == "global" for kind in bundle.manifest.decoder.kv_layers] == [
        kind == "full_attention" for kind in kinds
    ]
    with edge_gemma.load(bundle, n_ctx=1024, request=ONE_THREAD) as model:
        (vector,) = model.embed([made.LONG], kind="query")
    assert vector @ answers()["small/query"][-1] < 0.9999


def without_modules(folder: Path) -> None:
    (folder / "modules.json").unlink()


def without_dense(folder: Path) -> None:
    (folder / "3_Dense" / "model.safetensors").unlink()


def with_a_bias(folder: Path) -> None:
    change(folder / "2_Dense" / "config.json", bias=True)


def with_tanh(folder: Path) -> None:
    change(folder / "2_Dense" / "config.json", activation_function="torch.nn.modules.Tanh")


def with_other_features(folder: Path) -> None:
    change(folder / "3_Dense" / "config.json", in_features=12)


def with_cls_pooling(folder: Path) -> None:
    change(
        folder / "1_Pooling" / "config.json",
        pooling_mode_cls_token=True,
        pooling_mode_mean_tokens=False,
    )


def without_the_prompt(folder: Path) -> None:
    change(folder / "1_Pooling" / "config.json", include_prompt=False)


def with_a_module(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[4]["type"] = "sentence_transformers.models.LayerNorm"
    (folder / "modules.json").write_text(json.dumps(modules))


def with_one_dense_layer(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    del modules[3]
    (folder / "modules.json").write_text(json.dumps(modules))


def outside(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["path"] = "../2_Dense"
    (folder / "modules.json").write_text(json.dumps(modules))


def with_an_unknown_prompt(folder: Path) -> None:
    change(folder / "config_sentence_transformers.json", default_prompt_name="other")


REFUSED = {
    without_modules: "has no modules.json",
    without_dense: "3_Dense lacks config.json or model.safetensors",
    with_a_bias: "bias; EmbeddingGemma's layers are products alone",
    with_tanh: "activation 'Tanh'",
    with_other_features: r"its config says \[256, 12\]",
    with_cls_pooling: r"pooling by \['cls'\]",
    without_the_prompt: "include_prompt is false",
    with_a_module: "the module 'sentence_transformers.models.LayerNorm'",
    with_one_dense_layer: "lists Transformer, Pooling, Dense, Normalize",
    outside: "places a module in '../2_Dense'",
    with_an_unknown_prompt: "default_prompt_name 'other'",
}


@pytest.mark.compat(
    kind="family",
    what="EmbeddingGemma with missing files, another pooling, activation or module",
    happens="refused, naming it",
)
@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_is_no_embedding_gemma_is_refused(spoil, checkpoint, tmp_path):
    spoil(checkpoint)
    with pytest.raises((CheckpointError, UnsupportedModel), match=REFUSED[spoil]):
        convert(checkpoint, tmp_path / "bundle", Conversion(verify=False))
    assert not (tmp_path / "bundle").exists()


def test_a_receipt_and_a_calibration_are_refused(checkpoint, embedding_bundle, tmp_path):
    from edge_gemma.convert.imatrix import calibrate

    text = tmp_path / "text"
    text.write_text("text")
    with pytest.raises(UsageError, match="an embedding model continues none"):
        convert(checkpoint, tmp_path / "bundle", Conversion(check=text))
    with pytest.raises(UnsupportedModel, match="embeds texts and generates none"):
        calibrate(Bundle.open(embedding_bundle), text, tmp_path / "out.gguf")


def test_recipes_with_a_separate_head_make_none(checkpoint, tmp_path):
    """The table is only looked up: it has the type of the recipe's tables."""
    bundle = convert(checkpoint, tmp_path / "bundle", Conversion("edge", verify=False)).bundle
    types = {tensor.name: tensor.type for tensor in bundle.manifest.decoder.tensors}
    assert "output.weight" not in types and types["token_embd.weight"] == "Q8_0"
    assert types["dense_2.weight"] == types["dense_3.weight"] == "F16"


# --- GGUFs from elsewhere ---


@pytest.mark.compat(
    kind="gguf", what="EmbeddingGemma (gemma-embedding)", happens="imports; the same vectors"
)
def test_a_gguf_is_imported(embedding_bundle, tmp_path):
    bundle = import_gguf(embedding_bundle / "decoder.gguf", tmp_path / "bundle")
    said = " ".join(bundle.manifest.notes)
    assert "dense" not in said and "template" not in said and bundle.manifest.embedding.add_eos
    with edge_gemma.load(bundle, n_ctx=1024, request=ONE_THREAD) as model:
        vectors = model.embed(made.TEXTS, kind="document")
    assert cosines(vectors, "small/document").min() > 0.99999


@pytest.mark.compat(
    kind="gguf",
    what="EmbeddingGemma without its dense layers",
    happens="imports; said that its vectors differ from sentence-transformers'",
)
def test_a_gguf_without_dense_layers(checkpoint, tmp_path):
    modules = json.loads((checkpoint / "modules.json").read_text())
    kept = [module for module in modules if not module["type"].endswith("Dense")]
    (checkpoint / "modules.json").write_text(json.dumps(kept))
    plain = convert(checkpoint, tmp_path / "plain", Conversion("f32", verify=False)).bundle
    bundle = import_gguf(plain.decoder_path, tmp_path / "bundle")
    assert bundle.manifest.embedding.dense == ()
    assert any("no dense layers" in note for note in bundle.manifest.notes)
    with edge_gemma.load(bundle, n_ctx=1024, request=ONE_THREAD) as model:
        vectors = model.embed(made.TEXTS, kind="query")
    assert cosines(vectors, "small/query").max() < 0.9


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pooling_type", ggufs.scalar(ggufs.UINT32, 2)),
        ("attention.causal", ggufs.scalar(ggufs.BOOL, True)),
        ("dense_2_feat_out", ggufs.scalar(ggufs.UINT32, 512)),
        ("dense_3_feat_out", ggufs.scalar(ggufs.UINT32, 512)),
        ("attention.sliding_window", None),
    ],
)
def test_a_gguf_that_contradicts_itself_is_refused(key, value, embedding_bundle, tmp_path):
    parts = ggufs.Parts.read(embedding_bundle / "decoder.gguf")
    path = parts.with_value(f"gemma-embedding.{key}", value).write(tmp_path / "x.gguf")
    with pytest.raises(EdgeGemmaError, match="gemma-embedding|header's numbers"):
        describe(path)


# --- plan and memory ---


def costs(bundle: Path) -> Costs:
    manifest = Bundle.open(bundle).manifest
    return Costs(manifest, find_device("auto"), PlanRequest(), repacked_here)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("n_ctx", [128, 512, 2048])
def test_the_plan_knows_the_compute_buffers(n_ctx, flash, embedding_bundle):
    settings = Settings(n_ctx=n_ctx, n_ubatch=n_ctx, flash_attention=flash)
    decoder = Decoder(embedding_bundle / "decoder.gguf", settings)
    library.forget_log()
    decoder.embedder()
    reserved = decoder.reported_bytes()["CPU compute"]
    decoder.close()
    graph_bytes = 7 * 128 * 1024  # beside what llama.cpp reports
    planned = costs(embedding_bundle).compute_bytes(settings) - graph_bytes
    assert abs(planned - reserved) < 0.02 * reserved


def test_the_plan_of_a_bundle_that_embeds(embedding_bundle):
    plan = edge_gemma.plan_bundle(embedding_bundle)
    assert plan.settings.n_ctx == plan.settings.n_ubatch == 2048
    assert {item.name for item in plan.items if item.name.startswith(("KV", "logits"))} == set()
    tight = edge_gemma.plan_bundle(embedding_bundle, budget=plan.needed_bytes - 20 * MiB)
    assert tight.fits and tight.settings.n_ctx == tight.settings.n_ubatch < 2048
    assert tight.concessions == (f"texts of at most {tight.settings.n_ctx} tokens",)
    small = edge_gemma.plan_bundle(embedding_bundle, budget="60MiB")
    assert not small.fits and "does not fit" in small.refusal
    with pytest.raises(UsageError, match="n_ubatch is 64; .* it is n_ctx"):
        edge_gemma.plan_bundle(embedding_bundle, request=PlanRequest(n_ubatch=64))


def test_the_table_that_is_loaded_as_a_head_is_counted(embedding_checkpoint, tmp_path):
    """llama.cpp repacks a second copy of the token table, which nothing reads."""
    recipe = Recipe(about="", matrix="Q4_0", head="IQ4_NL")
    options = Conversion(recipe, verify=False)
    bundle = convert(embedding_checkpoint, tmp_path / "bundle", options).bundle
    decoder = Decoder(bundle.decoder_path, Settings(n_ctx=64))
    reported = decoder.reported_bytes().get("CPU_REPACK model", 0)
    decoder.close()
    manifest = bundle.manifest
    counted = [t for t in manifest.decoder.tensors if is_loaded_to_multiply(manifest, t)]
    planned = sum(t.nbytes for t in counted if repacked_here(t))
    assert abs(planned - reported) < 20_000
    device: Device = find_device("auto")
    plan = make_plan(manifest, device, PlanRequest(n_ctx=128), repacked_here)
    repacked = sum(item.bytes for item in plan.items if item.name == "weights, repacked")
    assert repacked == planned


def test_logits_that_nothing_writes_take_no_memory():
    """Addresses without pages, for the thread and the sizes that were named; else ggml's own."""
    row_bytes, g = 4 * 262_144 + 4 * 768, library.ggml()
    outputs = output_rows.UnwrittenOutputs(row_bytes)
    kind = g["ggml_backend_cpu_buffer_type"]()
    before = footprint().anon_bytes
    found: list[int] = []

    def first_bytes(n_bytes: int) -> int:
        buffer = g["ggml_backend_buft_alloc_buffer"](kind, n_bytes)
        g["ggml_backend_buffer_clear"](buffer, 7)
        base = g["ggml_backend_buffer_get_base"](buffer)
        value = output_rows.ctypes.c_uint8.from_address(base).value
        g["ggml_backend_buffer_free"](buffer)
        return value

    with outputs.reserving():
        assert first_bytes(1000 * row_bytes) == 0  # not filled: 1 GiB stays untouched
        assert footprint().anon_bytes - before < 8 * MiB
        assert first_bytes(row_bytes + 32) == 7
        other = threading.Thread(target=lambda: found.append(first_bytes(row_bytes)))
        other.start()
        other.join()
    assert found == [7] and first_bytes(row_bytes) == 7
    outputs.close()


def test_it_is_used(embedding_bundle):
    decoder = Decoder(embedding_bundle / "decoder.gguf", Settings(n_ctx=512, n_ubatch=512))
    decoder.embedder().embed([[2] * 512])
    assert {name for name in decoder.reported_bytes() if "output" in name} == {"CPU_Mapped output"}
    decoder.close()


# --- the command ---


@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_the_command(run, embedding_bundle, tmp_path, monkeypatch):
    few = ("--ctx", 512, "--threads", 1)
    code, out, _ = run("embed", embedding_bundle, *made.TEXTS[:2], "--query", "--json", *few)
    record = json.loads(out)
    vectors = np.array(record.pop("vectors"), np.float32)
    assert code == 0 and record == {"texts": 2, "dimensions": 256, "prompt": "query"}
    assert np.abs(vectors - answers()["small/query"][:2]).max() < 5e-4
    path = tmp_path / "vectors.npy"
    arguments = ("--document", "--dimensions", 128, "--npy", path)
    code, out, err = run("embed", embedding_bundle, "a", "b", "c", *arguments, *few)
    assert code == 0 and out == "" and "3 vectors of 128 numbers" in err
    assert np.load(path).shape == (3, 128)
    lines = tmp_path / "lines"
    lines.write_text("one\ntwo\n")
    with open(lines) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        code, out, _ = run("embed", embedding_bundle, *few)
    rows = [line.split(" ") for line in out.splitlines()]
    assert code == 0 and [len(row) for row in rows] == [256, 256]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("a", "--query", "--document"), 2, "one of --query, --document and --kind"),
        (("a", "--kind", "other"), 2, "kind is 'other'"),
        (("a", "--dimensions", 5), 2, "dimensions is 5"),
        (("river " * 999, "--ctx", 512), 2, "split it"),
    ],
)
def test_what_the_command_refuses(run, embedding_bundle, arguments, code, message):
    found, _, err = run("embed", embedding_bundle, *arguments)
    assert found == code and message in err


def test_commands_on_the_wrong_bundle(run, tiny_bundle, embedding_bundle):
    code, _, err = run("embed", tiny_bundle, "a")
    assert code == 3 and "cannot embed" in err
    for command in (("run", embedding_bundle, "a"), ("chat", embedding_bundle)):
        code, _, err = run(*command)
        assert code == 3 and "embeds texts and generates none" in err
    code, out, _ = run("inspect", embedding_bundle)
    assert code == 0 and "256, 128 numbers; mean of the tokens, 2 dense layers" in out
