"""The guard on real sockets: who sends slowly or nothing is closed, TLS, IPv6, SIGHUP."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest
from serving import serving
from typer.testing import CliRunner

from edge_gemma.cli.app import app
from edge_gemma.errors import UsageError
from edge_gemma.machine.footprint import footprint
from edge_gemma.units import MiB

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from edge_gemma.serve.http import Address  # noqa: E402


def connected(url):
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=30)


def everything(connection):
    """What comes until the server closes the connection; a timeout is an error."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def body_of(response):
    return json.loads(response.partition(b"\r\n\r\n")[2])


@pytest.fixture(scope="module")
def slow_server(tiny_bundle, tmp_path_factory):
    """One whose patience with headers and bodies is short."""
    guard = tmp_path_factory.mktemp("guard") / "guard.toml"
    guard.write_text("[limits]\nheader_seconds = 0.3\nbody_seconds = 0.5\nwait_seconds = 0.4\n")
    with serving(tiny_bundle, "--guard", str(guard)) as server:
        yield server


@pytest.mark.parametrize(
    "beginning", [b"", b"G", b"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1\r\n"]
)
def test_a_header_that_does_not_come_is_not_waited_for(slow_server, beginning):
    with connected(slow_server.url) as connection:
        connection.sendall(beginning)
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert "header" in body_of(answer)["error"]["message"]


def test_a_header_that_comes_byte_by_byte(slow_server):
    """Slow-loris: each byte is in time, the whole is not."""
    with connected(slow_server.url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX-A: ")
        with pytest.raises(OSError):
            for _ in range(600):
                connection.sendall(b"a")
                time.sleep(0.05)


@pytest.mark.parametrize("pause_s", [0.05, 1000])
def test_a_body_that_comes_slowly_or_not_at_all(slow_server, pause_s):
    header = b"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9999\r\n\r\n"
    with connected(slow_server.url) as connection:
        connection.sendall(header + b"{")
        connection.settimeout(min(pause_s, 30))
        answer = b""
        for _ in range(600):
            try:
                answer += (piece := connection.recv(65536))
                if not piece or answer.endswith(b"}"):
                    break
            except TimeoutError:
                connection.sendall(b" ")
            except ConnectionResetError:
                break
    assert answer.startswith(b"HTTP/1.1 408 ") and b"body" in answer


def test_the_rest_of_a_refused_body_is_not_read_forever(slow_server):
    header = b"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999\r\n\r\n"
    with connected(slow_server.url) as connection:
        connection.sendall(header)
        with pytest.raises(OSError):
            for _ in range(600):
                connection.sendall(b"x")
                time.sleep(0.05)


def test_a_second_request_on_a_connection_has_a_deadline_too(slow_server):
    with connected(slow_server.url) as connection:
        connection.sendall(b"GET /api/version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /api/version HT")
        assert b"HTTP/1.1 200" not in everything(connection)


def test_what_is_no_http_gets_400_in_a_shape(slow_server):
    get = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    for request in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS client\r\n\r\n",
        get + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        get + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        get + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        get + b"Content-Length: -1\r\n\r\n",
        get + b"Content-Length : 1\r\n\r\na",
        get + b" folded: a\r\n\tb\r\n X\x00: a\r\n\r\n",
        b"GET /v1/models HTTP/x\r\n\r\n",
        b'{"type": "describe"}\n\n',  # Wyoming's
    ):
        with connected(slow_server.url) as connection:
            connection.sendall(request)
            answer = everything(connection)
        assert answer.startswith(b"HTTP/1.1 4"), answer
        assert body_of(answer)["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{slow_server.url}/api/version").status_code == 200


def test_half_open_connections_do_not_take_the_places_of_others(slow_server):
    connections = [connected(slow_server.url) for _ in range(300)]
    try:
        assert httpx.get(f"{slow_server.url}/api/version", timeout=30).status_code == 200
        for connection in connections:
            everything(connection)
        assert httpx.get(f"{slow_server.url}/api/version", timeout=30).status_code == 200
    finally:
        for connection in connections:
            connection.close()


def test_tls_by_files(tiny_bundle, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(cert)]
    subprocess.run([*made.split(), *names, *files], check=True, capture_output=True)
    options = ("--tls-cert", str(cert), "--tls-key", str(key))
    with serving(tiny_bundle, *options) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(verify=context) as client:
            assert client.get(f"{server.url}/v1/models").status_code == 200
        with connected(server.url) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            try:
                assert b"HTTP/1.1 200" not in everything(connection)
            except ConnectionResetError:
                pass
    key.write_text("no key")
    for files in ((cert, key), (cert, None), (None, key), (tmp_path / "none", key)):
        with pytest.raises(UsageError, match="tls|cannot be used"):
            Address(tls_cert=files[0], tls_key=files[1]).check()
    with pytest.raises(UsageError, match="--root-path"):
        Address(root_path="gemma").check()


def test_ipv6(tiny_bundle):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with serving(tiny_bundle, "--host", "::1") as server:
        assert server.url.startswith("http://[::1]:")
        assert httpx.get(f"{server.url}/v1/models").status_code == 200


def test_sighup_reads_the_tokens_again(tiny_bundle, tmp_path):
    file = tmp_path / "tokens"

    def tokens(*arguments):
        done = CliRunner().invoke(app, ["tokens", *arguments, "--token-file", str(file)])
        assert done.exit_code == 0, done.output
        return done.stdout.strip()

    first = tokens("add", "first")
    with serving(tiny_bundle, "--host", "0.0.0.0", "--token-file", str(file)) as server:

        def status(token):
            port = urlsplit(server.url).port
            headers = {"authorization": f"Bearer {token}"}
            return httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=headers).status_code

        def soon(token, expected):
            for _ in range(200):
                if status(token) == expected:
                    return True
                time.sleep(0.05)
            return False

        second = tokens("add", "second")
        assert status(first) == 200 and status(second) == 401
        server.process.send_signal(signal.SIGHUP)
        assert soon(second, 200)
        tokens("remove", "first")
        server.process.send_signal(signal.SIGHUP)
        assert soon(first, 401) and status(second) == 200
        file.write_text("bad\n")
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert status(second) == 200 and server.process.poll() is None
    file.write_text("")
    assert json.loads(tokens("list", "--json")) == {"tokens": []}


@pytest.mark.slow
def test_an_idle_server_takes_little_beside_its_model(tiny_bundle, tmp_path):
    """At most 25 MiB (PSS) more than the same model loaded in Python, with guard and metrics on."""
    guard = tmp_path / "guard.toml"
    guard.write_text(
        "[[content]]\nname = 'a'\nreason = 'b'\nwords = ['x']\n[rates]\nrequests = 1000\n"
        "[audit]\nfile = 'audit.jsonl'\n[usage]\nfile = 'usage.json'\n"
    )
    code = (
        "import sys, time, edge_gemma as e; r = e.PlanRequest(n_threads=1, structured=True);"
        "m = e.load(sys.argv[1], n_ctx=1024, request=r);"
        "list(m.generate('abc', e.Sampling(max_tokens=4))); print('ready', flush=True);"
        "time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(tiny_bundle)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as alone:
        assert alone.stdout.readline() == "ready\n"
        before = footprint(alone.pid)
        alone.kill()
    with serving(tiny_bundle, "--guard", str(guard)) as server:
        body = {"model": server.name, "prompt": "abc", "max_tokens": 4}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        after = footprint(server.process.pid)
    assert after.pss_bytes - before.pss_bytes < 25 * MiB
