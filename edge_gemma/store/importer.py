"""An existing Gemma 3 / Gemma 3n GGUF → a bundle.

In: a GGUF, of whoever's making. Out: a bundle folder with the file hard-linked (else copied, or
rewritten: cold-first when asked for, and where something must be repaired) and a manifest whose
notes say what was repaired or left out. Every tensor's name and shape is held against the family's
table here, because llama.cpp would divide by zero, assert or answer nonsense on some
contradictions. ``describe`` is shared with the converter, so there is one derivation of the facts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge_gemma.bundles.description import Description, describe
from edge_gemma.bundles.folder import Bundle, BundleWriter, file_entry
from edge_gemma.bundles.gguf import Skipped, find_strings, read_header
from edge_gemma.bundles.manifest import Manifest, Source, VisionPart
from edge_gemma.bundles.token_roles import SPECIAL_TOKENS
from edge_gemma.errors import UnsupportedModel
from edge_gemma.store.repairs import Repairs, find_repairs
from edge_gemma.store.rewrite import Progress, link_or_copy, rewritten

WriteVision = Callable[[Path, Description], VisionPart]
_TURNS = {name: SPECIAL_TOKENS[name] for name in ("start_of_turn", "end_of_turn")}


_MARKER = re.compile(r"<\|[\w-]{1,60}\|?>")  # <|im_start|>: other families' control tokens


def import_gguf(
    path: str | Path,
    out: str | Path,
    *,
    relayout: bool = False,
    instruct: bool = False,
    overwrite: bool = False,
    name: str | None = None,
    origin: str | None = None,
    write_vision: WriteVision | None = None,
    progress: Progress = lambda n_bytes: None,
) -> Bundle:
    """Make a bundle of a GGUF.

    Hard link where the file system allows it, else a copy; ``relayout`` rewrites it cold-first, and
    so does a repair that the file itself needs. ``instruct``: the weights follow turns although the
    file has no chat template.

    ``write_vision(folder, description)`` adds a vision encoder to the bundle: see
    :func:`edge_gemma.convert.mmproj.vision_writer`.

    Raises BundleError, UnsupportedModel (the file), UsageError (``out`` exists), RuntimeFailure
    (the disk).
    """
    path = Path(path)
    found = describe(path, repairable=True)
    instruct = instruct and found.embedding is None
    _check_turns(path, found, instruct)
    repairs = find_repairs(path, read_header(path), found)
    rewrites = relayout or repairs.needs_copy
    from edge_gemma.engines.llama.check import (
        check_runs,  # late: starts a child process with llama.cpp
    )

    with BundleWriter(out, overwrite=overwrite) as writer:
        target = writer.folder / found.decoder.file
        if rewrites:
            entry = rewritten(path, target, repairs, progress)
        else:
            entry = link_or_copy(path, target, progress)
        description = describe(target)
        embeds = description.embedding is not None
        manifest = Manifest(
            name=name or _name(found, writer.out),
            family=description.family,
            instruct=instruct or (description.chat_template is not None and not embeds),
            decoder=description.decoder,
            source=Source(
                origin=origin or path.name,
                sha256=None if rewrites else entry.sha256,
                licence=description.licence,
                tool="edge-gemma import",
            ),
            files={description.decoder.file: entry},
            embedding=description.embedding,
            chat_template=description.chat_template,
            special_tokens=description.special_tokens,
            end_tokens=description.end_tokens,
            recipe={"name": "imported", "relayout": "cold-first" if rewrites else "as found"},
            notes=_notes(path, found, repairs, instruct),
        )
        check_runs(writer.folder, manifest)
        return writer.commit(_with_vision(manifest, writer.folder, description, write_vision))


def _name(found: Description, out: Path) -> str:
    """The file's own name; where that is a hash, as in Ollama's store, the folder's."""
    return out.name if re.match(r"sha256[-:]", found.name) else found.name


def _check_turns(path: Path, found: Description, instruct: bool) -> None:
    """That the tokens of turns are there where turns are written."""
    for name, text in _TURNS.items():
        written = instruct or text in (found.chat_template or "")
        if written and name not in found.special_tokens:
            why = "--instruct needs it" if instruct else "its chat template writes it"
            raise UnsupportedModel(f"{path}: the vocabulary has no token {text}, and {why}")


def _template_notes(path: Path, found: Description) -> list[str]:
    """What a template writes that the tokenizer does not know as a token."""
    source = found.chat_template
    if source is None:
        return []
    written = set(_MARKER.findall(source))
    vocabulary = read_header(path).metadata["tokenizer.ggml.tokens"]
    assert isinstance(vocabulary, Skipped)  # describe has refused what is not
    unknown = sorted(written - set(find_strings(path, vocabulary, written)))
    notes = []
    if unknown:
        listed = ", ".join(unknown[:4])
        notes.append(f"its chat template writes {listed}, no token here: it becomes letters")
    if "<start_of_turn>" not in source:
        notes.append("its chat template does not write <start_of_turn>, which Gemma was tuned with")
    return notes


def _notes(path: Path, found: Description, repairs: Repairs, instruct: bool) -> tuple[str, ...]:
    notes = [*found.notes, *repairs.notes, *_template_notes(path, found)]
    if repairs.needs_copy:
        notes.append("the bundle holds a corrected copy; the file itself is as it was")
    if found.embedding is not None:
        return tuple(notes)
    if found.chat_template is None and instruct:
        notes.append("it has no chat template; Gemma's own turns are written")
    elif found.chat_template is None:
        notes.append(
            "it has no chat template, so it was taken for base weights, which continue a text; if "
            "it follows turns, import it again with --instruct"
        )
    return tuple(notes)


def _with_vision(
    manifest: Manifest, folder: Path, description: Description, write_vision: WriteVision | None
) -> Manifest:
    if write_vision is None:
        return manifest
    vision = write_vision(folder, description)
    written = sorted(folder.glob(f"{vision.file}*"))
    files = manifest.files | {file.name: file_entry(file) for file in written}
    return msgspec.structs.replace(manifest, vision=vision, files=files)
