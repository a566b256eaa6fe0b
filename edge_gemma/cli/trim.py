"""`trim`: a bundle's vocabulary cut to the languages somebody speaks; its options for `convert`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import (
    BundleArg,
    ForceOption,
    JsonOption,
    Progress,
    ThreadsOption,
    note,
    open_bundle,
    print_json,
    table,
)
from edge_gemma.errors import UsageError
from edge_gemma.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edge_gemma.bundles.folder import Bundle
    from edge_gemma.bundles.manifest import VocabularyPart
    from edge_gemma.convert.trim.choice import Wanted
    from edge_gemma.convert.trim.conversion import Trimmed

_PANEL = "Vocabulary"
LanguagesOption = Annotated[
    str | None,
    typer.Option(
        "--languages",
        help="The vocabulary is cut to these languages: en,sl,code (code: program text); all: only "
        "the unused tokens go, which changes no answer.",
        rich_help_panel=_PANEL,
    ),
]
VocabularyOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--vocabulary",
        metavar="FILE",
        help="Keep what this text or list of words is made of. May be repeated.",
        rich_help_panel=_PANEL,
    ),
]
KeepTokensOption = Annotated[
    int,
    typer.Option(
        "--keep-tokens",
        help="Keep at most so many tokens, the most used first; 0: all that are used.",
        rich_help_panel=_PANEL,
    ),
]
MinCountOption = Annotated[
    int,
    typer.Option(
        "--min-count",
        help="Leave out tokens that the files of --vocabulary use less often.",
        rich_help_panel=_PANEL,
    ),
]


def register(app: typer.Typer) -> None:
    app.command("trim")(trim)


def wanted_tokens(
    languages: str | None,
    vocabulary: list[Path] | None,
    keep_tokens: int,
    min_count: int,
    *,
    offer_sizes: bool = False,
) -> Wanted | None:
    """What the options ask for; None when none was given."""
    from edge_gemma.convert.trim.choice import Wanted

    if languages is None and not vocabulary and not keep_tokens and min_count == 1:
        return None
    codes = tuple(part for part in (languages or "").split(",") if part.strip())
    if languages is not None and not codes:
        raise UsageError(f"--languages {languages!r} names none; expected codes like en,sl, or all")
    return Wanted(codes, tuple(vocabulary or ()), keep_tokens, min_count, offer_sizes)


def trim(
    bundle: BundleArg,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The bundle's folder, to be made.")],
    languages: LanguagesOption = None,
    vocabulary: VocabularyOption = None,
    keep_tokens: KeepTokensOption = 0,
    min_count: MinCountOption = 1,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="Run both models on short texts: bits per character, and that the logits of what "
            "stays are the same to the bit.",
        ),
    ] = True,
    threads: ThreadsOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Cut a bundle's vocabulary to the languages you speak.

    The table of tokens is the largest there is, and read whole for every token of an answer. No
    weight is changed: what stays is answered exactly as before. BUNDLE may be a GGUF. Without
    options only the unused tokens go.
    """
    from edge_gemma.convert.trim.choice import UNUSED_ONLY
    from edge_gemma.convert.trim.cut import Report, imported
    from edge_gemma.convert.trim.cut import trim as run

    wanted = wanted_tokens(languages, vocabulary, keep_tokens, min_count) or UNUSED_ONLY
    with Progress() as progress, ExitStack() as opened:
        report = Report(progress.total, progress.add_bytes, progress.stage, progress.note)
        if bundle.endswith(".gguf"):
            whole = opened.enter_context(
                imported(Path(bundle), out, overwrite=force, report=report)
            )
        else:
            whole = open_bundle(bundle)
        result = run(
            whole,
            out,
            wanted,
            overwrite=force,
            measure=measure,
            n_threads=threads or 0,
            report=report,
        )
    part = result.bundle.manifest.vocabulary
    assert part is not None
    n_tokens = result.bundle.manifest.decoder.n_vocab
    if as_json:
        print_json(
            {
                "bundle": result.bundle.folder,
                "bytes": result.bundle.total_bytes(),
                "bytes_before": result.bytes_before,
                "tokens": n_tokens,
                "tokens_before": part.n_whole,
                "languages": part.languages,
                "seconds": round(result.seconds, 2),
                "receipt": part.receipt,
                "notes": result.notes,
            }
        )
        return
    print(receipt_table(part))
    for line in cost_lines(part):
        note(line)
    before, after = result.bytes_before, result.bundle.total_bytes()
    print(
        f"{result.bundle.folder}: {n_tokens:,} of {part.n_whole:,} tokens, {format_bytes(after)} "
        f"of {format_bytes(before)} in {result.seconds:.0f} s"
    )


