"""What both protocols share: bodies → checked records, media out of base64, answers for readers.

In: bytes from the network, which are never trusted. Out: records of msgspec, messages, sampling.
Addresses in a request are never fetched, and a text in it is never taken for a file's name.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from edge_gemma.bundles.manifest import Manifest
from edge_gemma.conversation.stream import Chunk
from edge_gemma.errors import MediaError
from edge_gemma.hearing.sound import read_audio
from edge_gemma.messages import Audio, Image, Message, Part
from edge_gemma.options import Sampling
from edge_gemma.serve.answer import Answer, GenerationRequest
from edge_gemma.serve.guard import Limits
from edge_gemma.serve.refusals import Refusal
from edge_gemma.serve.residence import Residence, parse_keep_alive
from edge_gemma.serve.service import Service
from edge_gemma.sources import is_data_uri

log = logging.getLogger("edge_gemma.serve")
T = TypeVar("T")
_SOUND_BEGINNINGS = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2")
_GONE_STATUS = 499  # nobody is there to read it


@dataclass(frozen=True)
class Server:
    """What the routes need: the service, the model's name and the limits."""

    service: Service
    limits: Limits
    name: str
    residence: Residence | None = None  # None: the model always stays

    @property
    def manifest(self) -> Manifest:
        return self.service.model.bundle.manifest

    def check_model(self, name: str) -> None:
        """Raises Refusal 404 for another model than the one that is served."""
        if name.removesuffix(":latest") != self.name:
            raise Refusal(
                404,
                f"model {name[:100]!r} not found; this server has {self.name!r}",
                code="model_not_found",
                param="model",
            )

    async def have_model(self, name: str, keep_alive: float | str | None = None) -> float:
        """Have the model of this name in memory → how many seconds its load took. Raises what
        :meth:`check_model` and :meth:`Residence.load` raise, UsageError (a ``keep_alive`` that is
        no time).
        """
        self.check_model(name)
        keep_s = None if keep_alive is None else parse_keep_alive(keep_alive)
        return await self.wake(keep_s)

    def using(self) -> contextlib.AbstractContextManager[None]:
        """The model does not go in here."""
        return contextlib.nullcontext() if self.residence is None else self.residence.using()

    async def wake(self, keep_alive_s: float | None = None) -> float:
        """What :meth:`Residence.load` does."""
        return 0.0 if self.residence is None else await self.residence.load(keep_alive_s)

    def check_messages(self, messages: Sequence[object]) -> None:
        if len(messages) > self.limits.messages:
            raise Refusal(
                400, f"{len(messages)} messages; at most {self.limits.messages} are taken"
            )

    def sampling(self, max_tokens: int | None, **given: Any) -> Sampling:
        """The model's own way of sampling with what was ``given`` (None: not given). Raises
        UsageError.
        """
        changes = {name: value for name, value in given.items() if value is not None}
        limits = [max_tokens, self.limits.output_tokens, self.service.n_ctx]
        n_most = min(limit for limit in limits if limit is not None)
        return self.service.model.sampling(max_tokens=n_most, **changes)


def decoded(body: bytes, kind: type[T]) -> T:
    """A JSON body as a record. Raises Refusal 400, which names what is wrong and where."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the body is not what was expected: {error}") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None


def encoded(value: object) -> bytes:
    return msgspec.json.encode(value)


def json_response(value: object) -> Response:
    return Response(encoded(value), media_type="application/json")


def warn_ignored(path: str, names: Sequence[str]) -> None:
    """Say which options of a request have no effect here."""
    if names:
        log.warning("%s: no effect here: %s", path, ", ".join(sorted(names)))


# --- media ---


def from_base64(text: str, what: str) -> bytes:
    """Raises Refusal 400."""
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, f"the {what} is not base64") from None
    if not data:
        raise Refusal(400, f"the {what} is empty")
    return data


def picture(data: bytes, limits: Limits) -> Image:
    """The bytes of an image file → a part of a message. Raises MediaError."""
    from edge_gemma.seeing.picture import Picture

    return Image(Picture(data, max_pixels=limits.pixels))


def picture_from_address(address: str, limits: Limits) -> Image:
    """A data URI → a part of a message. Raises MediaError, Refusal (any other address)."""
    from edge_gemma.seeing.source import accept

    if not is_data_uri(address):
        raise Refusal(
            400,
            "only pictures inside the request are taken (data:image/…;base64,…); addresses are "
            "not fetched",
            code="invalid_image_url",
        )
    data = accept(address)
    assert isinstance(data, bytes)
    return picture(data, limits)


def is_sound(data: bytes) -> bool:
    return data.startswith(_SOUND_BEGINNINGS) and data[8:12] != b"WEBP"


async def sound(data: bytes) -> Audio:
    """The bytes of a sound file of at most 30 s → a part of a message. Raises MediaError."""
    return Audio(await asyncio.to_thread(read_audio, data))


def without_path(error: MediaError, path: str) -> MediaError:
    """The error with "the sound" in place of a temporary file's name."""
    text = str(error).replace(path, "the sound").replace(Path(path).name, "sound")
    return MediaError(text)


