"""One checkpoint, several recipes: the table and the plot that say what each costs and gives.

In: a checkpoint, recipe names (``name``, ``name+imatrix``, ``name@en-sl`` with a vocabulary cut to
these languages), a text. Out: a :class:`Rung` each,
``table.md``, ``table.json`` and, with matplotlib, ``ladder.png``. Quality is measured against the
checkpoint's own precision (bf16); speed and memory in measured processes, the recipes taking turns
so that what drifts drifts for all. Quality takes long and any machine will do; speed is short and
wants a calm one. So the two can be had apart: :func:`run` with ``rounds=0`` and ``keep``, later
:func:`time_kept`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from edge_gemma.benchmarks.caps import usable_cpus
from edge_gemma.benchmarks.measure import Run, interleave, median_of
from edge_gemma.benchmarks.sections import (
    Progress,
    Row,
    Section,
    Steps,
    markdown_table,
    no_steps,
    silent,
)
from edge_gemma.benchmarks.systems import Task
from edge_gemma.benchmarks.texts import calibration_text, evaluation_text
from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import MANIFEST
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.convert.quality import Receipt, compare
from edge_gemma.convert.recipe import read_recipe
from edge_gemma.convert.trim.choice import Wanted
from edge_gemma.convert.trim.cut import read_kept
from edge_gemma.convert.trim.languages import check_languages
from edge_gemma.engines.llama.rescoring import rescorer_of
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.units import MiB

REFERENCE = "bf16"
TABLE = "table.json"
IMATRIX = "+imatrix"
CUT = "@"  # before the languages that a vocabulary is cut to: edge+imatrix@en-sl
N_CTX, N_PROMPT, N_PREDICT = 1024, 512, 128  # of the speed runs
SMALLEST_KLD = 1e-6  # the plot's scale is logarithmic


@dataclass(frozen=True)
class Rung:
    """One recipe. Speeds are 0 until they are measured; memory is the peak of those runs."""

    recipe: str
    bytes: int
    bits_per_weight: float
    receipt: Receipt
    prefill_tok_s: float = 0.0
    decode_tok_s: float = 0.0
    pss_bytes: int = 0
    anon_bytes: int = 0

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def row(self) -> Row:
        """As the section's table shows it: no speed is no figure."""
        row = self.record()
        row |= row.pop("receipt")
        speeds = ("prefill_tok_s", "decode_tok_s", "pss_bytes", "anon_bytes")
        return row | {key: row[key] or None for key in speeds}


def run(
    checkpoint: Path,
    out: Path,
    text: Path,
    recipes: Sequence[str],
    *,
    imatrix: Path | None = None,
    max_tokens: int = 0,
    rounds: int = 3,
    keep: bool = False,
    n_threads: int = 0,
    speed_threads: int = 0,
    overwrite: bool = False,
    add: bool = False,
    stage: Progress = silent,
    note: Progress = silent,
    steps: Steps = no_steps,
) -> list[Rung]:
    """Convert, compare, time (``rounds=0``: not yet). ``add`` keeps the table that ``out`` has and
    adds the recipes that are not in it. Raises UsageError before any work for an unknown recipe,
    ``+imatrix`` without one, or an output that exists.
    """
    wanted = _checked_recipes(recipes, imatrix)
    if not text.is_file():
        raise UsageError(f"there is no text {text} to measure on")
    if out.exists() and not (overwrite or add):
        raise UsageError(f"{out} exists; choose another folder or pass --force")
    earlier = _kept(out) if add and (out / TABLE).exists() else []
    measured = {rung.recipe for rung in earlier}
    wanted = {label: name for label, name in wanted.items() if label not in measured}
    if not wanted:
        return earlier
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeFailure(f"cannot make the folder {out}: {error.strerror}") from None
    options = Conversion(
        audio="none",
        vision="none",
        imatrix=imatrix,
        overwrite=overwrite or add,
        n_threads=n_threads,
        verify=False,
    )
    work = _Work(checkpoint, out, options, earlier, stage, note, steps)
    try:
        work.convert(wanted)
        rungs = work.compare(text, list(wanted), max_tokens)
        if keep:
            work.doomed.clear()
        else:
            work.doomed = list(work.bundles.values())
        if rounds:
            stage("speed")
            rungs = _with_speed(rungs, work.bundles, rounds, speed_threads, steps)
            _write(rungs, out)
    finally:
        work.clean()
    return rungs


