"""/v1/responses, embeddings by both protocols, and texts read aloud."""

from __future__ import annotations

import base64
import io
import json
import shutil

import numpy as np
import pytest
from test_serve import ANSWER, LIGHT, opened

import edge_gemma
from edge_gemma.prompts.calls import tool_schema

needs_voice = pytest.mark.skipif(not shutil.which("espeak-ng"), reason="needs espeak-ng")


@pytest.fixture(scope="module")
def client(tiny_model):
    yield from opened(tiny_model)


@pytest.fixture(scope="module")
def name(tiny_model):
    return tiny_model.bundle.manifest.name


@pytest.fixture(scope="module")
def respond(client, name):
    def post(**body):
        defaults = {"model": name, "input": "Hello", "max_output_tokens": 8, "temperature": 0}
        return client.post("/v1/responses", json=defaults | body)

    return post


def events(response):
    """[(kind, data)] of an event stream."""
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_response_is_what_chat_answers(respond, client, name):
    chat = client.post(
        "/v1/chat/completions",
        json={
            "model": name,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 8,
            "temperature": 0,
        },
    ).json()
    answer = respond().json()
    text = chat["choices"][0]["message"]["content"]
    assert answer["object"] == "response" and answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["content"][0]["text"] == text
    assert answer["usage"]["output_tokens"] == 8
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_events_build_the_same_response(respond):
    found = events(respond(stream=True))
    kinds = [kind for kind, _ in found]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] == "response.incomplete"
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
    text = "".join(data["delta"] for kind, data in found if kind == "response.output_text.delta")
    last = found[-1][1]["response"]
    assert last["output"][0]["content"][0]["text"] == text
    assert text == respond().json()["output"][0]["content"][0]["text"]


def test_items_of_a_whole_conversation(respond):
    call = {"type": "function_call", "call_id": "c1", "name": "light", "arguments": '{"on": true}'}
    items = [
        {"role": "developer", "content": "Be short."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "On!"}]},
        call,
        {"type": "function_call_output", "call_id": "c1", "output": "done"},
        {"type": "reasoning", "summary": []},
    ]
    assert respond(input=items, instructions="Speak English.").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_tool_is_called(respond, stream):
    tool = {"type": "function", **LIGHT["function"], "strict": True}
    found = respond(
        tools=[tool], tool_choice="required", max_output_tokens=64, stream=stream, input="Light on"
    )
    answer = events(found)[-1][1]["response"] if stream else found.json()
    item = answer["output"][-1]
    assert item["type"] == "function_call" and item["name"] == "light"
    assert isinstance(json.loads(item["arguments"])["on"], bool)
    assert tool_schema([LIGHT])


def test_a_schema_holds(respond):
    wanted = {"format": {"type": "json_schema", "name": "answer", "schema": ANSWER, "strict": True}}
    answer = respond(text=wanted, max_output_tokens=64).json()
    assert set(json.loads(answer["output"][0]["content"][0]["text"])) == {"ok"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"previous_response_id": "resp_1"}, "nothing is kept here"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input_file"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "wizard"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"text": {"format": {"type": "xml"}}}, "xml"),
        ({"input": 7}, "input"),
        ({"model": "gpt-9"}, "gpt-9"),
    ],
)
def test_what_cannot_be_done_is_said(respond, body, said):
    refused = respond(**body)
    assert refused.status_code in (400, 404)
    assert said in refused.json()["error"]["message"]


def test_tools_beside_a_schema(client, name):
    """The answer is a call or as the schema says, and nothing else."""
    seen = set()
    for seed in range(12):
        body = {
            "model": name,
            "messages": [{"role": "user", "content": "Light on, or an answer?"}],
            "tools": [LIGHT],
            "response_format": {"type": "json_schema", "json_schema": {"schema": ANSWER}},
            "max_tokens": 64,
            "temperature": 2.0,
            "seed": seed,
        }
        message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        if message.get("tool_calls"):
            assert isinstance(
                json.loads(message["tool_calls"][0]["function"]["arguments"])["on"], bool
            )
            seen.add("call")
        else:
            assert set(json.loads(message["content"])) == {"ok"}
            seen.add("answer")
    assert seen == {"call", "answer"}


# --- embeddings ---


@pytest.fixture(scope="module")
def embedding_model(embedding_bundle):
    with edge_gemma.load(embedding_bundle) as model:
        yield model


@pytest.fixture(scope="module")
def embedder(embedding_model):
    yield from opened(embedding_model)


