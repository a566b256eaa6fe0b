"""OpenAI's protocol: models, chat completions and completions. speech.py has the audio routes.

In: requests under /v1. Out: their JSON and event streams. What this server cannot do is refused by
name, never ignored where the answer would be another one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_gemma.conversation.call_stream import CallStream
from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import EdgeGemmaError
from edge_gemma.messages import FunctionCall, Message, Part
from edge_gemma.options import Logprob, Sampling
from edge_gemma.prompts.calls import tool_schema
from edge_gemma.serve.answer import GenerationRequest
from edge_gemma.serve.bodies import (
    InCallOrder,
    Server,
    decoded,
    encoded,
    from_base64,
    json_response,
    merged,
    picture_from_address,
    sound,
    streamed,
    unless_gone,
    warn_ignored,
    whole,
    with_schema,
)
from edge_gemma.serve.calls import call_or
from edge_gemma.serve.openai_bodies import (
    AudioPart,
    ChatBody,
    ChatMessage,
    CompletionBody,
    ImagePart,
    SamplingBody,
    TextPart,
    ToolCall,
)
from edge_gemma.serve.refusals import Refusal, error_object, refusal_of

EVENT_STREAM = "text/event-stream"
FINISH_REASONS = {
    "stop": "stop",
    "stop_string": "stop",
    "length": "length",
    "context": "length",
    "content_filter": "content_filter",  # by a rule of the guard
}
_MAX_TOP_LOGPROBS = 20


class OpenAI:
    def __init__(self, server: Server):
        self._server = server
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.one_model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]

    def _model(self) -> dict[str, object]:
        return {
            "id": self._server.name,
            "object": "model",
            "created": self._created,
            "owned_by": "edge-gemma",
        }

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        self._server.check_model(request.path_params["name"])
        return json_response(self._model())

    async def chat(self, request: Request) -> Response:
        body = decoded(await request.body(), ChatBody)
        server = self._server
        generation = await self.generation(body)
        answer = ChatWriter(server, generation.tools, with_logprobs=bool(body.logprobs))
        if body.stream:
            answer.with_usage = _wants_usage(body)
            return await streamed(request, server, generation, answer.events, EVENT_STREAM)
        chunks = await unless_gone(request, whole(server.service.submit(generation)))
        return json_response(answer.whole(chunks))

    async def generation(
        self, body: ChatBody, path: str = "/v1/chat/completions"
    ) -> GenerationRequest:
        """What a chat asks for. Raises Refusal, UsageError, MediaError."""
        await self._server.have_model(body.model)
        self._server.check_messages(body.messages)
        tools = _offered_tools(body)
        sampling = with_schema(self._chat_sampling(body, path), _schema(body, tools))
        messages = await self.messages(body.messages)
        return GenerationRequest(messages, sampling=sampling, tools=tools)

    def _chat_sampling(self, body: ChatBody, path: str) -> Sampling:
        n_top = body.top_logprobs or 0
        if not 0 <= n_top <= _MAX_TOP_LOGPROBS:
            raise Refusal(
                400,
                f"top_logprobs is {n_top}; expected 0 … {_MAX_TOP_LOGPROBS}",
                param="top_logprobs",
            )
        max_tokens = body.max_completion_tokens or body.max_tokens
        logprobs = n_top if body.logprobs else None
        return self._sampling(body, max_tokens, logprobs, path)

    def _sampling(
        self, body: SamplingBody, max_tokens: int | None, logprobs: int | None, path: str
    ) -> Sampling:
        if body.n not in (None, 1):
            raise Refusal(400, f"n is {body.n}; this server gives one answer", param="n")
        if body.logit_bias:
            raise Refusal(400, "logit_bias is not supported", param="logit_bias")
        penalties = ("frequency_penalty", "presence_penalty")
        warn_ignored(path, [name for name in penalties if getattr(body, name)])
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        return self._server.sampling(
            max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            repeat_penalty=body.repeat_penalty,
            seed=None if body.seed is None else body.seed % 2**32,
            stop=tuple(text for text in stop if text),
            logprobs=logprobs,
        )

    async def messages(self, given: Sequence[ChatMessage]) -> list[Message]:
        messages = InCallOrder()
        for message in given:
            calls = message.tool_calls or []
            content = [await self._part(part) for part in _content(message)]
            content += [_function_call(call) for call in calls]
            role = "system" if message.role == "developer" else message.role
            ids = [call.id for call in calls]
            messages.add(Message(role, content), calls=ids, answers=message.tool_call_id)
        return merged(messages.all())

    async def _part(self, part: TextPart | ImagePart | AudioPart) -> Part:
        if isinstance(part, TextPart):
            return part.text
        if isinstance(part, ImagePart):
            return picture_from_address(part.image_url.url, self._server.limits)
        return await sound(from_base64(part.input_audio.data, "input_audio"))

    async def completions(self, request: Request) -> Response:
        body = decoded(await request.body(), CompletionBody)
        server = self._server
        await server.have_model(body.model)
        for name, unwanted in (
            ("echo", body.echo),
            ("suffix", body.suffix),
            ("best_of", body.best_of not in (None, 1)),
        ):
            if unwanted:
                raise Refusal(400, f"{name} is not supported", param=name)
        if isinstance(body.prompt, list) and len(body.prompt) != 1:
            raise Refusal(400, f"{len(body.prompt)} prompts; give one", param="prompt")
        prompt = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
        max_tokens = 16 if body.max_tokens is None else body.max_tokens
        sampling = self._sampling(body, max_tokens, body.logprobs, "/v1/completions")
        generation = GenerationRequest(prompt=prompt, sampling=sampling)
        answer = CompletionWriter(server)
        if body.stream:
            answer.with_usage = _wants_usage(body)
            return await streamed(request, server, generation, answer.events, EVENT_STREAM)
        chunks = await unless_gone(request, whole(server.service.submit(generation)))
        return json_response(answer.whole(chunks))


def _wants_usage(body: SamplingBody) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _function_call(call: ToolCall) -> FunctionCall:
    arguments = call.function.arguments or "{}"
    return FunctionCall(call.function.name, decoded(arguments.encode(), dict[str, Any]))


def _content(message: ChatMessage) -> list[TextPart | ImagePart | AudioPart]:
    if isinstance(message.content, str):
        return [TextPart(message.content)]
    return message.content or []


def _offered_tools(body: ChatBody) -> list[dict[str, Any]]:
    """The tools the prompt describes. Raises Refusal."""
    if not body.tools or body.tool_choice == "none":
        return []
    if body.tool_choice in (None, "auto", "required"):
        return body.tools
    if isinstance(body.tool_choice, dict):
        name = body.tool_choice.get("function", body.tool_choice)
        name = name.get("name") if isinstance(name, dict) else None
        chosen = [tool for tool in body.tools if _tool_name(tool) == name]
        if chosen:
            return chosen
    raise Refusal(
        400,
        f"tool_choice is {str(body.tool_choice)[:100]}; expected none, auto, required or one of "
        "the tools",
        param="tool_choice",
    )


def _tool_name(tool: Mapping[str, Any]) -> object:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None


def _schema(body: ChatBody, tools: Sequence[Mapping]) -> dict | None:
    """What the answer must look like, if anything. Raises UsageError (bad tools), Refusal."""
    must_call = body.tool_choice == "required" or isinstance(body.tool_choice, dict)
    if tools and must_call:
        return tool_schema(tools)
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return call_or({"type": "object"}, tools)
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise Refusal(
            400, "response_format json_schema has no schema", param="response_format.json_schema"
        )
    return call_or(wanted.json_schema.schema, tools)


# --- answers ---


def usage_object(end: Chunk) -> dict[str, object]:
    usage = end.usage
    if usage is None:
        return {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.reused_tokens},
    }


def event(value: object) -> bytes:
    return b"data: " + encoded(value) + b"\n\n"


def calls_object(calls: Sequence[FunctionCall]) -> list[dict[str, object]]:
    return [
        {
            "index": index,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": encoded(call.parameters).decode(),
            },
        }
        for index, call in enumerate(calls)
    ]


def call_stream(server: Server, tools: Sequence[Mapping]) -> CallStream:
    model = server.service.model
    return CallStream(tools, model.prompt, model.decoder.piece)


@dataclass
class Writer:
    """An answer in OpenAI's shapes."""

    server: Server
    with_usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def frame(self, kind: str, choices: list[dict[str, object]], **more: object) -> dict:
        return {
            "id": f"chatcmpl-{self.id}" if kind.startswith("chat") else f"cmpl-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.server.name,
            "choices": choices,
            **more,
        }

    def token_text(self, token: int) -> bytes:
        return self.server.service.model.decoder.piece(token, True)

    async def events(self, chunks: AsyncIterator[Chunk]) -> AsyncIterator[bytes]:
        """Events until ``[DONE]``, or until one that says what failed."""
        try:
            async for chunk in chunks:
                for value in self.pieces(chunk):
                    yield event(value)
        except EdgeGemmaError as error:
            yield event(error_object("/v1", refusal_of(error)))
        yield b"data: [DONE]\n\n"

    def pieces(self, chunk: Chunk) -> list[dict]:
        """The events of a chunk."""
        raise NotImplementedError


