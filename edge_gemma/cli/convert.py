"""`convert`, `convert-lora`, `calibrate`: from checkpoints to bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import (
    BundleArg,
    ForceOption,
    JsonOption,
    NameOption,
    Progress,
    ThreadsOption,
    TokensOption,
    VisionEncoderOption,
    note,
    open_bundle,
    parse_scaled,
    print_json,
    table,
)
from edge_gemma.cli.trim import (
    KeepTokensOption,
    LanguagesOption,
    MinCountOption,
    VocabularyOption,
    cost_lines,
    print_sizes,
    receipt_table,
    wanted_tokens,
)
from edge_gemma.units import format_bytes

if TYPE_CHECKING:
    from edge_gemma.convert.pipeline import Conversion, Prepared, Result

CheckpointArg = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A Hugging Face folder, or the name of a repository on the hub (org/name).",
    ),
]
ImatrixOption = Annotated[
    Path | None,
    typer.Option(
        "--imatrix",
        help="An importance matrix (GGUF), from `edge-gemma calibrate` or llama.cpp.",
    ),
]
OnnxQuantOption = Annotated[
    str | None,
    typer.Option(
        "--onnx-quant",
        help="The recipe of decoder.onnx, of types F32, F16, Q8_0, Q4_1 and Q4_0. Default: q8_0.",
    ),
]
MergeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--merge",
        help="Fold a PEFT adapter into the weights: FOLDER or FOLDER:SCALE. May be repeated.",
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print what would be written, with sizes, disk and memory; write nothing.",
    ),
]


def register(app: typer.Typer) -> None:
    app.command("convert")(convert)
    app.command("convert-lora")(convert_lora)
    app.command("calibrate")(calibrate)


def convert(
    checkpoint: CheckpointArg,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The bundle's folder, to be made.")],
    quant: Annotated[
        str | None,
        typer.Option(
            "--quant",
            "-q",
            help="A recipe by name (--list-recipes) or a .toml file of your own. Default: q4_k_m; "
            "for EmbeddingGemma q8_0.",
        ),
    ] = None,
    decoder: Annotated[
        str,
        typer.Option(
            "--decoder",
            help="gguf, or both: decoder.onnx and its tables besides, for `--engine onnx` and "
            "programs that run onnxruntime.",
        ),
    ] = "gguf",
    onnx_quant: OnnxQuantOption = None,
    imatrix: ImatrixOption = None,
    slice: Annotated[
        str | None,
        typer.Option(
            "--slice", help="Cut a Gemma 3n E4B: e2b, or a TOML file with ffn and drop_layers."
        ),
    ] = None,
    merge: MergeOption = None,
    audio: Annotated[
        str | None,
        typer.Option(
            "--audio-encoder",
            help="The audio encoder's precision: f32, f16, int8, int8-block, int4-block or none. "
            "Default: int8 from a checkpoint that has one.",
        ),
    ] = None,
    vision: VisionEncoderOption = None,
    languages: LanguagesOption = None,
    vocabulary: VocabularyOption = None,
    keep_tokens: KeepTokensOption = 0,
    min_count: MinCountOption = 1,
    name: NameOption = None,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check",
            help="A text: measure perplexity and KL divergence against the unquantized weights.",
        ),
    ] = None,
    check_tokens: Annotated[
        int,
        typer.Option(
            "--check-tokens", help="Use at most so many of that text's tokens; 0: all of it."
        ),
    ] = 0,
    threads: ThreadsOption = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Read everything back, load it and generate a few tokens."
        ),
    ] = True,
    dry_run: DryRunOption = False,
    recipes: Annotated[
        bool,
        typer.Option(
            "--list-recipes",
            is_eager=True,
            callback=_list_recipes,
            help="List the recipes and stop.",
        ),
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a Hugging Face checkpoint into a bundle.

    Takes Gemma 3 and Gemma 3n, in one pass and without PyTorch. Reads safetensors row by row and
    quantizes on all cores; a few hundred MB of memory are enough for any size.
    """
    from edge_gemma.convert.pipeline import Conversion, Report, prepare
    from edge_gemma.convert.pipeline import convert as run

    options = Conversion(
        quant=quant,
        imatrix=imatrix,
        decoder=decoder,
        onnx_quant=onnx_quant,
        slice=slice,
        trim=wanted_tokens(languages, vocabulary, keep_tokens, min_count, offer_sizes=dry_run),
        merge=tuple(parse_scaled(text, "--merge") for text in merge or ()),
        audio=audio,
        vision=vision,
        name=name,
        overwrite=force,
        n_threads=threads or 0,
        verify=verify,
        check=check,
        check_tokens=check_tokens,
    )
    folder = checkpoint_folder(checkpoint)
    if dry_run:
        _print_plan(prepare(folder, options), options, out, as_json)
        return
    with Progress() as progress:
        result = run(
            folder,
            out,
            options,
            Report(progress.total, progress.add_bytes, progress.stage, progress.note),
        )
    if as_json:
        print_json(_record(result))
        return
    manifest, total_bytes = result.bundle.manifest, result.bundle.total_bytes()
    reasons = list(result.skipped.values())
    for reason in sorted(set(reasons)):
        note(f"skipped {reasons.count(reason)} tensors: {reason}")
    if result.sample is not None:
        note(f"verified; it says: The{result.sample!r}")
    if manifest.vocabulary:
        print(receipt_table(manifest.vocabulary))
        for line in cost_lines(manifest.vocabulary):
            note(line)
    if manifest.quality:
        print(table([(key, str(value)) for key, value in manifest.quality.items()], right=(0,)))
    print(
        f"{result.bundle.folder}: {manifest.family}, {manifest.recipe['name']}, "
        f"{format_bytes(total_bytes)} in {result.seconds:.0f} s"
    )


