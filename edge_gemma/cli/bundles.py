"""import, inspect and verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_gemma.cli.common import (
    BundleArg,
    DebugOption,
    JsonOption,
    ProgressLine,
    note,
    open_bundle,
    print_json,
)


def register(app: typer.Typer) -> None:
    app.command("import")(import_)
    app.command("inspect")(inspect)
    app.command("verify")(verify)


def import_(
    gguf: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A Gemma 3 or Gemma 3n GGUF.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The bundle's folder, to be made.")],
    relayout: Annotated[
        bool,
        typer.Option(
            "--relayout",
            help="Rewrite the file with cold tensors first: hot pages then survive a tight limit "
            "best.",
        ),
    ] = False,
    mmproj: Annotated[
        Path | None,
        typer.Option(
            "--mmproj", help="llama.cpp's vision file of the same Gemma 3: the bundle can then see."
        ),
    ] = None,
    vision: Annotated[
        str,
        typer.Option(
            "--vision", help="With --mmproj, the vision encoder's precision: f32, f16 or int8."
        ),
    ] = "f16",
    name: Annotated[
        str | None, typer.Option("--name", help="The bundle's name. Default: what the file says.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a bundle of an existing GGUF: hard-linked where possible, else copied."""
    from edge_gemma.errors import BundleError
    from edge_gemma.store.importer import import_gguf
    from edge_gemma.units import format_bytes

    if not gguf.is_file():
        raise BundleError(f"no GGUF file at {gguf}")
    write_vision = None
    if mmproj is not None:
        from edge_gemma.convert.mmproj import vision_writer

        write_vision = vision_writer(mmproj, vision)
    with ProgressLine(f"importing {gguf.name}", gguf.stat().st_size) as line:
        bundle = import_gguf(
            gguf,
            out,
            relayout=relayout,
            overwrite=force,
            name=name,
            write_vision=write_vision,
            progress=line.add,
        )
    if as_json:
        print_json(
            {
                "bundle": str(bundle.folder),
                "name": bundle.manifest.name,
                "bytes": bundle.total_bytes(),
            }
        )
    else:
        print(f"{bundle.folder}: {bundle.manifest.name}, {format_bytes(bundle.total_bytes())}")


def inspect(
    bundle: BundleArg,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a bundle holds."""
    from edge_gemma.bundles.manifest import encode_manifest
    from edge_gemma.units import format_bytes

    found = open_bundle(bundle)
    manifest = found.manifest
    if as_json:
        print(encode_manifest(manifest).decode(), end="")
        return
    d = manifest.decoder
    n_global = sum(kind == "global" for kind in d.kv_layers)
    uses: dict[tuple[str, str], list[int]] = {}
    for tensor in d.tensors:
        entry = uses.setdefault((tensor.use, tensor.type), [0, 0])
        entry[0] += 1
        entry[1] += tensor.nbytes
    rows = [
        ("name", manifest.name),
        ("family", f"{manifest.family}, {'instruct' if manifest.instruct else 'base'}"),
        ("size", format_bytes(found.total_bytes())),
        (
            "decoder",
            f"{d.n_layer} layers, hidden {d.n_embd}, FFN {d.n_ff}, {d.n_head} heads "
            f"({d.n_head_kv} KV) of {d.head_dim}, {d.n_vocab} tokens",
        ),
        (
            "context",
            f"{d.n_ctx_train} tokens; {n_global} global and {len(d.kv_layers) - n_global} "
            f"sliding layers (window {d.sliding_window}) own KV",
        ),
        ("head", "tied to the token embedding" if d.tied_head else "separate"),
        (
            "audio",
            f"{manifest.audio.precision}, {format_bytes(manifest.audio.weights_bytes)}"
            if manifest.audio
            else "none",
        ),
        (
            "vision",
            f"{manifest.vision.kind} {manifest.vision.precision}, "
            f"{format_bytes(manifest.vision.weights_bytes)}"
            if manifest.vision
            else "none",
        ),
        ("recipe", ", ".join(f"{k} {v}" for k, v in manifest.recipe.items()) or "–"),
        ("source", f"{manifest.source.origin} ({manifest.source.tool})"),
        ("licence", manifest.source.licence),
    ]
    if manifest.quality:
        rows.append(
            (
                "quality",
                ", ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                    for k, v in manifest.quality.items()
                ),
            )
        )
    for label, value in rows:
        print(f"{label:<10}{value}")
    print("weights")
    for (use, kind), (n, nbytes) in sorted(uses.items(), key=lambda item: -item[1][1]):
        print(f"  {format_bytes(nbytes):>10}  {kind:<7}{use:<8}{n} tensors")
    for name, file in manifest.files.items():
        print(f"file      {name}  {format_bytes(file.size)}  sha256 {file.sha256[:16]}…")
    if tensors:
        for t in d.tensors:
            print(
                f"  {t.offset:>12}  {format_bytes(t.nbytes):>10}  "
                f"{t.type:<7}{t.use:<8}{t.name}  {list(t.shape)}"
            )


def verify(bundle: BundleArg, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Check every hash of a bundle. Exit code 3 when one differs."""
    found = open_bundle(bundle)
    with ProgressLine("verifying", found.total_bytes()) as line:
        found.verify(line.add)
        found.check_header()
    if as_json:
        print_json({"bundle": str(found.folder), "ok": True, "files": len(found.manifest.files)})
    else:
        note(f"{found.folder}: {len(found.manifest.files)} files match their hashes")
