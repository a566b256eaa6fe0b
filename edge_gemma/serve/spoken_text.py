"""OpenAI's /v1/audio/speech: a text → sound, where a voice is installed.

In: a text and a voice's name. Out: a sound file, or events with pieces of it, sentence by sentence
while the rest is still synthesized. The voice is espeak-ng; it is a program, so it gets a name that
was checked and the text on its standard input.
"""

from __future__ import annotations

import asyncio
import base64
import io
import re
from collections.abc import AsyncIterator, Callable

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_gemma.conversation.clauses import Sentences
from edge_gemma.conversation.voice import espeak
from edge_gemma.errors import EdgeGemmaError, MissingExtra, RuntimeFailure
from edge_gemma.serve.bodies import ClosingStream, Server, decoded, unless_gone, warn_ignored
from edge_gemma.serve.openai import EVENT_STREAM, event
from edge_gemma.serve.refusals import Refusal, error_object, refusal_of

MAX_CHARACTERS = 4096  # OpenAI's own bound
RATE_HZ = 24_000  # of what is sent: OpenAI's pcm has no header to say another
WORDS_PER_MINUTE = 175
# name → (libsndfile's format, its subtype, the media type)
FORMATS = {
    "mp3": ("MP3", None, "audio/mpeg"),
    "opus": ("OGG", "OPUS", "audio/ogg"),
    "flac": ("FLAC", "PCM_16", "audio/flac"),
    "wav": ("WAV", "PCM_16", "audio/wav"),
    "pcm": ("RAW", "PCM_16", f"audio/pcm;rate={RATE_HZ}"),
}
# OpenAI's voices, which every client offers: the default voice speaks for them
_OPENAIS = frozenset(
    "alloy ash ballad cedar coral echo fable marin nova onyx sage shimmer verse default".split()
)
_VOICE = re.compile(r"[A-Za-z][A-Za-z0-9+_-]{0,39}")


class VoiceId(msgspec.Struct):
    id: str


class SpeechBody(msgspec.Struct):
    input: str
    model: str = ""  # any: a voice speaks, not the served model
    voice: str | VoiceId = "default"
    response_format: str | None = None
    speed: float | None = None
    instructions: str | None = None
    stream_format: str | None = None


class SpokenText:
    def __init__(self, server: Server):
        self._server = server
        # one at a time: it takes the cores of those who wait for an answer
        self._turn = asyncio.Lock()

    def routes(self) -> list[Route]:
        return [Route("/v1/audio/speech", self.speech, methods=["POST"])]

    async def speech(self, request: Request) -> Response:
        body = decoded(await request.body(), SpeechBody)
        if body.instructions:
            warn_ignored("/v1/audio/speech", ["instructions"])
        if not body.input.strip() or len(body.input) > MAX_CHARACTERS:
            raise Refusal(
                400,
                f"the input has {len(body.input)} characters; expected 1 … {MAX_CHARACTERS}",
                param="input",
            )
        self._server.service.check_texts([body.input])
        speed = 1.0 if body.speed is None else body.speed
        if not 0.25 <= speed <= 4.0:
            raise Refusal(400, f"speed is {speed}; expected 0.25 … 4", param="speed")
        name = body.response_format or "mp3"
        if name not in FORMATS:
            raise Refusal(
                400,
                f"response_format is {name[:40]!r}; expected one of {', '.join(FORMATS)}",
                param="response_format",
            )
        voice = _voice(body.voice)
        speak = espeak(voice, max(80, round(WORDS_PER_MINUTE * speed)))
        if body.stream_format == "sse":
            return await self._streamed(request, body.input, speak, name)
        samples = await unless_gone(request, self._whole(body.input, speak))
        data = await asyncio.to_thread(_file, samples, name)
        return Response(data, media_type=FORMATS[name][2])

    async def _whole(self, text: str, speak: Callable) -> np.ndarray:
        pieces = [piece async for piece in self._pieces(text, speak)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.float32)

    async def _pieces(self, text: str, speak: Callable) -> AsyncIterator[np.ndarray]:
        """Sentence by sentence, ``[n]`` float32 at RATE_HZ."""
        sentences = Sentences()
        async with self._turn:
            for sentence in [*sentences.push(text), *sentences.finish()]:
                samples, rate_hz = await asyncio.to_thread(speak, sentence)
                yield await asyncio.to_thread(_resampled, samples, rate_hz)

    async def _streamed(self, request: Request, text: str, speak: Callable, name: str) -> Response:
        if name not in ("pcm", "mp3"):
            raise Refusal(
                400,
                f"response_format {name} cannot be cut into pieces; with stream_format sse ask for "
                "pcm or mp3",
                param="response_format",
            )
        pieces = self._pieces(text, speak)
        # what fails at once has a status of its own
        first = await unless_gone(request, anext(pieces, None))

        async def lines() -> AsyncIterator[bytes]:
            try:
                piece = first
                while piece is not None:
                    data = await asyncio.to_thread(_file, piece, name)
                    audio = base64.b64encode(data).decode()
                    yield event({"type": "speech.audio.delta", "audio": audio})
                    piece = await anext(pieces, None)
                yield event({"type": "speech.audio.done", "usage": _NO_USAGE})
            except EdgeGemmaError as error:
                yield event(error_object("/v1", refusal_of(error)))

        return ClosingStream(lines(), EVENT_STREAM, lambda: None)


_NO_USAGE = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}


def _voice(given: str | VoiceId) -> str:
    name = given if isinstance(given, str) else given.id
    if name.lower() in _OPENAIS:
        return "en"
    if not _VOICE.fullmatch(name):
        raise Refusal(
            400,
            f"voice {name[:40]!r} is unknown; expected one of espeak-ng's (en, de, en-us …: "
            "`espeak-ng --voices`) or OpenAI's names",
            param="voice",
        )
    return name


def _resampled(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    try:
        import soxr
    except ImportError:
        raise MissingExtra("Resampling a voice", "hear") from None
    return soxr.resample(samples, rate_hz, RATE_HZ).astype(np.float32)


def _file(samples: np.ndarray, name: str) -> bytes:
    """``[n]`` float32 at RATE_HZ → the bytes of a sound file. Raises MissingExtra, RuntimeFailure
    (a libsndfile that cannot write it).
    """
    try:
        import soundfile
    except ImportError:
        raise MissingExtra("Speaking", "hear") from None
    kind, subtype, _ = FORMATS[name]
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, samples, RATE_HZ, format=kind, subtype=subtype)
    except (soundfile.LibsndfileError, ValueError) as error:
        raise RuntimeFailure(f"libsndfile cannot write {name} here: {error}") from None
    return buffer.getvalue()
