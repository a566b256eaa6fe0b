"""A bundle → the same with fewer tokens, nothing quantized again.

In: a bundle (or GGUF) with a whole vocabulary. Out: a bundle whose tables lack the rows that go;
every other byte of a weight is the same, so the logits of what stays are. Rows of a quantized table
are byte ranges. Pictures' and sound's encoders are linked or copied as they are.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edge_gemma.bundles.description import describe
from edge_gemma.bundles.folder import Bundle, BundleWriter, file_entry
from edge_gemma.bundles.gguf import TYPE_IDS, Header, Skipped, TensorInfo, read_header, read_strings
from edge_gemma.bundles.manifest import File, Manifest, VocabularyPart
from edge_gemma.convert.gguf_writer import encoded
from edge_gemma.convert.trim.choice import UNUSED_ONLY, Choice, Chooser, Wanted
from edge_gemma.convert.trim.rows import TABLES, cut_vocabulary, new_ids, renamed, renumbered
from edge_gemma.convert.vocabulary import Vocabulary
from edge_gemma.engines.llama.tokenizer import Tokenizer
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.store.importer import import_gguf
from edge_gemma.store.rewrite import link_or_copy
from edge_gemma.units import MiB, format_bytes

KEPT = "kept_tokens.npy"
_CHUNK_BYTES = 4 * MiB
_DISK_MARGIN_BYTES = 16 * MiB
_ARRAYS = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Report:
    """What a cut tells while it runs."""

    total: Callable[[int], None] = lambda n_bytes: None
    advance: Progress = lambda n_bytes: None
    stage: Callable[[str], None] = lambda text: None
    note: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Result:
    bundle: Bundle
    seconds: float
    bytes_before: int
    notes: tuple[str, ...]


def trim(
    bundle: Bundle,
    out: str | Path,
    wanted: Wanted = UNUSED_ONLY,
    *,
    overwrite: bool = False,
    measure: bool = True,
    n_threads: int = 0,
    report: Report = Report(),
) -> Result:
    """Cut a bundle's vocabulary into the bundle ``out``.

    ``measure``: run both models on the texts that come with this package, for the receipt, and
    compare the logits of what stays bit for bit. Raises UsageError, BundleError, RuntimeFailure
    (the disk; logits that differ).
    """
    started = time.perf_counter()
    manifest = bundle.manifest
    if manifest.vocabulary is not None:
        chosen = (*manifest.vocabulary.languages, *manifest.vocabulary.texts)
        was = ", ".join(chosen) or "what is used at all"
        raise UsageError(
            f"{manifest.name} was cut already (to {was}: {manifest.decoder.n_vocab:,} of "
            f"{manifest.vocabulary.n_whole:,} tokens); cut the whole bundle instead"
        )
    bundle.check_header()
    with BundleWriter(out, overwrite=overwrite) as writer:
        report.stage("choose")
        vocabulary = read_gguf_vocabulary(bundle)
        with Tokenizer(bundle.decoder_path) as tokenizer:
            prompts = manifest.embedding.prompts.values() if manifest.embedding else ()
            choice = Chooser(vocabulary, tokenizer, wanted, _needed(bundle), prompts).choice()
        notes = (*choice.notes, *_left_out(manifest))
        for said in notes:
            report.note(said)
        cut = CutGguf(bundle.decoder_path, vocabulary, choice.kept)
        _check_disk(cut.total_bytes, writer.folder)
        report.stage("write")
        report.total(cut.total_bytes)
        made = _write(bundle, cut, choice, writer.folder, report.advance)
        from edge_gemma.convert.trim.receipt import receipt_of

        report.stage("receipt")
        decoders = (bundle.decoder_path, writer.folder / manifest.decoder.file)
        receipt = receipt_of(
            *decoders, choice, measure=measure and not manifest.embedding, n_threads=n_threads
        )
        part = VocabularyPart(
            n_whole=len(vocabulary.tokens),
            languages=choice.languages,
            texts=choice.files,
            file=KEPT,
            receipt=receipt,
        )
        made = msgspec.structs.replace(made, vocabulary=part, notes=(*made.notes, *notes))
        result = writer.commit(made)
    return Result(result, time.perf_counter() - started, bundle.total_bytes(), notes)


@contextmanager
def imported(
    gguf: Path, out: str | Path, *, overwrite: bool = False, report: Report = Report()
) -> Iterator[Bundle]:
    """A GGUF as a bundle to :func:`trim` into ``out``: linked or repaired beside it, and gone
    after. Raises BundleError, UnsupportedModel (the file), UsageError (``out`` is there).
    """
    with BundleWriter(Path(out).absolute(), overwrite=overwrite) as beside:
        bundle = import_gguf(gguf, beside.folder / "imported")
        for said in bundle.manifest.notes:
            report.note(said)
        yield bundle


def _needed(bundle: Bundle) -> set[int]:
    """Ids that the manifest or a key of the file names, as far as they have rows."""
    manifest = bundle.manifest
    named = {*manifest.special_tokens.values(), *manifest.end_tokens}
    for key, value in read_header(bundle.decoder_path).metadata.items():
        if key.startswith("tokenizer.ggml.") and key.endswith(("_token_id", "_token_ids")):
            named.update(map(int, value) if isinstance(value, list) else [int(value)])  # type: ignore[arg-type]
    return {i for i in named if 0 <= i < manifest.decoder.n_vocab}


def _left_out(manifest: Manifest) -> list[str]:
    notes = []
    if manifest.onnx:
        notes.append(
            "the ONNX decoder was left out: its tables hold the whole vocabulary; convert the "
            "checkpoint again with --decoder both and the same --languages"
        )
    if manifest.quality:
        notes.append("its quality was measured before the vocabulary was cut")
    return notes


def _check_disk(n_bytes: int, folder: Path) -> None:
    needed, free = n_bytes + _DISK_MARGIN_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise RuntimeFailure(
            f"the bundle needs {format_bytes(needed)} on disk, {folder.parent} has "
            f"{format_bytes(free)} free; choose another folder"
        )


def read_gguf_vocabulary(bundle: Bundle) -> Vocabulary:
    """The whole vocabulary of a bundle's GGUF, which :func:`describe` has accepted."""
    path = bundle.decoder_path
    header = read_header(path)
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Skipped)
    special = {
        name: i for name, i in bundle.manifest.special_tokens.items() if 0 <= i < tokens.length
    }
    return Vocabulary(
        tokens=list(read_strings(path, tokens)),
        scores=_array(path, header, "tokenizer.ggml.scores", "<f4", tokens.length),
        types=_array(path, header, "tokenizer.ggml.token_type", "<i4", tokens.length),
        special=special,
        add_space_prefix=False,
        chat_template=bundle.manifest.chat_template,
        source=path.name,
    )


