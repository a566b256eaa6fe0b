"""listen and devices: a conversation by voice, and what it could use."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import (
    BundleArg,
    JsonOption,
    PadAudioOption,
    SystemOption,
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

if TYPE_CHECKING:
    from edge_gemma.conversation.listener import Heard
    from edge_gemma.conversation.voice import Voice
    from edge_gemma.hearing.devices import SoundDevice


def register(app: typer.Typer) -> None:
    app.command("listen")(grouped(listen))
    app.command("devices")(devices)


def listen(
    bundle: BundleArg,
    name: InputOption = None,
    system: SystemOption = None,
    instruction: Annotated[
        str, typer.Option("--instruction", help="Said to the model before each utterance.")
    ] = "",
    voice: Annotated[
        str,
        typer.Option(
            "--voice",
            help="Speak the answers: none, an espeak-ng voice like en or de, or a piper voice "
            "file.",
        ),
    ] = "none",
    barge_in: Annotated[
        bool,
        typer.Option(
            "--barge-in/--half-duplex",
            help="Speech stops an answer; half-duplex where the microphone hears the loudspeaker.",
        ),
    ] = True,
    wake_word: Annotated[
        str | None,
        typer.Option(
            "--wake-word",
            help="Hear nothing until this is said: a name of pymicro-wakeword, like okay_nabu.",
        ),
    ] = None,
    pad_audio: PadAudioOption = False,
    pause: PauseOption = 0.6,
    sampling: SamplingOptions = ANSWERING,
    loading: LoadingOptions = LOADING,
    as_json: JsonOption = False,
) -> None:
    """Talk with the model: hear, answer, speak, until Ctrl-C. Answers begin when you stop speaking;
    speaking again stops them.
    """
    from edge_gemma.conversation.listener import Listener
    from edge_gemma.hearing.devices import Microphone, find_sound_device

    make_voice = _voice_maker(voice)
    find_sound_device(name, "input")  # before the model is loaded
    gate = None
    if wake_word:
        from edge_gemma.hearing.wake_word import wake_word as make_gate

        gate = make_gate(wake_word)
    options = dataclasses.replace(
        listen_options(bundle, pad_audio, pause, sampling),
        instruction=instruction,
        barge_in=barge_in,
    )
    model, chat = open_chat(bundle, loading, options, system)
    with model, chat:
        listener = Listener(chat, Microphone(name), options, make_voice=make_voice, gate=gate)
        try:
            for record in listener.records():
                if as_json:
                    print_json(record)
                else:
                    _show(record)
        except KeyboardInterrupt:
            listener.stop()
            note("")


def _show(record: Heard) -> None:
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
    elif record.kind in ("lost", "failed"):
        note(record.text)


def _voice_maker(voice: str) -> Callable[[], Voice | None]:
    """What makes a Voice for each answer with --voice. The synthesizer is found at once, so that a
    missing one is reported before a model is loaded.
    """
    if voice == "none":
        return lambda: None
    from edge_gemma.conversation.voice import Voice, espeak, piper
    from edge_gemma.hearing.devices import Speaker

    synthesize = piper(voice) if voice.endswith(".onnx") else espeak(voice)
    speaker = Speaker()
    return lambda: Voice(synthesize, speaker.play, speaker.stop)


def devices(
    meter: Annotated[
        bool, typer.Option("--meter", help="Show the microphone's level until Ctrl-C.")
    ] = False,
    name: InputOption = None,
    as_json: JsonOption = False,
) -> None:
    """List microphones and loudspeakers. --meter shows what a microphone hears."""
    from edge_gemma.hearing.devices import devices as find

    found = find()
    if as_json:
        print_json(found)
    elif found:
        print(table([_device_row(device) for device in found], right=(0,)))
    else:
        note("no sound device found; on a server or in a container there may be none")
    if meter:
        _meter(name)


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
