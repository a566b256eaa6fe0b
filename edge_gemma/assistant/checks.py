"""Is everything there that assistant.toml names? One step after the other, without a model.

In: a folder. Out: :class:`Check` for each step. A tone is played, a second is listened to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_gemma.assistant.parts import (
    BUILTIN,
    find_bundle,
    find_hooks,
    find_tools,
    find_wake_words,
    plan_request,
)
from edge_gemma.assistant.persona import briefing
from edge_gemma.assistant.settings import ALWAYS, BUTTON, Home, read_home
from edge_gemma.assistant.state import write_state
from edge_gemma.assistant.timers import Timers
from edge_gemma.assistant.tones import RATE_HZ, sleep_tone, wake_tone
from edge_gemma.conversation.clauses import Clauses
from edge_gemma.conversation.voices import SILENT, synthesizers
from edge_gemma.errors import EdgeGemmaError, UnsupportedModel, first_line
from edge_gemma.hearing.devices import Microphone, Speaker
from edge_gemma.hearing.echo_choice import EchoChoice
from edge_gemma.hearing.sound import level_dbfs
from edge_gemma.hearing.utterances import silero
from edge_gemma.model import plan_bundle
from edge_gemma.units import format_bytes

_LISTEN_S = 1.0
_DEAD_DBFS = -85.0  # below it is no microphone's noise: muted, or nothing is plugged in


@dataclass(frozen=True)
class Check:
    """``found`` says what is there or what is wrong, ``todo`` what to do then."""

    step: str
    ok: bool
    found: str
    todo: str = ""


class Wrong(Exception):
    """A step that found something wrong, and what to do."""

    def __init__(self, found: str, todo: str = ""):
        super().__init__(found)
        self.todo = todo


def checks(folder: Path) -> Iterator[Check]:
    """The steps, as they are done; after a configuration that cannot be read there are none."""
    try:
        home = read_home(folder)
        briefing(home)
    except EdgeGemmaError as error:
        yield Check("configuration", False, str(error), "mend assistant.toml")
        return
    yield Check("configuration", True, str(home.folder))
    for step, check, todo in STEPS:
        yield _checked(step, check, home, todo)


def _checked(step: str, check: Callable[[Home], str], home: Home, todo: str) -> Check:
    try:
        return Check(step, True, check(home))
    except Wrong as wrong:
        return Check(step, False, str(wrong), wrong.todo or todo)
    except EdgeGemmaError as error:
        return Check(step, False, first_line(error), todo)
    except Exception as error:  # somebody else's code: a voice, hooks
        return Check(step, False, f"{type(error).__name__}: {first_line(error)}", todo)


def _bundle(home: Home) -> str:
    bundle = find_bundle(home)
    if bundle.manifest.audio is None:
        raise UnsupportedModel(f"{bundle.folder} has no audio encoder, so it cannot hear")
    plan = plan_bundle(bundle, request=plan_request(home.settings))
    if not plan.fits:
        raise Wrong(plan.refusal or "it does not fit")
    return f"{bundle.folder.name}: {format_bytes(plan.total_bytes)} planned"


def _state(home: Home) -> str:
    with Timers(home.state) as timers:
        probe = home.state / ".probe"
        write_state(probe, {})
        probe.unlink()
        if timers.problem:
            raise Wrong(timers.problem)
        return f"{home.state}, {len(timers.all())} timers"


def _tools(home: Home) -> str:
    # without the built-in ones, whose timers an assistant that runs may hold
    found = find_tools(home, None)
    names = [tool.name for tool in found.toolbox.tools] if found else []
    return ", ".join([BUILTIN] * (BUILTIN in home.settings.tools) + names) or "none"


def _hooks(home: Home) -> str:
    find_hooks(home)
    return home.settings.hooks or "none"


def _wake_word(home: Home) -> str:
    silero()
    find_wake_words(home)
    word = home.settings.wake_word
    return {ALWAYS: "none: always awake", "": "none: always awake", BUTTON: "the button"}.get(
        word, word
    )


def _voice(home: Home) -> str:
    voice = home.found(home.settings.voice)
    if voice == SILENT:
        return "none: answers are shown"
    found, told = synthesizers(voice), []
    Clauses(tuple(found))
    for language, synthesize in found.items():
        started = time.perf_counter()
        samples, rate_hz = synthesize("Hello.")
        if not len(samples) or not rate_hz > 0:
            raise Wrong(f"{language} made no sound")
        took_s = time.perf_counter() - started
        told.append(f"{language}: {len(samples) / rate_hz:.1f} s of sound in {took_s:.2f} s")
    return ", ".join(told)


def _echo(home: Home) -> str:
    told: list[str] = []
    EchoChoice.of(home.settings.echo, speaks=True, note=told.append)
    return told[-1].removeprefix("echo: ") if told else "off: for headphones"


def _loudspeaker(home: Home) -> str:
    with Speaker(home.settings.loudspeaker or None) as speaker:
        for tone in (wake_tone(), sleep_tone()):
            speaker.play(tone, RATE_HZ)
        speaker.wait()
        return f"{speaker.name} at {speaker.rate_hz} Hz: did you hear two tones?"


def _microphone(home: Home) -> str:
    with Microphone(home.settings.microphone or None) as microphone:
        blocks, until = [np.zeros(0, np.float32)], time.monotonic() + _LISTEN_S
        while time.monotonic() < until:
            blocks.append(microphone.read(timeout_s=0.2))
        name = microphone.name
    heard = np.concatenate(blocks)
    if not len(heard):
        raise Wrong(f"{name} gives no sound", "is another program holding it?")
    rms_dbfs, peak_dbfs = level_dbfs(heard)
    if peak_dbfs < _DEAD_DBFS:
        raise Wrong(
            f"{name} is silent ({peak_dbfs:.0f} dBFS at most)",
            "it may be muted, or another one is meant: edge-gemma devices --meter",
        )
    return f"{name}: {rms_dbfs:.0f} dBFS, {peak_dbfs:.0f} at most"


# what is done, by whom, what to do where it goes wrong
STEPS: tuple[tuple[str, Callable[[Home], str], str], ...] = (
    ("model", _bundle, "edge-gemma ls; edge-gemma plan BUNDLE"),
    ("state folder", _state, "end the other assistant, or set state"),
    ("tools", _tools, "mend the file, or leave it out of tools"),
    ("hooks", _hooks, "mend the file, or leave it out of hooks"),
    ("wake word", _wake_word, "choose another one for wake_word or stop_word"),
    ("voice", _voice, 'choose another one, or voice = "none"'),
    ("echo", _echo, 'echo = "auto"'),
    ("loudspeaker", _loudspeaker, "edge-gemma devices; set loudspeaker"),
    ("microphone", _microphone, "edge-gemma devices --meter; set microphone"),
)
