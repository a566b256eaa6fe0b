"""float32 rows → ggml blocks, by llama.cpp's own code, with the checks that
code does not make.

In: a type's name and rows ``[n, n_per_row]`` float32. Out: bytes.
``ggml_quantize_chunk`` is called with ctypes in the libggml-base that
llama-cpp-python ships: the same bytes as ``llama_model_quantize``, no
intermediate file, and two chunks on two cores, because ctypes releases the
GIL. It does not check that a row is a multiple of the block (K-quants on
rows of 640 corrupt the heap), so that is checked here. This module does not
know which tensor gets which type.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

from edge_gemma.bundles.gguf import TYPE_IDS, TYPE_SIZES
from edge_gemma.errors import MissingExtra, RuntimeFailure, UsageError

# What llama.cpp's quantizer can write without an importance matrix; those
# that insist on one are not offered
TYPES = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K",
    "Q5_1",
    "Q5_0",
    "Q4_K",
    "Q4_1",
    "Q4_0",
    "IQ4_NL",
    "IQ4_XS",
    "Q3_K",
    "IQ3_S",
    "Q2_K",
)
# Rows that are no multiple of 256 → a type of block 32
# (src/llama-quant.cpp, tensor_type_fallback)
_FALLBACK = {
    "IQ4_XS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def to_bf16(values: np.ndarray) -> np.ndarray:
    """``values`` float32 → bfloat16 of the same shape, rounded to nearest,
    ties to even, as ggml and PyTorch round.

    >>> to_bf16(np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)).tolist()  # both are ties
    [1.0, 1.015625]
    """
    return values.astype(ml_dtypes.bfloat16)


def fitting_type(name: str, n_per_row: int) -> str:
    """``name``, or what llama.cpp falls back to when a row of ``n_per_row``
    values is no multiple of its block.

    >>> fitting_type("Q4_K", 2048), fitting_type("Q4_K", 640), fitting_type("Q4_0", 100)
    ('Q4_K', 'Q5_0', 'F16')
    """
    if n_per_row % TYPE_SIZES[name][0]:
        name = _FALLBACK.get(name, name)
    return name if n_per_row % TYPE_SIZES[name][0] == 0 else "F16"


def row_bytes(name: str, n_per_row: int) -> int:
    block, nbytes = TYPE_SIZES[name]
    if n_per_row % block:
        raise UsageError(f"a row of {n_per_row} values cannot be {name}, whose block is {block}")
    return n_per_row // block * nbytes


@functools.cache
def _library() -> ctypes.CDLL:
    """libggml-base of llama-cpp-python, found without importing it (which
    would load all of llama.cpp).
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("Quantizing (llama.cpp's libggml-base)", "convert")
    names = {"linux": "libggml-base.so", "darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}
    path = (
        Path(spec.submodule_search_locations[0])
        / "lib"
        / names.get(sys.platform, "libggml-base.so")
    )
    try:
        library = ctypes.CDLL(str(path))
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        library.ggml_validate_row_data.restype = ctypes.c_bool
        library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        library.ggml_row_size.restype = ctypes.c_size_t
        library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        for name in TYPES:  # the ids and sizes of bundles/gguf.py against the library's own
            if library.ggml_row_size(TYPE_IDS[name], 256) != row_bytes(name, 256):
                raise RuntimeFailure(
                    f"{path} lays out {name} differently; this edge-gemma was made for "
                    "llama-cpp-python 0.3.36"
                )
    except (OSError, AttributeError) as error:
        raise RuntimeFailure(f"cannot use {path}: {error}; reinstall llama-cpp-python") from error
    return library


def quantize_rows(name: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """``rows [n, n_per_row]`` float32 → uint8 ``[n · row_bytes]``;
    ``importance [n_per_row]`` float32 weighs the columns.

    Raises UsageError when the type does not fit the rows, RuntimeFailure
    when a scale overflows.

    >>> quantize_rows("Q8_0", np.ones((2, 64), np.float32)).shape
    (136,)
    """
    if rows.dtype != np.float32 or rows.ndim != 2 or not rows.flags.c_contiguous:
        raise ValueError(
            f"rows must be contiguous float32 [n, n_per_row], got {rows.dtype} {rows.shape}"
        )
    if name not in TYPES:
        raise UsageError(f"cannot write the type {name!r}; known are {', '.join(TYPES)}")
    n, n_per_row = rows.shape
    size = row_bytes(name, n_per_row)
    if name == "F32":
        return rows.reshape(-1).view(np.uint8)
    if importance is not None and (
        importance.shape != (n_per_row,)
        or importance.dtype != np.float32
        or not importance.flags.c_contiguous
    ):
        raise ValueError(
            f"importance must be contiguous float32 [{n_per_row}], got {importance.dtype} "
            f"{importance.shape}"
        )
    out = np.empty(n * size, np.uint8)
    library = _library()
    weights = None if importance is None else importance.ctypes.data
    written = library.ggml_quantize_chunk(
        TYPE_IDS[name], rows.ctypes.data, out.ctypes.data, 0, n, n_per_row, weights
    )
    assert written == out.nbytes, (name, rows.shape, written)
    if not library.ggml_validate_row_data(TYPE_IDS[name], out.ctypes.data, out.nbytes):
        raise RuntimeFailure(
            f"values up to {np.abs(rows).max():.3g} overflow {name}; choose f32 or bf16 for "
            "this tensor"
        )
    return out
