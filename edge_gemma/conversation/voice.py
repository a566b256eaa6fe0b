"""Answers spoken aloud, clause by clause while the rest is still being decoded.

In: text in pieces. Out: sound on a loudspeaker (or wherever ``play`` puts it). A
synthesizer is any callable ``text -> (samples [n] float32, rate_hz)``; espeak-ng
and piper are run as programs, so nothing of theirs is linked; kokoro-onnx is a
library. This module does not know models or microphones.
"""

from __future__ import annotations

import io
import json
import os
import queue
import shutil
import subprocess
import threading
import time
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_gemma.conversation.clauses import Clause, Clauses
from edge_gemma.errors import (
    DeviceLost,
    EdgeGemmaError,
    MediaError,
    MissingExtra,
    RuntimeFailure,
    UsageError,
)

Synthesizer = Callable[[str], tuple[np.ndarray, int]]
_TIMEOUT_S = 60
_N_AHEAD = 2  # clauses that are synthesized and wait to be played
_HUNGRY_S = 1.0  # of sound left: the next clause may be shorter than a sentence


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


def kokoro(
    model: str | os.PathLike[str],
    voices: str | os.PathLike[str],
    voice: str = "af_heart",
    language: str = "en-us",
) -> Synthesizer:
    """A Kokoro voice by kokoro-onnx (``pip install kokoro-onnx``; phonemizer, which it needs, is
    under the GPL). ``model`` is its ``.onnx``, ``voices`` its ``.bin`` of voices. Raises
    UsageError, MissingExtra.
    """
    try:
        from kokoro_onnx import Kokoro
    except ImportError:
        raise MissingExtra("A Kokoro voice", "kokoro") from None
    try:
        speaker = Kokoro(str(model), str(voices))
        known = list(speaker.get_voices())
    except Exception as error:  # of onnxruntime, numpy or the package: it names no classes
        raise UsageError(f"{model} is not a Kokoro voice ({error})") from None
    if voice not in known:
        raise UsageError(f"{voice!r} is no voice of {voices}; choose one of: {', '.join(known)}")

    def synthesize(text: str) -> tuple[np.ndarray, int]:
        try:
            samples, rate_hz = speaker.create(text, voice=voice, lang=language)
        except Exception as error:
            raise RuntimeFailure(f"Kokoro could not speak ({error})") from None
        return np.asarray(samples, np.float32), int(rate_hz)

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


@dataclass(frozen=True, eq=False)
class _Sound:
    """A clause as ``samples [n]``; the answer's characters from ``begin`` to ``end``."""

    clause: Clause
    begin: int
    samples: np.ndarray
    rate_hz: int


