"""OpenAI's audio routes: a sound file of any length → text, subtitles, or segments with times.

In: multipart uploads. Out: one answer, or events while it is written down. Each utterance is asked
by itself, as ``edge-gemma transcribe`` does; others' answers are generated in between.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from edge_gemma.bundles.manifest import require
from edge_gemma.conversation.subtitles import cue
from edge_gemma.conversation.transcription import (
    TRANSCRIBE,
    TRANSCRIBE_ANY,
    TRANSLATE_ONLY,
    Segment,
    Utterance,
    utterances,
)
from edge_gemma.errors import EdgeGemmaError, MediaError
from edge_gemma.hearing.samples import MAX_CLIP_S
from edge_gemma.hearing.sound import AudioFile
from edge_gemma.messages import Audio, Message
from edge_gemma.serve.answer import GenerationRequest
from edge_gemma.serve.bodies import (
    ClosingStream,
    Server,
    json_response,
    unless_gone,
    warn_ignored,
    without_path,
)
from edge_gemma.serve.languages import language_name
from edge_gemma.serve.openai import EVENT_STREAM, event
from edge_gemma.serve.refusals import Refusal, error_object, refusal_of
from edge_gemma.units import MiB

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
MAX_TOKENS = 448  # a clip of 30 s holds fewer tokens of speech
_MAX_FIELDS = 32
_COPIED_BYTES = 1 * MiB
_ABSURD_S = 1e7  # of a header that a program wrote before it knew the length
MAX_HINT_CHARACTERS = 2000  # of a prompt or of all keywords
_IGNORED = ("languages[]", "include[]", "chunking_strategy")


@dataclass(frozen=True)
class Heard:
    """A segment, and the model's own doubt about it."""

    segment: Segment
    token_ids: tuple[int, ...]
    mean_logprob: float


@dataclass(frozen=True)
class Task:
    """What is asked about a sound file."""

    path: Path
    kind: str  # transcribe | translate
    instruction: str
    language: str | None
    temperature: float


class Speech:
    def __init__(self, server: Server):
        self._server = server

    def routes(self) -> list[Route]:
        return [
            Route("/v1/audio/transcriptions", self.transcriptions, methods=["POST"]),
            Route("/v1/audio/translations", self.translations, methods=["POST"]),
        ]

    async def transcriptions(self, request: Request) -> Response:
        return await self._asked(request, "transcribe")

    async def translations(self, request: Request) -> Response:
        return await self._asked(request, "translate")

    async def _asked(self, request: Request, kind: str) -> Response:
        require(self._server.manifest, "audio")
        try:
            form = await request.form(max_files=1, max_fields=_MAX_FIELDS)
        except HTTPException as error:
            raise Refusal(400, f"the form cannot be read: {error.detail}") from None
        folder = TemporaryDirectory(prefix="edge-gemma-")
        handed_on = False
        try:
            task = await self._task(form, kind, Path(folder.name))
            form_of = _text(form, "response_format") or "json"
            if form_of not in FORMATS:
                raise Refusal(
                    400,
                    f"response_format is {form_of[:50]!r}; expected {', '.join(FORMATS)}",
                    param="response_format",
                )
            if _text(form, "stream").lower() in ("true", "1"):
                response = await self._streamed(request, task, folder)
                handed_on = True
                return response
            return await unless_gone(request, self._whole(task, form_of))
        finally:
            await form.close()
            if not handed_on:
                folder.cleanup()

    async def _task(self, form: FormData, kind: str, folder: Path) -> Task:
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            raise Refusal(400, "the form has no file", param="file")
        await self._server.have_model(_text(form, "model"))
        if "word" in form.getlist("timestamp_granularities[]"):
            raise Refusal(
                400,
                "times of words are not known here; segment is",
                param="timestamp_granularities",
            )
        warn_ignored("/v1/audio", [name for name in _IGNORED if name in form])
        path = folder / "sound"
        with path.open("wb") as file:
            while block := await upload.read(_COPIED_BYTES):
                file.write(block)
        language = language_name(_text(form, "language"))
        instruction = TRANSCRIBE.format(language=language) if language else TRANSCRIBE_ANY
        if kind == "translate":
            instruction = TRANSLATE_ONLY.format(to="English")
        instruction = _hints(form) + instruction
        return Task(path, kind, instruction, language, _number(form, "temperature"))

    # generating

    async def _heard(self, task: Task) -> AsyncIterator[Heard]:
        """Segments, one after the other."""
        duration_s = await asyncio.to_thread(_duration_s, task.path)
        if self._server.limits.audio_s < duration_s < _ABSURD_S:
            raise self._too_long()
        pieces = self._utterances(task.path)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            # what fits a clip is something that was just said; a long file may wait for others
            yield await self._segment(task, piece, urgent=duration_s <= MAX_CLIP_S)

    def _utterances(self, path: Path) -> Iterator[Utterance]:
        try:
            for piece in utterances(path):
                if piece.end_s > self._server.limits.audio_s:
                    raise self._too_long()
                yield piece
        except MediaError as error:
            raise without_path(error, str(path)) from None

    def _too_long(self) -> Refusal:
        return Refusal(413, f"the sound is longer than {self._server.limits.audio_s:g} s")

    async def _segment(self, task: Task, piece: Utterance, *, urgent: bool) -> Heard:
        sampling = self._server.sampling(MAX_TOKENS, temperature=task.temperature, logprobs=0)
        clip = Message("user", [task.instruction, Audio(piece.samples)])
        request = GenerationRequest([clip], sampling=sampling, urgent=urgent)
        texts: list[str] = []
        ids: list[int] = []
        logprobs: list[float] = []
        async with self._server.service.submit(request) as answer:
            async for chunk in answer:
                texts.append(chunk.text)
                ids += chunk.token_ids
                logprobs += [entry.logprob for entry in chunk.logprobs]
        segment = Segment(piece.start_s, piece.end_s, "".join(texts).strip())
        mean = sum(logprobs) / len(logprobs) if logprobs else 0.0
        return Heard(segment, tuple(ids), max(mean, -9999.0))

    # answers

    async def _whole(self, task: Task, form: str) -> Response:
        heard = [each async for each in self._heard(task)]
        segments = [each.segment for each in heard]
        text = " ".join(segment.text for segment in segments if segment.text)
        if form == "text":
            return PlainTextResponse(text + "\n")
        if form == "srt":
            cues = [cue(segment, number) for number, segment in enumerate(segments, 1)]
            return PlainTextResponse("\n".join(cues), media_type="application/x-subrip")
        if form == "vtt":
            cues = [cue(segment, None) for segment in segments]
            return PlainTextResponse("\n".join(["WEBVTT\n", *cues]), media_type="text/vtt")
        duration_s = await asyncio.to_thread(_duration_s, task.path)
        usage = {"type": "duration", "seconds": round(duration_s)}
        if form == "json":
            return json_response({"text": text, "usage": usage})
        return json_response(
            {
                "task": task.kind,
                "language": (task.language or "").lower(),
                "duration": duration_s,
                "text": text,
                "segments": [_segment_object(n, each, task) for n, each in enumerate(heard)],
                "usage": usage,
            }
        )

    async def _streamed(self, request: Request, task: Task, folder: TemporaryDirectory) -> Response:
        """Events, one per segment. The first segment is made before the response begins, so that a
        request that is refused has an HTTP status of its own.
        """
        heard = self._heard(task)
        first = await unless_gone(request, _next(heard))
        return ClosingStream(self._events(task, first, heard), EVENT_STREAM, folder.cleanup)

    async def _events(
        self, task: Task, first: Heard | None, heard: AsyncIterator[Heard]
    ) -> AsyncIterator[bytes]:
        texts: list[str] = []
        each = first
        try:
            while each is not None:
                space = " " if texts else ""
                texts.append(each.segment.text)
                yield event({"type": "transcript.text.delta", "delta": space + texts[-1]})
                each = await _next(heard)
            seconds = round(await asyncio.to_thread(_duration_s, task.path))
            usage = {"type": "duration", "seconds": seconds}
            yield event({"type": "transcript.text.done", "text": " ".join(texts), "usage": usage})
        except EdgeGemmaError as error:
            yield event(error_object("/v1", refusal_of(error)))


