"""``edge-gemma bench``: memory, speed, latency, quality and comparison, as tables, JSON and one
report page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.bench_output import (
    REGRESSED,
    AgainstOption,
    Output,
    RepeatsOption,
    ReportOption,
    SaveOption,
    finish_run,
    print_changes,
    write_page,
)
from edge_gemma.cli.common import (
    BundleArg,
    BundlesArg,
    ContextOption,
    DevicesOption,
    ForceOption,
    JsonOption,
    LanguageOption,
    PadAudioOption,
    Progress,
    ThreadCountsOption,
    ThreadsOption,
    TokensOption,
    check_parents,
    print_json,
    table,
)
from edge_gemma.cli.convert import CheckpointArg, ImatrixOption, checkpoint_folder

if TYPE_CHECKING:
    from edge_gemma.benchmarks.sections import Section

ALL_RECIPES = "q8_0,q6_k,q5_k_m,q4_k_m,q4_0,iq4_xs,q3_k_m"

bench = typer.Typer(
    name="bench",
    help="Measure memory, speed, latency and quality here. Says what boards would take, too.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    from edge_gemma.cli import bench_talk

    bench.command()(bench_talk.talk)
    bench.command()(bench_talk.loop)
    app.add_typer(bench)


# --- presets ---


@bench.command()
def presets(as_json: JsonOption = False) -> None:
    """The presets that `bench run` knows."""
    from edge_gemma.benchmarks import presets as shipped

    found = {name: shipped.about(name) for name in shipped.names()}
    if as_json:
        print_json(found)
    else:
        print(table(list(found.items())))


@bench.command()
def run(
    preset: Annotated[
        str, typer.Argument(metavar="PRESET", help="A preset (`bench presets`) or a .toml file.")
    ],
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Where models are made and kept. Default: a temporary folder."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help="NAME=BUNDLE: a bundle to take for one of the preset's models."
        ),
    ] = None,
    clips: Annotated[
        Path | None, typer.Option("--clips", help="A folder with recordings of speech.")
    ] = None,
    small: Annotated[
        bool,
        typer.Option("--small", help="Tiny models, one round: whether the preset runs at all."),
    ] = False,
    as_json: JsonOption = False,
    report: ReportOption = None,
    save: SaveOption = None,
    against: AgainstOption = None,
) -> None:
    """Run a preset. Presets are the benchmarks behind the documentation's figures."""
    from edge_gemma.benchmarks import presets as shipped

    wanted = shipped.read(preset)
    models = {name: _folders([bundle])[0] for name, bundle in map(_pair, model or ())}

    def job(progress: Progress) -> list[Section]:
        runner = shipped.Runner(work or shipped.DEFAULT_WORK, models, clips, small, progress.stage)
        return runner.run(wanted)

    finish_run(job, Output(as_json, report, save, against))


def _pair(text: str) -> tuple[str, str]:
    from edge_gemma.errors import UsageError
    from edge_gemma.sources import typed

    name, equals, bundle = text.partition("=")
    if not equals:
        raise UsageError(f"--model takes NAME=BUNDLE; got {text!r}")
    return name, typed(bundle)


# --- one benchmark each ---


@bench.command()
def wer(
    bundle: BundleArg,
    dataset: Annotated[
        Path,
        typer.Argument(
            help="A folder of recordings with transcripts (NAME.txt beside NAME.wav, or "
            "LibriSpeech's *.trans.txt)."
        ),
    ],
    language: LanguageOption = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="So many recordings only.")
    ] = None,
    pad_audio: PadAudioOption = True,
    as_json: JsonOption = False,
) -> None:
    """Word error rate on recordings with transcripts, greedily decoded."""
    from edge_gemma.benchmarks import wer as rates
    from edge_gemma.store.installed import resolve

    with Progress() as progress:
        found = rates.run(
            str(resolve(bundle)),
            dataset,
            language=language,
            limit=limit,
            pad_audio=pad_audio,
            progress=progress.note,
        )
    if as_json:
        print_json(found)
    else:
        rate = "no words" if found["wer"] is None else f"{100 * found['wer']:.2f} %"
        print(
            f"word error rate {rate}: {found['errors']} of {found['words']} words in "
            f"{found['files']} recordings, {found['failed']} unreadable"
        )


