"""The ONNX engine: its answers are transformers', and what it cannot take is refused by name.

What both engines do alike is tested in both: test_session.py, test_sample.py, test_drafts.py.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import onnx
import pytest
from checkpoints import REFERENCE, write_checkpoint

import edge_gemma
from edge_gemma import PlanRequest, Rows, Sampling, Tokens
from edge_gemma.bundles.folder import Bundle, file_entry
from edge_gemma.bundles.manifest import MANIFEST
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.engines.onnx import runtime
from edge_gemma.engines.onnx.graph_file import read_graph_file
from edge_gemma.engines.onnx.row_table import Table
from edge_gemma.errors import (
    BundleError,
    Cancelled,
    HashMismatch,
    RuntimeFailure,
    UnsupportedModel,
    UsageError,
)
from edge_gemma.prompts.prompt import read_special_rows

TOLERANCE = 1e-3  # of f32 logits against transformers
GREEDY = Sampling(temperature=0, max_tokens=16)


def load(bundle, n_ctx=512, **wanted):
    request = PlanRequest(n_threads=1, **wanted)
    return edge_gemma.load(bundle, engine="onnx", n_ctx=n_ctx, request=request)


def ids(chunks) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


@pytest.fixture(scope="module")
def gemma3n_bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("g3n")
    write_checkpoint("g3n", folder / "checkpoint", keep=lambda name: "_tower" not in name)
    options = Conversion(
        quant="f32", decoder="both", onnx_quant="f32", audio="none", vision="none", verify=False
    )
    return convert(folder / "checkpoint", folder / "bundle", options).bundle.folder


@pytest.fixture(scope="module")
def gemma3n(gemma3n_bundle):
    with load(gemma3n_bundle) as model:
        yield model


@pytest.fixture(scope="module", params=["g3text", "g3n"])
def answering(request):
    """A model and transformers' answers."""
    name = {"g3text": "onnx_model", "g3n": "gemma3n"}[request.param]
    reference = np.load(REFERENCE / f"{request.param}-text.npz")
    return request.getfixturevalue(name), reference


@pytest.mark.compat(
    kind="checkpoint",
    what="`decoder.onnx` in edge-gemma itself",
    happens="`--engine onnx`: float32 logits within 0.001 of transformers'",
)
def test_logits_are_those_of_transformers(answering):
    model, reference = answering
    tokens = reference["input_ids"]
    rows = range(len(tokens) - 8, len(tokens))
    found = np.concatenate([*model.evaluate([Tokens(tokens.tolist())], rows=rows)])
    assert np.abs(found - reference["logits_last8"]).max() < TOLERANCE


def test_greedy_answers_are_those_of_transformers(answering):
    model, reference = answering
    prompt = [Tokens(reference["input_ids"][:40].tolist())]
    expected = reference["greedy"].tolist()
    if model.bundle.manifest.family == "gemma3n":  # up to its first soft token, which is no text
        expected = expected[: next(k for k, token in enumerate(expected) if token >= 768) + 1]
    assert ids(model.generate(prompt, GREEDY))[: len(expected)] == expected


@pytest.mark.parametrize("seconds", ["0.9", "6.3"])
def test_soft_tokens_answer_as_transformers(gemma3n, seconds):
    """Rows of an encoder have the per-layer embeddings of padding."""
    reference = np.load(REFERENCE / "g3n-audio.npz")
    prompt, soft = reference[f"audio_prompt_{seconds}"].tolist(), reference[f"audio_soft_{seconds}"]
    special, n = read_special_rows(gemma3n.bundle), 188
    n_vocab = gemma3n.bundle.manifest.decoder.n_vocab
    first = next(k for k, t in enumerate(prompt) if t >= n_vocab or prompt.count(t) == n)
    padding = [special["audio_padding"][None]] * (n - len(soft))
    rows = np.concatenate([soft, *padding, special["end_of_audio"][None]])
    spans = [Tokens(prompt[:first]), Rows(rows), Tokens(prompt[first + n + 1 :])]
    wanted = range(len(prompt) - 4, len(prompt))
    logits = np.concatenate([*gemma3n.evaluate(spans, rows=wanted)])
    assert np.abs(logits - reference[f"audio_logits_{seconds}"]).max() < TOLERANCE


def test_one_run_or_many_give_the_same_numbers(onnx_model):
    prompt = Tokens([2, *range(300, 420)])
    with onnx_model.session() as whole, onnx_model.session() as pieces:
        whole.append([prompt])
        expected = whole.logits()
        for token in prompt.ids:
            pieces.append([Tokens([token])])
        assert np.abs(pieces.logits() - expected).max() < TOLERANCE


