"""Microphones and loudspeakers. The only module that imports sounddevice."""

from __future__ import annotations

import ctypes
import functools
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edge_gemma.errors import DeviceLost, MediaError, MissingExtra, UsageError
from edge_gemma.hearing.samples import BLOCK_SAMPLES, RATE_HZ
from edge_gemma.hearing.sound import Resampler, _first_line

# without a block for so long the device is gone: PortAudio says nothing when a sound server dies
LOST_AFTER_S = 0.8


@dataclass(frozen=True)
class SoundDevice:
    index: int
    name: str
    inputs: int  # channels
    outputs: int
    rate_hz: int  # its own
    is_default_input: bool
    is_default_output: bool


_portaudio_lock = threading.RLock()
_open_streams = 0  # PortAudio's device list is read anew only while none is open


@functools.cache
def _sounddevice():
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
    """ALSA prints to stderr whatever it tries while PortAudio looks around; what matters comes back
    as an error of ours.
    """
    global _alsa_handler
    try:
        asound = ctypes.CDLL("libasound.so.2")
        _alsa_handler = ctypes.CFUNCTYPE(
            None, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p
        )(lambda *_: None)
        asound.snd_lib_error_set_handler(_alsa_handler)
    except (OSError, AttributeError):
        pass


def _refresh() -> None:
    """Let PortAudio look for devices again, if no stream of ours is open."""
    sd = _sounddevice()
    with _portaudio_lock:
        if _open_streams == 0:
            sd._terminate()
            sd._initialize()


def devices() -> list[SoundDevice]:
    """What can record or play, as of now. Raises MediaError without PortAudio."""
    sd = _sounddevice()
    with _portaudio_lock:
        _refresh()
        default_in, default_out = sd.default.device
        return [
            SoundDevice(
                d["index"],
                d["name"],
                d["max_input_channels"],
                d["max_output_channels"],
                int(d["default_samplerate"]),
                d["index"] == _default_index("input", default_in),
                d["index"] == _default_index("output", default_out),
            )
            for d in sd.query_devices()
        ]


def _default_index(kind: str, chosen) -> int | None:
    sd = _sounddevice()
    try:
        return sd.query_devices(None if chosen in (-1, None) else chosen, kind)["index"]
    except (sd.PortAudioError, ValueError):
        return None


def find_sound_device(wanted: str | int | None, kind: str) -> SoundDevice:
    """The default, or the one of that number or (part of a) name. Raises DeviceLost when there is
    none, UsageError when unclear.
    """
    channels = "inputs" if kind == "input" else "outputs"
    thing = "microphone" if kind == "input" else "loudspeaker"
    present = [d for d in devices() if getattr(d, channels) > 0]
    if not present:
        raise DeviceLost(
            f"no {thing} found; plug one in, or start the sound server (`edge-gemma devices` "
            "shows what is there)"
        )
    if wanted is None:
        chosen = [d for d in present if getattr(d, f"is_default_{kind}")] or present[:1]
        return chosen[0]
    if str(wanted).isdigit():
        chosen = [d for d in present if d.index == int(wanted)]
    else:
        chosen = [d for d in present if d.name.lower() == str(wanted).lower()] or [
            d for d in present if str(wanted).lower() in d.name.lower()
        ]
    if len(chosen) != 1:
        found = ", ".join(f"{d.index}: {d.name}" for d in (chosen or present))
        raise UsageError(f"{wanted!r} names {len(chosen)} {thing}s; choose one of: {found}")
    return chosen[0]


