"""The application of all routes, and the socket it listens on.

In: a service and how to be reached. Out: a running server, until a signal ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from edge_gemma.errors import EdgeGemmaError, RuntimeFailure, UsageError
from edge_gemma.serve.bodies import Server, json_response
from edge_gemma.serve.guard import BearerTokens, Guard, Limits, is_loopback
from edge_gemma.serve.ollama import Ollama
from edge_gemma.serve.openai import OpenAI
from edge_gemma.serve.refusals import Refusal, refusal_of, refusal_response
from edge_gemma.serve.service import Service
from edge_gemma.serve.speech import Speech

if TYPE_CHECKING:
    from edge_gemma.model import Model

PORT = 11434  # Ollama's
_MAX_CONNECTIONS = 512
_MAX_HEADER_BYTES = 32 * 1024


@dataclass(frozen=True)
class Address:
    """Where a server listens. ``token_file`` is needed for more than this machine."""

    host: str = "127.0.0.1"
    port: int = PORT
    token_file: Path | None = None

    def tokens(self) -> BearerTokens | None:
        """The tokens that let in; None: whoever reaches the socket comes in. Raises UsageError for
        an address that others can reach without one.
        """
        if self.token_file is not None:
            return BearerTokens.read(self.token_file)
        if is_loopback(self.host):
            return None
        raise UsageError(
            f"--host {self.host} lets other machines in; give a --token-file too, with a token a "
            "line (openssl rand -hex 24), or keep to 127.0.0.1"
        )

    def open(self) -> socket.socket:
        """The bound socket; nobody can connect before :func:`serve` listens on it. Raises
        RuntimeFailure (a port in use, an address that is not this machine's).
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, address = found[0]
            opened = socket.socket(family, kind, protocol)
        except OSError as error:
            raise RuntimeFailure(f"cannot listen on {self.host}: {error.strerror}") from None
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
        except OSError as error:
            opened.close()
            raise RuntimeFailure(
                f"cannot listen on {self.host} port {self.port}: {error.strerror}; another "
                "program may have it (Ollama has the same default), so try --port"
            ) from None
        return opened


def make_app(
    service: Service, *, tokens: BearerTokens | None = None, limits: Limits = Limits()
) -> ASGIApp:
    """Every route behind the guard. It closes nothing: the service is the caller's."""
    server = Server(service, limits, service.model.bundle.manifest.name)

    async def health(request: Request) -> Response:
        state = service.health()
        response = json_response(state)
        response.status_code = 200 if state.live else 503
        return response

    routes = [
        Route("/health", health, methods=["GET"]),
        *OpenAI(server).routes(),
        *Speech(server).routes(),
        *Ollama(server).routes(),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: _on_http_error,
            EdgeGemmaError: _on_error,
            Exception: _on_error,
        },
    )
    return Guard(app, tokens, limits)


async def _on_error(request: Request, error: Exception) -> Response:
    return refusal_response(request.url.path, refusal_of(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {404: "there is no such route here", 405: "the route does not take this method"}
    message = texts.get(error.status_code, str(error.detail))
    refusal = Refusal(error.status_code, message)
    response = refusal_response(request.url.path, refusal)
    response.headers.update(error.headers or {})
    return response


def serve(
    model: Model,
    address: Address,
    opened: socket.socket,
    *,
    max_waiting: int = 32,
    limits: Limits = Limits(),
    stop_s: float = 10.0,
    on_ready: Callable[[str], None] = lambda url: None,
) -> bool:
    """Serve until SIGTERM or SIGINT; then running answers may end for at most ``stop_s``.

    ``on_ready`` gets the address once requests are answered. False when the model is still at work
    after that and must not be closed. Raises UsageError.
    """
    tokens = address.tokens()
    return asyncio.run(_serve(model, opened, tokens, max_waiting, limits, stop_s, on_ready))


async def _serve(
    model: Model,
    opened: socket.socket,
    tokens: BearerTokens | None,
    max_waiting: int,
    limits: Limits,
    stop_s: float,
    on_ready: Callable[[str], None],
) -> bool:
    service = Service(model, max_waiting=max_waiting)
    config = uvicorn.Config(
        make_app(service, tokens=tokens, limits=limits),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        http="h11",
        ws="none",
    )
    server = _Server(config)
    stopping = asyncio.Event()
    with _signals(stopping):
        running = asyncio.create_task(server.serve(sockets=[opened]))
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        on_ready(_url(opened))
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait((running, stopped), return_when=asyncio.FIRST_COMPLETED)
        # new requests are refused, running answers end or are cut off, then connections close
        closed = await service.close(stop_s)
        server.should_exit = True
        server.config.timeout_graceful_shutdown = 2
        await running
        stopped.cancel()
    return closed


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are handled by :func:`_signals`, which lets answers end first."""
        yield


@contextlib.contextmanager
def _signals(stopping: asyncio.Event) -> Generator[None, None, None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _url(opened: socket.socket) -> str:
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
