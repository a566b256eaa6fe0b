"""A spoken conversation, timed: from the last sample of speech to the first sample of the answer's
sound, step by step; and what the assistant hears of itself.

In: a bundle that hears. Out: sections of rows. The product's own classes do the work (detector,
``LiveTurn``, ``SpokenAnswer``, ``Voice``, ``EchoCanceller``). The answer's words are fixed: each
decoded token stands for a piece of ``ANSWER``, so that random weights do not matter; every step
costs what it costs. Nothing is played: sound counts when it is handed to the loudspeaker, whose
buffer (50 ms) comes on top.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from edge_gemma.benchmarks.room import BLOCK, Room, as_loud_as, own_speech, placed, said
from edge_gemma.benchmarks.sections import Progress, Section, silent
from edge_gemma.bundles.folder import Bundle
from edge_gemma.conversation.live_turn import LiveTurn
from edge_gemma.conversation.spoken_answer import SpokenAnswer
from edge_gemma.conversation.stream import Chunk
from edge_gemma.conversation.voice import Synthesizer, Voice, espeak
from edge_gemma.errors import RuntimeFailure
from edge_gemma.hearing.echo import EchoCanceller
from edge_gemma.hearing.samples import RATE_HZ
from edge_gemma.hearing.utterances import SpeechDetector, VadSettings
from edge_gemma.hearing.wake_word import wake_word
from edge_gemma.model import Model, load
from edge_gemma.options import Sampling
from edge_gemma.plan.records import PlanRequest

QUESTION = "What will the weather be tomorrow morning, and do I need a coat?"
ANSWER = (
    "Tomorrow morning will be cool, with light rain until ten. After that the clouds break up and "
    "the sun comes out. Take a coat with you, and leave it at home in the afternoon."
)
N_CTX = 1024
STEPS = ("pause_s", "encoder_s", "prefill_s", "clause_s", "synthesis_s")
EXPECTED, EARLY, LATE = "clause by clause, end expected", "clause by clause", "whole answer first"
WAYS = (EXPECTED, EARLY, LATE)
USERS = ("en+f3", "en+m3", "en+f1", "en-us+m7", "de", "fr")
SENTENCES = (
    "Stop please, what time is it?",
    "What time is it now in Lisbon?",
    "Enough of this, thank you.",
    "Tell me something else instead.",
)
WAKE_WORDS = {"okay_nabu": "Okay Nabu", "hey_jarvis": "Hey Jarvis", "alexa": "Alexa"}
WAKE_VOICES = ("en", "en+f3", "en+m3", "en-us", "en-us+f1", "en+m7", "en-gb-x-rp", "en-us+m2")


class _Forced(LiveTurn):
    """A turn whose answer's tokens are written as ``pieces``."""

    pieces: Sequence[str] = ()
    finished_s = 0.0

    def finish(self) -> None:
        super().finish()
        self.finished_s = time.perf_counter()

    def generate(self, sampling: Sampling | None = None) -> Generator[Chunk, None, None]:
        left = iter(self.pieces)
        for chunk in super().generate(sampling):
            text = next(left, "") if chunk.token_ids else ""
            yield replace(chunk, text=text)


class _Late(Voice):
    """The same voice, told everything at the end."""

    _all = ""

    def push(self, text: str) -> None:
        self._all += text

    def finish(self) -> None:
        super().push(self._all)
        super().finish()


def talk(
    bundles: Sequence[Path],
    *,
    voice: str = "en",
    repeats: int = 5,
    pause_s: float = VadSettings.end_s,
    n_threads: int | None = None,
    progress: Progress = silent,
) -> Section:
    """Medians of ``repeats`` turns each way, interleaved. The question comes in real time, and the
    silence behind it, so that what is done in it counts. Raises UsageError (no espeak-ng),
    UnsupportedModel, RuntimeFailure (the question was not heard).
    """
    section = Section("talk")
    synthesize = espeak(voice)
    question = said(QUESTION)
    request = PlanRequest(senses=("audio",), n_ctx=N_CTX, n_threads=n_threads)
    for folder in bundles:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        with load(folder, request=request) as model:
            pieces = [model.detokenize([token]) for token in model.tokenize(ANSWER)]
            for number in range(repeats):
                for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                    progress(f"turn {number + 1} of {repeats}, {way}")
                    found[way].append(_turn(model, question, pieces, synthesize, way, pause_s))
        for way, rounds in found.items():
            medians = {name: median(turn[name] for turn in rounds) for name in rounds[0]}
            spread = (max(r["total_s"] for r in rounds) - min(r["total_s"] for r in rounds)) / 2
            section.rows.append(
                {
                    "model": Bundle.open(folder).manifest.name,
                    "way": way,
                    **medians,
                    "total_s_spread": spread / medians["total_s"],
                }
            )
    section.note(
        f"the answer is forced: {len(pieces)} tokens stand for a fixed text, espeak-ng {voice}"
    )
    return section