def _checked_recipes(recipes: Sequence[str], imatrix: Path | None) -> dict[str, str]:
    """label → recipe; an unknown one is refused."""
    wanted = {_label(name): name for recipe in recipes if (name := recipe.strip())}
    for name in wanted.values():
        recipe, _, languages = name.partition(CUT)
        read_recipe(recipe.removesuffix(IMATRIX))
        if languages:
            check_languages(tuple(languages.split("-")))
        if recipe.endswith(IMATRIX) and imatrix is None:
            raise UsageError(
                f"{name}: give the importance matrix with --imatrix FILE (`edge-gemma "
                "calibrate` makes one)"
            )
    return wanted


@dataclass
class _Work:
    """The bundles of one ladder. ``doomed``: what is removed at the end; until there is a table,
    whatever this run made.
    """

    checkpoint: Path
    out: Path
    options: Conversion
    earlier: list[Rung]
    stage: Progress
    note: Progress
    steps: Steps
    bundles: dict[str, Bundle] = field(default_factory=dict)
    doomed: list[Bundle] = field(default_factory=list)

    def convert(self, wanted: dict[str, str]) -> None:
        for label, name in {REFERENCE: REFERENCE, **wanted}.items():
            self.stage(f"convert {label}")
            folder = self.out / label
            if label == REFERENCE and self.earlier and (folder / MANIFEST).is_file():
                self.bundles[label] = Bundle.open(folder)
                continue
            recipe, _, languages = name.partition(CUT)
            weighed = recipe.endswith(IMATRIX)
            options = replace(
                self.options,
                quant=recipe.removesuffix(IMATRIX),
                imatrix=self.options.imatrix if weighed else None,
                trim=Wanted(tuple(languages.split("-"))) if languages else None,
            )
            result = convert(self.checkpoint, folder, options)
            self.bundles[label] = result.bundle
            self.doomed.append(result.bundle)
            for text in result.notes:
                self.note(f"{label}: {text}")

    def compare(self, text: Path, labels: list[str], max_tokens: int) -> list[Rung]:
        """The table with qualities. It is written before the speeds: whoever interrupts those keeps
        the long part.
        """
        self.stage("quality")
        with ExitStack() as stack:
            rescorers = {}  # a bundle is measured as it runs
            for label in labels:
                bundle = self.bundles[label]
                manifest = bundle.manifest
                rescorer = rescorer_of(bundle.decoder_path, manifest.family, manifest.decoder)
                if rescorer:
                    rescorers[label] = rescorer
                    stack.callback(rescorer.close)
            receipts = compare(
                self.bundles[REFERENCE].decoder_path,
                {label: self.bundles[label].decoder_path for label in labels},
                text,
                max_tokens=max_tokens,
                n_threads=self.options.n_threads,
                rescorers=rescorers,
                kept={
                    label: kept
                    for label in labels
                    if (kept := read_kept(self.bundles[label])) is not None
                },
                progress=self.steps,
            )
        new = [_rung(label, self.bundles[label], receipts[label]) for label in labels]
        rungs = self.earlier + new
        if len({(rung.receipt.text, rung.receipt.tokens) for rung in rungs}) > 1:
            raise UsageError(
                f"{self.out} was measured on other text than {text.name}; make a new ladder, or "
                "ask for as many tokens of the same text"
            )
        for rung in self.earlier:
            self.bundles[rung.recipe] = Bundle.open(self.out / rung.recipe)
        _write(rungs, self.out)
        return rungs

    def clean(self) -> None:
        for bundle in self.doomed:
            shutil.rmtree(bundle.folder, ignore_errors=True)
        if not any(self.out.iterdir()):
            self.out.rmdir()  # failed before there was anything to show


