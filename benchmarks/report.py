"""Sections → one HTML page that needs no network, and the same pictures as PNG and the figures as
JSON.

In: sections and a description of the machine. Out: files. Plots are matplotlib's SVG, inlined, in
colours that read on a light and on a dark page (the page's own text colour is used for axes and
words). Without matplotlib the tables and the JSON are written all the same. What it does not know:
how anything was measured.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edge_gemma.benchmarks.bench import Section
from edge_gemma.benchmarks.regress import to_json

from edge_gemma.units import MiB

# Okabe and Ito's colours: told apart by everybody, on white and on near-black
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#888888"]
INK = "#7f7f80"  # stands for the page's text colour; replaced by currentColor in the SVG

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d1d1f;--soft:#6b6b70;--line:#d9d9de;--card:#f6f6f8;--bad:#b3261e;--good:#1b7a3d}
@media(prefers-color-scheme:dark){:root{--paper:#141416;--ink:#ececf0;--soft:#a2a2aa;--line:#37373d;--card:#1d1d21;--bad:#ff8a80;--good:#7ddc9a}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:72rem;margin:0 auto;padding:1.5rem 1rem 4rem}h1{font-size:1.6rem;margin:.2rem 0}h2{font-size:1.25rem;margin:2.5rem 0 .6rem}
p,li{color:var(--soft)}.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{background:var(--card);position:sticky;top:0}td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}
tr:last-child td{border-bottom:0}.no{color:var(--bad)}.yes{color:var(--good)}figure{margin:1.2rem 0;background:var(--card);border-radius:.5rem;padding:.6rem}
figure svg{width:100%;height:auto;color:var(--ink);display:block}figcaption{font-size:.85rem;color:var(--soft);padding:.2rem .3rem}
.plots{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}.plots figure{margin:0}
"""


def write_report(
    path: Path,
    sections: Sequence[Section],
    machine: dict,
    notes: Sequence[str] = (),
    *,
    png: bool = True,
) -> list[Path]:
    """Write ``path`` (HTML), a JSON file beside it and, with matplotlib, a PNG of each picture.
    Returns what was written.
    """
    written = [path, path.with_suffix(".json")]
    pictures: dict[str, list[tuple[str, str]]] = {}
    try:
        import matplotlib
    except ImportError:
        notes = [
            *notes,
            "matplotlib is not installed, so there are no pictures: pip install "
            "'edge-gemma[plots]'",
        ]
    else:
        with matplotlib.rc_context(_RC):
            for section in sections:
                for name, caption, figure in draw(section):
                    pictures.setdefault(section.kind, []).append((_svg(figure), caption))
                    if png:
                        target = path.with_name(f"{path.stem}-{name}.png")
                        _png(figure, target)
                        written.append(target)
    path.write_text(_page(sections, machine, notes, pictures), encoding="utf-8")
    written[1].write_text(json.dumps(to_json(sections, machine), indent=1), encoding="utf-8")
    return written


# --- page ----------------------------------------------------------------------------------------------------------


