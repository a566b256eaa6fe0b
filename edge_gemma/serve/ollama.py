"""Ollama's protocol: tags, show, ps, chat and generate.

In: requests under /api. Out: JSON lines with times in nanoseconds. One model is served: routes that
would change what is installed are refused.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import EdgeGemmaError
from edge_gemma.messages import FunctionCall, Message, Part
from edge_gemma.options import Sampling
from edge_gemma.serve.answer import GenerationRequest
from edge_gemma.serve.bodies import (
    InCallOrder,
    Server,
    decoded,
    encoded,
    from_base64,
    is_sound,
    json_response,
    merged,
    picture,
    sound,
    streamed,
    unless_gone,
    warn_ignored,
    whole,
    with_schema,
)
from edge_gemma.serve.calls import call_or
from edge_gemma.serve.openai import call_stream
from edge_gemma.serve.page.routes import page_response, wants_page
from edge_gemma.serve.pulling import NDJSON, is_there, pulled
from edge_gemma.serve.refusals import Refusal, error_object, refusal_of
from edge_gemma.serve.residence import parse_keep_alive

# the release whose routes and fields are spoken; clients compare it
VERSION = "0.12.0"
_NS = 1_000_000_000
_ALWAYS_S = 100 * 365 * 86400.0  # a model that stays loaded
_DONE_REASONS = {
    "stop": "stop",
    "stop_string": "stop",
    "length": "length",
    "context": "length",
    "content_filter": "content_filter",  # by a rule of the guard; Ollama itself has none
}

_NOT_DONE = {"done": False}

# --- bodies ---


class Options(msgspec.Struct):
    """What has an effect. Others are named in a warning."""

    num_predict: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    stop: str | list[str] | None = None


KNOWN_OPTIONS = {item.name for item in msgspec.structs.fields(Options)}


class Function(msgspec.Struct):
    name: str
    arguments: dict[str, Any] = {}


class ToolCall(msgspec.Struct):
    function: Function


class ChatMessage(msgspec.Struct):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    images: list[str] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None


class GenerationBody(msgspec.Struct, kw_only=True):
    """What /api/chat and /api/generate share."""

    model: str
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None
    think: bool | str | None = None


class ChatBody(GenerationBody, kw_only=True):
    messages: list[ChatMessage] | None = None
    tools: list[dict[str, Any]] | None = None
    truncate: bool | None = None


class GenerateBody(GenerationBody, kw_only=True):
    prompt: str | None = None
    system: str | None = None
    images: list[str] | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None


class NameBody(msgspec.Struct):
    model: str | None = None
    name: str | None = None  # what older clients send

    @property
    def wanted(self) -> str:
        return self.model or self.name or ""


# --- routes ---


class Ollama:
    def __init__(self, server: Server):
        self._server = server
        self._modified = datetime.now(UTC).isoformat()

    def routes(self) -> list[Route]:
        return [
            Route("/", self.greeting, methods=["GET"]),
            Route("/api/version", self.version, methods=["GET"]),
            Route("/api/tags", self.tags, methods=["GET"]),
            Route("/api/ps", self.ps, methods=["GET"]),
            Route("/api/show", self.show, methods=["POST"]),
            Route("/api/chat", self.chat, methods=["POST"]),
            Route("/api/generate", self.generate, methods=["POST"]),
            Route("/api/pull", self.pull, methods=["POST"]),
        ]

    async def greeting(self, request: Request) -> Response:
        if wants_page(request.headers.get("accept", "")):
            return page_response()
        return PlainTextResponse("Ollama is running")

    async def version(self, request: Request) -> Response:
        return json_response({"version": VERSION})

    # the model

    def _details(self) -> dict[str, object]:
        manifest = self._server.manifest
        n_parameters = sum(math.prod(tensor.shape) for tensor in manifest.decoder.tensors)
        types: Counter[str] = Counter()
        for tensor in manifest.decoder.tensors:
            types[tensor.type] += tensor.nbytes
        return {
            "parent_model": "",
            "format": "gguf",
            "family": manifest.family,
            "families": [manifest.family],
            "parameter_size": _parameter_size(n_parameters),
            "quantization_level": types.most_common(1)[0][0] if types else "",
            "context_length": self._server.service.n_ctx,
            "embedding_length": manifest.decoder.n_embd,
        }

    def _entry(self) -> dict[str, object]:
        manifest = self._server.manifest
        return {
            "name": self._server.name,
            "model": self._server.name,
            "modified_at": self._modified,
            "size": sum(file.size for file in manifest.files.values()),
            "digest": manifest.files[manifest.decoder.file].sha256,
            "details": self._details(),
            "capabilities": self._capabilities(),
        }

    def _capabilities(self) -> list[str]:
        manifest = self._server.manifest
        if manifest.embedding is not None:
            return ["embedding"]
        capabilities = ["completion"]
        if manifest.instruct:
            capabilities.append("tools")
        if manifest.vision is not None:
            capabilities.append("vision")
        if manifest.audio is not None:
            capabilities.append("audio")
        return capabilities

    async def tags(self, request: Request) -> Response:
        return json_response({"models": [self._entry()]})

    async def ps(self, request: Request) -> Response:
        residence = self._server.residence
        if residence is not None and not residence.loaded:
            return json_response({"models": []})
        left_s = _ALWAYS_S if residence is None else min(residence.left_s, _ALWAYS_S)
        entry = self._entry()
        del entry["modified_at"]
        entry["size"] = self._server.service.model.plan.total_bytes
        entry["size_vram"] = 0
        entry["expires_at"] = (datetime.now(UTC) + timedelta(seconds=left_s)).isoformat()
        entry["context_length"] = self._server.service.n_ctx
        return json_response({"models": [entry]})

    async def show(self, request: Request) -> Response:
        body = decoded(await request.body(), NameBody)
        self._server.check_model(body.wanted)
        manifest = self._server.manifest
        family, decoder = manifest.family, manifest.decoder
        return json_response(
            {
                "license": manifest.source.licence,
                "modelfile": "",
                "parameters": f"num_ctx {self._server.service.n_ctx}",
                "template": manifest.chat_template or "",
                "modified_at": self._modified,
                "details": self._details(),
                "model_info": {
                    "general.architecture": family,
                    f"{family}.context_length": decoder.n_ctx_train,
                    f"{family}.embedding_length": decoder.n_embd,
                    f"{family}.block_count": decoder.n_layer,
                },
                "capabilities": self._capabilities(),
            }
        )

    async def pull(self, request: Request) -> Response:
        body = decoded(await request.body(), NameBody)
        if is_there(self._server, body.wanted):
            return Response(encoded({"status": "success"}) + b"\n", media_type=NDJSON)
        if self._server.limits.allow_pull:
            return pulled(body.wanted)
        raise Refusal(
            404,
            f"model {body.wanted[:100]!r} is not installed, and this server downloads nothing; "
            "start it with --allow-pull, or type edge-gemma pull",
        )

    # answers

    async def chat(self, request: Request) -> Response:
        body = decoded(await request.body(), ChatBody)
        server = self._server
        self._check(body)
        if not body.messages:
            return await self._moved(body, "chat")
        load_s = await server.have_model(body.model, body.keep_alive)
        server.check_messages(body.messages)
        tools = body.tools or []
        generation = GenerationRequest(
            await self._messages(body.messages),
            sampling=self._sampling(body, "/api/chat"),
            tools=tools,
            truncate=body.truncate is not False,
        )
        writer = _Writer(server, "chat", tools, load_s)
        return await self._answer(request, body, generation, writer)

    async def generate(self, request: Request) -> Response:
        body = decoded(await request.body(), GenerateBody)
        server = self._server
        self._check(body)
        if body.suffix:
            raise Refusal(400, f"{server.name} does not support insert")
        warn_ignored("/api/generate", [n for n in ("template", "context") if getattr(body, n)])
        if not body.prompt and not body.images:
            return await self._moved(body, "generate")
        load_s = await server.have_model(body.model, body.keep_alive)
        writer = _Writer(server, "generate", load_s=load_s)
        sampling = self._sampling(body, "/api/generate")
        parts = [*await self._media(body.images), body.prompt or ""]
        if body.raw:
            generation = GenerationRequest(prompt=parts, sampling=sampling)
        else:
            system = [Message("system", body.system)] if body.system else []
            messages = [*system, Message("user", parts)]
            generation = GenerationRequest(messages, sampling=sampling, truncate=True)
        return await self._answer(request, body, generation, writer)

    async def _moved(self, body: GenerationBody, route: Literal["chat", "generate"]) -> Response:
        """The answer to an empty request, which asks for the model to be loaded, or unloaded."""
        residence = self._server.residence
        if residence is None and body.keep_alive is not None:
            warn_ignored(f"/api/{route}", ["keep_alive"])
        if residence is not None and body.keep_alive is not None:
            if parse_keep_alive(body.keep_alive) == 0:
                residence.keep(0)
                return json_response(_Writer(self._server, route).moved("unload"))
        load_s = await self._server.have_model(body.model, body.keep_alive)
        return json_response(_Writer(self._server, route, load_s=load_s).moved("load"))

    async def _answer(
        self,
        request: Request,
        body: GenerationBody,
        generation: GenerationRequest,
        writer: _Writer,
    ) -> Response:
        if body.stream is not False:
            return await streamed(request, self._server, generation, writer.lines, NDJSON)
        answer = self._server.service.submit(generation)
        return json_response(writer.whole(await unless_gone(request, whole(answer))))

    def _check(self, body: GenerationBody) -> None:
        self._server.check_model(body.model)
        if body.think:
            raise Refusal(400, f"{self._server.name} does not support thinking")

    def _sampling(self, body: GenerationBody, path: str) -> Sampling:
        given = body.options or {}
        warn_ignored(path, [name for name in given if name not in KNOWN_OPTIONS])
        try:
            options = msgspec.convert(given, Options)
        except msgspec.ValidationError as error:
            raise Refusal(400, f"options: {error}") from None
        n_predict = options.num_predict
        seed = options.seed
        stop = [options.stop] if isinstance(options.stop, str) else options.stop or []
        sampling = self._server.sampling(
            n_predict if n_predict is not None and n_predict > 0 else None,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repeat_penalty=options.repeat_penalty,
            seed=None if seed is None or seed < 0 else seed % 2**32,
            stop=tuple(text for text in stop if text),
        )
        schema = _schema(body.format)
        tools = body.tools if isinstance(body, ChatBody) else None
        return with_schema(sampling, call_or(schema, tools) if schema and tools else schema)

    async def _messages(self, given: Sequence[ChatMessage]) -> list[Message]:
        messages = InCallOrder()
        for message in given:
            functions = [call.function for call in message.tool_calls or ()]
            calls = [FunctionCall(function.name, function.arguments) for function in functions]
            content = [*await self._media(message.images), message.content, *calls]
            names = [call.name for call in calls]
            messages.add(Message(message.role, content), calls=names, answers=message.tool_name)
        return merged(messages.all())

    async def _media(self, images: Sequence[str] | None) -> list[Part]:
        """Pictures, and sounds, which come by the same field."""
        parts: list[Part] = []
        for text in images or ():
            data = from_base64(text, "image")
            is_clip = is_sound(data)
            parts.append(await sound(data) if is_clip else picture(data, self._server.limits))
        return parts


def _parameter_size(n_parameters: int) -> str:
    """
    >>> _parameter_size(268_098_176), _parameter_size(4_000_000_000)
    ('268.10M', '4.0B')
    """
    if n_parameters >= 1e9:
        return f"{n_parameters / 1e9:.1f}B"
    return f"{n_parameters / 1e6:.2f}M"


def _schema(form: str | dict[str, Any] | None) -> dict | None:
    if isinstance(form, dict):
        return form
    if form == "json":
        return {"type": "object"}
    if form:
        raise Refusal(400, f"format is {form[:100]!r}; expected json or a JSON schema")
    return None


# --- lines ---


@dataclass
class _Writer:
    """An answer in the shape of /api/chat or /api/generate."""

    server: Server
    route: Literal["chat", "generate"]
    tools: Sequence[Mapping] = ()
    load_s: float = 0.0
    started_s: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._calls = call_stream(self.server, self.tools)

    def line(
        self, text: str, end: Mapping[str, object], calls: Sequence[FunctionCall] = ()
    ) -> dict:
        """One object; ``end`` says whether it is the last, and if so, its figures."""
        result: dict[str, object] = {
            "model": self.server.name,
            "created_at": datetime.now(UTC).isoformat(),
        }
        if self.route == "generate":
            return {**result, "response": text, **end}
        message: dict[str, object] = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [
                {"function": {"index": index, "name": call.name, "arguments": call.parameters}}
                for index, call in enumerate(calls)
            ]
        return {**result, "message": message, **end}

    def moved(self, reason: Literal["load", "unload"]) -> dict:
        return self.line("", {"done": True, "done_reason": reason})

    def whole(self, chunks: Sequence[Chunk]) -> dict:
        text = "".join([self._calls.push(chunk) for chunk in chunks])
        rest, calls = self._calls.finish()
        return self.line(text + rest, self._end(chunks[-1]), calls)

    async def lines(self, chunks: AsyncIterator[Chunk]) -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                text = self._calls.push(chunk)
                if text:
                    yield encoded(self.line(text, _NOT_DONE)) + b"\n"
                if chunk.finish_reason:
                    yield self._last_lines(chunk)
        except EdgeGemmaError as error:
            yield encoded(error_object("/api", refusal_of(error))) + b"\n"

    def _last_lines(self, end: Chunk) -> bytes:
        rest, calls = self._calls.finish()
        lines = []
        if rest or calls:
            lines.append(self.line(rest, _NOT_DONE, calls))
        lines.append(self.line("", self._end(end)))
        return b"".join(encoded(line) + b"\n" for line in lines)

    def _end(self, end: Chunk) -> dict[str, object]:
        usage, timings = end.usage, end.timings
        total_s = self.load_s + time.perf_counter() - self.started_s
        return {
            "done": True,
            "done_reason": _DONE_REASONS.get(end.finish_reason or "", "stop"),
            "total_duration": int(total_s * _NS),
            "load_duration": int(self.load_s * _NS),
            "prompt_eval_count": usage.prompt_tokens if usage else 0,
            "prompt_eval_duration": int(timings.prefill_s * _NS) if timings else 0,
            "eval_count": usage.completion_tokens if usage else 0,
            "eval_duration": int(timings.decode_s * _NS) if timings else 0,
        }