async def _next(heard: AsyncIterator[Heard]) -> Heard | None:
    return await anext(heard, None)


def _segment_object(number: int, heard: Heard, task: Task) -> dict[str, object]:
    segment = heard.segment
    data = segment.text.encode()
    return {
        "id": number,
        "seek": 0,
        "start": segment.start_s,
        "end": segment.end_s,
        "text": segment.text,
        "tokens": list(heard.token_ids),
        "temperature": task.temperature,
        "avg_logprob": heard.mean_logprob,
        "compression_ratio": len(data) / len(zlib.compress(data)),
        "no_speech_prob": 0.0,  # stretches without speech are left out before
    }


def _hints(form: FormData) -> str:
    """OpenAI's ``keywords`` and ``prompt``, for the model to read before it is asked to write.
    Raises Refusal.
    """
    named = (*form.getlist("keywords[]"), *form.getlist("keywords"))
    keywords = ", ".join(word.strip() for word in named if isinstance(word, str) and word.strip())
    prompt = _text(form, "prompt").strip()
    for name, text in (("keywords", keywords), ("prompt", prompt)):
        if len(text) > MAX_HINT_CHARACTERS:
            raise Refusal(
                400,
                f"{name}: {len(text)} characters; at most {MAX_HINT_CHARACTERS} are taken",
                param=name,
            )
    words = f"Words that may occur: {keywords}\n" if keywords else ""
    return words + (f"What was said before, or what it is about: {prompt}\n" if prompt else "")


def _duration_s(path: Path) -> float:
    """What the header says. Raises MediaError."""
    try:
        with AudioFile(path) as file:
            return file.duration_s
    except MediaError as error:
        raise without_path(error, str(path)) from None


def _text(form: FormData, name: str) -> str:
    value = form.get(name)
    return value.strip() if isinstance(value, str) else ""


def _number(form: FormData, name: str) -> float:
    text = _text(form, name) or "0"
    try:
        return float(text)
    except ValueError:
        raise Refusal(400, f"{name} is {text[:20]!r}; expected a number", param=name) from None
