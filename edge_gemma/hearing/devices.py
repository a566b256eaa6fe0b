"""Microphones and loudspeakers. The only module that imports sounddevice; its
errors become ours.

In: a device's number or name. Out: blocks ``[n]`` float32 at 16 kHz mono
(:class:`Microphone`), or sound (:class:`Speaker`). It does not know speech,
features or models.
"""

from __future__ import annotations

import ctypes
import functools
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np

from edge_gemma.errors import DeviceLost, MediaError, MissingExtra, UsageError, first_line
from edge_gemma.hearing.samples import BLOCK_SAMPLES, RATE_HZ
from edge_gemma.hearing.sound import Resampler

# without a block for so long the device is gone: PortAudio says nothing when a
# sound server dies
LOST_AFTER_S = 0.8
_POLL_S = 0.1  # how often a waiting reader looks whether the device is still there
_EARLY_S = 0.1  # play returns so long before its end, so that the next sound follows without a gap
_LATENCY_S = 0.05  # asked of a loudspeaker: a barge-in must cut its sound within 100 ms
_RATES_HZ = (48000, 44100, 16000)  # tried where a loudspeaker does not take its own default rate

Kind = Literal["input", "output"]
_THING: dict[Kind, str] = {"input": "microphone", "output": "loudspeaker"}


@dataclass(frozen=True)
class SoundDevice:
    index: int
    name: str
    inputs: int  # channels
    outputs: int
    rate_hz: int  # the default one of the device
    is_default_input: bool
    is_default_output: bool

    def channels(self, kind: Kind) -> int:
        return self.inputs if kind == "input" else self.outputs

    def is_default(self, kind: Kind) -> bool:
        return self.is_default_input if kind == "input" else self.is_default_output


_portaudio_lock = threading.RLock()
_open_streams = 0  # PortAudio's device list is read anew only while none is open
# loudspeakers that are open; one whose server died would hide the devices that are back
_speakers: weakref.WeakSet[Speaker] = weakref.WeakSet()
_kept_callbacks: list[object] = []  # ctypes frees a callback that nothing refers to


@functools.cache
def _sounddevice() -> ModuleType:
    _quiet_alsa()
    try:
        import sounddevice
    except ImportError:
        raise MissingExtra("Microphone and loudspeaker", "hear") from None
    except OSError as error:
        raise MediaError(
            f"the PortAudio library cannot be loaded ({error}); on Debian, Ubuntu or "
            "Raspberry Pi OS type: sudo apt-get install libportaudio2"
        ) from None
    return sounddevice


def _quiet_alsa() -> None:
    """ALSA prints to stderr whatever it tries while PortAudio looks for devices;
    what matters comes back as an error of ours.
    """
    text, number = ctypes.c_char_p, ctypes.c_int
    signature = ctypes.CFUNCTYPE(None, text, number, text, number, text)
    ignore = signature(lambda *_: None)
    try:
        asound = ctypes.CDLL("libasound.so.2")
        asound.snd_lib_error_set_handler(ignore)
    except (OSError, AttributeError):  # no ALSA here
        return
    _kept_callbacks.append(ignore)


def _refresh() -> None:
    """Let PortAudio look for devices again, if no stream of ours is open."""
    sd = _sounddevice()
    with _portaudio_lock:
        for speaker in list(_speakers):
            speaker.close_if_gone()
        if _open_streams == 0:
            sd._terminate()  # sounddevice's documented way to read the device list anew
            sd._initialize()


def devices() -> list[SoundDevice]:
    """What can record or play, as of now. Raises MediaError without PortAudio."""
    sd = _sounddevice()
    with _portaudio_lock:
        _refresh()
        chosen_input, chosen_output = sd.default.device
        default_input = _default_index("input", chosen_input)
        default_output = _default_index("output", chosen_output)
        return [
            SoundDevice(
                index=found["index"],
                name=found["name"],
                inputs=found["max_input_channels"],
                outputs=found["max_output_channels"],
                rate_hz=int(found["default_samplerate"]),
                is_default_input=found["index"] == default_input,
                is_default_output=found["index"] == default_output,
            )
            for found in sd.query_devices()
        ]


