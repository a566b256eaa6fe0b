"""listen and devices: a conversation by voice, and what it could use."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import (
    BundleArg,
    JsonOption,
    PadAudioOption,
    note,
    print_json,
    table,
)
from edge_gemma.cli.hear import (
    ANSWERING,
    InputOption,
    PauseOption,
    listen_options,
    open_chat,
)
from edge_gemma.cli.options import LOADING, LoadingOptions, SamplingOptions, grouped
from edge_gemma.cli.personas import TELLING, TellingOptions
from edge_gemma.cli.tools import BUILTIN, StateOption, ToolsOption, opened_tools

if TYPE_CHECKING:
    import numpy as np

    from edge_gemma.conversation.listener import Heard
    from edge_gemma.conversation.voice import Voice
    from edge_gemma.hearing.devices import SoundDevice, Speaker

SpeakerOption = Annotated[
    str | None,
    typer.Option("--output", help="Which loudspeaker: a number or part of a name."),
]


def register(app: typer.Typer) -> None:
    app.command("listen")(grouped(listen))
    app.command("devices")(devices)


def listen(
    bundle: BundleArg,
    name: InputOption = None,
    telling: TellingOptions = TELLING,
    instruction: Annotated[
        str, typer.Option("--instruction", help="Said to the model before each utterance.")
    ] = "",
    voice: Annotated[
        str,
        typer.Option(
            "--voice",
            help="Speak the answers: none, an espeak-ng voice like en or de, a piper voice file, "
            "or KOKORO.onnx:VOICE with its voices*.bin beside it. Several, like en,de: each clause "
            "by the voice of its language.",
        ),
    ] = "none",
    barge_in: Annotated[
        bool,
        typer.Option(
            "--barge-in/--half-duplex",
            help="Speech stops an answer; half-duplex: nothing is heard until it was spoken.",
        ),
    ] = True,
    wake_word: Annotated[
        str | None,
        typer.Option(
            "--wake-word",
            help="Hear nothing until this is said: a name of pymicro-wakeword, like okay_nabu.",
        ),
    ] = None,
    speaker: SpeakerOption = None,
    echo_cancel: Annotated[
        str,
        typer.Option(
            "--echo-cancel",
            help="Keep the answers out of the microphone: aec (in this process), system (the sound "
            "server's), off (headphones), or auto: system where it is loaded, else aec.",
        ),
    ] = "auto",
    noise_suppression: Annotated[
        int, typer.Option("--noise-suppression", help="0 (off) to 4.")
    ] = 0,
    gain: Annotated[
        int, typer.Option("--gain", help="Automatic gain: 0 (off), or up to 31 dB.")
    ] = 0,
    tools: ToolsOption = None,
    state: StateOption = None,
    pad_audio: PadAudioOption = False,
    pause: PauseOption = 0.6,
    adaptive_pause: Annotated[
        bool,
        typer.Option(
            "--adaptive-pause/--fixed-pause",
            help="Half to twice of --pause: longer where somebody paused before and went on, or "
            "the silence is not clear.",
        ),
    ] = True,
    ask_for_end: Annotated[
        bool,
        typer.Option(
            "--ask-for-end",
            help="At a pause, ask the model whether the turn is over. Untested with real weights.",
        ),
    ] = False,
    sampling: SamplingOptions = ANSWERING,
    loading: LoadingOptions = LOADING,
    as_json: JsonOption = False,
) -> None:
    """Talk with the model: hear, answer, speak, until Ctrl-C. Answers begin when you stop speaking;
    speaking again stops them.
    """
    import numpy as np

    from edge_gemma.assistant.talk_tools import tools_at_work
    from edge_gemma.conversation.listener import Listener
    from edge_gemma.conversation.voices import voice_languages
    from edge_gemma.errors import UsageError
    from edge_gemma.hearing.devices import Microphone, Speaker, find_sound_device
    from edge_gemma.hearing.echo import noise_filter
    from edge_gemma.hearing.echo_choice import EchoChoice
    from edge_gemma.hearing.pauses import PauseRule
    from edge_gemma.hearing.samples import RATE_HZ

    rings = BUILTIN in (tools or ())
    echo = EchoChoice.of(echo_cancel, speaks=voice != "none" or rings, note=note)
    loudspeaker = Speaker(speaker)
    if echo.canceller:
        loudspeaker = Speaker(speaker, echo.canceller.played, echo.canceller.reopened)
    make_voice = _voice_maker(voice, loudspeaker)
    find_sound_device(name, "input")  # before the model is loaded
    if voice != "none" or rings:
        find_sound_device(speaker, "output")
    gate, look_back_s = None, 0.0
    if wake_word:
        from edge_gemma.hearing.wake_word import KNOWN_LATE_S
        from edge_gemma.hearing.wake_word import wake_word as make_gate

        gate, look_back_s = make_gate(wake_word), KNOWN_LATE_S
    filters = [noise_filter(noise_suppression, gain)] if noise_suppression or gain else []
    options = listen_options(bundle, pad_audio, pause, sampling)
    if ask_for_end and not adaptive_pause:
        raise UsageError(
            "--ask-for-end decides how long a pause is; --fixed-pause leaves no choice"
        )
    if adaptive_pause:
        vad = dataclasses.replace(options.vad, rule=PauseRule.around(pause))
        options = dataclasses.replace(options, vad=vad, ask_for_end=ask_for_end)
    told = telling.instructions()
    options = dataclasses.replace(
        options,
        instruction=instruction or told.instruction,
        barge_in=barge_in and not echo.half_duplex,
        look_back_s=look_back_s,
    )
    with contextlib.ExitStack() as opened:
        found = opened.enter_context(opened_tools(tools, state))
        specs = found.toolbox.specs if found else ()
        model, chat = open_chat(bundle, loading, options, told.system or None, specs)
        opened.enter_context(model)
        opened.enter_context(chat)
        opened.enter_context(contextlib.closing(loudspeaker))
        listener = Listener(
            chat,
            Microphone(name),
            options,
            make_voice=make_voice,
            gate=gate,
            echo=echo.canceller,
            filters=filters,
        )
        if found:
            work = tools_at_work(chat, found, loudspeaker, voice_languages(voice))
            listener.responder, listener.notices = work.loop, work.notice
        if echo.canceller:
            loudspeaker.play(np.zeros(0, np.float32), RATE_HZ)  # open: its samples are counted
        try:
            for record in listener.records():
                if as_json:
                    print_json(record)
                else:
                    show_heard(record)
        except KeyboardInterrupt:
            listener.stop()
            note("")


def show_heard(record: Heard) -> None:
    if record.kind == "text":
        print(record.text, end="", flush=True)
    elif record.kind == "interrupted":
        print(" …", flush=True)
    elif record.kind == "turn":
        print(flush=True)
        if record.wait_s is not None:
            note(f"({record.wait_s:.2f} s to the first word)")
    else:
        _show_state(record)


def _show_state(record: Heard) -> None:
    """What happened besides the answer; nothing for the kinds that only programs want."""
    if record.kind == "ready":
        note(f"listening to {record.text}; Ctrl-C ends")
    elif record.kind == "speech":
        note("…")
    elif record.kind == "back":
        note(f"the microphone is back: {record.text}")
    elif record.kind == "dropped":
        note(f"{record.n} blocks of 32 ms were lost so far")
    elif record.kind == "called":
        note(f"({record.text})")
    elif record.kind == "notice":
        print(record.text, flush=True)
    elif record.kind in ("lost", "failed"):
        note(record.text)


def _voice_maker(voice: str, speaker: Speaker) -> Callable[[], Voice | None]:
    """What makes a Voice for each answer with --voice. The synthesizer is found at once, so that a
    missing one is reported before a model is loaded.
    """
    if voice == "none":
        return lambda: None
    from edge_gemma.conversation.clauses import Clauses
    from edge_gemma.conversation.voice import Voice
    from edge_gemma.conversation.voices import synthesizers

    found = synthesizers(voice)
    Clauses(tuple(found))  # raises now where a library is missing
    return lambda: Voice(found, speaker.play, speaker.stop, lambda: speaker.n_heard)


def devices(
    meter: Annotated[
        bool, typer.Option("--meter", help="Show the microphone's level until Ctrl-C.")
    ] = False,
    echo_test: Annotated[
        bool,
        typer.Option("--echo-test", help="Play some speech and measure the echo that is left."),
    ] = False,
    name: InputOption = None,
    speaker: SpeakerOption = None,
    as_json: JsonOption = False,
) -> None:
    """List microphones and loudspeakers. --meter shows what a microphone hears, --echo-test what it
    hears of the loudspeaker.
    """
    from edge_gemma.hearing.devices import devices as find

    if echo_test:
        _echo_test(name, speaker, as_json)
        return

    found = find()
    if as_json:
        print_json(found)
    elif found:
        print(table([_device_row(device) for device in found], right=(0,)))
    else:
        note("no sound device found; on a server or in a container there may be none")
    _show_sound_server(as_json)
    if meter:
        _meter(name)


def _show_sound_server(as_json: bool) -> None:
    """On stderr: how its echo canceller stands."""
    from edge_gemma.hearing.sound_server import LOAD, sound_server

    server = None if as_json else sound_server()
    if server is None:
        return
    if server.echo_cancelled:
        note(f"{server.name} takes the echo out of {server.echo_cancelled.source}")
    else:
        note(f"{server.name} has an echo canceller that is not loaded: {LOAD}")


def _echo_test(name: str | None, speaker: str | None, as_json: bool) -> None:
    from edge_gemma.hearing.echo_test import echo_test

    result = echo_test(name, speaker, _test_speech())
    if as_json:
        print_json(result)
        return
    note(f"{result.microphone} hears {result.loudspeaker}:")
    heard = f"echo {result.echo_dbfs:.0f} dBFS, noise {result.noise_dbfs:.0f} dBFS"
    if result.state == "no echo":
        print(f"no echo ({heard}): headphones, or the volume is down")
    elif result.left_db is None:
        print(f"an echo that could not be learned ({heard}); listen will be half-duplex")
    else:
        print(
            f"{heard}; delay {1000 * (result.delay_s or 0):.0f} ms; after cancelling "
            f"{result.left_db:.0f} dB of it are left, {result.barge_ins} false barge-ins in "
            f"{result.seconds:.0f} s"
        )


def _device_row(device: SoundDevice) -> tuple[str, str, str]:
    marks = []
    if device.is_default_input:
        marks.append("default microphone")
    if device.is_default_output:
        marks.append("default loudspeaker")
    facts = f"{device.inputs} in, {device.outputs} out, {device.rate_hz} Hz"
    if marks:
        facts += f"  ← {', '.join(marks)}"
    return str(device.index), device.name, facts


def _test_speech() -> np.ndarray | None:
    """What --echo-test plays: espeak-ng's speech, None (noise) without it."""
    from edge_gemma.conversation.voice import espeak
    from edge_gemma.errors import UsageError
    from edge_gemma.hearing.sound import Resampler

    try:
        samples, rate_hz = espeak("en")(
            "This is a test of the loudspeaker and the microphone. Please be quiet until it ends. "
            "What you hear is what the assistant must not take for a person who speaks."
        )
    except UsageError as error:
        note(f"{error}; noise is played instead")
        return None
    return Resampler(rate_hz).push(samples, last=True)


def _meter(name: str | None) -> None:
    """The level of a microphone as one line that overwrites itself, until Ctrl-C."""
    from edge_gemma.hearing.devices import Microphone
    from edge_gemma.hearing.sound import level_dbfs

    with Microphone(name) as microphone:
        note(f"{microphone.name}; Ctrl-C ends")
        try:
            for block in microphone.blocks():
                rms_dbfs, peak_dbfs = level_dbfs(block)
                # 40 characters for −60 … 0 dBFS
                bar = "#" * max(0, min(40, round((rms_dbfs + 60) * 40 / 60)))
                clipping = "CLIPPING" if peak_dbfs >= -0.1 else " " * 8
                sys.stderr.write(f"\r{rms_dbfs:6.1f} dBFS  {bar:<40} {clipping}")
                sys.stderr.flush()
        except KeyboardInterrupt:
            note("")
