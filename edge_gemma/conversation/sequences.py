"""One KV cache, and who sits in it: the sequences that sessions take turns in.

In: loaded weights. Out: a context whose ``n_seq_max`` sequences are lent; when all are taken the
session idle longest gives its own up (what it appended stays with it, and is prefilled again when
it is next used). So any number of sessions share what was planned.
"""

from __future__ import annotations

from typing import Protocol

from edge_gemma.engines.llama.decoder import Context, Decoder
from edge_gemma.engines.llama.weights import Weights
from edge_gemma.errors import RuntimeFailure


class Tenant(Protocol):
    """Who may hold a sequence."""

    busy: bool

    def give_up_sequence(self) -> int: ...


class Cache:
    """``identity``: the SHA-256 of the decoder's file, which saved conversations are held against."""

    def __init__(self, weights: Weights, identity: str):
        self.weights, self.identity = weights, identity
        self.decoder: Decoder = weights.decoder
        self.context: Context = self.decoder.context()
        self._tenants: dict[int, Tenant | None] = dict.fromkeys(
            range(self.context.settings.n_seq_max)
        )  # oldest use first

    def take_sequence(self, tenant: Tenant) -> int:
        """A free sequence, else that of the tenant idle longest. Raises RuntimeFailure when all are
        busy.
        """
        free = next((sequence for sequence, held in self._tenants.items() if held is None), None)
        if free is None:
            idle = next(
                (sequence for sequence, held in self._tenants.items() if not held.busy), None
            )
            if idle is None:
                raise RuntimeFailure(
                    f"all {len(self._tenants)} sequences of the KV cache are busy "
                    "generating; load with a larger n_seq_max"
                )
            free = self._tenants[idle].give_up_sequence()
        del self._tenants[free]
        self._tenants[free] = tenant
        return free

    def return_sequence(self, sequence: int) -> None:
        self._tenants[sequence] = None
