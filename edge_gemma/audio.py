"""Sound in and out: files, microphone, loudspeaker. The only room that imports sounddevice; its errors become ours here.

In: a path or a device. Out: blocks ``[n]`` float32 at 16 kHz mono, in order; a file is a microphone that never waits. Any rate and
number of channels is taken (mean of the channels, soxr for the rate). It does not know speech, features or models.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import DeviceLost, MediaError, MissingExtra, UsageError
from .features import RATE_HZ, check_samples

BLOCK = 512  # samples, 32 ms: what the microphone delivers at a time, and what speech detection looks at
LOST_AFTER_S = 0.8  # without a block for so long the device is gone: PortAudio says nothing when a sound server dies
_MAX_CHANNELS = 256
_FILE_BLOCK = 1 << 16  # frames of a file read at a time


# -- files --------------------------------------------------------------------------------------------------------------


class AudioFile:
    """A sound file (wav, flac, ogg, mp3 … whatever libsndfile reads), decoded as it is asked for: memory does not grow with its length.

    Raises MediaError: missing, empty, not audio.

    >>> with AudioFile(getfixture("sine_wav")) as file:
    ...     round(file.duration_s, 2), sum(len(block) for block in file.blocks())
    (0.5, 8000)
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            import soundfile
        except ImportError:
            raise MissingExtra("Reading sound files", "hear") from None
        except OSError as error:
            raise MediaError(f"libsndfile cannot be loaded ({error}); on Debian type: sudo apt-get install libsndfile1") from None
        if not self.path.is_file():
            raise MediaError(f"no sound file at {self.path}")
        if self.path.stat().st_size == 0:
            raise MediaError(f"{self.path} is empty (0 bytes)")
        try:
            self._file = soundfile.SoundFile(self.path)
        except soundfile.SoundFileError as error:
            raise MediaError(
                f"{self.path} is not a sound file that can be read ({_first_line(error)}); wav, flac, ogg and mp3 can. "
                f"Others convert with: ffmpeg -i {self.path.name} -ar 16000 -ac 1 out.wav"
            ) from None
        self.rate_hz, self.channels = self._file.samplerate, self._file.channels
        if not 1000 <= self.rate_hz <= 768_000 or not 1 <= self.channels <= _MAX_CHANNELS:
            self._file.close()
            raise MediaError(f"{self.path} claims {self.rate_hz} Hz and {self.channels} channels; expected 1000 … 768000 Hz and 1 … {_MAX_CHANNELS}")
        self.duration_s = max(0, self._file.frames) / self.rate_hz  # as the header says; a truncated file has less
        self.truncated_at_s: float | None = None  # set when the data ends before the header's length

    def blocks(self) -> Iterator[np.ndarray]:
        """``[n]`` float32 at 16 kHz mono, n up to a few seconds. Raises MediaError where the data is damaged."""
        import soundfile

        resample, read = Resampler(self.rate_hz), 0
        while True:
            try:
                frames = self._file.read(_FILE_BLOCK, dtype="float32", always_2d=True)  # [n, channels]
            except soundfile.SoundFileError as error:
                raise MediaError(f"{self.path} is damaged after {read / self.rate_hz:.1f} s ({_first_line(error)})") from None
            read += len(frames)
            block = resample.push(frames.mean(axis=1), last=len(frames) < _FILE_BLOCK)
            if len(block):
                yield check_samples(block)
            if len(frames) < _FILE_BLOCK:
                break
        if read / self.rate_hz < self.duration_s - 0.1 and self.duration_s < 1e7:
            self.truncated_at_s = read / self.rate_hz

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "AudioFile":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_audio(path: str | os.PathLike, *, max_s: float = 30.0) -> np.ndarray:
    """A whole short file as ``[n]`` float32 at 16 kHz mono. Raises MediaError: not audio, or longer than ``max_s`` seconds.

    >>> read_audio(getfixture("sine_wav")).shape
    (8000,)
    """
    blocks, n = [], 0
    with AudioFile(path) as file:
        for block in file.blocks():
            n += len(block)
            if n > max_s * RATE_HZ:
                raise MediaError(f"{path} has more than {max_s:g} s ({file.duration_s:.0f} s), the model's limit for one clip; `edge-gemma transcribe` takes any length")
            blocks.append(block)
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


class Resampler:
    """Any rate → 16 kHz, as a stream (soxr, HQ).

    >>> Resampler(48000).push(np.zeros(4800, np.float32), last=True).shape
    (1600,)
    """

    def __init__(self, rate_hz: int):
        self._stream = None
        if rate_hz != RATE_HZ:
            try:
                import soxr
            except ImportError:
                raise MissingExtra(f"Resampling {rate_hz} Hz to {RATE_HZ} Hz", "hear") from None
            self._stream = soxr.ResampleStream(rate_hz, RATE_HZ, 1, dtype="float32")

    def push(self, samples: np.ndarray, last: bool = False) -> np.ndarray:
        samples = np.ascontiguousarray(samples, np.float32)
        return samples if self._stream is None else self._stream.resample_chunk(samples, last=last)


def level_dbfs(samples: np.ndarray) -> tuple[float, float]:
    """(rms, peak) in dB below full scale, −120 for silence.

    >>> level_dbfs(np.full(100, 0.5, np.float32))
    (-6.0, -6.0)
    """
    if not len(samples):
        return -120.0, -120.0
    rms, peak = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))), float(np.abs(samples).max())
    return tuple(round(20 * math.log10(max(value, 1e-6)), 1) for value in (rms, peak))


