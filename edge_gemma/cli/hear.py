"""transcribe, translate and ask: speech in a file or in the microphone."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from edge_gemma.cli.answering import Cost, collect, finish, load_model, stream
from edge_gemma.cli.common import (
    BundleArg,
    JsonOption,
    LanguageOption,
    PadAudioOption,
    StatsOption,
    note,
    print_json,
)
from edge_gemma.cli.options import LOADING, LoadingOptions, SamplingOptions, grouped

if TYPE_CHECKING:
    import numpy as np

    from edge_gemma.conversation.chat import Chat
    from edge_gemma.conversation.transcription import ListenOptions, Segment
    from edge_gemma.hearing.devices import Microphone
    from edge_gemma.hearing.sound import AudioFile
    from edge_gemma.model import Model

FileArg = Annotated[
    str | None,
    typer.Argument(
        metavar="FILE",
        help="A sound file (wav, flac, ogg, mp3, m4a, webm …) of any length, rate and channels.",
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


def open_chat(
    bundle: str,
    loading: LoadingOptions,
    options: ListenOptions,
    system: str | None = None,
    tools: Sequence[Mapping] = (),
) -> tuple[Model, Chat]:
    """A bundle that hears, loaded, and a chat. Raises UnsupportedModel for one that does not
    hear, before anything is loaded.
    """
    model, _ = load_model(bundle, loading, ("audio",), structured=bool(tools))
    return model, model.chat(system=system, tools=tools, pad_audio=options.pad_audio)


def _check_source(file: str | None, mic: bool) -> None:
    from edge_gemma.errors import UsageError

    if file is None and not mic:
        raise UsageError("give a sound file or --mic")
    if file is not None and mic:
        raise UsageError("give a sound file or --mic, not both")


def _blocks(file: str | None, microphone_name: str | None) -> Iterator[np.ndarray]:
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
        for text in file.notes:
            note(f"note: {text}")


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
    options = listen_options(bundle, pad_audio, pause, sampling)
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
    options = listen_options(bundle, pad_audio, pause, sampling)
    _segments(bundle, loading, _blocks(file, name), instruction, options, layout)


Layout = Literal["text", "srt", "vtt", "json"]


def _layout(srt: bool, vtt: bool, as_json: bool) -> Layout:
    from edge_gemma.errors import UsageError

    layouts: dict[Layout, bool] = {"srt": srt, "vtt": vtt, "json": as_json}
    chosen = [layout for layout, on in layouts.items() if on]
    if len(chosen) > 1:
        raise UsageError("choose one of --srt, --vtt and --json")
    return chosen[0] if chosen else "text"


def listen_options(
    bundle: str, pad_audio: bool, pause: float, sampling: SamplingOptions
) -> ListenOptions:
    from edge_gemma.conversation.transcription import ListenOptions
    from edge_gemma.hearing.utterances import VadSettings

    return ListenOptions(
        pad_audio=pad_audio, vad=VadSettings(end_s=pause), sampling=sampling.sampling(bundle)
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

    model, chat = open_chat(bundle, loading, options)
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
    from edge_gemma.conversation.subtitles import cue

    if layout == "json":
        start_s, end_s = round(segment.start_s, 3), round(segment.end_s, 3)
        print_json({"start_s": start_s, "end_s": end_s, "text": segment.text})
    elif layout == "text":
        print(segment.text, flush=True)
    else:
        print(cue(segment, number if layout == "srt" else None), flush=True)


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
    options = ListenOptions(pad_audio=pad_audio, sampling=sampling.sampling(bundle))
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
    from edge_gemma.hearing.sound import read_audio
    from edge_gemma.sources import typed

    return read_audio(typed(path))


def _one_utterance(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    from edge_gemma.hearing.utterances import SpeechDetector

    detector = SpeechDetector()
    for block in blocks:
        for event in detector.push(block):
            yield event.samples
            if event.kind in ("cut", "end"):
                return
