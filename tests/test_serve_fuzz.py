"""Nonsense for every route: refusals in the protocol's shape, never a fault, never a crash."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from urllib.parse import urlsplit

import fuzzing
import hypothesis
import hypothesis.strategies as st
import pytest
from serving import serving

import edge_gemma

testclient = pytest.importorskip("starlette.testclient")

from edge_gemma.serve.guard import BearerTokens, Limits  # noqa: E402
from edge_gemma.serve.guard.settings import Guarding  # noqa: E402
from edge_gemma.serve.http import make_app  # noqa: E402
from edge_gemma.serve.service import Service  # noqa: E402

# what was done to a sound or picture so that it could be used is a note, not a fault
# and an upload that is cut off is closed when its form is collected
pytestmark = [
    pytest.mark.filterwarnings("ignore::edge_gemma.errors.MediaWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.Spooled:ResourceWarning"),
]
N_SLOW = int(os.environ.get("EDGE_GEMMA_FUZZ", "10000"))
LIMITS = Limits(output_tokens=2, pixels=1_000_000, audio_s=60, body_bytes=4 << 20)


@contextlib.contextmanager
def fuzzed(model, **options):
    """A function that asks and checks, and the routes that there are."""
    service = Service(model)
    app = make_app(service, guarding=Guarding(limits=LIMITS), **options)
    with testclient.TestClient(
        app, base_url="http://127.0.0.1:11434", raise_server_exceptions=False
    ) as client:

        def ask(asked):
            headers = [(name, value) for name, value in asked.headers]
            response = client.request(asked.method, asked.path, content=asked.body, headers=headers)
            fuzzing.check(asked, response.status_code, dict(response.headers), response.text)
            return response.status_code

        yield ask, fuzzing.routes_of(app)
        assert service.health().live and service.health().n_running == 0
    assert asyncio.run(service.close(5))


def run(model, n):
    """``n`` requests; how many of each status."""
    statuses = {}
    with fuzzed(model) as (ask, routes):
        requests = fuzzing.requests(routes, model.bundle.manifest.name)

        @hypothesis.settings(
            max_examples=n, database=None, phases=[hypothesis.Phase.generate], derandomize=n < 1000
        )
        @hypothesis.given(requests)
        def nonsense(asked):
            status = ask(asked)
            statuses[status] = statuses.get(status, 0) + 1

        nonsense()
    return statuses


@pytest.fixture(scope="module")
def looking_model(looking_bundle):
    request = edge_gemma.PlanRequest(n_threads=1)
    with edge_gemma.load(looking_bundle, n_ctx=512, request=request) as model:
        yield model


@pytest.fixture(scope="module")
def embedding_model(embedding_bundle):
    with edge_gemma.load(embedding_bundle, request=edge_gemma.PlanRequest(n_threads=1)) as model:
        yield model


@pytest.fixture(params=["tiny_model", "looking_model", "hearing_model", "embedding_model"])
def model(request):
    return request.getfixturevalue(request.param)


def test_nonsense(model):
    statuses = run(model, 60)
    assert statuses.get(400, 0) > 10


@pytest.mark.slow
def test_ten_thousand_times_nonsense(model):
    statuses = run(model, N_SLOW // 4)
    print(statuses)
    assert statuses[400] > N_SLOW // 20 and statuses[200] > N_SLOW // 100


def test_every_bomb_by_every_door(looking_model, hearing_model):
    """Each by itself, so that none is left to chance."""
    import base64

    for model in (looking_model, hearing_model):
        name = model.bundle.manifest.name
        with fuzzed(model) as (ask, _):
            for bomb in fuzzing.BOMBS:
                data = base64.b64encode(bomb).decode()
                url = {"url": f"data:image/png;base64,{data}"}
                parts = [{"type": "image_url", "image_url": url}]
                body = {"model": name, "messages": [{"role": "user", "content": parts}]}
                assert ask(fuzzing.Asked("POST", "/v1/chat/completions", fuzzing.dumped(body)))
                parts[:] = [{"type": "input_audio", "input_audio": {"data": data}}]
                ask(fuzzing.Asked("POST", "/v1/chat/completions", fuzzing.dumped(body)))
                body = {"model": name, "prompt": "a", "images": [data]}
                ask(fuzzing.Asked("POST", "/api/generate", fuzzing.dumped(body)))


def test_no_token_no_entry_on_every_route(tiny_model):
    """The routes are read from the application, so that a new one cannot be forgotten."""
    wrong = ({}, {"authorization": "Bearer wrong"}, {"authorization": "a-long-token"})
    with fuzzed(tiny_model, tokens=BearerTokens(["a-long-token"])) as (ask, routes):
        assert len(routes) > 20
        for method, path in [*routes, ("GET", "/nothing"), ("OPTIONS", "/v1/models")]:
            for headers in wrong:
                asked = fuzzing.Asked(method, path, b"{}", list(headers.items()))
                assert ask(asked) == 401, path
            good = [("authorization", "Bearer a-long-token")]
            assert ask(fuzzing.Asked(method, path, b"{}", good)) != 401


# --- bytes on a socket ---

LINES = [
    b"Host: 127.0.0.1",
    b"Host: evil",
    b"Content-Length: 2",
    b"Content-Length: 3",
    b"Content-Length: +2",
    b"Content-Length: 0x2",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding: chunked, identity",
    b"Transfer-Encoding:\x0bchunked",
    b"Connection: close",
    b"Connection: upgrade",
    b"Upgrade: h2c",
    b"X: " + b"a" * 40000,
    b" folded",
    b"\x00: a",
    b"no colon",
    b": empty",
    b"X: a\rb",
]
FIRST = [
    b"POST /api/chat HTTP/1.1",
    b"GET /v1/models HTTP/1.1",
    b"GET /v1/models HTTP/1.0",
    b"GET http://evil/v1/models HTTP/1.1",
    b"CONNECT evil:80 HTTP/1.1",
    b"OPTIONS * HTTP/1.1",
    b"GET  /v1/models HTTP/1.1",
    b"GET /../../etc/passwd HTTP/1.1",
    b"GET /%ff%fe HTTP/1.1",
    b"GET /\xff HTTP/1.1",
    b"PRI * HTTP/2.0",
    b"\x16\x03\x01",
]
BODIES = [
    b"{}",
    b"0\r\n\r\n",
    b"2\r\n{}\r\n0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"0\r\n\r\nGET /api/tags HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"",
]


def test_smuggled_headers_and_other_bytes(tiny_bundle):
    sockets(tiny_bundle, 60)


@pytest.mark.slow
def test_many_bytes_on_sockets(tiny_bundle):
    sockets(tiny_bundle, 1000)


def sockets(bundle, n):
    """Each connection gets answers that are HTTP or nothing; the server lives."""
    chosen = random.Random(13)
    with serving(bundle) as server:
        address = urlsplit(server.url)
        for _ in range(n):
            lines = [chosen.choice(FIRST), *chosen.choices(LINES, k=chosen.randint(0, 4))]
            data = b"\r\n".join(lines) + b"\r\n\r\n" + chosen.choice(BODIES)
            with socket.create_connection((address.hostname, address.port), 30) as connection:
                connection.sendall(data)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                answer = b""
                with contextlib.suppress(ConnectionResetError, TimeoutError):
                    while piece := connection.recv(65536):
                        answer += piece
                        connection.settimeout(0.02)  # a connection that stays open is fine
            assert not answer or answer.startswith(b"HTTP/1.1 "), data
            assert b"Traceback" not in answer and b" 500 " not in answer[:20], data
            both = b"Content-Length:" in data and b"Transfer-Encoding:" in data
            assert not (both and b"HTTP/1.1 200" in answer), data
        assert server.process.poll() is None


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.text(max_size=60), st.text(max_size=60))
def test_authorization_and_host_may_be_anything(tiny_model, authorization, host):
    tokens = BearerTokens(["a-long-token"])
    assert tokens.name_of(authorization) is None
    assert tokens.name_of(f"Bearer {host}") is None