def _array(path: Path, header: Header, key: str, dtype: str, length: int) -> np.ndarray:
    return np.fromfile(path, dtype, length, offset=header.offsets[key])


def _write(
    bundle: Bundle, cut: CutGguf, choice: Choice, folder: Path, progress: Progress
) -> Manifest:
    """Every file but the manifest, into ``folder``."""
    manifest, ids = bundle.manifest, new_ids(choice.kept)
    decoder = folder / manifest.decoder.file
    files = {manifest.decoder.file: cut.write(decoder, progress)}
    onnx = manifest.onnx
    tables = (onnx.file, onnx.embeddings.file) if onnx else ()
    if onnx and onnx.per_layer:
        tables = (*tables, onnx.per_layer.file)
    for name in manifest.files:
        is_onnx = any(name == table or name.startswith(f"{table}.") for table in tables)
        if name not in files and not is_onnx:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files[name] = link_or_copy(bundle.path(name), folder / name, progress)
    np.save(folder / KEPT, choice.kept)
    files[KEPT] = file_entry(folder / KEPT)
    part = msgspec.structs.replace(
        describe(decoder).decoder, head_from_embedding=manifest.decoder.head_from_embedding
    )
    return msgspec.structs.replace(
        manifest,
        decoder=part,
        files=files,
        onnx=None,
        special_tokens=renamed(manifest.special_tokens, ids),
        end_tokens=renumbered(manifest.end_tokens, ids),
        recipe={**manifest.recipe, "vocabulary": f"{len(choice.kept)} tokens"},
    )


