"""What cutting a vocabulary changed, on texts that chose nothing.

In: the whole model's file and the cut one's (or their vocabularies alone). Out: figures by language
for the manifest. Tokens cost next to nothing to count, so that is done for every language there is
a text of: what was cut away is told as well. Bits and divergence need both models to run; they are
measured one after the other, so that memory holds one.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_gemma.convert.text_chunks import CHUNK_TOKENS
from edge_gemma.convert.trim.choice import Choice
from edge_gemma.convert.trim.languages import measuring_texts
from edge_gemma.engines.llama.tokenizer import Tokenizer
from edge_gemma.errors import RuntimeFailure

_BLOCK_ROWS = 64
Figures = dict[str, float]


def receipt_of(
    whole: Path,
    cut: Path,
    choice: Choice,
    *,
    measure: bool,
    n_threads: int = 0,
    texts: dict[str, str] | None = None,
) -> dict[str, Figures]:
    """Figures by language, those that were chosen first.

    ``tokens_per_character_before`` and ``…_after``, ``identical`` (share of the text, by
    characters, that is made of the same tokens) for every text; with ``measure``, for the languages
    chosen (or English, when none was), ``bits_per_character_before`` and ``…_after``, ``kl`` (mean
    divergence in nats of the cut model from the whole one where both read the same tokens) and
    ``equal_rows`` (positions whose logits of kept tokens are the same to the bit).

    Raises RuntimeFailure where text of kept tokens gives other logits.
    """
    texts = measuring_texts() if texts is None else texts
    order = sorted(texts, key=lambda name: (name not in choice.languages, name))
    found = tokenized(whole, cut, choice.kept, {name: texts[name] for name in order})
    if measure:
        chosen = choice.languages or ("en",)
        run = {name: texts[name] for name in order if name in chosen}
        for name, figures in _measured(whole, cut, choice.kept, run, n_threads).items():
            found[name] |= figures
    return {name: {key: round(value, 6) for key, value in found[name].items()} for name in order}


def tokenized(
    whole: Path, cut: Path, kept: np.ndarray, texts: dict[str, str]
) -> dict[str, Figures]:
    """How each text is made of tokens, before and after."""
    with Tokenizer(whole) as before, Tokenizer(cut) as after:
        return {
            name: _compared(text, before.tokenize(text), after.tokenize(text), kept, before)
            for name, text in texts.items()
        }


def _compared(
    text: str, before: list[int], after: list[int], kept: np.ndarray, whole: Tokenizer
) -> Figures:
    """Tokens that lie at the same place in both are the same text in the same token."""
    old = [int(kept[token]) for token in after]
    same = set(_places(whole, before)) & set(_places(whole, old))
    n_bytes = len(text.encode())
    return {
        "characters": len(text),
        "tokens_per_character_before": len(before) / len(text),
        "tokens_per_character_after": len(after) / len(text),
        "identical": sum(stop - start for start, stop, _ in same) / n_bytes,
    }


def _places(whole: Tokenizer, tokens: list[int]) -> Iterator[tuple[int, int, int]]:
    at = 0
    for token in tokens:
        size = whole.n_bytes(token)
        yield at, at + size, token
        at += size


@dataclass
class _Run:
    """One model on one text: bits of all tokens, and a fingerprint of each row of logits."""

    bits: float
    chunks: list[tuple[int, ...]]  # ids in the whole vocabulary
    rows: list[list[tuple[int, bytes]]]  # with the size of the block that it was in
    losses: list[float]  # nats that the kept tokens lack of the whole probability


def _measured(
    whole: Path, cut: Path, kept: np.ndarray, texts: dict[str, str], n_threads: int
) -> dict[str, Figures]:
    before = _run(whole, None, kept, texts, n_threads)
    after = _run(cut, kept, np.arange(len(kept)), texts, n_threads)
    found: dict[str, Figures] = {}
    for name, text in texts.items():
        old, new = before[name], after[name]
        pairs = list(_same_context(old, new))
        equal = sum(a == b for a, b in pairs)
        if equal < len(pairs):
            raise RuntimeFailure(
                f"{len(pairs) - equal} of {len(pairs)} positions of the {name} text give other "
                "logits than the whole model; the file is not what it should be"
            )
        found[name] = {
            "bits_per_character_before": old.bits / len(text),
            "bits_per_character_after": new.bits / len(text),
            "kl": float(np.mean(old.losses)),
            "equal_rows": equal,
        }
    return found


def _same_context(old: _Run, new: _Run) -> Iterator[tuple[bytes, bytes]]:
    """Fingerprints of rows that both models computed after the same tokens, in blocks of one size:
    the last rows of a smaller block go through other kernels.
    """
    for ids, others, rows, new_rows in zip(
        old.chunks, new.chunks, old.rows, new.rows, strict=False
    ):
        n = _shared(ids, others)
        for (size, row), (new_size, new_row) in zip(rows[:n], new_rows[:n], strict=True):
            if size == new_size:
                yield row, new_row


def _shared(some: tuple[int, ...], others: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    n = min(len(some), len(others))
    return next((i for i in range(n) if some[i] != others[i]), n)


def _run(
    path: Path,
    old_ids: np.ndarray | None,
    kept: np.ndarray,
    texts: dict[str, str],
    n_threads: int,
) -> dict[str, _Run]:
    """``old_ids``: this file's ids in the whole vocabulary (None: it is the whole one); ``kept``:
    the rows to look at.
    """
    from edge_gemma.engines.llama.decoder import Decoder
    from edge_gemma.plan.records import Settings
    from edge_gemma.spans import Tokens

    settings = Settings(
        n_ctx=CHUNK_TOKENS,
        n_ubatch=_BLOCK_ROWS,
        n_threads=n_threads or os.cpu_count() or 1,
        flash_attention=False,
    )
    decoder = Decoder(path, settings)
    try:
        context = decoder.context(n_outputs=_BLOCK_ROWS)
        found = {}
        for name, text in texts.items():
            run = found[name] = _Run(0.0, [], [], [])
            ids, start = decoder.tokenize(text), (decoder.bos,) if decoder.add_bos else ()
            step = CHUNK_TOKENS - len(start)
            for first in range(0, len(ids), step):
                chunk = (*start, *ids[first : first + step])
                run.chunks.append(
                    chunk if old_ids is None else tuple(old_ids[list(chunk)].tolist())
                )
                run.rows.append([])
                position = 0
                for block in context.evaluate([Tokens(chunk)]):
                    _add(run, block, chunk[position + 1 : position + 1 + len(block)], kept)
                    position += len(block)
        return found
    finally:
        decoder.close()


def _add(run: _Run, block: np.ndarray, targets: tuple[int, ...], kept: np.ndarray) -> None:
    for i, row in enumerate(block):
        best = float(row.max())
        weights = np.exp(row - best)
        total = float(weights.sum())
        stays = row[kept].tobytes()
        run.rows[-1].append((len(block), hashlib.blake2b(stays, digest_size=16).digest()))
        run.losses.append(max(math.log(total) - math.log(float(weights[kept].sum())), 0.0))
        if i < len(targets):
            nats = math.log(total) + best - float(row[targets[i]])
            run.bits += nats / math.log(2)
