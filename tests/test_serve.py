"""The HTTP routes, on tiny models: shapes, statuses, streams, and what stands before them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import edge_gemma
from edge_gemma.bundles.token_roles import FUNCTION_TOKENS
from edge_gemma.conversation.call_stream import CallStream
from edge_gemma.conversation.stream import Chunk
from edge_gemma.conversation.transcription import transcribe
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.options import Sampling
from edge_gemma.prompts.prompt import Prompt
from edge_gemma.serve.guard import BearerTokens, Limits
from edge_gemma.serve.http import Address, make_app
from edge_gemma.serve.service import Service

testclient = pytest.importorskip("starlette.testclient")

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = Sampling(max_tokens=8, temperature=0)
LIGHT = {
    "type": "function",
    "function": {
        "name": "light",
        "description": "Switch a light.",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
        },
    },
}
ANSWER = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


def opened(model, **options):
    """A client of ``model``'s routes."""
    service = Service(model)
    app = make_app(service, **options)
    client = testclient.TestClient(
        app, base_url="http://127.0.0.1:11434", raise_server_exceptions=False
    )
    with client:
        yield client
    assert asyncio.run(service.close(5))


@pytest.fixture(scope="module")
def client(tiny_model):
    yield from opened(tiny_model)


@pytest.fixture(scope="module")
def name(tiny_model):
    return tiny_model.bundle.manifest.name


@pytest.fixture(scope="module")
def chat(client, name):
    """POST to /v1/chat/completions."""

    def post(**body):
        defaults = {"model": name, "messages": HELLO, "max_tokens": 8, "temperature": 0}
        return client.post("/v1/chat/completions", json=defaults | body)

    return post


@pytest.fixture(scope="module")
def ollama(client, name):
    """POST to one of Ollama's routes; the options are greedy."""

    def post(path, **body):
        options = {"num_predict": 8, "temperature": 0}
        return client.post(path, json={"model": name, "options": options} | body)

    return post


def direct(model, text="Hello", sampling=GREEDY):
    """What the library itself answers."""
    with model.chat() as talk:
        return "".join(chunk.text for chunk in talk.send(text, sampling))


def events(response):
    """The objects of an event stream, without [DONE], which must be there."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def lines(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.text.splitlines()]


def refused(response, status, *words):
    """An error in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(word in error["message"] for word in words), error
    return error


# --- OpenAI ---


def test_models(client, name):
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == [name]
    assert client.get(f"/v1/models/{name}").json()["object"] == "model"
    error = refused(client.get("/v1/models/gpt-9"), 404, "gpt-9", name)
    assert error["code"] == "model_not_found"


def test_a_chat_completion_is_what_the_library_answers(chat, tiny_model):
    answer = chat().json()
    assert answer["object"] == "chat.completion"
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": direct(tiny_model)}
    assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_streamed_chat_completion(chat, tiny_model):
    pieces = events(chat(stream=True, stream_options={"include_usage": True}))
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    assert len({piece["id"] for piece in pieces}) == 1
    deltas = [piece["choices"][0]["delta"].get("content", "") for piece in pieces[:-1]]
    assert "".join(deltas) == direct(tiny_model)
    assert pieces[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    assert pieces[-1]["choices"] == [] and pieces[-1]["usage"]["completion_tokens"] > 0


def test_tools_required_give_a_call(chat):
    choice = chat(tools=[LIGHT], tool_choice="required", max_tokens=200).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "light"
    assert set(json.loads(call["function"]["arguments"])) == {"on"}
    chosen = {"type": "function", "function": {"name": "light"}}
    pieces = events(chat(tools=[LIGHT], tool_choice=chosen, max_tokens=200, stream=True))
    [streamed] = [
        piece["choices"][0]["delta"]["tool_calls"][0]
        for piece in pieces
        if "tool_calls" in piece["choices"][0]["delta"]
    ]
    assert streamed["index"] == 0 and streamed["function"] == call["function"]
    assert pieces[-1]["choices"][0]["finish_reason"] == "tool_calls"
    # the round after it
    talk = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "done"},
    ]
    assert chat(messages=talk, tools=[LIGHT]).status_code == 200


def test_tools_that_are_not_chosen_are_refused(chat):
    refused(chat(tools=[LIGHT], tool_choice={"function": {"name": "other"}}), 400, "tool_choice")
    refused(chat(tools=[{"function": {"name": "no spaces"}}]), 400, "a tool needs a name")


