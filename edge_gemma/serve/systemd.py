"""What systemd is told of a service of ``Type=notify``: ready, reloading, stopping, still alive.

In: the environment of the process. Out: datagrams on the socket that systemd named there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

log = logging.getLogger("edge_gemma.serve")


class Notifier:
    """Tells the service manager; does nothing where none listens.

    ``environment`` is read for NOTIFY_SOCKET (a path, or an abstract name after ``@``),
    WATCHDOG_USEC and WATCHDOG_PID. Raises nothing: a manager that cannot be told is said in the
    log, once.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ):
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._failed = False
        self._alive_s = 0.0  # when the last sign of life was given, on the monotonic clock
        #: seconds between two signs of life: half of what the manager allows; None: it wants none
        self.watchdog_s = _watchdog_s(environment) if self._address else None

    def ready(self, status: str) -> None:
        self._tell("READY=1", f"STATUS={_one_line(status)}")

    def reloading(self) -> None:
        """Follow it with :meth:`ready`."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._tell("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def stopping(self) -> None:
        self._tell("STOPPING=1", "STATUS=stopping")

    async def keep_alive(self, is_live: Callable[[], bool]) -> None:
        """A sign of life as often as the manager wants, while ``is_live()``; then it restarts us.
        Runs until it is cancelled.
        """
        while self.watchdog_s is not None:
            if is_live():
                self._tell("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_s)

    def alive(self) -> None:
        """:meth:`keep_alive` for a program without an event loop: call it at least so often."""
        now_s = time.monotonic()
        if self.watchdog_s is not None and now_s >= self._alive_s + self.watchdog_s:
            self._alive_s = now_s
            self._tell("WATCHDOG=1")

    def _tell(self, *lines: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as opened:
                opened.setblocking(False)  # a manager that does not read holds no answer up
                opened.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            if not self._failed:
                log.warning("systemd cannot be told %s: %s", lines[0], error)
            self._failed = True


def _address(name: str) -> str | bytes | None:
    if not name:
        return None
    if name.startswith("@"):
        return b"\0" + os.fsencode(name[1:])
    if name.startswith("/"):
        return name
    log.warning("NOTIFY_SOCKET is %r; expected a path or an abstract name (@…)", name[:100])
    return None


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    text, process = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not text or process not in ("", str(os.getpid())):
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        log.warning("WATCHDOG_USEC is %r; expected microseconds; no watchdog", text[:20])
        return None
    return int(text) / 2e6


def _one_line(text: str) -> str:
    return " ".join(text.split())
