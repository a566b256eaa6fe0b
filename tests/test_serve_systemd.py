"""What systemd is told, on sockets as it makes them; its unit, read by systemd's own programs."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import threading

import pytest
from serving import serving

pytest.importorskip("uvicorn")

from edge_gemma.serve.systemd import Notifier  # noqa: E402

if not hasattr(socket, "AF_UNIX"):
    pytest.skip("needs Unix sockets", allow_module_level=True)


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """The service manager's socket, and the name it has in NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as opened:
        opened.settimeout(30)
        if request.param == "path":
            name = str(tmp_path / "notify")
            opened.bind(name)
        else:
            name = f"@edge-gemma-{secrets.token_hex(8)}"
            opened.bind(b"\0" + name[1:].encode())
        yield opened, name


def test_a_server_tells_its_whole_life(tiny_bundle, manager, monkeypatch):
    opened, name = manager
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    said = []

    def until(beginning):
        """What is said up to a message; signs of life come in between at any time."""
        while not said or not said[-1].startswith(beginning):
            said.append(opened.recv(4096).decode())
        return said[-1]

    with serving(tiny_bundle) as server:
        assert until("READY=1") == f"READY=1\nSTATUS=serving {server.name} at {server.url}"
        assert said == [said[-1]], "nothing is said before it is ready"
        until("WATCHDOG=1")
        server.process.send_signal(signal.SIGHUP)
        key, _, value = until("RELOADING=1").splitlines()[1].partition("=")
        assert key == "MONOTONIC_USEC" and int(value) > 0
        until("READY=1")
        server.process.send_signal(signal.SIGTERM)
        until("STOPPING=1")
        assert server.process.wait(20) == 0


def test_a_service_that_is_not_live_gives_no_sign_of_life(manager):
    opened, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "2000"})

    async def main():
        task = asyncio.create_task(notifier.keep_alive(lambda: False))
        await asyncio.sleep(0.05)
        task.cancel()

    asyncio.run(main())
    opened.setblocking(False)
    with pytest.raises(BlockingIOError):
        opened.recv(4096)


@pytest.mark.parametrize("name", ["", "relative", "/no/such/socket", "@nobody-listens-here"])
def test_nobody_to_tell(name, caplog):
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.ready("a")
    notifier.stopping()
    assert len(caplog.records) == (1 if name else 0)


def test_a_manager_that_does_not_read_holds_nothing_up(manager, caplog):
    _, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})

    def tell():
        for _ in range(2000):
            notifier.ready("a" * 100)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    teller.join(30)
    assert not teller.is_alive()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("text", ["-1", "0", "much", "1.5", ""])
def test_a_watchdog_that_makes_no_sense_is_none(text):
    environment = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": text}
    assert Notifier(environment).watchdog_s is None


def test_a_watchdog_of_another_process():
    environment = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "3000000"}
    assert Notifier(environment | {"WATCHDOG_PID": "1"}).watchdog_s is None
    assert Notifier(environment | {"WATCHDOG_PID": str(os.getpid())}).watchdog_s == 1.5
    assert Notifier({"WATCHDOG_USEC": "3000000"}).watchdog_s is None


def test_a_status_is_one_line(manager):
    opened, name = manager
    Notifier({"NOTIFY_SOCKET": name}).ready("a\nSTOPPING=1")
    assert opened.recv(4096) == b"READY=1\nSTATUS=a STOPPING=1"


def test_a_sign_of_life_without_an_event_loop(manager):
    """No more of them than the manager wants."""
    opened, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "60000000"})
    for _ in range(100):
        notifier.alive()
    assert opened.recv(4096) == b"WATCHDOG=1"
    opened.setblocking(False)
    with pytest.raises(BlockingIOError):
        opened.recv(4096)
    Notifier({"NOTIFY_SOCKET": name}).alive()  # which wants none