_COLUMNS = (
    ("tokens_per_character_before", "tokens/char"),
    ("tokens_per_character_after", "now"),
    ("identical", "identical"),
    ("bits_per_character_before", "bits/char"),
    ("bits_per_character_after", "now"),
    ("kl", "KL"),
)


def receipt_table(part: VocabularyPart) -> str:
    """The receipt of what was kept, a row a language."""
    shown = [name for name in part.receipt if is_kept(part, name)]
    rows = [("text", *(title for _, title in _COLUMNS))]
    rows += [(name, *_cells(part.receipt[name])) for name in shown]
    return table(rows, right=range(1, len(_COLUMNS) + 1))


def _cells(figures: Mapping[str, float]) -> list[str]:
    cells = []
    for key, _ in _COLUMNS:
        value = figures.get(key)
        if value is None:
            cells.append("–")
        else:
            cells.append(f"{value:.1%}" if key == "identical" else f"{value:.4f}")
    return cells


def is_kept(part: VocabularyPart, language: str) -> bool:
    return language in part.languages or ("bits_per_character_before" in part.receipt[language])


def cost_lines(part: VocabularyPart) -> list[str]:
    """What the languages that were cut away cost now."""
    costs = []
    for name, figures in part.receipt.items():
        before = figures["tokens_per_character_before"]
        ratio = figures["tokens_per_character_after"] / before if before else 1.0
        if not is_kept(part, name) and ratio >= 1.005:
            costs.append(f"{name}: {ratio:.2f}× tokens")
    return [f"what was cut away still reads, at a price: {', '.join(costs)}"] if costs else []


def vocabulary_facts(bundle: Bundle) -> list[tuple[str, str]]:
    """The rows of `inspect` about a vocabulary that was cut."""
    part = bundle.manifest.vocabulary
    if part is None:
        return []
    chosen = [*part.languages, *part.texts]
    kept = f"{bundle.manifest.decoder.n_vocab:,} of {part.n_whole:,} tokens"
    rows = [("vocabulary", f"{kept}, cut to {', '.join(chosen) or 'what is used at all'}")]
    for name in part.receipt:
        if is_kept(part, name):
            cells = zip((title for _, title in _COLUMNS), _cells(part.receipt[name]), strict=True)
            rows.append((f"  {name}", ", ".join(f"{title} {cell}" for title, cell in cells)))
    return rows + [("", line) for line in cost_lines(part)]


def print_sizes(trimmed: Trimmed) -> None:
    """Sizes to choose from: what is covered, what the decoder takes, how much faster it reads."""
    _, whole_read = trimmed.bytes_of(trimmed.n_whole)
    rows = [("tokens", "covered", "decoder", "read per token", "")]
    for n_tokens, coverage in trimmed.offers():
        n_bytes, read = trimmed.bytes_of(n_tokens)
        faster = f"about {whole_read / read:.2f}× as fast" if read < whole_read else ""
        rows.append(
            (
                f"{n_tokens:,}",
                f"{coverage:.2%}",
                format_bytes(n_bytes),
                format_bytes(read),
                faster,
            )
        )
    print("vocabulary (choose another size with --keep-tokens)")
    for line in table(rows, right=(0, 1, 2, 3)).splitlines():
        print(f"  {line}")
