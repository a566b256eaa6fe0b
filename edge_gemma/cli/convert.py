"""`convert`, `convert-lora`, `calibrate`, `ladder`: from checkpoints to bundles, and what that cost
in quality.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edge_gemma.cli.common import DebugOption, JsonOption, note

CheckpointArg = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A Hugging Face folder, or the name of a repository on the hub (org/name).",
    ),
]
ThreadsOption = Annotated[int, typer.Option("--threads", "-t", help="Threads. Default: all cores.")]
TokensOption = Annotated[
    int, typer.Option("--tokens", help="Use at most so many of the text's tokens; 0: all of it.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]


def register(app: typer.Typer) -> None:
    app.command("convert")(convert)
    app.command("convert-lora")(convert_lora)
    app.command("calibrate")(calibrate)
    app.command("ladder")(ladder)


def convert(
    checkpoint: CheckpointArg,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The bundle's folder, to be made.")],
    quant: Annotated[
        str,
        typer.Option(
            "--quant", "-q", help="A recipe by name (see --recipes) or a .toml file of your own."
        ),
    ] = "q4_k_m",
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix",
            help="An importance matrix (GGUF), from `edge-gemma calibrate` or llama.cpp.",
        ),
    ] = None,
    slice: Annotated[
        str | None,
        typer.Option(
            "--slice", help="Cut a Gemma 3n E4B: e2b, or a TOML file with ffn and drop_layers."
        ),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(
            "--merge",
            help="Fold a PEFT adapter into the weights: FOLDER or FOLDER:SCALE. May be repeated.",
        ),
    ] = None,
    audio: Annotated[
        str | None,
        typer.Option(
            "--audio",
            help="Audio encoder: f32, f16, int8, int8-block, int4-block or none. Default int8 "
            "where there is one.",
        ),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option(
            "--vision",
            help="Vision encoder: f32, f16, int8 or none. Default int8 where there is one.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="The model's name in the manifest. Default: the folder's."),
    ] = None,
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
    threads: ThreadsOption = 0,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Read everything back, load it and generate a few tokens."
        ),
    ] = True,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would be written, with sizes, disk and memory; write nothing.",
        ),
    ] = False,
    recipes: Annotated[
        bool,
        typer.Option(
            "--recipes",
            is_eager=True,
            callback=lambda on: _list_recipes() if on else None,
            help="List the recipes and stop.",
        ),
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Turn a Hugging Face checkpoint of Gemma 3 or Gemma 3n into a bundle, in one pass and without
    PyTorch.

    Reads safetensors row by row and quantizes on all cores; a few hundred MB of memory are enough
    for any size.
    """
    from edge_gemma.convert.pipeline import Conversion, Report, prepare
    from edge_gemma.convert.pipeline import convert as run
    from edge_gemma.units import format_bytes

    options = Conversion(
        quant=quant,
        imatrix=imatrix,
        slice=slice,
        merge=tuple(_scaled(text) for text in merge or ()),
        audio=audio,
        vision=vision,
        name=name,
        overwrite=force,
        n_threads=threads,
        verify=verify,
        check=check,
        check_tokens=check_tokens,
    )
    folder = _checkpoint(checkpoint)
    if dry_run:
        _print_plan(prepare(folder, options), options, out, as_json)
        return
    with _Progress() as progress:
        result = run(
            folder,
            out,
            options,
            Report(progress.total, progress.advance, progress.stage, progress.note),
        )
    manifest, total = result.bundle.manifest, result.bundle.total_bytes()
    if as_json:
        record = {
            "bundle": str(result.bundle.folder),
            "bytes": total,
            "seconds": round(result.seconds, 2),
            "family": manifest.family,
            "recipe": manifest.recipe,
            "files": {name: file.size for name, file in manifest.files.items()},
            "notes": list(result.notes),
            "skipped": result.skipped,
            "sample": result.sample,
            "quality": manifest.quality,
        }
        print(json.dumps(record, ensure_ascii=False))
        return
    for reason in sorted(set(result.skipped.values())):
        note(f"skipped {sum(why == reason for why in result.skipped.values())} tensors: {reason}")
    if result.sample is not None:
        note(f"verified; it says: The{result.sample!r}")
    for key, value in (manifest.quality or {}).items():
        print(f"{key:>16}  {value}")
    print(
        f"{result.bundle.folder}: {manifest.family}, {manifest.recipe['name']}, "
        f"{format_bytes(total)} in {result.seconds:.0f} s"
    )


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
    debug: DebugOption = False,
) -> None:
    """Turn a PEFT LoRA adapter into a GGUF adapter for `--lora`."""
    from edge_gemma.convert.lora import convert_lora as run
    from edge_gemma.units import format_bytes

    notes = run(adapter, base, out, overwrite=force)
    if as_json:
        print(json.dumps({"adapter": str(out), "bytes": out.stat().st_size, "notes": notes}))
        return
    for text in notes:
        note(text)
    print(f"{out}: {format_bytes(out.stat().st_size)}")