def test_response_formats(chat):
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": ANSWER, "strict": True}}
    text = chat(response_format=schema, max_tokens=100).json()["choices"][0]["message"]["content"]
    assert list(json.loads(text)) == ["ok"]
    assert chat(response_format={"type": "text"}).status_code == 200
    text = chat(response_format={"type": "json_object"}).json()["choices"][0]["message"]["content"]
    assert text.startswith("{")
    refused(chat(response_format={"type": "json_schema"}), 400, "no schema")
    unsupported = {"type": "object", "not": {"required": ["x"]}}
    schema["json_schema"]["schema"] = unsupported
    refused(chat(response_format=schema), 400, "not")


def test_logprobs_seed_and_stop(chat, tiny_model):
    choice = chat(logprobs=True, top_logprobs=2).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) >= 1 and len(content[0]["top_logprobs"]) == 2
    assert bytes(content[0]["bytes"]).decode("utf-8", "replace") == content[0]["token"]
    hot = {"temperature": 1.5, "seed": -7}
    again = [chat(**hot).json()["choices"][0]["message"]["content"] for _ in range(2)]
    assert again[0] == again[1]
    whole = direct(tiny_model)
    stopped = chat(stop=whole[2:4]).json()["choices"][0]
    assert stopped["message"]["content"] == whole[: whole.index(whole[2:4])]
    assert stopped["finish_reason"] == "stop"


def test_what_is_not_supported_is_refused_by_name(chat, client, name):
    assert refused(chat(n=2), 400)["param"] == "n"
    assert refused(chat(logit_bias={"5": 1}), 400)["param"] == "logit_bias"
    refused(chat(model="other"), 404)
    refused(chat(temperature=-1), 400, "temperature")
    refused(chat(temperature="hot"), 400, "$.temperature")
    refused(chat(messages=[]), 400)
    error = refused(chat(messages=[{"role": "user", "content": "word " * 600}]), 400)
    assert error["code"] == "context_length_exceeded"
    remote = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]
    refused(chat(messages=[{"role": "user", "content": remote}]), 400, "not fetched")
    local = [{"type": "image_url", "image_url": {"url": "/etc/hostname"}}]
    refused(chat(messages=[{"role": "user", "content": local}]), 400, "not fetched")
    refused(client.post("/v1/chat/completions", content=b"{"), 400)
    refused(client.get("/v1/chat/completions"), 405)
    refused(client.get("/v1/nothing"), 404)
    refused(client.post("/v1/audio/transcriptions", data={"model": name}), 400, "hear")


def test_messages_of_one_role_in_a_row_are_one_turn(chat):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Very."},
        *HELLO,
        {"role": "user", "content": [{"type": "text", "text": "again"}]},
    ]
    assert chat(messages=talk).status_code == 200


