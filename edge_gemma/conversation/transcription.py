"""Speech in a file or stream → segments of text, each utterance asked by itself.

In: a chat, and a sound file or blocks of 16 kHz samples. Out: :class:`Segment` records, or an
answer about a sound. Memory does not grow with the length of the sound.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from edge_gemma.conversation.chat import Chat
from edge_gemma.conversation.live_turn import LiveTurn
from edge_gemma.conversation.stream import Chunk
from edge_gemma.hearing.samples import RATE_HZ
from edge_gemma.hearing.sound import AudioFile, warn
from edge_gemma.hearing.utterances import SpeechDetector, UtteranceEvent, VadSettings
from edge_gemma.options import Sampling

MIN_CLIP = RATE_HZ // 10  # samples; a shorter piece holds no word

# The wording Gemma 3n's authors give for speech (ai.google.dev/gemma/docs/capabilities/audio).
TRANSCRIBE = "Transcribe the following speech segment in {language}:"
TRANSCRIBE_ANY = "Transcribe the following speech segment:"
TRANSLATE = "Transcribe the following speech segment in {language}, then translate it into {to}:"
TRANSLATE_ONLY = "Translate the following speech segment into {to}:"


Source = str | os.PathLike[str] | bytes | Iterable[np.ndarray]


@dataclass(frozen=True)
class ListenOptions:
    """``instruction`` stands before the audio, so that it is prefilled before the user speaks.

    ``pad_audio`` is the reference mode: every clip takes 188 rows as in transformers; without
    (short mode) an answer starts sooner and may differ from the reference. ``barge_in``: speech
    stops a running answer; turn it off where the microphone hears the loudspeaker.

    ``expect_end``: at each pause, what follows the turn is computed in case it was its end, which
    hides encoder tail and prefill in the pause; speech that goes on takes it back exactly.
    ``ask_for_end``: the model is asked then whether the turn is over, for ``vad.rule``.

    ``shortest_s``: an utterance with less speech is no turn (a cough, the rest of a wake word).
    ``look_back_s``: so much of what was not heard before a wake word was known is heard all the
    same, since it is known late.
    """

    instruction: str = ""
    pad_audio: bool = False
    barge_in: bool = True
    expect_end: bool = True
    ask_for_end: bool = False
    shortest_s: float = 0.0
    look_back_s: float = 0.0
    vad: VadSettings = VadSettings()
    sampling: Sampling | None = None  # None: as the model's authors sample it


@dataclass(frozen=True, eq=False)
class Utterance:
    """A stretch of speech of at most 30 s: ``samples [n]`` float32 at 16 kHz. Seconds from the
    beginning.
    """

    start_s: float
    end_s: float
    samples: np.ndarray


@dataclass(frozen=True)
class Segment:
    """A stretch of speech and what the model made of it. Seconds from the beginning."""

    start_s: float
    end_s: float
    text: str


def transcribe(
    chat: Chat,
    source: Source,
    instruction: str = TRANSCRIBE_ANY,
    options: ListenOptions = ListenOptions(),
    detector: SpeechDetector | None = None,
) -> Generator[Segment, None, None]:
    """Speech in a sound file, or in blocks of 16 kHz mono float32 samples, → a segment per
    utterance. An utterance beyond 30 s gives several, cut at pauses.

    ``instruction`` stands before each: see TRANSCRIBE, TRANSLATE. Raises MediaError,
    UnsupportedModel (a bundle that cannot hear), ContextFull, RuntimeFailure.
    """
    detector = detector or SpeechDetector(options.vad)
    turn: LiveTurn | None = None
    start = n = 0  # samples
    for event in _events(blocks_of(source), detector):
        if event.kind == "start":
            start = event.at
        if event.kind == "start" or turn is None:
            turn, n = live_turn(chat, instruction, options), 0
        turn.push(event.samples)
        n += len(event.samples)
        if event.kind in ("cut", "end"):
            if n >= MIN_CLIP:
                turn.finish()
                text = "".join(chunk.text for chunk in turn.generate(options.sampling))
                chat.reset()
                yield Segment(start / RATE_HZ, event.at / RATE_HZ, text.strip())
            else:
                turn.abandon()
            turn, start = None, event.at  # behind a cut the next piece begins at once


def utterances(source: Source, detector: SpeechDetector | None = None) -> Iterator[Utterance]:
    """The speech in a sound file or in blocks, as :func:`transcribe` cuts it. Raises MediaError."""
    detector = detector or SpeechDetector()
    pieces: list[np.ndarray] = []
    start = 0  # samples
    for event in _events(blocks_of(source), detector):
        if event.kind == "start":
            start, pieces = event.at, []
        pieces.append(event.samples)
        if event.kind in ("cut", "end"):
            samples = np.concatenate(pieces)
            if len(samples) >= MIN_CLIP:
                yield Utterance(start / RATE_HZ, event.at / RATE_HZ, samples)
            start, pieces = event.at, []  # behind a cut the next piece begins at once


def ask(
    chat: Chat, source: Source, question: str, options: ListenOptions = ListenOptions()
) -> Generator[Chunk, None, None]:
    """A question about a sound of at most 30 s → the answer. The question stands before the sound.

    Raises what :func:`transcribe` raises.
    """
    turn = live_turn(chat, question, options)
    for block in blocks_of(source):
        turn.push(block)
    turn.finish()
    yield from turn.generate(options.sampling)


def live_turn(chat: Chat, instruction: str, options: ListenOptions) -> LiveTurn:
    """A turn that is about to be spoken, as ``options`` say. Raises UsageError now for a schema or
    grammar that its answer could not be held to.
    """
    if options.sampling is not None:
        chat.session.check(options.sampling)
    return LiveTurn(
        chat,
        instruction,
        pad_audio=options.pad_audio,
        max_tokens=(options.sampling or Sampling()).max_tokens,
    )


def blocks_of(source: Source) -> Iterator[np.ndarray]:
    """The blocks of a sound file, which is closed at the end, or of what gives blocks already."""
    if not isinstance(source, str | os.PathLike | bytes):
        yield from source
        return
    with AudioFile(source) as file:
        yield from file.blocks()
        warn(file.notes)


def _events(blocks: Iterable[np.ndarray], detector: SpeechDetector) -> Iterator[UtteranceEvent]:
    for block in blocks:
        yield from detector.push(block)
    yield from detector.finish()
