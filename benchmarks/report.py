"""Sections → one HTML page that needs no network, and the same pictures as PNG and the figures as
JSON.

In: sections and a description of the machine. Out: files. Without matplotlib the tables and the
JSON are written all the same. What it does not know: how anything was measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edge_gemma.benchmarks.regress import Machine, to_json
from edge_gemma.benchmarks.sections import Section

TEMPLATE = Path(__file__).with_name("report.html.j2")
NO_PICTURES = (
    "matplotlib is not installed, so there are no pictures: pip install 'edge-gemma[plots]'"
)
BAD = ("does not fit", "no: ", "killed", "failed", "worse")
GOOD = ("fits (", "better")
Pictures = dict[str, list[tuple[str, str]]]  # kind of section → (SVG, caption)


def write_report(
    path: Path,
    sections: Sequence[Section],
    machine: Machine,
    notes: Sequence[str] = (),
    *,
    png: bool = True,
) -> list[Path]:
    """Write ``path`` (HTML), a JSON file beside it and, with matplotlib, a PNG of each picture.
    Returns what was written.
    """
    figures = path.with_suffix(".json")
    written = [path, figures]
    pictures: Pictures = {}
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        notes = [*notes, NO_PICTURES]
    else:
        from edge_gemma.benchmarks import pictures as drawing

        for section in sections:
            for name, caption, figure in drawing.draw(section):
                drawn = (drawing.svg(figure), caption)
                pictures.setdefault(section.kind, []).append(drawn)
                if png:
                    target = path.with_name(f"{path.stem}-{name}.png")
                    drawing.write_png(figure, target)
                    written.append(target)
    path.write_text(page(sections, machine["text"], notes, pictures), encoding="utf-8")
    figures.write_text(json.dumps(to_json(sections, machine), indent=1), encoding="utf-8")
    return written


def page(
    sections: Sequence[Section], machine: str, notes: Sequence[str], pictures: Pictures
) -> str:
    """The HTML. Every text is escaped; only the pictures, which are ours, go in as they are."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["tone"] = tone
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    drawn = {section.kind: pictures.get(section.kind, []) for section in sections}
    return template.render(sections=sections, machine=machine, notes=notes, pictures=drawn)


def tone(cell: str) -> str:
    """The attribute that colours a verdict; nothing for other cells."""
    from markupsafe import Markup

    if cell.startswith(BAD):
        return Markup(' class="no"')
    return Markup(' class="yes"') if cell == "fits" or cell.startswith(GOOD) else ""
