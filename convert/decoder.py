"""Mapped tensors + types + vocabulary → one GGUF, written front to back in
a single pass with bounded memory.

In: where each row comes from (:class:`~.gemma.Source`), its type, the
vocabulary. Out: the file with its size and SHA-256, hashed while it is
written. Every size is known before the first byte, so header, table and
data go out in order and nothing is written twice. A few chunks of rows are
in memory at a time; worker threads read, convert and quantize them side by
side.
"""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from edge_gemma.bundles.description import DENSE
from edge_gemma.bundles.gguf import layout_rank
from edge_gemma.bundles.manifest import EmbeddingPart, File
from edge_gemma.convert.gemma import SPARSE_LAYERS, SPARSITY_MULTIPLIER, Dims, Source
from edge_gemma.convert.gguf_writer import Pair, Value, gguf_header, padded
from edge_gemma.convert.quantize import quantize_rows, row_bytes
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.convert.vocabulary import Vocabulary

CHUNK_VALUES = 1 << 21  # 8 MiB as float32: large enough to hide Python, small enough for a board
_MEAN = 1  # llama.h, enum llama_pooling_type
T = TypeVar("T")
Progress = Callable[[int], None]
# our name of a special token → the middle of its key in a GGUF
_SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot"}


@dataclass(frozen=True)
class Layout:
    """What will be written, before it is: the header's bytes, and each
    tensor with its type and size in file order.
    """

    header: bytes
    tensors: tuple[tuple[Source, str, int], ...]  # (source, type, bytes without padding)

    @property
    def total_bytes(self) -> int:
        return len(self.header) + sum(padded(nbytes) for _, _, nbytes in self.tensors)


def plan_layout(
    dims: Dims,
    sources: Iterable[Source],
    types: dict[str, str],
    vocabulary: Vocabulary,
    *,
    name: str,
    file_type: int,
    embedding: EmbeddingPart | None = None,
) -> Layout:
    """Order the tensors (PLE and what is never read first, what every token
    needs last) and build the header.
    """

    def place(source: Source) -> tuple:
        rank = layout_rank(source.use, types[source.name], len(source.shape))
        return rank, source.name != "per_layer_token_embd.weight"

    tensors = []
    for source in sorted(sources, key=place):
        kind = types[source.name]
        tensors.append((source, kind, row_bytes(kind, source.n_per_row) * source.n_rows))
    table = [(source.name, kind, source.shape, nbytes) for source, kind, nbytes in tensors]
    header = gguf_header(_metadata(dims, vocabulary, name, file_type, embedding), table)
    return Layout(header, tuple(tensors))


def vocabulary_header(dims: Dims, vocabulary: Vocabulary) -> bytes:
    """A GGUF of the vocabulary alone, without a tensor: enough to tokenize with."""
    return gguf_header(_metadata(dims, vocabulary, "vocabulary", 0, None), [])


