"""Importance matrices: mean squares of what each weight's columns are
multiplied with.

Read, written, and measured.

In: a GGUF of llama.cpp's imatrix format, or a bundle and a text to measure
one with. Out: ``tensor name → float32 [n_per_row]``. The output head is
measured too, which llama.cpp's own files normally lack: under the name the
bundle has for it (``token_embd.weight`` when tied).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.gguf import TensorInfo, read_header
from edge_gemma.bundles.manifest import require_generation
from edge_gemma.convert.gemma import Mapping
from edge_gemma.convert.gguf_writer import Pair, check_output, write_gguf
from edge_gemma.convert.text_chunks import CHUNK_TOKENS, read_chunks
from edge_gemma.errors import BundleError

_SUM, _COUNT = ".in_sum2", ".counts"
HEADS = ("output.weight", "token_embd.weight")  # the same activations under either name


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """Every entry as mean squares, float32 ``[n_per_row]``.

    Raises BundleError for a file that is none.

    ``sum / count`` as llama.cpp's quantizer divides; an entry that was
    never reached counts as all ones there and here.
    """
    path = Path(path)
    if path.is_file() and _starts_otherwise(path):
        raise BundleError(
            f"{path} is no GGUF; an importance matrix in llama.cpp's old .dat format is "
            "converted with: llama-imatrix --in-file OLD.dat -o NEW.gguf"
        )
    header = read_header(path)
    if header.metadata.get("general.type") != "imatrix":
        raise BundleError(
            f"{path} is a GGUF of type {header.metadata.get('general.type')!r}, not an "
            "importance matrix"
        )
    tables = {tensor.name: tensor for tensor in header.tensors}
    entries = {}
    with open(path, "rb") as file:

        def values(tensor: TensorInfo) -> np.ndarray:
            if tensor.type != "F32":
                raise BundleError(f"{path}: {tensor.name!r} is {tensor.type}, expected F32")
            file.seek(tensor.offset)
            return np.frombuffer(file.read(tensor.nbytes), np.float32)

        for stored, tensor in tables.items():
            if not stored.endswith(_SUM):
                continue
            name = stored.removesuffix(_SUM)
            if name + _COUNT not in tables:
                raise BundleError(f"{path}: {name!r} has sums but no counts; the file is damaged")
            entries[name] = _means(path, name, values(tensor), values(tables[name + _COUNT]))
    return entries


def _means(path: Path, name: str, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums of squares [n] over counts [n_matrices] → mean squares [n]
    float32.
    """
    is_whole = len(counts) and len(sums) % len(counts) == 0
    is_finite = np.isfinite(sums).all() and np.isfinite(counts).all()
    if not is_whole or not is_finite or (sums < 0).any():
        raise BundleError(
            f"{path}: the entry of {name!r} holds NaN, infinity or negative sums; measure it again"
        )
    per_matrix = sums.reshape(len(counts), -1)
    is_measured = counts[:, None] > 0
    safe = np.where(is_measured, counts[:, None], 1).astype(np.float32)
    means = np.where(is_measured, per_matrix / safe, np.float32(1))
    return means.reshape(-1).astype(np.float32)


def _starts_otherwise(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) != b"GGUF"


def read_importance(path: Path, mapping: Mapping) -> dict[str, np.ndarray]:
    """The entries of an importance matrix that the tensors of ``mapping``
    will use. Raises BundleError when it is of another model.
    """
    entries, found = read_imatrix(path), {}
    for source in mapping.sources:
        if source.use != "matmul":
            continue  # a table that is only looked up is multiplied with nothing
        names = HEADS if source.name in HEADS else (source.name,)
        weights = next((entries[name] for name in (source.name, *names) if name in entries), None)
        if weights is None:
            continue
        if weights.shape != (source.n_per_row,):
            raise BundleError(
                f"{path} has {len(weights)} columns for {source.name!r}, this model "
                f"{source.n_per_row}: it was measured on another model"
            )
        found[source.name] = np.ascontiguousarray(weights)
    if not found:
        raise BundleError(
            f"{path} names none of this model's tensors; it was measured on another model"
        )
    return found


def write_imatrix(
    path: Path,
    entries: dict[str, tuple[np.ndarray, int]],
    *,
    chunks: int,
    chunk_tokens: int,
    datasets: list[str],
) -> None:
    """Write ``name → (sums of squares [n_per_row], count)`` in llama.cpp's
    format (tools/imatrix/imatrix.cpp, save_imatrix).
    """
    pairs: list[Pair] = [
        ("general.type", "imatrix"),
        ("imatrix.datasets", datasets),
        ("imatrix.chunk_count", chunks),
        ("imatrix.chunk_size", chunk_tokens),
    ]
    tensors = []
    for name, (sums, count) in sorted(entries.items()):
        tensors.append((name + _SUM, (len(sums), 1), sums))
        tensors.append((name + _COUNT, (1, 1), np.array([count])))
    write_gguf(path, pairs, tensors)


@dataclass(frozen=True)
class Calibration:
    path: Path
    n_entries: int
    n_tokens: int
    missing: tuple[str, ...]  # matrices that were never multiplied with


def calibrate(
    bundle: Bundle,
    text: Path,
    out: Path,
    *,
    max_tokens: int = 0,
    n_threads: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Run ``text`` through the bundle's decoder in chunks of 512 tokens and
    write the importance matrix to ``out``.

    ``max_tokens`` bounds the work (0: the whole text). Raises UsageError
    (too little text, ``out`` exists), BundleError.
    """
    from edge_gemma.engines.llama.calibration import watch_matmuls
    from edge_gemma.engines.llama.decoder import Decoder
    from edge_gemma.plan.records import Settings
    from edge_gemma.spans import Tokens

    require_generation(bundle.manifest)
    check_output(out, overwrite=overwrite)
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    head = HEADS[1] if bundle.manifest.decoder.tied_head else HEADS[0]

    def wanted(name: str) -> bool:
        return name.startswith("blk.") or name == head

    def collect(name: str, rows: np.ndarray) -> None:  # rows [n, n_per_row] float32
        squares = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        sums[name] = sums[name] + squares if name in sums else squares
        counts[name] = counts.get(name, 0) + len(rows)

    n_threads = n_threads or os.cpu_count() or 1
    settings = Settings(n_ctx=CHUNK_TOKENS, n_ubatch=CHUNK_TOKENS // 4, n_threads=n_threads)
    with closing(Decoder(bundle.decoder_path, settings)) as decoder:
        chunks = read_chunks(text, decoder, max_tokens=max_tokens, purpose="calibrating")
        watch = watch_matmuls(wanted, collect)
        context = decoder.context(n_outputs=settings.n_ubatch, on_tensor=watch)
        for done, chunk in enumerate(chunks, 1):
            for _ in context.evaluate([Tokens(chunk)]):
                pass
            progress(done, len(chunks))
        n_tokens = len(chunks) * (CHUNK_TOKENS - decoder.add_bos)
    broken = [name for name, values in sums.items() if not np.isfinite(values).all()]
    if broken:
        raise BundleError(f"the activations of {broken[0]} are not finite; the model is damaged")
    write_imatrix(
        out,
        {name: (sums[name], counts[name]) for name in sums},
        chunks=len(chunks),
        chunk_tokens=CHUNK_TOKENS,
        datasets=[text.name],
    )
    missing = tuple(
        tensor.name
        for tensor in bundle.manifest.decoder.tensors
        if tensor.use == "matmul" and len(tensor.shape) == 2
        if wanted(tensor.name) and tensor.name not in sums
    )
    return Calibration(out, len(sums), n_tokens, missing)