def test_vectors_are_the_models_own(embedder, embedding_model):
    texts = ["a river", "a bridge"]
    name = embedding_model.bundle.manifest.name
    expected = embedding_model.embed(texts)
    answer = embedder.post("/v1/embeddings", json={"model": name, "input": texts}).json()
    got = np.array([entry["embedding"] for entry in answer["data"]], np.float32)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert answer["usage"]["total_tokens"] > 0
    packed = embedder.post(
        "/v1/embeddings", json={"model": name, "input": texts[0], "encoding_format": "base64"}
    ).json()
    decoded = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, expected[0], atol=1e-6)
    ollama = embedder.post("/api/embed", json={"model": name, "input": texts}).json()
    np.testing.assert_allclose(ollama["embeddings"], expected, atol=1e-6)
    old = embedder.post("/api/embeddings", json={"model": name, "prompt": texts[1]}).json()
    np.testing.assert_allclose(old["embedding"], expected[1], atol=1e-6)


def test_an_embedding_server_says_what_it_is(embedder, embedding_model):
    name = embedding_model.bundle.manifest.name
    assert embedder.get("/api/tags").json()["models"][0]["capabilities"] == ["embedding"]
    assert embedder.get("/health").json()["ready"]
    chat = {"model": name, "messages": [{"role": "user", "content": "hi"}]}
    refused = embedder.post("/v1/chat/completions", json=chat)
    assert refused.status_code == 400 and "embeds texts" in refused.json()["error"]["message"]
    # what is empty asks Ollama to load the model, which is loaded
    assert embedder.post("/api/embed", json={"model": name, "input": []}).json()["embeddings"] == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input": [[1, 2, 3]]}, "OpenAI's tokenizer"),
        ({"input": [1, 2, 3]}, "OpenAI's tokenizer"),
        ({"input": []}, "0 texts"),
        ({"input": "x", "dimensions": 7}, "dimensions is 7"),
        ({"input": "x", "encoding_format": "roman"}, "encoding_format"),
        ({"input": "river " * 5000}, "fit"),
        ({"input": {"x": 1}}, "input"),
    ],
)
def test_nonsense_to_embed(embedder, embedding_model, body, said):
    name = embedding_model.bundle.manifest.name
    refused = embedder.post("/v1/embeddings", json={"model": name} | body)
    assert refused.status_code == 400 and said in refused.json()["error"]["message"]


def test_a_bundle_that_generates_embeds_nothing(client, name):
    refused = client.post("/v1/embeddings", json={"model": name, "input": "x"})
    assert refused.status_code == 400 and "cannot embed" in refused.json()["error"]["message"]
    refused = client.post("/api/embed", json={"model": name, "input": "x"})
    assert refused.status_code == 400 and "cannot embed" in refused.json()["error"]


# --- texts read aloud ---


@needs_voice
@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "opus"])
def test_a_text_is_read_aloud(client, kind):
    soundfile = pytest.importorskip("soundfile")
    body = {"model": "tts-1", "input": "Good morning. It rains.", "voice": "alloy"}
    answer = client.post("/v1/audio/speech", json=body | {"response_format": kind})
    assert answer.status_code == 200, answer.text
    samples, rate_hz = soundfile.read(io.BytesIO(answer.content))
    assert rate_hz in (24_000, 48_000) and 0.8 < len(samples) / rate_hz < 6
    assert np.abs(samples).max() > 0.05


@needs_voice
def test_pieces_of_sound_come_as_events(client):
    body = {"model": "x", "input": "One. Two.", "response_format": "pcm"}
    whole = client.post("/v1/audio/speech", json=body).content
    answer = client.post("/v1/audio/speech", json=body | {"stream_format": "sse"})
    found = [json.loads(block[6:]) for block in answer.text.strip().split("\n\n")]
    assert found[-1]["type"] == "speech.audio.done"
    pieces = b"".join(base64.b64decode(e["audio"]) for e in found[:-1])
    assert pieces == whole
    fast = client.post("/v1/audio/speech", json=body | {"speed": 2.0}).content
    assert len(fast) < 0.8 * len(whole)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"input": ""}, "0 characters"),
        ({"input": "x" * 5000}, "5000 characters"),
        ({"voice": "-f /etc/passwd"}, "voice"),
        ({"voice": "../x"}, "voice"),
        ({"response_format": "aac"}, "aac"),
        ({"speed": 9}, "speed"),
        ({"response_format": "flac", "stream_format": "sse"}, "flac"),
    ],
)
@needs_voice
def test_what_cannot_be_read_aloud(client, body, said):
    refused = client.post("/v1/audio/speech", json={"model": "x", "input": "x"} | body)
    assert refused.status_code == 400 and said in refused.json()["error"]["message"]


@needs_voice
def test_a_voice_that_is_not_there(client):
    body = {"model": "x", "input": "x", "voice": "klingonese", "response_format": "wav"}
    refused = client.post("/v1/audio/speech", json=body)
    assert refused.status_code in (400, 500) and "espeak" in refused.json()["error"]["message"]