def test_going_back_is_exact_to_the_bit(onnx_model):
    """Also behind the sliding window: every layer keeps all positions."""
    context = onnx_model.decoder.context(onnx_model.plan.settings)
    prompt = Tokens([2, *range(300, 500)])
    context.decode(0, 0, prompt, outputs="last")
    expected = context.logits().copy()
    context.decode(0, 201, Tokens([*range(500, 600)]))
    assert context.length(0) == 301
    assert context.can_rewind(0, 200) and context.rewind(0, 200)
    context.decode(0, 200, Tokens(prompt.ids[-1:]), outputs="last")
    # one row and many round differently
    np.testing.assert_allclose(context.logits(), expected, atol=TOLERANCE)
    assert not context.rewind(0, 400) and context.length(0) == 0
    context.close()


def test_a_sequence_is_saved_and_restored(onnx_model):
    settings = dataclasses.replace(onnx_model.plan.settings, n_seq_max=2)
    context = onnx_model.decoder.context(settings)
    context.decode(0, 0, Tokens([2, *range(300, 400)]))
    state = context.save(0)
    assert len(state) == context.state_bytes(0)
    context.decode(0, 101, Tokens([7]), outputs="last")
    expected = context.logits().copy()
    assert context.restore(1, state) and context.length(1) == 101
    context.decode(1, 101, Tokens([7]), outputs="last")
    np.testing.assert_array_equal(context.logits(), expected)
    # with damage it is not taken, and the sequence is empty
    for damaged in (b"", bytes(state)[:-4], b"\0" * len(state), bytes(state) + b"\0\0\0\0"):
        assert not context.restore(1, damaged) and context.length(1) == 0
    window = context.save_window(0)
    context.decode(0, 102, Tokens([8, 9]))
    assert not context.restore_window(0, window, 50)  # it is of 102 positions
    assert context.length(0) == 0
    context.close()


def test_cancelling_keeps_what_was_decoded(onnx_model):
    settings = dataclasses.replace(onnx_model.plan.settings, n_ubatch=16)
    context = onnx_model.decoder.context(settings)
    context.decode(0, 0, Tokens([2, 300]))
    context.cancel()
    with pytest.raises(Cancelled) as stopped:
        context.decode(0, 2, Tokens([*range(300, 400)]))
    assert stopped.value.position == 2 == context.length(0)
    with pytest.raises(Cancelled):
        context.decode_step([(0, 2, [300])])
    context.clear_cancel()
    context.decode(0, 2, Tokens([301]), outputs="last")
    assert np.isfinite(context.logits()).all()
    context.close()


def test_lanes_answer_as_each_alone(onnx_model):
    settings = dataclasses.replace(onnx_model.plan.settings, n_seq_max=3)
    context = onnx_model.decoder.context(settings, n_outputs=6)
    prompts = [Tokens([2, *range(300 + 10 * k, 330 + 20 * k)]) for k in range(3)]
    for k, prompt in enumerate(prompts):
        context.decode(k, 0, prompt)
    context.decode_step([(k, len(prompts[k]), [9, 10]) for k in (2, 0, 1)], every=True)
    found = [context.logits(row).copy() for row in range(6)]
    for row, k in enumerate((2, 0, 1)):
        context.clear(k)
        spans = [prompts[k], Tokens([9, 10])]
        alone = np.concatenate([*onnx_model.evaluate(spans)])[-2:]
        assert np.abs(np.stack(found[2 * row : 2 * row + 2]) - alone).max() < TOLERANCE
    context.close()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c: c.decode(0, 5, Tokens([2])), "there is a gap"),
        (lambda c: c.decode(1, 0, Tokens([2])), "sequence 1; this context has 1"),
        (lambda c: c.decode(0, 0, Tokens([-1])), "token ids must be 0"),
        (lambda c: c.decode(0, 0, Tokens([768])), "token ids must be 0"),
        (lambda c: c.decode(0, 0, Rows(np.zeros((1, 3)))), "3 wide; this model takes 256"),
        (lambda c: c.decode(0, 0, Tokens([2] * 600)), "no room for"),
        (lambda c: c.decode_step([(0, 0, [2] * 300)]), "n_ubatch is 256"),
        (lambda c: c.decode_step([(0, 0, [2] * 9)], every=True), "9 logits rows asked"),
        (lambda c: c.logits(), "no logits are kept"),
        (
            lambda c: c.decode(0, 0, Rows(np.zeros((2, 256)), causal=False)),
            "attend to each other .* do not run in this bundle's decoder.onnx",
        ),
    ],
)
def test_nonsense_is_refused_by_a_context(call, says, onnx_model):
    context = onnx_model.decoder.context(onnx_model.plan.settings)
    with pytest.raises((UsageError, RuntimeFailure, UnsupportedModel), match=says):
        call(context)
    context.clear(0)
    context.decode(0, 0, Tokens([2, 300]), outputs="last")
    assert np.isfinite(context.logits()).all()
    context.close()
    with pytest.raises(RuntimeFailure, match="was closed"):
        context.decode(0, 2, Tokens([2]))


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"kv_type": "q8_0"}, "has no KV cache in q8_0"),
        ({"n_gpu_layers": 4}, "layers on a GPU"),
        ({"lora_bytes": 5}, "has no LoRA files"),
        ({"repack": True}, "no choice of repacked"),
        ({"encoders": "hear first"}, "no hearing first"),
        ({"engine": "tflite"}, "engine 'tflite' is unknown"),
    ],
)
def test_what_the_engine_does_not_do_is_refused_before_loading(wanted, says, both_bundle):
    with pytest.raises(UsageError, match=says):
        edge_gemma.plan_bundle(both_bundle, request=PlanRequest(**{"engine": "onnx", **wanted}))


