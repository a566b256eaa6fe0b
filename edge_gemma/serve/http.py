"""The application of all routes, and the socket it listens on.

In: a service and how to be reached. Out: a running server, until a signal ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
import ssl
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from edge_gemma.errors import EdgeGemmaError, RuntimeFailure, UsageError
from edge_gemma.serve.bodies import Server, json_response
from edge_gemma.serve.embeddings import Embeddings
from edge_gemma.serve.guard import BearerTokens, Guard, Limits, is_loopback
from edge_gemma.serve.guard.rates import RATE_HEADERS
from edge_gemma.serve.guard.routes import usage_routes
from edge_gemma.serve.guard.settings import Guarding
from edge_gemma.serve.http_deadlines import with_deadline
from edge_gemma.serve.ollama import Ollama
from edge_gemma.serve.openai import OpenAI
from edge_gemma.serve.page.routes import page_routes
from edge_gemma.serve.refusals import Refusal, refusal_of, refusal_response
from edge_gemma.serve.residence import FOREVER, Residence
from edge_gemma.serve.responses import Responses
from edge_gemma.serve.service import Service
from edge_gemma.serve.speech import Speech
from edge_gemma.serve.spoken_text import SpokenText
from edge_gemma.serve.systemd import Notifier
from edge_gemma.serve.watch.settings import Watch

if TYPE_CHECKING:
    from edge_gemma.model import Model

PORT = 11434  # Ollama's
Door = Callable[[Server], contextlib.AbstractAsyncContextManager[None]]
_MAX_CONNECTIONS = 512
_MAX_HEADER_BYTES = 32 * 1024


@dataclass(frozen=True)
class Address:
    """Where a server listens. ``token_file`` is needed for more than this machine. With a
    certificate and its key (PEM files) it speaks TLS. ``root_path`` is the prefix a proxy has it
    under.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    root_path: str = ""

    def check(self) -> None:
        """Raises UsageError for tokens, certificates or a prefix that cannot be used."""
        self.tokens()
        self.check_tls()
        if self.root_path and not self.root_path.startswith("/"):
            raise UsageError(f"--root-path is {self.root_path!r}; expected one like /gemma")

    def check_tls(self) -> None:
        """Raises UsageError."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UsageError("give both --tls-cert and --tls-key, or neither")
        if self.tls_cert is None:
            return
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.tls_cert, self.tls_key, password="")
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror or error
            raise UsageError(
                f"the certificate {self.tls_cert} and key {self.tls_key} cannot be used: {reason}"
            ) from None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)

    def tokens(self) -> BearerTokens | None:
        """The tokens that let in; None: whoever reaches the socket comes in. Raises UsageError for
        an address that others can reach without one.
        """
        if self.token_file is not None:
            return BearerTokens.read(self.token_file)
        if self.is_local:
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
            # peers that vanished without a word are noticed
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            opened.bind(address)
        except OSError as error:
            opened.close()
            raise RuntimeFailure(
                f"cannot listen on {self.host} port {self.port}: {error.strerror}; another "
                "program may have it (Ollama has the same default), so try --port"
            ) from None
        return opened


def make_app(
    service: Service,
    *,
    tokens: BearerTokens | None = None,
    limits: Limits | None = None,
    guarding: Guarding | None = None,
    watch: Watch | None = None,
    root_path: str = "",
    residence: Residence | None = None,
) -> ASGIApp:
    """Every route behind the guard. It closes nothing: the service, the guarding and the watch,
    whose observers and rules the service has, are the caller's. With a ``residence``, which the
    caller runs, the model may be unloaded between requests.
    """
    guarding, watch = guarding or Guarding(), watch or Watch()
    limits = limits or guarding.limits
    server = Server(service, limits, service.model.bundle.manifest.name, residence)

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
        *Embeddings(server).routes(),
        *page_routes(server),
        *Responses(server).routes(),
        *SpokenText(server).routes(),
        *usage_routes(guarding.usage),
        *watch.routes(),
    ]
    watch.bind(service, routes)
    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: _on_http_error,
            EdgeGemmaError: _on_error,
            Exception: _on_error,
        },
    )
    guard = Guard(
        app if residence is None else _using(app, residence),
        tokens,
        limits,
        rates=guarding.rates,
        origins=guarding.origins,
        observers=[*guarding.observers, *watch.observers],
        root_path=root_path,
    )
    if not guarding.origins:
        return guard
    return CORSMiddleware(
        guard,
        allow_origins=guarding.origins,
        allow_methods=("GET", "POST"),
        allow_headers=("authorization", "content-type"),
        expose_headers=("retry-after", "x-request-id", *RATE_HEADERS),
    )


def _using(app: ASGIApp, residence: Residence) -> ASGIApp:
    """The model does not go while a request that may need it is answered."""

    async def used(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") != "POST":
            return await app(scope, receive, send)
        with residence.using():
            await app(scope, receive, send)

    return used


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
    n_urgent: int = 0,
    guarding: Guarding | None = None,
    watch: Watch | None = None,
    stop_s: float = 10.0,
    doors: Sequence[Door] = (),
    reopen: Callable[[], Model] | None = None,
    keep_alive_s: float = FOREVER,
    on_ready: Callable[[str], None] = lambda url: None,
) -> bool:
    """Serve until SIGTERM or SIGINT; then running answers may end for at most ``stop_s``. SIGHUP
    reads the token file again. systemd is told where the process is a service of ``Type=notify``.

    ``n_urgent`` lanes are kept for speech. ``doors`` are other protocols on sockets of their own;
    each is open while its context is.

    With ``reopen``, which plans and loads the model anew, it is unloaded when nobody asked for it
    for ``keep_alive_s``, or for what a request of Ollama says. A model that was opened so is closed
    here.

    ``on_ready`` gets the address once requests are answered. False when the model is still at work
    after that and must not be closed. Raises UsageError.
    """
    tokens = address.tokens()
    guarding, watch = guarding or Guarding(), watch or Watch()
    guarding.warn_unknown(() if tokens is None else tokens.names)
    service_of = functools.partial(
        Service,
        model,
        max_waiting=max_waiting,
        n_urgent=n_urgent,
        max_context=guarding.limits.context_tokens,
        observers=[*guarding.observers, *watch.observers],
        rules=guarding.rules,
    )
    residence_of = reopen and functools.partial(Residence, reopen=reopen, keep_alive_s=keep_alive_s)
    options = (tokens, guarding, watch, stop_s, doors, residence_of, on_ready)
    serving = _serve(service_of, opened, address, *options)
    return asyncio.run(serving)


async def _serve(
    service_of: Callable[[], Service],
    opened: socket.socket,
    address: Address,
    tokens: BearerTokens | None,
    guarding: Guarding,
    watch: Watch,
    stop_s: float,
    doors: Sequence[Door],
    residence_of: Callable[[Service], Residence] | None,
    on_ready: Callable[[str], None],
) -> bool:
    service = service_of()
    first = service.model
    residence = residence_of and residence_of(service)
    others = Server(service, guarding.limits, first.bundle.manifest.name, residence)
    app = make_app(
        service,
        tokens=tokens,
        guarding=guarding,
        watch=watch,
        root_path=address.root_path,
        residence=residence,
    )
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        http=with_deadline(guarding.limits.header_s),
        ssl_certfile=address.tls_cert,
        ssl_keyfile=address.tls_key,
        ws="none",
    )
    server = _Server(config)
    stopping = asyncio.Event()
    notifier = Notifier()
    url = _url(opened, "http" if address.tls_cert is None else "https")

    def reload() -> None:
        notifier.reloading()
        if tokens is not None:
            tokens.reload()
        notifier.ready(f"serving {others.name} at {url}")

    with _signals(stopping, reload):
        open_doors = contextlib.AsyncExitStack()
        try:
            for door in doors:
                await open_doors.enter_async_context(door(others))
        except BaseException:
            await open_doors.aclose()
            await service.close(0)
            raise
        running = asyncio.create_task(server.serve(sockets=[opened]))
        watching = [asyncio.create_task(watch.run())]
        if residence is not None:
            watching.append(asyncio.create_task(residence.run()))
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        on_ready(url)
        notifier.ready(f"serving {others.name} at {url}")
        living = asyncio.create_task(notifier.keep_alive(lambda: service.health().live))
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait((running, stopped), return_when=asyncio.FIRST_COMPLETED)
        for task in watching:
            task.cancel()
        notifier.stopping()
        # new requests are refused, running answers end or are cut off, then connections close
        closed = await service.close(stop_s)
        await open_doors.aclose()
        server.should_exit = True
        server.config.timeout_graceful_shutdown = 2
        await running
        stopped.cancel()
        living.cancel()
    if closed and service.model is not first:
        service.model.close()
    return closed


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are handled by :func:`_signals`, which lets answers end first."""
        yield


@contextlib.contextmanager
def _signals(stopping: asyncio.Event, on_hangup: Callable[[], None]) -> Generator[None, None, None]:
    loop = asyncio.get_running_loop()
    handlers = {signal.SIGTERM: stopping.set, signal.SIGINT: stopping.set, signal.SIGHUP: on_hangup}
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)


def _url(opened: socket.socket, scheme: str) -> str:
    host, port = opened.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
