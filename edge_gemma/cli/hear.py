"""transcribe, translate, ask, listen and devices."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from edge_gemma.cli.answering import load_model
from edge_gemma.cli.common import (
    BundleArg,
    DebugOption,
    JsonOption,
    note,
    open_bundle,
    print_json,
)
from edge_gemma.cli.options import Loading, Sampling, grouped
from edge_gemma.cli.text import System

FileArg = Annotated[
    Path | None,
    typer.Argument(
        metavar="FILE", help="A sound file (wav, flac, ogg, mp3) of any length, rate and channels."
    ),
]
Mic = Annotated[bool, typer.Option("--mic", help="Hear the microphone instead, until Ctrl-C.")]
MicName = Annotated[
    str | None,
    typer.Option(
        "--input", help="Which microphone: a number or part of a name (`edge-gemma devices`)."
    ),
]
Language = Annotated[
    str | None,
    typer.Option(
        "--language",
        help="The language spoken, in English words, like German. Default: the model finds out.",
    ),
]
Srt = Annotated[bool, typer.Option("--srt", help="Subtitles (SubRip) on stdout.")]
Vtt = Annotated[bool, typer.Option("--vtt", help="Subtitles (WebVTT) on stdout.")]
PadAudio = Annotated[
    bool,
    typer.Option(
        "--pad-audio/--short",
        help="Fill each clip to 188 rows as transformers does; --short answers sooner and may "
        "differ.",
    ),
]
EndS = Annotated[float, typer.Option("--pause", help="Seconds of silence that end an utterance.")]
_SILENCE_S = 6  # longer than any --pause (VadSettings), so that it ends an utterance


def register(app: typer.Typer) -> None:
    app.command("transcribe")(grouped(transcribe))
    app.command("translate")(grouped(translate))
    app.command("ask")(grouped(ask))
    app.command("listen")(grouped(listen))
    app.command("devices")(devices)


def _open_chat(bundle: str, loading: Loading, *, system: str | None = None, pad_audio: bool = True):
    """(model, chat) for a bundle that hears. Raises UnsupportedModel for one that does not, before
    anything is loaded.
    """
    from edge_gemma.bundles.manifest import require

    require(open_bundle(bundle).manifest, "audio")
    model, _ = load_model(bundle, loading, ("audio",))
    return model, model.chat(system=system, pad_audio=pad_audio)


def _blocks(file: Path | None, mic: bool, name: str | None) -> Iterable:
    """The file's blocks, or the microphone's. Checked before a model is loaded."""
    from edge_gemma.errors import UsageError
    from edge_gemma.hearing.sound import AudioFile

    if (file is None) == (not mic):
        raise UsageError(
            "give a sound file or --mic" if file is None else "give a sound file or --mic, not both"
        )
    if mic:
        from edge_gemma.hearing.devices import Microphone, find_sound_device

        find_sound_device(name, "input")
        return _microphone_blocks(Microphone(name))
    return _file_blocks(AudioFile(file))


def _file_blocks(file) -> Iterator:
    with file:
        yield from file.blocks()
        if file.truncated_at_s is not None:
            note(
                f"note: {file.path} ends at {file.truncated_at_s:.1f} s; its header promises "
                f"{file.duration_s:.1f} s. It is truncated"
            )


def _microphone_blocks(microphone) -> Iterator:
    """Until Ctrl-C. A lost microphone counts as silence, so that what was being said is written
    down; then it is waited for.
    """
    import time

    import numpy as np

    from edge_gemma.conversation.listener import RETRY_S
    from edge_gemma.errors import DeviceLost
    from edge_gemma.hearing.samples import RATE_HZ

    with microphone:
        note(f"listening to {microphone.name}; Ctrl-C ends")
        try:
            while True:
                try:
                    yield microphone.read()
                    continue
                except DeviceLost as error:
                    note(str(error))
                yield np.zeros(_SILENCE_S * RATE_HZ, np.float32)
                while True:
                    time.sleep(RETRY_S)
                    try:
                        microphone.reopen()
                        note(f"the microphone is back: {microphone.name}")
                        break
                    except DeviceLost:
                        pass
        except KeyboardInterrupt:
            pass
        finally:
            if microphone.dropped_blocks:
                note(
                    f"note: {microphone.dropped_blocks} blocks of 32 ms were lost; the "
                    "machine was too slow"
                )


TRANSCRIBING = Sampling(
    max_tokens=448, temperature=0.0
)  # a clip of 30 s holds fewer than 448 tokens of speech


def transcribe(
    bundle: BundleArg,
    file: FileArg = None,
    mic: Mic = False,
    name: MicName = None,
    language: Language = None,
    srt: Srt = False,
    vtt: Vtt = False,
    pad_audio: PadAudio = True,
    pause: EndS = 0.6,
    sampling: Sampling = TRANSCRIBING,
    loading: Loading = Loading(),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write down what is said in a file or into the microphone."""
    from edge_gemma.conversation.listener import TRANSCRIBE, TRANSCRIBE_ANY

    instruction = TRANSCRIBE.format(language=language) if language else TRANSCRIBE_ANY
    _segments(
        bundle, file, mic, name, instruction, srt, vtt, as_json, pad_audio, pause, sampling, loading
    )


