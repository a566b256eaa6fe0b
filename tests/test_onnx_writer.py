"""The graph builder: what onnxruntime computes from the files it wrote."""

import numpy as np
import onnx
import onnxruntime
import pytest

from edge_gemma.convert.onnx_writer import (
    ALIGNMENT,
    OPSET_OF_BLOCKS,
    PRECISIONS,
    OnnxWriter,
    quantize_blocks,
    quantize_channels,
)
from edge_gemma.engines.onnx.runtime import open_onnx
from edge_gemma.errors import UsageError

RNG = np.random.default_rng(4)


def run(path, **feeds):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize(
    "precision, smallest, largest",
    [
        ("f32", 0.0, 1e-6),
        ("f16", 2.5e-5, 5e-4),
        ("int8", 7.5e-4, 1.5e-2),
        ("int8-block", 5e-4, 1e-2),
        ("int4-block", 6e-3, 0.12),
    ],
)
def test_linear_is_right_at_every_precision(tmp_path, precision, smallest, largest):
    weight = RNG.standard_normal((96, 128), dtype=np.float32)
    x = RNG.standard_normal((5, 128), dtype=np.float32)
    bias = RNG.standard_normal(96, dtype=np.float32)
    with OnnxWriter(tmp_path / "g.onnx") as graph:
        graph.output(
            "y",
            graph.linear(graph.input("x", np.float32, ["n", 128]), weight, precision, bias=bias),
            np.float32,
            ["n", 96],
        )
    (y,) = run(tmp_path / "g.onnx", x=x)
    want = x @ weight.T + bias
    error = np.sqrt(np.mean((y - want) ** 2) / np.mean(want**2))
    assert smallest <= error < largest  # below the smallest it would not be what it says


@pytest.mark.parametrize("kind", ["equal", "random", "pairs"])
def test_int8_does_not_saturate_on_any_processor(tmp_path, kind):
    """Every activation at its peak: where pairs of products are added in 16 bits, plain int8
    weights would come out clipped.
    """
    weight = {
        "equal": np.ones((8, 64), np.float32),
        "random": np.abs(RNG.standard_normal((8, 64), dtype=np.float32)),
        "pairs": np.tile(np.array([[1, 0.9]], np.float32), (8, 32))
        * np.where(np.arange(64) < 32, 1, 0.01).astype(np.float32),
    }[kind]
    with OnnxWriter(tmp_path / "g.onnx") as graph:
        graph.output(
            "y",
            graph.linear(graph.input("x", np.float32, ["n", 64]), weight, "int8"),
            np.float32,
            ["n", 8],
        )
    (y,) = run(tmp_path / "g.onnx", x=np.ones((2, 64), np.float32))
    codes, scales = quantize_channels(weight)
    np.testing.assert_allclose(y[0], codes.astype(np.int64).sum(axis=1) * scales, rtol=1e-5)
    assert np.abs(codes.astype(np.int64)[:, 0::2] + codes[:, 1::2]).max() <= 128


@pytest.mark.parametrize("k", [128, 70])
def test_widened_blocks_are_the_weights_of_int8_block(tmp_path, k):
    weight, x = (
        RNG.standard_normal((96, k), dtype=np.float32),
        RNG.standard_normal((5, k), dtype=np.float32),
    )
    with OnnxWriter(tmp_path / "g.onnx", opset=OPSET_OF_BLOCKS) as graph:
        graph.output(
            "y",
            graph.multiply(graph.input("x", np.float32, ["n", k]), graph.widened_blocks(weight)),
            np.float32,
            ["n", 96],
        )
    codes, scales = quantize_blocks(weight, 8, 32)
    stored = ((codes.astype(np.float32) - 128) * scales[:, :, None]).reshape(96, -1)[:, :k]
    session = open_onnx(tmp_path / "g.onnx", n_threads=1, in_place=True)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ stored.T, atol=2e-5)
    assert graph.weights_bytes == 96 * k + scales.nbytes


def test_scan_runs_a_body_on_every_slice(tmp_path):
    x, y = (
        RNG.standard_normal((3, 4, 5), dtype=np.float32),
        RNG.standard_normal((3, 4, 5), dtype=np.float32),
    )
    with OnnxWriter(tmp_path / "g.onnx", opset=OPSET_OF_BLOCKS) as graph:
        a, b, factor = (
            graph.input("x", np.float32, [3, "n", 5]),
            graph.input("y", np.float32, [3, "n", 5]),
            graph.number(2),
        )
        both = graph.scan(
            [a, b],
            ["n", 5],
            lambda p, q: (graph.node("Add", [p, q]), graph.node("Mul", [graph.mean(p, 1), factor])),
            [["n", 5], ["n"]],
        )
        for name, value, shape in zip(("sum", "means"), both, ([3, "n", 5], [3, "n"]), strict=True):
            graph.output(name, value, np.float32, shape)
    total, means = run(tmp_path / "g.onnx", x=x, y=y)
    np.testing.assert_array_equal(total, x + y)
    np.testing.assert_allclose(means, 2 * x.mean(2), atol=1e-6)


