"""float32 rows → 4-bit codes around a zero point of their block, as ``MatMulNBits`` holds them.

In: rows, and how much each column matters. Out: codes, scales and zero points. ggml's Q4_1 search
gives the range of a block; its minimum is a float, with which onnxruntime 1.32 takes a hundred
times as long for one row on a CPU. So here it becomes a whole number of steps, and the scale is
fitted anew. This module does not know which tensor it is.
"""

from __future__ import annotations

import numpy as np

from edge_gemma.convert.quantize import quantize_rows

_BLOCK, _MOST = 32, 15
_ZERO_POINT_OF_NOTHING = 8
_PIECE_VALUES = 1 << 17  # half a MiB: what is tried on a piece stays in the cache, and is small


def packed_zeros_bytes(n_per_row: int) -> int:
    """Of a row's zero points, two in a byte.

    >>> packed_zeros_bytes(64), packed_zeros_bytes(96)
    (1, 2)
    """
    return (n_per_row // _BLOCK + 1) // 2


def around_zero_points(
    rows: np.ndarray, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``rows [n, k]`` float32, ``k`` a multiple of 32 → codes uint8 ``[n, k/32, 16]``, scales
    float32 ``[n, k/32]``, zero points uint8 ``[n, packed_zeros_bytes(k)]``: a value is
    ``(code - zero point) · scale``. ``importance [k]`` weighs the columns. Raises what
    :func:`~.quantize.quantize_rows` does.
    """
    step = max(1, _PIECE_VALUES // rows.shape[1])
    pieces = [
        _around(rows[start : start + step], importance) for start in range(0, len(rows), step)
    ]
    codes, scales, zeros = zip(*pieces, strict=True)
    return np.concatenate(codes), np.concatenate(scales), np.concatenate(zeros)


def _around(
    rows: np.ndarray, importance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, k = rows.shape
    x = rows.reshape(n, -1, _BLOCK)
    weights = np.ones(k, np.float32) if importance is None else importance
    weights = weights.reshape(-1, _BLOCK)
    best_error = np.full(x.shape[:2], np.inf, np.float32)
    scales = np.zeros(x.shape[:2], np.float32)
    zeros = np.full(x.shape[:2], _ZERO_POINT_OF_NOTHING, np.float32)
    codes = np.full(x.shape, _ZERO_POINT_OF_NOTHING, np.uint8)
    for step, zero in _candidates(rows, x, importance):
        inverse = np.divide(1.0, step, out=np.zeros_like(step), where=step > 0)
        tried = np.clip(np.rint(x * inverse[..., None] + zero[..., None]), 0, _MOST)
        steps = tried - zero[..., None]
        weighted = steps * weights
        square = np.einsum("nbi,nbi->nb", weighted, steps)
        product = np.einsum("nbi,nbi->nb", weighted, x)
        fitted = np.divide(product, square, out=np.zeros_like(square), where=square > 0)
        error = -fitted * product  # Σ w (x - steps · fitted)², but for Σ w x²
        is_better = error < best_error
        best_error[is_better] = error[is_better]
        scales[is_better], zeros[is_better] = fitted[is_better], zero[is_better]
        codes[is_better] = tried[is_better].astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales, _packed(zeros.astype(np.uint8))


def _candidates(rows: np.ndarray, x: np.ndarray, importance: np.ndarray | None):
    """(step, zero point) of every block: ggml's range with its minimum rounded either way, and the
    block's whole range.
    """
    blocks = quantize_rows("Q4_1", rows, importance).reshape(*x.shape[:2], -1)
    found = np.ascontiguousarray(blocks[..., :4]).view(np.float16).astype(np.float32)
    step, least = found[..., 0], found[..., 1]
    exact = np.divide(-least, step, out=np.zeros_like(step), where=step > 0)
    for zero in (np.floor(exact), np.ceil(exact)):
        yield step, np.clip(zero, 0, _MOST)
    lowest, highest = np.minimum(x.min(axis=2), 0), np.maximum(x.max(axis=2), 0)
    step = (highest - lowest) / _MOST
    exact = np.divide(-lowest, step, out=np.zeros_like(step), where=step > 0)
    yield step, np.clip(np.rint(exact), 0, _MOST)


def _packed(zeros: np.ndarray) -> np.ndarray:
    if zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    return np.ascontiguousarray(zeros[:, 0::2] | zeros[:, 1::2] << 4)
