"""Taking the assistant's own voice out of the microphone, and noise.

In: what the loudspeaker was given, and what the microphone heard, both counted in samples. Out: as
many samples without the echo. Nothing is known of clocks: two devices that run count the same time,
so what was played and what was heard differ by a delay, which is found by cross-correlation and
followed. The linear part is speexdsp's canceller (``pyaec``); what it leaves is silenced until
somebody speaks over it. Noise suppression and gain are WebRTC's (``webrtc-noise-gain``).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from edge_gemma.errors import MissingExtra, UsageError
from edge_gemma.hearing.samples import RATE_HZ, check_samples
from edge_gemma.hearing.sound import Resampler

# samples ``[n]`` float32 at 16 kHz → as many, perhaps some of them a little later
SoundFilter = Callable[[np.ndarray], np.ndarray]
# (heard [256], played [256]) float32 → (what is left, what is left with the residue suppressed)
Filter = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
State = Literal["idle", "learning", "cancelling", "no echo"]

FRAME = 256  # samples: 16 ms, a power of two as speexdsp wants it
_TAIL = 4096  # samples of echo that the canceller models: 256 ms
_LEAD = 160  # samples: the filter begins 10 ms before the echo, so that a drift stays in it
_WINDOW = 16384  # samples that a delay is found in: 1 s
_SEARCH = (-1600, 9600)  # samples of delay that are looked at: −0.1 … 0.6 s
_LOOK_EVERY = RATE_HZ // 2
_LESSON = 3 * RATE_HZ  # samples that a new filter is taught with
_N_LESSONS = 4  # times that it hears them at most
_TAUGHT = 10.0 ** (-20 / 10)  # of the lesson's power may be left: the filter knows the room
_FIRST_LOOK = (
    2 * RATE_HZ
)  # samples played before the first look: a lesson too short teaches too little
_PROBATION = 2 * RATE_HZ  # samples played that a new filter follows before it is trusted
_GIVE_UP = 4 * RATE_HZ  # samples played without an echo found: there is none (headphones)
_REACH = (16, 640)  # samples between the filter's begin and the echo; outside it is aligned anew
_KEPT = 40 * RATE_HZ  # samples of played sound: the microphone's queue may be 30 s behind
_ACTIVE = 10.0**-6  # power of played sound that counts as such: −60 dBFS
_DECAY = int(0.3 * RATE_HZ)  # samples that a room goes on ringing
_RINGS = _SEARCH[1] + _DECAY  # samples: so long after it was played a sound may be heard
# The double-talk rule: the power that is left with the residue suppressed, over six frames, against
# that of the echo taken out, over twelve. Own speech alone leaves less than −16 dB once the filter
# knows the room (docs/talk.md); a user as loud as the echo leaves about −5 dB.
_N_LEFT, _N_TAKEN = 6, 12
_DOUBLE_TALK = 10.0 ** (-16 / 10)
_HANG = int(0.5 * RATE_HZ) // FRAME  # frames it holds on: a word's closures are softer than that
_AHEAD = 3  # frames that wait for what the rule says of those behind them: a word's first sound
_PEAK = 7.0  # a correlation so many times its RMS is an echo


class EchoCanceller:
    """Played and heard samples → what was heard beside the echo.

    ``played`` is called from the loudspeaker's thread with everything it gives out, silence
    included; ``clean`` from whoever reads the microphone. While nothing is played the microphone
    passes unchanged. Until the delay is known (about a second of sound, once) the microphone is
    silent while something is played (``state`` learning); where no echo is found in four seconds
    it passes unchanged (``no echo``).

    Raises MissingExtra.
    """

    def __init__(self) -> None:
        self._new_filter = _speex()  # raises now, not at the first sound
        self._lock = threading.Lock()
        self._is_stale = False
        self._arrived: deque[tuple[np.ndarray, int, bool]] = deque()
        self.restart()

    def restart(self) -> None:
        """A device was opened anew: nothing is known any more."""
        with self._lock:
            self._arrived.clear()
        self.state: State = "idle"
        self.delay_s: float | None = None  # from played to heard, as the samples are counted
        self._resampler: tuple[int, Resampler] | None = None
        self._played = _Tape(_KEPT)
        self._heard = _Tape(_LESSON)
        self._waiting = np.zeros(0, np.float32)
        self._ahead: list[np.ndarray] = []
        self._begun = False
        self._offset = 0  # heard sample t stands beside played sample t + offset
        self._shift: int | None = None  # what the filter is aligned to; None: not known yet
        self._candidate: int | None = None
        self._filter: Filter | None = None
        self._n_active = self._n_looked = 0  # samples of sound played, and at the last look
        self._n_trusted = 0  # samples of sound after which the filter is trusted
        self._left: deque[float] = deque(maxlen=_N_LEFT)
        self._taken: deque[float] = deque(maxlen=_N_TAKEN)
        self._open = 0  # frames that the rule still holds
        self._before = self._after = 0.0  # energies, for echo_left_db

    def reopened(self) -> None:
        """The loudspeaker begins to count anew; from any thread."""
        self._is_stale = True

    def played(self, samples: np.ndarray, rate_hz: int, *, harmless: bool = False) -> None:
        """``samples [n]`` float32 went to the loudspeaker. ``harmless``: nobody takes them for
        speech (a short tone), so the microphone is not silenced for them while the room is unknown.
        """
        with self._lock:
            self._arrived.append((samples, rate_hz, harmless))

    def lost(self, n: int) -> None:
        """The microphone dropped ``n`` samples here."""
        self._heard.push(np.zeros(n, np.float32))

    @property
    def echo_left_db(self) -> float | None:
        """Power that is left of the microphone's sound while something is played, against what was
        heard; None before anything was cancelled. With a user speaking it says little.
        """
        if not self._before:
            return None
        return round(10 * float(np.log10(max(self._after / self._before, 1e-12))), 1)

    def clean(self, samples: np.ndarray) -> np.ndarray:
        """``samples [n]`` at 16 kHz → as many, 16 ms later; 64 ms while something is played.
        Raises MediaError.
        """
        if self._is_stale:
            self._is_stale = False
            self.restart()
        self._take_played()
        if not self._begun:
            self._begun, self._offset = True, self._played.end - self._heard.end
        data = np.concatenate([self._waiting, check_samples(samples)])
        n_whole = len(data) // FRAME * FRAME
        self._waiting = data[n_whole:]
        ready: list[np.ndarray] = []
        for start in range(0, n_whole, FRAME):
            ready += self._frame(data[start : start + FRAME])
        return np.concatenate(ready) if ready else np.zeros(0, np.float32)

    def _take_played(self) -> None:
        with self._lock:
            arrived = list(self._arrived)
            self._arrived.clear()
        for samples, rate_hz, harmless in arrived:
            if self._resampler is None or self._resampler[0] != rate_hz:
                self._resampler = rate_hz, Resampler(rate_hz)
            self._played.push(self._resampler[1].push(samples), harmless)

    def _frame(self, heard: np.ndarray) -> list[np.ndarray]:
        """The frames that are ready: while something is played, up to ``_AHEAD`` wait."""
        at = self._heard.end + self._offset
        self._heard.push(heard)
        if not self._may_echo(at):
            ready, self._ahead = [*self._ahead, heard], []
            return ready
        beside = self._played.read(at - (self._shift or 0), FRAME)
        self._n_active += FRAME
        if self._n_active >= max(_FIRST_LOOK, self._n_looked + _LOOK_EVERY):
            self._n_looked = self._n_active
            self._look()
        speaking, left = self._judged(heard, beside)
        self._ahead.append(left)
        ready, self._ahead = self._ahead[:-_AHEAD], self._ahead[-_AHEAD:]
        return ready if speaking else [np.zeros_like(frame) for frame in ready]

    def _may_echo(self, at: int) -> bool:
        """Whether something that was played may be heard at ``at``; wherever it is looked for,
        until the delay is known.
        """
        first, last, known = at - _RINGS, at - _SEARCH[0], False
        if self._filter is not None and self._shift is not None:
            begins, known = at - self._shift, True
            first, last = begins - _REACH[1] - _DECAY, begins - _REACH[0] + FRAME
        return self._played.has_sound(first, last - first, harmless=known)

    def _judged(self, heard: np.ndarray, beside: np.ndarray) -> tuple[bool, np.ndarray]:
        """Whether somebody speaks, and the sound without the echo."""
        if self._filter is None:
            return self.state == "no echo", heard
        left, suppressed = self._filter(heard, beside)
        if self._n_active < self._n_trusted:
            return False, left
        self.state = "cancelling"
        return self._somebody_speaks(heard, suppressed), left

    def _somebody_speaks(self, heard: np.ndarray, left: np.ndarray) -> bool:
        self._left.append(float(np.mean(np.square(left))))
        self._taken.append(float(np.mean(np.square(heard - left))))
        is_more = np.mean(self._left) > _DOUBLE_TALK * np.mean(self._taken)
        is_sound = np.mean(self._left) > _ACTIVE
        if is_more and is_sound:
            self._open = _HANG
        else:
            self._open = max(0, self._open - 1)
        self._before += float(np.sum(np.square(heard)))
        self._after += float(np.sum(np.square(left)))
        return self._open > 0

    def _look(self) -> None:
        """Find the delay in the last second; align and teach a new filter where it is not the one
        that is known.
        """
        found = self._delay()
        if self._filter is None and self.state == "idle":
            self.state = "learning"
        if found is None:
            self._candidate = None
            if self._filter is None and self._n_active >= _GIVE_UP:
                self.state = "no echo"
            return
        if self._shift is not None and _REACH[0] <= found - self._shift <= _REACH[1]:
            self._candidate = None
            self.delay_s = found / RATE_HZ
        elif self._candidate is not None and abs(found - self._candidate) < _REACH[0]:
            self._align(found)
        else:
            self._candidate = found  # believed when it is found again

    def _delay(self) -> int | None:
        """Samples from played to heard, by the generalized cross-correlation with phase transform
        (Knapp and Carter 1976); None where it has no clear peak.
        """
        low, high = _SEARCH
        start = self._heard.end - _WINDOW
        heard = self._heard.read(start, _WINDOW)
        played = self._played.read(start + self._offset - high, _WINDOW + high - low)
        size = 2 * _WINDOW
        spectrum = np.fft.rfft(heard, size) * np.conj(np.fft.rfft(played, size))
        magnitude = np.abs(spectrum)
        loudest = float(magnitude.max())
        if not loudest:
            return None
        # bins without sound have a phase, but it says nothing
        weight = np.where(magnitude > 1e-4 * loudest, 1 / np.maximum(magnitude, 1e-12), 0)
        peaks = np.fft.irfft(spectrum * weight, size)
        # heard[t] is played[t + high − delay]: lag −(high − delay), modulo the size
        lags = peaks[np.arange(low - high, 1)]
        best = int(np.argmax(lags))
        if lags[best] < _PEAK * float(np.sqrt(np.mean(np.square(lags)))):
            return None
        return low + best

    def _align(self, delay: int) -> None:
        """Teach a new filter what was played and heard of late. It is used once it takes the echo
        out; until then the microphone stays silent, as in half-duplex.
        """
        self._candidate = delay
        shift, new = delay - _LEAD, self._new_filter()
        start = self._heard.end - _LESSON
        heard = self._heard.read(start, _LESSON)
        played = self._played.read(start + self._offset - shift, _LESSON)
        for _ in range(_N_LESSONS):
            left = [
                new(heard[k : k + FRAME], played[k : k + FRAME])[1]
                for k in range(0, _LESSON - FRAME + 1, FRAME)
            ]
            if np.sum(np.square(left)) < _TAUGHT * np.sum(np.square(heard)):
                self._use(new, shift)
                return
        self._filter, self.state = None, "learning"

    def _use(self, new: Filter, shift: int) -> None:
        self._filter, self._shift, self._candidate = new, shift, None
        self.delay_s = (shift + _LEAD) / RATE_HZ
        self._n_trusted = self._n_active + _PROBATION
        self._left.clear()
        self._taken.clear()
        self._open = 0


class _Tape:
    """The last ``n_kept`` samples of a stream, read by their number; zero where there is none."""

    def __init__(self, n_kept: int):
        self._n_kept, self._data, self.end = n_kept, np.zeros(n_kept, np.float32), 0
        # ends of blocks that were loud, and whether they were harmless
        self._sounds: deque[tuple[int, bool]] = deque(maxlen=n_kept // FRAME)

    def push(self, samples: np.ndarray, harmless: bool = False) -> None:
        for start in range(0, len(samples), FRAME):
            self._push(samples[start : start + FRAME], harmless)

    def _push(self, samples: np.ndarray, harmless: bool) -> None:
        at = (self.end + np.arange(len(samples))) % self._n_kept
        self._data[at] = samples
        self.end += len(samples)
        if float(np.mean(np.square(samples))) > _ACTIVE:
            self._sounds.append((self.end, harmless))

    def has_sound(self, start: int, n: int, *, harmless: bool = True) -> bool:
        """Whether any of those samples is louder than silence; without ``harmless``, of those that
        are not.
        """
        for end, is_harmless in reversed(self._sounds):
            if end <= start + n and (harmless or not is_harmless):
                return end > start
        return False

    def read(self, start: int, n: int) -> np.ndarray:
        index = start + np.arange(n)
        known = (index >= max(0, self.end - self._n_kept)) & (index < self.end)
        return np.where(known, self._data[index % self._n_kept], 0).astype(np.float32)


def _speex() -> Callable[[], Filter]:
    """What makes a new filter. Raises MissingExtra."""
    try:
        from pyaec import Aec
    except ImportError:
        raise MissingExtra("Echo cancelling", "voice") from None

    def new_filter() -> Filter:
        # the suppressor makes speech thin: it decides, the other one is heard
        linear, suppressing = (Aec(FRAME, _TAIL, RATE_HZ, suppress) for suppress in (False, True))

        def cancel(heard: np.ndarray, played: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            sound = _pcm(heard).tolist(), _pcm(played).tolist()
            return _floats(linear.cancel_echo(*sound)), _floats(suppressing.cancel_echo(*sound))

        return cancel

    return new_filter


def _floats(pcm: list[int]) -> np.ndarray:
    return np.array(pcm, np.float32) / 32768


def _pcm(samples: np.ndarray) -> np.ndarray:
    return (np.clip(samples, -1, 1) * 32767).astype("<i2")


def noise_filter(noise_suppression: int = 0, gain: int = 0) -> SoundFilter:
    """WebRTC's noise suppression (0 off … 4 strongest) and automatic gain (0 off, else the target
    in dB below full scale, up to 31), which work on 10 ms: up to so much comes later. Raises
    UsageError, MissingExtra.
    """
    for name, value, most in (
        ("noise suppression", noise_suppression, 4),
        ("gain", gain, 31),
    ):
        if not isinstance(value, int) or not 0 <= value <= most:
            raise UsageError(f"{name} is {value!r}; expected 0 (off) to {most}")
    try:
        from webrtc_noise_gain import AudioProcessor
    except ImportError:
        raise MissingExtra("Noise suppression and gain", "voice") from None
    processor: Any = AudioProcessor(gain, noise_suppression)
    step = RATE_HZ // 100
    waiting = np.zeros(0, np.float32)

    def filtered(samples: np.ndarray) -> np.ndarray:
        nonlocal waiting
        data = np.concatenate([waiting, check_samples(samples)])
        n_whole = len(data) // step * step
        waiting = data[n_whole:]
        parts = [
            np.frombuffer(processor.Process10ms(_pcm(data[at : at + step]).tobytes()).audio, "<i2")
            for at in range(0, n_whole, step)
        ]
        if not parts:
            return np.zeros(0, np.float32)
        return np.concatenate(parts).astype(np.float32) / 32768

    return filtered