def time_kept(
    out: Path,
    *,
    rounds: int = 3,
    n_threads: int = 0,
    keep: bool = True,
    steps: Steps = no_steps,
) -> list[Rung]:
    """Speed and memory of the bundles that :func:`run` kept in ``out``, added to its table. Raises
    UsageError when there are none.
    """
    rungs = _kept(out)
    bundles = {rung.recipe: Bundle.open(out / rung.recipe) for rung in rungs}
    rungs = _with_speed(rungs, bundles, max(1, rounds), n_threads, steps)
    _write(rungs, out)
    if not keep:
        for label in (REFERENCE, *bundles):
            shutil.rmtree(out / label, ignore_errors=True)
    return rungs


def section(rungs: Sequence[Rung]) -> Section:
    """As the other benchmarks' sections, in the order given."""
    found = Section("ladder", [rung.row() for rung in rungs])
    if rungs:
        first = rungs[0].receipt
        found.note(
            f"Against bf16 (PPL {first.ppl_reference:.2f}) on {first.tokens} tokens of "
            f"{first.text}."
        )
    return found


def table(rungs: Sequence[Rung]) -> str:
    """A Markdown table, in the order given, and the line that says on what it was measured."""
    found = section(rungs)
    return "\n".join([markdown_table([found.head, *found.cells]), *(f"\n{n}" for n in found.notes)])


def _kept(out: Path) -> list[Rung]:
    """The table of an earlier run whose bundles are still there."""
    try:
        rungs = msgspec.json.decode((out / TABLE).read_bytes(), type=list[Rung])
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(
            f"{out} holds no ladder to go on with ({error}); make one first, with --keep"
        ) from None
    gone = [rung.recipe for rung in rungs if not (out / rung.recipe / MANIFEST).is_file()]
    if gone:
        raise UsageError(
            f"{out} no longer holds the bundles of {', '.join(gone)}; run the ladder again "
            "with --keep"
        )
    return rungs


def _write(rungs: Sequence[Rung], out: Path) -> None:
    (out / TABLE).write_text(json.dumps([rung.record() for rung in rungs], indent=1) + "\n")
    (out / "table.md").write_text(table(rungs) + "\n")
    _plot(rungs, out / "ladder.png")


def _label(name: str) -> str:
    """A recipe's name, or its file's, as it stands in the table and on disk."""
    return Path(name).name.replace(".toml", "")


def _rung(name: str, bundle: Bundle, receipt: Receipt) -> Rung:
    decoder = bundle.manifest.decoder
    n_weights = sum(
        prod(tensor.shape)
        for tensor in decoder.tensors
        if tensor.name != "output.weight" or decoder.tied_head
    )
    bits = 8 * sum(tensor.nbytes for tensor in decoder.tensors)
    return Rung(name, bundle.total_bytes(), bits / n_weights, receipt)


def _with_speed(
    rungs: Sequence[Rung],
    bundles: dict[str, Bundle],
    rounds: int,
    n_threads: int,
    steps: Steps,
) -> list[Rung]:
    tasks = [
        Task(
            "edge-gemma",
            str(bundles[rung.recipe].folder),
            n_ctx=N_CTX,
            n_threads=n_threads or len(usable_cpus()),
            n_prompt=N_PROMPT,
            n_predict=N_PREDICT,
            rounds=2,
        )
        for rung in rungs
    ]
    runs: list[list[Run]] = [[] for _ in tasks]
    interleave(tasks, rounds, runs, steps=steps)
    return [_timed(rung, found) for rung, found in zip(rungs, runs, strict=True)]


def _timed(rung: Rung, runs: Sequence[Run]) -> Rung:
    if failed := [run for run in runs if not run.ok]:
        raise RuntimeFailure(f"{rung.recipe}: {failed[0].outcome.describe()}")
    return replace(
        rung,
        prefill_tok_s=round(median_of(runs, "prefill_tok_s") or 0.0, 1),
        decode_tok_s=round(median_of(runs, "decode_tok_s") or 0.0, 1),
        pss_bytes=int(median(run.peak_pss_bytes for run in runs)),
        anon_bytes=int(median(run.peak_anon_bytes for run in runs)),
    )


