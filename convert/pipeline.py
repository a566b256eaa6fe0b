"""Checkpoint → bundle in one pass: read, map, quantize, write, verify.

The order of everything ``edge-gemma convert`` does.

In: a checkpoint folder and :class:`Conversion`. Out: a bundle that exists
whole or not at all. :func:`~.prepare.prepare` decides everything without
reading a weight; :func:`convert` then does exactly that. A
conversion that was killed leaves a hidden folder beside the output, which
the next run for the same output removes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge_gemma.bundles.description import describe
from edge_gemma.bundles.folder import Bundle, BundleWriter, file_entry
from edge_gemma.bundles.manifest import (
    AudioPart,
    DecoderPart,
    File,
    Manifest,
    OnnxPart,
    Source,
    VisionPart,
    VocabularyPart,
)
from edge_gemma.convert.decoder import Layout, plan_layout, write_decoder
from edge_gemma.convert.gemma import EMBEDDING
from edge_gemma.convert.prepare import Conversion as Conversion
from edge_gemma.convert.prepare import Prepared as Prepared
from edge_gemma.convert.prepare import prepare as prepare
from edge_gemma.convert.recipe import choose_types, read_recipe
from edge_gemma.convert.special_rows import write_special_rows
from edge_gemma.errors import RuntimeFailure
from edge_gemma.units import MiB, format_bytes

if TYPE_CHECKING:
    from edge_gemma.convert.trim.conversion import Trimmed


DECODER = "decoder.gguf"
NOT_RUN = (
    "the encoders were written but not run: onnxruntime is not installed (pip install "
    "'edge-gemma[hear,see]')"
)
_DISK_MARGIN_BYTES = 16 * MiB  # manifest, special rows, block sizes


@dataclass(frozen=True)
class Report:
    """What a conversion tells while it runs; every field may be left out."""

    total: Callable[[int], None] = lambda n_bytes: None
    advance: Callable[[int], None] = lambda n_bytes: None
    stage: Callable[[str], None] = lambda text: None
    note: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Result:
    bundle: Bundle
    seconds: float
    notes: tuple[str, ...]
    skipped: dict[str, str]
    sample: str | None = None  # what the new model says when asked for a few tokens


def convert(
    folder: str | Path,
    out: str | Path,
    options: Conversion = Conversion(),
    report: Report = Report(),
) -> Result:
    """Convert a checkpoint into the bundle ``out``.

    Raises CheckpointError, UnsupportedModel, UsageError, RuntimeFailure
    (the disk).

    >>> out = getfixture("tmp_path") / "bundle"
    >>> result = convert(getfixture("tiny_checkpoint"), out, Conversion(quant="q8_0"))
    >>> result.bundle.manifest.family, result.bundle.manifest.recipe["name"]
    ('gemma3', 'q8_0')
    """
    started = time.perf_counter()
    # An output that exists is refused first of all
    with BundleWriter(out, overwrite=options.overwrite) as writer:
        prepared = prepare(folder, options)
        _check_disk(prepared, writer.folder, options)
        for note in prepared.notes:
            report.note(note)
        manifest = _write(prepared, options, writer.folder, report)
        if options.verify:
            from edge_gemma.engines.llama.library import check_loads

            check_loads(writer.folder / DECODER)
        bundle = writer.commit(manifest)
    seconds = time.perf_counter() - started
    sample, notes = None, prepared.notes
    if options.verify:
        from edge_gemma.convert.trial import try_embedding, try_encoders, try_out

        report.stage("verify")
        bundle.verify()
        if prepared.embedding is None:
            sample = try_out(bundle)
        else:
            try_embedding(bundle)
        if not try_encoders(bundle):
            notes = (*notes, NOT_RUN)
            report.note(NOT_RUN)
    return Result(bundle, seconds, notes, prepared.skipped, sample)


def _write(prepared: Prepared, options: Conversion, folder: Path, report: Report) -> Manifest:
    """Every file but the manifest, into ``folder``."""
    report.total(prepared.decoder_bytes)
    report.stage("decoder")
    decoder = write_decoder(
        folder / DECODER,
        prepared.layout,
        prepared.tensors,
        importance=prepared.importance,
        n_threads=options.threads(),
        progress=report.advance,
    )
    parts = _Parts(
        files={DECODER: decoder},
        special_rows=write_special_rows(prepared.tensors, folder),
        audio=_write_audio(prepared, folder, report),
        vision=_write_vision(prepared, folder, report),
        onnx=_write_onnx(prepared, options, folder, report, decoder),
    )
    if prepared.trimmed:
        prepared.trimmed.write_kept(folder)
    for path in sorted(folder.iterdir()):
        if path.name != DECODER and not path.name.startswith("."):
            parts.files[path.name] = file_entry(path)
    report.stage("check")
    quality = None
    if options.check:
        quality = _receipt(prepared, options, options.check, folder / DECODER, report)
    manifest = _manifest(prepared, options, folder / DECODER, parts, quality)
    if prepared.trimmed is None:
        return manifest
    report.stage("vocabulary")
    part = _vocabulary_part(prepared, prepared.trimmed, options, folder)
    return msgspec.structs.replace(manifest, vocabulary=part)


def _vocabulary_part(
    prepared: Prepared, trimmed: Trimmed, options: Conversion, folder: Path
) -> VocabularyPart:
    """With ``--check`` the whole decoder lies beside for as long as it takes to compare."""
    measure, n_threads = options.check is not None, options.threads()
    if measure:
        trimmed.write_whole(folder, prepared.tensors, prepared.importance, n_threads)
    return trimmed.part(folder, folder / DECODER, measure=measure, n_threads=n_threads)


@dataclass(frozen=True)
class _Parts:
    """What was written beside the manifest."""

    files: dict[str, File]
    special_rows: tuple[str, ...]
    audio: AudioPart | None
    vision: VisionPart | None
    onnx: OnnxPart | None


def _receipt(
    prepared: Prepared, options: Conversion, text: Path, decoder: Path, report: Report
) -> dict[str, float | int | str]:
    """Quality against the same weights in bf16, which lie beside for as
    long as it takes.
    """
    from edge_gemma.convert.quality import compare
    from edge_gemma.engines.llama.rescoring import rescorer_of

    reference, n_threads = decoder.with_name(".reference.gguf"), options.threads()
    layout = _reference_layout(prepared)
    write_decoder(reference, layout, prepared.tensors, n_threads=n_threads)
    report.stage("receipt")
    with ExitStack() as stack:
        part = _with_head(describe(decoder).decoder, prepared)
        rescorer = rescorer_of(decoder, prepared.mapping.dims.family, part)
        if rescorer:  # the receipt is of the model as it runs
            stack.callback(rescorer.close)
        receipts = compare(
            reference,
            {"new": decoder},
            Path(text),
            max_tokens=options.check_tokens,
            n_threads=n_threads,
            rescorers={} if rescorer is None else {"new": rescorer},
        )
    reference.unlink()
    return receipts["new"].table()


def _reference_layout(prepared: Prepared) -> Layout:
    types, _ = choose_types(read_recipe("bf16"), prepared.mapping)
    return plan_layout(
        prepared.mapping.dims,
        prepared.mapping.sources,
        types,
        prepared.vocabulary,
        name="reference",
        file_type=32,
    )


def _check_disk(prepared: Prepared, folder: Path, options: Conversion) -> None:
    needed = prepared.disk_bytes + _DISK_MARGIN_BYTES
    if options.check:
        needed += _reference_layout(prepared).total_bytes
        needed += prepared.trimmed.whole.total_bytes if prepared.trimmed else 0
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RuntimeFailure(
            f"the bundle needs {format_bytes(needed)} on disk, {folder.parent} has "
            f"{format_bytes(free)} free; choose another folder or a smaller recipe"
        )


def _write_onnx(
    prepared: Prepared, options: Conversion, folder: Path, report: Report, decoder: File
) -> OnnxPart | None:
    if prepared.onnx is None:
        return None
    from edge_gemma.convert.onnx_decoder import write_onnx_decoder

    report.stage("ONNX decoder")
    part = write_onnx_decoder(
        folder,
        prepared.onnx,
        prepared.tensors,
        importance=prepared.importance,
        n_threads=options.threads(),
        takes_masks="vision" in prepared.towers and prepared.mapping.dims.family == "gemma3",
        progress=report.advance,
    )
    return msgspec.structs.replace(part, decoder_sha256=decoder.sha256)


def _write_audio(prepared: Prepared, folder: Path, report: Report) -> AudioPart | None:
    if "audio" not in prepared.towers:
        return None
    from edge_gemma.convert.audio import write_audio_encoder

    report.stage("audio encoder")
    return write_audio_encoder(prepared.tensors, folder, prepared.towers["audio"])


def _write_vision(prepared: Prepared, folder: Path, report: Report) -> VisionPart | None:
    if "vision" not in prepared.towers:
        return None
    from edge_gemma.convert.vision import write_vision_encoder

    report.stage("vision encoder")
    return write_vision_encoder(prepared.tensors, folder, prepared.towers["vision"])


def _manifest(
    prepared: Prepared,
    options: Conversion,
    decoder: Path,
    parts: _Parts,
    quality: dict[str, float | int | str] | None,
) -> Manifest:
    # What the runtime will read there, by the code that it reads with
    description = describe(decoder)
    origin = prepared.checkpoint.name
    return Manifest(
        name=description.name,
        family=prepared.mapping.dims.family,
        instruct=description.chat_template is not None and prepared.embedding is None,
        decoder=_with_head(description.decoder, prepared),
        source=Source(origin=origin, tool="edge-gemma convert"),
        files=parts.files,
        chat_template=description.chat_template,
        # the decoder's own, and those of pictures and sound that config.json names
        special_tokens={**description.special_tokens, **prepared.special_tokens},
        end_tokens=prepared.answers.end_tokens,
        sampling=prepared.answers.sampling,
        special_rows=parts.special_rows,
        audio=parts.audio,
        vision=parts.vision,
        embedding=prepared.embedding,
        onnx=parts.onnx,
        recipe=_recipe_record(prepared, options),
        quality=quality,
    )


def _with_head(part: DecoderPart, prepared: Prepared) -> DecoderPart:
    """``part``, told whether its head is the token embedding a second time, and no matrix of the
    checkpoint's.
    """
    heads = [s for s in prepared.mapping.sources if s.name == "output.weight"]
    again = any(source.name == EMBEDDING for head in heads for source in head.parts)
    return msgspec.structs.replace(part, head_from_embedding=again)


def _recipe_record(prepared: Prepared, options: Conversion) -> dict[str, str]:
    """What the manifest says of how the weights were made."""
    recipe = prepared.recipe
    record = {
        "name": recipe.name,
        "matrix": recipe.matrix,
        "head": recipe.head,
        "kept": recipe.kept,
    }
    if recipe.lookup:
        record["lookup"] = recipe.lookup
    if recipe.ple:
        record["ple"] = recipe.ple
    if options.imatrix:
        record["imatrix"] = options.imatrix.name
    if options.slice:
        record["slice"] = Path(options.slice).name
    if prepared.trimmed:
        record["vocabulary"] = f"{len(prepared.trimmed.choice.kept)} tokens"
    if options.merge:
        merged = [f"{folder.name} × {scale:g}" for folder, scale in options.merge]
        record["merged"] = ", ".join(merged)
    return record
