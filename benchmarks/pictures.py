"""Sections → matplotlib figures, in colours that read on a light and on a dark page (the page's own
text colour is used for axes and words).

In: sections. Out: figures, their SVG and PNG. What it does not know: pages, measuring.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Self

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: no backend, no global state
from matplotlib.patches import Patch

from edge_gemma.benchmarks.sections import Row, Section
from edge_gemma.units import MiB

# Okabe and Ito's colours: told apart by everybody, on white and on near-black
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#888888"]
INK = "#7f7f80"  # stands for the page's text colour; replaced by currentColor in the SVG
STYLE: Any = {  # rcParams: matplotlib's type lists every key there is
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "figure.figsize": (6.4, 3.6),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "axes.axisbelow": True,
    "legend.fontsize": 8,
    "savefig.transparent": True,
    "svg.hashsalt": "edge-gemma",
}
Drawn = Iterator[tuple[str, str, Figure]]  # (part of the file's name, caption, figure)


def draw(section: Section) -> Drawn:
    """Every picture a section has."""
    drawers: dict[str, Callable[[Section], Drawn]] = {
        "memory": _memory,
        "speed": _speed,
        "latency": _latency,
        "quality": _quality,
        "compare": _compare,
    }
    if section.rows and section.kind in drawers:
        with matplotlib.rc_context(STYLE):
            yield from drawers[section.kind](section)


def svg(figure: Figure) -> str:
    """An SVG to be put into a page: no size of its own, ids that no other figure has."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for size in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    salt = f"f{abs(hash(text)) % 10**8}-"
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{salt}", text)


