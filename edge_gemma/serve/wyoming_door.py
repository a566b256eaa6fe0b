"""Where Wyoming is spoken: the socket, who may reach it, and how Home Assistant finds it.

In: an address like tcp://127.0.0.1:10300 or unix:///run/edge-gemma/wyoming.sock. Out: a bound
socket, and a server on it until it is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from edge_gemma.errors import MissingExtra, RuntimeFailure, UsageError
from edge_gemma.serve.guard import is_loopback
from edge_gemma.serve.wyoming import Wyoming
from edge_gemma.serve.wyoming_frames import HEADER_BYTES

PORT = 10300  # of Home Assistant's speech to text
_BACKLOG = 16


@dataclass(frozen=True)
class WyomingAddress:
    """Where to listen: ``host`` and ``port``, or the ``path`` of a Unix socket. ``discoverable`` is
    the name that Home Assistant finds it by.
    """

    host: str = "127.0.0.1"
    port: int = PORT
    path: Path | None = None
    discoverable: str | None = None

    @classmethod
    def parse(
        cls, uri: str, *, to_network: bool = False, discoverable: str | None = None
    ) -> WyomingAddress:
        """Raises UsageError: no such address, one that others reach without ``to_network``, or one
        that nobody could discover.

        >>> WyomingAddress.parse("tcp://127.0.0.1:10300").port
        10300
        """
        try:
            parts = urlsplit(uri)
            host, port = parts.hostname, PORT if parts.port is None else parts.port
        except ValueError:
            raise _bad(uri) from None
        if parts.scheme == "unix" and parts.path and not parts.netloc:
            if discoverable:
                raise UsageError("a Unix socket cannot be discovered; give tcp://ADDRESS:PORT")
            return cls(path=Path(parts.path))
        if parts.scheme != "tcp" or not host or parts.path:
            raise _bad(uri)
        if not is_loopback(host) and not to_network:
            raise UsageError(
                f"--wyoming {uri} lets every machine of the network in: Wyoming has neither tokens "
                "nor encryption. Add --wyoming-to-network if that is meant, or keep to 127.0.0.1"
            )
        if is_loopback(host) and discoverable:
            raise UsageError(
                f"--zeroconf tells others of {host}, which is this machine only; give --wyoming "
                "an address that they reach"
            )
        return cls(host, port, discoverable=discoverable)

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"

    def open(self) -> socket.socket:
        """The bound socket. Raises RuntimeFailure (a port or a path in use)."""
        opened = None
        try:
            if self.path is not None:
                _remove_stale(self.path)
                opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                opened.bind(str(self.path))
                return opened
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM
            )[0]
            opened = socket.socket(family, kind, protocol)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            return opened
        except OSError as error:
            if opened is not None:
                opened.close()
            raise RuntimeFailure(
                f"cannot listen on {self}: {error.strerror}; another program may have it"
            ) from None

    def bound(self, opened: socket.socket) -> WyomingAddress:
        """Where it really listens, if any free port was asked for."""
        return self if self.path is not None else replace(self, port=opened.getsockname()[1])


def _bad(uri: str) -> UsageError:
    return UsageError(
        f"{uri[:100]!r} is no address of Wyoming; expected tcp://127.0.0.1:{PORT} or unix:///PATH"
    )


def _remove_stale(path: Path) -> None:
    """A socket whose server has gone is in nobody's way. Raises OSError for a live one."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()


@contextlib.asynccontextmanager
async def serving(
    wyoming: Wyoming, address: WyomingAddress, opened: socket.socket
) -> AsyncIterator[None]:
    """Answer on the socket until the block ends. Raises MissingExtra, RuntimeFailure (no way to
    tell others of it).
    """
    if address.path is not None:
        server: asyncio.Server = await asyncio.start_unix_server(
            wyoming.connected, sock=opened, limit=HEADER_BYTES, backlog=_BACKLOG
        )
    else:
        server = await asyncio.start_server(
            wyoming.connected, sock=opened, limit=HEADER_BYTES, backlog=_BACKLOG
        )
    try:
        async with _discoverable(address, opened):
            yield
    finally:
        server.close()
        await wyoming.close()
        if address.path is not None:
            address.path.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def _discoverable(address: WyomingAddress, opened: socket.socket) -> AsyncIterator[None]:
    if address.discoverable is None:
        yield
        return
    try:
        from zeroconf import Error
        from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf
    except ImportError:
        raise MissingExtra("--zeroconf", "serve") from None
    kind = "_wyoming._tcp.local."
    told = AsyncServiceInfo(
        kind,
        f"{address.discoverable}.{kind}",
        parsed_addresses=[_reachable(address.host)],
        port=opened.getsockname()[1],
    )
    try:
        network = AsyncZeroconf()
        await network.async_register_service(told)
    except (OSError, Error) as error:
        raise RuntimeFailure(f"--zeroconf does not work on this network: {error}") from None
    try:
        yield
    finally:
        await network.async_unregister_service(told)
        await network.async_close()


def _reachable(host: str) -> str:
    """The address to tell others; for "all of them" the one that leads out."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    if found[4][0] not in ("0.0.0.0", "::"):
        return str(found[4][0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("224.0.0.251", 1))  # multicast DNS; nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            raise RuntimeFailure("--zeroconf: this machine has no network") from None
