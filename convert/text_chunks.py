"""A text file → chunks of 512 tokens, as calibration and quality receipts
evaluate them.

In: a text, whatever can tokenize it. Out: tuples of ids that each begin
with BOS where the model has one. It does not know what the chunks are for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from edge_gemma.errors import UsageError

CHUNK_TOKENS = 512


class Tokenizer(Protocol):
    """The part of a decoder that is asked for here."""

    add_bos: bool
    bos: int

    def tokenize(self, text: str) -> list[int]: ...


def read_chunks(
    text: Path, tokenizer: Tokenizer, *, max_tokens: int, purpose: str
) -> list[tuple[int, ...]]:
    """The whole chunks of ``text``, of its first ``max_tokens`` tokens only
    unless that is 0.

    Raises UsageError for a text that cannot be read or fills no chunk;
    ``purpose`` is what the message says the tokens are for.
    """
    try:
        content = text.read_text("utf-8", "replace")
    except OSError as error:
        raise UsageError(f"cannot read {text}: {error.strerror}") from None
    ids = tokenizer.tokenize(content)
    start = (tokenizer.bos,) if tokenizer.add_bos else ()
    step = CHUNK_TOKENS - len(start)
    n_chunks = min(len(ids), max_tokens or len(ids)) // step
    if not n_chunks:
        raise UsageError(
            f"{text} has {len(ids)} tokens; {purpose} needs at least {step}, better 20,000 or more"
        )
    return [(*start, *ids[k * step : (k + 1) * step]) for k in range(n_chunks)]
