"""Ollama's keep_alive: the model leaves memory and comes back through the plan."""

from __future__ import annotations

import shutil
import time
from datetime import UTC, datetime

import pytest
from serving import serving
from test_serve import HELLO

from edge_gemma.errors import UsageError
from edge_gemma.serve.residence import FOREVER, parse_keep_alive

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
SHORT = {"num_predict": 4, "temperature": 0}


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (300, 300.0),
        ("300s", 300.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("500ms", 0.5),
        (0, 0.0),
        ("0", 0.0),
        (-1, FOREVER),
        ("-1m", FOREVER),
    ],
)
def test_times_are_read(value, seconds):
    assert parse_keep_alive(value) == seconds


@pytest.mark.parametrize(
    "value", ["", "soon", "5 m", "5m!", "m", "nan", float("nan"), "5d", "--5m"]
)
def test_what_is_no_time(value):
    with pytest.raises(UsageError, match="keep_alive is"):
        parse_keep_alive(value)


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving(tiny_bundle, "--keep-alive", "-1", "--parallel", "2") as served:
        with httpx.Client(base_url=served.url, timeout=60) as client:
            yield client, served


@pytest.fixture
def ask(server):
    client, served = server

    def post(path="/api/chat", **body):
        given = {"model": served.name, "messages": HELLO, "options": SHORT, "stream": False} | body
        answer = client.post(path, json=given)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return post


@pytest.fixture
def loaded(server):
    def names():
        return [model["model"] for model in server[0].get("/api/ps").json()["models"]]

    return names


def gone(loaded):
    """Whether it goes; the answer that says so comes before."""
    end_s = time.monotonic() + 30
    while loaded() and time.monotonic() < end_s:
        time.sleep(0.02)
    return not loaded()


def test_it_goes_and_comes_back(ask, loaded, server):
    first = ask()
    assert loaded() and first["load_duration"] == 0
    assert ask(messages=[], keep_alive=0)["done_reason"] == "unload"
    assert gone(loaded)
    assert ask(messages=[], keep_alive=0)["done_reason"] == "unload"  # it is gone already
    client, served = server
    for path in ("/api/tags", "/v1/models", "/health", "/health/ready", "/metrics", "/slots"):
        assert client.get(path).status_code == 200, path
    assert client.post("/api/show", json={"model": served.name}).status_code == 200
    assert client.post("/api/chat", json={"model": "other"}).status_code == 404
    assert not loaded()  # none of these brings it back
    again = ask()
    assert again["message"] == first["message"] and again["load_duration"] > 0
    assert again["total_duration"] >= again["load_duration"]
    assert loaded()


def test_an_answer_is_not_cut_off_by_keep_alive_zero(ask, loaded):
    answer = ask(keep_alive=0)
    assert answer["done_reason"] == "length"
    assert gone(loaded)
    assert ask("/api/generate", prompt="")["done_reason"] == "load"
    assert loaded()


def test_it_goes_when_nobody_asks(ask, loaded):
    ask(keep_alive="200ms")
    assert gone(loaded)
    ask(keep_alive=-1)
    assert loaded()


def test_openai_clients_find_it_back(ask, loaded, server):
    ask(keep_alive=0)
    assert gone(loaded)
    client, served = server
    body = {"model": served.name, "messages": HELLO, "max_tokens": 4, "temperature": 0}
    stream = client.post("/v1/chat/completions", json=body | {"stream": True})
    assert stream.status_code == 200 and stream.text.endswith("data: [DONE]\n\n")
    assert loaded()


def test_ps_tells_when_it_goes(ask, server):
    ask(keep_alive="1h")
    [model] = server[0].get("/api/ps").json()["models"]
    left_s = _seconds_until(model["expires_at"])
    assert 3500 < left_s <= 3600
    ask()  # the server's own again
    [model] = server[0].get("/api/ps").json()["models"]
    assert _seconds_until(model["expires_at"]) > 1e9


def _seconds_until(text):
    return (datetime.fromisoformat(text) - datetime.now(UTC)).total_seconds()


@pytest.mark.parametrize("value", ["soon", "5d", ""])
def test_a_keep_alive_that_is_none(server, value):
    client, served = server
    body = {"model": served.name, "messages": HELLO, "keep_alive": value}
    refused = client.post("/api/chat", json=body)
    assert refused.status_code == 400 and "keep_alive" in refused.json()["error"]
    empty = client.post("/api/generate", json={"model": served.name, "keep_alive": value})
    assert empty.status_code == 400 and "keep_alive" in empty.json()["error"]


def test_a_bundle_that_went_while_it_was_unloaded(tiny_bundle, tmp_path):
    copy = tmp_path / tiny_bundle.name
    shutil.copytree(tiny_bundle, copy)
    with serving(copy) as served, httpx.Client(base_url=served.url, timeout=60) as client:
        body = {"model": served.name, "keep_alive": 0}
        assert client.post("/api/generate", json=body).json()["done_reason"] == "unload"
        while client.get("/api/ps").json()["models"]:
            time.sleep(0.02)
        hidden = copy.rename(tmp_path / "away")
        body = {"model": served.name, "messages": HELLO, "options": SHORT}
        refused = client.post("/api/chat", json=body)
        assert refused.status_code == 500 and "bundle" in refused.json()["error"]
        assert client.get("/health").status_code == 200
        hidden.rename(copy)  # it is found again
        assert client.post("/api/chat", json=body).status_code == 200
