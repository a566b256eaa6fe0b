"""Languages that people speak, as requests name them and as instructions do."""

from __future__ import annotations

import re

from edge_gemma.languages import NAMES
from edge_gemma.serve.refusals import Refusal

_LANGUAGE = re.compile(r"[A-Za-z][A-Za-z ()-]{1,30}")


def language_name(text: str) -> str | None:
    """A code like de or de-AT, or a name, as the instruction says it; None for an empty text.
    Raises Refusal.

    >>> language_name("de-AT"), language_name("Swiss German"), language_name("")
    ('German', 'Swiss German', None)
    """
    if not text:
        return None
    code = text.lower().replace("_", "-").partition("-")[0]
    if code in NAMES:
        return NAMES[code]
    if len(code) <= 3 or not _LANGUAGE.fullmatch(text):
        raise Refusal(
            400, f"language is {text[:20]!r}; expected a code like en, or a name", param="language"
        )
    return text
