"""Who attends to whom, for a graph that is told: one that also looks at Gemma 3's pictures, whose
rows attend to each other. Added to the scores of every head: 0, or so little that nothing is left.

onnxruntime's attention on the CPU has no window where it is not causal, so such a graph gets both
masks whole, of its global and of its sliding layers.
"""

from __future__ import annotations

import numpy as np

NAMES = ("attention_bias.global", "attention_bias.sliding")
_HIDDEN = np.float32(-1e30)


def fill_masks(
    masks: np.ndarray, position: int, n: int, *, window: int, is_block: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The beginnings of ``masks`` ``[2, at least n · (position + n)]`` float32, as ``[n, position +
    n]``: rows at ``position`` and on see what stands before them (in sliding layers ``window`` of
    it, themselves included), and one another where they are a block.
    """
    total = position + n
    keys, queries = np.arange(total), np.arange(position, total)[:, None]
    in_block = (keys >= position) & is_block
    is_ahead, is_far = keys > queries, keys <= queries - window
    filled = []
    for mask, is_hidden in zip(masks, (is_ahead, is_ahead | is_far), strict=True):
        view = mask[: n * total].reshape(n, total)
        view[...] = np.where(is_hidden & ~in_block, _HIDDEN, np.float32(0))
        filled.append(view)
    return filled[0], filled[1]
