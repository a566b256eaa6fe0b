"""``edge-gemma bench``: memory, speed, latency, quality and comparison, as tables, JSON and one
report page.
"""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

REGRESSED = 1  # exit code when --against found something worse

bench = typer.Typer(
    name="bench",
    help="Measure memory, speed, latency and quality on this machine, and what boards would take.",
    no_args_is_help=True,
)

Bundles = Annotated[
    list[str], typer.Argument(help="bundles: folders or installed names", show_default=False)
]
Json = Annotated[
    bool, typer.Option("--json", help="one JSON object on standard output instead of tables")
]
Report = Annotated[
    Path | None,
    typer.Option("--report", help="also write this HTML page, with PNG and JSON beside it"),
]
Save = Annotated[Path | None, typer.Option("--save", help="keep the figures in this file")]
Against = Annotated[
    Path | None,
    typer.Option(
        "--against",
        help="compare with a file kept earlier; exit code 1 when something got worse by more than "
        "the noise",
    ),
]
Repeats = Annotated[
    int,
    typer.Option(
        "--repeats",
        min=1,
        max=100,
        help="interleaved runs; medians are shown with half their range",
    ),
]


def register(app: typer.Typer) -> None:
    app.add_typer(bench)


@bench.command()
def wer(
    bundle: Annotated[
        str, typer.Argument(help="a bundle that hears: its folder or installed name")
    ],
    dataset: Annotated[
        Path,
        typer.Argument(
            help="a folder of recordings with transcripts (NAME.txt beside NAME.wav, or "
            "LibriSpeech's *.trans.txt)"
        ),
    ],
    language: Annotated[
        str | None, typer.Option("--language", help="the language spoken, in English words")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="so many recordings only")
    ] = None,
    short: Annotated[
        bool,
        typer.Option("--short", help="without padding rows; the reference mode is the default"),
    ] = False,
    json: Json = False,
) -> None:
    """Word error rate on recordings with transcripts, greedily decoded."""
    from edge_gemma.benchmarks import wer as run
    from edge_gemma.store.installed import resolve

    found = run.run(
        str(resolve(bundle)),
        dataset,
        language=language,
        limit=limit,
        pad_audio=not short,
        progress=_say,
    )
    if json:
        print(jsonlib.dumps(found))
    else:
        rate = "no words" if found["wer"] is None else f"{100 * found['wer']:.2f} %"
        print(
            f"word error rate {rate}: {found['errors']} of {found['words']} words in "
            f"{found['files']} recordings, {found['failed']} unreadable"
        )


@bench.command()
def memory(
    bundles: Bundles,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            "-d",
            help="device profile, repeatable; all (the default), auto for this machine",
        ),
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option("--ctx", help="context in tokens; default: what the plan chooses"),
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="no runs, only what would be needed")
    ] = False,
    json: Json = False,
    report: Report = None,
    save: Save = None,
    against: Against = None,
) -> None:
    """What each bundle takes on each board: planned, and measured under that board's limits where
    this machine can.
    """
    from edge_gemma.benchmarks import bench as run

    names = run.device_names(device or ["all"])
    _finish(
        [lambda: run.memory(_folders(bundles), names, n_ctx=ctx, run=not plan_only, progress=_say)],
        json,
        report,
        save,
        against,
    )


@bench.command()
def speed(
    bundles: Bundles,
    depth: Annotated[
        list[int] | None,
        typer.Option("--depth", min=1, help="prompt length in tokens, repeatable"),
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option("--threads", "-t", min=1, help="thread count, repeatable")
    ] = None,
    repeats: Repeats = 3,
    json: Json = False,
    report: Report = None,
    save: Save = None,
    against: Against = None,
) -> None:
    """Prefill and decode speed over context length and threads, load time cold and warm, share of
    the memory's bandwidth.
    """
    from edge_gemma.benchmarks import bench as run

    _finish(
        [
            lambda: run.speed(
                _folders(bundles),
                depths=depth or (128, 512, 2048),
                threads=threads or (),
                repeats=repeats,
                progress=_say,
            )
        ],
        json,
        report,
        save,
        against,
    )


@bench.command()
def latency(
    bundles: Bundles,
    seconds: Annotated[
        list[float] | None,
        typer.Option("--seconds", min=0.2, max=30, help="length of the speech, repeatable"),
    ] = None,
    repeats: Repeats = 3,
    json: Json = False,
    report: Report = None,
    save: Save = None,
    against: Against = None,
) -> None:
    """From the end of what the user says to the first token of the answer."""
    from edge_gemma.benchmarks import bench as run

    _finish(
        [
            lambda: run.latency(
                _folders(bundles),
                lengths_s=seconds or (1, 2, 5, 10, 20, 30),
                repeats=repeats,
                progress=_say,
            )
        ],
        json,
        report,
        save,
        against,
    )


