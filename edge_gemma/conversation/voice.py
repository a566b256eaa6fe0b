"""Answers spoken aloud, sentence by sentence while the rest is still being decoded.

In: text in pieces. Out: sound on a loudspeaker (or wherever ``play`` puts it). A
synthesizer is any callable ``text -> (samples [n] float32, rate_hz)``; espeak-ng
and piper are run as programs, so nothing of theirs is linked. This module does not
know models or microphones.
"""

from __future__ import annotations

import io
import json
import os
import queue
import re
import shutil
import subprocess
import threading
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from edge_gemma.errors import DeviceLost, EdgeGemmaError, RuntimeFailure, UsageError

Synthesizer = Callable[[str], tuple[np.ndarray, int]]
_END_OF_SENTENCE = re.compile(r"(?<=[.!?…。！？])[\"')\]]*\s+|\n+")
_MAX_CHARACTERS = 400  # without an end of sentence: spoken anyway, up to the last comma or space
_TIMEOUT_S = 60


class Sentences:
    """Text pieces → whole sentences, as soon as they are known to be whole.

    >>> cut = Sentences()
    >>> [*cut.push("Hello the"), *cut.push("re. How a"), *cut.push("re you? "), *cut.finish()]
    ['Hello there.', 'How are you?']
    """

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str) -> Iterator[str]:
        self._text += text
        while True:
            match = _END_OF_SENTENCE.search(self._text)
            if match is None:
                break
            sentence = self._take(match.end())
            if sentence:
                yield sentence
        while len(self._text) > _MAX_CHARACTERS:
            yield self._take(self._last_gap())

    def finish(self) -> Iterator[str]:
        sentence = self._take(len(self._text))
        if sentence:
            yield sentence

    def _take(self, n: int) -> str:
        taken, self._text = self._text[:n], self._text[n:]
        return taken.strip()

    def _last_gap(self) -> int:
        """Where a text without an end of sentence is cut: behind the last comma or space."""
        last = max(self._text.rfind(gap, 0, _MAX_CHARACTERS) for gap in ", ")
        return last + 1 if last >= 0 else _MAX_CHARACTERS


def espeak(voice: str = "en", words_per_minute: int = 175) -> Synthesizer:
    """espeak-ng as a synthesizer. Raises UsageError when it is not installed."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise UsageError(
            "espeak-ng is not installed, so answers cannot be spoken. On Debian type: sudo "
            "apt-get install espeak-ng. Or use --voice none"
        )
    command = [program, "-v", voice, "-s", str(words_per_minute), "--stdout", "--stdin"]

    def synthesize(text: str) -> tuple[np.ndarray, int]:
        return read_wav(_run(command, text, "espeak-ng"))

    return synthesize


def piper(model: str | os.PathLike[str]) -> Synthesizer:
    """A piper voice (``VOICE.onnx`` with ``VOICE.onnx.json`` beside it) through the
    ``piper`` program. Raises UsageError.
    """
    program = shutil.which("piper")
    if program is None:
        raise UsageError(
            "the program piper is not installed; type: pip install piper-tts (its licence is "
            "the GPL; it is run as a separate program)"
        )
    rate_hz = _piper_rate_hz(Path(model))
    command = [program, "-m", str(model), "--output-raw"]

    def synthesize(text: str) -> tuple[np.ndarray, int]:
        line = text.replace("\n", " ") + "\n"
        return _from_16_bit(_run(command, line, "piper")), rate_hz

    return synthesize


def _piper_rate_hz(model: Path) -> int:
    path = model.with_name(model.name + ".json")
    try:
        return int(json.loads(path.read_text())["audio"]["sample_rate"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{model} is not a piper voice: cannot read its sample rate from "
            f"{path.name} ({type(error).__name__})"
        ) from None


def _run(command: list[str], text: str, name: str) -> bytes:
    """What the program writes to stdout when it is given ``text``. Raises RuntimeFailure."""
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeFailure(f"{name} could not speak: {error}") from None
    # espeak-ng leaves with 0 for a voice it does not have
    failed = done.returncode != 0 or b"Error:" in done.stderr
    if failed or not done.stdout:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else "no sound came out"
        raise RuntimeFailure(f"{name} could not speak ({reason})")
    return done.stdout


def read_wav(data: bytes) -> tuple[np.ndarray, int]:
    """A 16-bit mono WAV in memory → (``[n]`` float32, rate in Hz). The header's
    length is not believed: a program that streams cannot know it. Raises
    RuntimeFailure.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            if file.getsampwidth() != 2 or file.getnchannels() != 1:
                raise RuntimeFailure(
                    f"expected 16-bit mono sound, got {8 * file.getsampwidth()}-bit with "
                    f"{file.getnchannels()} channels"
                )
            samples = file.readframes(file.getnframes())
            return _from_16_bit(samples), file.getframerate()
    except (wave.Error, EOFError) as error:
        raise RuntimeFailure(f"the synthesizer's output is not a WAV ({error})") from None


def _from_16_bit(data: bytes) -> np.ndarray:
    """Little-endian 16-bit samples → ``[n]`` float32; half a sample at the end is
    left out.
    """
    whole = data[: len(data) // 2 * 2]
    return np.frombuffer(whole, "<i2").astype(np.float32) / 32768


def _nothing() -> None:
    pass


class Voice:
    """Speaks in a thread: ``push`` text while it is decoded, ``finish`` to speak
    the rest, ``stop`` to fall silent at once.

    ``play(samples, rate_hz) -> bool`` is usually
    :meth:`edge_gemma.hearing.devices.Speaker.play`, ``silence()`` its ``stop``. A
    failure of either is kept in ``error`` and ends the speaking, not the answer.
    ``spoken`` lists the sentences that were begun.

    >>> said = []
    >>> def synthesize(text):
    ...     said.append(text)
    ...     return np.zeros(160, np.float32), 16000
    >>> voice = Voice(synthesize, play=lambda samples, rate_hz: True)
    >>> voice.push("Hello. How a")
    >>> voice.push("re you?")
    >>> voice.finish()
    >>> voice.join()
    >>> said
    ['Hello.', 'How are you?']
    """

    def __init__(
        self,
        synthesize: Synthesizer,
        play: Callable[[np.ndarray, int], bool],
        silence: Callable[[], None] = _nothing,
    ):
        self._synthesize, self._play, self._silence = synthesize, play, silence
        self._sentences = Sentences()
        self._queue: queue.Queue[str | None] = queue.Queue()  # None: no more
        self._stopped = threading.Event()
        self.error: EdgeGemmaError | None = None
        self.spoken: list[str] = []
        self._thread = threading.Thread(target=self._run, name="edge-gemma-voice", daemon=True)
        self._thread.start()

    def push(self, text: str) -> None:
        for sentence in self._sentences.push(text):
            self._queue.put(sentence)

    def finish(self) -> None:
        """No more text. Returns at once; :meth:`join` waits until it is spoken."""
        for sentence in self._sentences.finish():
            self._queue.put(sentence)
        self._queue.put(None)

    def stop(self) -> None:
        """Silence now; what was not spoken is dropped."""
        self._stopped.set()
        self._silence()
        self._queue.put(None)

    @property
    def speaking(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        """Wait until everything is spoken, or :meth:`stop` took effect."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                sentence = self._queue.get()
                if sentence is None or self._stopped.is_set():
                    return
                self.spoken.append(sentence)
                samples, rate_hz = self._synthesize(sentence)
                if self._stopped.is_set() or not self._play(samples, rate_hz):
                    return
        except (DeviceLost, RuntimeFailure) as error:
            self.error = error
