"""What quantizing cost, as a section: perplexity and KL divergence of bundles against a reference.

In: a reference, bundles or GGUFs of its vocabulary, a text. Out: a section. The computing is
``convert/quality.py``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_gemma.benchmarks.caps import usable_cpus
from edge_gemma.benchmarks.memory import keeping
from edge_gemma.benchmarks.sections import Progress, Section, silent
from edge_gemma.bundles.folder import Bundle


def quality(
    reference: Path,
    bundles: Sequence[Path],
    text: Path,
    *,
    max_tokens: int = 4096,
    progress: Progress = silent,
) -> Section:
    """Perplexity and KL divergence of bundles against a reference of the same vocabulary, with each
    one's size. GGUF files count as bundles here.
    """
    from edge_gemma.convert.quality import compare as receipts

    section = Section("quality")
    files = {path.stem if path.is_file() else path.name: _decoder(path) for path in bundles}
    with keeping(section):
        found = receipts(
            _decoder(reference),
            files,
            text,
            max_tokens=max_tokens,
            n_threads=len(usable_cpus()),
            progress=lambda done, total: progress(f"chunk {done} of {total}"),
        )
        section.rows = [
            {"model": name, "size_bytes": files[name].stat().st_size, **receipt.table()}
            for name, receipt in found.items()
        ]
        first = section.rows[0]
        itself = first | {
            "model": f"{reference.name} (reference)",
            "size_bytes": _decoder(reference).stat().st_size,
            "ppl": first["ppl_reference"],
            "kld_mean": 0.0,
            "kld_p99": 0.0,
            "top1_agreement": 1.0,
        }
        section.rows.insert(0, itself)
        section.note(f"{first['tokens']} tokens of {text.name}; divergences in nats")
    return section


def _decoder(path: Path) -> Path:
    return path if path.is_file() else Bundle.open(path).decoder_path
