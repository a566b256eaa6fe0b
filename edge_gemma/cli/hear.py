"""transcribe, translate, ask, listen and devices."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edge_gemma.cli.answering import Cost, collect, finish, load_model, stream
from edge_gemma.cli.common import (
    BundleArg,
    JsonOption,
    LanguageOption,
    PadAudioOption,
    StatsOption,
    SystemOption,
    note,
    print_json,
    table,
)
from edge_gemma.cli.options import LOADING, LoadingOptions, SamplingOptions, grouped

if TYPE_CHECKING:
    import numpy as np

    from edge_gemma.conversation.chat import Chat
    from edge_gemma.conversation.listener import Heard
    from edge_gemma.conversation.transcription import ListenOptions, Segment
    from edge_gemma.conversation.voice import Voice
    from edge_gemma.hearing.devices import Microphone, SoundDevice
    from edge_gemma.hearing.sound import AudioFile
    from edge_gemma.model import Model

FileArg = Annotated[
    Path | None,
    typer.Argument(
        metavar="FILE", help="A sound file (wav, flac, ogg, mp3) of any length, rate and channels."
    ),
]
MicOption = Annotated[
    bool, typer.Option("--mic", help="Hear the microphone instead, until Ctrl-C.")
]
InputOption = Annotated[
    str | None,
    typer.Option(
        "--input", help="Which microphone: a number or part of a name (`edge-gemma devices`)."
    ),
]
SrtOption = Annotated[bool, typer.Option("--srt", help="Subtitles (SubRip) on stdout.")]
VttOption = Annotated[bool, typer.Option("--vtt", help="Subtitles (WebVTT) on stdout.")]
PauseOption = Annotated[
    float, typer.Option("--pause", help="Seconds of silence that end an utterance.")
]
ANSWERING = SamplingOptions(max_tokens=512)
# a clip of 30 s holds fewer than 448 tokens of speech
TRANSCRIBING = SamplingOptions(max_tokens=448, temperature=0.0)
_SILENCE_S = 6  # longer than any --pause (VadSettings), so that it ends an utterance


def register(app: typer.Typer) -> None:
    app.command("transcribe")(grouped(transcribe))
    app.command("translate")(grouped(translate))
    app.command("ask")(grouped(ask))
    app.command("listen")(grouped(listen))
    app.command("devices")(devices)


def _open_chat(
    bundle: str, loading: LoadingOptions, options: ListenOptions, system: str | None = None
) -> tuple[Model, Chat]:
    """A bundle that hears, loaded, and a chat. Raises UnsupportedModel for one that does not
    hear, before anything is loaded.
    """
    model, _ = load_model(bundle, loading, ("audio",))
    return model, model.chat(system=system, pad_audio=options.pad_audio)


def _check_source(file: Path | None, mic: bool) -> None:
    from edge_gemma.errors import UsageError

    if file is None and not mic:
        raise UsageError("give a sound file or --mic")
    if file is not None and mic:
        raise UsageError("give a sound file or --mic, not both")


def _blocks(file: Path | None, microphone_name: str | None) -> Iterator[np.ndarray]:
    """The file's blocks, or the microphone's: opened (a file) or found (a microphone) now, before a
    model is loaded.
    """
    if file is not None:
        from edge_gemma.hearing.sound import AudioFile

        return _file_blocks(AudioFile(file))
    from edge_gemma.hearing.devices import Microphone, find_sound_device

    find_sound_device(microphone_name, "input")
    return _microphone_blocks(Microphone(microphone_name))


def _file_blocks(file: AudioFile) -> Iterator[np.ndarray]:
    with file:
        yield from file.blocks()
        if file.truncated_at_s is not None:
            note(
                f"note: {file.path} ends at {file.truncated_at_s:.1f} s; its header promises "
                f"{file.duration_s:.1f} s. It is truncated"
            )


def _microphone_blocks(microphone: Microphone) -> Iterator[np.ndarray]:
    """Until Ctrl-C. A lost microphone counts as silence, so that what was being said is written
    down; then it is waited for.
    """
    import numpy as np

    from edge_gemma.errors import DeviceLost
    from edge_gemma.hearing.samples import RATE_HZ

    with microphone:
        note(f"listening to {microphone.name}; Ctrl-C ends")
        try:
            while True:
                try:
                    yield microphone.read()
                except DeviceLost as error:
                    note(str(error))
                    yield np.zeros(_SILENCE_S * RATE_HZ, np.float32)
                    _wait_for(microphone)
        except KeyboardInterrupt:
            pass
        finally:
            if microphone.dropped_blocks:
                note(
                    f"note: {microphone.dropped_blocks} blocks of 32 ms were lost; the "
                    "machine was too slow"
                )


def _wait_for(microphone: Microphone) -> None:
    """Try to open a lost microphone again until that works."""
    from edge_gemma.conversation.listener import RETRY_S
    from edge_gemma.errors import DeviceLost

    while True:
        time.sleep(RETRY_S)
        try:
            microphone.reopen()
        except DeviceLost:
            continue
        note(f"the microphone is back: {microphone.name}")
        return


def transcribe(
    bundle: BundleArg,
    file: FileArg = None,
    mic: MicOption = False,
    name: InputOption = None,
    language: LanguageOption = None,
    srt: SrtOption = False,
    vtt: VttOption = False,
    pad_audio: PadAudioOption = True,
    pause: PauseOption = 0.6,
    sampling: SamplingOptions = TRANSCRIBING,
    loading: LoadingOptions = LOADING,
    as_json: JsonOption = False,
) -> None:
    """Write down what is said in a file or into the microphone."""
    from edge_gemma.conversation.transcription import TRANSCRIBE, TRANSCRIBE_ANY

    instruction = TRANSCRIBE.format(language=language) if language else TRANSCRIBE_ANY
    layout = _layout(srt, vtt, as_json)
    _check_source(file, mic)
    options = _listen_options(pad_audio, pause, sampling)
    _segments(bundle, loading, _blocks(file, name), instruction, options, layout)


def translate(
    bundle: BundleArg,
    file: FileArg = None,
    to: Annotated[
        str, typer.Option("--to", help="The language to translate into, like English.")
    ] = "English",
    mic: MicOption = False,
    name: InputOption = None,
    language: LanguageOption = None,
    srt: SrtOption = False,
    vtt: VttOption = False,
    pad_audio: PadAudioOption = True,
    pause: PauseOption = 0.6,
    sampling: SamplingOptions = TRANSCRIBING,
    loading: LoadingOptions = LOADING,
    as_json: JsonOption = False,
) -> None:
    """Translate what is said in a file or into the microphone. With --language, the model writes it
    down in that language first.
    """
    from edge_gemma.conversation.transcription import TRANSLATE, TRANSLATE_ONLY

    instruction = TRANSLATE_ONLY.format(to=to)
    if language:
        instruction = TRANSLATE.format(language=language, to=to)
    layout = _layout(srt, vtt, as_json)
    _check_source(file, mic)
    options = _listen_options(pad_audio, pause, sampling)
    _segments(bundle, loading, _blocks(file, name), instruction, options, layout)


Layout = Literal["text", "srt", "vtt", "json"]


def _layout(srt: bool, vtt: bool, as_json: bool) -> Layout:
    from edge_gemma.errors import UsageError

    layouts: dict[Layout, bool] = {"srt": srt, "vtt": vtt, "json": as_json}
    chosen = [layout for layout, on in layouts.items() if on]
    if len(chosen) > 1:
        raise UsageError("choose one of --srt, --vtt and --json")
    return chosen[0] if chosen else "text"


def _listen_options(pad_audio: bool, pause: float, sampling: SamplingOptions) -> ListenOptions:
    from edge_gemma.conversation.transcription import ListenOptions
    from edge_gemma.hearing.utterances import VadSettings

    return ListenOptions(
        pad_audio=pad_audio, vad=VadSettings(end_s=pause), sampling=sampling.sampling()
    )


def _segments(
    bundle: str,
    loading: LoadingOptions,
    blocks: Iterable[np.ndarray],
    instruction: str,
    options: ListenOptions,
    layout: Layout,
) -> None:
    """Each utterance in ``blocks`` and what the model makes of it, printed as it is found."""
    from edge_gemma.conversation.transcription import transcribe

    model, chat = _open_chat(bundle, loading, options)
    number = 0
    with model, chat:
        if layout == "vtt":
            print("WEBVTT\n", flush=True)
        for segment in transcribe(chat, blocks, instruction, options):
            number += 1
            _print_segment(segment, number, layout)
    if number == 0:
        note("no speech found")


def _print_segment(segment: Segment, number: int, layout: Layout) -> None:
    if layout == "json":
        start_s, end_s = round(segment.start_s, 3), round(segment.end_s, 3)
        print_json({"start_s": start_s, "end_s": end_s, "text": segment.text})
    elif layout == "text":
        print(segment.text, flush=True)
    else:
        print(cue(segment, number if layout == "srt" else None), flush=True)


def cue(segment, number: int | None) -> str:
    """One subtitle with the blank line behind it; numbered and with decimal commas for SubRip.

    >>> from edge_gemma.conversation.transcription import Segment
    >>> print(cue(Segment(3661.5, 3662.25, "Hello --> there"), 7))
    7
    01:01:01,500 --> 01:01:02,250
    Hello -> there
    <BLANKLINE>
    """

    mark = "." if number is None else ","
    # a blank line or an arrow would end the cue
    lines = segment.text.replace("-->", "->").splitlines()
    text = "\n".join(line for line in lines if line.strip())
    times = f"{_clock(segment.start_s, mark)} --> {_clock(segment.end_s, mark)}"
    numbered = [] if number is None else [str(number)]
    return "\n".join([*numbered, times, text or "…", ""])


def _clock(seconds: float, mark: str) -> str:
    total_ms = round(seconds * 1000)
    whole_s, ms = divmod(total_ms, 1000)
    hours, minutes, seconds_left = whole_s // 3600, whole_s // 60 % 60, whole_s % 60
    return f"{hours:02}:{minutes:02}:{seconds_left:02}{mark}{ms:03}"


def ask(
    bundle: BundleArg,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar='[FILE] "question"',
            help="A sound file of at most 30 s, and the question about it.",
        ),
    ],
    mic: MicOption = False,
    name: InputOption = None,
    pad_audio: PadAudioOption = True,
    sampling: SamplingOptions = ANSWERING,
    loading: LoadingOptions = LOADING,
    stats: StatsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a question about a sound. With --mic, about the next utterance."""
    from edge_gemma.conversation.transcription import ListenOptions
    from edge_gemma.conversation.transcription import ask as answer_about
    from edge_gemma.errors import UsageError
    from edge_gemma.machine.peak import PeakSampler

    if len(words) != (1 if mic else 2):
        alone = "   or, with --mic, the question alone" if mic else ""
        raise UsageError(f'write it like: edge-gemma ask BUNDLE clip.wav "What is this?"{alone}')
    question = words[-1]
    blocks = _one_utterance(_blocks(None, name)) if mic else [_clip(words[0])]
    options = ListenOptions(pad_audio=pad_audio, sampling=sampling.sampling())
    with PeakSampler() as peak:
        model, load_s = load_model(bundle, loading, ("audio",))
        peak.rebase()
        with model, model.chat(pad_audio=options.pad_audio) as chat:
            started = time.perf_counter()
            chunks = answer_about(chat, blocks, question, options)
            if mic:  # Ctrl-C ends the microphone's blocks: they are read in this thread
                answer = collect(chunks, quiet=as_json)
            else:
                answer = stream(chunks, chat.cancel, quiet=as_json)
            wall_s = time.perf_counter() - started
    cost = Cost(load_s, wall_s, model.plan.total_bytes, peak.peak_pss_bytes)
    finish(answer, cost, as_json=as_json, stats=stats)


def _clip(path: str) -> np.ndarray:
    """A file's samples. Raises MediaError for none."""
    from edge_gemma.errors import MediaError
    from edge_gemma.hearing.sound import read_audio

    samples = read_audio(path)
    if not len(samples):
        raise MediaError(f"{path} holds no samples")
    return samples


def _one_utterance(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    from edge_gemma.hearing.utterances import SpeechDetector

    detector = SpeechDetector()
    for block in blocks:
        for event in detector.push(block):
            yield event.samples
            if event.kind in ("cut", "end"):
                return


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
        _listen_options(pad_audio, pause, sampling), instruction=instruction, barge_in=barge_in
    )
    model, chat = _open_chat(bundle, loading, options, system)
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