def _record(result: Result) -> dict[str, object]:
    manifest = result.bundle.manifest
    return {
        "bundle": result.bundle.folder,
        "bytes": result.bundle.total_bytes(),
        "seconds": round(result.seconds, 2),
        "family": manifest.family,
        "recipe": manifest.recipe,
        "files": {name: file.size for name, file in manifest.files.items()},
        "notes": result.notes,
        "skipped": result.skipped,
        "sample": result.sample,
        "quality": manifest.quality,
        "vocabulary": manifest.vocabulary,
    }


def convert_lora(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER",
            help="A PEFT folder: adapter_config.json and adapter_model.safetensors.",
        ),
    ],
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE",
            help="The checkpoint folder it was trained on (only config.json is read).",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter's GGUF, to be made.")],
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a PEFT LoRA adapter into a GGUF adapter for `--lora`."""
    from edge_gemma.convert.lora import convert_lora as run

    notes = run(adapter, base, out, overwrite=force)
    if as_json:
        print_json({"adapter": out, "bytes": out.stat().st_size, "notes": notes})
        return
    for text in notes:
        note(text)
    print(f"{out}: {format_bytes(out.stat().st_size)}")


def calibrate(
    bundle: BundleArg,
    text: Annotated[
        Path,
        typer.Argument(
            metavar="TEXT", help="A text like what the model will see; 20,000 tokens or more."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The importance matrix, to be made (.gguf).")
    ],
    tokens: TokensOption = 0,
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure which columns of the weights matter on a text.

    The result is for `convert --imatrix`; the output head is included. The bundle is best the bf16
    or f16 conversion of the checkpoint.
    """
    from edge_gemma.convert.imatrix import calibrate as run

    with Progress() as progress:
        progress.stage("calibrate")
        result = run(
            open_bundle(bundle),
            text,
            out,
            max_tokens=tokens,
            n_threads=threads or 0,
            overwrite=force,
            progress=progress.steps,
        )
    if as_json:
        print_json(
            {
                "imatrix": result.path,
                "entries": result.n_entries,
                "tokens": result.n_tokens,
                "missing": result.missing,
            }
        )
        return
    for tensor in result.missing:
        note(f"never used: {tensor}")
    print(f"{result.path}: {result.n_entries} matrices from {result.n_tokens} tokens")


# --- helpers ---


