"""What a decoder's graph holds, read before onnxruntime sees a byte of it.

In: ``decoder.onnx``, which may be anybody's. Out: :class:`GraphFile`, or BundleError. onnxruntime
would open any file that external data names, and allocate what a size says; so operators, sizes and
places are checked here. The few fields that count are read from the protobuf bytes themselves
(onnx/onnx.proto), because the onnx package belongs to the converter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from edge_gemma.errors import BundleError
from edge_gemma.units import MiB

MAX_GRAPH_BYTES = 64 * MiB  # E4B's has 1 MiB
# what convert/onnx_decoder.py writes, by domain
OPERATORS = {
    "": frozenset(
        "Add Cast Concat Div Gather Gelu Identity MatMul Max Mul Neg ReduceMean ReduceSum Relu "
        "Reshape Shape SimplifiedLayerNormalization Slice Split Sqrt Squeeze Sub Sum Tanh "
        "Unsqueeze".split()
    ),
    "com.microsoft": frozenset({"FusedMatMul", "GroupQueryAttention", "MatMulNBits"}),
}
# TensorProto.data_type → bytes of a value: float32, uint8, int8, int32, int64, float16
_VALUE_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 10: 2}
_EXTERNAL = 1
# field numbers
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_CONSTANT, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 5, 11, 12, 15
_NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_PLAIN = 1, {1, 2, 3, 4, 7, 8, 9, 13, 20}  # no tensors, no graphs
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_TENSOR_TYPED = {4, 5, 6, 7, 10, 11}  # values that are not raw: our converter writes none

Value = int | memoryview


@dataclass(frozen=True)
class GraphFile:
    """Names of the graph's inputs and outputs, and the bytes of constants in its data file."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    data_bytes: int


def read_graph_file(path: Path, data_path: Path) -> GraphFile:
    """Check the graph at ``path``, whose data lies in ``data_path`` alone. Raises BundleError."""
    n_bytes = path.stat().st_size
    if n_bytes > MAX_GRAPH_BYTES:
        raise BundleError(
            f"{path} has {n_bytes} bytes; a decoder's graph has at most {MAX_GRAPH_BYTES}"
        )
    n_data = data_path.stat().st_size if data_path.is_file() else 0
    try:
        return _Reader(data_path.name, n_data).model(memoryview(path.read_bytes()))
    except BundleError as error:
        raise BundleError(f"{path} is not run: {error}") from None
    except (ValueError, IndexError, RecursionError):
        raise BundleError(f"{path} is no ONNX graph, or a part of it is missing") from None


class _Reader:
    """``data_name`` is the file that external data may lie in, ``n_data`` its bytes."""

    def __init__(self, data_name: str, n_data: int):
        self._data_name, self._n_data = data_name, n_data
        self._used = 0

    def model(self, data: memoryview) -> GraphFile:
        graph: memoryview | None = None
        for number, value in _fields(data):
            if number in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
                raise BundleError("it brings functions or training of its own")
            if number == _MODEL_GRAPH:
                if graph is not None:
                    raise BundleError("it holds two graphs")
                graph = _bytes(value)
        if graph is None:
            raise BundleError("it holds no graph")
        return self._graph(graph)

    def _graph(self, data: memoryview) -> GraphFile:
        names: dict[int, list[str]] = {_GRAPH_INPUT: [], _GRAPH_OUTPUT: []}
        for number, value in _fields(data):
            if number == _GRAPH_NODE:
                self._node(_bytes(value))
            elif number == _GRAPH_CONSTANT:
                self._tensor(_bytes(value))
            elif number == _GRAPH_SPARSE:
                raise BundleError("it holds sparse constants")
            elif number in names:
                names[number].append(_text(_first(_bytes(value), 1)))
        return GraphFile(tuple(names[_GRAPH_INPUT]), tuple(names[_GRAPH_OUTPUT]), self._used)

    def _node(self, data: memoryview) -> None:
        op = domain = ""
        for number, value in _fields(data):
            if number == _NODE_OP:
                op = _text(value)
            elif number == _NODE_DOMAIN:
                domain = _text(value)
            elif number == _NODE_ATTRIBUTE:
                self._attribute(_bytes(value))
        if op not in OPERATORS.get(domain, ()):
            raise BundleError(
                f"it has the operator {domain + '.' if domain else ''}{op}, which none of this "
                "version's decoders has"
            )

    def _attribute(self, data: memoryview) -> None:
        for number, value in _fields(data):
            if number not in _ATTRIBUTE_PLAIN:
                raise BundleError("an operator's attribute holds a tensor or a graph of its own")
            if number == _ATTRIBUTE_NAME:
                _text(value)

    def _tensor(self, data: memoryview) -> None:
        dims: list[int] = []
        kind = n_raw = location = 0
        name, place = "", {}
        for number, value in _fields(data):
            if number == _TENSOR_DIMS:
                dims += [value] if isinstance(value, int) else _varints(value)
            elif number == _TENSOR_TYPE:
                kind = _int(value)
            elif number == _TENSOR_NAME:
                name = _text(value)
            elif number == _TENSOR_RAW:
                n_raw = len(_bytes(value))
            elif number == _TENSOR_LOCATION:
                location = _int(value)
            elif number == _TENSOR_EXTERNAL:
                key, text = (_text(_first(_bytes(value), k)) for k in (1, 2))
                place[key] = text
            elif number in _TENSOR_TYPED:
                raise BundleError(f"the constant {name!r} is not stored as raw bytes")
        if kind not in _VALUE_BYTES:
            raise BundleError(f"the constant {name!r} is of the type {kind}, which no decoder has")
        n_bytes = prod(dims) * _VALUE_BYTES[kind]
        if location == _EXTERNAL or place:
            self._place(name, place, n_bytes)
        elif n_raw != n_bytes:
            raise BundleError(f"the constant {name!r} has {n_raw} bytes; its shape asks {n_bytes}")

    def _place(self, name: str, place: dict[str, str], n_bytes: int) -> None:
        found = place.get("location", "")
        if found != self._data_name:
            raise BundleError(
                f"the constant {name!r} lies in {found!r}; only {self._data_name} beside the graph "
                "is read"
            )
        offset, length = int(place.get("offset", "0")), int(place.get("length", "-1"))
        if length != n_bytes:
            raise BundleError(f"the constant {name!r} has {length} bytes; its shape asks {n_bytes}")
        if offset < 0 or offset + length > self._n_data:
            raise BundleError(
                f"the constant {name!r} ends at byte {offset + length} of {self._data_name}, which "
                f"has {self._n_data}"
            )
        self._used += n_bytes


# protobuf's wire format: https://protobuf.dev/programming-guides/encoding/


def _fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """(field number, value) of a message; varints and fixed numbers as int, the rest as bytes.
    Raises ValueError, IndexError.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("a field reaches beyond its message")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _varints(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _first(data: memoryview, number: int) -> Value:
    return next((value for found, value in _fields(data) if found == number), memoryview(b""))


def _bytes(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message is expected")
    return value


def _int(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a message where a number is expected")
    return value


def _text(value: Value) -> str:
    return str(_bytes(value), "utf-8")
