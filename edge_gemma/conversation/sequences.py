"""One KV cache and the sequences in it, which sessions take turns in.

In: opened weights. Out: a context whose ``n_seq_max`` sequences are lent. When all are taken, the
session that was idle longest gives its own up (what it appended stays with it, and is restored or
prefilled again when it is next used). So any number of sessions share what was planned.
"""

from __future__ import annotations

from typing import Protocol

from edge_gemma.conversation.drafts import Drafts
from edge_gemma.conversation.prompt_cache import PromptCache
from edge_gemma.engines.engine import Context, Decoder, Weights
from edge_gemma.errors import RuntimeFailure
from edge_gemma.options import Sampling


class Holder(Protocol):
    """Who may hold a sequence."""

    @property
    def busy(self) -> bool: ...

    def give_up_sequence(self) -> int: ...

    def close(self) -> None: ...


class Sequences:
    """The KV cache of a model. ``identity`` is the SHA-256 of the decoder's file, which saved
    conversations are compared with; ``sampling`` counts where a caller gives none; ``prompts`` are
    states that were kept; ``n_draft`` tokens are proposed at a time where that pays.
    """

    def __init__(
        self,
        weights: Weights,
        identity: str,
        sampling: Sampling = Sampling(),
        prompts: PromptCache | None = None,
        n_draft: int = 0,
    ):
        self.weights, self.identity, self.sampling = weights, identity, sampling
        self.prompts = prompts
        self.decoder: Decoder = weights.decoder
        self.drafts = Drafts(n_draft) if n_draft else None
        self.context: Context = self.decoder.context(n_outputs=1 + n_draft)
        self._holders: dict[int, Holder | None] = {}  # the longest held first
        for sequence in range(self.context.settings.n_seq_max):
            self._holders[sequence] = None

    def take(self, holder: Holder) -> int:
        """A free sequence, else that of the holder that was idle longest.

        Raises RuntimeFailure when all are busy.
        """
        sequence = self._free()
        del self._holders[sequence]
        self._holders[sequence] = holder
        return sequence

    def _free(self) -> int:
        for sequence, holder in self._holders.items():
            if holder is None:
                return sequence
        for holder in self._holders.values():
            if holder is not None and not holder.busy:
                return holder.give_up_sequence()
        raise RuntimeFailure(
            f"all {len(self._holders)} sequences of the KV cache are busy generating; load with a "
            "larger n_seq_max"
        )

    def give_back(self, sequence: int) -> None:
        self._holders[sequence] = None

    def close(self) -> None:
        """Close the sessions that were left open; what they hold is kept where prompts are."""
        for holder in list(self._holders.values()):
            if holder is not None and not holder.busy:
                holder.close()