def _turn(
    model: Model,
    question: np.ndarray,
    pieces: Sequence[str],
    synthesize: Synthesizer,
    way: str,
    pause_s: float,
) -> dict[str, float]:
    detector = SpeechDetector(VadSettings(end_s=pause_s))
    sampling = Sampling(temperature=0, max_tokens=len(pieces))
    kind = _Late if way == LATE else Voice
    with model.chat(pad_audio=False) as chat:
        turn = _Forced(chat, pad_audio=False, max_tokens=len(pieces))
        turn.pieces = pieces
        last = _listened(detector, turn, question, expect_end=way == EXPECTED)
        began = time.perf_counter()
        voice = kind(synthesize, lambda samples, rate_hz: True)
        answer = SpokenAnswer(chat, turn, sampling, voice, heard_s=began, ending=threading.Event())
        answer.close()
        if voice.error or not (
            voice.first_sound_s and voice.first_clause_s and voice.first_synthesized_s
        ):
            raise RuntimeFailure(f"the answer was not spoken: {voice.error}")
        assert turn.first_token_s
        stamps = (turn.finished_s, turn.first_token_s, voice.first_clause_s, voice.first_sound_s)
        parts = np.diff([began, *stamps])
        steps = dict(zip(STEPS, [began - last, *map(float, parts)], strict=True))
        return {**steps, "total_s": sum(steps.values())}


def _listened(
    detector: SpeechDetector, turn: LiveTurn, question: np.ndarray, *, expect_end: bool
) -> float:
    """The question and its end go into the turn. Returns when its last sample came, by
    time.perf_counter. Raises RuntimeFailure.
    """
    sound = np.concatenate([question, np.zeros(3 * RATE_HZ, np.float32)])
    began = time.perf_counter()
    for n in range(BLOCK, len(sound) + 1, BLOCK):
        behind_s = time.perf_counter() - (began + n / RATE_HZ)
        time.sleep(max(0.0, -behind_s))
        for event in detector.push(sound[n - BLOCK : n]):
            turn.push(event.samples)
            if event.kind == "end" and n > len(question):
                return began + len(question) / RATE_HZ
        if expect_end and behind_s < BLOCK / RATE_HZ and detector.pausing:
            turn.expect_end()
    raise RuntimeFailure("the question was not heard as an utterance")


@dataclass
class _Hearing:
    """Samples heard when an utterance began, the first and the count."""

    starts: list[int]
    state: str
    left_db: float | None


def hearing_itself(
    *,
    delays_s: Sequence[float] = (0.04, 0.12, 0.25),
    minutes: float = 10.0,
    n_users: int = 12,
    progress: Progress = silent,
) -> Section:
    """In a virtual room: false barge-ins in ``minutes`` of own speech, and how soon a user as loud
    as the echo is heard over it. Raises UsageError (no espeak-ng), MissingExtra.
    """
    section = Section("talk room")
    played = own_speech(60 * minutes)
    for delay_s in delays_s:
        room = Room(delay_s)
        progress(f"delay {delay_s:g} s: {minutes:g} minutes of own speech")
        alone = _hear(room, played, np.zeros_like(played))
        heard_ms = []
        for number in range(n_users):
            progress(f"delay {delay_s:g} s: user {number + 1} of {n_users}")
            at_s = 8.0 + 0.37 * number
            part = played[: int((at_s + 2) * RATE_HZ)]
            text, speaker = SENTENCES[number % len(SENTENCES)], USERS[number % len(USERS)]
            voice = as_loud_as(said(text, speaker), room.echo(part))
            found = _hear(room, part, placed(voice, at_s, len(part)))
            after = [at for at in found.starts if at > at_s * RATE_HZ]
            heard_ms.append(1000 * (after[0] / RATE_HZ - at_s) if after else float("inf"))
        section.rows.append(
            {
                "delay_s": delay_s,
                "minutes": minutes,
                "false_barge_ins": len(alone.starts),
                "per_hour": 60 * len(alone.starts) / minutes,
                "left_db": alone.left_db,
                "users": n_users,
                "heard_ms": median(heard_ms),
                "heard_most_ms": max(heard_ms),
                "within_300_ms": sum(ms <= 300 for ms in heard_ms) / n_users,
            }
        )
    section.note("espeak-ng speaks for both; −6 dB, 60 dB of decay in 0.3 s, noise at −60 dBFS")
    return section


def _hear(room: Room, played: np.ndarray, user: np.ndarray) -> _Hearing:
    canceller, detector, starts, n = EchoCanceller(), SpeechDetector(), [], 0
    for out, heard in room.live(played, user):
        canceller.played(out, RATE_HZ)
        n += len(heard)
        events = detector.push(canceller.clean(heard))
        starts += [n for event in events if event.kind == "start"]
    return _Hearing(starts, canceller.state, canceller.echo_left_db)


def wake_words(*, minutes: float = 5.0, progress: Progress = silent) -> Section:
    """Wake words spoken by espeak-ng's voices: misses; and false alarms while it reads a text."""
    section = Section("talk wake words")
    silence = np.zeros(RATE_HZ, np.float32)
    passage = own_speech(60 * minutes)
    for name, spoken in WAKE_WORDS.items():
        progress(f"wake word {name}")
        missed = 0
        for speaker in WAKE_VOICES:
            sound = np.concatenate([silence, said(spoken, speaker), silence])
            missed += not _alarms(wake_word(name), sound)
        section.rows.append(
            {
                "name": name,
                "spoken": len(WAKE_VOICES),
                "missed": missed,
                "false_alarms": _alarms(wake_word(name), passage),
                "minutes": minutes,
            }
        )
    return section


def _alarms(gate: Callable[[np.ndarray], bool], sound: np.ndarray) -> int:
    return sum(gate(sound[at : at + BLOCK]) for at in range(0, len(sound), BLOCK))
