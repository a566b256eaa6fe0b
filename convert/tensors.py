"""What the writers ask of whatever holds the weights.

Fulfilled by :class:`~edge_gemma.convert.checkpoint.Checkpoint` (a folder),
:class:`~edge_gemma.convert.lora.Merged` (a folder with adapters added) and
:class:`~edge_gemma.convert.mmproj.Mmproj` (a vision GGUF).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class TensorReader(Protocol):
    """Tensors under the names transformers 5 gives them. Reading is safe
    from several threads.
    """

    @property
    def config(self) -> dict:
        """What ``config.json`` says."""
        ...

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """In numpy order, without reading the tensor. Raises
        CheckpointError or BundleError for a name that is not there.
        """
        ...

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """``name`` as finite float32 ``[rows, …]``, whole or a contiguous
        slice along its first axis. Raises CheckpointError or BundleError
        (damaged, not there).
        """
        ...