@bench.command()
def quality(
    reference: Annotated[str, typer.Argument(help="the bundle or GGUF to measure against")],
    bundles: Bundles,
    text: Annotated[
        Path, typer.Option("--text", help="a UTF-8 text to predict", show_default=False)
    ],
    tokens: Annotated[
        int, typer.Option("--tokens", min=512, help="at most so many tokens of it")
    ] = 4096,
    json: Json = False,
    report: Report = None,
    save: Save = None,
    against: Against = None,
) -> None:
    """Perplexity and KL divergence against a reference of the same vocabulary."""
    from edge_gemma.benchmarks import bench as run

    _finish(
        [
            lambda: run.quality(
                _file_or_bundle(reference),
                [_file_or_bundle(b) for b in bundles],
                text,
                max_tokens=tokens,
                progress=_say,
            )
        ],
        json,
        report,
        save,
        against,
    )


@bench.command()
def compare(
    bundle: Annotated[
        str, typer.Argument(help="a bundle; llama_cpp.Llama on the same file is always compared")
    ],
    other: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            help="SYSTEM=MODEL, repeatable; systems: edge-gemma, llama_cpp.Llama, llama-server, "
            "onnxruntime-genai, litert-lm, transformers",
        ),
    ] = None,
    ctx: Annotated[int, typer.Option("--ctx", min=64)] = 2048,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="prompt length in tokens")] = 512,
    threads: Annotated[int, typer.Option("--threads", "-t", min=0, help="0: all usable cores")] = 0,
    repeats: Repeats = 3,
    json: Json = False,
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
                n_ctx=ctx,
                n_threads=threads,
                repeats=repeats,
                progress=_say,
            )
        ],
        json,
        report,
        save,
        against,
    )


@bench.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="files kept with --save", show_default=False)],
    out: Annotated[Path, typer.Argument(help="the HTML page to write")],
) -> None:
    """One page of figures that were kept earlier."""
    from edge_gemma.benchmarks import regress
    from edge_gemma.benchmarks.report import write_report

    _check_folders(out)
    sections, machine, notes = [], None, []
    for file in files:
        found = regress.read(file)
        machine = machine or found["machine"]
        if found["machine"].get("text") != machine.get("text"):
            notes.append(f"{file.name} was measured elsewhere: {found['machine'].get('text', '')}")
        sections += regress.sections(found)
    _say(f"wrote {', '.join(str(path) for path in write_report(out, sections, machine, notes))}")


@bench.command()
def diff(
    before: Annotated[
        Path,
        typer.Argument(
            help="a file kept with --save, or the JSON beside a report", show_default=False
        ),
    ],
    now: Annotated[Path, typer.Argument(help="another one", show_default=False)],
    json: Json = False,
) -> None:
    """What changed between two files by more than the noise both state; exit code 1 when something
    got worse.
    """
    from edge_gemma.benchmarks import regress

    old, new = regress.read(before), regress.read(now)
    changes, notes = regress.compare(old, regress.sections(new), new["machine"])
    if json:
        print(jsonlib.dumps({"changes": [vars(change) for change in changes], "notes": notes}))
    else:
        _print_changes(changes, notes, every=True)
    if any(change.verdict == "worse" for change in changes):
        raise typer.Exit(REGRESSED)


# --- shared --------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _folders(names: list[str]) -> list[Path]:
    from edge_gemma.store.installed import resolve

    return [Path(resolve(name)) for name in names]


def _file_or_bundle(name: str) -> Path:
    return Path(name) if name.endswith(".gguf") else _folders([name])[0]


def _check_folders(*files: Path | None) -> None:
    from edge_gemma.errors import UsageError

    for file in files:
        if file and not file.parent.is_dir():
            raise UsageError(f"no folder {file.parent} to write {file.name} into")


def _print_changes(changes: list, notes: list[str], every: bool = False) -> None:
    for text in [*notes, *(str(change) for change in changes if every or change.verdict != "same")]:
        print(f"- {text}")
    if changes and all(change.verdict == "same" for change in changes):
        print(f"- {len(changes)} figures, none of them changed by more than the noise")


def _finish(
    jobs: list[Callable], json: bool, report: Path | None, save: Path | None, against: Path | None
) -> None:
    """Run, print, keep, compare. What was measured before a Ctrl-C is printed and kept as well."""
    from edge_gemma.benchmarks import regress
    from edge_gemma.benchmarks.machine import Calm, describe_machine

    machine = describe_machine()
    before = (
        regress.read(against) if against else None
    )  # a wrong file is told before an hour of measuring
    _check_folders(save, report)
    with Calm() as calm:
        sections = [job() for job in jobs]
    machine["warnings"] = calm.warnings()
    changes, notes = regress.compare(before, sections, machine) if before else ([], [])
    if save:
        regress.save(save, sections, machine)
    if report:
        from edge_gemma.benchmarks.report import write_report

        _say(
            "wrote "
            f"{', '.join(str(path) for path in write_report(report, sections, machine, machine['warnings']))}"
        )
    if json:
        print(
            jsonlib.dumps(
                regress.to_json(sections, machine)
                | {"changes": [vars(change) for change in changes], "notes": notes}
            )
        )
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
