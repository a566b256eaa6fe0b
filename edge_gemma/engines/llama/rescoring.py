"""The best candidates of a coarse output head, scored again with the token embedding.

Where a recipe gives a tied model a small head of its own, the token embedding still lies on disk
with 8 bits for the input. Its rows are the head's own rows, kept finer: the product of a few of
them with the final hidden state replaces what the small head said of those tokens. One rule for
speed and quality alike: every token within :data:`MARGIN` of the best, at most :data:`MOST`.

In: hidden states ``[n_embd]`` and logits ``[n_vocab]`` float32. Out: the same logits, some of them
finer. What it does not know: contexts, sampling.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from edge_gemma.bundles.description import GEMMA3N_SOFTCAP
from edge_gemma.bundles.manifest import DecoderPart, Family, Tensor, finer_head_rows
from edge_gemma.plan.costs import RESCORED_ROWS

MARGIN = 12.0  # e⁻¹² of the best's probability and less is left as it is
MOST = 256
_BLOCK = np.dtype([("scale", np.float16), ("values", np.int8, 32)])  # ggml's block_q8_0


class Rescorer:
    """Reads rows of the token embedding where they lie in the decoder's file. Close it."""

    def __init__(self, path: Path, family: Family, table: Tensor):
        softcap = GEMMA3N_SOFTCAP if family == "gemma3n" else 0.0
        self._softcap = np.float32(softcap)
        self._row_bytes = table.nbytes // table.shape[1]
        self._n_vocab, self._offset, self._type = table.shape[1], table.offset, table.type
        self._file = open(path, "rb")
        self._map = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)
        rows = np.frombuffer(self._map, np.uint8, table.nbytes, table.offset)
        self._rows = rows.reshape(self._n_vocab, self._row_bytes)
        self._seen = np.zeros(self._n_vocab, bool)
        self._n_seen = 0

    def rescore(self, logits: np.ndarray, hidden: np.ndarray) -> None:
        """Replace the best of ``logits`` ``[n_vocab]`` float32, in place, by their products with
        ``hidden`` ``[n_embd]`` float32.
        """
        ids = candidates(logits)
        self._prefetch(ids)
        scores = self._products(self._rows[ids], hidden)
        if self._softcap:
            scores = self._softcap * np.tanh(scores / self._softcap)
        logits[ids] = scores

    def _products(self, rows: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        if self._type == "F16":
            return rows.view(np.float16).astype(np.float32) @ hidden
        blocks = rows.view(_BLOCK)  # [k, n_embd / 32]
        values = blocks["values"].astype(np.float32).transpose(1, 0, 2)  # [n_embd / 32, k, 32]
        sums = np.matmul(values, hidden.reshape(-1, 32, 1))[..., 0]
        return (sums.T * blocks["scale"]).sum(axis=1)

    def _prefetch(self, ids: np.ndarray) -> None:
        """Ask the disk for all rows that were not read lately at once: on an SD card each would
        else be a wait of its own.
        """
        new = ids[~self._seen[ids]]
        if not len(new):
            return
        if self._n_seen + len(new) > RESCORED_ROWS:
            self.trim()
        self._seen[new] = True
        self._n_seen += len(new)
        if hasattr(os, "posix_fadvise"):
            for token in new.tolist():
                start = self._offset + token * self._row_bytes
                os.posix_fadvise(
                    self._file.fileno(), start, self._row_bytes, os.POSIX_FADV_WILLNEED
                )

    def trim(self) -> None:
        """Give back the rows that were read; the page cache keeps them."""
        if self._n_seen and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        self._seen[:] = False
        self._n_seen = 0

    def close(self) -> None:
        del self._rows
        self._map.close()
        self._file.close()


def rescorer_of(path: Path, family: Family, decoder: DecoderPart) -> Rescorer | None:
    """What scores candidates of the decoder at ``path`` again; None where nothing there could."""
    table = finer_head_rows(decoder)
    return None if table is None else Rescorer(path, family, table)


def candidates(logits: np.ndarray) -> np.ndarray:
    """Ids within :data:`MARGIN` of the best, at most the :data:`MOST` best of them.

    >>> candidates(np.array([0.0, 13.0, 2.0, -1.0], np.float32)).tolist()
    [1, 2]
    """
    ids = np.flatnonzero(logits > logits.max() - np.float32(MARGIN))
    if len(ids) > MOST:
        ids = ids[np.argpartition(-logits[ids], MOST)[:MOST]]
    return ids
