"""What stands before every route: who may come in, and how much a request may bring.

In: HTTP requests. Out: the same requests, or a refusal in the protocol's own shape: no token, a web
page of another origin, a body that is too large or comes too slowly.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_gemma.errors import UsageError
from edge_gemma.serve.refusals import Refusal, refusal_response
from edge_gemma.units import MiB, format_bytes

log = logging.getLogger("edge_gemma.serve")
_MAX_DIGITS = 15  # of a content-length


@dataclass(frozen=True)
class Limits:
    """How much one request may bring; None of ``output_tokens``: what the context holds."""

    body_bytes: int = 32 * MiB
    messages: int = 1000
    pixels: int = 25_000_000  # of one picture
    audio_s: float = 3600.0  # of a file to transcribe
    output_tokens: int | None = None
    wait_s: float = 60.0  # for the next piece of a body, or for a reader that takes nothing


class BearerTokens:
    """Bearer tokens, kept as hashes.

    >>> tokens = BearerTokens(["secret"])
    >>> tokens.allow("Bearer secret"), tokens.allow("Bearer wrong"), tokens.allow("")
    (True, False, False)
    """

    def __init__(self, tokens: Iterable[str]):
        self._hashes = [hashlib.sha256(token.encode()).digest() for token in tokens]

    @classmethod
    def read(cls, path: Path) -> BearerTokens:
        """A file with a token a line; blank lines and lines that begin with # are left out. Raises
        UsageError.
        """
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the token file {path} cannot be read: {error}") from None
        tokens = [line for line in lines if line and not line.startswith("#")]
        short = [token for token in tokens if len(token) < 8]
        if not tokens or short:
            raise UsageError(
                f"the token file {path} holds {len(tokens)} tokens, {len(short)} of them shorter "
                "than 8 characters; write a token a line, for instance from: openssl rand -hex 24"
            )
        return cls(tokens)

    def allow(self, authorization: str) -> bool:
        """Whether an ``Authorization`` header holds one of the tokens. All are compared, each in
        constant time.
        """
        scheme, _, token = authorization.partition(" ")
        given = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(given, known) for known in self._hashes]
        return scheme.lower() == "bearer" and any(matches)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine only.

    >>> [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "a.org")]
    [True, True, True, False, False]
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware around the whole application. ``tokens`` None: everybody who reaches the
    socket, which is then on loopback, comes in.
    """

    def __init__(self, app: ASGIApp, tokens: BearerTokens | None, limits: Limits):
        self._app, self._tokens, self._limits = app, tokens, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        door = _Door(scope, receive, send, self._limits)
        try:
            self._check(Headers(scope=scope))
        except Refusal as refusal:
            await refusal_response(scope["path"], refusal)(scope, receive, door.send)
            return
        try:
            await self._app(scope, door.receive, door.send)
        except TimeoutError:
            log.warning("%s: the client took nothing for too long", scope["path"])

    def _check(self, headers: Headers) -> None:
        if self._tokens is not None:
            if not self._tokens.allow(headers.get("authorization", "")):
                raise Refusal(
                    401,
                    "this server wants a token: Authorization: Bearer TOKEN",
                    code="invalid_api_key",
                )
        elif not _is_local_name(headers.get("host", "")):
            # a web page whose name was pointed at this machine
            raise Refusal(403, "without tokens this server answers only to a local address")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise Refusal(403, "requests of web pages from elsewhere are refused")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise Refusal(400, f"the content-length is {length[:20]!r}; expected a number")
        if len(length) > _MAX_DIGITS or int(length) > self._limits.body_bytes:
            raise too_large(self._limits)


def too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"the request is larger than {format_bytes(limits.body_bytes)}")


def _is_local_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _Door:
    """One request's body and response: counted, timed, and numbered for logs."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits):
        self._receive, self._send, self._limits = receive, send, limits
        self._n_bytes, self._body_ended = 0, False
        self._id = secrets.token_hex(8)

    async def receive(self) -> Message:
        if self._body_ended:  # only "disconnected" is left to come, whenever that is
            return await self._receive()
        try:
            async with asyncio.timeout(self._limits.wait_s):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(408, "the request's body did not come in time") from None
        self._n_bytes += len(message.get("body", b""))
        if self._n_bytes > self._limits.body_bytes:
            raise too_large(self._limits)
        self._body_ended = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._id
            headers["x-content-type-options"] = "nosniff"
        async with asyncio.timeout(self._limits.wait_s):
            await self._send(message)
