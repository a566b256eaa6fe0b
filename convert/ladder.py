"""One checkpoint, several recipes: the table and the plot that say what each costs and gives.

In: a checkpoint, recipe names (``name`` or ``name+imatrix``), a text. Out: a :class:`Rung` each,
``table.md``, ``table.json`` and, with matplotlib, ``ladder.png``. Quality is measured against the
checkpoint's own precision (bf16), speed and memory through the runtime's loader in a process of its
own, the recipes taking turns so that a machine's moods fall on all alike. Quality takes long and
any machine will do; speed is short and wants a calm one. So the two can be had apart: :func:`run`
with ``rounds=0`` and ``keep``, later :func:`time_kept`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import msgspec
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.convert.quality import Receipt, compare, measure_speed
from edge_gemma.convert.recipe import read_recipe

from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import MANIFEST
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.units import MiB

REFERENCE = "bf16"
TABLE = "table.json"


@dataclass(frozen=True)
class Rung:
    recipe: str
    bytes: int
    bits_per_weight: float
    receipt: Receipt
    prefill_tok_s: float = 0.0
    decode_tok_s: float = 0.0
    pss_bytes: int = 0
    anon_bytes: int = 0

    def record(self) -> dict:
        return asdict(self)


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
    stage: Callable[[str], None] = lambda text: None,
    note: Callable[[str], None] = lambda text: None,
    steps: Callable[[int, int], None] = lambda done, total: None,
) -> list[Rung]:
    """Convert, compare, time (``rounds=0``: not yet). ``add`` keeps the table that ``out`` has and
    adds the recipes that are not in it. Raises UsageError before any work for an unknown recipe,
    ``+imatrix`` without one, or an output that exists.
    """
    wanted = {_label(name): name for recipe in recipes if (name := recipe.strip())}
    for name in wanted.values():
        read_recipe(name.removesuffix("+imatrix"))
        if name.endswith("+imatrix") and imatrix is None:
            raise UsageError(
                f"{name}: give the importance matrix with --imatrix FILE (`edge-gemma "
                "calibrate` makes one)"
            )
    if not text.is_file():
        raise UsageError(f"there is no text {text} to measure on")
    if out.exists() and not (overwrite or add):
        raise UsageError(f"{out} exists; choose another folder or pass --force")
    earlier = _kept(out) if add and (out / TABLE).exists() else []
    wanted = {
        label: name
        for label, name in wanted.items()
        if label not in {rung.recipe for rung in earlier}
    }
    if not wanted:
        return earlier
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeFailure(f"cannot make the folder {out}: {error.strerror}") from None
    bundles: dict[str, Bundle] = {}
    doomed: list[
        Bundle
    ] = []  # what goes at the end: until there is a table, whatever this run made
    try:
        for label, name in {REFERENCE: REFERENCE, **wanted}.items():
            stage(f"convert {label}")
            options = Conversion(
                quant=name.removesuffix("+imatrix"),
                imatrix=imatrix if name.endswith("+imatrix") else None,
                audio="none",
                vision="none",
                overwrite=overwrite or add,
                n_threads=n_threads,
                verify=False,
            )
            if label == REFERENCE and earlier and (out / label / MANIFEST).is_file():
                bundles[label] = Bundle.open(out / label)
                continue
            result = convert(checkpoint, out / label, options)
            bundles[label] = result.bundle
            doomed.append(result.bundle)
            for text_note in result.notes:
                note(f"{label}: {text_note}")
        stage("quality")
        candidates = {name: bundles[name].decoder_path for name in wanted}
        receipts = compare(
            bundles[REFERENCE].decoder_path,
            candidates,
            text,
            max_tokens=max_tokens,
            n_threads=n_threads,
            progress=steps,
        )
        rungs = earlier + [_rung(name, bundles[name], receipts[name]) for name in wanted]
        if len({(rung.receipt.text, rung.receipt.tokens) for rung in rungs}) > 1:
            raise UsageError(
                f"{out} was measured on other text than {text.name}; make a new ladder, or "
                "ask for as many tokens of the same text"
            )
        bundles |= {rung.recipe: Bundle.open(out / rung.recipe) for rung in earlier}
        _write(rungs, out)  # before the speeds: whoever interrupts those keeps the long part
        doomed = [] if keep else list(bundles.values())
        if rounds:
            stage("speed")
            rungs = _with_speed(rungs, bundles, rounds, speed_threads, steps)
            _write(rungs, out)
    finally:
        for bundle in doomed:
            shutil.rmtree(bundle.folder, ignore_errors=True)
        if not any(out.iterdir()):
            out.rmdir()  # failed before there was anything to show
    return rungs


def time_kept(
    out: Path,
    *,
    rounds: int = 3,
    n_threads: int = 0,
    keep: bool = True,
    steps: Callable[[int, int], None] = lambda done, total: None,
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
    tensors = bundle.manifest.decoder.tensors
    weights = sum(
        _count(tensor.shape)
        for tensor in tensors
        if tensor.name != "output.weight" or bundle.manifest.decoder.tied_head
    )
    return Rung(
        name, bundle.total_bytes(), 8 * sum(tensor.nbytes for tensor in tensors) / weights, receipt
    )


def _count(shape: tuple[int, ...]) -> int:
    n = 1
    for side in shape:
        n *= side
    return n


def _with_speed(
    rungs: list[Rung],
    bundles: dict[str, Bundle],
    rounds: int,
    n_threads: int,
    steps: Callable[[int, int], None],
) -> list[Rung]:
    figures: dict[str, list[dict]] = {rung.recipe: [] for rung in rungs}
    for turn in range(rounds):
        for i, rung in enumerate(rungs):
            figures[rung.recipe].append(measure_speed(bundles[rung.recipe], n_threads=n_threads))
            steps(turn * len(rungs) + i + 1, rounds * len(rungs))
    timed = []
    for rung in rungs:
        middle = {
            key: median(figure[key] for figure in figures[rung.recipe])
            for key in ("prefill_tok_s", "decode_tok_s", "pss_bytes", "anon_bytes")
        }
        timed.append(
            replace(
                rung,
                **{
                    key: round(value, 1) if key.endswith("tok_s") else int(value)
                    for key, value in middle.items()
                },
            )
        )
    return timed


def table(rungs: Sequence[Rung]) -> str:
    """A Markdown table, smallest divergence first as given."""
    head = [
        "recipe",
        "MiB",
        "bits/weight",
        "PPL",
        "KLD mean",
        "KLD 99 %",
        "same top-1",
        "prefill tok/s",
        "decode tok/s",
        "PSS MiB (anon)",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for rung in rungs:
        r = rung.receipt
        cells = [
            rung.recipe,
            f"{rung.bytes / MiB:.0f}",
            f"{rung.bits_per_weight:.2f}",
            f"{r.ppl:.2f}",
            f"{r.kld_mean:.4f}",
            f"{r.kld_p99:.3f}",
            f"{100 * r.top1_agreement:.1f} %",
            *(
                [
                    f"{rung.prefill_tok_s:.0f}",
                    f"{rung.decode_tok_s:.0f}",
                    f"{rung.pss_bytes / MiB:.0f} ({rung.anon_bytes / MiB:.0f})",
                ]
                if rung.decode_tok_s
                else ["–"] * 3
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if rungs:
        first = rungs[0].receipt
        lines.append(
            f"\nAgainst bf16 (PPL {first.ppl_reference:.2f}) on {first.tokens} tokens of "
            f"{first.text}."
        )
    return "\n".join(lines)


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
        axes.scatter(
            rung.bytes / MiB,
            max(rung.receipt.kld_mean, 1e-6),
            color="tab:red" if "edge" in rung.recipe else "tab:blue",
        )
        axes.annotate(
            rung.recipe,
            (rung.bytes / MiB, max(rung.receipt.kld_mean, 1e-6)),
            textcoords="offset points",
            xytext=(5, 4),
            fontsize=8,
        )
    axes.set(
        xlabel="bundle, MiB",
        ylabel="mean KL divergence from bf16, nats",
        yscale="log",
        title="What each recipe costs",
    )
    axes.margins(x=0.2)  # room for the names
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