class CutGguf:
    """A GGUF with only the ``kept`` rows of its tables by token, to be written."""

    def __init__(self, path: Path, vocabulary: Vocabulary, kept: np.ndarray):
        self._path, self._kept = path, kept
        self._header = header = read_header(path)
        self._ids = new_ids(kept)
        self._vocabulary = cut_vocabulary(vocabulary, kept)
        self._head = self._new_header()
        self.total_bytes = len(self._head) + sum(
            _padded(self._nbytes(tensor), header.alignment) for tensor in header.tensors
        )

    def write(self, target: Path, progress: Progress = lambda n_bytes: None) -> File:
        """Raises OSError (the disk)."""
        digest, size = hashlib.sha256(), 0
        with open(target, "wb") as sink:
            for data in self._blocks():
                sink.write(data)
                digest.update(data)
                size += len(data)
                progress(len(data))
        return File(size=size, sha256=digest.hexdigest())

    def _blocks(self) -> Iterator[bytes]:
        yield self._head
        source = np.memmap(self._path, np.uint8, "r")
        for tensor in self._header.tensors:
            yield from self._rows(source, tensor)
            n_bytes = self._nbytes(tensor)
            yield b"\0" * (_padded(n_bytes, self._header.alignment) - n_bytes)

    def _rows(self, source: np.ndarray, tensor: TensorInfo) -> Iterator[bytes]:
        values = source[tensor.offset : tensor.offset + tensor.nbytes]
        if tensor.name not in TABLES:
            for start in range(0, tensor.nbytes, _CHUNK_BYTES):
                yield values[start : start + _CHUNK_BYTES].tobytes()
            return
        rows = values.reshape(tensor.shape[1], -1)
        step = max(1, _CHUNK_BYTES // rows.shape[1])
        for start in range(0, len(self._kept), step):
            yield rows[self._kept[start : start + step]].tobytes()

    def _shape(self, tensor: TensorInfo) -> tuple[int, ...]:
        return (tensor.shape[0], len(self._kept)) if tensor.name in TABLES else tensor.shape

    def _nbytes(self, tensor: TensorInfo) -> int:
        if tensor.name not in TABLES:
            return tensor.nbytes
        return tensor.nbytes // tensor.shape[1] * len(self._kept)

    def _new_header(self) -> bytes:
        header = self._header
        pairs = [
            struct.pack("<Q", len(key.encode())) + key.encode() + self._value(key, raw)
            for key, raw in self._raw_values()
        ]
        table, offset = [], 0
        for tensor in header.tensors:
            name, shape = tensor.name.encode(), self._shape(tensor)
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            place = struct.pack("<IQ", TYPE_IDS[tensor.type], offset)
            table.append(struct.pack("<Q", len(name)) + name + dims + place)
            offset += _padded(self._nbytes(tensor), header.alignment)
        start = struct.pack("<4sIQQ", b"GGUF", header.version, len(table), len(pairs))
        head = start + b"".join(pairs) + b"".join(table)
        return head + b"\0" * (-len(head) % header.alignment)

    def _raw_values(self) -> Iterator[tuple[str, bytes]]:
        """Each key with its type and value as they lie in the file."""
        header = self._header
        with open(self._path, "rb") as file:
            file.seek(header.kv_range[0])
            section = file.read(header.kv_range[1] - header.kv_range[0])
        at = 0
        starts = []
        for key in header.metadata:
            is_array = header.types[key].startswith("array")
            value = header.offsets[key] - header.kv_range[0] - 4 - (12 if is_array else 0)
            starts.append((key, value, value - 8 - len(key.encode())))
        ends = [start for _, _, start in starts[1:]] + [len(section)]
        for (key, value, start), end in zip(starts, ends, strict=True):
            assert start == at, key  # keys lie one behind the other
            yield key, section[value:end]
            at = end

    def _value(self, key: str, raw: bytes) -> bytes:
        vocabulary, value = self._vocabulary, self._header.metadata[key]
        if key in _ARRAYS:
            arrays = (vocabulary.tokens, vocabulary.scores, vocabulary.types)
            return encoded(arrays[_ARRAYS.index(key)])
        if key.endswith(".vocab_size") and isinstance(value, int):
            return raw[:4] + struct.pack("<I", len(self._kept))
        if not key.startswith("tokenizer.ggml.") or not key.endswith(("_token_id", "_token_ids")):
            return raw
        if isinstance(value, list):
            return encoded(np.array(renumbered(map(int, value), self._ids), np.int32))
        assert isinstance(value, int)
        return raw[:4] + struct.pack("<I", self._ids[value])


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def read_kept(bundle: Bundle) -> np.ndarray | None:
    """``[n_vocab]`` int32: id here → id in the whole vocabulary; None for a whole one."""
    part = bundle.manifest.vocabulary
    return None if part is None else np.load(bundle.path(part.file), allow_pickle=False)
