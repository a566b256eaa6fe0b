"""Home Assistant's requests over HTTP, as its integrations (core 2026.11) send them: ollama,
llama_cpp and litellm, in the order of their set-up and of a spoken command.

Written from what those integrations send; Home Assistant itself is not run. Wyoming is replayed in
test_wyoming.py.
"""

from __future__ import annotations

import io
import json

import pytest
from test_serve import make_speech, opened

LIGHTS = {
    "type": "function",
    "function": {
        "name": "HassTurnOn",
        "description": "Turns on a device.",
        "parameters": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "domain": {"type": "array", "items": {"type": "string"}},
            },
            "required": [],
        },
    },
}
SYSTEM = {"role": "system", "content": "You are a voice assistant for Home Assistant."}
QUESTION = {"role": "user", "content": "Turn on the kitchen light"}
# as voluptuous-openapi writes what an AI task wants: OpenAPI 3's nullable among it. Bounded, since
# random weights would fill the context with a text
TASK = {
    "type": "object",
    "properties": {
        "chickens": {"type": "integer", "minimum": 0, "maximum": 99, "description": "how many"},
        "note": {"type": "string", "enum": ["hungry", "asleep"], "nullable": True},
    },
    "required": ["chickens"],
}


@pytest.fixture(scope="module")
def client(tiny_model):
    yield from opened(tiny_model)


@pytest.fixture(scope="module")
def hearing(hearing_model):
    yield from opened(hearing_model)


def lines(response):
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.mark.compat(
    kind="client",
    what="Home Assistant's ollama requests",
    happens="replayed: set-up, tools, AI task",
)
def test_ollama(client):
    models = [model["model"] for model in client.get("/api/tags").json()["models"]]
    assert len(models) == 1
    chat = {
        "model": models[0],
        "messages": [SYSTEM, QUESTION],
        "tools": [LIGHTS],
        "stream": True,
        "keep_alive": -1,
        "options": {"num_ctx": 8192, "num_predict": 8},
        "think": False,
    }
    answer = lines(client.post("/api/chat", json=chat))
    assert answer[-1]["done"] and all("message" in line for line in answer)
    call = {"function": {"name": "HassTurnOn", "arguments": {"name": "kitchen light"}}}
    round_two = [
        SYSTEM,
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"speech": {}, "response_type": "action_done"}'},
    ]
    answer = lines(client.post("/api/chat", json=chat | {"messages": round_two}))
    assert answer[-1]["done"]
    task = chat | {"format": TASK, "tools": None, "keep_alive": "300s", "options": {}}
    answer = lines(client.post("/api/chat", json=task))
    text = "".join(line["message"]["content"] for line in answer)
    assert isinstance(json.loads(text)["chickens"], int)


@pytest.mark.compat(
    kind="client",
    what="Home Assistant's llama_cpp requests",
    happens="replayed: set-up, tools, task",
)
@pytest.mark.parametrize("stream", [False, True])
def test_llama_cpp(client, stream):
    model = client.get("/v1/models").json()["data"][0]["id"]
    probe = {"model": model, "messages": [QUESTION], "tools": [LIGHTS], "max_tokens": 4}
    assert client.post("/v1/chat/completions", json=probe).status_code == 200
    chat = probe | {
        "messages": [
            SYSTEM,
            QUESTION,
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "HassTurnOn", "arguments": '{"name": "kitchen"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": '{"success": true}'},
        ],
        "max_tokens": 12,
        "top_p": 1.0,
        "temperature": 0.7,
        "user": "01JABC",
        "stream": stream,
    }
    answer = client.post("/v1/chat/completions", json=chat)
    assert answer.status_code == 200, answer.text
    schema = {"name": "task", "strict": True, "schema": TASK}
    task = chat | {
        "tools": None,
        "stream": False,
        "max_tokens": 3000,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    answer = client.post("/v1/chat/completions", json=task)
    assert answer.status_code == 200, answer.text
    assert "chickens" in json.loads(answer.json()["choices"][0]["message"]["content"])
    wrong = client.post("/v1/chat/completions", json=probe | {"model": "gone"})
    assert wrong.status_code == 404 and wrong.json()["error"]["message"]


@pytest.mark.compat(
    kind="client", what="Home Assistant's litellm requests", happens="replayed: a spoken command"
)
def test_litellm_hears(hearing, tmp_path):
    model = hearing.get("/v1/models").json()["data"][0]["id"]
    sound = make_speech(tmp_path / "audio.wav").read_bytes()
    answer = hearing.post(
        "/v1/audio/transcriptions",
        data={"model": model, "language": "en", "prompt": "kitchen", "keywords": "light"},
        files={"file": ("audio.wav", io.BytesIO(sound), "audio/wav")},
    )
    assert answer.status_code == 200, answer.text
    assert isinstance(answer.json()["text"], str)
