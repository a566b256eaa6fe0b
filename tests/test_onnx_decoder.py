"""``decoder.onnx`` answers as transformers does, and its quantized weights are the GGUF's."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from checkpoints import REFERENCE, recipe, write_checkpoint

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.gguf import TYPE_SIZES
from edge_gemma.bundles.manifest import RowTable
from edge_gemma.convert.checkpoint import Checkpoint
from edge_gemma.convert.gemma import map_tensors, read_dims
from edge_gemma.convert.onnx_decoder import write_onnx_decoder
from edge_gemma.convert.onnx_weights import onnx_blocks, plan_onnx
from edge_gemma.convert.onnx_writer import MICROSOFT, OPSET_OF_BLOCKS, OnnxWriter
from edge_gemma.convert.pipeline import Conversion, convert, prepare
from edge_gemma.convert.quantize import quantize_rows
from edge_gemma.convert.recipe import read_recipe
from edge_gemma.convert.zero_points import around_zero_points
from edge_gemma.engines.onnx.runtime import open_onnx, run_onnx
from edge_gemma.errors import BundleError, RuntimeFailure, UnsupportedModel, UsageError

TOLERANCE = 1e-3  # of f32 logits against transformers


class Runner:
    """The graph over a cache that grows: what any host of such files does."""

    def __init__(self, folder, part):
        self.part, self.folder = part, folder
        self.graph = open_onnx(folder / part.file, n_threads=1)
        self.inputs = {value.name: value for value in self.graph.get_inputs()}
        self.outputs = [value.name for value in self.graph.get_outputs()]
        self.past = {
            name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for name, value in self.inputs.items()
            if name.startswith("past_key_values.")
        }
        self.length = 0

    def rows(self, table: RowTable, ids) -> np.ndarray:
        assert table.type == "F32"
        data = np.memmap(self.folder / table.file, np.float32, "r")
        return data.reshape(table.n_rows, table.n_per_row)[ids]

    def __call__(self, ids, keep: int = 0) -> np.ndarray:
        """Logits of the last ``keep`` ids (0: all)."""
        ids = np.asarray(ids)
        x = self.rows(self.part.embeddings, ids)
        self.length += len(ids)
        feeds = {
            "inputs_embeds": x[None] * np.float32(x.shape[1] ** 0.5),
            "attention_mask": np.ones((1, self.length), np.int64),
            "num_logits_to_keep": np.array(keep, np.int64),
            **self.past,
        }
        if self.part.per_layer:
            shape = self.inputs["per_layer_inputs"].shape[2:]
            rows = self.rows(self.part.per_layer, ids).reshape(1, len(ids), *shape)
            feeds["per_layer_inputs"] = rows * np.float32(shape[1] ** 0.5)
        found = dict(zip(self.outputs, run_onnx(self.graph, self.outputs, feeds), strict=True))
        self.past = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        return found["logits"][0]


def written(folder, name="g3text", recipe="f32", threads=2):
    checkpoint = Checkpoint.open(
        write_checkpoint(name, folder / "checkpoint", keep=lambda n: "_tower" not in n)
    )
    mapping = map_tensors(checkpoint, read_dims(checkpoint.config))
    plan = plan_onnx(mapping, read_recipe(recipe))
    return write_onnx_decoder(folder, plan, checkpoint, n_threads=threads), plan


@pytest.fixture(scope="module", params=["g3text", "g3mm", "g3n"])
def decoder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    part, _ = written(folder, request.param)
    return folder, part, np.load(REFERENCE / f"{request.param}-text.npz")


def test_logits_are_those_of_transformers(decoder):
    folder, part, reference = decoder
    logits = Runner(folder, part)(reference["input_ids"], keep=8)
    assert np.abs(logits - reference["logits_last8"]).max() < TOLERANCE


def test_in_pieces_and_token_by_token_they_are_the_same(decoder):
    folder, part, reference = decoder
    run, ids = Runner(folder, part), reference["input_ids"]
    run(ids[:100], keep=1)  # longer than a sliding window
    run(ids[100:-8], keep=1)
    logits = np.concatenate([run(ids[-8 + k : len(ids) - 7 + k], keep=1) for k in range(8)])
    assert np.abs(logits - reference["logits_last8"]).max() < TOLERANCE
    whole = Runner(folder, part)(ids, keep=0)
    assert whole.shape[0] == len(ids)
    assert np.abs(whole[-8:] - logits).max() < TOLERANCE


def test_greedy_answers_are_those_of_transformers(decoder):
    folder, part, reference = decoder
    run, found = Runner(folder, part), []
    ids = reference["input_ids"][:40]
    n_text = 768 if part.per_layer else part.embeddings.n_rows  # beyond are 3n's soft tokens
    while len(found) < len(reference["greedy"]) and max(ids) < n_text:
        ids = [int(run(ids, keep=1)[-1].argmax())]
        found += ids
    assert len(found) >= 2
    assert found == reference["greedy"][: len(found)].tolist()


def test_its_names_are_those_of_onnx_community(decoder):
    folder, part, _ = decoder
    graph = onnx.load(folder / part.file, load_external_data=False).graph
    inputs, outputs = ([value.name for value in side] for side in (graph.input, graph.output))
    layers = [name.split(".")[1] for name in inputs if name.endswith(".key")]
    caches = [f"{n}.{side}" for n in layers for side in ("key", "value")]
    assert sorted(outputs) == sorted(["logits", *(f"present.{name}" for name in caches)])
    first = ["inputs_embeds", *(["per_layer_inputs"] if part.per_layer else [])]
    others = ["attention_mask", "num_logits_to_keep"]
    assert inputs == first + others + [f"past_key_values.{name}" for name in caches]
    # transformers.js takes the batch for 0 where the dimension is called otherwise
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch_size"


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4)])
def test_blocks_mean_what_they_mean_in_a_gguf(kind, bits, tmp_path):
    rows = np.random.default_rng(5).standard_normal((6, 64)).astype(np.float32)
    blocks = quantize_rows(kind, rows)
    codes, scales = onnx_blocks(kind, blocks, len(rows))
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(6, 2, 32)
    ours = (codes.astype(np.float32) - (1 << (bits - 1))) * scales[:, :, None]
    from gguf import GGMLQuantizationType, dequantize

    theirs = dequantize(blocks.reshape(6, -1), GGMLQuantizationType[kind])
    np.testing.assert_array_equal(ours.reshape(6, 64), theirs)
    assert blocks.nbytes == 6 * 2 * TYPE_SIZES[kind][1]


class BlockRunner(Runner):
    """With tables in ggml's blocks."""

    def rows(self, table: RowTable, ids) -> np.ndarray:
        from gguf import GGMLQuantizationType, dequantize

        data = np.fromfile(self.folder / table.file, np.uint8).reshape(table.n_rows, -1)
        return dequantize(data[ids], GGMLQuantizationType[table.type])


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("g3text", "edge_onnx"), pytest.param("g3n", "q8_0", marks=pytest.mark.slow)],
)
def test_quantized_it_is_as_far_from_transformers_as_the_gguf(name, recipe, tmp_path):
    from test_convert import logits_of

    write_checkpoint(name, tmp_path / "checkpoint", keep=lambda n: "_tower" not in n)
    options = Conversion(
        quant=recipe, decoder="both", onnx_quant=recipe, audio="none", vision="none", verify=False
    )
    bundle = convert(tmp_path / "checkpoint", tmp_path / "bundle", options).bundle
    reference = np.load(REFERENCE / f"{name}-text.npz")
    ids, expected = reference["input_ids"], reference["logits_last8"]
    ours = BlockRunner(bundle.folder, bundle.manifest.onnx)(ids, keep=8)
    theirs = logits_of(bundle, ids)[-8:]
    far, as_far = (float((found - expected).std()) for found in (ours, theirs))
    assert 0 < far < 1.25 * as_far
    assert far < 0.5 * expected.std()


