"""Synthetic GGUF files: llama.cpp itself says whether they are right."""

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_gemma.benchmarks.dev import bundles, models, shapes, synthetic
from edge_gemma.benchmarks.dev.synthetic import SHAPES, Types, tensors, tiny_gguf
from edge_gemma.convert.checkpoint import Checkpoint
from edge_gemma.engines.llama.library import library
from edge_gemma.errors import UsageError


def logits(path, text=b"hello world"):
    """Logits of the last token, by llama.cpp as it comes. # [n_vocab] float32"""
    import llama_cpp

    # its log handler lives as long as the process; one of our own would be gone when other models
    # are closed
    library()
    model = llama_cpp.Llama(str(path), n_ctx=128, verbose=False, n_threads=1)
    try:
        model.eval(model.tokenize(text))
        return np.array(
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
        )
    finally:
        model.close()


@pytest.mark.parametrize("family", ["gemma3", "gemma3n"])
@pytest.mark.parametrize(
    "types", [Types(), Types(head="iq4_nl", embed="q8_0"), Types("q8_0", "q6_k", "q4_0")]
)
def test_llama_cpp_decodes_a_tiny_file(tmp_path, family, types):
    path = tiny_gguf(tmp_path / "tiny.gguf", family, types=types)
    found = logits(path)
    assert np.isfinite(found).all() and 1.0 < found.std() < 4.0
    assert np.argmax(found) != np.argmax(logits(path, b"other words"))


def test_layout_is_a_converted_files(tmp_path):
    """Never read, looked up, repackable, read as it lies."""
    path = tiny_gguf(tmp_path / "tiny.gguf", "gemma3n", types=Types(head="q4_0"))
    found = gguf.GGUFReader(path).tensors
    names = [tensor.name for tensor in found]
    assert (
        names[0] == "blk.20.attn_k.weight"
    )  # the first layer that shares its KV: present, never read
    assert names[6:8] == ["per_layer_token_embd.weight", "token_embd.weight"]
    apart = [tensor.tensor_type.name == "F32" or len(tensor.shape) == 3 for tensor in found[8:]]
    assert apart == sorted(apart) and any(apart) and not all(apart) and "output.weight" in names


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    a, b, c = (
        tiny_gguf(tmp_path / str(i), seed=seed).read_bytes() for i, seed in enumerate((1, 1, 2))
    )
    assert a == b != c


@pytest.mark.parametrize(
    "name",
    ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "iq4_xs", "q3_k", "q4_k", "q5_k", "q6_k"],
)
def test_random_blocks_have_the_asked_spread_and_no_bias(name):
    kind = synthetic._type(name)
    blocks = synthetic._blocks(np.random.Generator(np.random.PCG64(3)), kind, 2000, 0.25)
    values = gguf.dequantize(blocks, kind)
    assert values.std() == pytest.approx(0.25, rel=0.05)
    # a common mean would be multiplied by the row length in every matmul
    assert abs(values.mean()) < 0.25 * 0.05


def test_full_sizes_are_the_models():
    def parameters(size, **types):
        return sum(np.prod(spec.shape) for spec in tensors(SHAPES[size], Types(**types)))

    assert parameters("270m") == pytest.approx(268.1e6, rel=0.001)  # 268,098,176 in the sample
    assert parameters("1b") == pytest.approx(999.9e6, rel=0.001)
    assert parameters("4b") == pytest.approx(3.88e9, rel=0.001)  # 4.3 B less the vision tower
    assert parameters("e2b") == pytest.approx(4.46e9, rel=0.01)
    assert parameters("e4b") == pytest.approx(6.87e9, rel=0.01)


def test_refusals(tmp_path):
    with pytest.raises(UsageError, match="no size '7b'; the sizes are 270m, 1b, 4b, e2b, e4b"):
        synthetic.full_gguf(tmp_path / "x", "7b")
    with pytest.raises(UsageError, match="no GGML type 'q9_9'"):
        tiny_gguf(tmp_path / "x", types=Types("q9_9"))
    with pytest.raises(UsageError, match="iq1_s are not written here"):
        tiny_gguf(tmp_path / "x", types=Types("iq1_s"))
    with pytest.raises(UsageError, match="rows of 640 values; q4_k needs a multiple of 256"):
        list(spec.nbytes for spec in tensors(SHAPES["270m"], Types("q4_k")))
    assert not list(tmp_path.iterdir())


def test_bf16_is_rounded_to_nearest_even_everywhere(tmp_path):
    """A GGUF's BF16 tensors and a checkpoint's: the same value rounds in the same way."""
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)], np.float32)
    assert models.bf16(ties).tolist() == [1.0, 1.015625, -1.0]
    exact = synthetic.Spec("x.weight", (64, 256), "F32", 1.0)
    halved = synthetic.Spec("x.weight", (64, 256), "BF16", 1.0)
    full, half = (b"".join(p.tobytes() for p in synthetic.data(s, 1)) for s in (exact, halved))
    values = np.frombuffer(full, np.float32)
    stored = np.frombuffer(half, np.uint16).astype(np.uint32) << 16
    np.testing.assert_array_equal(stored.view(np.float32), models.bf16(values))
    shapes = {"model.audio_tower.norm.weight": (7,), "model.embed_audio.x.weight": (5, 3)}
    models.write_tower(tmp_path, shapes, {"model_type": "gemma3n"}, seed=3)
    checkpoint = Checkpoint.open(tmp_path)
    for name, shape in shapes.items():
        wanted = models.bf16(models.values(name, shape, 3, "gemma3n"))
        np.testing.assert_array_equal(checkpoint.read(name), wanted)


def test_shapes_by_family_and_size():
    for family, size, n_values in (
        ("gemma3n", "e2b", 5.14e9),
        ("gemma3n", "e4b", 7.58e9),
        ("audio", "full", 0.68e9),
        ("vision", "siglip", 0.42e9),
        ("vision", "mobilenetv5", 0.30e9),
    ):
        found = shapes.shapes(family, size)
        assert sum(map(np.prod, found.values())) == pytest.approx(n_values, rel=0.02)
    with pytest.raises(UsageError, match="no shapes of vision clip; there are: gemma3n e2b"):
        shapes.shapes("vision", "clip")


def test_a_file_that_is_streamed_is_as_safetensors_writes_it(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((3, 4)), "b": rng.standard_normal(5)}
    models.write_safetensors(tmp_path / "whole.safetensors", tensors.items())

    def rows(name, shape):
        for row in tensors[name]:
            yield models.to_bf16(np.atleast_1d(row))

    shapes = {name: value.shape for name, value in tensors.items()}
    assert models.stream_safetensors(tmp_path / "rows.safetensors", shapes, rows) == 2 * 17
    whole, streamed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "rows"))
    assert whole.keys() == streamed.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], streamed[name])


def test_names_of_made_models(tmp_path):
    with pytest.raises(UsageError, match="no model 'e3b' to make; there are 270m, 1b"):
        bundles.make("e3b", tmp_path, small=True)
    assert bundles.make("e2b", tmp_path, small=True) == bundles.make("e2b", tmp_path, small=True)
