"""Text that falls apart because a bundle's vocabulary was cut to other languages."""

from __future__ import annotations

from collections.abc import Sequence

from edge_gemma.bundles.manifest import VocabularyPart


def cut_vocabulary_note(
    part: VocabularyPart | None, text: str, pieces: Sequence[bytes]
) -> str | None:
    """A sentence for people where ``pieces``, the tokens of ``text``, are mostly single letters or
    bytes of them; None where they are not, or nothing was cut (``part`` is None).
    """
    if part is None:
        return None
    letters = sum(map(str.isalpha, text))
    n_single = sum(map(_is_letter, pieces))
    if n_single < 8 or 2 * n_single < letters:
        return None
    kept = ", ".join([*part.languages, *part.texts]) or "some of its tokens"
    return (
        f"this bundle was cut to {kept}: the text falls apart into {len(pieces)} tokens for "
        f"{len(text)} characters, which the model reads slowly and badly; use a whole bundle"
    )


def _is_letter(piece: bytes) -> bool:
    if len(piece) == 1:
        return piece[0] >= 0x80 or piece.isalpha()
    text = piece.decode("utf-8", "replace")
    return len(text) == 1 and text.isalpha()
