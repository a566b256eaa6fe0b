"""Types and bytes against llama.cpp's own quantizer, tensor for tensor."""

from __future__ import annotations

import ctypes

import msgspec
import numpy as np
import pytest
from checkpoints import recipe as read_checkpoint_recipe
from checkpoints import write_checkpoint

from edge_gemma.bundles.gguf import read_header
from edge_gemma.convert import quantize
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.convert.recipe import names, read_recipe
from edge_gemma.errors import UsageError

STOCK = [name for name in names() if not name.startswith("edge")]


def tensors_of(path) -> dict[str, tuple[str, bytes]]:
    data = path.read_bytes()
    return {
        t.name: (t.type, data[t.offset : t.offset + t.nbytes]) for t in read_header(path).tensors
    }


def llama_model_quantize(
    source, target, file_type: int, importance: dict[str, np.ndarray] | None = None
) -> None:
    from edge_gemma.engines.llama import library as llama

    low = llama.library()

    params = low.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 2
    if importance:
        as_floats = ctypes.POINTER(ctypes.c_float)
        entries = (low.llama_model_imatrix_data * (len(importance) + 1))(
            *[
                low.llama_model_imatrix_data(
                    name.encode(), weights.ctypes.data_as(as_floats), weights.size
                )
                for name, weights in importance.items()
            ]
        )
        params.imatrix = entries
    assert low.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """gemma3n as in the reference; gemma3 with 9 layers, 4 heads on one KV head, and rows of 320,
    which no K-quant fits.
    """
    folder = tmp_path_factory.mktemp("quantize")
    write_checkpoint(
        "g3n",
        folder / "g3n",
        keep=lambda name: "_tower" not in name and "embed_" not in name.split(".")[1],
    )
    odd = read_checkpoint_recipe("g3text")
    odd["config"] |= {
        "hidden_size": 320,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "layer_types": None,
        "sliding_window_pattern": 6,
    }
    odd["tensors"] = {}
    odd["tensors"]["model.embed_tokens.weight"] = [768, 320]
    odd["tensors"]["model.norm.weight"] = [320]
    for i in range(9):
        shapes = {
            "self_attn.q_proj": [256, 320],
            "self_attn.k_proj": [64, 320],
            "self_attn.v_proj": [64, 320],
            "self_attn.o_proj": [320, 256],
            "self_attn.q_norm": [64],
            "self_attn.k_norm": [64],
            "mlp.gate_proj": [768, 320],
            "mlp.up_proj": [768, 320],
            "mlp.down_proj": [320, 768],
            "input_layernorm": [320],
            "post_attention_layernorm": [320],
            "pre_feedforward_layernorm": [320],
            "post_feedforward_layernorm": [320],
        }
        odd["tensors"] |= {
            f"model.layers.{i}.{module}.weight": shape for module, shape in shapes.items()
        }
    write_checkpoint(odd, folder / "odd")
    f32 = {
        name: convert(
            folder / name, folder / f"{name}-f32", Conversion(quant="f32", verify=False)
        ).bundle.decoder_path
        for name in ("g3n", "odd")
    }
    return folder, f32


SLOW = [
    pytest.param(name, "g3n", marks=pytest.mark.slow)
    for name in STOCK
    if name not in ("f32", "q4_0", "q4_k_m")
]
SLOW += [pytest.param(name, "odd", marks=pytest.mark.slow) for name in ("iq4_nl",)]


@pytest.mark.parametrize(
    "quant, model",
    [
        ("q4_0", "g3n"),
        ("q4_k_m", "g3n"),
        *((name, "odd") for name in STOCK if name not in ("f32", "iq4_nl")),
        *SLOW,
    ],
)
def test_bytes_equal_llama_model_quantize(checkpoints, tmp_path, quant, model):
    folder, f32 = checkpoints
    stock = read_recipe(quant)
    recipe = msgspec.structs.replace(
        stock, kept="F32"
    )  # llama.cpp keeps what it does not quantize as it finds it: F32 here
    ours = tensors_of(
        convert(
            folder / model, tmp_path / "ours", Conversion(quant=recipe, verify=False)
        ).bundle.decoder_path
    )
    llama_model_quantize(f32[model], tmp_path / "theirs.gguf", stock.file_type)
    theirs = tensors_of(tmp_path / "theirs.gguf")
    assert {name: kind for name, (kind, _) in ours.items()} == {
        name: kind for name, (kind, _) in theirs.items()
    }
    for name in theirs:
        assert ours[name][1] == theirs[name][1], name


