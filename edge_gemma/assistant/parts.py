"""What an assistant is put together from, by its settings.

In: a folder with assistant.toml. Out: :class:`Parts`. Everything that can be wrong without a model
is found here, before one is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from edge_gemma.assistant.life import Habits
from edge_gemma.assistant.loudspeaker import Loudspeaker
from edge_gemma.assistant.persona import briefing
from edge_gemma.assistant.personas import Instructions
from edge_gemma.assistant.settings import ALWAYS, BUTTON, Home, Settings
from edge_gemma.assistant.signatures import module_of
from edge_gemma.assistant.talk_tools import TalkTools, talk_tools
from edge_gemma.assistant.timers import Timers
from edge_gemma.bundles.folder import Bundle
from edge_gemma.conversation.clauses import Clauses
from edge_gemma.conversation.transcription import ListenOptions, Source
from edge_gemma.conversation.voices import SILENT, synthesizers, voice_languages
from edge_gemma.errors import UsageError
from edge_gemma.hearing.devices import Microphone, Speaker, find_sound_device
from edge_gemma.hearing.echo import EchoCanceller, SoundFilter, noise_filter
from edge_gemma.hearing.echo_choice import EchoChoice
from edge_gemma.hearing.pauses import PauseRule
from edge_gemma.hearing.utterances import SpeechDetector, VadSettings
from edge_gemma.hearing.wake_word import KNOWN_LATE_S, WakeWord, wake_word
from edge_gemma.model import Model, bundle_sampling, load
from edge_gemma.options import SamplingChanges
from edge_gemma.plan.records import PlanRequest
from edge_gemma.store.installed import resolve
from edge_gemma.units import parse_bytes

BUILTIN = "builtin"
SHORTEST_S = 0.2  # of speech; less is a cough

Tell = Callable[[str], object]
OnProgress = Callable[[float], bool]
# connect(press) -> on_state, of a hooks file
Connect = Callable[[Callable[[], None]], object]


@dataclass
class Parts:
    """``load`` loads the model; ``source`` makes what is listened to, each time anew. ``languages``
    are those of stop words and of yes and no; none: all that are known.
    """

    load: Callable[[OnProgress], Model]
    source: Callable[[], Microphone | Source]
    loudspeaker: Loudspeaker
    options: ListenOptions
    briefing: Instructions
    habits: Habits = Habits()
    languages: Sequence[str] = ()
    tools: TalkTools | None = None
    wake: WakeWord | None = None
    stop_word: WakeWord | None = None
    stop_phrases: bool = True
    writes_down: bool = False
    tones: bool = True
    echo: EchoCanceller | None = None
    filters: Sequence[SoundFilter] = ()
    detector: SpeechDetector | None = None
    connect: Connect | None = None
    clock: Callable[[], float] = field(default=time.monotonic)


def make_parts(home: Home, timers: Timers, tell: Tell) -> Parts:
    """Raises UsageError, MissingExtra, DeviceLost, BundleError."""
    settings = home.settings
    words = briefing(home)
    tools, connect = find_tools(home, timers), find_hooks(home)
    bundle = find_bundle(home)
    find_sound_device(settings.microphone or None, "input")
    rings = BUILTIN in settings.tools
    sounds = settings.voice != SILENT or rings or settings.tones
    echo = EchoChoice.of(settings.echo, speaks=sounds, note=tell)
    loudspeaker = make_loudspeaker(home, echo.canceller, tell)
    wake, stop_word = find_wake_words(home)
    sampling: SamplingChanges = {"max_tokens": settings.model.max_tokens}
    if settings.model.temperature >= 0:
        sampling["temperature"] = settings.model.temperature
    vad = VadSettings(end_s=settings.pause_s)
    if settings.adaptive_pause:
        vad = replace(vad, rule=PauseRule.around(settings.pause_s))
    noise = settings.noise_suppression, settings.gain
    barge_in = settings.barge_in and not echo.half_duplex
    return Parts(
        load=lambda on_progress: load_model(home, bundle, tools, on_progress),
        source=lambda: Microphone(settings.microphone or None),
        loudspeaker=loudspeaker,
        options=ListenOptions(
            instruction=words.instruction,
            pad_audio=settings.pad_audio,
            barge_in=barge_in,
            shortest_s=SHORTEST_S,
            look_back_s=KNOWN_LATE_S if wake is not None else 0.0,
            vad=vad,
            sampling=bundle_sampling(bundle.manifest, **sampling),
        ),
        briefing=words,
        habits=Habits(
            sleeps=settings.wake_word != ALWAYS,
            follow_s=settings.follow_up_s,
            barge_in=barge_in,
        ),
        languages=languages_of(settings),
        tools=tools,
        wake=wake,
        stop_word=stop_word,
        stop_phrases=settings.stop_phrases,
        writes_down=settings.transcribe,
        tones=settings.tones,
        echo=echo.canceller,
        filters=[noise_filter(*noise)] if any(noise) else [],
        connect=connect,
    )


def languages_of(settings: Settings) -> tuple[str, ...]:
    own = (settings.language,) if settings.language else ()
    return tuple(dict.fromkeys((*own, *voice_languages(settings.voice))))


def find_bundle(home: Home) -> Bundle:
    """Raises UsageError, BundleError."""
    name = home.settings.bundle
    if not name:
        raise UsageError(
            f'{home.folder} names no bundle: write bundle = "NAME" into assistant.toml '
            "(`edge-gemma ls` shows what is installed)"
        )
    folder = home.path(name)
    return Bundle.open(folder if folder.is_dir() else resolve(name))


def plan_request(settings: Settings) -> PlanRequest:
    """Raises UsageError."""
    wanted = settings.model
    return PlanRequest(
        budget_bytes=parse_bytes(wanted.budget) if wanted.budget else None,
        n_ctx=wanted.context or None,
        n_threads=wanted.threads or None,
        level=wanted.level,
        senses=("audio",),
        structured=bool(settings.tools),
        prompt_cache_bytes=None,
        n_draft=None,
    )


def load_model(
    home: Home, bundle: Bundle, tools: TalkTools | None, on_progress: OnProgress
) -> Model:
    """Raises PlanRefused, BundleError, RuntimeFailure."""
    return load(bundle, request=plan_request(home.settings), on_progress=on_progress)


def make_loudspeaker(home: Home, echo: EchoCanceller | None, tell: Tell) -> Loudspeaker:
    """Nothing is opened yet. Raises UsageError, MissingExtra (the voice)."""
    settings = home.settings
    voice = home.found(settings.voice)
    found = {}
    if voice != SILENT:
        found = synthesizers(voice)
        Clauses(tuple(found))  # raises now where a library is missing

    def played(samples: np.ndarray, rate_hz: int) -> None:
        if echo is not None:
            echo.played(samples, rate_hz, harmless=loudspeaker.harmless)

    speaker = Speaker(settings.loudspeaker or None, played, echo.reopened if echo else None)
    loudspeaker = Loudspeaker(speaker, found, tell=tell)
    return loudspeaker


def find_tools(home: Home, timers: Timers | None) -> TalkTools | None:
    """Raises UsageError."""
    wanted = home.settings.tools
    files = [home.path(name) for name in wanted if name != BUILTIN]
    return talk_tools(files, timers if BUILTIN in wanted else None, home.state)


def find_wake_words(home: Home) -> tuple[WakeWord | None, WakeWord | None]:
    """What wakes, what stops. Raises UsageError, MissingExtra."""

    def found(name: str) -> WakeWord | None:
        if name in ("", ALWAYS, BUTTON):
            return None
        file = home.path(name)
        return wake_word(str(file) if file.is_file() else name)

    settings = home.settings
    if settings.wake_word == BUTTON and not settings.hooks:
        raise UsageError('wake_word is "button", but hooks names no file that has one')
    # a name of its own: pymicro-wakeword's memory must not be freed while an error is on its way,
    # which would be lost
    wake = found(settings.wake_word or ALWAYS)
    return wake, found(settings.stop_word)


def find_hooks(home: Home) -> Connect | None:
    """Run the hooks file, the program of yours that it is. Raises UsageError."""
    if not home.settings.hooks:
        return None
    path = home.path(home.settings.hooks)
    if not path.is_file() or path.suffix != ".py":
        raise UsageError(f"{path} is no hooks file: expected a local FILE.py")
    connect = getattr(module_of(path), "connect", None)
    if not callable(connect):
        raise UsageError(f"{path} has no function connect(press)")
    return connect
