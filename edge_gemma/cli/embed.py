"""embed: texts → vectors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.answering import load_model
from edge_gemma.cli.common import BundleArg, JsonOption, note, open_bundle, print_json
from edge_gemma.cli.options import LOADING, LoadingOptions, grouped

if TYPE_CHECKING:
    import numpy as np


def register(app: typer.Typer) -> None:
    app.command("embed")(grouped(embed))


def embed(
    bundle: BundleArg,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT…", help="The texts; none: each line of stdin is one."),
    ] = None,
    query: Annotated[
        bool, typer.Option("--query", help="The texts are questions: the query prompt goes first.")
    ] = False,
    document: Annotated[
        bool,
        typer.Option("--document", help="The texts are searched: the document prompt goes first."),
    ] = False,
    kind: Annotated[
        str | None,
        typer.Option("--kind", help="Another of the bundle's prompts by name (`inspect --json`)."),
    ] = None,
    dimensions: Annotated[
        int | None,
        typer.Option(
            "--dimensions", help="Cut the vectors to this many numbers: 768, 512, 256 or 128."
        ),
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut a text that is too long, instead of an error.")
    ] = False,
    npy: Annotated[
        Path | None,
        typer.Option("--npy", help="Write the vectors to this file, [texts, numbers] float32."),
    ] = None,
    loading: LoadingOptions = LOADING,
    as_json: JsonOption = False,
) -> None:
    """Turn texts into vectors.

    For bundles of EmbeddingGemma; each text gives one line of numbers.
    """
    from edge_gemma.bundles.manifest import require_embedding

    require_embedding(open_bundle(bundle).manifest)
    name = _prompt_name(query, document, kind)
    given = _texts(texts)
    model, _ = load_model(bundle, loading)
    with model:
        vectors = model.embed(given, kind=name, dimensions=dimensions, truncate=truncate)
    if npy is not None:
        _save(npy, vectors)
        note(f"{npy}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers")
    if as_json:
        record = {"texts": len(given), "dimensions": vectors.shape[1], "prompt": name}
        print_json({**record, "vectors": vectors.tolist() if npy is None else str(npy)})
    elif npy is None:
        for vector in vectors:
            print(" ".join(f"{value:.7g}" for value in vector))


def _prompt_name(query: bool, document: bool, kind: str | None) -> str | None:
    from edge_gemma.errors import UsageError

    named = [name for name, on in (("query", query), ("document", document)) if on]
    if kind is not None:
        named.append(kind)
    if len(named) > 1:
        raise UsageError("give one of --query, --document and --kind")
    return named[0] if named else None


def _texts(given: list[str] | None) -> list[str]:
    """The texts as given, or the lines of stdin. Raises UsageError where there are none."""
    from edge_gemma.errors import UsageError

    if not given:
        if sys.stdin.isatty():
            raise UsageError("no text: give one, or pipe lines in")
        given = sys.stdin.buffer.read().decode("utf-8", "replace").splitlines()
    if not given:
        raise UsageError("there is no text to embed")
    return given


def _save(path: Path, vectors: np.ndarray) -> None:
    import numpy as np

    from edge_gemma.files import written_whole

    with written_whole(path) as file:
        np.save(file, vectors)
