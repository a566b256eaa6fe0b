"""Synthetic GGUF files: llama.cpp itself says whether they are right."""

import gguf
import numpy as np
import pytest
from edge_gemma.benchmarks.dev import synthetic
from edge_gemma.benchmarks.dev.synthetic import SHAPES, Types, tensors, tiny_gguf

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
