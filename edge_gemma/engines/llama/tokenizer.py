"""A GGUF's vocabulary without its weights: text → ids.

In: a path whose header was checked. Out: ids, as :class:`~.decoder.Decoder` would give them for
text without control tokens. It takes some tens of MB and a second for 262,144 tokens.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from edge_gemma.engines.llama import library as llama
from edge_gemma.errors import BundleError, UsageError

_BATCH_LINES = 2000


class Tokenizer:
    """``tokenize`` is safe from one thread at a time. Raises BundleError (llama.cpp refuses it)."""

    def __init__(self, path: str | os.PathLike[str]):
        self._low = low = llama.library()
        params = low.llama_model_default_params()
        params.vocab_only = True
        self._overrides = llama.kv_overrides({"tokenizer.ggml.add_space_prefix": False})
        params.kv_overrides = self._overrides
        llama.forget_log()
        self._model = low.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise BundleError(f"llama.cpp could not read {Path(path).name}: {llama.last_log()}")
        self._vocab = low.llama_model_get_vocab(self._model)
        self._buffer = (ctypes.c_int32 * 4096)()

    def tokenize(self, text: str) -> list[int]:
        """Ids without BOS; control tokens in the text are letters. Raises UsageError (too long)."""
        data = text.encode("utf-8", "surrogatepass")
        while True:
            capacity = len(self._buffer)
            n = self._low.llama_tokenize(
                self._vocab, data, len(data), self._buffer, capacity, False, False
            )
            if n >= 0:
                return self._buffer[:n]
            if n == -(1 << 31):
                raise UsageError(f"a text of {len(data)} bytes is too long to tokenize")
            self._buffer = (ctypes.c_int32 * -n)()

    def tokenize_lines(self, lines: Sequence[str]) -> Iterator[list[int]]:
        """Ids of each line. Many lines go to llama.cpp at once: it looks for each of thousands of
        tokens of their own kind in every text, and 100,000 words one by one take half a minute.
        """
        newline = self.tokenize("\n")
        for start in range(0, len(lines), _BATCH_LINES):
            batch = lines[start : start + _BATCH_LINES]
            split = _split(self.tokenize("\n".join(batch)), newline)
            yield from split if len(split) == len(batch) else map(self.tokenize, batch)

    def n_bytes(self, token: int) -> int:
        """How many bytes of text a token stands for."""
        buffer = ctypes.create_string_buffer(1)
        return abs(self._low.llama_token_to_piece(self._vocab, token, buffer, 1, 0, True))

    def close(self) -> None:
        if self._model:
            self._low.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Tokenizer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _split(ids: list[int], separator: list[int]) -> list[list[int]]:
    """The parts between the separators; [] where the separator is no single token."""
    if len(separator) != 1:
        return []
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == separator[0]:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts
