"""OpenAI's /v1/responses, stateless: every request brings its whole conversation.

In: items (messages, calls, their results). Out: one response, or its events. The items are made a
chat request, so that both routes take and refuse the same.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import EdgeGemmaError
from edge_gemma.messages import FunctionCall
from edge_gemma.serve.bodies import (
    Server,
    decoded,
    encoded,
    json_response,
    streamed,
    unless_gone,
    warn_ignored,
    whole,
)
from edge_gemma.serve.openai import EVENT_STREAM, FINISH_REASONS, OpenAI, call_stream
from edge_gemma.serve.openai_bodies import ChatBody
from edge_gemma.serve.refusals import Refusal, error_object, refusal_of

PATH = "/v1/responses"
_STATE = ("previous_response_id", "conversation", "background", "prompt")  # would need a memory
_NO_EFFECT = ("include", "reasoning", "service_tier", "truncation", "max_tool_calls")
_TEXTS = ("input_text", "output_text", "text", "refusal")


class TextFormat(msgspec.Struct):
    type: str = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None


class TextOptions(msgspec.Struct):
    format: TextFormat | None = None


class ResponsesBody(msgspec.Struct, kw_only=True):
    model: str
    input: str | list[dict[str, Any]] = ""
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: TextOptions | None = None
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    include: Any = None
    reasoning: Any = None
    service_tier: Any = None
    truncation: str | None = None
    max_tool_calls: int | None = None


class Responses:
    def __init__(self, server: Server):
        self._server, self._chat = server, OpenAI(server)

    def routes(self) -> list[Route]:
        return [Route(PATH, self.create, methods=["POST"])]

    async def create(self, request: Request) -> Response:
        body = decoded(await request.body(), ResponsesBody)
        generation = await self._chat.generation(as_chat(body), PATH)
        writer = ResponseWriter(self._server, body, generation.tools)
        if body.stream:
            lines = writer.events
            return await streamed(request, self._server, generation, lines, EVENT_STREAM)
        chunks = await unless_gone(request, whole(self._server.service.submit(generation)))
        return json_response(writer.whole(chunks))


# --- items → messages ---


def as_chat(body: ResponsesBody) -> ChatBody:
    """The same request for /v1/chat/completions. Raises Refusal."""
    for name in _STATE:
        if getattr(body, name):
            raise Refusal(
                400,
                f"{name} is not supported: nothing is kept here between requests; send the whole "
                "conversation as input",
                param=name,
            )
    ignored = [name for name in _NO_EFFECT if getattr(body, name) not in (None, [], "disabled")]
    warn_ignored(PATH, ignored)
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    for index, item in enumerate(items):
        message = _message(index, item)
        if message is not None:
            messages.append(message)
    chat: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tools": [_tool(tool) for tool in body.tools or ()],
        "tool_choice": _choice(body.tool_choice),
    }
    wanted = body.text.format if body.text else None
    if wanted is not None:
        schema = {"name": wanted.name, "schema": wanted.schema}
        chat["response_format"] = {"type": wanted.type, "json_schema": schema}
    try:
        return msgspec.convert(chat, ChatBody)
    except msgspec.ValidationError as error:
        raise Refusal(400, f"the body is not what was expected: {error}") from None


def _message(index: int, item: dict[str, Any]) -> dict[str, Any] | None:
    kind = item.get("type", "message")
    if kind == "message":
        content = item.get("content")
        if isinstance(content, list):
            content = [_part(index, part) for part in content]
        return {"role": item.get("role"), "content": content}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        calls = [{"id": item.get("call_id"), "function": function}]
        return {"role": "assistant", "tool_calls": calls}
    if kind == "function_call_output":
        output = item.get("output", "")
        if not isinstance(output, str):
            output = encoded(output).decode()
        return {"role": "tool", "content": output, "tool_call_id": item.get("call_id")}
    if kind == "reasoning":  # another model's thoughts; they are no part of what was said
        return None
    raise Refusal(
        400,
        f"input[{index}] is of type {str(kind)[:60]!r}; expected message, function_call or "
        "function_call_output",
        param="input",
    )


def _part(index: int, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXTS:
        return {"type": "text", "text": part.get("text", part.get("refusal", ""))}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    if kind == "input_audio":
        return {"type": "input_audio", "input_audio": part.get("input_audio")}
    raise Refusal(
        400,
        f"input[{index}] has a part of type {str(kind)[:60]!r}; expected input_text, input_image "
        "with an image_url, or input_audio",
        param="input",
    )


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type", "function") != "function":
        raise Refusal(
            400,
            f"a tool is of type {str(tool.get('type'))[:60]!r}; only functions can be called here",
            param="tools",
        )
    function = {name: value for name, value in tool.items() if name not in ("type", "strict")}
    return {"type": "function", "function": tool.get("function", function)}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, dict) and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


# --- answers ---


@dataclass
class ResponseWriter:
    """An answer as a response object, or as the events that build it."""

    server: Server
    body: ResponsesBody
    tools: Sequence[Any]
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._calls = call_stream(self.server, self.tools)
        self._output: list[dict[str, Any]] = []
        self._text = ""
        self._message_id = f"msg_{secrets.token_hex(16)}"
        self._n_events = 0
        self._is_open = False  # the message's item was announced

    def whole(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        text = "".join([self._calls.push(chunk) for chunk in chunks])
        rest, calls = self._calls.finish()
        text += rest
        if text.strip() or not calls:
            self._output.append(self._message(text))
        self._output += map(_call_item, calls)
        return self._response(chunks[-1])

    def _message(self, text: str | None, status: str = "completed") -> dict[str, Any]:
        content = [] if text is None else [_text_part(text)]
        item = {"type": "message", "id": self._message_id, "status": status, "role": "assistant"}
        return item | {"content": content}

    def _response(self, end: Chunk | None, error: dict[str, Any] | None = None) -> dict[str, Any]:
        body = self.body
        reason = None if end is None else FINISH_REASONS.get(end.finish_reason or "", "stop")
        reasons = {"length": "max_output_tokens", "content_filter": "content_filter"}
        cut = reasons.get(reason or "")
        status = "in_progress" if end is None else "incomplete" if cut else "completed"
        wanted = body.text.format if body.text and body.text.format else TextFormat()
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "failed" if error else status,
            "error": error,
            "incomplete_details": {"reason": cut} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.server.name,
            "output": self._output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": wanted},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": _usage(end),
            "user": None,
            "metadata": body.metadata or {},
        }

    async def events(self, chunks: AsyncIterator[Chunk]) -> AsyncIterator[bytes]:
        """Events until the response is complete, or until one that says what failed."""
        yield self._event("response.created", response=self._response(None))
        yield self._event("response.in_progress", response=self._response(None))
        try:
            async for chunk in chunks:
                for line in self._delta(self._calls.push(chunk)):
                    yield line
                if chunk.finish_reason:
                    for line in self._finish(chunk):
                        yield line
        except EdgeGemmaError as error:
            detail = error_object("/v1", refusal_of(error))["error"]
            assert isinstance(detail, dict)
            code = detail["code"] or "server_error"
            failure = {"code": code, "message": detail["message"]}
            yield self._event("error", **failure, param=None)
            yield self._event("response.failed", response=self._response(None, failure))

    def _event(self, kind: str, **fields: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._n_events} | fields
        self._n_events += 1
        return f"event: {kind}\n".encode() + b"data: " + encoded(value) + b"\n\n"

    def _delta(self, text: str) -> list[bytes]:
        if not text:
            return []
        lines = [] if self._is_open else self._open_message()
        self._text += text
        place = self._place | {"content_index": 0}
        return [*lines, self._event("response.output_text.delta", **place, delta=text, logprobs=[])]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": 0}

    def _open_message(self) -> list[bytes]:
        self._is_open = True
        item = self._message(None, "in_progress")
        place = self._place | {"content_index": 0}
        return [
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", **place, part=_text_part("")),
        ]

    def _finish(self, end: Chunk) -> list[bytes]:
        rest, calls = self._calls.finish()
        lines = self._delta(rest)
        if not self._is_open and not calls:
            lines += self._open_message()
        if self._is_open:
            place = self._place | {"content_index": 0}
            item = self._message(self._text)
            self._output.append(item)
            lines += [
                self._event("response.output_text.done", **place, text=self._text, logprobs=[]),
                self._event("response.content_part.done", **place, part=_text_part(self._text)),
                self._event("response.output_item.done", output_index=0, item=item),
            ]
        for call in calls:
            lines += self._call_events(_call_item(call))
        response = self._response(end)
        return [*lines, self._event(f"response.{response['status']}", response=response)]

    def _call_events(self, item: dict[str, Any]) -> list[bytes]:
        index, arguments = len(self._output), item["arguments"]
        self._output.append(item)
        begun = item | {"arguments": "", "status": "in_progress"}
        place = {"item_id": item["id"], "output_index": index}
        kind = "response.function_call_arguments"
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event(f"{kind}.delta", **place, delta=arguments),
            self._event(f"{kind}.done", **place, name=item["name"], arguments=arguments),
            self._event("response.output_item.done", output_index=index, item=item),
        ]


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: FunctionCall) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{secrets.token_hex(16)}",
        "call_id": f"call_{secrets.token_hex(12)}",
        "name": call.name,
        "arguments": encoded(call.parameters).decode(),
        "status": "completed",
    }


def _usage(end: Chunk | None) -> dict[str, Any] | None:
    if end is None:
        return None
    usage = end.usage
    n_prompt, n_reused = (usage.prompt_tokens, usage.reused_tokens) if usage else (0, 0)
    n_answer = usage.completion_tokens if usage else 0
    return {
        "input_tokens": n_prompt,
        "input_tokens_details": {"cached_tokens": n_reused},
        "output_tokens": n_answer,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": n_prompt + n_answer,
    }
