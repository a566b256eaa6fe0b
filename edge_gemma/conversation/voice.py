"""Answers spoken aloud, sentence by sentence while the rest is still being decoded.

In: text in pieces. Out: sound on a loudspeaker (or wherever ``play`` puts it). A synthesizer is any
callable ``text -> (samples [n] float32, rate_hz)``; espeak-ng and piper are run as programs, so
nothing of theirs is linked. This room does not know models or microphones.
"""

from __future__ import annotations

import io
import json
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
_SENTENCE = re.compile(r"(?<=[.!?…。！？])[\"')\]]*\s+|\n+")
_LONGEST = 400  # characters without an end of sentence: spoken anyway, from the last comma or space
_TIMEOUT_S = 60


class Sentences:
    """Text pieces → whole sentences, as soon as they are known to be whole.

    >>> cut = Sentences()
    >>> [*cut.push("Hello the"), *cut.push("re. How a"), *cut.push("re you? "), *cut.finish()]
    ['Hello there.', 'How are you?']
    """

    def __init__(self):
        self._text = ""

    def push(self, text: str) -> Iterator[str]:
        self._text += text
        while match := _SENTENCE.search(self._text):
            sentence, self._text = self._text[: match.end()].strip(), self._text[match.end() :]
            if sentence:
                yield sentence
        while len(self._text) > _LONGEST:
            at = max(self._text.rfind(c, 0, _LONGEST) for c in ", ") + 1 or _LONGEST
            sentence, self._text = self._text[:at].strip(), self._text[at:]
            yield sentence

    def finish(self) -> Iterator[str]:
        sentence, self._text = self._text.strip(), ""
        if sentence:
            yield sentence


def espeak(voice: str = "en", words_per_minute: int = 175) -> Synthesizer:
    """espeak-ng as a synthesizer. Raises UsageError when it is not installed."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise UsageError(
            "espeak-ng is not installed, so answers cannot be spoken. On Debian type: sudo "
            "apt-get install espeak-ng. Or use --voice none"
        )

    def synthesize(text: str) -> tuple[np.ndarray, int]:
        data = _run(
            [program, "-v", voice, "-s", str(words_per_minute), "--stdout", "--stdin"],
            text,
            "espeak-ng",
        )
        return read_wav(data)

    return synthesize


def piper(model: str | Path) -> Synthesizer:
    """A piper voice (``VOICE.onnx`` with ``VOICE.onnx.json`` beside it) through the ``piper``
    program. Raises UsageError.
    """
    program, model = shutil.which("piper"), Path(model)
    if program is None:
        raise UsageError(
            "the program piper is not installed; type: pip install piper-tts (GPL, a program "
            "of its own)"
        )
    try:
        rate_hz = int(
            json.loads(model.with_name(model.name + ".json").read_text())["audio"]["sample_rate"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{model} is not a piper voice: cannot read its sample rate from "
            f"{model.name}.json ({type(error).__name__})"
        ) from None

    def synthesize(text: str) -> tuple[np.ndarray, int]:
        data = _run(
            [program, "-m", str(model), "--output-raw"], text.replace("\n", " ") + "\n", "piper"
        )
        return np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float32) / 32768, rate_hz

    return synthesize


def _run(command: list[str], text: str, name: str) -> bytes:
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeFailure(f"{name} could not speak: {error}") from None
    if (
        done.returncode or not done.stdout or b"Error:" in done.stderr
    ):  # espeak-ng leaves with 0 for a voice it does not have
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [
            "no sound came out"
        ]
        raise RuntimeFailure(f"{name} could not speak ({reason[0]})")
    return done.stdout


def read_wav(data: bytes) -> tuple[np.ndarray, int]:
    """A 16-bit mono WAV in memory → (``[n]`` float32, rate). The header's length is not believed: a
    program that streams cannot know it.
    """
    try:
        with wave.open(io.BytesIO(data)) as file:
            if file.getsampwidth() != 2 or file.getnchannels() != 1:
                raise RuntimeFailure(
                    f"expected 16-bit mono sound, got {8 * file.getsampwidth()}-bit with "
                    f"{file.getnchannels()} channels"
                )
            samples = file.readframes(file.getnframes())
            return np.frombuffer(samples[: len(samples) // 2 * 2], "<i2").astype(
                np.float32
            ) / 32768, file.getframerate()
    except (wave.Error, EOFError) as error:
        raise RuntimeFailure(f"the synthesizer's output is not a WAV ({error})") from None


class Voice:
    """Speaks in a thread of its own:

    ``push`` text while it is decoded, ``finish`` to speak the rest, ``stop`` to fall silent at
    once.

    ``play(samples, rate_hz) -> bool`` is usually :meth:`edge_gemma.hearing.devices.Speaker.play`,
    ``silence()`` its ``stop``. A failure of either is kept in ``error`` and ends the speaking, not
    the answer.
    """

    def __init__(
        self,
        synthesize: Synthesizer,
        play: Callable[[np.ndarray, int], bool],
        silence: Callable[[], None] = lambda: None,
    ):
        self._synthesize, self._play, self._silence = synthesize, play, silence
        self._sentences, self._queue = Sentences(), queue.Queue()
        self._stopped = threading.Event()
        self.error: EdgeGemmaError | None = None
        self.spoken: list[str] = []  # sentences that were begun
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
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopped.is_set() and (sentence := self._queue.get()) is not None:
                if self._stopped.is_set():
                    return
                self.spoken.append(sentence)
                samples, rate_hz = self._synthesize(sentence)
                if self._stopped.is_set() or not self._play(samples, rate_hz):
                    return
        except (DeviceLost, RuntimeFailure) as error:
            self.error = error