def _default_index(kind: Kind, chosen: int | None) -> int | None:
    sd = _sounddevice()
    device = None if chosen in (-1, None) else chosen
    try:
        return sd.query_devices(device, kind)["index"]
    except (sd.PortAudioError, ValueError):
        return None


def find_sound_device(wanted: str | int | None, kind: Kind) -> SoundDevice:
    """The default, or the one of that number or (part of a) name. Raises DeviceLost
    when there is none, UsageError when unclear.
    """
    thing = _THING[kind]
    present = [device for device in devices() if device.channels(kind) > 0]
    if not present:
        raise DeviceLost(
            f"no {thing} found; plug one in, or start the sound server (`edge-gemma devices` "
            "shows what is there)"
        )
    if wanted is None:
        defaults = [device for device in present if device.is_default(kind)]
        return (defaults or present)[0]
    chosen = _matching(present, str(wanted))
    if len(chosen) != 1:
        found = ", ".join(f"{device.index}: {device.name}" for device in (chosen or present))
        raise UsageError(f"{wanted!r} names {len(chosen)} {thing}s; choose one of: {found}")
    return chosen[0]


def _matching(present: list[SoundDevice], wanted: str) -> list[SoundDevice]:
    if wanted.isdigit():
        return [device for device in present if device.index == int(wanted)]
    lower = wanted.lower()
    whole = [device for device in present if device.name.lower() == lower]
    return whole or [device for device in present if lower in device.name.lower()]


class Microphone:
    """Blocks of 32 ms at 16 kHz mono from a device; a context manager (the
    ``LiveSource`` protocol). ``name`` is the device's, once it is open.

    It starts no thread: PortAudio calls back, ``read`` takes.

    The callback copies into a queue of ``queue_s`` seconds and returns; blocks that
    find it full, or that PortAudio itself reports as overflowed, are counted in
    ``dropped_blocks``. Raises DeviceLost (none, or gone: see :meth:`reopen`),
    UsageError, MediaError.
    """

    def __init__(self, device: str | int | None = None, *, queue_s: float = 30.0):
        self.device, self.name, self.dropped_blocks = device, "", 0
        n_blocks = max(1, int(queue_s * RATE_HZ / BLOCK_SAMPLES))
        self._queue: queue.Queue[np.ndarray] = queue.Queue(maxsize=n_blocks)
        self._finished = threading.Event()
        self._heard_s = 0.0  # when PortAudio last called, on the monotonic clock
        self._stream: Any = None  # sounddevice.InputStream, which has no types
        self._resample = Resampler(RATE_HZ)

    def __enter__(self) -> Microphone:
        self._open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> None:
        global _open_streams
        with _portaudio_lock:
            found = find_sound_device(self.device, "input")
            self._finished.clear()
            self._heard_s = time.monotonic()
            stream, rate_hz = self._start_stream(found)
            self._stream, self.name = stream, found.name
            self._resample = Resampler(rate_hz)
            _open_streams += 1

    def _start_stream(self, device: SoundDevice) -> tuple[Any, int]:
        """The running stream and its rate: ours if the device can, else the
        device's own.
        """
        sd = _sounddevice()
        stereo = min(device.inputs, 2)
        reason: Exception | None = None
        for rate_hz, channels in (
            (RATE_HZ, 1),
            (device.rate_hz, 1),
            (device.rate_hz, stereo),
            (device.rate_hz, device.inputs),  # an array of microphones that gives all or nothing
        ):
            try:
                stream = sd.InputStream(
                    samplerate=rate_hz,
                    channels=channels,
                    device=device.index,
                    dtype="float32",
                    blocksize=BLOCK_SAMPLES * rate_hz // RATE_HZ,
                    callback=self._on_block,
                    finished_callback=self._finished.set,
                )
                stream.start()
                return stream, rate_hz
            except (sd.PortAudioError, ValueError) as error:
                reason = error
        assert reason is not None
        raise DeviceLost(
            f"the microphone {device.name!r} cannot be opened "
            f"({first_line(reason)}); is another program holding it?"
        )

    def _on_block(self, data: np.ndarray, frames: int, when: object, status: Any) -> None:
        """PortAudio's thread calls this. ``data [n, channels]`` float32 is valid
        only within.
        """
        self._heard_s = time.monotonic()
        if status.input_overflow:
            self.dropped_blocks += 1
        mono = data[:, 0].copy() if data.shape[1] == 1 else data.mean(axis=1)
        try:
            self._queue.put_nowait(mono)
        except queue.Full:
            self.dropped_blocks += 1

    @property
    def n_waiting(self) -> int:
        """Blocks that were heard and not read yet."""
        return self._queue.qsize()

    def read(self, timeout_s: float = 1.0) -> np.ndarray:
        """The next samples ``[n]``, or none (n = 0) after ``timeout_s``. Raises
        DeviceLost within a second of the device's end.
        """
        if self._stream is None:
            raise DeviceLost("the microphone is not open")
        until = time.monotonic() + timeout_s
        while True:
            left_s = until - time.monotonic()
            try:
                block = self._queue.get(timeout=min(_POLL_S, max(0.001, left_s)))
                return self._resample.push(block)
            except queue.Empty:
                pass
            if self._is_gone():
                self.close()
                raise DeviceLost(
                    f"the microphone {self.name!r} is gone (unplugged, or the sound server stopped)"
                )
            if time.monotonic() >= until:
                return np.zeros(0, np.float32)

    def _is_gone(self) -> bool:
        silent_s = time.monotonic() - self._heard_s
        return self._finished.is_set() or silent_s > LOST_AFTER_S

    def blocks(self) -> Iterator[np.ndarray]:
        """Samples until the device is lost or the microphone is closed from elsewhere."""
        while self._stream is not None:
            yield self.read()

    def reopen(self) -> None:
        """Try to get the device back after DeviceLost. Raises DeviceLost again
        while it is away; costs some 10 ms, so wait in between.
        """
        self.close()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._open()

    def close(self) -> None:
        global _open_streams
        stream, self._stream = self._stream, None
        if stream is not None:
            with _portaudio_lock:
                try:
                    stream.abort(ignore_errors=True)
                finally:
                    stream.close(ignore_errors=True)
                    _open_streams -= 1


