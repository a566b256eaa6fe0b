"""recommend: which model, recipe and context for a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from edge_gemma.cli.common import (
    FOR,
    BudgetOption,
    ContextOption,
    DeviceOption,
    JsonOption,
    LevelOption,
    print_json,
    table,
)
from edge_gemma.cli.trim import LanguagesOption
from edge_gemma.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge_gemma.machine.device import Device
    from edge_gemma.plan.recommend import Candidate, Choice, Purpose
    from edge_gemma.plan.records import Level

SHOWN = 8


def register(app: typer.Typer) -> None:
    app.command()(recommend)


def recommend(
    device: DeviceOption = "auto",
    purpose: Annotated[str, typer.Option("--for", help=FOR)] = "text",
    languages: LanguagesOption = None,
    level: LevelOption = "balanced",
    budget: BudgetOption = None,
    ctx: ContextOption = None,
    show_all: Annotated[bool, typer.Option("--all", help="Every row, not the best few.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say which model suits a machine. Recipe and context too: a ranked table out of real plans,
    with the commands to type. Nothing is downloaded or loaded. Exit code 4 when nothing fits.
    """
    from edge_gemma.machine.probe import find_device
    from edge_gemma.plan.records import PlanRequest
    from edge_gemma.recommendation import recommend as ranked
    from edge_gemma.units import parse_bytes

    found = find_device(device)
    request = PlanRequest(n_ctx=ctx, budget_bytes=None if budget is None else parse_bytes(budget))
    codes = tuple(code.strip().lower() for code in (languages or "").split(",") if code.strip())
    codes = () if codes == ("all",) else codes
    fitting, others = ranked(
        device,
        cast("Purpose", purpose),
        languages=codes,
        level=cast("Level", level),
        request=request,
    )
    if as_json:
        print_json(
            {
                "device": found.name,
                "for": purpose,
                "languages": codes,
                "level": level,
                "fits": [_record(choice) for choice in fitting],
                "does_not_fit": [_record(choice) for choice in others],
            }
        )
    else:
        shown = fitting if show_all else fitting[:SHOWN]
        _print(found, purpose, level, shown, len(fitting), others)
    if not fitting:
        raise typer.Exit(4)


def _print(
    device: Device,
    purpose: str,
    level: str,
    shown: list[Choice],
    n_fitting: int,
    others: list[Choice],
) -> None:
    spend = format_bytes(device.usable_bytes)
    print(f"{device.name}: {device.board}, {spend} for a model; for {purpose}")
    if shown:
        head = ("", "model", "recipe", "context", "memory", "disk", "tok/s", "as fast as")
        rows = [_row(number, choice) for number, choice in enumerate(shown, 1)]
        print(table([head, *rows], right=(0, 3, 4, 5, 6)))
    if n_fitting > len(shown):
        print(f"… and {n_fitting - len(shown)} more that fit: --all")
    if others:
        smallest = others[0]
        needed, title = format_bytes(smallest.plan.needed_bytes), smallest.candidate.title
        print(
            f"{len(others)} do not fit; the smallest of them, {title} {smallest.candidate.recipe}, "
            f"needs {needed}"
        )
    for best in shown[:1]:
        for line in best.plan.concessions:
            print(f"1 concedes: {line}")
        print("\nfor 1:")
        for line in commands(best.candidate, purpose, level):
            print(f"  {line}")
    print("\n" + "\n".join(_notes(device, shown)))


def _notes(device: Device, shown: list[Choice]) -> Iterator[str]:
    if device.name == "auto" or device.decode_gb_s is None:
        how = "memory bandwidth, measured now"
    else:
        how = "what was published of this board"
    if shown and shown[0].tok_s is None:
        yield "tok/s: nothing is known of this board's speed; run recommend on it"
    else:
        yield f"tok/s: about, by the bytes that a token reads and {how}; `bench` measures"
    yield (
        "more capable: more parameters at work for a token; recipes by their measured distance "
        "from the whole weights (docs/convert.md)"
    )


def _row(number: int, choice: Choice) -> tuple[str, ...]:
    candidate, plan = choice.candidate, choice.plan
    return (
        str(number),
        candidate.title + (" (installed)" if candidate.installed else ""),
        " ".join([candidate.recipe, ",".join(candidate.languages)]).strip(),
        str(plan.settings.n_ctx),
        format_bytes(plan.needed_bytes),
        format_bytes(choice.disk_bytes),
        "?" if choice.tok_s is None else f"{choice.tok_s:.{0 if choice.tok_s >= 10 else 1}f}",
        choice.speed_class,
    )


def _record(choice: Choice) -> dict[str, object]:
    candidate, plan = choice.candidate, choice.plan
    return {
        "model": candidate.title,
        "recipe": candidate.recipe,
        "languages": candidate.languages,
        "tokens": candidate.manifest.decoder.n_vocab,
        "installed": candidate.installed,
        "repository": candidate.repository or None,
        "n_ctx": plan.settings.n_ctx,
        "needed_bytes": plan.needed_bytes,
        "budget_bytes": plan.budget_bytes,
        "disk_bytes": choice.disk_bytes,
        "tok_s": choice.tok_s,
        "speed_class": choice.speed_class,
        "concessions": plan.concessions,
    }


def commands(candidate: Candidate, purpose: str, level: str = "balanced") -> list[str]:
    """What to type to get from nothing to an answer."""
    use = {
        "text": "edge-gemma chat {}",
        "voice": "edge-gemma listen {}",
        "pictures": "edge-gemma describe {} PICTURE",
    }[purpose]
    if level != "balanced":
        use += f" --level {level}"
    if candidate.installed:
        return [use.format(candidate.installed)]
    folder = candidate.repository.rpartition("/")[2]
    name = f"{folder.lower()}-{candidate.recipe.replace('_', '-')}"
    towers = {"text": ("audio", "vision"), "voice": ("vision",), "pictures": ("audio",)}[purpose]
    has = {"audio": "3n" in folder, "vision": "3n" in folder or "4b" in folder}
    without = "".join(f" --{tower}-encoder none" for tower in towers if has[tower])
    cut = ""
    if candidate.languages:
        cut = f" --languages {','.join(candidate.languages)}"
        name += "-" + "-".join(candidate.languages)
    return [
        f"hf download {candidate.repository} --local-dir {folder}",
        f"edge-gemma convert {folder} {name} --quant {candidate.recipe}{without}{cut}",
        use.format(name),
    ]
