"""Turns that a browser speaks: the sound comes up in pieces while it is spoken.

    POST /page/turns                 {"messages": […]} → {"id"}
    POST /page/turns/ID/audio        16-bit little-endian mono samples at 16 kHz
    POST /page/turns/ID/answer       the turn was spoken: events as of /v1/chat/completions
    DELETE /page/turns/ID            never mind

In: what was said before, as chat messages, then samples. Out: the answer. Every piece is encoded
and prefilled as it comes. Plain requests, so they pass the same guard as everything else; a browser
cannot stream a body up over HTTP/1.1.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_gemma.bundles.manifest import require
from edge_gemma.conversation.stream import Chunk
from edge_gemma.hearing.samples import MAX_CLIP_S, RATE_HZ
from edge_gemma.messages import Audio, Message
from edge_gemma.serve.answer import GenerationRequest
from edge_gemma.serve.bodies import ClosingStream, Server, decoded, json_response
from edge_gemma.serve.openai import EVENT_STREAM, ChatWriter, OpenAI
from edge_gemma.serve.openai_bodies import ChatMessage
from edge_gemma.serve.refusals import Refusal
from edge_gemma.serve.spoken import SpokenAnswer

FORGOTTEN_S = 30.0  # after the last piece: the page was closed, or the network is gone
MAX_TURNS = 16
MAX_PIECE_BYTES = int(MAX_CLIP_S * RATE_HZ) * 2


class TurnBody(msgspec.Struct):
    messages: list[ChatMessage] = []
    max_tokens: int | None = None
    temperature: float | None = None


class _Turn:
    def __init__(self, answer: SpokenAnswer):
        self.answer, self.n_samples = answer, 0
        self.forget: asyncio.TimerHandle | None = None


class Turns:
    def __init__(self, server: Server):
        self._server, self._chat = server, OpenAI(server)
        self._turns: dict[str, _Turn] = {}

    def routes(self) -> list[Route]:
        return [
            Route("/page/turns", self.begin, methods=["POST"]),
            Route("/page/turns/{id}", self.drop, methods=["DELETE"]),
            Route("/page/turns/{id}/audio", self.audio, methods=["POST"]),
            Route("/page/turns/{id}/answer", self.answer, methods=["POST"]),
        ]

    async def begin(self, request: Request) -> Response:
        body = decoded(await request.body(), TurnBody)
        require(self._server.manifest, "audio")
        self._server.check_messages(body.messages)
        if len(self._turns) >= MAX_TURNS:
            raise Refusal(429, f"{MAX_TURNS} turns are being spoken already", retry_after_s=2)
        before = await self._chat.messages(body.messages)
        spoken = Message("user", [Audio()])
        sampling = self._server.sampling(body.max_tokens, temperature=body.temperature)
        generation = GenerationRequest(
            [*before, spoken], sampling=sampling, truncate=True, urgent=True, pad_audio=False
        )
        name = secrets.token_urlsafe(12)
        self._turns[name] = _Turn(self._server.service.listen(generation))
        self._remember(name)
        return json_response({"id": name})

    async def audio(self, request: Request) -> Response:
        name, turn = self._found(request)
        data = await request.body()
        if len(data) % 2 or len(data) > MAX_PIECE_BYTES:
            raise Refusal(
                400,
                f"a piece of {len(data)} bytes; expected 16-bit samples, at most {MAX_CLIP_S:g} s",
            )
        samples = np.frombuffer(data, "<i2").astype(np.float32) / 32768
        turn.n_samples += len(samples)
        if turn.n_samples > MAX_CLIP_S * RATE_HZ:
            raise Refusal(400, f"a turn may have {MAX_CLIP_S:g} s; ask for its answer")
        self._remember(name)
        n_rows = await turn.answer.push(samples)
        return json_response({"soft_tokens": n_rows, "seconds": turn.n_samples / RATE_HZ})

    async def answer(self, request: Request) -> Response:
        name, turn = self._found(request)
        if turn.n_samples == 0:
            raise Refusal(400, "nothing was said; send some audio first")
        self._forget(name)
        await turn.answer.finish()
        writer = ChatWriter(self._server, (), with_logprobs=False)
        writer.with_usage = True

        async def lines() -> AsyncIterator[bytes]:
            async with turn.answer:
                async for line in writer.events(_each(turn.answer)):
                    yield line

        return ClosingStream(lines(), EVENT_STREAM, turn.answer.cancel)

    async def drop(self, request: Request) -> Response:
        name, turn = self._found(request)
        self._forget(name)
        turn.answer.cancel()
        return json_response({})

    def _found(self, request: Request) -> tuple[str, _Turn]:
        name = request.path_params["id"]
        if name not in self._turns:
            raise Refusal(404, "there is no such turn, or nothing came for too long; begin anew")
        return name, self._turns[name]

    def _remember(self, name: str) -> None:
        turn = self._turns[name]
        if turn.forget is not None:
            turn.forget.cancel()
        turn.forget = asyncio.get_running_loop().call_later(FORGOTTEN_S, self._expire, name)

    def _expire(self, name: str) -> None:
        with suppress(KeyError):
            self._turns[name].answer.cancel()
            self._forget(name)

    def _forget(self, name: str) -> None:
        turn = self._turns.pop(name)
        if turn.forget is not None:
            turn.forget.cancel()


async def _each(answer: SpokenAnswer) -> AsyncIterator[Chunk]:
    async for chunk in answer:
        yield chunk