@dataclass(eq=False)
class _Playing:
    """A sound that waits or runs: ``samples [n]`` at the loudspeaker's rate."""

    samples: np.ndarray
    n_out: int = 0  # handed to the device


class Speaker:
    """A loudspeaker for samples of any rate; a context manager. It is opened at the first sound, or
    by ``with``, and gives out silence in between until it is closed, so that what was played can
    be counted.

    ``on_block(samples [n], rate_hz)`` is called from PortAudio's thread with everything that goes
    out, silence included (:meth:`edge_gemma.hearing.echo.EchoCanceller.played`); ``on_open()``
    when it is opened, also anew (``reopened``). Where the device takes only its own rate, sound is
    resampled to it. Raises DeviceLost, UsageError, MediaError.
    """

    def __init__(
        self,
        device: str | int | None = None,
        on_block: Callable[[np.ndarray, int], None] | None = None,
        on_open: Callable[[], None] | None = None,
    ):
        self.device, self.name, self.rate_hz = device, "", 0
        self._on_block_out, self._on_open = on_block, on_open
        self._stream: Any = None  # sounddevice.OutputStream, which has no types
        self._change = threading.Condition()
        self._waiting: deque[_Playing] = deque()  # the first one is being played
        self._last: tuple[_Playing, int] | None = None  # of the last play, and its own rate
        self._latency_s = 0.0
        self._called_s = 0.0  # when PortAudio last called, on the monotonic clock
        self._finished = threading.Event()

    def __enter__(self) -> Speaker:
        self._open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def play(self, samples: np.ndarray, rate_hz: int) -> bool:
        """Play ``samples [n]`` float32. Returns 0.1 s before their end, so that the next ones
        follow without a gap; False when stopped. Raises DeviceLost, MediaError.
        """
        self._open()
        resampled = Resampler(rate_hz, self.rate_hz).push(samples, last=True)
        playing = _Playing(np.clip(resampled, -1, 1))
        until = len(playing.samples) - int(_EARLY_S * self.rate_hz)
        with self._change:
            self._waiting.append(playing)
            self._last = playing, rate_hz
            while playing.n_out < until and playing in self._waiting and not self._is_gone():
                self._change.wait(_POLL_S)
            if playing.n_out < until and not self._is_gone():
                return False  # stopped
        if self._is_gone():
            self.close()
            raise DeviceLost(
                f"the loudspeaker {self.name!r} is gone (unplugged, or the sound server stopped)"
            )
        return True

    @property
    def n_heard(self) -> int:
        """Samples of the last :meth:`play`, at its own rate, that have left the loudspeaker."""
        last = self._last
        if last is None or not self.rate_hz:
            return 0
        playing, rate_hz = last
        n = playing.n_out - int(self._latency_s * self.rate_hz)
        return max(0, n * rate_hz // self.rate_hz)

    def stop(self) -> None:
        """Silence now: what waits is dropped, what the device holds (some 50 ms) is played."""
        with self._change:
            self._waiting.clear()
            self._change.notify_all()

    def wait(self) -> None:
        """Until everything was handed to the device and has left it, or the device is gone."""
        with self._change:
            while self._waiting and self._stream is not None and not self._is_gone():
                self._change.wait(_POLL_S)
        if self._stream is not None:
            time.sleep(self._latency_s)

    def _open(self) -> None:
        global _open_streams
        sd = _sounddevice()
        with _portaudio_lock:
            if self._stream is not None and not self._is_gone():
                return
            self.close()
            found = find_sound_device(self.device, "output")
            reason: Exception | None = None
            for rate_hz, channels in _output_formats(found):
                try:
                    stream = self._started(found, rate_hz, channels)
                except (sd.PortAudioError, ValueError) as error:
                    reason = error
                    continue
                self._stream, self.name = stream, found.name
                self._latency_s = stream.latency
                _open_streams += 1
                _speakers.add(self)
                return
        assert reason is not None
        raise DeviceLost(f"the loudspeaker {found.name!r} cannot be opened ({first_line(reason)})")

    def _started(self, found: SoundDevice, rate_hz: int, channels: int) -> Any:
        self._finished.clear()
        self.rate_hz, self._called_s = rate_hz, time.monotonic()
        if self._on_open is not None:
            self._on_open()
        stream = _sounddevice().OutputStream(
            samplerate=rate_hz,
            channels=channels,
            device=found.index,
            dtype="float32",
            latency=_LATENCY_S,
            callback=self._on_block,
            finished_callback=self._finished.set,
        )
        stream.start()
        return stream

    def _on_block(self, out: np.ndarray, frames: int, when: object, status: object) -> None:
        """PortAudio's thread calls this to have ``out [frames, channels]`` float32 filled."""
        self._called_s = time.monotonic()
        block = np.zeros(frames, np.float32)
        n = 0
        with self._change:
            while self._waiting and n < frames:
                playing = self._waiting[0]
                taken = playing.samples[playing.n_out : playing.n_out + frames - n]
                block[n : n + len(taken)] = taken
                n += len(taken)
                playing.n_out += len(taken)
                if playing.n_out >= len(playing.samples):
                    self._waiting.popleft()
            self._change.notify_all()
        out[:] = block[:, None]
        if self._on_block_out is not None:
            self._on_block_out(block, self.rate_hz)

    def _is_gone(self) -> bool:
        silent_s = time.monotonic() - self._called_s
        return self._finished.is_set() or silent_s > LOST_AFTER_S

    def close_if_gone(self) -> None:
        if self._stream is not None and self._is_gone():
            self.close()

    def close(self) -> None:
        global _open_streams
        with _portaudio_lock:
            stream, self._stream = self._stream, None
            if stream is not None:
                try:
                    stream.abort(ignore_errors=True)
                finally:
                    stream.close(ignore_errors=True)
                    _open_streams -= 1
        self.stop()


def _output_formats(device: SoundDevice) -> list[tuple[int, int]]:
    """(rate, channels) to try, the device's own first."""
    rates = dict.fromkeys((device.rate_hz, *_RATES_HZ))
    channels = dict.fromkeys((1, min(2, device.outputs), device.outputs))
    return [(rate_hz, n) for rate_hz in rates for n in channels]
