"""Languages that people speak, as requests name them and as instructions do."""

from __future__ import annotations

import re

from edge_gemma.serve.refusals import Refusal

_LANGUAGE = re.compile(r"[A-Za-z][A-Za-z ()-]{1,30}")
# ISO 639-1 → the name that an instruction uses
LANGUAGES = {
    "ar": "Arabic",
    "bg": "Bulgarian",
    "bn": "Bengali",
    "ca": "Catalan",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "fa": "Persian",
    "fi": "Finnish",
    "fr": "French",
    "he": "Hebrew",
    "hi": "Hindi",
    "hr": "Croatian",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "nl": "Dutch",
    "no": "Norwegian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sk": "Slovak",
    "sl": "Slovenian",
    "sr": "Serbian",
    "sv": "Swedish",
    "ta": "Tamil",
    "te": "Telugu",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "zh": "Chinese",
}


def language_name(text: str) -> str | None:
    """A code like de or de-AT, or a name, as the instruction says it; None for an empty text.
    Raises Refusal.

    >>> language_name("de-AT"), language_name("Swiss German"), language_name("")
    ('German', 'Swiss German', None)
    """
    if not text:
        return None
    code = text.lower().replace("_", "-").partition("-")[0]
    if code in LANGUAGES:
        return LANGUAGES[code]
    if len(code) <= 3 or not _LANGUAGE.fullmatch(text):
        raise Refusal(
            400, f"language is {text[:20]!r}; expected a code like en, or a name", param="language"
        )
    return text