def _plot(rungs: Sequence[Rung], path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return  # the table says it all
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for rung in rungs:
        at = (rung.bytes / MiB, max(rung.receipt.kld_mean, SMALLEST_KLD))
        axes.scatter(*at, color="tab:red" if "edge" in rung.recipe else "tab:blue")
        axes.annotate(rung.recipe, at, textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set(
        xlabel="bundle, MiB",
        ylabel="mean KL divergence from bf16, nats",
        yscale="log",
        title="What each recipe costs",
    )
    axes.margins(x=0.2)  # place for the names
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


# --- the recipes on a known text ---


def recipes(
    checkpoints: Sequence[Path],
    *,
    work: Path,
    recipes: Sequence[str],
    max_tokens: int = 20_440,
    calibration_tokens: int = 40_880,
    rounds: int = 3,
    n_threads: int = 0,
    progress: Progress = silent,
) -> Section:
    """A ladder of each checkpoint on texts of the standard library (``texts.py``). What ``work``
    already has of it (importance matrix, bundles, qualities) is kept: a second run only times.
    """
    found = Section("ladder")

    def steps(done: int, total: int) -> None:
        if done % 10 == 0 or done == total:
            progress(f"{done} of {total}")

    for checkpoint in checkpoints:
        folder = work / f"recipes-{checkpoint.name}"
        folder.mkdir(parents=True, exist_ok=True)
        text = _text(folder / "topics.txt", evaluation_text)
        imatrix = _imatrix(checkpoint, folder, calibration_tokens, n_threads, progress)
        rungs = run(
            checkpoint,
            folder / "ladder",
            text,
            recipes,
            imatrix=imatrix,
            max_tokens=max_tokens,
            rounds=0,
            keep=True,
            n_threads=n_threads,
            add=True,
            stage=progress,
            steps=steps,
        )
        if rounds:
            progress("speed")
            rungs = time_kept(folder / "ladder", rounds=rounds, n_threads=n_threads, steps=steps)
        found.add(section(rungs))
        found.note(*_gains(rungs))
    return found


def _text(path: Path, make: Callable[[], str]) -> Path:
    if not path.is_file():
        path.write_text(make())
    return path


def _imatrix(
    checkpoint: Path, folder: Path, max_tokens: int, n_threads: int, progress: Progress
) -> Path:
    from edge_gemma.convert.imatrix import calibrate

    matrix = folder / "docstrings.imatrix.gguf"
    if matrix.is_file():
        return matrix
    progress("calibrate")
    # activations hardly differ from bf16's, and it is faster
    options = Conversion(quant="q8_0", verify=False, overwrite=True)
    bundle = convert(checkpoint, folder / "q8_0", options).bundle
    text = _text(folder / "docstrings.txt", calibration_text)
    calibrate(bundle, text, matrix, max_tokens=max_tokens, n_threads=n_threads)
    return matrix


def _gains(rungs: Sequence[Rung]) -> Iterator[str]:
    """What our own recipes are against q4_k_m, and what an importance matrix brings."""
    by_name = {rung.recipe: rung for rung in rungs}
    stock = by_name.get("q4_k_m")
    for rung in rungs:
        if stock and stock.decode_tok_s and rung.recipe.startswith("edge"):
            yield (
                f"{rung.recipe} against q4_k_m: {rung.decode_tok_s / stock.decode_tok_s:.2f}× "
                f"decode, {rung.prefill_tok_s / stock.prefill_tok_s:.2f}× prefill, "
                f"{(rung.pss_bytes - stock.pss_bytes) / MiB:+.0f} MiB"
            )
        weighed = by_name.get(rung.recipe + IMATRIX)
        if weighed:
            yield (
                f"{rung.recipe}: KLD {rung.receipt.kld_mean:.4f} → "
                f"{weighed.receipt.kld_mean:.4f} with the importance matrix"
            )