def calibrate(
    bundle: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE",
            help="The bundle to run: best the bf16 or f16 conversion of the checkpoint.",
        ),
    ],
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
    threads: ThreadsOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure which columns of the weights matter on a text, for `convert --imatrix`. The output
    head is included.
    """
    from edge_gemma.bundles.folder import Bundle
    from edge_gemma.convert.imatrix import calibrate as run
    from edge_gemma.store.installed import resolve

    with _Progress() as progress:
        progress.stage("calibrate")
        result = run(
            Bundle.open(resolve(bundle)),
            text,
            out,
            max_tokens=tokens,
            n_threads=threads,
            overwrite=force,
            progress=progress.steps,
        )
    if as_json:
        print(
            json.dumps(
                {
                    "imatrix": str(result.path),
                    "entries": result.n_entries,
                    "tokens": result.n_tokens,
                    "missing": list(result.missing),
                }
            )
        )
        return
    for tensor in result.missing:
        note(f"never used: {tensor}")
    print(f"{result.path}: {result.n_entries} matrices from {result.n_tokens} tokens")


def ladder(
    checkpoint: CheckpointArg,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="A folder for the bundles, table.json, table.md and ladder.png."
        ),
    ],
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="The text to measure quality on.")],
    recipes: Annotated[
        str, typer.Option("--recipes", help="Comma-separated; a name may be followed by +imatrix.")
    ] = "q8_0,q6_k,q5_k_m,q4_k_m,q4_0,iq4_xs,q3_k_m",
    imatrix: Annotated[
        Path | None,
        typer.Option("--imatrix", help="The importance matrix that +imatrix stands for."),
    ] = None,
    tokens: TokensOption = 0,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds", help="Speed is the median of so many interleaved rounds; 0 skips it."
        ),
    ] = 3,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the bundles; else only the table stays.")
    ] = False,
    add: Annotated[
        bool,
        typer.Option(
            "--add", help="Add recipes to the table of an earlier run that kept its bundles in OUT."
        ),
    ] = False,
    speed_only: Annotated[
        bool,
        typer.Option(
            "--speed-only",
            help="Time the bundles that an earlier run kept in OUT, and add that to its table.",
        ),
    ] = False,
    threads: ThreadsOption = 0,
    force: ForceOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert to several recipes and compare them: size, bits per weight, perplexity, KL
    divergence, speed, memory.

    Quality takes long, speed wants a calm machine: `--rounds 0 --keep` first, then the same line
    with `--speed-only`.
    """
    from edge_gemma.convert.ladder import run, table, time_kept

    with _Progress() as progress:
        if speed_only:
            progress.stage("speed")
            rungs = time_kept(
                out, rounds=rounds, n_threads=threads, keep=keep, steps=progress.steps
            )
        else:
            rungs = run(
                _checkpoint(checkpoint),
                out,
                text,
                recipes.split(","),
                imatrix=imatrix,
                max_tokens=tokens,
                rounds=rounds,
                keep=keep,
                n_threads=threads,
                overwrite=force,
                add=add,
                stage=progress.stage,
                note=progress.note,
                steps=progress.steps,
            )
    print(json.dumps([rung.record() for rung in rungs]) if as_json else table(rungs))


# --- helpers ---


