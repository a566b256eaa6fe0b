"""The decoder's weights as an ONNX graph holds them, and the tables that stay outside it.

In: mapped tensors and a recipe. Out: :class:`OnnxPlan`, what each becomes, decided before a weight
is read; :class:`Weights`, which hands them out as constants of a graph; :func:`write_table`.
Quantized weights are ggml's own blocks in ``MatMulNBits``' layout. A few chunks of rows are in
memory at a time. This module does not know the network.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from onnx import TensorProto

from edge_gemma.bundles.manifest import RowTable
from edge_gemma.convert.decoder import CHUNK_VALUES, Progress
from edge_gemma.convert.gemma import Mapping, Source
from edge_gemma.convert.onnx_writer import ALIGNMENT, INLINE_BYTES, MICROSOFT, Matrix, OnnxWriter
from edge_gemma.convert.quantize import quantize_rows, row_bytes
from edge_gemma.convert.recipe import Recipe, choose_types
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.convert.zero_points import around_zero_points, packed_zeros_bytes
from edge_gemma.errors import UnsupportedModel, UsageError

EMBEDDINGS, PER_LAYER = "token_embd.weight", "per_layer_token_embd.weight"
TABLES = {EMBEDDINGS: "embed_tokens.rows", PER_LAYER: "embed_tokens_per_layer.rows"}
TYPES = ("F32", "F16", "Q8_0", "Q4_1", "Q4_0")
MAX_POSITIONS = 32768  # rotary tables of 16 MiB each at 256 values a head
_BLOCK = 32
_BITS = {"Q8_0": 8, "Q4_1": 4, "Q4_0": 4}
_GRAPH_BYTES = 512 << 10  # nodes and names
TableType = Literal["F32", "F16", "Q8_0"]


@dataclass(frozen=True)
class OnnxPlan:
    """What becomes of the weights, decided before one is read."""

    mapping: Mapping
    recipe: str
    types: dict[str, str]  # of matrices, by GGUF name
    tables: dict[str, TableType]
    notes: tuple[str, ...]

    @property
    def n_positions(self) -> int:
        return min(self.mapping.dims.n_ctx_train, MAX_POSITIONS)

    @property
    def total_bytes(self) -> int:
        """What the files take, at most: the weights with the gaps between them."""
        tables = (source for source in self.mapping.sources if source.name in self.tables)
        return self.graph_bytes + sum(
            source.n_rows * row_bytes(self.tables[source.name], source.n_per_row)
            for source in tables
        )

    @property
    def graph_bytes(self) -> int:
        """Of the graph with its data, the tables apart."""
        table = _aligned(4 * self.n_positions * (self.mapping.dims.head_dim // 2))
        total = 4 * table + _GRAPH_BYTES  # cosines and sines of two kinds of layers
        for source in self.mapping.sources:
            if source.use != "unused" and _is_in_graph(self.mapping, source):
                total += _constant_bytes(source, self.types[source.name])
        return total


def _aligned(n_bytes: int) -> int:
    return n_bytes + -n_bytes % ALIGNMENT


def _constant_bytes(source: Source, kind: str) -> int:
    """What a tensor takes in the graph or in its data file, with the gap that follows."""
    n_values = source.n_rows * source.n_per_row
    if kind in _BITS:  # codes, scales and zero points are constants of their own
        zeros = source.n_rows * packed_zeros_bytes(source.n_per_row) if kind == "Q4_1" else 0
        codes = _aligned(n_values * _BITS[kind] // 8)
        return codes + _aligned(4 * n_values // _BLOCK) + _aligned(zeros)
    n_bytes = n_values * (2 if kind == "F16" else 4)
    is_inline = len(source.shape) == 1 and n_bytes < INLINE_BYTES
    return n_bytes if is_inline else _aligned(n_bytes)


def plan_onnx(mapping: Mapping, recipe: Recipe, *, has_imatrix: bool = False) -> OnnxPlan:
    """Raises UnsupportedModel, UsageError (a type that the graph has no operator for)."""
    if mapping.dims.family == "gemma-embedding":
        raise UnsupportedModel("an embedding model has no ONNX decoder here; use --decoder gguf")
    types, notes = choose_types(recipe, mapping, has_imatrix=has_imatrix)
    wrong = sorted({kind for kind in types.values() if kind not in TYPES})
    if wrong and recipe.matrix in TYPES:  # exceptions of a few tensors: in what is finer
        finer = "Q8_0" if recipe.matrix in _BITS else "F32"
        n = sum(kind in wrong for kind in types.values())
        types = {name: finer if kind in wrong else kind for name, kind in types.items()}
        notes = [
            *notes,
            f"{n} of the recipe's tensors are {finer} in place of {', '.join(wrong)}, for which "
            "onnxruntime has no operator",
        ]
    elif wrong:
        raise UsageError(
            f"the recipe {recipe.name} asks for {', '.join(wrong)}; an ONNX decoder holds "
            f"{', '.join(TYPES)}: choose f32, f16, q8_0, edge_onnx or a .toml file with these"
        )
    tables = {
        source.name: _table_type(types[source.name], source)
        for source in mapping.sources
        if source.name in TABLES
    }
    return OnnxPlan(mapping, recipe.name, types, tables, tuple(notes))


def _table_type(kind: str, source: Source) -> TableType:
    """Nothing coarser than 8 bits: a table is on disk, where a finer row costs no speed."""
    if kind == "F32":
        return "F32"
    return "F16" if kind == "F16" or source.n_per_row % _BLOCK else "Q8_0"


def _is_in_graph(mapping: Mapping, source: Source) -> bool:
    if source.name == PER_LAYER:
        return False
    return source.name != EMBEDDINGS or mapping.dims.tied


def table_bytes(plan: OnnxPlan) -> int:
    """Of the tables as constants of a graph: scales are float32 there."""
    tables = (source for source in plan.mapping.sources if source.name in plan.tables)
    return sum(_constant_bytes(source, plan.tables[source.name]) for source in tables)


def shares_rows(plan: OnnxPlan) -> bool:
    """Whether the head's constants are the embedding's rows as a table holds them."""
    is_tied = plan.mapping.dims.tied
    return is_tied and plan.types[EMBEDDINGS] == plan.tables[EMBEDDINGS] == "Q8_0"


def steps(n_rows: int, n_per_row: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_VALUES // n_per_row)
    return ((start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def write_table(
    path: Path,
    source: Source,
    kind: TableType,
    tensors: TensorReader,
    written: Callable,
    progress: Progress,
) -> RowTable:
    def chunk(start: int, stop: int) -> np.ndarray:
        return quantize_rows(kind, source.rows(tensors, start, stop))

    jobs = (functools.partial(chunk, *step) for step in steps(source.n_rows, source.n_per_row))
    with open(path, "wb") as file:
        for data in written(jobs):
            file.write(data.data)
            progress(data.nbytes)
    return RowTable(file=path.name, type=kind, n_rows=source.n_rows, n_per_row=source.n_per_row)


def onnx_blocks(kind: str, blocks: np.ndarray, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """ggml's Q8_0 or Q4_0 rows (uint8) → codes uint8 ``[n, blocks, bytes]`` and scales float32
    ``[n, blocks]`` of MatMulNBits: the same values.
    """
    size = 2 + _BLOCK * _BITS[kind] // 8
    blocks = blocks.reshape(n_rows, -1, size)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0].astype(np.float32)
    codes = blocks[:, :, 2:]
    if kind == "Q8_0":
        return codes ^ 0x80, scales  # around 128 instead of zero
    # ggml's byte holds the values j and j + 16, MatMulNBits' 2j and 2j + 1
    values = np.concatenate([codes & 15, codes >> 4], axis=2)
    return values[:, :, 0::2] | values[:, :, 1::2] << 4, scales


@dataclass
class Weights:
    """The checkpoint's matrices and vectors as constants of the graph, by GGUF name."""

    writer: OnnxWriter
    plan: OnnxPlan
    sources: dict[str, Source]
    tensors: TensorReader
    importance: dict[str, np.ndarray]
    written: Callable
    progress: Progress

    def array(self, name: str) -> np.ndarray:
        """A small tensor as it is: a vector, or ``[n, k]``."""
        source = self.sources[name]
        values = source.rows(self.tensors, 0, source.n_rows)
        return values[0] if len(source.shape) == 1 else values

    def have_one_type(self, names: Sequence[str]) -> bool:
        return len({self.plan.types[name] for name in names}) == 1

    def matrix(self, *names: str, rows: range | None = None) -> Matrix:
        """The rows of all ``names``, one below the other (``rows``: of the only one)."""
        sources = [self.sources[name] for name in names]
        kind, k = self.plan.types[names[0]], sources[0].n_per_row
        n = len(rows) if rows else sum(source.n_rows for source in sources)
        jobs = (
            functools.partial(self._chunk, source, kind, first + start, first + stop)
            for source in sources
            for first, count in [(rows.start, len(rows)) if rows else (0, source.n_rows)]
            for start, stop in steps(count, k)
        )
        if kind in _BITS:
            return self._blocks(kind, n, k, jobs, names[0])
        stored = self._floats(kind, n, k, jobs, names[0])
        if kind == "F16":
            stored = self.writer.node("Cast", [stored], to=TensorProto.FLOAT)
        return Matrix("FusedMatMul", (stored,), {"domain": MICROSOFT, "transB": 1})

    def table(self, name: str) -> Sequence[str]:
        """A table whose rows are looked up, as a bundle keeps it beside the graph: ``[n, k]``, or
        codes uint8 ``[n, blocks, 32]`` around 128 and scales float32 ``[n, blocks]``.
        """
        source, kind = self.sources[name], self.plan.tables[name]
        n, k = source.n_rows, source.n_per_row
        jobs = (functools.partial(self._chunk, source, kind, *step) for step in steps(n, k))
        if kind == "Q8_0":
            return self._blocks(kind, n, k, jobs, name).constants
        return (self._floats(kind, n, k, jobs, name),)

    def _floats(self, kind: str, n: int, k: int, jobs: Iterator[Callable], name: str) -> str:
        place = self.writer.reserve(np.float16 if kind == "F16" else np.float32, (n, k), name)
        for values in self.written(jobs):
            place.put(values)
            self.progress(values.nbytes)
        return place.name

    def _blocks(self, kind: str, n: int, k: int, jobs: Iterator[Callable], name: str) -> Matrix:
        n_blocks, n_bytes = k // _BLOCK, _BLOCK * _BITS[kind] // 8
        codes = self.writer.reserve(np.uint8, (n, n_blocks, n_bytes), name)
        scales = self.writer.reserve(np.float32, (n, n_blocks), "scales")
        places = [codes, scales]
        if kind == "Q4_1":
            shape = (n, packed_zeros_bytes(k))
            places.append(self.writer.reserve(np.uint8, shape, "zero_points"))
        for arrays in self.written(jobs):
            for place, values in zip(places, arrays, strict=True):
                place.put(values)
                self.progress(values.nbytes)
        attributes = {
            "domain": MICROSOFT,
            "K": k,
            "N": n,
            "bits": _BITS[kind],
            "block_size": _BLOCK,
            "accuracy_level": 4,
        }
        return Matrix("MatMulNBits", tuple(place.name for place in places), attributes)

    def _chunk(self, source: Source, kind: str, start: int, stop: int):
        values = source.rows(self.tensors, start, stop)
        if kind == "F32":
            return values
        importance = self.importance.get(source.name)
        if kind == "Q4_1":
            return around_zero_points(values, importance)
        blocks = quantize_rows(kind, values, importance)
        if kind == "F16":
            return blocks.view(np.float16)
        return onnx_blocks(kind, blocks, stop - start)
