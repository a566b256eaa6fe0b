"""The operators both vision towers are written in: values lie channel-last,
``[…, C]``; weights are asked for by name and stored at one precision.

A 1×1 convolution is then a plain matrix product on weights used as they lie
in the mapped file, and a norm over channels is one operator. Only real
spatial convolutions turn to channel-first and back. It does not know which
network is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from edge_gemma.convert.onnx_writer import MICROSOFT, Matrix, OnnxWriter, Precision
from edge_gemma.convert.tensors import TensorReader

PRECISIONS = ("f32", "f16", "int8")
# What is widest runs in strips of the picture: 192² × 768 values would be
# 113 MB, several times
STRIPS = 8
# Kept in half precision, which costs 2 MiB and takes the error of all in 8
# bits from 0.0247 to 0.0203: `python -m edge_gemma.benchmarks.dev.vision kinds
# FOLDER`
NOT_IN_8_BITS = re.compile(r"timm_model\.blocks\.[01]\.")
NORM_EPSILON = 1e-6  # timm RmsNorm2d, SigLIP's layer_norm_eps, Gemma's rms_norm_eps


def _same_padding(kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, for sides that are multiples of the stride
    (timm: get_same_padding).
    """
    total = kernel - stride
    return total // 2, total - total // 2


class ChannelLast:
    """Operators on values ``[…, C]`` with weights of ``tensors``, appended
    to ``writer``.

    ``only`` is a pattern: weights whose names do not match it stay float32.
    """

    def __init__(
        self, writer: OnnxWriter, tensors: TensorReader, precision: str, only: str | None = None
    ):
        self.writer, self.tensors, self.precision = writer, tensors, precision
        self._only = re.compile(only or "")
        self._all_in_8_bits = only is not None  # who asks for a kind of layer gets it
        self._names = frozenset(tensors.names())
        self._constants: dict[str, str] = {}
        self._matrices: dict[str, Matrix] = {}

    # ---- weights
    def has(self, name: str) -> bool:
        return name in self._names

    def rows_of(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a linear layer or 1×1 convolution, without
        reading it.
        """
        shape = self.tensors.shape(name + ".weight")
        return shape[0], int(np.prod(shape[1:]))

    def weight(self, name: str) -> np.ndarray:
        return self.tensors.read(name + ".weight").reshape(self.rows_of(name))

    def kernel_of(self, name: str) -> int:
        """The side of a spatial convolution's kernel."""
        return self.tensors.shape(name + ".weight")[-1]

    def matrix(self, weight: np.ndarray, name: str, exact: bool = False) -> Matrix:
        """Store ``weight [n, k]`` at the precision of ``name``; ``exact``:
        never in 8 bits.
        """
        if not self._only.search(name):
            return self.writer.matrix(weight, "f32")
        may_be_8_bits = self._all_in_8_bits or not NOT_IN_8_BITS.search(name)
        if self.precision == "int8" and may_be_8_bits and not exact:
            return self.writer.widened_blocks(weight)
        return self.writer.matrix(weight, self._storage(name))

    def _storage(self, name: str) -> Precision:
        """Of weights that are never in 8 bits."""
        return "f16" if self.precision != "f32" and self._only.search(name) else "f32"

    def ready(self, *names: str) -> None:
        """Make the matrices of linear layers here, for use in the body of a
        loop.
        """
        for name in names:
            self._matrix_of(name)

    def table(self, name: str) -> str:
        """A tensor that is added, not multiplied by: never in 8 bits."""
        return self.writer.stored(self.tensors.read(name), self._storage(name))

    # Strips share their constants and matrices: each is read and written
    # once.
    def _matrix_of(self, name: str, exact: bool = False) -> Matrix:
        if name not in self._matrices:
            self._matrices[name] = self.matrix(self.weight(name), name, exact)
        return self._matrices[name]

    def _constant_of(self, name: str, label: str) -> str:
        if name not in self._constants:
            self._constants[name] = self.writer.constant(self.tensors.read(name), label)
        return self._constants[name]

    # ---- products and convolutions
    def linear(self, x: str, name: str, *, exact: bool = False) -> str:
        has_bias = self.has(name + ".bias")
        bias = self._constant_of(name + ".bias", "bias") if has_bias else ""
        y = self.writer.multiply(x, self._matrix_of(name, exact))
        return self.writer.add(y, bias) if has_bias else y

    def product(self, x: str, weight: np.ndarray, name: str, *, exact: bool = False) -> str:
        return self.writer.multiply(x, self.matrix(weight, name, exact))

    def conv(
        self, x: str, name: str, stride: int, *, channel_first: bool = False, whole: bool = True
    ) -> str:
        """A spatial convolution as timm pads it ('same': the odd row at the
        end).

        In ``[1, h, w, C]`` (or channel-first), out ``[1, h', w', C']``.

        ``whole=False``: ``x`` is a strip of :meth:`in_strips`, padded above
        and below already.
        """
        n_out, per_group, kernel, _ = self.tensors.shape(name + ".weight")
        weight = self._constant_of(name + ".weight", "kernel")  # 7 MB in all: kept exact
        inputs = [x if channel_first else self.to_channel_first(x), weight]
        if self.has(name + ".bias"):
            inputs.append(self.writer.constant(self.tensors.read(name + ".bias"), "bias"))
        is_depthwise = per_group == 1 and n_out > 1
        before, after = _same_padding(kernel, stride)
        above, below = (before, after) if whole else (0, 0)
        y = self.writer.node(
            "Conv",
            inputs,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            group=n_out if is_depthwise else 1,
            pads=[above, before, below, after],
        )
        return self.writer.transpose(y, 0, 2, 3, 1)

    def in_strips(self, x: str, kernel: int, stride: int, body: Callable[[str], str]) -> str:
        """``body`` on ``x [1, h, w, C]`` cut into STRIPS along h, each with
        the rows above and below that a kernel reaches: what is widest is
        never there whole.
        """
        writer, (before, after) = self.writer, _same_padding(kernel, stride)
        h = writer.slice(self.grid(x), writer.ints(1), writer.ints(2), 0)
        step = writer.div(h, writer.ints(STRIPS))
        if kernel > 1:
            x = writer.node("Pad", [x, writer.ints(0, before, 0, 0, 0, after, 0, 0)])
        strips = []
        for number in range(STRIPS):
            start = writer.mul(step, writer.ints(number))
            end = writer.mul(step, writer.ints(number + 1))
            stop = writer.add(end, writer.ints(before + after))
            strips.append(body(writer.slice(x, start, stop, 1)))
        return writer.concat(strips, axis=1)

    def to_channel_first(self, x: str) -> str:
        return self.writer.transpose(x, 0, 3, 1, 2)

    # ---- norms and activations
    def norm2d(self, x: str, name: str, *, then: str | None = None) -> str:
        """RMS norm over channels with the weight ``name``, times the weight
        ``then`` if there.
        """
        if name not in self._constants:
            weight = self.tensors.read(name)
            if then is not None and self.has(then):
                weight = weight * self.tensors.read(then)
            self._constants[name] = self.writer.constant(weight, "norm")
        return self.writer.node(
            "SimplifiedLayerNormalization",
            [x, self._constants[name]],
            axis=-1,
            epsilon=NORM_EPSILON,
            stash_type=1,
        )

    def scale(self, x: str, name: str) -> str:
        if not self.has(name):
            return x
        factors = self.writer.constant(self.tensors.read(name), "scale")
        return self.writer.mul(x, factors)

    def layer_norm(self, x: str, name: str, epsilon: float) -> str:
        weight = self.writer.constant(self.tensors.read(f"{name}.weight"), "weight")
        bias = self.writer.constant(self.tensors.read(f"{name}.bias"), "bias")
        return self.writer.node("LayerNormalization", [x, weight, bias], axis=-1, epsilon=epsilon)

    def gelu(self, x: str) -> str:
        """The tanh form, as both towers were trained."""
        return self.writer.node("FastGelu", [x], domain=MICROSOFT)

    # ---- attention
    def attention(self, q: str, k: str, v: str, n_head: int, n_rows: int, width: int) -> str:
        """Full attention over ``n_rows`` rows of ``width``: head by head, a
        strip of queries at a time, so that the scores of a strip stay near
        the cores.

        onnxruntime's MultiHeadAttention takes twice the time here: its
        blocks are small, and it packs keys and values anew for each of
        them.
        """
        writer, head_dim = self.writer, width // n_head
        split = writer.ints(n_rows, n_head, head_dim)
        q, k, v = (writer.transpose(writer.reshape_to(part, split), 1, 0, 2) for part in (q, k, v))

        def head(q: str, k: str, v: str) -> tuple[str]:
            bounds = [writer.ints(n_rows * step // STRIPS) for step in range(STRIPS + 1)]
            strips = [
                self.attend(writer.slice(q, start, stop, 0), k, v, head_dim)
                for start, stop in pairwise(bounds)
            ]
            return (writer.concat(strips, axis=0),)

        (y,) = writer.scan([q, k, v], [n_rows, head_dim], head, [[n_rows, head_dim]])
        y = writer.transpose(y, 1, 0, 2)
        return writer.reshape(y, n_rows, width)

    def attend(self, q: str, k: str, v: str, dim: int) -> str:
        """``softmax(q kᵀ / √dim) v`` for ``q [n, dim]``, ``k [m, dim]``,
        ``v [m, …]``; the scores ``[n, m]`` are there whole.
        """
        scores = self.writer.node(
            "FusedMatMul", [q, k], domain=MICROSOFT, transB=1, alpha=dim**-0.5
        )
        return self.writer.node("MatMul", [self.writer.node("Softmax", [scores], axis=-1), v])

    def grid(self, x: str) -> str:
        """int64 ``[1, h, w]`` of a value ``[1, h, w, C]``."""
        shape = self.writer.node("Shape", [x])
        return self.writer.slice(shape, self.writer.ints(0), self.writer.ints(3), 0)
