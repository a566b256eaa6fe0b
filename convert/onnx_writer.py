"""Builds an ONNX graph straight from numpy arrays, one tensor at a time:
memory stays at about one tensor, whatever the model's size.

In: arrays and node names, in the order the data flows. Out: ``NAME.onnx``
(the graph and its small constants) and ``NAME.onnx.data`` (the large ones,
each starting on a 64 KiB border so that every system can map it). It does
not know which network it writes, and it never runs one.

Constants are called ``w.…``, intermediate values ``v.…``; only graph inputs
and outputs keep the names given to them. (An input and a constant of the
same name collide silently in onnxruntime.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np
import onnx
from numpy.typing import DTypeLike
from onnx import TensorProto, helper

from edge_gemma.errors import UsageError

Precision = Literal["f32", "f16", "int8", "int8-block", "int4-block"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

ALIGNMENT = 64 * 1024  # of mapped files on Windows; a page has 4 KiB here, 16 on a Raspberry Pi 5
INLINE_BYTES = 16 * 1024  # smaller constants stay in the graph itself
OPSET, IR_VERSION = 17, 8
# DequantizeLinear with a scale per block; the operators around it changed
# too (ReduceMean's axes)
OPSET_OF_BLOCKS, IR_VERSION_OF_BLOCKS = 21, 10
MICROSOFT = "com.microsoft"  # onnxruntime's own operators
_INT8_PEAK = 127  # symmetric: −128 is not used, so that a weight and its negative quantize alike
# 255 · 128 < 2^15: on AVX2 without VNNI, neighbouring products are added in
# 16 bits, which would saturate
_INT8_PAIR_PEAK = 128

Attribute = int | float | str | Sequence[int] | onnx.GraphProto
Shape = Sequence[int | str]  # a string is a free dimension


@dataclass
class Reserved:
    """A constant whose place in the data file is kept, and whose values come in pieces."""

    name: str
    file: BinaryIO
    at: int  # where the next piece goes
    stop: int

    def put(self, piece: np.ndarray) -> None:
        assert self.at + piece.nbytes <= self.stop, self
        self.file.seek(self.at)
        self.file.write(np.ascontiguousarray(piece).data)
        self.at += piece.nbytes


@dataclass(frozen=True)
class Matrix:
    """A weight in the file and the operator that multiplies by it."""

    op: str
    constants: tuple[str, ...]
    attributes: dict


class OnnxWriter:
    """A graph under construction.

    A context manager: leaving it normally writes the graph, an exception
    leaves only partial files.

    >>> path = getfixture("tmp_path") / "double.onnx"
    >>> with OnnxWriter(path) as graph:
    ...     x = graph.input("x", np.float32, ["n", 2])
    ...     y = graph.linear(x, 2 * np.eye(2, dtype=np.float32), "f32")
    ...     graph.output("y", y, np.float32, ["n", 2])
    >>> import onnxruntime
    >>> session = onnxruntime.InferenceSession(path)
    >>> session.run(None, {"x": np.ones((1, 2), np.float32)})[0].tolist()
    [[2.0, 2.0]]
    """

    def __init__(self, path: Path, *, opset: int = OPSET, data_suffix: str = ".data"):
        self.path, self.opset = Path(path), opset
        self.data_path = self.path.with_name(self.path.name + data_suffix)
        # All constants, inline ones too: what a session must hold at least
        self.weights_bytes = 0
        # Those of them that are stored in half precision and cast: a
        # session that widens them when it is opened holds as much again
        self.half_bytes = 0
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._scalars: dict[tuple, str] = {}
        self._reserved: list[Reserved] = []
        self._count = self._end = 0

    def __enter__(self) -> OnnxWriter:
        self._data = open(self.data_path, "wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._data.close()
        if kind is None:
            self._write()

    @property
    def files(self) -> tuple[str, ...]:
        """The names of both files, for the bundle's manifest."""
        return self.path.name, self.data_path.name

    # ---- graph edges
    def input(self, name: str, dtype: DTypeLike, shape: Shape) -> str:
        """Declare a graph input; a string in ``shape`` is a free dimension."""
        self._inputs.append(helper.make_tensor_value_info(name, _onnx_type(dtype), shape))
        return name

    def output(self, name: str, value: str, dtype: DTypeLike, shape: Shape) -> None:
        """Declare ``value`` a graph output called ``name``."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, _onnx_type(dtype), shape))

    def declare(self, name: str, dtype: DTypeLike, shape: Shape) -> str:
        """Declare a graph output that an operator writes itself, without the copy that
        :meth:`output` is: give the name to :meth:`nodes`.
        """
        self._outputs.append(helper.make_tensor_value_info(name, _onnx_type(dtype), shape))
        return name

    def node(
        self, op: str, inputs: Sequence[str], *, domain: str = "", **attributes: Attribute
    ) -> str:
        """Append one operator; returns its output's name. "" is an absent
        optional input.
        """
        (output,) = self.nodes(op, inputs, 1, (), domain=domain, **attributes)
        return output

    def nodes(
        self,
        op: str,
        inputs: Sequence[str],
        n_outputs: int,
        named: Sequence[str] = (),
        *,
        domain: str = "",
        **attributes: Attribute,
    ) -> tuple[str, ...]:
        """Append one operator with ``n_outputs`` outputs; returns their
        names. The last ones may be ``named``.
        """
        unnamed = range(n_outputs - len(named))
        outputs = (*(self._name(op) for _ in unnamed), *named)
        node = helper.make_node(op, inputs, outputs, domain=domain)
        for key, value in sorted(attributes.items()):
            node.attribute.append(helper.make_attribute(key, value))
        self._nodes.append(node)
        return outputs

    def scan(
        self,
        values: Sequence[str],
        shape: Shape,
        body: Callable[..., tuple[str, ...]],
        shapes: Sequence[Shape],
    ) -> tuple[str, ...]:
        """``body`` on the slices ``shape`` of ``values`` along their first
        axis, one after another; its results, of ``shapes``, stacked.

        A loop in the graph: the results are written where they belong,
        without a copy. The body may use values from outside. Make its
        matrices outside: what stands in the body, a cast of a weight too,
        runs for every slice.
        """
        outer, self._nodes = self._nodes, []
        inputs = [self._name("slice") for _ in values]
        outputs = body(*inputs)
        inner, self._nodes = self._nodes, outer
        graph = helper.make_graph(
            inner,
            self._name("body"),
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in inputs],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, of)
                for name, of in zip(outputs, shapes, strict=True)
            ],
        )
        return self.nodes("Scan", values, len(outputs), body=graph, num_scan_inputs=len(values))

    def _name(self, stem: str, kind: str = "v") -> str:
        self._count += 1
        return f"{kind}.{self._count}.{stem}"

    # ---- constants
    def constant(self, array: np.ndarray, name: str = "constant") -> str:
        """Store ``array`` as it is (its dtype decides the type); large ones
        go to the data file at once and need not be kept.
        """
        array = np.asarray(array)
        kind = _onnx_type(array.dtype)
        tensor = TensorProto(name=self._name(name, "w"), data_type=kind, dims=array.shape)
        self.weights_bytes += array.nbytes
        if array.nbytes < INLINE_BYTES:
            tensor.raw_data = array.tobytes()
        else:
            self._place(tensor, array.nbytes).put(array)
        self._constants.append(tensor)
        return tensor.name

    def reserve(self, dtype: DTypeLike, shape: Sequence[int], name: str = "constant") -> Reserved:
        """A constant that is too large to be in memory: put its values, row by row, into what is
        returned before the graph is left.
        """
        kind = _onnx_type(dtype)
        tensor = TensorProto(name=self._name(name, "w"), data_type=kind, dims=shape)
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        self.weights_bytes += nbytes
        self._constants.append(tensor)
        place = self._place(tensor, nbytes)
        self._reserved.append(place)
        return place

    def _place(self, tensor: TensorProto, nbytes: int) -> Reserved:
        """Keep room for ``tensor`` at the data file's end."""
        offset = self._end + -self._end % ALIGNMENT
        self._end = offset + nbytes
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": self.data_path.name, "offset": str(offset), "length": str(nbytes)}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
        return Reserved(tensor.name, self._data, offset, offset + nbytes)

    def ints(self, *values: int) -> str:
        """A small int64 vector (axes, shapes, slice bounds), stored once
        however often it is asked for.
        """
        return self._shared(("ints", values), np.array(values, np.int64))

    def number(self, value: float) -> str:
        """A float32 scalar, stored once however often it is asked for."""
        return self._shared(("number", float(value)), np.array(value, np.float32))

    def integer(self, value: int) -> str:
        """An int64 scalar, stored once however often it is asked for."""
        return self._shared(("integer", value), np.array(value, np.int64))

    def _shared(self, key: tuple, array: np.ndarray) -> str:
        if key not in self._scalars:
            self._scalars[key] = self.constant(array, key[0])
        return self._scalars[key]

    def stored(self, array: np.ndarray, precision: Precision, name: str = "weight") -> str:
        """``array`` as a float32 value, stored in half precision when
        ``precision`` is not f32 (for weights of other operators than
        linear).
        """
        if precision == "f32":
            return self.constant(np.asarray(array, np.float32), name)
        half = _half(array)
        self.half_bytes += half.nbytes
        return self.node("Cast", [self.constant(half, name)], to=TensorProto.FLOAT)

    # ---- common shapes of nodes
    def linear(
        self,
        x: str,
        weight: np.ndarray,
        precision: Precision,
        *,
        bias: np.ndarray | None = None,
        block: int = 32,
        name: str = "linear",
    ) -> str:
        """``x @ weight.T (+ bias)`` for ``x [..., k]`` and ``weight [n,
        k]`` float32, with the weight stored at ``precision``:

        - ``f32``; ``f16``: stored as half, cast to float32 when the session
          is opened (half the file, not half the memory);
        - ``int8``: one scale per output channel and integer activations,
          one scale per call (``DynamicQuantizeMatMul``);
        - ``int8-block``, ``int4-block``: one scale per ``block`` weights
          (``MatMulNBits``); needs no multiple of ``block``.
        """
        y = self.multiply(x, self.matrix(weight, precision, block=block, name=name))
        if bias is None:
            return y
        return self.add(y, self.constant(np.asarray(bias, np.float32), "bias"))

    def matrix(
        self,
        weight: np.ndarray,
        precision: Precision,
        *,
        block: int = 32,
        accuracy_level: int = 4,
        name: str = "linear",
    ) -> Matrix:
        """Store ``weight [n, k]`` once, for any number of :meth:`multiply`.
        ``accuracy_level`` of the block types: 4 integer, 1 float32
        activations.
        """
        check_precision(precision)
        n, k = weight.shape
        if precision in ("f32", "f16"):
            stored = self.stored(np.ascontiguousarray(weight.T), precision, name)
            return Matrix("MatMul", (stored,), {})
        if precision == "int8":
            codes, scales = quantize_channels(weight)
            constants = (
                self.constant(np.ascontiguousarray(codes.T), name),
                self.constant(scales, "scales"),
            )
            return Matrix("DynamicQuantizeMatMul", constants, {"domain": MICROSOFT})
        bits = 8 if precision == "int8-block" else 4
        codes, scales = quantize_blocks(weight, bits, block)
        attributes = {
            "domain": MICROSOFT,
            "K": k,
            "N": n,
            "bits": bits,
            "block_size": block,
            "accuracy_level": accuracy_level,
        }
        constants = (self.constant(codes, name), self.constant(scales, "scales"))
        return Matrix("MatMulNBits", constants, attributes)

    def widened_blocks(
        self, weight: np.ndarray, *, block: int = 32, name: str = "linear"
    ) -> Matrix:
        """Store ``weight [n, k]`` as ``int8-block`` does, for an ordinary
        product: it is widened to float32 as a whole just before it is used.

        Where a product has many rows, or comes in many strips, that beats
        ``MatMulNBits``, which widens for every call. Needs OPSET_OF_BLOCKS.
        """
        assert self.opset >= OPSET_OF_BLOCKS, self.opset
        n, k = weight.shape
        codes, scales = quantize_blocks(weight, 8, block)
        codes = (codes.reshape(n, -1)[:, :k] ^ 0x80).view(np.int8)  # around zero instead of 128
        stored = (
            self.constant(np.ascontiguousarray(codes.T), name),
            self.constant(np.ascontiguousarray(scales.T), "scales"),
        )
        widened = self.node("DequantizeLinear", stored, axis=0, block_size=block)
        return Matrix("MatMul", (widened,), {})

    def add(self, a: str, b: str) -> str:
        return self.node("Add", [a, b])

    def sub(self, a: str, b: str) -> str:
        return self.node("Sub", [a, b])

    def mul(self, a: str, b: str) -> str:
        return self.node("Mul", [a, b])

    def div(self, a: str, b: str) -> str:
        return self.node("Div", [a, b])

    def concat(self, parts: Sequence[str], axis: int) -> str:
        return self.node("Concat", parts, axis=axis)

    def reshape(self, x: str, *shape: int) -> str:
        return self.node("Reshape", [x, self.ints(*shape)])

    def reshape_to(self, x: str, shape: str) -> str:
        """``shape`` is an int64 vector that the graph computes."""
        return self.node("Reshape", [x, shape])

    def transpose(self, x: str, *perm: int) -> str:
        return self.node("Transpose", [x], perm=list(perm))

    def multiply(self, x: str, matrix: Matrix) -> str:
        """``x @ weight.T`` with a stored matrix."""
        return self.node(matrix.op, [x, *matrix.constants], **matrix.attributes)

    def mean(self, x: str, *axes: int) -> str:
        """The mean over ``axes``, which vanish."""
        if self.opset < 18:
            return self.node("ReduceMean", [x], axes=axes, keepdims=0)
        return self.node("ReduceMean", [x, self.ints(*axes)], keepdims=0)

    def rms_norm(self, x: str, weight: np.ndarray, epsilon: float) -> str:
        """``x · rsqrt(mean x² + epsilon) · weight`` over the last axis;
        ``weight`` as it multiplies (not 1 + w).
        """
        return self.node(
            "SimplifiedLayerNormalization",
            [x, self.constant(np.asarray(weight, np.float32), "norm")],
            axis=-1,
            epsilon=float(epsilon),
            stash_type=1,
        )

    def slice(self, x: str, start: str, stop: str, axis: int, step: int = 1) -> str:
        """``x[start:stop:step]`` along one axis; the bounds are int64
        vectors of one element (:meth:`ints`, or computed).
        """
        return self.node("Slice", [x, start, stop, self.ints(axis), self.ints(step)])

    # ---- the file
    def _write(self) -> None:
        short = [place.name for place in self._reserved if place.at != place.stop]
        assert not short, f"not filled: {short}"
        # onnxruntime runs a node early when it stands late: casts of
        # constants come first here, so that each runs just before its use
        constants = {tensor.name for tensor in self._constants}
        nodes = sorted(self._nodes, key=lambda node: not constants.issuperset(node.input))
        graph = helper.make_graph(
            nodes, self.path.stem, self._inputs, self._outputs, self._constants
        )
        has_blocks = self.opset >= OPSET_OF_BLOCKS
        model = helper.make_model(
            graph,
            producer_name="edge-gemma",
            ir_version=IR_VERSION_OF_BLOCKS if has_blocks else IR_VERSION,
            opset_imports=[
                helper.make_opsetid("", self.opset),
                helper.make_opsetid(MICROSOFT, 1),
            ],
        )
        self.path.write_bytes(model.SerializeToString(deterministic=True))