class Microphone:
    """Blocks of 32 ms at 16 kHz mono from a device; a context manager.

    No thread of its own: PortAudio calls back, ``read`` takes.

    The callback copies into a queue of ``queue_s`` seconds and returns; blocks that find it full,
    or that PortAudio itself reports as overflowed, are counted in ``dropped_blocks``. Raises
    DeviceLost (none, or gone: see :meth:`reopen`), UsageError, MediaError.
    """

    def __init__(self, device: str | int | None = None, *, queue_s: float = 30.0):
        self.device, self.dropped_blocks = device, 0
        self._queue: queue.Queue[np.ndarray] = queue.Queue(
            maxsize=max(1, int(queue_s * RATE_HZ / BLOCK_SAMPLES))
        )
        self._finished = threading.Event()
        self._stream = None
        self._rest = np.zeros(0, np.float32)

    def __enter__(self) -> Microphone:
        self._open()
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _open(self) -> None:
        global _open_streams
        sd = _sounddevice()
        with _portaudio_lock:
            found = find_sound_device(self.device, "input")
            self._finished.clear()
            self._heard_s = time.monotonic()
            attempts = [(RATE_HZ, 1), (found.rate_hz, 1), (found.rate_hz, min(found.inputs, 2))]
            for rate_hz, channels in attempts:
                try:
                    stream = sd.InputStream(
                        samplerate=rate_hz,
                        channels=channels,
                        device=found.index,
                        dtype="float32",
                        blocksize=BLOCK_SAMPLES * rate_hz // RATE_HZ,
                        callback=self._on_block,
                        finished_callback=self._finished.set,
                    )
                    stream.start()
                    break
                except (sd.PortAudioError, ValueError) as error:
                    reason = error
            else:
                raise DeviceLost(
                    f"the microphone {found.name!r} cannot be opened "
                    f"({_first_line(reason)}); is another program holding it?"
                )
            self._stream, self.name = stream, found.name
            self._resample = Resampler(rate_hz)
            _open_streams += 1

    def _on_block(self, data: np.ndarray, frames: int, when, status) -> None:
        self._heard_s = time.monotonic()
        if status.input_overflow:
            self.dropped_blocks += 1
        try:
            self._queue.put_nowait(data[:, 0].copy() if data.shape[1] == 1 else data.mean(axis=1))
        except queue.Full:
            self.dropped_blocks += 1

    def read(self, timeout_s: float = 1.0) -> np.ndarray:
        """The next samples ``[n]``, or none (n = 0) after ``timeout_s``. Raises DeviceLost within a
        second of the device's end.
        """
        if self._stream is None:
            raise DeviceLost("the microphone is not open")
        until = time.monotonic() + timeout_s
        while True:
            try:
                return self._resample.push(
                    self._queue.get(timeout=min(0.1, max(0.001, until - time.monotonic())))
                )
            except queue.Empty:
                pass
            if self._finished.is_set() or time.monotonic() - self._heard_s > LOST_AFTER_S:
                self.close()
                raise DeviceLost(
                    f"the microphone {self.name!r} is gone (unplugged, or the sound server stopped)"
                )
            if time.monotonic() >= until:
                return np.zeros(0, np.float32)

    def blocks(self) -> Iterator[np.ndarray]:
        """Samples until the device is lost or the microphone is closed from elsewhere."""
        while self._stream is not None:
            yield self.read()

    def reopen(self) -> None:
        """Try to get the device back after DeviceLost. Raises DeviceLost again while it is away;
        costs some 10 ms, so wait in between.
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


class Speaker:
    """A loudspeaker for samples of any rate. ``play`` blocks until they are played or :meth:`stop`
    was called from elsewhere.
    """

    def __init__(self, device: str | int | None = None):
        self.device = device
        self._stopped = threading.Event()

    def play(self, samples: np.ndarray, rate_hz: int) -> bool:
        """Play ``samples [n]`` float32. Returns False when stopped (within 50 ms). Raises
        DeviceLost, MediaError.
        """
        global _open_streams
        sd = _sounddevice()
        self._stopped.clear()
        samples = np.ascontiguousarray(samples, np.float32).reshape(-1, 1)
        with _portaudio_lock:
            found = find_sound_device(self.device, "output") if _open_streams == 0 else None
            index = found.index if found else None if self.device is None else self.device
            try:
                stream = sd.OutputStream(
                    samplerate=rate_hz, channels=1, device=index, dtype="float32"
                )
            except (sd.PortAudioError, ValueError) as error:
                raise DeviceLost(
                    f"the loudspeaker cannot be opened ({_first_line(error)})"
                ) from None
            _open_streams += 1
        try:
            with stream:
                step = max(1, rate_hz // 20)
                for start in range(0, len(samples), step):
                    if self._stopped.is_set():
                        stream.abort()
                        return False
                    stream.write(samples[start : start + step])
            return True
        except sd.PortAudioError as error:
            raise DeviceLost(f"the loudspeaker is gone ({_first_line(error)})") from None
        finally:
            with _portaudio_lock:
                _open_streams -= 1

    def stop(self) -> None:
        self._stopped.set()
