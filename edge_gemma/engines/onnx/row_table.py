"""A table of rows on disk, of which a few are read per token: token and per-layer embeddings.

In: a file of rows in ggml's layout (F32, F16, Q8_0). Out: float32 rows. The file is mapped and
advised to be scattered: pages come as they are asked for, and go with :meth:`Table.trim`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from edge_gemma.bundles.gguf import TYPE_SIZES
from edge_gemma.bundles.manifest import RowTable
from edge_gemma.errors import BundleError

_BLOCK = np.dtype([("scale", np.float16), ("values", np.int8, 32)])  # ggml's block_q8_0


class Table:
    """Rows at ``path``, multiplied by ``scale`` as they are read. Close it. Raises BundleError."""

    def __init__(self, path: Path, part: RowTable, scale: float):
        values, nbytes = TYPE_SIZES[part.type]
        self.n_rows, self.width = part.n_rows, part.n_per_row
        self.row_bytes = part.n_per_row * nbytes // values
        self._type, self._scale = part.type, np.float32(scale)
        expected, found = self.n_rows * self.row_bytes, path.stat().st_size
        if found != expected or part.n_per_row % values or not expected:
            raise BundleError(
                f"{path} has {found} bytes; {part.n_rows} rows of {part.n_per_row} values in "
                f"{part.type} take {expected}"
            )
        self._file = open(path, "rb")
        self._map = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)
        self._rows = np.frombuffer(self._map, np.uint8).reshape(self.n_rows, self.row_bytes)

    def read(self, ids: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        """The rows of ``ids`` into ``out`` ``[n, width]`` float32."""
        rows = self._rows[ids]
        if self._type == "Q8_0":
            blocks = rows.view(_BLOCK)  # [n, width / 32]
            scales = blocks["scale"].astype(np.float32)[..., None]
            np.multiply(blocks["values"], scales, out=out.reshape(len(out), -1, 32))
        else:
            out[...] = rows.view(np.float32 if self._type == "F32" else np.float16)
        out *= self._scale

    def prefetch(self, ids: Iterable[int]) -> None:
        """Ask the disk for these rows at once."""
        if hasattr(os, "posix_fadvise"):
            for row in set(ids):
                start = row * self.row_bytes
                os.posix_fadvise(self._file.fileno(), start, self.row_bytes, os.POSIX_FADV_WILLNEED)

    def trim(self) -> None:
        """Give back the rows that were read; the page cache keeps them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        if not self._file.closed:
            del self._rows
            self._map.close()
            self._file.close()
