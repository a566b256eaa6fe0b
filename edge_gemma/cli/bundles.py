"""import, inspect and verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import (
    BundleArg,
    ForceOption,
    InstructOption,
    JsonOption,
    NameOption,
    Progress,
    RelayoutOption,
    VisionEncoderOption,
    note,
    open_bundle,
    print_json,
    table,
)
from edge_gemma.cli.trim import vocabulary_facts
from edge_gemma.units import format_bytes

if TYPE_CHECKING:
    from edge_gemma.bundles.folder import Bundle
    from edge_gemma.bundles.manifest import DecoderPart, Manifest


def register(app: typer.Typer) -> None:
    app.command("import")(import_)
    app.command("inspect")(inspect)
    app.command("verify")(verify)


def import_(
    gguf: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A Gemma 3 or Gemma 3n GGUF.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The bundle's folder, to be made.")],
    relayout: RelayoutOption = False,
    instruct: InstructOption = False,
    mmproj: Annotated[
        Path | None,
        typer.Option(
            "--mmproj", help="llama.cpp's vision file of the same Gemma 3: the bundle can then see."
        ),
    ] = None,
    vision: VisionEncoderOption = None,
    name: NameOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a bundle of an existing GGUF. The file is hard-linked where possible, else copied."""
    from edge_gemma.errors import BundleError, UsageError
    from edge_gemma.store.importer import import_gguf

    if not gguf.is_file():
        raise BundleError(f"no GGUF file at {gguf}")
    if vision is not None and mmproj is None:
        raise UsageError("--vision-encoder needs --mmproj: a GGUF of the decoder holds no encoder")
    write_vision = None
    if mmproj is not None:
        from edge_gemma.convert.mmproj import vision_writer

        write_vision = vision_writer(mmproj, vision or "f16")
    with Progress(f"importing {gguf.name}", gguf.stat().st_size) as progress:
        bundle = import_gguf(
            gguf,
            out,
            relayout=relayout,
            instruct=instruct,
            overwrite=force,
            name=name,
            write_vision=write_vision,
            progress=progress.add_bytes,
        )
    manifest, total_bytes = bundle.manifest, bundle.total_bytes()
    if as_json:
        print_json(
            {
                "bundle": bundle.folder,
                "name": manifest.name,
                "bytes": total_bytes,
                "notes": manifest.notes,
            }
        )
        return
    for said in manifest.notes:
        note(f"note: {said}")
    print(f"{bundle.folder}: {manifest.name}, {format_bytes(total_bytes)}")


def inspect(
    bundle: BundleArg,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a bundle holds."""
    from edge_gemma.bundles.manifest import encode_manifest

    found = open_bundle(bundle)
    if as_json:
        print(encode_manifest(found.manifest).decode(), end="")
        return
    decoder = found.manifest.decoder
    print(table(_facts(found)))
    print("weights")
    for line in table(_weights(decoder), right=(0, 3)).splitlines():
        print(f"  {line}")
    files = [
        (name, format_bytes(file.size), f"sha256 {file.sha256[:16]}…")
        for name, file in found.manifest.files.items()
    ]
    print("files")
    for line in table(files, right=(1,)).splitlines():
        print(f"  {line}")
    if tensors:
        print("tensors")
        print(table(_tensors(decoder), right=(0, 1)))


def _facts(bundle: Bundle) -> list[tuple[str, str]]:
    manifest = bundle.manifest
    decoder = manifest.decoder
    n_global = sum(kind == "global" for kind in decoder.kv_layers)
    n_sliding = len(decoder.kv_layers) - n_global
    rows = [
        ("name", manifest.name),
        ("family", f"{manifest.family}, {'instruct' if manifest.instruct else 'base'}"),
        ("size", format_bytes(bundle.total_bytes())),
        (
            "decoder",
            f"{decoder.n_layer} layers, hidden {decoder.n_embd}, FFN {decoder.n_ff}, "
            f"{decoder.n_head} heads ({decoder.n_head_kv} KV) of {decoder.head_dim}, "
            f"{decoder.n_vocab} tokens",
        ),
        (
            "context",
            f"{decoder.n_ctx_train} tokens; {n_global} global and {n_sliding} sliding layers "
            f"(window {decoder.sliding_window})"
            + (" have a KV cache" if manifest.embedding is None else ""),
        ),
        ("head", "tied to the token embedding" if decoder.tied_head else "separate"),
        *vocabulary_facts(bundle),
        *_embedding(manifest),
        ("audio", _encoder(manifest, "audio")),
        ("vision", _encoder(manifest, "vision")),
        ("recipe", ", ".join(f"{key} {value}" for key, value in manifest.recipe.items()) or "–"),
        ("source", f"{manifest.source.origin} ({manifest.source.tool})"),
        ("licence", manifest.source.licence),
        *(("note", said) for said in manifest.notes),
    ]
    if manifest.quality:
        rows.append(("quality", ", ".join(map(_figure, manifest.quality.items()))))
    return rows


def _embedding(manifest: Manifest) -> list[tuple[str, str]]:
    """How a bundle embeds, if it does."""
    part = manifest.embedding
    if part is None:
        return []
    widths = ", ".join(map(str, part.dimensions))
    dense = f"{len(part.dense)} dense layers" if part.dense else "no dense layers"
    prompts = ", ".join(part.prompts) or "none"
    return [
        ("embedding", f"{widths} numbers; {part.pooling} of the tokens, {dense}"),
        ("prompts", prompts),
    ]


def _encoder(manifest: Manifest, name: str) -> str:
    if name == "audio" and manifest.audio:
        return f"{manifest.audio.precision}, {format_bytes(manifest.audio.weights_bytes)}"
    if name == "vision" and manifest.vision:
        vision = manifest.vision
        return f"{vision.kind} {vision.precision}, {format_bytes(vision.weights_bytes)}"
    return "none"


def _figure(item: tuple[str, object]) -> str:
    name, value = item
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def _weights(decoder: DecoderPart) -> list[tuple[str, str, str, str]]:
    """Bytes by use and type, the largest first."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for tensor in decoder.tensors:
        count, n_bytes = sums.get((tensor.use, tensor.type), (0, 0))
        sums[tensor.use, tensor.type] = (count + 1, n_bytes + tensor.nbytes)
    largest_first = sorted(sums.items(), key=lambda item: -item[1][1])
    return [
        (format_bytes(n_bytes), kind, use, f"{count} tensors")
        for (use, kind), (count, n_bytes) in largest_first
    ]


def _tensors(decoder: DecoderPart) -> list[tuple[str, ...]]:
    return [
        (
            str(tensor.offset),
            format_bytes(tensor.nbytes),
            tensor.type,
            tensor.use,
            tensor.name,
            str(list(tensor.shape)),
        )
        for tensor in decoder.tensors
    ]


def verify(bundle: BundleArg, as_json: JsonOption = False) -> None:
    """Check every hash of a bundle. Exit code 3 when one differs."""
    found = open_bundle(bundle)
    with Progress("verifying", found.total_bytes()) as progress:
        found.verify(progress.add_bytes)
        found.check_header()
    n_files = len(found.manifest.files)
    if as_json:
        print_json({"bundle": found.folder, "ok": True, "files": n_files})
    else:
        plural = "file matches its hash" if n_files == 1 else "files match their hashes"
        print(f"{found.folder}: {n_files} {plural}")
