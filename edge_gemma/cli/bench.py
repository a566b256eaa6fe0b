"""``edge-gemma bench``: memory, speed, latency, quality and comparison, as tables, JSON and one
report page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from edge_gemma.cli.common import (
    BundleArg,
    BundlesArg,
    ContextOption,
    DevicesOption,
    JsonOption,
    LanguageOption,
    PadAudioOption,
    ThreadCountsOption,
    ThreadsOption,
    TokensOption,
    check_parents,
    note,
    print_json,
)

REGRESSED = 1  # exit code when --against found something worse

bench = typer.Typer(
    name="bench",
    help="Measure memory, speed, latency and quality here. Says what boards would take, too.",
    no_args_is_help=True,
)

Report = Annotated[
    Path | None,
    typer.Option("--report", help="Also write this HTML page, with PNG and JSON beside it"),
]
Save = Annotated[Path | None, typer.Option("--save", help="Keep the figures in this file")]
Against = Annotated[
    Path | None,
    typer.Option(
        "--against",
        help="Compare with a file kept earlier; exit code 1 when something got worse by more than "
        "the noise",
    ),
]
Repeats = Annotated[
    int,
    typer.Option(
        "--repeats",
        min=1,
        max=100,
        help="Interleaved runs; medians are shown with half their range",
    ),
]


def register(app: typer.Typer) -> None:
    app.add_typer(bench)


@bench.command()
def wer(
    bundle: BundleArg,
    dataset: Annotated[
        Path,
        typer.Argument(
            help="A folder of recordings with transcripts (NAME.txt beside NAME.wav, or "
            "LibriSpeech's *.trans.txt)"
        ),
    ],
    language: LanguageOption = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="So many recordings only")
    ] = None,
    pad_audio: PadAudioOption = True,
    as_json: JsonOption = False,
) -> None:
    """Word error rate on recordings with transcripts, greedily decoded."""
    from edge_gemma.benchmarks import wer as run
    from edge_gemma.store.installed import resolve

    found = run.run(
        str(resolve(bundle)),
        dataset,
        language=language,
        limit=limit,
        pad_audio=pad_audio,
        progress=note,
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
        bool, typer.Option("--plan-only", help="No runs, only what would be needed")
    ] = False,
    as_json: JsonOption = False,
    report: Report = None,
    save: Save = None,
    against: Against = None,
) -> None:
    """What each bundle takes on each board. Planned, and measured under that board's limits where
    this machine can. --device may be repeated; all, the default, stands for every profile.
    """
    from edge_gemma.benchmarks import bench as run

    names = run.device_names(device or ["all"])
    _finish(
        [lambda: run.memory(_folders(bundles), names, n_ctx=ctx, run=not plan_only, progress=note)],
        as_json,
        report,
        save,
        against,
    )


@bench.command()
def speed(
    bundles: BundlesArg,
    depth: Annotated[
        list[int] | None,
        typer.Option("--depth", min=1, help="Prompt length in tokens, repeatable"),
    ] = None,
    threads: ThreadCountsOption = None,
    repeats: Repeats = 3,
    as_json: JsonOption = False,
    report: Report = None,
    save: Save = None,
    against: Against = None,
) -> None:
    """Prefill and decode speed, and load time. Over context length and threads, cold and warm, with
    the share of the memory's bandwidth. --threads may be repeated.
    """
    from edge_gemma.benchmarks import bench as run

    _finish(
        [
            lambda: run.speed(
                _folders(bundles),
                depths=depth or (128, 512, 2048),
                threads=threads or (),
                repeats=repeats,
                progress=note,
            )
        ],
        as_json,
        report,
        save,
        against,
    )


@bench.command()
def latency(
    bundles: BundlesArg,
    seconds: Annotated[
        list[float] | None,
        typer.Option("--seconds", min=0.2, max=30, help="Length of the speech, repeatable"),
    ] = None,
    repeats: Repeats = 3,
    as_json: JsonOption = False,
    report: Report = None,
    save: Save = None,
    against: Against = None,
) -> None:
    """From the end of speech to the first token of the answer."""
    from edge_gemma.benchmarks import bench as run

    _finish(
        [
            lambda: run.latency(
                _folders(bundles),
                lengths_s=seconds or (1, 2, 5, 10, 20, 30),
                repeats=repeats,
                progress=note,
            )
        ],
        as_json,
        report,
        save,
        against,
    )


@bench.command()
def quality(
    reference: Annotated[str, typer.Argument(help="The bundle or GGUF to measure against")],
    bundles: BundlesArg,
    text: Annotated[
        Path, typer.Option("--text", help="A UTF-8 text to predict", show_default=False)
    ],
    tokens: TokensOption = 4096,
    as_json: JsonOption = False,
    report: Report = None,
    save: Save = None,
    against: Against = None,
) -> None:
    """Perplexity and KL divergence against a reference. Both have the same vocabulary."""
    from edge_gemma.benchmarks import bench as run

    _finish(
        [
            lambda: run.quality(
                _file_or_bundle(reference),
                [_file_or_bundle(b) for b in bundles],
                text,
                max_tokens=tokens,
                progress=note,
            )
        ],
        as_json,
        report,
        save,
        against,
    )


@bench.command()
def compare(
    bundle: Annotated[
        str, typer.Argument(help="A bundle; llama_cpp.Llama on the same file is always compared")
    ],
    other: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            help="SYSTEM=MODEL, repeatable; systems: edge-gemma, llama_cpp.Llama, llama-server, "
            "onnxruntime-genai, litert-lm, transformers",
        ),
    ] = None,
    ctx: ContextOption = 2048,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Prompt length in tokens")] = 512,
    threads: ThreadsOption = None,
    repeats: Repeats = 3,
    as_json: JsonOption = False,
    report: Report = None,
    save: Save = None,
    against: Against = None,
) -> None:
    """One interleaved run against what a user would pick instead."""
    from edge_gemma.benchmarks import bench as run
    from edge_gemma.errors import UsageError

    others = []
    for text in other or ():
        system, equals, path = text.partition("=")
        if not equals or not Path(path).exists():
            raise UsageError(f"--also takes SYSTEM=MODEL with a model that exists; got {text!r}")
        others.append((system, Path(path)))
    (folder,) = _folders([bundle])
    _finish(
        [
            lambda: run.compare(
                folder,
                others,
                n_prompt=prompt,
                n_ctx=ctx or 2048,
                n_threads=threads or 0,
                repeats=repeats,
                progress=note,
            )
        ],
        as_json,
        report,
        save,
        against,
    )


@bench.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="Files kept with --save", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The HTML page to write")],
) -> None:
    """One page of figures that were kept earlier."""
    from edge_gemma.benchmarks import regress
    from edge_gemma.benchmarks.report import write_report

    check_parents(out)
    sections, machine, notes = [], None, []
    for file in files:
        found = regress.read(file)
        machine = machine or found["machine"]
        if found["machine"].get("text") != machine.get("text"):
            notes.append(f"{file.name} was measured elsewhere: {found['machine'].get('text', '')}")
        sections += regress.sections(found)
    _note_written(write_report(out, sections, machine or {}, notes))


@bench.command()
def diff(
    before: Annotated[
        Path,
        typer.Argument(
            help="A file kept with --save, or the JSON beside a report", show_default=False
        ),
    ],
    now: Annotated[Path, typer.Argument(help="Another one", show_default=False)],
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
        _print_changes(changes, notes, every=True)
    if any(change.verdict == "worse" for change in changes):
        raise typer.Exit(REGRESSED)


# --- shared ---


def _folders(names: list[str]) -> list[Path]:
    from edge_gemma.store.installed import resolve

    return [Path(resolve(name)) for name in names]


def _file_or_bundle(name: str) -> Path:
    return Path(name) if name.endswith(".gguf") else _folders([name])[0]


def _note_written(files: Iterable[Path]) -> None:
    note(f"wrote {', '.join(map(str, files))}")


def _print_changes(changes: list, notes: list[str], every: bool = False) -> None:
    for text in [*notes, *(str(change) for change in changes if every or change.verdict != "same")]:
        print(f"- {text}")
    if changes and all(change.verdict == "same" for change in changes):
        print(f"- {len(changes)} figures, none of them changed by more than the noise")


def _finish(
    jobs: list[Callable],
    as_json: bool,
    report: Path | None,
    save: Path | None,
    against: Path | None,
) -> None:
    """Run, print, keep, compare. What was measured before a Ctrl-C is printed and kept as well."""
    from edge_gemma.benchmarks import regress
    from edge_gemma.benchmarks.machine import Calm, describe_machine

    machine = describe_machine()
    before = (
        regress.read(against) if against else None
    )  # a wrong file is told before an hour of measuring
    check_parents(save, report)
    with Calm() as calm:
        sections = [job() for job in jobs]
    machine["warnings"] = calm.warnings()
    changes, notes = regress.compare(before, sections, machine) if before else ([], [])
    if save:
        regress.save(save, sections, machine)
    if report:
        from edge_gemma.benchmarks.report import write_report

        _note_written(write_report(report, sections, machine, machine["warnings"]))
    if as_json:
        record = regress.to_json(sections, machine)
        print_json(record | {"changes": changes, "notes": notes})
    else:
        print(machine["text"])
        for section in sections:
            print("\n" + section.markdown())
        for text in machine["warnings"]:
            print(f"- {text}")
        _print_changes(changes, notes)
    if any(section.stopped for section in sections):
        raise KeyboardInterrupt
    if any(change.verdict == "worse" for change in changes):
        raise typer.Exit(REGRESSED)