def write_decoder(
    path: Path,
    layout: Layout,
    tensors: TensorReader,
    *,
    importance: dict[str, np.ndarray] | None = None,
    n_threads: int = 1,
    progress: Progress = lambda n_bytes: None,
) -> File:
    """Write the GGUF; ``progress`` gets the bytes of each write.

    Raises CheckpointError (the input), OSError (the disk).
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:

        def put(data: bytes | memoryview) -> None:
            nonlocal size
            file.write(data)
            digest.update(data)
            size += len(data)
            progress(len(data))

        put(layout.header)
        with ThreadPoolExecutor(n_threads, thread_name_prefix="quantize") as pool:
            for data in in_order(pool, n_threads + 1, _jobs(layout, tensors, importance or {})):
                put(data)
    assert size == layout.total_bytes, (size, layout.total_bytes)
    return File(size=size, sha256=digest.hexdigest())


Job = Callable[[], bytes | memoryview]


def _jobs(
    layout: Layout, tensors: TensorReader, importance: dict[str, np.ndarray]
) -> Iterator[Job]:
    """One job for every few rows of every tensor, in file order."""
    for source, kind, nbytes in layout.tensors:
        step = max(1, CHUNK_VALUES // source.n_per_row)
        weights = importance.get(source.name)
        for start in range(0, source.n_rows, step):
            stop = min(start + step, source.n_rows)
            padding = padded(nbytes) - nbytes if stop == source.n_rows else 0
            yield functools.partial(_chunk, source, kind, tensors, weights, start, stop, padding)


def _chunk(
    source: Source,
    kind: str,
    tensors: TensorReader,
    importance: np.ndarray | None,
    start: int,
    stop: int,
    padding: int,
) -> bytes | memoryview:
    blocks = quantize_rows(kind, source.rows(tensors, start, stop), importance)
    return blocks.tobytes() + b"\0" * padding if padding else blocks.data


def in_order(pool: ThreadPoolExecutor, ahead: int, jobs: Iterator[Callable[[], T]]) -> Iterator[T]:
    """Results in the jobs' order, at most ``ahead`` of them begun: that
    bounds the memory. The first failure stops the rest.
    """
    pending: deque[Future] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _metadata(
    dims: Dims,
    vocabulary: Vocabulary,
    name: str,
    file_type: int,
    embedding: EmbeddingPart | None,
) -> Iterator[Pair]:
    """The key/value pairs llama.cpp's own converter writes for these
    families (conversion/gemma.py).
    """
    yield "general.architecture", dims.family
    yield "general.type", "model"
    yield "general.name", name
    yield "general.license", "gemma"
    yield "general.quantization_version", 2
    yield "general.file_type", file_type
    for key, value in _numbers(dims).items():
        yield f"{dims.family}.{key}", value
    yield "tokenizer.ggml.model", "llama"
    yield "tokenizer.ggml.pre", "default"
    yield "tokenizer.ggml.tokens", vocabulary.tokens
    yield "tokenizer.ggml.scores", vocabulary.scores
    yield "tokenizer.ggml.token_type", vocabulary.types
    for ours, theirs in _SPECIAL_KEYS.items():
        if ours in vocabulary.special:
            yield f"tokenizer.ggml.{theirs}_token_id", vocabulary.special[ours]
    yield "tokenizer.ggml.add_bos_token", embedding is None or embedding.add_bos
    yield "tokenizer.ggml.add_eos_token", embedding is not None and embedding.add_eos
    yield "tokenizer.ggml.add_space_prefix", vocabulary.add_space_prefix
    if vocabulary.chat_template:
        yield "tokenizer.chat_template", vocabulary.chat_template


def _numbers(dims: Dims) -> dict[str, Value]:
    numbers: dict[str, Value] = {
        "block_count": dims.n_layer,
        "context_length": dims.n_ctx_train,
        "embedding_length": dims.n_embd,
        "feed_forward_length": dims.n_ff,
        "attention.head_count": dims.n_head,
        "attention.head_count_kv": dims.n_head_kv,
        "attention.key_length": dims.head_dim,
        "attention.value_length": dims.head_dim,
        "attention.layer_norm_rms_epsilon": dims.rms_eps,
        "attention.sliding_window": dims.sliding_window,
        "rope.freq_base": dims.rope_base,
        "rope.freq_base_swa": dims.rope_base_sliding,
    }
    if dims.softcap and dims.family != "gemma-embedding":
        numbers["final_logit_softcapping"] = dims.softcap
    if dims.rope_factor != 1.0:
        numbers |= {"rope.scaling.type": "linear", "rope.scaling.factor": dims.rope_factor}
    numbers["attention.sliding_window_pattern"] = np.array(dims.sliding, np.bool_)
    if dims.family == "gemma-embedding":
        numbers |= {"pooling_type": _MEAN, "attention.causal": False}
    for name, (n_in, n_out) in zip(DENSE, dims.dense, strict=False):
        numbers |= {f"{name}_feat_in": n_in, f"{name}_feat_out": n_out}
    if dims.family == "gemma3n":
        is_sparse = np.arange(dims.n_layer) < SPARSE_LAYERS
        # the quantile of 0 is −∞: a layer that is not sparse keeps every
        # value
        scale = np.where(is_sparse, SPARSITY_MULTIPLIER, -np.inf).astype(np.float32)
        numbers |= {
            "altup.active_idx": 0,
            "altup.num_inputs": 4,
            "embedding_length_per_layer_input": dims.ple_width,
            "attention.shared_kv_layers": dims.n_kv_shared,
            "activation_sparsity_scale": scale,
        }
    return numbers