def test_a_bundle_without_it_says_how_it_gets_one(tiny_bundle):
    with pytest.raises(UsageError, match="holds no ONNX decoder; convert it with --decoder both"):
        edge_gemma.load(tiny_bundle, engine="onnx")
    assert edge_gemma.plan_bundle(tiny_bundle, engine="auto").settings.engine == "llama"


def test_an_old_onnxruntime_is_refused_by_its_version(both_bundle, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.30.0")
    with pytest.raises(UsageError, match=r"1\.30\.0 is installed; the ONNX engine needs 1\.31\.1"):
        load(both_bundle)


# --- foreign and damaged files


@pytest.fixture
def damaged(both_bundle, tmp_path):
    """A copy of the bundle, and what signs it again after a change."""
    folder = tmp_path / "damaged"
    shutil.copytree(both_bundle, folder)

    def sign(**part) -> Bundle:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        for name in manifest["files"]:
            entry = file_entry(folder / name)
            manifest["files"][name] = {"size": entry.size, "sha256": entry.sha256}
        manifest["onnx"] |= part
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return Bundle.open(folder)

    return folder, sign


def changed_graph(folder, change) -> None:
    path = folder / "decoder.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def external(model):
    return next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)


def set_place(model, key, value):
    next(entry for entry in external(model).external_data if entry.key == key).value = value


def add_operator(model, op, domain=""):
    model.graph.node.append(onnx.helper.make_node(op, ["logits"], ["x"], domain=domain))


