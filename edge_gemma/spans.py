"""What a prompt becomes: an ordered list of spans, token ids or embedding rows. Pinned between
prompt, encode and decode.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from edge_gemma.errors import UsageError


@dataclass(frozen=True)
class Tokens:
    """Token ids of the bundle's vocabulary.

    >>> Tokens([2, 105]).ids
    (2, 105)
    """

    ids: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "ids", tuple(int(i) for i in self.ids))

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Rows:
    """Embedding rows ``[n, n_embd]`` float32, as they enter the decoder (unscaled).

    Two are equal when their digests are.

    ``causal=False`` lets the rows attend to each other (one Gemma 3 image); such rows are decoded
    in one ubatch.
    """

    rows: np.ndarray
    causal: bool = True
    digest: str = field(default="")

    def __post_init__(self):
        rows = np.ascontiguousarray(self.rows, dtype=np.float32)
        if rows.ndim != 2:
            raise UsageError(f"embedding rows have shape {rows.shape}; expected [n, n_embd]")
        if not np.isfinite(rows).all():
            raise UsageError(
                "embedding rows hold NaN or infinity; the encoder that made them was given "
                "broken input"
            )
        object.__setattr__(self, "rows", rows)
        if not self.digest:
            digest = hashlib.blake2b(
                rows.tobytes(), digest_size=16, person=b"causal" if self.causal else b"noncausal"
            ).hexdigest()
            object.__setattr__(self, "digest", digest)

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other) -> bool:
        return isinstance(other, Rows) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


Span = Tokens | Rows