def test_completions(client, name, tiny_model):
    body = {"model": name, "prompt": "abc", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    answer = client.post("/v1/completions", json=body).json()
    expected = "".join(chunk.text for chunk in tiny_model.generate("abc", GREEDY))
    assert answer["choices"][0]["text"] == expected
    assert len(answer["choices"][0]["logprobs"]["tokens"]) >= 1
    pieces = events(client.post("/v1/completions", json=body | {"stream": True}))
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected
    refused(client.post("/v1/completions", json=body | {"prompt": ["a", "b"]}), 400, "one")
    refused(client.post("/v1/completions", json=body | {"echo": True}), 400, "echo")


def test_a_stream_that_fails_ends_with_an_error_event(chat, tiny_model, monkeypatch):
    """The second token fails: the status was sent, so an event tells it."""
    sampler = type(tiny_model.decoder.sampler(GREEDY))
    sample, n = sampler.sample, []

    def failing(self, logits):
        n.append(1)
        if len(n) == 3:
            raise RuntimeFailure("nothing is left to choose from")
        return sample(self, logits)

    monkeypatch.setattr(sampler, "sample", failing)
    pieces = events(chat(stream=True))
    assert "nothing is left" in pieces[-1]["error"]["message"]
    n[:] = [1, 1]
    refused(chat(), 500, "nothing is left")


# --- Ollama ---


def test_what_ollama_clients_ask_first(client, name, tiny_model):
    assert client.get("/").text == "Ollama is running"
    assert client.head("/").status_code == 200
    assert client.get("/api/version").json()["version"]
    [model] = client.get("/api/tags").json()["models"]
    assert model["model"] == model["name"] == name and len(model["digest"]) == 64
    [loaded] = client.get("/api/ps").json()["models"]
    assert loaded["size"] == tiny_model.plan.total_bytes and loaded["context_length"] == 512
    for body in ({"model": name}, {"name": f"{name}:latest"}):
        shown = client.post("/api/show", json=body).json()
        assert "completion" in shown["capabilities"]
        assert shown["model_info"]["general.architecture"] == "gemma3"
    missing = client.post("/api/show", json={"model": "other"})
    assert missing.status_code == 404 and "not found" in missing.json()["error"]
    assert lines(client.post("/api/pull", json={"model": name}))[-1] == {"status": "success"}
    assert client.post("/api/pull", json={"model": "other"}).status_code == 404


def test_ollama_chat(ollama, tiny_model):
    streamed = lines(ollama("/api/chat", messages=HELLO))
    text = "".join(line["message"]["content"] for line in streamed)
    assert text == direct(tiny_model)
    assert [line["done"] for line in streamed] == [False] * (len(streamed) - 1) + [True]
    end = streamed[-1]
    assert end["done_reason"] in ("stop", "length") and end["eval_count"] > 0
    for field in ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration"):
        assert isinstance(end[field], int)
    whole = ollama("/api/chat", messages=HELLO, stream=False, keep_alive="5m", think=False).json()
    assert whole["message"]["content"] == text and whole["done"]
    loaded = ollama("/api/chat", messages=[]).json()
    assert loaded["done_reason"] == "load"


def test_ollama_generate(ollama, tiny_model):
    streamed = lines(ollama("/api/generate", prompt="Hello"))
    assert "".join(line["response"] for line in streamed) == direct(tiny_model)
    raw = ollama("/api/generate", prompt="abc", raw=True, stream=False).json()
    expected = "".join(chunk.text for chunk in tiny_model.generate("abc", GREEDY))
    assert raw["response"] == expected
    assert ollama("/api/generate", prompt="").json()["done_reason"] == "load"


def test_ollama_formats_and_tools(ollama):
    many = {"num_predict": 200, "temperature": 0}
    whole = ollama("/api/chat", messages=HELLO, format=ANSWER, stream=False, options=many).json()
    assert list(json.loads(whole["message"]["content"])) == ["ok"]
    as_json = ollama("/api/generate", prompt="a", format="json", stream=False).json()
    assert as_json["response"].startswith("{")
    # a schema that is a call: the tiny model does not write one by itself
    call = {
        "type": "object",
        "properties": {"name": {"const": "light"}, "parameters": {"type": "object"}},
        "required": ["name", "parameters"],
    }
    call["properties"]["parameters"] = LIGHT["function"]["parameters"]
    asked = {"messages": HELLO, "tools": [LIGHT], "format": call, "options": many}
    streamed = lines(ollama("/api/chat", **asked))
    [called] = [c for line in streamed for c in line["message"].get("tool_calls", [])]
    assert called["function"]["name"] == "light"
    assert isinstance(called["function"]["arguments"], dict)
    assert "".join(line["message"]["content"] for line in streamed) == ""
    talk = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "tool_name": "light", "content": "done"},
    ]
    assert ollama("/api/chat", messages=talk, tools=[LIGHT], stream=False).status_code == 200


def test_ollama_options(ollama, caplog):
    options = {"num_predict": 2, "num_ctx": 8192, "mirostat": 1, "seed": 0, "stop": ["x"]}
    ended = ollama("/api/generate", prompt="a", options=options, stream=False).json()
    assert ended["done_reason"] == "length"
    assert "mirostat, num_ctx" in caplog.text
    for bad in (
        {"options": {"temperature": "hot"}},
        {"options": {"top_p": 7}},
        {"format": "xml"},
        {"think": True},
        {"suffix": "b"},
        {"model": 3},
    ):
        response = ollama("/api/generate", prompt="a", **bad)
        assert response.status_code == 400, (bad, response.text)
        assert list(response.json()) == ["error"]
    assert ollama("/api/chat", messages=HELLO, model="other").status_code == 404
    truncated = [{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "x"}]
    talk = [*truncated * 6, *HELLO]
    assert ollama("/api/chat", messages=talk, stream=False).status_code == 200
    assert ollama("/api/chat", messages=talk, stream=False, truncate=False).status_code == 400


# --- pictures and speech ---


