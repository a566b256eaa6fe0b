"""A microphone and a loudspeaker joined by a room on one clock, for conversations that go on and
on.

In: what the user says, block by block. Out: the product's own devices' interface (:class:`Ears` is
a ``Microphone``, :class:`Mouth` plays as a ``Speaker`` does). The clock is the samples that the
microphone gave: it runs as fast as it is read, or at ``speed`` times real time. Devices can be cut
off and come back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from edge_gemma.benchmarks.room import BLOCK, RATE_HZ, Room
from edge_gemma.errors import DeviceLost
from edge_gemma.hearing.devices import Microphone
from edge_gemma.hearing.sound import Resampler

_EARLY = RATE_HZ // 10  # samples before its end that play returns, as a Speaker does
_POLL_S = 0.05


class LiveRoom:
    """``on_block`` is told everything that the loudspeaker gives out
    (:meth:`edge_gemma.hearing.echo.EchoCanceller.played`).
    """

    def __init__(self, room: Room, on_block: Callable[[np.ndarray, int], None] | None = None):
        self._response, self._on_block = room.response(), on_block
        self._size = 1 << (BLOCK + len(self._response)).bit_length()
        self._spectrum = np.fft.rfft(self._response, self._size)
        self._echo = np.zeros(BLOCK + len(self._response), np.float32)  # still to be heard
        self._noise = np.random.default_rng(room.seed + 1)
        self._noise_level = 10 ** (room.noise_dbfs / 20)
        self._change = threading.Condition()
        self._waiting: deque[_Sound] = deque()
        self.now: _Sound | None = None  # the last one that was played
        self.n = 0  # samples since the beginning
        self.n_away = 0  # of them: the microphone was away
        self.speaker_lost = False

    @property
    def sounding(self) -> bool:
        """Whether the loudspeaker has something to play."""
        return bool(self._waiting)

    def heard(self, user: np.ndarray) -> np.ndarray:
        """One block of the clock: what the microphone hears of ``user [512]`` and the echo."""
        played = self._played()
        if played.any():
            echo = np.fft.irfft(np.fft.rfft(played, self._size) * self._spectrum, self._size)
            self._echo += echo[: len(self._echo)].astype(np.float32)
        noise = self._noise.standard_normal(BLOCK).astype(np.float32) * self._noise_level
        heard = user + self._echo[:BLOCK] + noise
        self._echo = np.concatenate([self._echo[BLOCK:], np.zeros(BLOCK, np.float32)])
        return heard.astype(np.float32)

    def _played(self) -> np.ndarray:
        block = np.zeros(BLOCK, np.float32)
        n = 0
        with self._change:
            self.n += BLOCK
            while self._waiting and n < BLOCK:
                sound = self._waiting[0]
                taken = sound.samples[sound.n_out : sound.n_out + BLOCK - n]
                block[n : n + len(taken)] = taken
                n += len(taken)
                sound.n_out += len(taken)
                if sound.n_out >= len(sound.samples):
                    self._waiting.popleft()
            self._change.notify_all()
        if self._on_block is not None and not self.speaker_lost:
            self._on_block(block, RATE_HZ)
        return block

    def passes(self, seconds: float) -> None:
        """Time in which nobody listens."""
        for _ in range(int(seconds * RATE_HZ / BLOCK)):
            self.heard(np.zeros(BLOCK, np.float32))
            self.n_away += BLOCK

    def play(self, samples: np.ndarray, rate_hz: int) -> bool:
        """As ``Speaker.play``. Raises DeviceLost while the loudspeaker is away."""
        sound = _Sound(Resampler(rate_hz).push(samples, last=True), rate_hz)
        with self._change:
            self._check()
            self.now = sound
            self._waiting.append(sound)
            while sound.n_out < len(sound.samples) - _EARLY and sound in self._waiting:
                self._change.wait(_POLL_S)
                self._check()
            return sound.n_out >= len(sound.samples) - _EARLY

    def _check(self) -> None:
        if self.speaker_lost:
            self._waiting.clear()
            raise DeviceLost("the loudspeaker of the room is gone")

    @property
    def n_heard(self) -> int:
        """As ``Speaker.n_heard``."""
        sound = self.now
        return sound.n_out * sound.rate_hz // RATE_HZ if sound else 0

    def stop(self) -> None:
        """As ``Speaker.stop``."""
        with self._change:
            self._waiting.clear()
            self._change.notify_all()

    def lose_speaker(self, lost: bool = True) -> None:
        with self._change:
            self.speaker_lost = lost
            self._change.notify_all()


class _Sound:
    """``samples [n]`` at 16 kHz, of a sound that came at ``rate_hz``."""

    def __init__(self, samples: np.ndarray, rate_hz: int):
        self.samples, self.rate_hz, self.n_out = samples, rate_hz, 0


class Ears(Microphone):
    """Gives what ``user`` (blocks ``[512]``, or a DeviceLost) and the room sound like. ``at_end``
    is called once no more comes. ``speed`` None: as fast as it is read.
    """

    def __init__(
        self,
        room: LiveRoom,
        user: Iterator[np.ndarray | DeviceLost],
        *,
        at_end: Callable[[], None],
        speed: float | None = None,
        away_s: float = 1.0,
    ):
        super().__init__()
        self.name = "the room"
        self._room, self._user, self._at_end = room, user, at_end
        self._speed, self._away_s = speed, away_s
        self._began_s, self._n_tries = 0.0, 0

    def __enter__(self) -> Ears:
        self._began_s = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self._room.lose_speaker()

    def read(self, timeout_s: float = 1.0) -> np.ndarray:
        self._wait()
        item = next(self._user, None)
        if item is None:
            self._at_end()
            return np.zeros(0, np.float32)
        if isinstance(item, DeviceLost):
            self._n_tries = 0
            raise item
        return self._room.heard(item)

    def _wait(self) -> None:
        if self._speed is None:
            return
        due_s = self._began_s + self._room.n / RATE_HZ / self._speed
        time.sleep(max(0.0, due_s - time.monotonic()))

    def reopen(self) -> None:
        """Away for ``away_s``, half of it at each try."""
        self._room.passes(self._away_s / 2)
        self._n_tries += 1
        if self._n_tries < 2:
            raise DeviceLost("the microphone of the room is away")
        self._room.lose_speaker(False)