class ChatWriter(Writer):
    KIND = "chat.completion"

    def __init__(self, server: Server, tools: Sequence[Mapping], with_logprobs: bool):
        super().__init__(server)
        self._calls = call_stream(server, tools)
        self._with_logprobs, self._begun = with_logprobs, False

    def whole(self, chunks: Sequence[Chunk]) -> dict:
        text = "".join([self._calls.push(chunk) for chunk in chunks])
        rest, calls = self._calls.finish()
        text += rest
        message: dict[str, object] = {"role": "assistant", "content": text}
        reason = _finish_reason(chunks[-1], calls)
        if calls:
            message["content"] = text.strip() or None
            message["tool_calls"] = [
                {name: value for name, value in call.items() if name != "index"}
                for call in calls_object(calls)
            ]
        choice: dict[str, object] = {"index": 0, "message": message, "finish_reason": reason}
        logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
        choice["logprobs"] = self._logprobs(logprobs)
        return self.frame(self.KIND, [choice], usage=usage_object(chunks[-1]))

    def pieces(self, chunk: Chunk) -> list[dict]:
        result = []
        if not self._begun:
            self._begun = True
            result.append(self._piece({"role": "assistant", "content": ""}))
        text = self._calls.push(chunk)
        if text or chunk.logprobs:
            result.append(self._piece({"content": text}, logprobs=chunk.logprobs))
        if chunk.finish_reason:
            result += self._end(chunk)
        return result

    def _end(self, chunk: Chunk) -> list[dict]:
        rest, calls = self._calls.finish()
        result = []
        if rest:
            result.append(self._piece({"content": rest}))
        # one call an event: some clients read the first of each event only
        result += [self._piece({"tool_calls": [call]}) for call in calls_object(calls)]
        result.append(self._piece({}, finish_reason=_finish_reason(chunk, calls)))
        if self.with_usage:
            result.append(self.frame(f"{self.KIND}.chunk", [], usage=usage_object(chunk)))
        return result

    def _piece(
        self,
        delta: dict[str, object],
        finish_reason: str | None = None,
        logprobs: Sequence[Logprob] = (),
    ) -> dict:
        choice: dict[str, object] = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        if logprobs:
            choice["logprobs"] = self._logprobs(logprobs)
        return self.frame(f"{self.KIND}.chunk", [choice])

    def _logprobs(self, logprobs: Sequence[Logprob]) -> dict | None:
        if not self._with_logprobs:
            return None
        content = [
            {
                **self._token(entry.token_id, entry.logprob),
                "top_logprobs": [self._token(token, value) for token, value in entry.top],
            }
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, object]:
        data = self.token_text(token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}