@pytest.fixture(scope="module")
def looking(looking_bundle):
    request = edge_gemma.PlanRequest(n_threads=1)
    with edge_gemma.load(looking_bundle, n_ctx=512, request=request) as model:
        yield model, next(generator := opened(model))
        next(generator, None)


def test_pictures_come_by_both_protocols(looking, cat_png):
    model, client = looking
    data = base64.b64encode(cat_png.read_bytes()).decode()
    with model.chat() as talk:
        parts = [edge_gemma.Image(cat_png), "What?"]
        expected = "".join(chunk.text for chunk in talk.send(parts, GREEDY))
    name = model.bundle.manifest.name
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "What?"},
    ]
    body = {"model": name, "max_tokens": 8, "temperature": 0}
    answer = client.post(
        "/v1/chat/completions", json=body | {"messages": [{"role": "user", "content": content}]}
    )
    assert answer.json()["choices"][0]["message"]["content"] == expected
    message = {"role": "user", "content": "What?", "images": [data]}
    options = {"num_predict": 8, "temperature": 0}
    body = {"model": name, "messages": [message], "stream": False, "options": options}
    assert client.post("/api/chat", json=body).json()["message"]["content"] == expected
    message["images"] = ["not base64!"]
    assert client.post("/api/chat", json=body).status_code == 400
    message["images"] = [base64.b64encode(b"no picture").decode()]
    assert client.post("/api/chat", json=body).status_code == 400
    assert "vision" in client.get("/api/tags").json()["models"][0]["capabilities"]


@pytest.fixture(scope="module")
def hearing(hearing_model):
    limits = Limits(output_tokens=8)
    yield hearing_model, next(generator := opened(hearing_model, limits=limits))
    next(generator, None)


@pytest.fixture(scope="module")
def speech_wav(tmp_path_factory):
    """Something that speech detection takes for speech, twice with a pause."""
    return make_speech(tmp_path_factory.mktemp("speech") / "speech.wav")


def make_speech(path):
    import soundfile

    rate_hz = 16000
    t = np.arange(int(1.5 * rate_hz)) / rate_hz
    pitch = 120 + 20 * np.sin(2 * np.pi * 2 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / rate_hz
    voiced = sum(np.sin(n * phase) / n for n in range(1, 20))
    voiced *= 0.5 + 0.5 * np.sin(2 * np.pi * 4 * t)
    voiced = 0.3 * voiced / np.abs(voiced).max()
    pause = np.zeros(rate_hz)
    soundfile.write(path, np.concatenate([pause, voiced, pause, voiced, pause]), rate_hz)
    return path


def upload(client, path, name, **fields):
    files = {"file": ("audio.wav", path.read_bytes(), "audio/wav")}
    return client.post(
        "/v1/audio/transcriptions", files=files, data={"model": name, "temperature": "0"} | fields
    )


def test_speech_is_written_down_as_the_library_does(hearing, speech_wav):
    model, client = hearing
    name = model.bundle.manifest.name
    answer = upload(client, speech_wav, name, response_format="verbose_json", language="en")
    assert answer.status_code == 200, answer.text
    verbose = answer.json()
    assert verbose["language"] == "english" and verbose["duration"] == pytest.approx(6, abs=0.1)
    options = edge_gemma.ListenOptions(pad_audio=True, sampling=GREEDY)
    instruction = "Transcribe the following speech segment in English:"
    with model.chat() as chat:
        segments = list(transcribe(chat, speech_wav, instruction, options))
    assert [(s["start"], s["end"], s["text"]) for s in verbose["segments"]] == [
        (segment.start_s, segment.end_s, segment.text) for segment in segments
    ]
    assert len(segments) >= 1
    plain = upload(client, speech_wav, name, language="en").json()
    assert plain["text"] == verbose["text"] == " ".join(s.text for s in segments if s.text)
    assert plain["usage"] == {"type": "duration", "seconds": 6}
    assert "-->" in upload(client, speech_wav, name, response_format="srt").text
    assert upload(client, speech_wav, name, response_format="vtt").text.startswith("WEBVTT")
    assert upload(client, speech_wav, name, response_format="text", language="en").text.strip()
    streamed = upload(client, speech_wav, name, stream="true", language="en")
    pieces = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line]
    assert pieces[-1]["type"] == "transcript.text.done"
    assert "".join(p.get("delta", "") for p in pieces) == pieces[-1]["text"]


