"""Clients that nobody here wrote, each in an environment of its own, against a running server.

    pytest -m slow tests/test_serve_clients.py

``EDGE_GEMMA_CLIENTS`` names a Python that has the packages; without it they are installed into the
temporary folder, as those of npm are, for which ``EDGE_GEMMA_NODE_CLIENTS`` names the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from serving import serving
from test_serve import make_speech

import edge_gemma
from edge_gemma.options import Sampling

pytestmark = pytest.mark.slow
CLIENTS = Path(__file__).parent / "clients"
PACKAGES = """openai ollama llm langchain-openai langchain-ollama pydantic-ai-slim[openai]
    instructor""".split()
TOKEN = "a-token-of-these-tests"
GREEDY = Sampling(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def python():
    """The interpreter that has the clients."""
    given = os.environ.get("EDGE_GEMMA_CLIENTS")
    if given:
        return given
    folder = Path(tempfile.gettempdir()) / "edge-gemma-clients"
    found = folder / "bin" / "python"
    if not found.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([found, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return str(found)


@pytest.fixture(scope="module")
def node_folder():
    """The folder that has the clients of npm."""
    if not shutil.which("npm"):
        pytest.skip("needs Node.js and npm")
    given = os.environ.get("EDGE_GEMMA_NODE_CLIENTS")
    folder = Path(given or Path(tempfile.gettempdir()) / "edge-gemma-node-clients")
    if not (folder / "node_modules").exists():
        folder.mkdir(exist_ok=True)
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "openai", "ollama"]
        subprocess.run(command, cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture(scope="module")
def ask(python, token_file, tiny_bundle, looking_bundle, hearing_bundle, embedding_bundle):
    """``ask(client, task, which bundle, file)`` → what the client's program prints."""
    bundles = {
        "text": tiny_bundle,
        "sees": looking_bundle.folder,
        "hears": hearing_bundle.folder,
        "embeds": embedding_bundle,
    }
    running, opened = {}, []

    def server(which):
        if which not in running:
            opened.append(serving(bundles[which], "--token-file", str(token_file)))
            running[which] = opened[-1].__enter__()
        return running[which]

    def run(client, task, which="text", *files):
        served = server(which)
        program = [python, str(CLIENTS / f"{client}.py")]
        if client == "node_sdks":
            program = ["node", str(CLIENTS / "node_sdks.mjs")]
        arguments = [task, served.url, served.name, TOKEN, *files]
        done = subprocess.run([*program, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    run.server = server
    yield run
    for each in opened:
        each.__exit__(None, None, None)


def direct(model, *parts):
    """What the library itself answers."""
    with model.chat() as chat:
        return "".join(chunk.text for chunk in chat.send(list(parts), GREEDY))


@pytest.fixture(scope="module")
def hello(tiny_model):
    return direct(tiny_model, "Hello")


@pytest.mark.parametrize("client", ["openai_sdk", "ollama_sdk"])
def test_text(ask, client, hello):
    assert len(set(ask(client, "models")["ids"])) == 1
    assert ask(client, "chat")["text"] == hello
    streamed = ask(client, "stream")
    assert streamed["text"] == hello and (streamed.get("usage") or streamed["eval"]) > 0


@pytest.mark.parametrize("client", ["openai_sdk", "ollama_sdk"])
def test_tools_and_schemas(ask, client):
    assert set(ask(client, "tools")["arguments"]) == {"on"}
    assert set(ask(client, "json_schema")["answer"]) == {"ok"}


def test_ollama_generate(ask, hello):
    assert ask("ollama_sdk", "generate")["text"] == hello


@pytest.mark.parametrize("client", ["openai_sdk", "ollama_sdk"])
def test_pictures(ask, client, cat_png, looking_bundle):
    request = edge_gemma.PlanRequest(n_threads=1)
    with edge_gemma.load(looking_bundle, n_ctx=1024, request=request) as model:
        expected = direct(model, edge_gemma.Image(cat_png), "What?")
    assert ask(client, "image", "sees", str(cat_png))["text"] == expected


def test_speech(ask, hearing_model, sine_wav, tmp_path):
    expected = direct(hearing_model, "What?", edge_gemma.Audio(sine_wav))
    assert ask("openai_sdk", "input_audio", "hears", str(sine_wav))["text"] == expected
    heard = ask("openai_sdk", "transcriptions", "hears", str(make_speech(tmp_path / "speech.wav")))
    assert heard["text"] == heard["deltas"] == heard["done"]
    assert len(heard["segments"]) >= 1 and heard["srt"].startswith("1\n")
    assert heard["duration"] == pytest.approx(6, abs=0.1)


def test_langchain(ask, hello):
    assert set(ask("langchain_sdk", "text").values()) == {hello}
    assert ask("langchain_sdk", "loop")["call"] == "light"
    assert set(ask("langchain_sdk", "structured")) == {"openai", "ollama"}


def test_llm(ask, python, hello, tmp_path):
    """The llm command with an extra model of its own configuration, and a schema."""
    served = ask.server("text")
    model = {
        "model_id": "board",
        "model_name": served.name,
        "api_base": f"{served.url}/v1",
        "api_key_name": "board",
        "supports_schema": True,
        "supports_tools": True,
    }
    # JSON is YAML, too
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
    prompt = [python, "-m", "llm", "-m", "board", "--key", TOKEN, "-o", "temperature", "0"]

    def llm(*more):
        command = [*prompt, "Hello", "-o", "max_tokens", *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert llm("8").strip() == hello.strip()
    assert set(json.loads(llm("90", "--schema", "ok bool"))) == {"ok"}


def test_responses(ask, hello):
    found = ask("openai_sdk", "responses")
    assert set(found["texts"]) == {hello}
    assert set(found["answer"]) == {"ok"} and found["call"] == ["light", ["on"]]
    assert found["second"] in ("completed", "incomplete")


def test_embeddings(ask, embedding_bundle):
    with edge_gemma.load(embedding_bundle) as model:
        expected = model.embed(["a river", "a bridge"])
    openai, ollama = (
        ask("openai_sdk", "embeddings", "embeds"),
        ask("ollama_sdk", "embeddings", "embeds"),
    )
    langchain = ask("langchain_sdk", "embeddings", "embeds")
    found = [openai["vectors"], openai["plain"], ollama["vectors"], *langchain.values()]
    for vectors in found:
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
    np.testing.assert_allclose(ollama["old"], expected[0], atol=1e-6)


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="needs espeak-ng")
def test_texts_are_read_aloud(ask):
    found = ask("openai_sdk", "speech")
    assert found["wav"] == "RIFF" and found["wav_bytes"] > 20_000 and found["mp3_bytes"] > 2_000


def test_keep_alive(ask, hello):
    found = ask("ollama_sdk", "keep_alive")
    assert found["gone"] == ["unload", 0] and found["loaded"] == 1
    assert found["text"] == hello and found["load_s"] > 0


def test_structured_output(ask):
    assert len(ask("structured_sdks", "by_instructor")) == 2
    assert set(ask("structured_sdks", "by_pydantic_ai")) == {"native", "tool"}


def test_node(ask, node_folder, hello, monkeypatch, embedding_bundle):
    monkeypatch.setenv("NODE_CLIENTS", str(node_folder))
    found = ask("node_sdks", "openai")
    assert set(found["texts"]) == {hello} and found["call"] == ["light", ["on"]]
    assert found["refused"] == ["NotFoundError", 404, "model_not_found"]
    found = ask("node_sdks", "ollama")
    assert set(found["texts"]) == {hello} and len(found["listed"]) == 1
    with edge_gemma.load(embedding_bundle) as model:
        expected = model.embed(["a river", "a bridge"])
    for vectors in ask("node_sdks", "embed", "embeds").values():
        np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_errors(ask):
    assert ask("openai_sdk", "errors")["errors"] == [
        ["NotFoundError", "model_not_found"],
        ["BadRequestError", None],
        ["BadRequestError", "context_length_exceeded"],
        ["AuthenticationError", "invalid_api_key"],
    ]
    assert ask("ollama_sdk", "errors")["status"] == 404
