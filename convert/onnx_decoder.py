"""Mapped tensors + types → ``decoder.onnx``: the decoder as a graph, for onnxruntime.

In: what the GGUF is made of (:class:`~.gemma.Mapping`, so slices and merged adapters too) and a
type for each tensor, in ggml's names. Out: the graph, its data file, and the tables that stay
outside it because a few rows per token are read. Quantized weights are ggml's own blocks in
``MatMulNBits``' layout: Q4_0 and Q8_0 mean the same values here as in a GGUF. A few chunks of rows
are in memory at a time.

Inputs and outputs are called as in onnx-community's files: ``inputs_embeds``,
``per_layer_inputs``, ``attention_mask``, ``past_key_values.N.key|value``, ``num_logits_to_keep``
(0: all) → ``logits``, ``present.N.key|value``; a Gemma 3 that sees is told who attends to whom
(engines/onnx/masks.py). Positions follow from the mask's length. Layers that
share K/V have no cache of their own, and only rows whose logits are wanted enter them (exact, since
nothing that they compute is cached). That needs onnxruntime 1.31.1 and one sequence per run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto

from edge_gemma.bundles.manifest import OnnxPart
from edge_gemma.convert.decoder import Progress, in_order
from edge_gemma.convert.gemma import SPARSE_LAYERS, SPARSITY_MULTIPLIER, Dims
from edge_gemma.convert.onnx_weights import (
    EMBEDDINGS,
    PER_LAYER,
    TABLES,
    OnnxPlan,
    Weights,
    shares_rows,
    steps,
    write_table,
)
from edge_gemma.convert.onnx_writer import MICROSOFT, OPSET_OF_BLOCKS, Matrix, OnnxWriter
from edge_gemma.convert.tensors import TensorReader

GRAPH = "decoder.onnx"
_END = 1 << 62


@dataclass(frozen=True)
class Form:
    """How the program that runs the graph calls it."""

    takes_ids: bool = False  # ``input_ids`` in place of ``inputs_embeds``; the table is inside
    asks_rows: bool = True  # has ``num_logits_to_keep``; else there are logits of the last row
    # layers that share K/V are given the owner's new rows and its past once more: onnxruntime below
    # 1.31.1 dies without. Then every layer runs for every row
    repeats_kv: bool = False
    # is told who attends to whom (``attention_bias.global|sliding``): Gemma 3's pictures need it
    takes_masks: bool = False


OURS = Form()


def write_onnx_decoder(
    folder: Path,
    plan: OnnxPlan,
    tensors: TensorReader,
    *,
    importance: dict[str, np.ndarray] | None = None,
    n_threads: int = 1,
    takes_masks: bool = False,
    progress: Progress = lambda n_bytes: None,
) -> OnnxPart:
    """Write the graph, its data and the tables into ``folder``. ``takes_masks``: for a Gemma 3 that
    looks at pictures.

    Raises CheckpointError (the input), OSError (the disk).
    """
    sources = {source.name: source for source in plan.mapping.sources}
    with ThreadPoolExecutor(n_threads, thread_name_prefix="quantize") as pool:
        written = functools.partial(in_order, pool, n_threads + 1)
        tables = {
            name: write_table(
                folder / TABLES[name], sources[name], kind, tensors, written, progress
            )
            for name, kind in plan.tables.items()
        }
        with OnnxWriter(folder / GRAPH, opset=OPSET_OF_BLOCKS) as writer:
            weights = Weights(writer, plan, sources, tensors, importance or {}, written, progress)
            build_decoder(writer, weights, plan, Form(takes_masks=takes_masks))
    return OnnxPart(
        file=GRAPH,
        recipe=plan.recipe,
        n_positions=plan.n_positions,
        embeddings=tables[EMBEDDINGS],
        per_layer=tables.get(PER_LAYER),
        weights_bytes=writer.weights_bytes,
        takes_masks=takes_masks,
    )


def build_decoder(writer: OnnxWriter, weights: Weights, plan: OnnxPlan, form: Form = OURS) -> None:
    graph = _Gemma3n if plan.mapping.dims.family == "gemma3n" else _Gemma3
    graph(writer, weights, plan, form).build()


def build_embeddings(writer: OnnxWriter, weights: Weights, plan: OnnxPlan) -> None:
    """``input_ids`` → ``inputs_embeds`` and, of a Gemma 3n, ``per_layer_inputs``. An id beyond a
    table (of media) gets row 0: its embedding comes from an encoder.
    """
    ids = writer.input("input_ids", np.int64, ["batch_size", "sequence"])
    dims = plan.mapping.dims
    names: list[tuple[str, str, tuple[int, ...]]] = [(EMBEDDINGS, "inputs_embeds", (dims.n_embd,))]
    if dims.family == "gemma3n":
        names.append((PER_LAYER, "per_layer_inputs", (dims.n_layer, dims.ple_width)))
    for name, output, shape in names:
        n_rows = writer.integer(weights.sources[name].n_rows)
        inside = writer.node("Where", [writer.node("Less", [ids, n_rows]), ids, writer.integer(0)])
        rows = looked_up(writer, weights.table(name), inside, shape)
        scaled = writer.mul(rows, writer.number(shape[-1] ** 0.5))
        writer.output(output, scaled, np.float32, ["batch_size", "sequence", *shape])


def looked_up(writer: OnnxWriter, table: Sequence[str], ids: str, shape: Sequence[int]) -> str:
    """Rows of :meth:`~.onnx_weights.Weights.table`, each as ``shape``: ``[b, s, *shape]``."""
    if len(table) == 1:
        rows = writer.node("Gather", [table[0], ids])
        rows = writer.node("Cast", [rows], to=TensorProto.FLOAT)
        return writer.reshape(rows, 0, 0, *shape)
    codes, scales = table
    scales = writer.node("Unsqueeze", [scales, writer.ints(2)])
    blocks = writer.node(
        "GatherBlockQuantized",
        [codes, ids, scales],
        domain=MICROSOFT,
        bits=8,
        block_size=32,
        gather_axis=0,
        quantize_axis=2,
    )
    return writer.reshape(blocks, 0, 0, *shape)


class _Gemma3:
    """The graph of a Gemma 3, and what a Gemma 3n has in common with it."""

    def __init__(self, writer: OnnxWriter, weights: Weights, plan: OnnxPlan, form: Form):
        self.writer, self.weights, self.form = writer, weights, form
        self.plan = plan
        self.dims: Dims = plan.mapping.dims
        self.n_positions = plan.n_positions
        self.n_own = self.dims.n_layer - self.dims.n_kv_shared  # layers with K/V of their own
        self.head = EMBEDDINGS if self.dims.tied else "output.weight"
        self._present: dict[int, tuple[str, str]] = {}
        self._given: dict[int, tuple[str, ...]] = {}  # layer → its new k and v, its past

    def build(self) -> None:
        writer, dims = self.writer, self.dims
        x = self._embedded()
        self.declare_inputs()
        mask = writer.input("attention_mask", np.int64, ["batch_size", "total_sequence"])
        n = writer.node("ReduceSum", [mask, writer.ints(1)], keepdims=0)
        self._last_position = writer.node(
            "Cast", [writer.sub(n, writer.ints(1))], to=TensorProto.INT32
        )
        total = writer.node("Gather", [writer.node("Shape", [mask]), writer.integer(1)])
        self._total = writer.node("Cast", [total], to=TensorProto.INT32)
        if self.form.asks_rows:
            keep = writer.input("num_logits_to_keep", np.int64, [])
            negative = writer.node("Neg", [keep])
            self._first_kept = writer.node("Unsqueeze", [negative, writer.ints(0)])
        else:
            self._first_kept = writer.ints(-1)
        self._masks = {
            is_sliding: writer.input(
                f"attention_bias.{layers}", np.float32, [1, 1, "sequence", "total_sequence"]
            )
            for is_sliding, layers in ((False, "global"), (True, "sliding"))
            if self.form.takes_masks
        }
        self._rotary = {
            True: self._rotary_tables(dims.rope_base_sliding, 1.0),
            False: self._rotary_tables(dims.rope_base, dims.rope_factor),
        }
        y = self.norm(self.layers(x), "output_norm")
        logits = writer.multiply(y, self._head_matrix)
        if dims.softcap:
            small = writer.node("Tanh", [writer.mul(logits, writer.number(1 / dims.softcap))])
            logits = writer.mul(small, writer.number(dims.softcap))
        kept = "kept" if self.form.asks_rows else 1  # onnxruntime-genai makes room by this shape
        shape: list[int | str] = ["batch_size", kept, self.weights.sources[self.head].n_rows]
        writer.output("logits", logits, np.float32, shape)

    @functools.cached_property
    def _no_rows(self) -> str:
        width = self.dims.n_head_kv * self.dims.head_dim
        return self.writer.constant(np.zeros((1, 0, width), np.float32), "no_rows")

    @functools.cached_property
    def _head_matrix(self) -> Matrix:
        return self.weights.matrix(self.head)

    def _embedded(self) -> str:
        writer, n_embd = self.writer, self.dims.n_embd
        if not self.form.takes_ids:
            return writer.input("inputs_embeds", np.float32, ["batch_size", "sequence", n_embd])
        ids = writer.input("input_ids", np.int64, ["batch_size", "sequence"])
        if shares_rows(self.plan):
            table: Sequence[str] = self._head_matrix.constants
        else:
            table = self.weights.table(EMBEDDINGS)
        rows = looked_up(writer, table, ids, (n_embd,))
        return writer.mul(rows, writer.number(n_embd**0.5))

    def declare_inputs(self) -> None:
        """Inputs besides the embeddings."""

    def layers(self, x: str) -> str:
        writer = self.writer
        for i in range(self.dims.n_layer):
            p = f"blk.{i}."
            attended = self.attention(self.norm(x, f"{p}attn_norm"), i)
            if i == self.dims.n_layer - 1:
                attended, x = self.kept(attended), self.kept(x)
            x = writer.add(x, self.norm(attended, f"{p}post_attention_norm"))
            x = writer.add(
                x, self.norm(self.ffn(self.norm(x, f"{p}ffn_norm"), i), f"{p}post_ffw_norm")
            )
        return x

    # ---- parts
    def norm(self, x: str, name: str) -> str:
        return self.writer.rms_norm(x, self.weights.array(f"{name}.weight"), self.dims.rms_eps)

    def linear(self, x: str, name: str) -> str:
        return self.writer.multiply(x, self.weights.matrix(f"{name}.weight"))

    def kept(self, x: str) -> str:
        """The last rows along axis 1: those whose logits are wanted."""
        return self.writer.slice(x, self._first_kept, self.writer.ints(_END), 1)

    def gelu(self, x: str) -> str:
        return self.writer.node("Gelu", [x], approximate="tanh")

    def ffn(self, x: str, i: int) -> str:
        gate = self.gate(self.linear(x, f"blk.{i}.ffn_gate"), i)
        up = self.linear(x, f"blk.{i}.ffn_up")
        return self.linear(self.writer.mul(self.gelu(gate), up), f"blk.{i}.ffn_down")

    def gate(self, x: str, i: int) -> str:
        """What the gate of layer ``i`` is before its GELU."""
        return x

    def value(self, v: str) -> str:
        """What the attention's values are before they are cached."""
        return v

    def head_norm(self, x: str, weight: np.ndarray, n_heads: int) -> str:
        writer, width = self.writer, self.dims.head_dim
        split = writer.reshape(x, 0, -1, n_heads, width)
        normed = writer.rms_norm(split, weight, self.dims.rms_eps)
        return writer.reshape(normed, 0, -1, n_heads * width)

    @property
    def scale(self) -> float:
        dims = self.dims
        is_27b = dims.n_layer == 62  # its queries are scaled by the embedding's width
        return (dims.n_embd / dims.n_head if is_27b else dims.head_dim) ** -0.5

    def attention(self, x: str, i: int) -> str:
        writer, dims, p = self.writer, self.dims, f"blk.{i}.attn_"
        is_own = i < self.n_own
        if is_own:
            q, k, v = self._projections(x, p)
            past = [
                writer.input(f"past_key_values.{i}.{side}", np.float32, self._kv_shape("past"))
                for side in ("key", "value")
            ]
            named = tuple(
                writer.declare(f"present.{i}.{side}", np.float32, self._kv_shape("total"))
                for side in ("key", "value")
            )
            self._present[i] = named[0], named[1]
            k = self.head_norm(k, self.weights.array(f"{p}k_norm.weight"), dims.n_head_kv)
            v = self.value(v)
            self._given[i] = k, v, *past
        else:
            q = self.linear(x, f"{p}q")
            owner = max(j for j in range(self.n_own) if dims.sliding[j] == dims.sliding[i])
            named = ()
            if self.form.repeats_kv:
                k, v, *past = self._given[owner]
            else:
                past, k = list(self._present[owner]), self._no_rows
                v = k
        q = self.head_norm(q, self.weights.array(f"{p}q_norm.weight"), dims.n_head)
        cos, sin = self._rotary[dims.sliding[i]]
        reach = {"local_window_size": dims.sliding_window if dims.sliding[i] else -1}
        mask: list[str] = []
        if self._masks:  # behind position ids, which follow from the mask's length
            mask, reach = ["", self._masks[dims.sliding[i]]], {"causal": 0}
        attended = writer.nodes(
            "GroupQueryAttention",
            [q, k, v, *past, self._last_position, self._total, cos, sin, *mask],
            3 if is_own or self.form.repeats_kv else 1,
            named,
            domain=MICROSOFT,
            num_heads=dims.n_head,
            kv_num_heads=dims.n_head_kv,
            scale=self.scale,
            do_rotary=1,
            rotary_interleaved=0,
            **reach,
        )
        return self.linear(attended[0], f"{p}output")

    def _projections(self, x: str, p: str) -> Sequence[str]:
        names = [f"{p}{part}.weight" for part in "qkv"]
        if not self.weights.have_one_type(names):
            return [self.writer.multiply(x, self.weights.matrix(name)) for name in names]
        stacked = self.writer.multiply(x, self.weights.matrix(*names))
        widths = self.writer.ints(*(self.weights.sources[name].n_rows for name in names))
        return self.writer.nodes("Split", [stacked, widths], 3, axis=-1)

    def _kv_shape(self, length: str) -> list[int | str]:
        return ["batch_size", self.dims.n_head_kv, f"{length}_sequence", self.dims.head_dim]

    def _rotary_tables(self, base: float, factor: float) -> tuple[str, str]:
        half = self.dims.head_dim // 2
        exponent = np.arange(half, dtype=np.float32) / np.float32(half)
        frequency = (1.0 / np.float32(base) ** exponent / np.float32(factor)).astype(np.float32)
        shape = (self.n_positions, half)
        cos, sin = (self.writer.reserve(np.float32, shape, name) for name in ("cos", "sin"))
        for start, stop in steps(self.n_positions, half):
            angle = np.arange(start, stop, dtype=np.float32)[:, None] * frequency
            cos.put(np.cos(angle))
            sin.put(np.sin(angle))
            self.weights.progress(2 * angle.nbytes)
        return cos.name, sin.name