class CompletionWriter(Writer):
    KIND = "text_completion"

    def whole(self, chunks: Sequence[Chunk]) -> dict:
        text = "".join(chunk.text for chunk in chunks)
        logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
        choice = self._choice(text, logprobs, _finish_reason(chunks[-1], ()))
        return self.frame(self.KIND, [choice], usage=usage_object(chunks[-1]))

    def pieces(self, chunk: Chunk) -> list[dict]:
        reason = _finish_reason(chunk, ()) if chunk.finish_reason else None
        result = []
        if chunk.text or chunk.logprobs or reason:
            choice = self._choice(chunk.text, chunk.logprobs, reason)
            result.append(self.frame(self.KIND, [choice]))
        if chunk.finish_reason and self.with_usage:
            result.append(self.frame(self.KIND, [], usage=usage_object(chunk)))
        return result

    def _choice(
        self, text: str, logprobs: Sequence[Logprob], reason: str | None
    ) -> dict[str, object]:
        choice: dict[str, object] = {"index": 0, "text": text, "finish_reason": reason}
        choice["logprobs"] = self._logprobs(logprobs) if logprobs else None
        return choice

    def _logprobs(self, logprobs: Sequence[Logprob]) -> dict[str, object]:
        return {
            "tokens": [self._text(entry.token_id) for entry in logprobs],
            "token_logprobs": [max(entry.logprob, -9999.0) for entry in logprobs],
            "top_logprobs": [
                {self._text(token): max(value, -9999.0) for token, value in entry.top}
                for entry in logprobs
            ],
            "text_offset": [],
        }

    def _text(self, token: int) -> str:
        return self.token_text(token).decode("utf-8", "replace")


def _finish_reason(end: Chunk, calls: Sequence[FunctionCall]) -> str:
    if calls:
        return "tool_calls"
    return FINISH_REASONS.get(end.finish_reason or "", "stop")