def write_png(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure.patch.set_facecolor("white")
        figure.savefig(path, dpi=150, transparent=False, facecolor="white")


def _figure(width: float = 6.4, height: float = 3.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


# --- memory: footprints ---

_GROUPS = (  # what a plan's item is called → the band it belongs to
    ("weights, mapped", "weights, file"),
    ("weights, repacked", "weights, repacked"),
    ("KV", "KV cache"),
    ("compute", "compute"),
    ("cold", "cold rows"),
    ("audio encoder", "encoders"),
    ("vision encoder", "encoders"),
    ("", "Python, vocabulary, libraries"),
)
_BANDS = dict(zip(dict.fromkeys(group for _, group in _GROUPS), COLOURS, strict=False))


def _group(name: str) -> str:
    return next(group for start, group in _GROUPS if name.startswith(start))


def _bytes_by_group(row: Row, phase: str) -> dict[str, int]:
    """What the plan counts in one phase, by band."""
    found = dict.fromkeys(_BANDS, 0)
    for name, n_bytes, kind, phases in row["items"]:
        if phase in phases and kind != "reclaimable":
            found[_group(name)] += n_bytes
    return found


def _memory(section: Section) -> Drawn:
    models = list(dict.fromkeys(row["model"] for row in section.rows))
    for n, model in enumerate(models):
        rows = [row for row in section.rows if row["model"] == model]
        caption = (
            f"{model}: what each board's plan counts at its peak; | what the board has to spend, "
            "◆ measured here. Pale: does not fit."
        )
        yield f"footprint-{n}", caption, _footprint(model, rows)
    for n, (name, timeline) in enumerate(section.timelines.items()):
        yield f"timeline-{n}", f"{name}: memory over time.", _timeline(timeline)


def _footprint(model: str, rows: Sequence[Row]) -> Figure:
    figure, axes = _figure(6.4, 1.6 + 0.3 * len(rows))
    shown: dict[str, str] = {}
    widest = 0.0
    for y, row in enumerate(rows):
        phases = [_bytes_by_group(row, p) for p in ("prefill", "decode", "listen", "look")]
        peak = max(phases, key=lambda groups: sum(groups.values()))
        left = 0.0
        alpha = 1 if row["fits"] else 0.35
        for group, n_bytes in peak.items():
            width = n_bytes / MiB
            axes.barh(y, width, left=left, color=_BANDS[group], height=0.6, alpha=alpha)
            if width:
                shown[group] = _BANDS[group]
            left += width
        widest = max(widest, sum(_bytes_by_group(row, "decode").values()) / MiB)
        spend = row["usable_bytes"] / MiB
        axes.plot([spend, spend], [y - 0.42, y + 0.42], color=INK, linewidth=2)
        if "peak_pss_bytes" in row:
            at = row["peak_pss_bytes"] / MiB
            axes.plot(at, y, marker="D", markersize=4, color=INK, linestyle="none")
    axes.set_yticks(range(len(rows)), [row["device"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * widest)
    axes.set_xlabel("MiB")
    axes.set_title(model, fontsize=10)
    axes.grid(axis="y", visible=False)
    handles = [Patch(color=colour, label=group) for group, colour in shown.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


# --- memory: over time ---

_PROGRAM = "anonymous: weights, vocabulary, Python"
_TIMELINE = dict(
    zip(
        (_PROGRAM, "KV cache", "compute", "encoders", "file, hot", "file, cold"),
        COLOURS,
        strict=False,
    )
)
NEVER = 1e9


@dataclass(frozen=True)
class _Anonymous:
    """What the plan knows of the anonymous part, which the kernel counts as one: bytes from the end
    of load (KV cache), the first prefill (compute) and the first sound or picture (encoders) on.
    """

    kv_bytes: int
    compute_bytes: int
    encoder_bytes: int
    before_encoders_bytes: int  # the most that was there until then: encoders fill up bit by bit
    loaded_s: float
    prefill_s: float
    media_s: float

    @classmethod
    def of(cls, items: Sequence[Any], starts: dict[str, float], samples: Sequence[Row]) -> Self:
        def planned(*begins: str) -> int:
            return sum(
                n for name, n, kind, _ in items if kind == "anon" and name.startswith(begins)
            )

        loaded_s = starts.get("loaded", 0.0)
        media_s = starts.get("listen", starts.get("look", NEVER))
        before = [s["anon_bytes"] for s in samples if loaded_s <= s["seconds"] < media_s]
        return cls(
            planned("KV"),
            planned("compute"),
            planned("audio", "vision"),
            max(before, default=0),
            loaded_s,
            starts.get("prefill", loaded_s),
            media_s,
        )

    def parts(self, sample: Row) -> dict[str, int]:
        seconds, left = sample["seconds"], sample["anon_bytes"]
        encoders = min(self.encoder_bytes, max(0, left - self.before_encoders_bytes))
        wanted = {
            "KV cache": self.kv_bytes if seconds >= self.loaded_s else 0,
            "compute": self.compute_bytes if seconds >= max(self.loaded_s, self.prefill_s) else 0,
            "encoders": encoders if seconds >= max(self.loaded_s, self.media_s) else 0,
        }
        found = {}
        for name, n_bytes in wanted.items():
            found[name] = min(n_bytes, left)
            left -= found[name]
        return {_PROGRAM: left, **found}


def _timeline(timeline: Sequence[Row]) -> Figure:
    head, samples = timeline[0], timeline[1:]
    starts: dict[str, float] = {}
    for name, at in head["phases"]:
        starts.setdefault(name, at)  # of each phase, the first time
    anonymous = _Anonymous.of(head["items"], starts, samples)
    bands: dict[str, list[float]] = {name: [] for name in _TIMELINE}
    for sample in samples:
        parts = anonymous.parts(sample) | {
            "file, hot": sample["file_bytes"] - sample["cold_bytes"],
            "file, cold": sample["cold_bytes"],
        }
        for name, values in bands.items():
            values.append(parts[name] / MiB)
    shown = {name: values for name, values in bands.items() if any(values)}
    figure, axes = _figure()
    x = [sample["seconds"] for sample in samples]
    colours = [_TIMELINE[name] for name in shown]
    axes.stackplot(x, *shown.values(), labels=list(shown), colors=colours, alpha=0.9)
    peak = max(sum(values) for values in zip(*shown.values(), strict=True))
    _draw_limit(axes, x[-1], peak, head["budget_bytes"] / MiB)
    _draw_phases(axes, x[-1], starts)
    axes.set_xlabel("seconds")
    axes.set_ylabel("MiB")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _draw_limit(axes: Axes, end_s: float, peak: float, limit: float) -> None:
    """The limit in MiB as a line, or in words where it is far above."""
    near = limit < 2 * peak
    axes.set_ylim(0, 1.25 * max(peak, limit if near else 0))
    top = axes.get_ylim()[1]
    if 0 < limit < top:
        axes.axhline(limit, color=INK, linestyle="--", linewidth=1.2)
        axes.annotate("limit", (end_s, limit), ha="right", va="bottom", fontsize=8)
    elif limit:
        words = f"limit {limit:.0f} MiB, far above"
        axes.annotate(words, (end_s, top), ha="right", va="top", fontsize=8)


def _draw_phases(axes: Axes, end_s: float, starts: dict[str, float]) -> None:
    """A line at each phase's beginning. One that begins under the label before it shares that
    label.
    """
    letter_s = 0.013 * end_s  # the width of a letter on this axis
    labels: list[tuple[float, str]] = []
    for name, at in sorted(starts.items(), key=lambda item: item[1]):
        if name in ("start", "exit"):
            continue
        axes.axvline(at, color=INK, linewidth=0.5)
        if labels and at - labels[-1][0] < letter_s * len(labels[-1][1]):
            labels[-1] = (labels[-1][0], f"{labels[-1][1]}, {name}")
        else:
            labels.append((at, name))
    top = axes.get_ylim()[1]
    for at, names in labels:
        axes.annotate(
            names,
            (at, top),
            xytext=(0, 2),
            textcoords="offset points",
            fontsize=7,
            va="bottom",
            ha="left",
        )


# --- lines and bars ---


def _lines(
    section: Section,
    x: str,
    y: str,
    series: Callable[[Row], str],
    labels: tuple[str, str],
    log: bool = False,
) -> Figure:
    figure, axes = _figure()
    names = list(dict.fromkeys(series(row) for row in section.rows))
    for colour, name in zip(cycle(COLOURS), names, strict=False):
        rows = [row for row in section.rows if series(row) == name and row.get(y) is not None]
        axes.errorbar(
            [row[x] for row in rows],
            [row[y] for row in rows],
            yerr=[row[y] * row.get(f"{y}_spread", 0.0) for row in rows],
            marker="o",
            markersize=3,
            capsize=2,
            color=colour,
            label=name,
        )
    if log:
        axes.set_xscale("log", base=2)
        ticks = sorted({row[x] for row in section.rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    figure.legend(loc="outside lower center", ncols=2)
    return figure


SPEED_PICTURES = {
    "decode_tok_s": ("decode", "Tokens written per second behind a prompt of that length."),
    "prefill_tok_s": ("prefill", "Prompt tokens read per second."),
    "ttft_s": ("ttft", "Time to the first token."),
}


def _speed(section: Section) -> Drawn:
    def series(row: Row) -> str:
        return f"{row['model']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"

    for field, (name, caption) in SPEED_PICTURES.items():
        unit = "seconds" if field == "ttft_s" else f"{name} tok/s"
        figure = _lines(section, "depth", field, series, ("prompt tokens", unit), log=True)
        yield name, caption, figure


def _latency(section: Section) -> Drawn:
    def series(row: Row) -> str:
        parts = [row["model"]]
        if row["mode"] not in ("speech", "text"):
            parts.append(row["mode"])
        if row["padding"]:
            parts.append("padded")
        return ", ".join(parts)

    spoken = any(row["mode"] != "text" for row in section.rows)
    across = "seconds of speech" if spoken else "tokens of conversation before"
    figure = _lines(section, "amount", "first_token_s", series, (across, "seconds"))
    yield "latency", "From the end of the input to the first token.", figure


def _quality(section: Section) -> Drawn:
    figure, axes = _figure()
    for colour, row in zip(cycle(COLOURS), section.rows, strict=False):
        at = (row["size_bytes"] / MiB, row["kld_mean"])
        axes.plot(*at, marker="o", color=colour, linestyle="none")
        axes.annotate(row["model"], at, xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("MiB on disk")
    axes.set_ylabel("mean KL divergence")
    axes.margins(x=0.2, y=0.2)
    yield "quality", "Further down is closer to the reference, further left is smaller.", figure


def _compare(section: Section) -> Drawn:
    systems = [row["system"] for row in section.rows]
    names = [
        row["system"] if systems.count(row["system"]) == 1 else f"{row['system']}, {row['file']}"
        for row in section.rows
    ]
    for field, label, unit in (
        ("decode_tok_s", "decode tok/s", 1),
        ("prefill_tok_s", "prefill tok/s", 1),
        ("peak_pss_bytes", "peak PSS, MiB", MiB),
    ):
        yield f"compare-{field}", label, _bars(section.rows, names, field, label, unit)


def _bars(rows: Sequence[Row], names: Sequence[str], field: str, label: str, unit: float) -> Figure:
    figure, axes = _figure(6.4, 1.0 + 0.4 * len(rows))
    for y, (colour, row) in enumerate(zip(cycle(COLOURS), rows, strict=False)):
        value, spread = (row[field] or 0) / unit, row.get(f"{field}_spread", 0.0)
        axes.barh(y, value, color=colour, height=0.6, xerr=value * spread, ecolor=INK)
        axes.annotate(
            f"{value:.0f}",
            (value * (1 + spread), y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    return figure