def merged(messages: Sequence[Message]) -> list[Message]:
    """Neighbouring messages of one role as one: clients split what Gemma's turns hold together.
    Results of functions stay apart.

    >>> [message.content for message in merged([Message("user", "a"), Message("user", "b")])]
    [['a', '\\n\\n', 'b']]
    """
    result: list[Message] = []
    for message in messages:
        before = result[-1] if result else None
        if before is None or before.role != message.role or message.role == "tool":
            result.append(message)
            continue
        both = [*parts_of(before.content), "\n\n", *parts_of(message.content)]
        result[-1] = Message(message.role, both)
    return result


class InCallOrder:
    """Messages of which results of functions are put into the order of the calls they answer,
    which is how they find their call. Calls and results have a key: an id, or a function's name.

    >>> messages = InCallOrder()
    >>> messages.add(Message("assistant", ""), calls=["a", "b"])
    >>> messages.add(Message("tool", "of b"), answers="b")
    >>> messages.add(Message("tool", "of a"), answers="a")
    >>> [message.content for message in messages.all()]
    ['', 'of a', 'of b']
    """

    def __init__(self) -> None:
        self._done: list[Message] = []
        self._results: list[tuple[int, Message]] = []
        self._keys: list[str | None] = []

    def add(
        self, message: Message, *, calls: Sequence[str | None] = (), answers: str | None = None
    ) -> None:
        if message.role == "tool":
            known = answers in self._keys
            place = self._keys.index(answers) if known else len(self._keys)
            if known:
                self._keys[place] = None  # the next of that name is another call
            self._results.append((place, message))
            return
        self._done, self._results, self._keys = self.all(), [], list(calls)
        self._done.append(message)

    def all(self) -> list[Message]:
        in_order = sorted(self._results, key=lambda result: result[0])
        return [*self._done, *(message for _, message in in_order)]


def parts_of(content: str | Sequence[Part]) -> list[Part]:
    return [content] if isinstance(content, str) else list(content)


# --- answers ---


async def whole(answer: Answer) -> list[Chunk]:
    """All chunks of an answer."""
    async with answer:
        return [chunk async for chunk in answer]


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away. Raises Refusal then."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(_GONE_STATUS, "the client went away")
        return task.result()
    finally:
        for waiting in (task, gone):
            waiting.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def streamed(
    request: Request,
    server: Server,
    generation: GenerationRequest,
    lines: Callable[[AsyncIterator[Chunk]], AsyncIterator[bytes]],
    media_type: str,
) -> Response:
    """A response that gives what ``lines`` makes of the chunks as they come.

    It begins with the first chunk, so that a request that is refused has an HTTP status of its own.
    """
    answer = server.service.submit(generation)
    try:
        first = await unless_gone(request, _first(answer))
    except BaseException:
        answer.cancel()
        raise

    async def body() -> AsyncIterator[bytes]:
        async with answer:
            async for line in lines(_chained(first, answer)):
                yield line

    return ClosingStream(body(), media_type, answer.cancel)


async def _first(answer: Answer) -> Chunk:
    return await anext(answer)


async def _chained(first: Chunk, answer: Answer) -> AsyncIterator[Chunk]:
    yield first
    async for chunk in answer:
        yield chunk


class ClosingStream(StreamingResponse):
    """A stream with something to do at its end, even when nothing of it was sent."""

    def __init__(self, body: AsyncIterator[bytes], media_type: str, on_end: Callable[[], None]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(body, headers=headers, media_type=media_type)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def with_schema(sampling: Sampling, schema: dict | None) -> Sampling:
    return sampling if schema is None else dataclasses.replace(sampling, schema=schema)