@bench.command()
def memory(
    bundles: BundlesArg,
    device: DevicesOption = None,
    ctx: ContextOption = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="No runs, only what would be needed.")
    ] = False,
    as_json: JsonOption = False,
    report: ReportOption = None,
    save: SaveOption = None,
    against: AgainstOption = None,
) -> None:
    """What each bundle takes on each board. Planned, and measured under that board's limits where
    this machine can. --device may be repeated; all, the default, stands for every profile.
    """
    from edge_gemma.benchmarks import memory as benchmarks

    names = benchmarks.device_names(device or ["all"])

    def job(progress: Progress) -> list[Section]:
        section = benchmarks.memory(
            _folders(bundles), names, n_ctx=ctx, run=not plan_only, progress=progress.stage
        )
        return [section]

    finish_run(job, Output(as_json, report, save, against))


@bench.command()
def speed(
    bundles: BundlesArg,
    depth: Annotated[
        list[int] | None,
        typer.Option("--depth", min=1, help="Prompt length in tokens, repeatable."),
    ] = None,
    threads: ThreadCountsOption = None,
    repeats: RepeatsOption = 3,
    as_json: JsonOption = False,
    report: ReportOption = None,
    save: SaveOption = None,
    against: AgainstOption = None,
) -> None:
    """Prefill and decode speed, and load time. Over context length and threads, cold and warm, with
    the share of the memory's bandwidth. --threads may be repeated. Then the wait for the first
    token where a prompt was kept in memory or on disk, and how many tokens a pass gives.
    """
    from edge_gemma.benchmarks import speed as benchmarks
    from edge_gemma.benchmarks.start import start

    def job(progress: Progress) -> list[Section]:
        section = benchmarks.speed(
            _folders(bundles),
            depths=depth or (128, 512, 2048),
            threads=threads or (),
            repeats=repeats,
            progress=progress.stage,
        )
        if section.stopped:
            return [section]
        kept = start(_folders(bundles), repeats=repeats, progress=progress.stage)
        return [section, kept]

    finish_run(job, Output(as_json, report, save, against))


@bench.command()
def latency(
    bundles: BundlesArg,
    seconds: Annotated[
        list[float] | None,
        typer.Option("--seconds", min=0.2, max=30, help="Length of the speech, repeatable."),
    ] = None,
    after: Annotated[
        bool, typer.Option("--after", help="Also encoded after its end, to compare.")
    ] = False,
    repeats: RepeatsOption = 3,
    as_json: JsonOption = False,
    report: ReportOption = None,
    save: SaveOption = None,
    against: AgainstOption = None,
) -> None:
    """From the end of speech to the first token of the answer."""
    from edge_gemma.benchmarks import speed as benchmarks

    def job(progress: Progress) -> list[Section]:
        section = benchmarks.latency(
            _folders(bundles),
            lengths_s=seconds or (1, 2, 5, 10, 20, 30),
            after=after,
            repeats=repeats,
            progress=progress.stage,
        )
        return [section]

    finish_run(job, Output(as_json, report, save, against))


@bench.command()
def quality(
    reference: Annotated[str, typer.Argument(help="The bundle or GGUF to measure against.")],
    bundles: BundlesArg,
    text: Annotated[
        Path, typer.Option("--text", help="A UTF-8 text to predict.", show_default=False)
    ],
    tokens: TokensOption = 4096,
    as_json: JsonOption = False,
    report: ReportOption = None,
    save: SaveOption = None,
    against: AgainstOption = None,
) -> None:
    """Perplexity and KL divergence against a reference. Both have the same vocabulary."""
    from edge_gemma.benchmarks import quality as benchmarks

    def job(progress: Progress) -> list[Section]:
        section = benchmarks.quality(
            _file_or_bundle(reference),
            [_file_or_bundle(bundle) for bundle in bundles],
            text,
            max_tokens=tokens,
            progress=progress.stage,
        )
        return [section]

    finish_run(job, Output(as_json, report, save, against))


