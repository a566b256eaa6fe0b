"""How much one request may bring, and how long it may take to come."""

from __future__ import annotations

from dataclasses import dataclass

from edge_gemma.units import MiB


@dataclass(frozen=True)
class Limits:
    """How much one request may bring; None of ``output_tokens`` and ``context_tokens``: what the
    context holds.
    """

    body_bytes: int = 32 * MiB
    messages: int = 1000
    pixels: int = 25_000_000  # of one picture
    audio_s: float = 3600.0  # of a file to transcribe
    context_tokens: int | None = None  # prompt and answer together
    output_tokens: int | None = None
    header_s: float = 10.0  # for the whole header, from its first byte or the connection on
    body_s: float = 300.0  # for the whole body
    wait_s: float = 60.0  # for the next piece of a body, or for a reader that takes nothing
    allow_pull: bool = False  # /api/pull may download
