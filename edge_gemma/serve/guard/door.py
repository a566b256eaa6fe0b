"""The door: who comes in, from where, and with how large a body, request by request.

In: HTTP requests. Out: the same requests, or a refusal in the protocol's own shape: no token, a web
page of another origin, too many requests, a body that is too large or comes too slowly.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_gemma.serve.answer import Observer
from edge_gemma.serve.guard.limits import Limits
from edge_gemma.serve.guard.rates import RateLimits
from edge_gemma.serve.guard.tokens import BearerTokens
from edge_gemma.serve.refusals import Refusal, refusal_response
from edge_gemma.serve.visit import NOBODY, Visit, current_visit
from edge_gemma.units import format_bytes

log = logging.getLogger("edge_gemma.serve")
_MAX_DIGITS = 15  # of a content-length


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
    socket, which is then on loopback, comes in. Pages of ``origins`` may call, besides the
    server's own. ``root_path`` is what a proxy in front has its prefix for, taken off the path
    where the proxy leaves it on.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: BearerTokens | None,
        limits: Limits,
        *,
        rates: RateLimits | None = None,
        origins: Collection[str] = (),
        observers: Sequence[Observer] = (),
        root_path: str = "",
    ):
        self.app, self._tokens, self._limits = app, tokens, limits
        self._rates, self._origins, self._observers = rates, frozenset(origins), observers
        self._root_path = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        scope = self._without_prefix(scope)
        client = scope.get("client") or ("",)
        visit = Visit(secrets.token_hex(8), scope["method"], scope["path"], client[0])
        door = _Door(visit, receive, send, self._limits)
        token = current_visit.set(visit)
        try:
            await self._let_in(scope, door, visit)
        finally:
            current_visit.reset(token)
            visit.ended_s = time.monotonic()
            for observer in self._observers:
                observer.visited(visit)

    async def _let_in(self, scope: Scope, door: _Door, visit: Visit) -> None:
        try:
            headers = Headers(scope=scope)
            self._check(headers)
            visit.caller = NOBODY if _asks_for_page(scope, headers) else self._caller(headers)
            if self._rates is not None:
                door.headers = self._rates.headers(visit.caller)
                if scope["method"] == "POST":  # looking costs nothing
                    door.headers = self._rates.admit(visit.caller)
        except Refusal as refusal:
            response = refusal_response(scope["path"], refusal)
            if refusal.status == 400:  # where its body ends may be in doubt
                response.headers["connection"] = "close"
            await response(scope, door.receive_raw, door.send)
            return
        try:
            await self.app(scope, door.receive, door.send)
        except TimeoutError:
            log.warning("%s: the client took nothing for too long", scope["path"])

    def _without_prefix(self, scope: Scope) -> Scope:
        path, prefix = scope["path"], self._root_path
        if prefix and (path == prefix or path.startswith(f"{prefix}/")):
            path = path[len(prefix) :] or "/"
        return {**scope, "path": path, "raw_path": path.encode(), "root_path": ""}

    def _caller(self, headers: Headers) -> str:
        """The name of who asks. Raises Refusal."""
        if self._tokens is None:
            if not _is_local_name(headers.get("host", "")):
                # a web page whose name was pointed at this machine
                raise Refusal(403, "without tokens this server answers only to a local address")
            return NOBODY
        name = self._tokens.name_of(headers.get("authorization", ""))
        if name is None:
            raise Refusal(
                401,
                "this server wants a token: Authorization: Bearer TOKEN",
                code="invalid_api_key",
            )
        return name

    def _check(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins:
            if _netloc(origin) != headers.get("host"):
                raise Refusal(403, "requests of web pages from elsewhere are refused")
        if "transfer-encoding" in headers and "content-length" in headers:
            # a proxy in front may have read another one of both: RFC 9112, 6.1
            raise Refusal(400, "the request has a content-length and a transfer-encoding")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise Refusal(400, f"the content-length is {length[:20]!r}; expected a number")
        if len(length) > _MAX_DIGITS or int(length) > self._limits.body_bytes:
            raise too_large(self._limits)


def _asks_for_page(scope: Scope, headers: Headers) -> bool:
    """The page holds nothing of anybody's, and a browser has no token before it shows the page."""
    is_root = scope["method"] == "GET" and scope["path"] == "/"
    return is_root and "text/html" in headers.get("accept", "")


def too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"the request is larger than {format_bytes(limits.body_bytes)}")


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


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

    def __init__(self, visit: Visit, receive: Receive, send: Send, limits: Limits):
        self.headers: Mapping[str, str] = {}  # for the response
        self.receive_raw = receive
        self._visit, self._send, self._limits = visit, send, limits
        self._n_bytes, self._body_ended = 0, False

    async def receive(self) -> Message:
        if self._body_ended:  # only "disconnected" is left to come, whenever that is
            return await self.receive_raw()
        left_s = self._limits.body_s - self._visit.seconds
        try:
            async with asyncio.timeout(max(0.0, min(self._limits.wait_s, left_s))):
                message = await self.receive_raw()
        except TimeoutError:
            raise Refusal(408, "the request's body did not come in time") from None
        self._n_bytes += len(message.get("body", b""))
        if self._n_bytes > self._limits.body_bytes:
            raise too_large(self._limits)
        self._body_ended = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._visit.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._visit.id
            headers["x-content-type-options"] = "nosniff"
            for name, value in self.headers.items():
                headers[name] = value
        async with asyncio.timeout(self._limits.wait_s):
            await self._send(message)
