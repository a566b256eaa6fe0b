"""A vocabulary cut while a checkpoint is converted: decided before a weight is read.

In: the mapping and vocabulary of the whole model, what was asked for. Out: :class:`Trimmed`, and
the mapping, vocabulary and ids by their new numbers. The tokenizer that counts is llama.cpp's, over
a file that has the vocabulary and no tensor.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_gemma.bundles.manifest import VocabularyPart
from edge_gemma.convert.decoder import Layout, vocabulary_header, write_decoder
from edge_gemma.convert.gemma import Mapping
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.convert.trim.choice import Choice, Chooser, Wanted
from edge_gemma.convert.trim.cut import KEPT
from edge_gemma.convert.trim.receipt import receipt_of
from edge_gemma.convert.trim.rows import TABLES
from edge_gemma.convert.vocabulary import Vocabulary
from edge_gemma.engines.llama.tokenizer import Tokenizer

_SIZES = (131_072, 98_304, 65_536, 49_152, 32_768)  # that a dry run offers


@dataclass(frozen=True)
class Trimmed:
    """``whole``: the decoder as it would be with every token; it is written for a receipt only."""

    choice: Choice
    header: bytes  # of a GGUF with the whole vocabulary and no tensor
    n_whole: int
    whole: Layout
    sizes: tuple[Choice, ...]  # smaller ones to choose from, the largest first

    def bytes_of(self, n_tokens: int) -> tuple[int, int]:
        """(bytes of the decoder, bytes that decoding a token reads) with so many tokens."""
        n_bytes, read = self.whole.total_bytes, 0
        for source, _, nbytes in self.whole.tensors:
            gone = 0
            if source.name in TABLES:
                gone = nbytes // self.n_whole * (self.n_whole - n_tokens)
            n_bytes -= gone
            read += nbytes - gone if source.use == "matmul" else 0
        return n_bytes, read

    def offers(self) -> list[tuple[int, float]]:
        """(tokens, share of use covered) of the whole vocabulary, this choice and smaller ones."""
        choices = (self.choice, *self.sizes)
        return [(self.n_whole, 1.0), *((len(each.kept), each.coverage) for each in choices)]

    def part(self, folder: Path, decoder: Path, *, measure: bool, n_threads: int) -> VocabularyPart:
        """The manifest's part with its receipt. ``measure`` needs the whole decoder beside it
        (:meth:`write_whole`).
        """
        whole = folder / _WHOLE
        if not measure:
            whole.write_bytes(self.header)
        receipt = receipt_of(whole, decoder, self.choice, measure=measure, n_threads=n_threads)
        whole.unlink()
        return VocabularyPart(
            n_whole=self.n_whole,
            languages=self.choice.languages,
            texts=self.choice.files,
            file=KEPT,
            receipt=receipt,
        )

    def write_whole(
        self, folder: Path, tensors: TensorReader, importance: dict[str, np.ndarray], n_threads: int
    ) -> None:
        write_decoder(
            folder / _WHOLE, self.whole, tensors, importance=importance, n_threads=n_threads
        )

    def write_kept(self, folder: Path) -> None:
        np.save(folder / KEPT, self.choice.kept)


_WHOLE = ".whole.gguf"


def decide(
    mapping: Mapping,
    vocabulary: Vocabulary,
    wanted: Wanted,
    needed: Iterable[int],
    prompts: Iterable[str],
    whole: Layout,
) -> Trimmed:
    """Raises UsageError, RuntimeFailure as :class:`Chooser` does."""
    header = vocabulary_header(mapping.dims, vocabulary)
    n_whole = len(vocabulary.tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        path.write_bytes(header)
        with Tokenizer(path) as tokenizer:
            rows = {i for i in needed if 0 <= i < n_whole}
            chooser = Chooser(vocabulary, tokenizer, wanted, rows, prompts)
            choice = chooser.choice()
            smaller = (n for n in _SIZES if chooser.smallest <= n < len(choice.kept))
            sizes = tuple(map(chooser.choice, smaller)) if wanted.offer_sizes else ()
    return Trimmed(choice, header, n_whole, whole, sizes)