@bench.command()
def compare(
    bundle: BundleArg,
    other: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            help="SYSTEM=MODEL, repeatable; systems: edge-gemma, llama_cpp.Llama, llama-server, "
            "onnxruntime-genai, litert-lm, transformers.",
        ),
    ] = None,
    ctx: ContextOption = 2048,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Prompt length in tokens.")] = 512,
    threads: ThreadsOption = None,
    repeats: RepeatsOption = 3,
    as_json: JsonOption = False,
    report: ReportOption = None,
    save: SaveOption = None,
    against: AgainstOption = None,
) -> None:
    """One interleaved run against what a user would pick instead. llama_cpp.Llama on the same file
    is always among them.
    """
    from edge_gemma.benchmarks import speed as benchmarks

    others = [_system(text) for text in other or ()]
    (folder,) = _folders([bundle])

    def job(progress: Progress) -> list[Section]:
        section = benchmarks.compare(
            folder,
            others,
            n_prompt=prompt,
            n_ctx=ctx or 2048,
            n_threads=threads or 0,
            repeats=repeats,
            progress=progress.stage,
        )
        return [section]

    finish_run(job, Output(as_json, report, save, against))


def _system(text: str) -> tuple[str, Path]:
    from edge_gemma.errors import UsageError
    from edge_gemma.sources import exists, typed

    system, equals, path = text.partition("=")
    path = typed(path)
    if not equals or not exists(path):
        raise UsageError(f"--also takes SYSTEM=MODEL with a model that exists; got {text!r}")
    return system, Path(path)


@bench.command()
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
        str,
        typer.Option(
            "--recipes",
            help="Comma-separated; a name may be followed by +imatrix, and by @en-sl for a "
            "vocabulary cut to these languages.",
        ),
    ] = ALL_RECIPES,
    imatrix: ImatrixOption = None,
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
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert to several recipes and compare them. Size, bits per weight, perplexity, KL
    divergence, speed, memory.

    Quality takes long, speed wants a calm machine: `--rounds 0 --keep` first, then the same line
    with `--speed-only`.
    """
    from edge_gemma.benchmarks import ladder as benchmarks

    n_threads = threads or 0
    with Progress() as progress:
        if speed_only:
            progress.stage("speed")
            rungs = benchmarks.time_kept(
                out, rounds=rounds, n_threads=n_threads, keep=keep, steps=progress.steps
            )
        else:
            rungs = benchmarks.run(
                checkpoint_folder(checkpoint),
                out,
                text,
                recipes.split(","),
                imatrix=imatrix,
                max_tokens=tokens,
                rounds=rounds,
                keep=keep,
                n_threads=n_threads,
                speed_threads=n_threads,
                overwrite=force,
                add=add,
                stage=progress.stage,
                note=progress.note,
                steps=progress.steps,
            )
    if as_json:
        print_json([rung.record() for rung in rungs])
    else:
        print(benchmarks.table(rungs))


# --- figures that were kept ---


@bench.command()
def report(
    files: Annotated[
        list[Path], typer.Argument(help="Files kept with --save.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The HTML page to write.")],
) -> None:
    """One page of figures that were kept earlier."""
    from edge_gemma.benchmarks import regress

    check_parents(out)
    found = [regress.read(file) for file in files]
    machine = found[0]["machine"]
    notes = [
        f"{file.name} was measured elsewhere: {each['machine'].get('text', '')}"
        for file, each in zip(files, found, strict=True)
        if each["machine"].get("text") != machine.get("text")
    ]
    sections = [section for each in found for section in regress.sections(each)]
    write_page(out, sections, machine, notes)


@bench.command()
def diff(
    before: Annotated[
        Path,
        typer.Argument(
            help="A file kept with --save, or the JSON beside a report.", show_default=False
        ),
    ],
    now: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """What changed between two files of figures. Only what exceeds the noise that both state; exit
    code 1 when something got worse.
    """
    from edge_gemma.benchmarks import regress

    old, new = regress.read(before), regress.read(now)
    changes, notes = regress.compare(old, regress.sections(new), new["machine"])
    if as_json:
        print_json({"changes": changes, "notes": notes})
    else:
        print_changes(changes, notes, every=True)
    if any(change.verdict == "worse" for change in changes):
        raise typer.Exit(REGRESSED)


def _folders(names: Sequence[str]) -> list[Path]:
    from edge_gemma.store.installed import resolve

    return [Path(resolve(name)) for name in names]


def _file_or_bundle(name: str) -> Path:
    return Path(name) if name.endswith(".gguf") else _folders([name])[0]