def test_large_constants_are_external_aligned_and_counted(tmp_path):
    weights = [RNG.standard_normal((70, 100), dtype=np.float32) for _ in range(3)]
    with OnnxWriter(tmp_path / "g.onnx") as graph:
        x = graph.input("c0", np.float32, ["n", 100])
        for weight in weights:
            graph.output(
                f"y{len(graph._outputs)}", graph.linear(x, weight, "f32"), np.float32, ["n", 70]
            )
    model = onnx.load(tmp_path / "g.onnx", load_external_data=False)
    onnx.checker.check_model(str(tmp_path / "g.onnx"))
    places = [{e.key: e.value for e in c.external_data} for c in model.graph.initializer]
    assert [int(p["offset"]) % ALIGNMENT for p in places] == [0, 0, 0]
    assert all(c.name.startswith("w.") for c in model.graph.initializer)
    assert graph.weights_bytes == sum(w.nbytes for w in weights)
    assert graph.files == ("g.onnx", "g.onnx.data")
    assert (tmp_path / "g.onnx").stat().st_size < 2000
    data = np.ones((1, 100), np.float32)
    for y, weight in zip(run(tmp_path / "g.onnx", c0=data), weights, strict=True):
        np.testing.assert_allclose(y, data @ weight.T, atol=1e-4)


def test_shared_scalars_are_stored_once(tmp_path):
    with OnnxWriter(tmp_path / "g.onnx") as graph:
        assert graph.number(1.5) == graph.number(1.5) != graph.number(2)
        assert graph.ints(1, 2) == graph.ints(1, 2)
        graph.output("y", graph.number(1.5), np.float32, [])
    assert run(tmp_path / "g.onnx")[0] == 1.5


def test_rms_norm(tmp_path):
    x, w = RNG.standard_normal((3, 16), dtype=np.float32), RNG.standard_normal(16, dtype=np.float32)
    with OnnxWriter(tmp_path / "g.onnx") as graph:
        graph.output(
            "y",
            graph.rms_norm(graph.input("x", np.float32, ["n", 16]), w, 1e-6),
            np.float32,
            ["n", 16],
        )
    np.testing.assert_allclose(
        run(tmp_path / "g.onnx", x=x)[0],
        x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w,
        atol=2e-6,
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_quantize_to_within_half_a_step(bits):
    weight = RNG.standard_normal((6, 70), dtype=np.float32)  # not a multiple of the block
    weight[2, :32] = 0
    codes, scales = quantize_blocks(weight, bits, 32)
    assert codes.shape == (6, 3, 32 * bits // 8) and scales.shape == (6, 3)
    values = codes if bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(6, 3, 32)
    back = ((values.astype(np.float32) - (1 << bits - 1)) * scales[:, :, None]).reshape(6, -1)[
        :, :70
    ]
    step = np.repeat(np.abs(scales), 32, axis=1)[:, :70]
    assert (
        np.abs(back - weight) <= step * 1.0001
    ).all()  # a whole step only at the far end of the range, which the sign leaves one code short
    assert np.mean(np.abs(back - weight) <= step * 0.5001) > 0.95


def test_channels_quantize_to_within_half_a_step():
    weight = RNG.standard_normal((6, 70), dtype=np.float32)
    weight[3] = 0
    codes, scales = quantize_channels(weight)
    assert (
        np.abs(codes.astype(np.float32) * scales[:, None] - weight) <= scales[:, None] * 0.5001
    ).all()


def test_refusals(tmp_path):
    with pytest.raises(
        UsageError, match="unknown precision 'int3' for an encoder; choose one of f32, f16"
    ):
        with OnnxWriter(tmp_path / "g.onnx") as graph:
            graph.linear("x", np.zeros((2, 2), np.float32), "int3")
    with pytest.raises(UsageError, match="does not fit half precision"):
        with OnnxWriter(tmp_path / "g.onnx") as graph:
            graph.linear("x", np.full((2, 2), 1e6, np.float32), "f16")
    assert PRECISIONS == ("f32", "f16", "int8", "int8-block", "int4-block")