def test_the_global_layers_turn_more_slowly_under_linear_scaling(tmp_path):
    """Gemma 3 4B's rotary factor of 8, against llama.cpp on the same weights."""
    from test_convert import logits_of

    spec = recipe("g3text")
    spec["config"]["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    write_checkpoint(spec, tmp_path / "checkpoint")
    options = Conversion(quant="f32", decoder="both", onnx_quant="f32", verify=False)
    bundle = convert(tmp_path / "checkpoint", tmp_path / "bundle", options).bundle
    reference = np.load(REFERENCE / "g3text-text.npz")
    ids = reference["input_ids"]
    ours = Runner(bundle.folder, bundle.manifest.onnx)(ids, keep=8)
    theirs = logits_of(bundle, ids)[-8:]
    apart = np.abs(ours - theirs).max()
    effect = np.abs(ours - reference["logits_last8"]).max()  # those have no scaling
    assert apart < 0.04  # llama.cpp's GELU is a table of halves
    assert effect > 20 * apart  # else the comparison would not notice a wrong factor


@pytest.mark.parametrize(
    ("name", "kind"), [("g3text", "f32"), ("g3text", "edge_onnx"), ("g3n", "q8_0")]
)
def test_what_the_files_will_take_is_known_before(name, kind, tmp_path):
    _, plan = written(tmp_path, name, kind)
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    taken = sum(path.stat().st_size for path in files)
    # a recipe's matrices are so small that the gaps of 64 KiB count
    assert taken <= plan.total_bytes < 1.25 * taken + (1 << 20)


def test_half_precision_comes_near(tmp_path):
    part, _ = written(tmp_path, "g3text", "f16")
    reference = np.load(REFERENCE / "g3text-text.npz")
    logits = BlockRunner(tmp_path, part)(reference["input_ids"], keep=8)
    assert (logits - reference["logits_last8"]).std() < 0.01 * reference["logits_last8"].std()


def test_the_bytes_do_not_depend_on_threads(tmp_path):
    for threads in (1, 3):
        (tmp_path / str(threads)).mkdir()
        written(tmp_path / str(threads), recipe="edge_onnx", threads=threads)
    for name in ("decoder.onnx", "decoder.onnx.data", "embed_tokens.rows"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_a_bundle_with_both(tiny_checkpoint, tmp_path):
    options = Conversion(quant="q8_0", decoder="both", onnx_quant="f32")
    prepared = prepare(tiny_checkpoint, options)
    bundle = convert(tiny_checkpoint, tmp_path / "both", options).bundle
    bundle.verify()
    part = bundle.manifest.onnx
    assert part.recipe == "f32" and part.per_layer is None
    files = (part.file, f"{part.file}.data", part.embeddings.file)
    assert set(files) < set(bundle.manifest.files)
    assert bundle.total_bytes() < prepared.disk_bytes + (1 << 20)
    reference = np.load(REFERENCE / "g3text-text.npz")
    logits = Runner(bundle.folder, part)(reference["input_ids"], keep=8)
    assert np.abs(logits - reference["logits_last8"]).max() < TOLERANCE
    (bundle.folder / f"{part.file}.data").write_bytes(b"short")
    with pytest.raises(BundleError, match=r"decoder.onnx.data has 5 bytes, its manifest says"):
        Bundle.open(bundle.folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Conversion(decoder="tflite"), "--decoder tflite: expected gguf or both"),
        (Conversion(onnx_quant="f32"), "add --decoder both"),
        (Conversion(decoder="both", onnx_quant="q6_k"), "q6_k asks for Q6_K"),
        (Conversion(decoder="both", onnx_quant="nothing"), "no recipe 'nothing'"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(options, says, tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match=says):
        convert(tiny_checkpoint, tmp_path / "out", options)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tiny_checkpoint, tmp_path, monkeypatch):
    def full(self, piece):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edge_gemma.convert.onnx_writer.Reserved.put", full)
    with pytest.raises(RuntimeFailure, match="No space left on device"):
        convert(tiny_checkpoint, tmp_path / "out", Conversion(quant="f32", decoder="both"))
    assert not list(tmp_path.iterdir())


def test_types_without_an_operator_are_refused_by_name(tiny_checkpoint, embedding_checkpoint):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    mapping = map_tensors(checkpoint, read_dims(checkpoint.config))
    with pytest.raises(UsageError, match=r"q4_k_m asks for .*an ONNX decoder holds F32, F16"):
        plan_onnx(mapping, read_recipe("q4_k_m"))
    plan = plan_onnx(mapping, read_recipe("q4_0"))  # a head of Q6_K is written finer, and said
    assert set(plan.types.values()) <= {"F32", "F16", "Q8_0", "Q4_0"}
    assert any("are Q8_0 in place of Q6_K" in said for said in plan.notes)
    checkpoint = Checkpoint.open(embedding_checkpoint)
    mapping = map_tensors(checkpoint, read_dims(checkpoint.config))
    with pytest.raises(UnsupportedModel, match="embedding model has no ONNX decoder"):
        plan_onnx(mapping, read_recipe("f32"))


def in_numbers(codes, scales, zeros, k):
    """The values that MatMulNBits makes of its constants, by its documentation."""
    n, n_blocks = scales.shape
    unpacked = np.stack([codes & 15, codes >> 4], axis=-1).reshape(n, n_blocks, 32)
    around = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(n, -1)[:, :n_blocks]
    steps = unpacked.astype(np.float32) - around[..., None].astype(np.float32)
    return (steps * scales[..., None]).reshape(n, k)


@pytest.mark.parametrize("k", [64, 96, 640])
def test_zero_points_cost_less_than_none_and_are_what_the_operator_reads(k, tmp_path):
    rng = np.random.default_rng(k)
    rows = rng.standard_normal((24, k)).astype(np.float32) + rng.uniform(-1, 1, (24, 1))
    rows = rows.astype(np.float32)
    rows[0], rows[1, :32], rows[2] = 0.0, 1.0, -np.abs(rows[2])  # nothing, one value, one sign
    importance = rng.uniform(0.1, 4, k).astype(np.float32)
    codes, scales, zeros = around_zero_points(rows, importance)
    values = in_numbers(codes, scales, zeros, k)
    assert np.isfinite(scales).all() and not values[0].any()
    assert np.allclose(values[1, :32], 1.0)

    symmetric, plain = onnx_blocks("Q4_0", quantize_rows("Q4_0", rows, importance), len(rows))
    eights = np.full_like(zeros, 0x88)
    coarse = in_numbers(symmetric, plain, eights, k)
    error, coarser = (np.sum(importance * (rows - v) ** 2) for v in (values, coarse))
    assert error < 0.9 * coarser

    path = tmp_path / "product.onnx"
    with OnnxWriter(path, opset=OPSET_OF_BLOCKS) as writer:
        x = writer.input("x", np.float32, ["n", k])
        constants = [writer.constant(a, "w") for a in (codes, scales, zeros)]
        sizes = {"K": k, "N": len(rows), "bits": 4, "block_size": 32}
        y = writer.node("MatMulNBits", [x, *constants], domain=MICROSOFT, **sizes)
        writer.output("y", y, np.float32, ["n", len(rows)])
    found = run_onnx(open_onnx(path, n_threads=1), ["y"], {"x": np.eye(k, dtype=np.float32)})[0]
    assert np.allclose(found.T, values, atol=1e-6)