def _page(sections: Sequence[Section], machine: dict, notes: Sequence[str], pictures: dict) -> str:
    body = [f"<h1>edge-gemma: measured</h1><p>{html.escape(machine['text'])}</p>"]
    body += [f"<p>{html.escape(note)}</p>" for note in notes]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.kind in pictures:
            body.append(
                '<div class="plots">'
                + "".join(
                    f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
                    for svg, caption in pictures[section.kind]
                )
                + "</div>"
            )
        body += [
            _table(rows) for rows in (section.overview, [section.head, *section.cells]) if rows
        ]
        body.append(
            "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in section.notes) + "</ul>"
            if section.notes
            else ""
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1">'
        "<title>edge-gemma: "
        f"measured</title><style>{_STYLE}</style><main>{''.join(body)}</main></html>\n"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += [
        "<tr>" + "".join(f"<td{_tone(cell)}>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells in rest
    ]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _tone(cell: str) -> str:
    if cell.startswith(("does not fit", "no: ", "killed", "failed", "worse")):
        return ' class="no"'
    return ' class="yes"' if cell == "fits" or cell.startswith(("fits (", "better")) else ""


# --- pictures ------------------------------------------------------------------------------------------------------

_RC = {
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


def _figure(width: float = 6.4, height: float = 3.6):
    from matplotlib.figure import Figure  # no pyplot: no backend, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # several figures share one page: ids must differ
    salt = f"f{abs(hash(text)) % 10**8}-"
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{salt}", text)


def _png(figure, path: Path) -> None:
    figure.patch.set_facecolor("white")
    figure.savefig(path, dpi=150, transparent=False, facecolor="white")


def draw(section: Section) -> Iterator[tuple[str, str, object]]:
    """(file name part, caption, matplotlib figure) of every picture a section has."""
    drawers: dict[str, Callable[[Section], Iterator]] = {
        "memory": _memory,
        "speed": _speed,
        "latency": _latency,
        "quality": _quality,
        "compare": _compare,
    }
    if section.rows and section.kind in drawers:
        yield from drawers[section.kind](section)


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


def _group(name: str) -> str:
    return next(group for start, group in _GROUPS if name.startswith(start))


def _memory(section: Section) -> Iterator[tuple[str, str, object]]:
    from matplotlib.patches import Patch

    models = list(dict.fromkeys(row["model"] for row in section.rows))
    groups = list(dict.fromkeys(group for _, group in _GROUPS))
    for n, model in enumerate(models):
        rows = [row for row in section.rows if row["model"] == model]
        figure, axes = _figure(6.4, 1.6 + 0.3 * len(rows))
        shown: dict[str, str] = {}
        for y, row in enumerate(rows):
            phase = max(
                ("prefill", "decode", "listen", "look"),
                key=lambda p: sum(
                    b
                    for _, b, kind, phases in row["items"]
                    if p in phases and kind != "reclaimable"
                ),
            )
            left = 0.0
            for colour, group in zip(COLOURS, groups):
                width = (
                    sum(
                        b
                        for name, b, kind, phases in row["items"]
                        if phase in phases and kind != "reclaimable" and _group(name) == group
                    )
                    / MiB
                )
                axes.barh(
                    y, width, left=left, color=colour, height=0.6, alpha=1 if row["fits"] else 0.35
                )
                shown |= {group: colour} if width else {}
                left += width
            axes.plot([row["usable_bytes"] / MiB] * 2, [y - 0.42, y + 0.42], color=INK, linewidth=2)
            if "peak_pss_bytes" in row:
                axes.plot(
                    row["peak_pss_bytes"] / MiB,
                    y,
                    marker="D",
                    markersize=4,
                    color=INK,
                    linestyle="none",
                )
        axes.set_yticks(range(len(rows)), [row["device"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(
            0,
            1.25
            * max(
                sum(
                    b
                    for _, b, kind, phases in row["items"]
                    if "decode" in phases and kind != "reclaimable"
                )
                for row in rows
            )
            / MiB,
        )
        axes.set_xlabel("MiB")
        axes.set_title(model, fontsize=10)
        axes.grid(axis="y", visible=False)
        figure.legend(
            handles=[Patch(color=colour, label=group) for group, colour in shown.items()],
            loc="outside lower center",
            ncols=3,
        )
        yield (
            f"footprint-{n}",
            f"{model}: what each board's plan counts at its peak; | what the board has to "
            "spend, ◆ measured here. Pale: does not fit.",
            figure,
        )
    for n, (name, timeline) in enumerate(section.timelines.items()):
        yield f"timeline-{n}", f"{name}: memory over time.", _timeline(timeline)


def _timeline(timeline: list[dict]):
    head, samples = timeline[0], timeline[1:]
    figure, axes = _figure()
    x = [sample["seconds"] for sample in samples]
    starts = dict(
        sorted(
            {name: at for name, at in reversed(head["phases"])}.items(), key=lambda item: item[1]
        )
    )  # of each phase, the first time
    loaded = starts.get("loaded", 0.0)

    def planned(*begins: str) -> float:
        return sum(
            b for name, b, kind, _ in head["items"] if kind == "anon" and name.startswith(begins)
        )

    # the kernel tells anonymous from file-backed; what of the anonymous part is which, the plan
    # knows from the end of load on
    encoders, kv, compute = planned("audio", "vision"), planned("KV"), planned("compute")
    begin = starts.get("listen", starts.get("look", 1e9))
    before = max(
        (sample["anon_bytes"] for sample in samples if loaded <= sample["seconds"] < begin),
        default=0,
    )  # encoders fill up bit by bit from here
    bands: dict[str, list[float]] = {
        name: []
        for name in (
            "anonymous: weights, vocabulary, Python",
            "KV cache",
            "compute",
            "encoders",
            "file, hot",
            "file, cold",
        )
    }
    for sample in samples:
        left, after = sample["anon_bytes"], sample["seconds"] >= loaded
        parts = {}
        for name, size in (
            ("KV cache", kv),
            ("compute", compute if sample["seconds"] >= starts.get("prefill", loaded) else 0),
            ("encoders", min(encoders, max(0, left - before)) if sample["seconds"] >= begin else 0),
        ):
            parts[name] = min(size, left) if after else 0
            left -= parts[name]
        parts |= {
            "anonymous: weights, vocabulary, Python": left,
            "file, hot": sample["file_bytes"] - sample["cold_bytes"],
            "file, cold": sample["cold_bytes"],
        }
        for name, values in bands.items():
            values.append(parts[name] / MiB)
    shown = {name: values for name, values in bands.items() if any(values)}
    axes.stackplot(
        x,
        *shown.values(),
        labels=list(shown),
        colors=[dict(zip(bands, COLOURS))[name] for name in shown],
        alpha=0.9,
    )
    peak, limit = max(sum(values) for values in zip(*shown.values())), head["budget_bytes"] / MiB
    axes.set_ylim(0, 1.25 * max(peak, limit if limit < 2 * peak else 0))
    top = axes.get_ylim()[1]
    if 0 < limit < top:
        axes.axhline(limit, color=INK, linestyle="--", linewidth=1.2)
        axes.annotate("limit", (x[-1], limit), ha="right", va="bottom", fontsize=8)
    elif limit:
        axes.annotate(
            f"limit {limit:.0f} MiB, far above", (x[-1], top), ha="right", va="top", fontsize=8
        )
    begins: list[
        tuple[float, str]
    ] = []  # a phase that begins where the label before it still stands shares that label
    for name, at in starts.items():
        if name not in ("start", "exit"):
            axes.axvline(at, color=INK, linewidth=0.5)
            if begins and at - begins[-1][0] < 0.013 * len(begins[-1][1]) * x[-1]:
                begins[-1] = (begins[-1][0], f"{begins[-1][1]}, {name}")
            else:
                begins.append((at, name))
    for at, names in begins:
        axes.annotate(
            names,
            (at, top),
            xytext=(0, 2),
            textcoords="offset points",
            fontsize=7,
            va="bottom",
            ha="left",
        )
    axes.set_xlabel("seconds")
    axes.set_ylabel("MiB")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _lines(
    section: Section,
    x: str,
    y: str,
    series: Callable[[dict], str],
    xlabel: str,
    ylabel: str,
    log: bool = False,
):
    figure, axes = _figure()
    names = list(dict.fromkeys(series(row) for row in section.rows))
    for colour, name in zip(COLOURS * 9, names):
        rows = [row for row in section.rows if series(row) == name and row.get(y) is not None]
        spread = [row[y] * row.get(f"{y}_spread", 0.0) for row in rows]
        axes.errorbar(
            [row[x] for row in rows],
            [row[y] for row in rows],
            yerr=spread,
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
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _speed(section: Section) -> Iterator[tuple[str, str, object]]:
    def series(row):
        return f"{row['model']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"

    yield (
        "decode",
        "Tokens written per second behind a prompt of that length.",
        _lines(section, "depth", "decode_tok_s", series, "prompt tokens", "decode tok/s", log=True),
    )
    yield (
        "prefill",
        "Prompt tokens read per second.",
        _lines(
            section, "depth", "prefill_tok_s", series, "prompt tokens", "prefill tok/s", log=True
        ),
    )
    yield (
        "ttft",
        "Time to the first token.",
        _lines(section, "depth", "ttft_s", series, "prompt tokens", "seconds", log=True),
    )


def _latency(section: Section) -> Iterator[tuple[str, str, object]]:
    def series(row):
        return row["model"] + (", padded" if row["padding"] else "")

    speech = any(row["mode"] == "speech" for row in section.rows)
    yield (
        "latency",
        "From the end of the input to the first token.",
        _lines(
            section,
            "amount",
            "first_token_s",
            series,
            "seconds of speech" if speech else "tokens of conversation before",
            "seconds",
        ),
    )


def _quality(section: Section) -> Iterator[tuple[str, str, object]]:
    figure, axes = _figure()
    for colour, row in zip(COLOURS * 9, section.rows):
        axes.plot(
            row["size_bytes"] / MiB, row["kld_mean"], marker="o", color=colour, linestyle="none"
        )
        axes.annotate(
            row["model"],
            (row["size_bytes"] / MiB, row["kld_mean"]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xlabel("MiB on disk")
    axes.set_ylabel("mean KL divergence")
    axes.margins(x=0.2, y=0.2)
    yield "quality", "Further down is closer to the reference, further left is smaller.", figure


def _compare(section: Section) -> Iterator[tuple[str, str, object]]:
    systems = [row["system"] for row in section.rows]
    names = [
        row["system"] if systems.count(row["system"]) == 1 else f"{row['system']}, {row['file']}"
        for row in section.rows
    ]
    for key, label, scale in (
        ("decode_tok_s", "decode tok/s", 1),
        ("prefill_tok_s", "prefill tok/s", 1),
        ("peak_pss_bytes", "peak PSS, MiB", MiB),
    ):
        figure, axes = _figure(6.4, 1.0 + 0.4 * len(section.rows))
        for y, (colour, row) in enumerate(zip(COLOURS * 9, section.rows)):
            value = (row[key] or 0) / scale
            axes.barh(
                y,
                value,
                color=colour,
                height=0.6,
                xerr=value * row.get(f"{key}_spread", 0.0),
                ecolor=INK,
            )
            axes.annotate(
                f"{value:.0f}",
                (value * (1 + row.get(f"{key}_spread", 0.0)), y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_yticks(range(len(section.rows)), names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        yield f"compare-{key}", label, figure
