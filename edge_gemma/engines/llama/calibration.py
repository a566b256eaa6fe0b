"""Watch what matrix products multiply while llama.cpp runs, for importance matrices."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from edge_gemma.engines.llama.library import _library_folder, library


class _TensorHead(ctypes.Structure):
    """The front of struct ggml_tensor (ggml.h; GGML_MAX_DIMS 4, GGML_MAX_OP_PARAMS 64, GGML_MAX_SRC
    10).
    """

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


def watch_matmuls(
    wanted: Callable[[str], bool], collect: Callable[[str, np.ndarray], None]
) -> Callable[[int, bool], bool]:
    """An ``on_tensor`` for :class:`Context`:

    ``collect(weight name, rows [n, row] float32)`` for each product with a 2-D weight ``wanted`` by
    name.

    The rows are a view that is valid during the call only.
    """
    library()
    op_name = ctypes.CDLL(str(sorted(_library_folder().glob("*ggml-base.*"))[0])).ggml_op_name
    op_name.restype, op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    matmul = next(i for i in range(256) if op_name(i) == b"MUL_MAT")

    def on_tensor(pointer: int, ask: bool) -> bool:
        tensor = _TensorHead.from_address(ctypes.cast(pointer, ctypes.c_void_p).value or 0)
        if tensor.op != matmul:
            return False
        weight, rows = (
            _TensorHead.from_address(tensor.src[0]),
            _TensorHead.from_address(tensor.src[1]),
        )
        name = weight.name.decode("utf-8", "replace")
        if (
            weight.ne[2] != 1
            or weight.ne[3] != 1
            or rows.type != 0
            or rows.nb[0] != 4
            or not wanted(name)
        ):
            return False
        if not ask:
            n, row = rows.ne[1] * rows.ne[2] * rows.ne[3], rows.ne[0]
            contiguous = rows.nb[1] == 4 * row and rows.nb[2] == rows.nb[1] * rows.ne[1]
            assert contiguous, f"the input of {name} is not laid out row by row"
            collect(
                name,
                np.ctypeslib.as_array((ctypes.c_float * (n * row)).from_address(rows.data)).reshape(
                    n, row
                ),
            )
        return True

    return on_tensor