def _list_recipes() -> None:
    from edge_gemma.convert.recipe import names, read_recipe

    for name in names():
        print(f"{name:<12} {read_recipe(name).about}")
    raise typer.Exit()


def _checkpoint(text: str) -> Path:
    """A folder, or a hub id when there is no such folder."""
    if Path(text).exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        return Path(text).expanduser()
    from edge_gemma.store.hub import fetch_checkpoint

    note(f"no folder {text}; asking the hub")
    with _Progress() as progress:
        return fetch_checkpoint(
            text, on_progress=lambda what, done, total: progress.bytes(what, done, total)
        )


def _scaled(text: str) -> tuple[Path, float]:
    """``FOLDER`` or ``FOLDER:SCALE``."""
    from edge_gemma.errors import UsageError

    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(scale)
    except ValueError:
        raise UsageError(
            f"cannot read --merge {text!r}; write it like FOLDER or FOLDER:0.5"
        ) from None


def _print_plan(prepared, options, out: Path, as_json: bool) -> None:
    import shutil

    from edge_gemma.units import format_bytes

    parent = next(path for path in out.absolute().parents if path.exists())
    free, groups = shutil.disk_usage(parent).free, {}
    for source, kind, nbytes in prepared.layout.tensors:
        key = (_group(source.name), kind)
        count, total = groups.get(key, (0, 0))
        groups[key] = (count + 1, total + nbytes)
    weights = sum(
        {
            source.parts: source.n_rows * source.n_per_row for source in prepared.mapping.sources
        }.values()
    )  # a head of its own is the same weights again
    memory = prepared.memory_bytes(options.threads())
    if as_json:
        record = {
            "recipe": prepared.recipe.name,
            "decoder_bytes": prepared.layout.total_bytes,
            "towers": {tower: prepared.tower_bytes(tower) for tower in prepared.towers},
            "disk_bytes": prepared.disk_bytes,
            "disk_free_bytes": free,
            "memory_bytes": memory,
            "weights": weights,
            "groups": [
                {"tensors": group, "type": kind, "count": count, "bytes": total}
                for (group, kind), (count, total) in groups.items()
            ],
            "notes": list(prepared.notes),
            "skipped": prepared.mapping.skipped,
        }
        print(json.dumps(record, ensure_ascii=False))
        return
    print(
        f"{prepared.mapping.dims.family}, {weights / 1e6:,.0f} million weights, recipe "
        f"{prepared.recipe.name}: {prepared.recipe.about}"
    )
    for (group, kind), (count, total) in groups.items():
        print(f"  {group:<22} {kind:<7} {count:>4} tensors {format_bytes(total):>11}")
    for tower, precision in prepared.towers.items():
        print(
            f"  {tower + ' encoder':<22} {precision:<7} {'':>4}         "
            f"{format_bytes(prepared.tower_bytes(tower)):>11}"
        )
    for text in prepared.notes:
        print(f"  {text}")
    print(
        f"disk   {format_bytes(prepared.disk_bytes)} needed, {format_bytes(free)} free in {parent}"
    )
    print(f"memory about {format_bytes(memory)} at the peak, with {options.threads()} threads")


def _group(name: str) -> str:
    part = name.removesuffix(".weight").split(".")[-1]
    return "norms and small" if part.endswith("norm") or part == "altup_correct_scale" else part


class _Progress:
    """rich's bar on stderr with bytes, rate and time left; plain lines where stderr is no terminal."""

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, done="")
        self._bytes = self._total = 0
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def total(self, n_bytes: int) -> None:
        self._total, self._bytes = n_bytes, 0

    def advance(self, n_bytes: int) -> None:
        self.bytes("", self._bytes + n_bytes, self._total)

    def bytes(self, what: str, done: int, total: int) -> None:
        from edge_gemma.units import format_bytes

        self._bytes, self._total = done, total
        self._bar.update(
            self._task,
            completed=done,
            total=total or None,
            done=f"{format_bytes(done)} of {format_bytes(total)}",
            **({"description": what} if what else {}),
        )

    def steps(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total, done=f"{done} of {total}")

    def stage(self, text: str) -> None:
        self._bar.reset(self._task, description=text, done="", total=None)
        if not self._console.is_terminal:
            note(text)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False)