def translate(
    bundle: BundleArg,
    file: FileArg = None,
    to: Annotated[
        str, typer.Option("--to", help="The language to translate into, like English.")
    ] = "English",
    mic: Mic = False,
    name: MicName = None,
    language: Language = None,
    srt: Srt = False,
    vtt: Vtt = False,
    pad_audio: PadAudio = True,
    pause: EndS = 0.6,
    sampling: Sampling = TRANSCRIBING,
    loading: Loading = Loading(),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Translate what is said in a file or into the microphone. With --language, the model writes it
    down in that language first.
    """
    from edge_gemma.conversation.listener import TRANSLATE, TRANSLATE_ONLY

    instruction = (
        TRANSLATE.format(language=language, to=to) if language else TRANSLATE_ONLY.format(to=to)
    )
    _segments(
        bundle, file, mic, name, instruction, srt, vtt, as_json, pad_audio, pause, sampling, loading
    )


def _segments(
    bundle, file, mic, name, instruction, srt, vtt, as_json, pad_audio, pause, sampling, loading
) -> None:
    from edge_gemma.conversation.listener import ListenOptions, transcribe
    from edge_gemma.errors import UsageError
    from edge_gemma.hearing.utterances import VadSettings

    if srt + vtt + as_json > 1:
        raise UsageError("choose one of --srt, --vtt and --json")
    blocks = _blocks(file, mic, name)
    options = ListenOptions(
        pad_audio=pad_audio, vad=VadSettings(end_s=pause), sampling=sampling.options()
    )
    model, chat = _open_chat(bundle, loading, pad_audio=pad_audio)
    n = 0
    with model, chat:
        if vtt:
            print("WEBVTT\n", flush=True)
        for n, segment in enumerate(transcribe(chat, blocks, instruction, options), 1):
            if as_json:
                print_json(
                    {
                        "start_s": round(segment.start_s, 3),
                        "end_s": round(segment.end_s, 3),
                        "text": segment.text,
                    }
                )
            elif srt or vtt:
                print(cue(segment, n if srt else None), flush=True)
            else:
                print(segment.text, flush=True)
    if n == 0:
        note("no speech found")


def cue(segment, number: int | None) -> str:
    """One subtitle with the blank line behind it; numbered and with decimal commas for SubRip.

    >>> from edge_gemma.conversation.listener import Segment
    >>> print(cue(Segment(3661.5, 3662.25, "Hello --> there"), 7))
    7
    01:01:01,500 --> 01:01:02,250
    Hello -> there
    <BLANKLINE>
    """

    def clock(seconds: float) -> str:
        ms = round(seconds * 1000)
        return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{'.' if number is None else ','}{ms % 1000:03}"

    text = (
        "\n".join(line for line in segment.text.replace("-->", "->").splitlines() if line.strip())
        or "…"
    )  # a blank line or an arrow would end the cue
    return "\n".join(
        [
            *([str(number)] if number is not None else []),
            f"{clock(segment.start_s)} --> {clock(segment.end_s)}",
            text,
            "",
        ]
    )


def ask(
    bundle: BundleArg,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar='[FILE] "question"',
            help="A sound file of at most 30 s, and the question about it.",
        ),
    ],
    mic: Mic = False,
    name: MicName = None,
    pad_audio: PadAudio = True,
    sampling: Sampling = Sampling(max_tokens=512),
    loading: Loading = Loading(),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Answer a question about a sound. With --mic, about the next utterance."""
    from edge_gemma.conversation.listener import ListenOptions, ask
    from edge_gemma.errors import MediaError, UsageError

    if len(words) != (1 if mic else 2):
        raise UsageError(
            'write it like: edge-gemma ask BUNDLE clip.wav "What is this?"'
            + "   or, with --mic, the question alone" * mic
        )
    blocks = _blocks(None if mic else Path(words[0]), mic, name)
    if not mic:
        from edge_gemma.hearing.sound import read_audio

        blocks = [read_audio(words[0])]
        if not len(blocks[0]):
            raise MediaError(f"{words[0]} holds no samples")
    options = ListenOptions(pad_audio=pad_audio, sampling=sampling.options())
    model, chat = _open_chat(bundle, loading, pad_audio=pad_audio)
    with model, chat:
        text = []
        for chunk in ask(chat, _one_utterance(blocks) if mic else blocks, words[-1], options):
            text.append(chunk.text)
            if not as_json:
                print(chunk.text, end="", flush=True)
        if as_json:
            print_json(
                {
                    "text": "".join(text),
                    "finish_reason": chunk.finish_reason,
                    "usage": chunk.usage,
                    "timings": chunk.timings,
                }
            )
        else:
            print()


def _one_utterance(blocks: Iterable) -> Iterator:
    from edge_gemma.hearing.utterances import SpeechDetector

    detector = SpeechDetector()
    for block in blocks:
        for event in detector.push(block):
            yield event.samples
            if event.kind in ("cut", "end"):
                return


def listen(
    bundle: BundleArg,
    name: MicName = None,
    system: System = None,
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
    pad_audio: PadAudio = False,
    pause: EndS = 0.6,
    sampling: Sampling = Sampling(max_tokens=512),
    loading: Loading = Loading(),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Talk with the model: hear, answer, speak, until Ctrl-C. Answers begin when you stop speaking;
    speaking again stops them.
    """
    from edge_gemma.conversation.listener import Listener, ListenOptions
    from edge_gemma.hearing.devices import Microphone, find_sound_device
    from edge_gemma.hearing.utterances import VadSettings

    make_voice = _voice_maker(voice)
    find_sound_device(name, "input")  # before the model is loaded
    gate = None
    if wake_word:
        from edge_gemma.hearing.wake_word import wake_word as make_gate

        gate = make_gate(wake_word)
    options = ListenOptions(
        instruction, pad_audio, barge_in, VadSettings(end_s=pause), sampling.options()
    )
    model, chat = _open_chat(bundle, loading, system=system, pad_audio=pad_audio)
    with model, chat:
        listener = Listener(chat, Microphone(name), options, make_voice=make_voice, gate=gate)
        try:
            for record in listener.records():
                print_json(record) if as_json else _show(record)
        except KeyboardInterrupt:
            listener.stop()
            note("")


def _show(record) -> None:
    if record.kind == "text":
        print(record.text, end="", flush=True)
    elif record.kind == "turn":
        print(flush=True)
        if record.wait_s is not None:
            note(f"({record.wait_s:.2f} s to the first word)")
    elif record.kind == "interrupted":
        print(" …", flush=True)
    elif record.kind in ("ready", "speech", "lost", "back", "failed", "dropped"):
        words = {
            "ready": f"listening to {record.text}; Ctrl-C ends",
            "speech": "…",
            "back": f"the microphone is back: {record.text}",
        }
        note(
            words.get(record.kind)
            or (
                f"{record.n} blocks of 32 ms were lost so far"
                if record.kind == "dropped"
                else record.text
            )
        )


def _voice_maker(voice: str):
    """``() -> Voice | None`` for --voice. The synthesizer is found at once, so that a missing one
    is said before a model is loaded.
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
    name: MicName = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List microphones and loudspeakers; --meter shows what a microphone hears."""
    from edge_gemma.hearing.devices import Microphone
    from edge_gemma.hearing.devices import devices as find
    from edge_gemma.hearing.sound import level_dbfs

    found = find()
    if as_json:
        print_json(found)
    else:
        for d in found:
            marks = ", ".join(
                word
                for word, yes in (
                    ("default microphone", d.is_default_input),
                    ("default loudspeaker", d.is_default_output),
                )
                if yes
            )
            print(
                f"{d.index:>3}  {d.name}  {d.inputs} in, {d.outputs} out, {d.rate_hz} "
                f"Hz{'  ← ' + marks if marks else ''}"
            )
        if not found:
            note("no sound device found; on a server or in a container there may be none")
    if meter:
        with Microphone(name) as microphone:
            note(f"{microphone.name}; Ctrl-C ends")
            try:
                for block in microphone.blocks():
                    rms, peak = level_dbfs(block)
                    bar = "#" * max(0, min(40, round((rms + 60) * 40 / 60)))
                    sys.stderr.write(
                        f"\r{rms:6.1f} dBFS  {bar:<40} {'CLIPPING' if peak >= -0.1 else '        '}"
                    )
                    sys.stderr.flush()
            except KeyboardInterrupt:
                note("")