CHANGES = {
    "outside": (lambda m: set_place(m, "location", "../../etc/passwd"), "lies in '../../etc/passw"),
    "absolute": (lambda m: set_place(m, "location", "/etc/passwd"), "lies in '/etc/passwd'"),
    "beyond": (lambda m: set_place(m, "offset", str(1 << 40)), "ends at byte 1099"),
    "before": (lambda m: set_place(m, "offset", "-65536"), "ends at byte"),
    "no number": (lambda m: set_place(m, "offset", "much"), "is no ONNX graph"),
    "short": (lambda m: set_place(m, "length", "4"), "has 4 bytes; its shape asks"),
    "huge": (lambda m: external(m).dims.append(1 << 40), "its shape asks"),
    "type": (lambda m: setattr(external(m), "data_type", 8), "is of the type 8"),
    "loop": (lambda m: add_operator(m, "Loop"), "the operator Loop"),
    "own": (lambda m: add_operator(m, "Shell", "evil"), "the operator evil.Shell"),
    "function": (
        lambda m: m.functions.append(onnx.FunctionProto(name="f", domain="g")),
        "functions or training",
    ),
    "subgraph": (
        lambda m: m.graph.node[0].attribute.append(
            onnx.helper.make_attribute("body", onnx.GraphProto())
        ),
        "attribute holds a tensor or a graph",
    ),
    "inputs": (
        lambda m: m.graph.input.append(
            onnx.helper.make_tensor_value_info("past_key_values.99.key", 1, [1])
        ),
        "do not fit the decoder of its manifest: past_key_values.99.key",
    ),
    "no graph": (lambda m: m.ClearField("graph"), "holds no graph"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_foreign_graph_is_refused_before_onnxruntime_reads_it(what, damaged, monkeypatch):
    folder, sign = damaged
    change, says = CHANGES[what]
    changed_graph(folder, change)
    monkeypatch.setattr(
        "edge_gemma.engines.onnx.weights.open_decoder", lambda *a, **k: pytest.fail("was opened")
    )
    with pytest.raises(BundleError, match=says):
        load(sign())


def test_cut_and_random_graphs_are_refused(both_bundle, tmp_path):
    whole = (both_bundle / "decoder.onnx").read_bytes()
    data = both_bundle / "decoder.onnx.data"
    path = tmp_path / "decoder.onnx"
    random = np.random.default_rng(3)
    cut = [whole[: int(n)] for n in random.integers(0, len(whole), 40)]
    noise = [random.bytes(300) for _ in range(40)]
    for contents in [*cut, *noise, b"", b"\xff" * 40]:
        path.write_bytes(contents)
        try:
            found = read_graph_file(path, data)
        except BundleError:
            continue
        assert len(found.inputs) < 10 + len(
            whole
        )  # cut between two fields: what is left is a graph


def test_a_graph_that_is_not_the_manifests_is_refused(damaged):
    folder, _ = damaged
    path = folder / "decoder.onnx"
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    with pytest.raises(HashMismatch, match="was changed or damaged"):
        load(folder)
    path.write_bytes(contents[:-1])
    with pytest.raises(BundleError, match="truncated or replaced"):
        load(folder)


def test_two_decoders_of_different_weights_are_refused(damaged):
    """A fine-tune's GGUF in place of the one that the graph was converted with."""
    folder, sign = damaged
    path = folder / "decoder.gguf"
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)
    with pytest.raises(BundleError, match="not the file that the ONNX decoder was converted with"):
        sign()
    assert sign(decoder_sha256="").manifest.onnx is not None  # from before the field


def test_tables_of_another_model_are_refused(damaged):
    folder, sign = damaged
    part = json.loads((folder / MANIFEST).read_bytes())["onnx"]
    with pytest.raises(BundleError, match="has 400 rows of 256; its decoder takes 768"):
        load(sign(embeddings=part["embeddings"] | {"n_rows": 400}))
    with pytest.raises(BundleError, match="bytes; 768 rows of 256 values in Q8_0 take"):
        load(sign(embeddings=part["embeddings"] | {"type": "Q8_0"}))


def test_weights_that_are_no_numbers_are_noticed(damaged):
    folder, sign = damaged
    path = folder / "decoder.onnx.data"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with load(sign()) as model, pytest.raises(RuntimeFailure, match="logits that are no numbers"):
        list(model.generate("abc", GREEDY))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_rows_are_what_the_table_says(kind, tmp_path):
    from gguf import GGMLQuantizationType, dequantize

    from edge_gemma.bundles.manifest import RowTable
    from edge_gemma.convert.quantize import quantize_rows

    rows = np.random.default_rng(4).standard_normal((20, 64)).astype(np.float32)
    stored = quantize_rows(kind, rows)
    path = tmp_path / "rows"
    path.write_bytes(np.ascontiguousarray(stored).tobytes())
    table = Table(path, RowTable(file="rows", type=kind, n_rows=20, n_per_row=64), 8.0)
    out = np.zeros((3, 64), np.float32)
    table.read([4, 4, 19], out)
    raw = np.frombuffer(path.read_bytes(), np.uint8).reshape(20, -1)
    values = dequantize(raw, GGMLQuantizationType[kind])
    np.testing.assert_array_equal(out, values[[4, 4, 19]] * np.float32(8))
    table.prefetch([1, 19])
    table.trim()
    table.close()


def test_the_library_is_named_with_its_version():
    assert runtime.version().startswith("onnxruntime 1.")


def test_an_encoder_has_no_arena_and_a_decoder_one_that_is_emptied(onnx_model):
    """An arena that nobody empties keeps what the largest run took."""
    path = onnx_model.bundle.path(onnx_model.bundle.manifest.onnx.file)
    encoder = runtime.open_onnx(path, n_threads=1, in_place=True).get_session_options()
    decoder = runtime.open_decoder(path, n_threads=1).get_session_options()
    assert (encoder.enable_cpu_mem_arena, decoder.enable_cpu_mem_arena) == (False, True)
    key = "memory.enable_memory_arena_shrinkage"
    assert runtime.run_options(empties_arena=True).get_run_config_entry(key) == "cpu:0"
