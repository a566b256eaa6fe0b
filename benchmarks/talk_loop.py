"""A conversation that goes on and on: somebody speaks, is answered aloud in a room, speaks over the
answer at times; the microphone is cut off at random, and the sound server with both devices.
Nothing may grow, no thread may stay, and what was captured may not be lost.

In: a bundle that hears, clips of speech, minutes of sound. Out: a section with one row, told from
one :class:`Look` a minute. The product's own :class:`Listener` does the work; devices are
live_room.py's, whose clock is the samples, so that hours take minutes. The voice is espeak-ng
reading fixed words in place of each clause: random weights say nothing that could be read.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median

import numpy as np

from edge_gemma.benchmarks.live_room import Ears, LiveRoom
from edge_gemma.benchmarks.room import BLOCK, PASSAGE, RATE_HZ, Room, said
from edge_gemma.benchmarks.sections import Progress, Section, silent
from edge_gemma.benchmarks.talk import SENTENCES, USERS
from edge_gemma.conversation.listener import Heard, Listener
from edge_gemma.conversation.transcription import ListenOptions
from edge_gemma.conversation.voice import Synthesizer, Voice, espeak
from edge_gemma.errors import DeviceLost, UsageError
from edge_gemma.hearing.echo import EchoCanceller, noise_filter
from edge_gemma.hearing.sound import read_audio
from edge_gemma.hearing.utterances import SpeechDetector, SpeechProbability, UtteranceEvent
from edge_gemma.machine.footprint import Footprint, footprint
from edge_gemma.model import Model, load
from edge_gemma.options import Sampling
from edge_gemma.plan.records import PlanRequest

WARM_UP = 0.25  # of the minutes; buffers fill up in them
N_CTX = 1024
_CUT, _SERVER_CUT, _OVER = 0.12, 0.4, 0.25  # of utterances cut; of cuts, of both; of answers
_SILENCE = np.zeros(BLOCK, np.float32)
_PATIENCE = 120 * RATE_HZ  # samples that the user waits for an answer
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
_SLACK = RATE_HZ // 10  # samples: so much later than it came does sound leave canceller and filter


@dataclass(frozen=True)
class Look:
    """One look at the process, at ``minute`` of the sound."""

    minute: float
    memory: Footprint
    threads: int
    files: int  # open descriptors


def look(minute: float) -> Look:
    gc.collect()
    return Look(minute, footprint(), threading.active_count(), _open_files())


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # not Linux
        return 0


@dataclass(frozen=True)
class Lost:
    """``seconds`` of words that were in no utterance. ``why`` that may be: they were said over an
    answer; cut off; within a second of an answer while the canceller did not know the room yet.
    """

    at_s: float
    seconds: float
    why: str


@dataclass
class Loop:
    """What a loop gave."""

    minutes: float
    kinds: Counter[str] = field(default_factory=Counter)
    looks: list[Look] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    cuts: int = 0
    server_cuts: int = 0
    overs: int = 0  # times that the user spoke over an answer
    spoken_s: float = 0.0  # what the user said while the microphone was there
    lost: list[Lost] = field(default_factory=list)  # of it: in no utterance
    threads_left: list[str] = field(default_factory=list)
    wall_s: float = 0.0
    stopped: bool = False  # by Ctrl-C

    def settled(self) -> list[Look]:
        """The looks behind the warm-up."""
        return self.looks[int(len(self.looks) * WARM_UP) :]

    def growth_bytes(self) -> int:
        """Anonymous memory in the last third behind the warm-up over that of the first."""
        settled = self.settled()
        if len(settled) < 3:
            return 0
        part = max(1, len(settled) // 3)
        first, last = (
            median(each.memory.anon_bytes for each in looks)
            for looks in (settled[:part], settled[-part:])
        )
        return int(last - first)

    def bytes_per_hour(self) -> float:
        """The slope of a line through the looks behind the warm-up."""
        settled = self.settled()
        if len(settled) < 3:
            return 0.0
        hours = [each.minute / 60 for each in settled]
        return float(np.polyfit(hours, [each.memory.anon_bytes for each in settled], 1)[0])


class _Recorder(SpeechDetector):
    """Notes where utterances lay, in samples of the whole loop."""

    def __init__(self, taken: list[tuple[int, int]], captured: Callable[[], int]):
        super().__init__()
        self._taken, self._captured = taken, captured
        self._first, self._start = captured(), 0

    def push(self, samples: np.ndarray) -> list[UtteranceEvent]:
        return self._noted(super().push(samples))

    def finish(self) -> list[UtteranceEvent]:
        return self._noted(super().finish())

    def _noted(self, events: list[UtteranceEvent]) -> list[UtteranceEvent]:
        settings = self.settings
        before, after = (int(s * RATE_HZ) for s in (settings.pre_roll_s, settings.post_roll_s))
        for event in events:
            if event.kind == "start":
                self._start = self._first + event.at - before
            if event.kind == "end":
                self._taken.append((self._start, self._first + event.at + after))
        return events

    def restarted(self, probability: SpeechProbability | None = None) -> _Recorder:
        # not by what was pushed: silence behind a cut is of nobody's
        return _Recorder(self._taken, self._captured)


class _User:
    """Says clips, waits for the answers, speaks over some; cuts devices off. Iterate
    :meth:`blocks`.
    """

    def __init__(
        self, clips: Sequence[np.ndarray], loop: Loop, room: LiveRoom, rng: np.random.Generator
    ):
        self._clips = [(clip, *_words_in(clip)) for clip in clips]
        self._loop, self._room, self._rng = loop, room, rng
        self.answering: Callable[[], bool] = lambda: False
        self.may_speak_over: Callable[[], bool] = lambda: False
        self.look_every = 1.0  # minutes
        self.spoken: list[_Words] = []
        self.n = 0  # samples captured

    def blocks(self) -> Iterator[np.ndarray | DeviceLost]:
        next_look = 0.0
        while self._minute < self._loop.minutes:
            yield from self._utterance()
            yield from self._pause()
            if self._minute >= next_look:
                self._loop.looks.append(look(self._minute))
                next_look = self._minute + self.look_every
        yield from self._until(lambda: not self.answering())

    @property
    def _minute(self) -> float:
        return self._room.n / RATE_HZ / 60

    def _utterance(self) -> Iterator[np.ndarray | DeviceLost]:
        clip, first, last = self._clips[self._rng.integers(len(self._clips))]
        cut = len(clip)
        if is_cut := self._rng.random() < _CUT:
            cut = int(self._rng.integers(len(clip)))
        begin, over, learning = self.n, self.answering(), not self.may_speak_over()
        for at in range(0, cut, BLOCK):
            block = np.zeros(BLOCK, np.float32)
            part = clip[at : at + BLOCK]
            block[: len(part)] = part
            yield self._given(block)
        if first < cut:
            why = "over an answer" if over else "cut off" if is_cut else "alone"
            if learning and why == "alone":
                why = "to a canceller that learns"
            self.spoken.append(_Words(begin + first, begin + min(last, cut), why))
        if is_cut:
            self._loop.cuts += 1
            if self._rng.random() < _SERVER_CUT:
                self._loop.server_cuts += 1
                self._room.lose_speaker()
            yield DeviceLost("cut off")

    def _pause(self) -> Iterator[np.ndarray]:
        """Until the answer was spoken; or into the middle of it, the next words follow."""
        over = self._rng.random() < _OVER
        yield from (self._given(_SILENCE) for _ in range(int(1.2 * RATE_HZ / BLOCK)))
        if over:
            yield from self._until(lambda: self._room.sounding or not self.answering())
            n = int(self._rng.uniform(0.5, 2.0) * RATE_HZ / BLOCK)
            yield from (self._given(_SILENCE) for _ in range(n))
            if self.answering() and self.may_speak_over():
                self._loop.overs += 1
                return
        yield from self._until(lambda: not self.answering())
        yield from (self._given(_SILENCE) for _ in range(int(0.5 * RATE_HZ / BLOCK)))

    def _until(self, done: Callable[[], bool]) -> Iterator[np.ndarray]:
        until = self._room.n + _PATIENCE
        while not done() and self._room.n < until:
            if not self._room.sounding:
                time.sleep(0.002)  # it decodes: its time is not the room's
            yield self._given(_SILENCE)

    def _given(self, block: np.ndarray) -> np.ndarray:
        self.n += BLOCK
        return block


def talk_loop(
    model: Model,
    clips: Sequence[np.ndarray],
    *,
    minutes: float,
    speed: float | None = None,
    seed: int = 14,
    synthesize: Synthesizer | None = None,
    look_every: float = 1.0,
    progress: Progress = silent,
) -> Loop:
    """``minutes`` of sound, a look at the process ``look_every`` so many of them; ``speed`` 1 is
    real time, None as fast as it can. Raises UsageError (no espeak-ng), UnsupportedModel,
    MissingExtra.
    """
    loop = Loop(minutes)
    canceller = EchoCanceller()
    taken: list[tuple[int, int]] = []
    room = LiveRoom(Room(0.12), canceller.played)
    user = _User(clips, loop, room, np.random.default_rng(seed))
    user.look_every = look_every
    user.may_speak_over = lambda: canceller.state == "cancelling"
    speak = synthesize or reading(espeak("en"))
    began_s = time.monotonic()
    with model.chat(pad_audio=False) as chat:
        listener = Listener(
            chat,
            Ears(room, user.blocks(), at_end=lambda: listener.stop(), speed=speed),
            ListenOptions(sampling=Sampling(temperature=0, max_tokens=16)),
            make_voice=lambda: Voice(speak, room.play, room.stop, lambda: room.n_heard),
            detector=_Recorder(taken, lambda: user.n),
            echo=canceller,
            filters=[noise_filter(1, 3)],
            retry_s=0.5 / speed if speed else 0.01,
        )
        user.answering = lambda: listener.answering
        with closing(listener.records()) as records:
            _note(records, loop, progress)
    loop.wall_s = time.monotonic() - began_s
    loop.threads_left = [
        thread.name for thread in threading.enumerate() if thread.name.startswith("edge-gemma")
    ]
    loop.spoken_s = sum(words.end - words.begin for words in user.spoken) / RATE_HZ
    loop.lost = [lost for words in user.spoken if (lost := _lost(words, taken)) is not None]
    return loop


def section(
    folders: Sequence[Path],
    clips: Sequence[np.ndarray],
    *,
    minutes: float,
    real_time: bool = False,
    n_threads: int | None = None,
    progress: Progress = silent,
) -> Section:
    """A row for each bundle. Raises UsageError (no espeak-ng), UnsupportedModel, MissingExtra."""
    found = Section("talk loop")
    request = PlanRequest(senses=("audio",), n_ctx=N_CTX, n_threads=n_threads)
    for folder in folders:
        with load(folder, request=request) as model:
            loop = talk_loop(
                model, clips, minutes=minutes, speed=1.0 if real_time else None, progress=progress
            )
            found.rows.append({"model": model.bundle.manifest.name, **row(loop)})
        found.stopped |= loop.stopped
        for lost in loop.lost:
            found.note(f"lost: {lost.seconds:.2f} s of words at {lost.at_s:.0f} s, said {lost.why}")
        for text in sorted(set(loop.failures)):
            found.note(f"failed: {text}")
    pace = "in real time" if real_time else "as fast as it goes: the clock is the sound"
    found.note(f"{pace}; espeak-ng reads fixed words in place of the answers")
    return found


def row(loop: Loop) -> dict[str, object]:
    settled = loop.settled()
    return {
        "minutes": loop.looks[-1].minute if loop.stopped and loop.looks else loop.minutes,
        "wall_minutes": loop.wall_s / 60,
        "utterances": loop.kinds["speech"],
        "turns": loop.kinds["turn"],
        "interrupted": loop.kinds["interrupted"],
        "failed": loop.kinds["failed"],
        "cuts": loop.cuts,
        "server_cuts": loop.server_cuts,
        "spoken_s": loop.spoken_s,
        "lost_s": sum(lost.seconds for lost in loop.lost),
        "anon_warm_bytes": settled[0].memory.anon_bytes if settled else None,
        "anon_last_bytes": loop.looks[-1].memory.anon_bytes if loop.looks else None,
        "bytes_per_hour": loop.bytes_per_hour(),
        "threads_left": len(loop.threads_left),
        "files_more": settled[-1].files - settled[0].files if settled else 0,
    }


def recordings(folder: Path | None) -> list[np.ndarray]:
    """The recordings in ``folder``, or sentences of espeak-ng's voices. Raises UsageError,
    MediaError.
    """
    if folder is None:
        return [said(text, voice) for text in SENTENCES for voice in USERS]
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in SOUNDS)
    if not found:
        raise UsageError(f"no recordings in {folder}; it reads {', '.join(SOUNDS)}")
    return [read_audio(path) for path in found]


def reading(synthesize: Synthesizer) -> Synthesizer:
    """Speaks the words of ``PASSAGE``, five of them in place of each clause."""
    words = PASSAGE.split()
    parts = cycle([" ".join(words[k : k + 5]) for k in range(0, len(words), 5)])
    return lambda text: synthesize(next(parts))


def _note(records: Iterator[Heard], loop: Loop, progress: Progress) -> None:
    """All of them; after a Ctrl-C, what came until then counts."""
    try:
        for record in records:
            loop.kinds[record.kind] += 1
            if record.kind == "failed":
                loop.failures.append(record.text)
            if record.kind == "speech":
                minute, turns = record.at_s / 60, loop.kinds["turn"]
                progress(f"minute {minute:.1f} of {loop.minutes:g}, {turns} turns")
    except KeyboardInterrupt:
        loop.stopped = True


@dataclass(frozen=True)
class _Words:
    """Where words lay, in captured samples."""

    begin: int
    end: int
    why: str


def _words_in(clip: np.ndarray) -> tuple[int, int]:
    """From the first to behind the last sample of speech, as the detector has it alone. Raises
    UsageError for a clip without.
    """
    detector = SpeechDetector()
    events = [*detector.push(clip), *detector.finish()]
    starts = [event.at for event in events if event.kind == "start"]
    if not starts:
        raise UsageError("a clip of speech for the loop holds none; take another recording")
    return starts[0], max(event.at for event in events)


def _lost(words: _Words, taken: Sequence[tuple[int, int]]) -> Lost | None:
    """What of the words is in no utterance; None when all is."""
    missing = np.ones(max(0, words.end - words.begin), bool)
    for begin, end in taken:
        first = max(0, begin - _SLACK - words.begin)
        missing[first : max(0, end + _SLACK - words.begin)] = False
    n = int(missing.sum())
    return Lost(words.begin / RATE_HZ, n / RATE_HZ, words.why) if n else None
