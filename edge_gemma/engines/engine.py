"""What an engine offers to conversation/: llama.cpp fulfils it, and onnxruntime.

An engine has four parts. :class:`Weights` are a bundle's decoder opened as planned. Its
:class:`Decoder` holds the vocabulary and makes the other two: a :class:`Context` (the KV cache of
one or several sequences) and a :class:`Sampler` (logits → ids, for one generation). Everything
above this module uses these names and no others, so a second engine needs no change there.

Positions count from 0. A sequence is one conversation's place in a context, 0 … n_seq_max − 1.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

from edge_gemma.options import Logprob, Sampling
from edge_gemma.plan.records import Settings
from edge_gemma.spans import Span

Buffer = bytes | bytearray | memoryview
Step = tuple[int, int, Sequence[int]]  # sequence, position, ids
Outputs = Literal["none", "last"]
EVALUATE_ROWS = 64  # logits rows per block in Context.evaluate: 64 × 262,144 × 4 bytes = 64 MiB


class Context(Protocol):
    """A KV cache with compute buffers: ``settings.n_seq_max`` sequences of ``settings.n_ctx``
    positions. Not for two threads at once: hold ``lock``; only :meth:`cancel` needs no lock.
    """

    @property
    def settings(self) -> Settings: ...

    @property
    def lock(self) -> threading.RLock: ...

    def decode(self, sequence: int, position: int, span: Span, outputs: Outputs = "none") -> None:
        """Put one span at ``position`` of ``sequence``; with outputs "last", keep the logits of its
        last position.

        Raises Cancelled (what was decoded before the stop stays, ``error.position`` tells how far),
        UsageError (ids outside the vocabulary, rows of the wrong width), RuntimeFailure.
        """

    def decode_step(self, items: Sequence[Step], *, every: bool = False) -> None:
        """Tokens for each of several sequences in one pass, ``settings.n_ubatch`` of them at most.
        The logits of each sequence's last are kept, in the order of ``items``; with ``every``,
        those of all tokens.

        Raises Cancelled (then none of the items was decoded), RuntimeFailure.
        """

    @property
    def n_decodes(self) -> int:
        """Decodes so far, of all sequences: logits are valid while it stays the same."""

    def logits(self, row: int = -1) -> np.ndarray:
        """One kept row of logits ``[n_vocab]`` float32 of the last decode, as a view that is valid
        until the next. Raises RuntimeFailure when none was kept.
        """

    def evaluate(
        self, spans: Sequence[Span], wanted: range | None = None, step: int | None = None
    ) -> Iterator[np.ndarray]:
        """Logits at every position of one prompt (or those in ``wanted``), in blocks ``[k,
        n_vocab]`` float32 that are copies. Sequence 0 is cleared first.
        """

    def clear(self, sequence: int) -> None:
        """Forget the whole sequence."""

    def can_rewind(self, sequence: int, position: int) -> bool:
        """Whether :meth:`rewind` can do it exactly."""

    def rewind(self, sequence: int, position: int) -> bool:
        """Forget ``position`` and everything after it. False when that cannot be done exactly (the
        cells of a sliding window are gone): then the sequence is empty.
        """

    def length(self, sequence: int) -> int:
        """Positions that the sequence holds."""

    def state_bytes(self, sequence: int, *, window: bool = False) -> int:
        """How many bytes :meth:`save` or (``window``) :meth:`save_window` will give now."""

    def save(self, sequence: int) -> memoryview:
        """The engine's own bytes of a sequence, for a context of the same file, n_ctx and KV type.
        Raises RuntimeFailure.
        """

    def restore(self, sequence: int, state: Buffer) -> bool:
        """Take over what :meth:`save` gave. False when the engine refuses it: then the sequence is
        empty. The caller has checked where the bytes come from.
        """

    def save_window(self, sequence: int) -> memoryview:
        """The sliding layers alone: the only part of a sequence that is lost as it grows. Raises
        RuntimeFailure.
        """

    def restore_window(self, sequence: int, window: Buffer, position: int) -> bool:
        """Go back to ``position`` with what :meth:`save_window` gave there; the sequence must still
        hold the positions before it. False when the engine refuses it: then the sequence is empty.
        """

    def cancel(self) -> None:
        """Stop a running decode, from any thread."""

    def clear_cancel(self) -> None:
        """Forget an earlier :meth:`cancel`."""

    @property
    def is_open(self) -> bool:
        """Whether the model was not closed yet."""

    def check_open(self) -> None:
        """Raises RuntimeFailure when the model was closed."""

    def close(self) -> None: ...


class Sampler(Protocol):
    """Logits → ids for one generation. Close it."""

    @property
    def seed(self) -> int:
        """The seed in use, drawn when none was given."""

    def begin_call(self, text: str) -> bool:
        """Hold what follows ``text``, the beginning of a function call that was said, to the call
        schema, until the call ends. False where nothing can: it is no call to one of the functions,
        or the engine cannot enforce it.
        """

    def forced(self) -> list[int]:
        """The ids that must come next whatever the logits say, remembered as if they had been
        sampled; empty where there is a choice. Raises RuntimeFailure.
        """

    def sample(self, logits: np.ndarray) -> int:
        """Choose one id from a row of logits ``[n_vocab]`` float32, and remember it (penalties,
        grammar). Raises RuntimeFailure when nothing is left to choose from.
        """

    def logprob(self, logits: np.ndarray, token: int) -> Logprob:
        """Log-probabilities of the row as the model gave it, before temperature and truncation."""

    def close(self) -> None: ...


class Embedder(Protocol):
    """Makes vectors of texts, ``settings.n_ctx`` tokens in one pass. Not for two threads at
    once.
    """

    @property
    def settings(self) -> Settings: ...

    def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """One pooled vector for each text's ids: ``[n, width]`` float32, not normalised; 1 …
        EMBED_TEXTS texts of at most ``settings.n_ctx`` ids together. Raises UsageError,
        RuntimeFailure.
        """

    def close(self) -> None: ...


class Decoder(Protocol):
    """Weights and vocabulary. Holds no conversation."""

    @property
    def n_vocab(self) -> int: ...

    @property
    def n_embd(self) -> int: ...

    @property
    def n_ctx_train(self) -> int: ...

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Text → ids without begin-of-sequence. ``special``: control tokens written in the text
        count as such.
        """

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes a token stands for; control tokens give none unless ``special``."""

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""

    def context(self, settings: Settings | None = None, *, n_outputs: int | None = None) -> Context:
        """A new KV cache; ``n_outputs`` rows of logits may be kept by one decode. Raises
        RuntimeFailure (no memory).
        """

    def embedder(self, settings: Settings | None = None) -> Embedder:
        """What makes vectors of texts with the weights of an embedding model. Raises RuntimeFailure
        (no memory).
        """

    def sampler(self, sampling: Sampling) -> Sampler:
        """A sampler for one generation. Raises UsageError (a grammar or schema that cannot be
        enforced).
        """

    def check(self, sampling: Sampling) -> None:
        """Raises UsageError where :meth:`sampler` would. Ask before a prompt is prefilled."""

    def close(self) -> None: ...


class Weights(Protocol):
    """A bundle's decoder, opened as planned, and its cold pages."""

    @property
    def decoder(self) -> Decoder: ...

    @property
    def version(self) -> str:
        """The engine's name and version: states of another one are not taken."""

    @property
    def identity(self) -> str:
        """SHA-256 of the weights' file, or over those of several: saved conversations are compared
        with it.
        """

    def prefetch(self, ids: Iterable[int]) -> None:
        """Ask the disk for the table rows of these tokens before they are needed."""

    def trim(self) -> None:
        """Give back the pages of rows that were looked up since the last call."""

    def rest(self, on_wake: Callable[[], None]) -> None:
        """Let go of every mapped page, for somebody who needs the memory meanwhile: the next
        :meth:`wake` calls ``on_wake`` first, who gives it back.
        """

    def wake(self) -> None:
        """Bring back what :meth:`rest` let go; ask before anything is decoded. Does nothing when
        nothing rests.
        """

    def close(self) -> None: ...
