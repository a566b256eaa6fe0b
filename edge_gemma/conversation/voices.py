"""Voices by their names: espeak-ng's, a piper file, or a Kokoro file and one of its voices.

In: what ``--voice`` names, one or several (``en,de``). Out: a synthesizer for each language.
"""

from __future__ import annotations

from pathlib import Path

from edge_gemma.conversation.voice import Synthesizer, espeak, kokoro, piper
from edge_gemma.errors import UsageError

SILENT = "none"


def synthesizers(voices: str) -> dict[str, Synthesizer]:
    """Language → what speaks it; the first language is the usual one. Raises UsageError,
    MissingExtra.
    """
    languages = voice_languages(voices)
    return dict(zip(languages, map(_synthesizer, voices.split(",")), strict=True))


def _synthesizer(voice: str) -> Synthesizer:
    file, colon, name = voice.partition(".onnx")
    if not colon:
        return espeak(voice)
    if name.startswith(":"):
        folder = Path(file).parent
        voices = sorted(folder.glob("voices*.bin"))
        return kokoro(f"{file}.onnx", voices[-1] if voices else folder / "voices.bin", name[1:])
    return piper(voice)


def voice_languages(voices: str) -> tuple[str, ...]:
    """What is spoken: its units, its yes and no; () without a voice. Raises UsageError for two
    voices of one language.

    >>> voice_languages("none"), voice_languages("de,x/nl_BE-nathalie-x_low.onnx")
    ((), ('de', 'nl'))
    """
    if voices == SILENT:
        return ()
    found = tuple(map(_language, voices.split(",")))
    if len({language.partition("-")[0] for language in found}) < len(found):
        raise UsageError(f"{voices} has two voices of one language; give one for each")
    return found


def _language(voice: str) -> str:
    if voice in ("", SILENT):
        raise UsageError(f"a voice is {voice!r} among others; give one voice for each language")
    _, colon, name = voice.partition(".onnx")
    if not colon:
        return voice
    if name.startswith(":"):
        return "en"
    # piper's files are named LANGUAGE_COUNTRY-NAME-QUALITY.onnx
    return Path(voice).name.partition("_")[0]
