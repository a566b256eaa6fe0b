"""What quantizing cost: perplexity and KL divergence against the weights it
came from.

In: two or more GGUFs of one vocabulary and a text. Out: a :class:`Receipt`
for each. Everything is computed chunk by chunk with all models side by
side, because the logits of 20,000 tokens would be 20 GB. Every token after
the first of a chunk (BOS) is scored.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_gemma.convert.text_chunks import CHUNK_TOKENS, Tokenizer, read_chunks
from edge_gemma.errors import UsageError

if TYPE_CHECKING:
    from edge_gemma.engines.llama.rescoring import Rescorer

BLOCK_ROWS = 64  # logits rows at a time: 64 × 262,144 × 4 bytes = 64 MiB a model


@dataclass(frozen=True)
class Receipt:
    """Nats and fractions over ``tokens`` predicted tokens; ``kld_p99`` is
    the 99th percentile of the tokens' divergences.
    """

    ppl: float
    ppl_reference: float
    kld_mean: float
    kld_p99: float
    top1_agreement: float
    tokens: int
    seconds: float
    text: str

    def table(self) -> dict[str, float | int | str]:
        return {
            key: round(value, 6) if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }


def compare(
    reference: Path,
    candidates: dict[str, Path],
    text: Path,
    *,
    max_tokens: int = 0,
    n_threads: int = 0,
    rescorers: Mapping[str, Rescorer] | None = None,
    kept: Mapping[str, np.ndarray] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Receipt]:
    """Receipts of ``candidates`` (name → GGUF) against ``reference`` on
    ``text``; ``max_tokens`` bounds the work (0: the whole text).
    ``rescorers``: what scores a candidate's best tokens again, as its bundle
    will when it runs; the caller closes them. ``kept``: ids in the whole
    vocabulary of a candidate whose vocabulary was cut; it is held against
    the reference's probabilities of those alone, and tokens that a candidate
    lacks are left out of the text for all of them.

    Raises UsageError (too little text, another vocabulary), BundleError.
    """
    from edge_gemma.engines.llama.decoder import Decoder
    from edge_gemma.plan.records import Settings
    from edge_gemma.spans import Tokens

    n_threads = n_threads or os.cpu_count() or 1
    settings = Settings(
        n_ctx=CHUNK_TOKENS, n_ubatch=BLOCK_ROWS, n_threads=n_threads, flash_attention=False
    )
    started = time.perf_counter()
    sums = {name: _Sums() for name in candidates}
    with ExitStack() as stack:
        decoders = []
        for path in (reference, *candidates.values()):
            decoders.append(Decoder(path, settings))
            stack.callback(decoders[-1].close)
        for name, decoder in zip(candidates, decoders[1:], strict=True):
            decoder.rescorer = (rescorers or {}).get(name)
        base = decoders[0]
        maps = [None, *((kept or {}).get(name) for name in candidates)]
        for decoder, ids in zip(decoders, maps, strict=True):
            if decoder.n_vocab != (base.n_vocab if ids is None else len(ids)):
                raise UsageError(
                    f"{reference} and the files to compare have vocabularies of different sizes"
                )
        own_ids = [None if ids is None else _new_ids(ids, base.n_vocab) for ids in maps]
        chunks = read_chunks(text, _Common(base, maps), max_tokens=max_tokens, purpose="a receipt")
        contexts = [decoder.context(n_outputs=BLOCK_ROWS) for decoder in decoders]
        pool = stack.enter_context(ThreadPoolExecutor(n_threads))
        for done, chunk in enumerate(chunks, 1):
            targets = np.array(chunk[1:])  # of every position but the last
            logits = [
                context.evaluate([Tokens(chunk if ids is None else tuple(ids[list(chunk)]))])
                for context, ids in zip(contexts, own_ids, strict=True)
            ]
            for blocks in zip(*logits, strict=True):
                n = min(len(blocks[0]), len(targets))
                rows = [block[:n] for block in blocks]
                _score(pool, n_threads, rows, targets[:n], list(sums.values()), maps)
                targets = targets[n:]
            progress(done, len(chunks))
    seconds = time.perf_counter() - started
    return {name: each.receipt(seconds, text.name) for name, each in sums.items()}


def _new_ids(kept: np.ndarray, n_whole: int) -> np.ndarray:
    """Id in the whole vocabulary → id among those that stay; −1 for what went."""
    ids = np.full(n_whole, -1, np.int64)
    ids[kept] = np.arange(len(kept))
    return ids


class _Common:
    """A tokenizer without the tokens that some vocabulary lacks."""

    def __init__(self, base: Tokenizer, maps: Sequence[np.ndarray | None]):
        self.add_bos, self.bos, self._base = base.add_bos, base.bos, base
        self._kept = [frozenset(ids.tolist()) for ids in maps if ids is not None]

    def tokenize(self, text: str) -> list[int]:
        ids = self._base.tokenize(text)
        return [i for i in ids if all(i in kept for kept in self._kept)]


class _Sums:
    """What is added up over the tokens of one candidate."""

    def __init__(self) -> None:
        self.nll = self.nll_reference = 0.0
        self.same = 0
        self.klds: list[np.ndarray] = []

    def receipt(self, seconds: float, text: str) -> Receipt:
        klds = np.concatenate(self.klds)
        n = len(klds)
        return Receipt(
            ppl=float(np.exp(self.nll / n)),
            ppl_reference=float(np.exp(self.nll_reference / n)),
            kld_mean=float(klds.mean()),
            kld_p99=float(np.percentile(klds, 99)),
            top1_agreement=self.same / n,
            tokens=n,
            seconds=seconds,
            text=text,
        )


def _score(
    pool: ThreadPoolExecutor,
    n_parts: int,
    blocks: list[np.ndarray],
    targets: np.ndarray,
    sums: list[_Sums],
    maps: Sequence[np.ndarray | None],
) -> None:
    """Add one block of rows to the sums: the rows are dealt to the threads,
    the sums stay in this one.
    """
    edges = np.linspace(0, len(targets), n_parts + 1).astype(int)
    jobs = [
        pool.submit(_score_rows, [block[a:b] for block in blocks], targets[a:b], maps)
        for a, b in pairwise(edges)
        if a < b
    ]
    for job in jobs:
        nll_reference, results = job.result()
        for each, (nll, klds, same) in zip(sums, results, strict=True):
            each.nll += nll
            each.nll_reference += nll_reference
            each.same += same
            each.klds.append(klds)


def _score_rows(
    blocks: list[np.ndarray], targets: np.ndarray, maps: Sequence[np.ndarray | None]
) -> tuple[float, list[tuple[float, np.ndarray, int]]]:
    """KL(p‖q) = Σ p·(x − y) − log Z_x + log Z_y for logits x of the
    reference and y of a candidate.

    Row by row: a row of 262,144 float32 is 1 MiB and stays in the cache for
    all its passes; a block of them would not.
    """
    n = len(targets)
    nll_reference = 0.0
    n_candidates = len(blocks) - 1
    nll, same = [0.0] * n_candidates, [0] * n_candidates
    klds = np.empty((n_candidates, n))
    scratch = np.empty(blocks[0].shape[1], np.float32)
    for i, target in enumerate(targets):
        whole = _Row(blocks[0][i])  # [n_vocab] float32
        nll_reference += whole.log_z - float(whole.x[target])
        for k, (block, kept) in enumerate(zip(blocks[1:], maps[1:], strict=True)):
            row, at = whole, int(target)
            if kept is not None:
                row, at = _Row(whole.x[kept]), int(np.searchsorted(kept, target))
            y = block[i]
            best, room = y.argmax(), scratch[: len(y)]
            np.exp(np.subtract(y, y[best], out=room), out=room)
            log_zy = float(y[best]) + np.log(float(room.sum()))
            shift = float(np.dot(row.p, np.subtract(row.x, y, out=room))) / row.z
            nll[k] += log_zy - float(y[at])
            klds[k, i] = max(shift - row.log_z + log_zy, 0.0)  # below zero only by rounding
            same[k] += int(best == row.best)
    return nll_reference, list(zip(nll, klds, same, strict=True))


class _Row:
    """Logits ``x`` of the reference and what they are as probabilities: ``p`` / ``z``."""

    def __init__(self, x: np.ndarray):
        self.x, self.best = x, x.argmax()
        self.p = np.exp(x - x[self.best])
        self.z = float(self.p.sum())
        self.log_z = float(x[self.best]) + np.log(self.z)