def test_a_prompt_and_keywords_stand_before_the_instruction(hearing, speech_wav):
    model, client = hearing
    name = model.bundle.manifest.name
    hints = {"prompt": "In the kitchen.", "keywords[]": ["Ljubljana", "kettle"]}
    answer = upload(client, speech_wav, name, language="en", **hints)
    instruction = (
        "Words that may occur: Ljubljana, kettle\n"
        "What was said before, or what it is about: In the kitchen.\n"
        "Transcribe the following speech segment in English:"
    )
    options = edge_gemma.ListenOptions(pad_audio=True, sampling=GREEDY)
    with model.chat() as chat:
        expected = [s.text for s in transcribe(chat, speech_wav, instruction, options)]
    assert answer.json()["text"] == " ".join(text for text in expected if text)
    refused = upload(client, speech_wav, name, prompt="x" * 5000)
    assert refused.status_code == 400 and "5000 characters" in refused.json()["error"]["message"]


def test_clips_in_a_chat(hearing, sine_wav):
    model, client = hearing
    name = model.bundle.manifest.name
    with model.chat() as chat:
        parts = ["What?", edge_gemma.Audio(sine_wav)]
        expected = "".join(chunk.text for chunk in chat.send(parts, GREEDY))
    data = base64.b64encode(sine_wav.read_bytes()).decode()
    content = [
        {"type": "text", "text": "What?"},
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
    ]
    body = {"model": name, "max_tokens": 8, "temperature": 0}
    messages = [{"role": "user", "content": content}]
    answer = client.post("/v1/chat/completions", json=body | {"messages": messages})
    assert answer.json()["choices"][0]["message"]["content"] == expected
    content[1]["input_audio"]["data"] = base64.b64encode(b"RIFF no sound").decode()
    error = refused(client.post("/v1/chat/completions", json=body | {"messages": messages}), 400)
    assert "/tmp" not in error["message"] and "edge-gemma-" not in error["message"]
    message = {"role": "user", "content": "What?", "images": [data]}  # Ollama's way
    ollama = {"model": name, "messages": [message], "stream": False}
    assert client.post("/api/chat", json=ollama).status_code == 200


def test_what_cannot_be_written_down(hearing, speech_wav, tmp_path):
    model, client = hearing
    name = model.bundle.manifest.name
    noise = tmp_path / "noise.wav"
    noise.write_bytes(b"not a sound")
    error = refused(upload(client, noise, name), 400)
    assert str(tmp_path) not in error["message"] and "/tmp" not in error["message"]
    refused(upload(client, speech_wav, "whisper-1"), 404)
    refused(upload(client, speech_wav, name, response_format="docx"), 400, "docx")
    refused(upload(client, speech_wav, name, language="x1"), 400, "language")
    refused(client.post("/v1/audio/transcriptions", data={"model": name}), 400, "no file")
    refused(client.post("/v1/audio/transcriptions", content=b"x"), 400)


# --- the guard ---

ROUTES = [
    ("GET", "/"),
    ("GET", "/health"),
    ("GET", "/v1/models"),
    ("GET", "/api/tags"),
    ("GET", "/api/version"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/audio/transcriptions"),
    ("POST", "/api/chat"),
    ("GET", "/nothing"),
]


def test_no_token_no_entry_on_every_route(tiny_model):
    for client in opened(tiny_model, tokens=BearerTokens(["secret-token"])):
        for method, path in ROUTES:
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "secret-token"},
            ):
                response = client.request(method, path, headers=headers)
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                assert "error" in response.json()
        good = {"authorization": "Bearer secret-token"}
        assert client.get("/v1/models", headers=good).status_code == 200
        assert client.get("/v1/models", headers=good | {"host": "board.local"}).status_code == 200


def test_web_pages_from_elsewhere_are_refused(client):
    assert client.get("/api/tags", headers={"origin": "https://evil.example"}).status_code == 403
    assert client.get("/api/tags", headers={"origin": "null"}).status_code == 403
    assert client.get("/api/tags", headers={"host": "evil.example"}).status_code == 403
    same = {"origin": "http://127.0.0.1:11434"}
    response = client.get("/api/tags", headers=same)
    assert response.status_code == 200
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert response.headers["x-request-id"]