@pytest.mark.parametrize(
    "quant",
    [
        "q4_0",
        pytest.param("iq4_xs", marks=pytest.mark.slow),
        "q4_k_m",
        pytest.param("q3_k_m", marks=pytest.mark.slow),
    ],
)
def test_bytes_equal_with_an_importance_matrix(checkpoints, tmp_path, quant):
    from edge_gemma.convert.imatrix import write_imatrix

    folder, f32 = checkpoints
    rng = np.random.default_rng(7)
    weights = {
        t.name: rng.exponential(size=t.shape[0]).astype(np.float32)
        for t in read_header(f32["odd"]).tensors
        if len(t.shape) == 2 and t.name.startswith("blk") and "attn_k." not in t.name
    }
    write_imatrix(
        tmp_path / "odd.imatrix.gguf",
        {name: (w * 5, 5) for name, w in weights.items()},
        chunks=5,
        chunk_tokens=128,
        datasets=["test"],
    )
    stock = msgspec.structs.replace(read_recipe(quant), kept="F32")
    result = convert(
        folder / "odd",
        tmp_path / "ours",
        Conversion(quant=stock, imatrix=tmp_path / "odd.imatrix.gguf", verify=False),
    )
    llama_model_quantize(
        f32["odd"],
        tmp_path / "theirs.gguf",
        stock.file_type,
        {name: (w * 5) / 5 for name, w in weights.items()},
    )
    theirs = tensors_of(tmp_path / "theirs.gguf")
    ours = tensors_of(result.bundle.decoder_path)
    for name in theirs:
        assert ours[name] == theirs[name], name
    assert any(
        "blk.0.attn_k.weight" in note and "no importance" in note for note in result.notes
    ), result.notes


def test_rows_that_fit_no_block_are_never_passed_on():
    """K-quants on rows of 640 corrupt the heap inside ggml: the refusal is ours."""
    with pytest.raises(UsageError, match="a row of 640 values cannot be Q4_K, whose block is 256"):
        quantize.quantize_rows("Q4_K", np.zeros((2, 640), np.float32))
    with pytest.raises(UsageError, match="cannot write the type 'IQ1_S'"):
        quantize.quantize_rows("IQ1_S", np.zeros((2, 256), np.float32))


def test_a_fallback_is_noted(checkpoints, tmp_path):
    folder, _ = checkpoints
    result = convert(folder / "odd", tmp_path / "out", Conversion(quant="q4_k_m", verify=False))
    assert any(
        "attn_q of" in note
        and note.endswith("layers: rows of 320 are no multiple of Q4_K's block, so Q5_0")
        for note in result.notes
    ), result.notes


def test_any_cut_into_chunks_gives_the_same_bytes():
    rows = np.random.default_rng(1).standard_normal((7, 512), dtype=np.float32)
    for kind in quantize.TYPES:
        whole = quantize.quantize_rows(kind, rows)
        np.testing.assert_array_equal(
            whole,
            np.concatenate(
                [quantize.quantize_rows(kind, rows[a:b]) for a, b in ((0, 1), (1, 5), (5, 7))]
            ),
            err_msg=kind,
        )


@pytest.mark.parametrize(
    "float32_bits, bf16_bits",
    [
        (0x3F807FFF, 0x3F80),  # below a tie: down
        (0x3F808000, 0x3F80),  # a tie goes to the even neighbour, here down: half-up fails
        (0x3F818000, 0x3F82),  # and here up: truncation fails
        (0x3F808001, 0x3F81),  # above a tie: up
        (0xBF818000, 0xBF82),  # the sign changes nothing
        (0x7F7FFFFF, 0x7F80),  # the largest float32 becomes infinity
    ],
)
def test_bf16_is_rounded_to_nearest_even(float32_bits, bf16_bits):
    value = np.array([float32_bits], np.uint32).view(np.float32)
    assert quantize.to_bf16(value).view(np.uint16).tolist() == [bf16_bits]


def test_ggml_rounds_to_bf16_as_we_do():
    rows = np.random.default_rng(3).standard_normal((16, 256), dtype=np.float32)
    rows.view(np.uint32)[::2] &= 0xFFFF8000  # half of the rows hold many ties
    theirs = quantize.quantize_rows("BF16", rows).view(np.uint16)
    np.testing.assert_array_equal(quantize.to_bf16(rows).view(np.uint16).reshape(-1), theirs)


def test_quantization_aware_weights_survive_the_round_trip():
    """Q4_0 → bf16 → Q4_0 keeps every code and the value each stands for, so a
    …-qat-q4_0-unquantized checkpoint becomes what it was trained as.
    """
    from checkpoints import bf16
    from gguf import GGMLQuantizationType, dequantize

    rows = np.random.default_rng(2).standard_normal((64, 256), dtype=np.float32)
    trained = quantize.quantize_rows("Q4_0", rows).reshape(64, -1)
    values = dequantize(trained, GGMLQuantizationType.Q4_0)
    again = quantize.quantize_rows("Q4_0", bf16(values)).reshape(64, -1)

    def codes(blocks: np.ndarray) -> np.ndarray:
        return blocks.reshape(64, 8, 18)[:, :, 2:]

    def scales(blocks: np.ndarray) -> np.ndarray:
        halves = np.ascontiguousarray(blocks.reshape(64, 8, 18)[:, :, :2])
        return halves.view(np.float16).astype(np.float32)

    np.testing.assert_array_equal(codes(again), codes(trained))
    np.testing.assert_allclose(scales(again), scales(trained), rtol=2**-8)


@pytest.mark.parametrize(
    "text, message",
    [
        ("matrix = 3", "is not a recipe"),
        ('about = "x"\nmatrix = "Q4_K"\nhead = "Q9"', "names the type 'Q9'"),
        ('about = "x"\nmatrix = "Q4_K"\nhead = "F16"\ntypo = 1', "typo"),
    ],
)
def test_a_recipe_of_ones_own_is_checked(tmp_path, text, message):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_recipe(tmp_path / "mine.toml")
    with pytest.raises(UsageError, match="no recipe 'q5_k_xl'; there are "):
        read_recipe("q5_k_xl")
