"""Which echo canceller: the sound server's, the one here, or none.

In: what ``--echo-cancel`` says. Out: :class:`EchoChoice`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_gemma.errors import MissingExtra, UsageError
from edge_gemma.hearing import sound_server
from edge_gemma.hearing.echo import EchoCanceller


@dataclass(frozen=True)
class EchoChoice:
    """What --echo-cancel came to. ``half_duplex``: nothing hears while an answer is spoken."""

    canceller: EchoCanceller | None = None
    half_duplex: bool = False

    @classmethod
    def of(cls, wanted: str, *, speaks: bool, note: Callable[[str], object]) -> EchoChoice:
        """Choose; ``note`` is told what was chosen. Raises UsageError, MissingExtra."""
        if wanted not in ("auto", "off", "aec", "system"):
            raise UsageError(f"--echo-cancel is {wanted!r}; expected auto, off, aec or system")
        if wanted == "off" or (wanted == "auto" and not speaks):
            return cls()
        server = sound_server.sound_server() if wanted == "auto" else None
        if wanted == "system" or (server and server.echo_cancelled):
            pair = sound_server.require()
            sound_server.use(pair)
            note(f"echo: cancelled by the sound server ({pair.source})")
            return cls()
        try:
            canceller = EchoCanceller()
        except MissingExtra as error:
            if wanted == "aec":
                raise
            note(f"echo: {error}. Until then nothing is heard while an answer is spoken")
            return cls(half_duplex=True)
        note(
            "echo: cancelled here; barge-in works once it knows the room, after some 4 s of speech"
        )
        return cls(canceller)