def test_bodies_have_a_limit_however_they_come(tiny_model, name):
    limits = Limits(body_bytes=2000, messages=3)
    for client in opened(tiny_model, limits=limits):
        refused(client.post("/v1/chat/completions", content=b"x" * 3000), 413)
        absurd = {"content-length": "9" * 5000}
        refused(client.post("/v1/chat/completions", content=b"", headers=absurd), 413)
        pieces = (b"x" * 500 for _ in range(6))  # without a content-length
        refused(client.post("/v1/chat/completions", content=pieces), 413)
        body = {"model": name, "messages": HELLO * 4}
        refused(client.post("/v1/chat/completions", json=body), 400, "at most 3")


def test_pictures_have_a_limit(tiny_model, name):
    from PIL import Image

    file = io.BytesIO()
    Image.new("1", (3000, 3000)).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    for client in opened(tiny_model, limits=Limits(pixels=1_000_000)):
        body = {"model": name, "prompt": "a", "images": [data]}
        assert client.post("/api/generate", json=body).status_code == 400


def test_addresses(tmp_path):
    assert Address().tokens() is None
    with pytest.raises(UsageError, match="--token-file"):
        Address("0.0.0.0").tokens()
    file = tmp_path / "tokens"
    file.write_text("# mine\n\nlong-enough-token\n")
    assert Address("0.0.0.0", token_file=file).tokens().allow("Bearer long-enough-token")
    file.write_text("short\n")
    with pytest.raises(UsageError, match="shorter"):
        Address(token_file=file).tokens()
    with Address(port=0).open() as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeFailure, match=f"port {port}.*--port"):
            Address(port=port).open()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    "messages prompt tools tool_choice response_format stop seed n logprobs top_p options format "
    "images system temperature stream_options think raw".split()
)


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.sampled_from(["/v1/chat/completions", "/v1/completions", "/api/chat", "/api/generate"]),
    st.dictionaries(FIELDS, JSON, max_size=4),
)
def test_fuzzed_bodies_get_an_answer_or_a_refusal(client, name, path, fields):
    body = {"model": name, "messages": HELLO, "prompt": "a", "options": {"num_predict": 1}}
    body |= {"max_tokens": 1, "stream": False} | fields
    checked(client.post(path, content=json.dumps(body).encode()))


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    st.sampled_from(["/v1/chat/completions", "/api/chat", "/api/show", "/api/pull"]),
    st.binary(max_size=60) | st.integers(1, 4000).map(lambda n: b'{"a":' * n),
)
def test_fuzzed_bytes_get_a_refusal(client, path, body):
    response = checked(client.post(path, content=body))
    assert 400 <= response.status_code < 500


def checked(response):
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        assert "error" in response.json() and "Traceback" not in response.text
    return response


# --- calls while they stream ---


def call_stream(special_tokens=None):
    manifest = SimpleNamespace(special_tokens=special_tokens or {}, chat_template=None)
    prompt = Prompt(manifest, lambda text, special: list(text.encode()))
    decoder = SimpleNamespace(piece=lambda token: bytes([token]) if token < 256 else b"")
    return CallStream([LIGHT], prompt, decoder.piece)


@pytest.mark.parametrize(
    ("texts", "sent", "ended"),
    [
        (["a {b}\n", "c"], "a {b}\nc", ("", 0)),
        (
            ["Sure.\n", "  ", '{"name": "light", ', '"parameters": {"on": true}}'],
            "Sure.\n",
            ("", 1),
        ),
        (["``", "`json\n", '{"name": "light", "parameters": {}}\n```'], "", ("", 1)),
        (["[1] is", " a note"], "", ("[1] is a note", 0)),
        (['{"name": "other", "parameters": {}}'], "", ('{"name": "other", "parameters": {}}', 0)),
        (["one ` two"], "one ` two", ("", 0)),
    ],
)
def test_what_may_be_a_call_is_held_back(texts, sent, ended):
    stream = call_stream()
    assert "".join([stream.push(Chunk(text)) for text in texts]) == sent
    rest, calls = stream.finish()
    assert (rest, len(calls)) == ended


def test_calls_with_control_tokens_come_out_of_a_stream():
    tokens = {name: 300 + n for n, name in enumerate(FUNCTION_TOKENS)}
    stream = call_stream(tokens)
    written = b"call:light{on:true}"
    ids = [*b"Yes. ", tokens["start_function_call"], *written, tokens["end_function_call"]]
    pieces = [Chunk(chr(token) if token < 256 else "", (token,)) for token in ids]
    assert "".join([stream.push(piece) for piece in pieces]) == "Yes. "
    assert stream.finish() == ("", [edge_gemma.FunctionCall("light", {"on": True})])