def check_precision(text: str) -> Precision:
    """``text`` if it is one of PRECISIONS. Raises UsageError."""
    for precision in PRECISIONS:
        if text == precision:
            return precision
    raise UsageError(
        f"unknown precision {text!r} for an encoder; choose one of {', '.join(PRECISIONS)}"
    )


def quantize_channels(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``weight [n, k]`` float32 → codes int8 ``[n, k]`` and scales ``[n]``
    float32, so that weight ≈ codes·scale.

    A channel's scale is the smallest that keeps every code within ±127 and
    the sum of codes 2j and 2j+1 within ±128. Then no kernel saturates,
    whatever the activations, for half of the error that plain 7-bit weights
    would cost (uint8 weights are exact too, and half as fast).
    """
    weight = np.asarray(weight, np.float32)
    n_even = weight.shape[1] // 2 * 2
    pair = np.abs(weight[:, 0:n_even:2] + weight[:, 1:n_even:2]).max(axis=1, initial=0)
    # each of two codes may round up by half: the peak is lowered by one
    scales = np.maximum(np.abs(weight).max(axis=1) / _INT8_PEAK, pair / (_INT8_PAIR_PEAK - 1))
    scales[scales == 0] = 1.0
    return np.rint(weight / scales[:, None]).astype(np.int8), scales


def quantize_blocks(weight: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """``weight [n, k]`` float32 → codes uint8 ``[n, blocks, block·bits/8]``
    and scales ``[n, blocks]`` float32, in ``MatMulNBits``' layout.

    Symmetric around 2^(bits−1), its default zero point. The value of
    largest magnitude in a block lands on −2^(bits−1), so 4 bits use all 16
    codes (as ggml's Q4_0 does).
    """
    weight = np.asarray(weight, np.float32)
    n, k = weight.shape
    blocks = -(-k // block)
    padded = np.zeros((n, blocks * block), np.float32)
    padded[:, :k] = weight
    padded = padded.reshape(n, blocks, block)
    half = 1 << (bits - 1)
    largest = np.abs(padded).argmax(axis=2, keepdims=True)
    peak = np.take_along_axis(padded, largest, axis=2)  # [n, blocks, 1], with its sign
    scales = peak / -half
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.clip(np.rint(padded * inverse) + half, 0, 2 * half - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[:, :, 0::2] | codes[:, :, 1::2] << 4
    return codes, scales[:, :, 0]


def _half(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, np.float32)
    if array.size and np.abs(array).max() > np.finfo(np.float16).max:
        raise UsageError(
            f"a weight of magnitude {np.abs(array).max():.3g} does not fit half precision "
            "(at most 65504); use f32"
        )
    return array.astype(np.float16)


def _onnx_type(dtype: DTypeLike) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