# -- devices ------------------------------------------------------------------------------------------------------------


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
        raise MediaError(f"the PortAudio library cannot be loaded ({error}); on Debian, Ubuntu or Raspberry Pi OS type: sudo apt-get install libportaudio2") from None
    return sounddevice


def _quiet_alsa() -> None:
    """ALSA prints to stderr whatever it tries while PortAudio looks around; what matters comes back as an error of ours."""
    global _alsa_handler
    try:
        asound = ctypes.CDLL("libasound.so.2")
        _alsa_handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p)(lambda *_: None)
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
                d["index"], d["name"], d["max_input_channels"], d["max_output_channels"], int(d["default_samplerate"]),
                d["index"] == _default_index("input", default_in), d["index"] == _default_index("output", default_out),
            )
            for d in sd.query_devices()
        ]  # fmt: skip


def _default_index(kind: str, chosen) -> int | None:
    sd = _sounddevice()
    try:
        return sd.query_devices(None if chosen in (-1, None) else chosen, kind)["index"]
    except (sd.PortAudioError, ValueError):
        return None


def find_sound_device(wanted: str | int | None, kind: str) -> SoundDevice:
    """The default, or the one of that number or (part of a) name. Raises DeviceLost when there is none, UsageError when unclear."""
    channels = "inputs" if kind == "input" else "outputs"
    thing = "microphone" if kind == "input" else "loudspeaker"
    present = [d for d in devices() if getattr(d, channels) > 0]
    if not present:
        raise DeviceLost(f"no {thing} found; plug one in, or start the sound server (`edge-gemma devices` shows what is there)")
    if wanted is None:
        chosen = [d for d in present if getattr(d, f"is_default_{kind}")] or present[:1]
        return chosen[0]
    if str(wanted).isdigit():
        chosen = [d for d in present if d.index == int(wanted)]
    else:
        chosen = [d for d in present if d.name.lower() == str(wanted).lower()] or [d for d in present if str(wanted).lower() in d.name.lower()]
    if len(chosen) != 1:
        found = ", ".join(f"{d.index}: {d.name}" for d in (chosen or present))
        raise UsageError(f"{wanted!r} names {len(chosen)} {thing}s; choose one of: {found}")
    return chosen[0]


class Microphone:
    """Blocks of 32 ms at 16 kHz mono from a device; a context manager. No thread of its own: PortAudio calls back, ``read`` takes.

    The callback copies into a queue of ``queue_s`` seconds and returns; blocks that find it full, or that PortAudio itself reports as
    overflowed, are counted in ``dropped_blocks``. Raises DeviceLost (none, or gone: see :meth:`reopen`), UsageError, MediaError.
    """

    def __init__(self, device: str | int | None = None, *, queue_s: float = 30.0):
        self.device, self.dropped_blocks = device, 0
        self._queue: queue.Queue[np.ndarray] = queue.Queue(maxsize=max(1, int(queue_s * RATE_HZ / BLOCK)))
        self._finished = threading.Event()
        self._stream = None
        self._rest = np.zeros(0, np.float32)

    def __enter__(self) -> "Microphone":
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
                        samplerate=rate_hz, channels=channels, device=found.index, dtype="float32", blocksize=BLOCK * rate_hz // RATE_HZ,
                        callback=self._on_block, finished_callback=self._finished.set,
                    )  # fmt: skip
                    stream.start()
                    break
                except (sd.PortAudioError, ValueError) as error:
                    reason = error
            else:
                raise DeviceLost(f"the microphone {found.name!r} cannot be opened ({_first_line(reason)}); is another program holding it?")
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
        """The next samples ``[n]``, or none (n = 0) after ``timeout_s``. Raises DeviceLost within a second of the device's end."""
        if self._stream is None:
            raise DeviceLost("the microphone is not open")
        until = time.monotonic() + timeout_s
        while True:
            try:
                return self._resample.push(self._queue.get(timeout=min(0.1, max(0.001, until - time.monotonic()))))
            except queue.Empty:
                pass
            if self._finished.is_set() or time.monotonic() - self._heard_s > LOST_AFTER_S:
                self.close()
                raise DeviceLost(f"the microphone {self.name!r} is gone (unplugged, or the sound server stopped)")
            if time.monotonic() >= until:
                return np.zeros(0, np.float32)

    def blocks(self) -> Iterator[np.ndarray]:
        """Samples until the device is lost or the microphone is closed from elsewhere."""
        while self._stream is not None:
            yield self.read()

    def reopen(self) -> None:
        """Try to get the device back after DeviceLost. Raises DeviceLost again while it is away; costs some 10 ms, so wait in between."""
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
    """A loudspeaker for samples of any rate. ``play`` blocks until they are played or :meth:`stop` was called from elsewhere."""

    def __init__(self, device: str | int | None = None):
        self.device = device
        self._stopped = threading.Event()

    def play(self, samples: np.ndarray, rate_hz: int) -> bool:
        """Play ``samples [n]`` float32. Returns False when stopped (within 50 ms). Raises DeviceLost, MediaError."""
        global _open_streams
        sd = _sounddevice()
        self._stopped.clear()
        samples = np.ascontiguousarray(samples, np.float32).reshape(-1, 1)
        with _portaudio_lock:
            found = find_sound_device(self.device, "output") if _open_streams == 0 else None
            index = found.index if found else None if self.device is None else self.device
            try:
                stream = sd.OutputStream(samplerate=rate_hz, channels=1, device=index, dtype="float32")
            except (sd.PortAudioError, ValueError) as error:
                raise DeviceLost(f"the loudspeaker cannot be opened ({_first_line(error)})") from None
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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
