"""Which model suits a machine: the published ones and what is installed, planned and ranked."""

from __future__ import annotations

from collections.abc import Sequence

from edge_gemma.bundles.folder import Bundle
from edge_gemma.engines.llama.weights import repacked_here
from edge_gemma.machine.bandwidth import decode_bytes_per_second
from edge_gemma.machine.device import Device
from edge_gemma.machine.probe import find_device
from edge_gemma.machine.repack import repacks_for
from edge_gemma.plan import recommend as ranking
from edge_gemma.plan.recommend import Candidate, Choice, Purpose
from edge_gemma.plan.records import Level, PlanRequest
from edge_gemma.store.installed import ls


def recommend(
    device: str | Device = "auto",
    purpose: Purpose = "text",
    *,
    languages: Sequence[str] = (),
    level: Level = "balanced",
    request: PlanRequest = PlanRequest(),
) -> tuple[list[Choice], list[Choice]]:
    """(what fits, best first; what does not, the smallest first), out of real plans.

    ``device``: this machine ("auto", whose memory bandwidth is measured in a tenth of a second) or
    a profile. ``languages``: codes of those that the model must write and read (``en``, ``sl``,
    ``code``); published models are then planned with their vocabulary cut to them (docs/trim.md).
    Nothing is loaded or downloaded. Raises UsageError.

    >>> fitting, _ = recommend("pi-4-2gb", "text", level="efficiency")
    >>> fitting[0].candidate.title
    'Gemma 3 270M'
    """
    found = find_device(device) if isinstance(device, str) else device
    is_here = device == "auto"
    speed = None if found.decode_gb_s is None else found.decode_gb_s * 1e9
    return ranking.recommend(
        [*_installed(purpose, languages), *ranking.candidates(purpose, languages)],
        found,
        repacked_here if is_here else repacks_for(found),
        purpose=purpose,
        level=level,
        request=request,
        bytes_per_second=decode_bytes_per_second(found) if is_here else speed,
    )


def _installed(purpose: Purpose, languages: Sequence[str]) -> list[Candidate]:
    """What lies here and can do it; a bundle cut to other languages cannot."""
    rows = []
    for entry in ls():
        if not entry.problem:
            manifest = Bundle.open(entry.folder).manifest
            rows.append(ranking.installed(entry.name, manifest, purpose))
    speaks = set(languages).issubset
    return [row for row in rows if row and (not row.languages or speaks(row.languages))]