class Voice:
    """Speaks in two threads, so that one clause is synthesized while the one before it is played:
    ``push`` text while it is decoded, ``finish`` to speak the rest, ``stop`` to fall silent at
    once.

    ``play(samples, rate_hz) -> bool`` is usually
    :meth:`edge_gemma.hearing.devices.Speaker.play`, ``silence()`` its ``stop``. ``heard()`` says
    how many samples of the present sound were heard by now (its ``n_heard``); without it the
    clock says so. ``language`` is for :func:`~edge_gemma.conversation.clauses.spoken_form`; with
    a mapping language → synthesizer each clause is spoken by the one of its language. A failure is
    kept in ``error`` and ends the speaking, not the answer. ``spoken`` lists the clauses that were
    begun; :attr:`said` is the part of the answer that was heard.

    >>> synthesize = lambda text: (np.zeros(160, np.float32), 16000)
    >>> voice = Voice(synthesize, play=lambda samples, rate_hz: True)
    >>> voice.push("Hello there. How a")
    >>> voice.push("re you?")
    >>> voice.finish()
    >>> voice.join()
    >>> voice.spoken, voice.said
    (['Hello there.', 'How are you?'], 'Hello there. How are you?')
    """

    def __init__(
        self,
        synthesize: Synthesizer | Mapping[str, Synthesizer],
        play: Callable[[np.ndarray, int], bool],
        silence: Callable[[], None] = _nothing,
        heard: Callable[[], int] | None = None,
        *,
        language: str = "en",
    ):
        self._play, self._silence, self._heard = play, silence, heard
        self._speakers = {language: synthesize} if callable(synthesize) else dict(synthesize)
        self._clauses = Clauses(tuple(self._speakers))
        self._text = ""
        self._to_say: queue.Queue[Clause | None] = queue.Queue()  # None: no more
        self._to_play: queue.Queue[_Sound | None] = queue.Queue(_N_AHEAD)
        self._stopped = threading.Event()
        self._now: tuple[_Sound, float] | None = None  # what is played, and since when
        self._said_to = 0
        self._n_waiting = 0  # clauses that are not played yet
        self.error: EdgeGemmaError | None = None
        self.spoken: list[str] = []
        # by time.perf_counter; None until then
        self.first_clause_s: float | None = None
        self.first_synthesized_s: float | None = None
        self.first_sound_s: float | None = None
        self._threads = [
            threading.Thread(target=self._run_synthesizer, name="edge-gemma-voice", daemon=True),
            threading.Thread(target=self._run_player, name="edge-gemma-sound", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def push(self, text: str) -> None:
        self._text += text
        for clause in self._clauses.push(text, hungry=self._hungry()):
            self._say(clause)

    def finish(self) -> None:
        """No more text. Returns at once; :meth:`join` waits until it is spoken."""
        for clause in self._clauses.finish():
            self._say(clause)
        self._to_say.put(None)

    def _say(self, clause: Clause) -> None:
        self.first_clause_s = self.first_clause_s or time.perf_counter()
        self._n_waiting += 1
        self._to_say.put(clause)

    def _hungry(self) -> bool:
        """Whether there will soon be nothing to play."""
        if self._n_waiting > (self._now is not None):
            return False
        now = self._now
        return now is None or self._n_heard(now) > len(now[0].samples) - _HUNGRY_S * now[0].rate_hz

    def _n_heard(self, now: tuple[_Sound, float]) -> int:
        sound, since_s = now
        if self._heard is not None:
            return min(len(sound.samples), self._heard())
        return min(len(sound.samples), int((time.perf_counter() - since_s) * sound.rate_hz))

    @property
    def said(self) -> str:
        """The answer as far as it was heard, to a whole word: in the present clause as many of its
        characters as of its samples.
        """
        now, to = self._now, self._said_to
        if now is not None and now[0].clause.end > to:
            part = self._text[now[0].begin : now[0].clause.end]
            n = len(part) * self._n_heard(now) // max(1, len(now[0].samples))
            if n < len(part):
                n = max(part.rfind(gap, 0, n + 1) for gap in " \n") + 1
            to = now[0].begin + n
        return self._text[:to].rstrip() if to < len(self._text) else self._text

    def stop(self) -> None:
        """Silence now; what was not spoken is dropped. :attr:`said` stays as it is."""
        if not self._stopped.is_set():
            said = self.said
            self._stopped.set()
            self._now, self._text, self._said_to = None, said, len(said)
        self._silence()
        self._to_say.put(None)

    @property
    def speaking(self) -> bool:
        return self._threads[1].is_alive()

    def join(self) -> None:
        """Wait until everything is spoken, or :meth:`stop` took effect."""
        for thread in self._threads:
            thread.join()

    def _run_synthesizer(self) -> None:
        begin = 0
        try:
            while (clause := self._to_say.get()) is not None and not self._stopped.is_set():
                samples, rate_hz = self._checked(self._speakers[clause.language](clause.text))
                self.first_synthesized_s = self.first_synthesized_s or time.perf_counter()
                self._hand_on(_Sound(clause, begin, samples, rate_hz))
                begin = clause.end
        except (DeviceLost, RuntimeFailure) as error:
            self.error = error
        except Exception as error:  # a callable of somebody else's
            self.error = RuntimeFailure(f"the voice failed: {type(error).__name__}: {error}")
        finally:
            self._hand_on(None)

    @staticmethod
    def _checked(sound: tuple[np.ndarray, int]) -> tuple[np.ndarray, int]:
        samples, rate_hz = sound
        samples = np.asarray(samples, np.float32)
        if samples.ndim != 1 or not np.isfinite(samples).all() or not rate_hz > 0:
            raise RuntimeFailure(
                "the voice gave no sound: expected samples [n] of finite numbers and a rate above "
                f"0, got shape {list(samples.shape)} at {rate_hz} Hz"
            )
        return samples, int(rate_hz)

    def _hand_on(self, sound: _Sound | None) -> None:
        while not self._stopped.is_set():
            try:
                self._to_play.put(sound, timeout=0.1)
            except queue.Full:
                continue
            return

    def _run_player(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    sound = self._to_play.get(timeout=0.1)
                except queue.Empty:
                    continue
                if sound is None or not self._played(sound):
                    return
        except (DeviceLost, MediaError, MissingExtra, RuntimeFailure) as error:
            self.error = error
        except Exception as error:  # a callable of somebody else's
            self.error = RuntimeFailure(f"playing failed: {type(error).__name__}: {error}")
        finally:
            self._stopped.set()
            self._to_say.put(None)

    def _played(self, sound: _Sound) -> bool:
        self.spoken.append(sound.clause.text)
        now = time.perf_counter()
        self.first_sound_s = self.first_sound_s or now
        self._now = sound, now
        try:
            whole = self._play(sound.samples, sound.rate_hz)
        except BaseException:
            self._now = None  # the clock would go on counting what nobody heard
            raise
        if whole and not self._stopped.is_set():
            self._said_to = sound.clause.end
            self._now = None
            self._n_waiting -= 1
        return whole
