"""What a server tells of itself when a Wyoming client asks: which programs, languages and voices.

In: a server, and what is installed beside it. Out: an ``info`` event that Home Assistant accepts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from wyoming.info import (
    AsrModel,
    AsrProgram,
    Attribution,
    HandleModel,
    HandleProgram,
    Info,
    TtsProgram,
    TtsVoice,
    WakeModel,
    WakeProgram,
)

from edge_gemma.languages import NAMES
from edge_gemma.serve.bodies import Server

PROGRAM = "edge-gemma"
_OURS = Attribution("edge-gemma", "")
_GEMMA = Attribution("Google", "https://ai.google.dev/gemma")
_ESPEAK = Attribution("eSpeak NG", "https://github.com/espeak-ng/espeak-ng")
_WAKE = Attribution("microWakeWord", "https://github.com/kahrendt/microWakeWord")
_ESPEAK_VOICE = re.compile(r"\s*\d+\s+([\w-]+)\s+\S+\s+(\S+)\s")


@dataclass(frozen=True)
class Senses:
    """What this server can do over Wyoming. ``voices``: espeak-ng's by language code → name;
    ``wake_words``: name → phrase. ``endpoint``: it finds the end of an utterance itself.
    """

    hears: bool
    endpoint: bool = False
    voices: Mapping[str, str] = field(default_factory=dict)
    wake_words: Mapping[str, str] = field(default_factory=dict)

    def told(self) -> str:
        """For people.

        >>> Senses(True, wake_words={"alexa": "alexa"}).told()
        'asr, handle, wake (alexa)'
        """
        parts = ["asr"] if self.hears else []
        parts.append("handle")
        if self.voices:
            parts.append(f"tts ({len(self.voices)} voices of espeak-ng)")
        if self.wake_words:
            parts.append(f"wake ({', '.join(self.wake_words)})")
        return ", ".join(parts)


def installed_voices() -> dict[str, str]:
    """espeak-ng's voices, language code → name; none where it is not installed."""
    program = shutil.which("espeak-ng")
    if program is None:
        return {}
    try:
        listed = subprocess.run([program, "--voices"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return {}
    found = (_ESPEAK_VOICE.match(line) for line in listed.stdout.splitlines())
    return {match[1]: match[2].replace("_", " ") for match in found if match}


def installed_wake_words() -> dict[str, str]:
    """The words that pymicro-wakeword ships, name → phrase; none where it is not installed."""
    if importlib.util.find_spec("pymicro_wakeword") is None:
        return {}
    from edge_gemma.hearing.wake_word import shipped

    return {name: name.replace("_", " ") for name in shipped()}


def info(server: Server, senses: Senses) -> Info:
    """The answer to ``describe``."""
    version = importlib.metadata.version("edge-gemma")
    model, languages = server.name, list(NAMES)
    found = Info(handle=[_handle(model, version, languages)])
    if senses.hears:
        found.asr = [_asr(model, version, languages, senses.endpoint)]
    if senses.voices:
        found.tts = [_tts(version, senses.voices)]
    if senses.wake_words:
        found.wake = [_wake(version, senses.wake_words)]
    return found


def _asr(name: str, version: str, languages: list[str], endpoint: bool) -> AsrProgram:
    about = f"{name} writes down what is said"
    return AsrProgram(
        PROGRAM,
        _OURS,
        True,
        about,
        version,
        models=[AsrModel(name, _GEMMA, True, about, version, languages)],
        supports_transcript_streaming=True,
        requires_external_vad=not endpoint,
    )


def _handle(name: str, version: str, languages: list[str]) -> HandleProgram:
    about = f"{name} answers"
    model = HandleModel(name, _GEMMA, True, about, version, languages)
    return HandleProgram(
        PROGRAM, _OURS, True, about, version, models=[model], supports_handled_streaming=True
    )


def _tts(version: str, voices: Mapping[str, str]) -> TtsProgram:
    offered = [
        TtsVoice(code, _ESPEAK, True, f"eSpeak NG, {name}", None, [code])
        for code, name in voices.items()
    ]
    about = "eSpeak NG reads aloud"
    return TtsProgram(
        PROGRAM, _OURS, True, about, version, voices=offered, supports_synthesize_streaming=True
    )


def _wake(version: str, words: Mapping[str, str]) -> WakeProgram:
    models = [
        WakeModel(name, _WAKE, True, phrase, None, languages=["en"], phrase=phrase)
        for name, phrase in words.items()
    ]
    about = "microWakeWord waits for a word"
    return WakeProgram(PROGRAM, _OURS, True, about, version, models=models)