def _list_recipes(on: bool) -> None:
    from edge_gemma.convert.recipe import names, read_recipe

    if on:
        print(table([(name, read_recipe(name).about) for name in names()]))
        raise typer.Exit()


def checkpoint_folder(text: str) -> Path:
    """A folder, or a hub id when there is no such folder."""
    if Path(text).exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        return Path(text).expanduser()
    from edge_gemma.store.pull import fetch_checkpoint

    note(f"no folder {text}; asking the hub")
    with Progress() as progress:
        return fetch_checkpoint(text, on_progress=progress.bytes)


def _print_plan(prepared: Prepared, options: Conversion, out: Path, as_json: bool) -> None:
    """What a conversion would write, and what it would take."""
    import shutil

    parent = next(path for path in out.absolute().parents if path.exists())
    free_bytes = shutil.disk_usage(parent).free
    # a head of its own is the same weights again: counted once
    n_values = {
        source.parts: source.n_rows * source.n_per_row for source in prepared.mapping.sources
    }
    n_weights = sum(n_values.values())
    memory_bytes = prepared.memory_bytes(options.threads())
    groups = _tensor_groups(prepared)
    if as_json:
        record = {
            "recipe": prepared.recipe.name,
            "decoder_bytes": prepared.layout.total_bytes,
            "onnx_decoder_bytes": prepared.onnx.total_bytes if prepared.onnx else 0,
            "towers": {tower: prepared.tower_bytes(tower) for tower in prepared.towers},
            "disk_bytes": prepared.disk_bytes,
            "disk_free_bytes": free_bytes,
            "memory_bytes": memory_bytes,
            "weights": n_weights,
            "vocabulary": [
                {
                    "tokens": n_tokens,
                    "coverage": coverage,
                    "decoder_bytes": prepared.trimmed.bytes_of(n_tokens)[0],
                    "read_per_token_bytes": prepared.trimmed.bytes_of(n_tokens)[1],
                }
                for n_tokens, coverage in prepared.trimmed.offers()
            ]
            if prepared.trimmed
            else None,
            "groups": [
                {"tensors": group, "type": kind, "count": count, "bytes": n_bytes}
                for (group, kind), (count, n_bytes) in groups.items()
            ],
            "notes": prepared.notes,
            "skipped": prepared.skipped,
        }
        print_json(record)
        return
    print(
        f"{prepared.mapping.dims.family}, {n_weights / 1e6:,.0f} million weights, recipe "
        f"{prepared.recipe.name}: {prepared.recipe.about}"
    )
    rows = [
        (group, kind, f"{count} tensors", format_bytes(n_bytes))
        for (group, kind), (count, n_bytes) in groups.items()
    ]
    rows += [
        (f"{tower} encoder", precision, "", format_bytes(prepared.tower_bytes(tower)))
        for tower, precision in prepared.towers.items()
    ]
    if prepared.onnx:
        rows.append(
            ("ONNX decoder", prepared.onnx.recipe, "", format_bytes(prepared.onnx.total_bytes))
        )
    for line in [*table(rows, right=(2, 3)).splitlines(), *prepared.notes]:
        print(f"  {line}")
    if prepared.trimmed:
        print_sizes(prepared.trimmed)
    disk, free = format_bytes(prepared.disk_bytes), format_bytes(free_bytes)
    print(f"disk   {disk} needed, {free} free in {parent}")
    memory = format_bytes(memory_bytes)
    print(f"memory about {memory} at the peak, with {options.threads()} threads")


def _tensor_groups(prepared: Prepared) -> dict[tuple[str, str], tuple[int, int]]:
    """(kind of tensor, weight type) → how many, and their bytes."""
    groups: dict[tuple[str, str], tuple[int, int]] = {}
    for source, kind, n_bytes in prepared.layout.tensors:
        key = (_group(source.name), kind)
        count, total_bytes = groups.get(key, (0, 0))
        groups[key] = (count + 1, total_bytes + n_bytes)
    return groups


def _group(name: str) -> str:
    part = name.removesuffix(".weight").split(".")[-1]
    return "norms and small" if part.endswith("norm") or part == "altup_correct_scale" else part