class _Gemma3n(_Gemma3):
    """AltUp (four streams as one ``[b, s, 4, n_embd]``), Laurel, sparse gates, per-layer inputs."""

    scale = 1.0  # q_norm has it

    def declare_inputs(self) -> None:
        dims = self.dims
        shape: list[int | str] = ["batch_size", "sequence", dims.n_layer, dims.ple_width]
        self._per_layer = self.writer.input("per_layer_inputs", np.float32, shape)

    def value(self, v: str) -> str:
        return self.head_norm(v, np.ones(self.dims.head_dim, np.float32), self.dims.n_head_kv)

    def gate(self, x: str, i: int) -> str:
        """In the first layers, only what lies far above the row's mean passes."""
        if i >= SPARSE_LAYERS:
            return x
        writer = self.writer
        centred = writer.sub(x, self._mean(x))
        deviation = writer.node("Sqrt", [self._mean_square(centred)])
        cut = writer.mul(deviation, writer.number(SPARSITY_MULTIPLIER))
        return writer.node("Relu", [writer.sub(centred, cut)])

    def layers(self, x: str) -> str:
        writer, dims = self.writer, self.dims
        inputs = self._per_layer_inputs(x)
        streams = self._spread(x)
        self._not_first = writer.constant(np.array([0, 1, 1, 1], np.float32).reshape(4, 1), "rest")
        for i in range(dims.n_layer):
            if i == self.n_own and not self.form.repeats_kv:  # nothing is cached from here on
                streams, inputs = self.kept(streams), [self.kept(row) for row in inputs]
            streams = self._layer(streams, inputs[i], i)
        if not dims.n_kv_shared or self.form.repeats_kv:
            streams = self.kept(streams)
        return self._join(streams)

    def _per_layer_inputs(self, x: str) -> list[str]:
        """What each layer is given per token: ``[b, s, ple_width]``."""
        writer, dims = self.writer, self.dims
        projected = writer.mul(
            self.linear(x, "per_layer_model_proj"), writer.number(dims.n_embd**-0.5)
        )
        projected = writer.reshape(projected, 0, 0, dims.n_layer, dims.ple_width)
        projected = self.norm(projected, "per_layer_proj_norm")
        both = writer.mul(writer.add(projected, self._per_layer), writer.number(2**-0.5))
        sizes = writer.ints(*[1] * dims.n_layer)
        rows = writer.nodes("Split", [both, sizes], dims.n_layer, axis=2)
        return [writer.node("Squeeze", [row, writer.ints(2)]) for row in rows]

    def _mean(self, x: str) -> str:
        return self.writer.node("ReduceMean", [x, self.writer.ints(-1)], keepdims=1)

    def _mean_square(self, x: str) -> str:
        return self._mean(self.writer.mul(x, x))

    def _projected(self, values: Sequence[str], name: str, like: str) -> list[str]:
        """Each of three values by its own matrix, brought to the magnitude of ``like``."""
        writer, n = self.writer, self.dims.n_embd
        target = writer.node("Sqrt", [self._mean_square(like)])
        found = []
        for k, value in enumerate(values):
            rows = range(k * n, (k + 1) * n)
            y = writer.multiply(value, self.weights.matrix(f"{name}.weight", rows=rows))
            square = writer.node("Max", [self._mean_square(y), writer.number(1e-5)])
            found.append(writer.mul(y, writer.div(target, writer.node("Sqrt", [square]))))
        return found

    def _spread(self, x: str) -> str:
        axis = self.writer.ints(2)
        four = [x, *self._projected([x] * 3, "altup_proj", x)]
        return self.writer.concat([self.writer.node("Unsqueeze", [y, axis]) for y in four], 2)

    def _join(self, streams: str) -> str:
        writer, axis = self.writer, self.writer.ints(2)
        parts = writer.nodes("Split", [streams, writer.ints(1, 1, 1, 1)], 4, axis=2)
        first, *rest = (writer.node("Squeeze", [part, axis]) for part in parts)
        rest = self._projected(rest, "altup_unembd_proj", first)
        return writer.mul(writer.node("Sum", [first, *rest]), writer.number(0.25))

    def _first(self, streams: str) -> str:
        writer = self.writer
        row = writer.slice(streams, writer.ints(0), writer.ints(1), 2)
        return writer.node("Squeeze", [row, writer.ints(2)])

    def _times(self, x: str, name: str) -> str:
        """A small matrix, kept in float32."""
        transposed = np.ascontiguousarray(self.weights.array(f"{name}.weight").T)
        return self.writer.node("MatMul", [x, self.writer.constant(transposed, "small")])

    def _route(self, x: str, p: str) -> str:
        writer, dims = self.writer, self.dims
        norm = self.weights.array(f"{p}altup_router_norm.weight") / np.float32(dims.n_embd)
        routed = self._times(writer.rms_norm(x, norm, dims.rms_eps), f"{p}altup_router")
        return writer.node("Tanh", [routed])

    def _layer(self, streams: str, per_layer: str, i: int) -> str:
        writer, p = self.writer, f"blk.{i}."
        mixing = self._times(self._route(self._first(streams), p), f"{p}altup_predict_coef")
        mixing = writer.reshape(mixing, 0, 0, 4, 4)
        predicted = writer.add(streams, writer.node("MatMul", [mixing, streams]))
        active = self._first(predicted)
        done = self._block(active, i)
        innovation = writer.node("Unsqueeze", [writer.sub(done, active), writer.ints(2)])
        share = writer.add(
            self._times(self._route(done, p), f"{p}altup_correct_coef"), writer.number(1.0)
        )
        share = writer.node("Unsqueeze", [share, writer.ints(-1)])
        corrected = writer.add(predicted, writer.mul(share, innovation))
        scale = writer.constant(self.weights.array(f"{p}altup_correct_scale.weight"), "scale")
        extra = self.linear(writer.mul(self._first(corrected), scale), f"{p}inp_gate")
        extra = self.linear(writer.mul(self.gelu(extra), per_layer), f"{p}proj")
        extra = writer.node("Unsqueeze", [self.norm(extra, f"{p}post_norm"), writer.ints(2)])
        return writer.add(corrected, writer.mul(extra, self._not_first))

    def _block(self, x: str, i: int) -> str:
        """Attention, Laurel and FFN on the active stream."""
        writer, p = self.writer, f"blk.{i}."
        normed = self.norm(x, f"{p}attn_norm")
        laurel = self.linear(self.linear(normed, f"{p}laurel_l"), f"{p}laurel_r")
        laurel = writer.add(normed, self.norm(laurel, f"{p}laurel_post_norm"))
        attended = self.norm(self.attention(normed, i), f"{p}post_attention_norm")
        y = writer.add(writer.add(x, attended), laurel)
        y = writer.mul(y, writer.number(2**-0.5))
        return writer.add(
            y, self.norm(self.ffn(self.norm(y, f"{p}ffn_norm"), i), f"{p}post_ffw_norm")
        )
