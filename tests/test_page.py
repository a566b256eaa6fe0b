"""The page for a browser: the file itself, turns that are spoken piece by piece, and (slow) all of
it in headless Chromium with a fake microphone and a picture.

    pytest -m slow tests/test_page.py        needs Debian's chromium, node and npm
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from serving import serving
from test_serve import make_speech, opened

from edge_gemma.conversation.transcription import ListenOptions, ask
from edge_gemma.options import Sampling
from edge_gemma.serve.guard import BearerTokens

HTML = {"accept": "text/html,application/xhtml+xml"}
PAGE = (resources.files("edge_gemma.serve.page") / "index.html").read_text()


@pytest.fixture(scope="module")
def client(tiny_model):
    yield from opened(tiny_model)


@pytest.fixture(scope="module")
def hearing(hearing_model):
    yield from opened(hearing_model)


def test_a_browser_gets_the_page_and_a_client_the_greeting(client):
    assert client.get("/").text == "Ollama is running"
    page = client.get("/", headers=HTML)
    assert page.text == PAGE and page.headers["content-type"].startswith("text/html")


def test_the_page_brings_everything_and_may_load_nothing(client):
    assert not re.search(
        r"""<[a-z]+[^>]*\s(?:src|href)=|https?://|@import|url\(|innerHTML|eval\(""", PAGE
    )
    assert len(PAGE) < 64 * 1024
    policy = client.get("/", headers=HTML).headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert policy.count("sha256-") == 2


def test_the_page_needs_no_token_and_what_it_asks_for_does(tiny_model, tmp_path):
    path = tmp_path / "tokens"
    path.write_text("a-token-of-this-test\n")
    for client in opened(tiny_model, tokens=BearerTokens.read(path)):
        assert client.get("/", headers=HTML).status_code == 200
        assert client.get("/").status_code == 401
        assert client.get("/page/state", headers=HTML).status_code == 401
        assert client.post("/", headers=HTML).status_code == 401


def test_figures_beside_the_chat(client, tiny_model):
    state = client.get("/page/state").json()
    assert state["model"] == tiny_model.bundle.manifest.name and not state["hears"]
    assert state["planned_bytes"] == tiny_model.plan.total_bytes and state["pss_bytes"] > 0


def test_a_turn_that_is_spoken_in_pieces(hearing, hearing_model, tmp_path):
    """The pieces come up while it is spoken, and the answer is that of the whole clip."""
    soundfile = pytest.importorskip("soundfile")
    samples, _ = soundfile.read(make_speech(tmp_path / "speech.wav"), dtype="int16")
    turn = hearing.post("/page/turns", json={"max_tokens": 6, "temperature": 0}).json()["id"]
    n_rows = 0
    for start in range(0, len(samples), 4000):
        data = samples[start : start + 4000].astype("<i2").tobytes()
        n_rows += hearing.post(f"/page/turns/{turn}/audio", content=data).json()["soft_tokens"]
    assert n_rows > 0
    answer = hearing.post(f"/page/turns/{turn}/answer")
    events = [block[6:] for block in answer.text.strip().split("\n\n")]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event) for event in events[:-1]]
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in pieces if e["choices"])
    clip = samples.astype(np.float32) / 32768
    blocks = [clip[start : start + 4000] for start in range(0, len(clip), 4000)]
    options = ListenOptions(sampling=Sampling(max_tokens=6, temperature=0))
    with hearing_model.chat() as chat:
        expected = "".join(chunk.text for chunk in ask(chat, blocks, "", options))
    assert text == expected
    assert hearing.post(f"/page/turns/{turn}/answer").status_code == 404


def test_turns_and_nonsense(client, hearing):
    refused = client.post("/page/turns", json={})
    assert refused.status_code == 400 and "cannot hear" in refused.json()["error"]["message"]
    turn = hearing.post("/page/turns", json={}).json()["id"]
    assert hearing.post(f"/page/turns/{turn}/audio", content=b"odd").status_code == 400
    assert hearing.post(f"/page/turns/{turn}/audio", content=b"xy" * 500_000).status_code == 400
    assert hearing.post(f"/page/turns/{turn}/answer").status_code == 400
    assert hearing.delete(f"/page/turns/{turn}").status_code == 200
    assert hearing.delete(f"/page/turns/{turn}").status_code == 404
    assert hearing.post("/page/turns", json={"messages": 7}).status_code == 400
    begun = [hearing.post("/page/turns", json={}) for _ in range(20)]
    statuses = {response.status_code for response in begun}
    assert statuses == {200, 429}
    for response in begun:
        if response.status_code == 200:
            hearing.delete(f"/page/turns/{response.json()['id']}")


# --- in a browser ---


@pytest.fixture(scope="module")
def modules():
    """A folder with playwright-core and axe-core."""
    if not (
        shutil.which("node") and Path(os.environ.get("CHROMIUM", "/usr/bin/chromium")).exists()
    ):
        pytest.skip("needs node and Debian's chromium")
    given = os.environ.get("EDGE_GEMMA_NODE")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / "edge-gemma-page"
    if not (folder / "node_modules" / "playwright-core").exists():
        folder.mkdir(exist_ok=True)
        packages = ["npm", "install", "--silent", "playwright-core", "axe-core"]
        subprocess.run(packages, cwd=folder, check=True)
    return folder


@pytest.mark.slow
def test_under_a_prefix(modules, tiny_bundle):
    """With and without a slash behind it, as a proxy may have it."""
    program = """
        const [modules, url] = process.argv.slice(2);
        const { chromium } = require(modules + "/node_modules/playwright-core");
        (async () => {
          const browser = await chromium.launch({ executablePath: "/usr/bin/chromium",
            args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking"] });
          const page = await browser.newPage();
          await page.goto(url);
          await page.waitForFunction(
            () => document.getElementById("model").textContent !== "edge-gemma");
          console.log(await page.textContent("#model"));
          await browser.close();
        })();"""
    with serving(tiny_bundle, "--root-path", "/gemma") as served:
        for address in (f"{served.url}/gemma", f"{served.url}/gemma/"):
            arguments = ["node", "-", str(modules), address]
            done = subprocess.run(
                arguments, input=program, capture_output=True, text=True, timeout=120
            )
            assert done.stdout.strip() == served.name, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["text", "sees", "hears"])
def test_in_chromium(which, modules, tiny_bundle, looking_bundle, hearing_bundle, tmp_path):
    bundles = {"text": tiny_bundle, "sees": looking_bundle.folder, "hears": hearing_bundle.folder}
    from PIL import Image

    Image.new("RGB", (900, 600), "orange").save(tmp_path / "picture.png")
    sound = make_speech(tmp_path / "speech.wav")
    shots = os.environ.get("EDGE_GEMMA_SCREENSHOTS", "none")
    token = "a-token-of-this-test" if which == "text" else "none"
    options = []
    if token != "none":
        (tmp_path / "tokens").write_text(token + "\n")
        options = ["--token-file", str(tmp_path / "tokens")]
    script = Path(__file__).parent / "page_in_chromium.mjs"
    with serving(bundles[which], *options) as served:
        arguments = [modules, served.url, token, tmp_path / "picture.png", shots, sound]
        done = subprocess.run(
            ["node", script, *arguments], capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["model"] == served.name and "planned" in found["memory"]
    # what was typed is text, not HTML
    assert "&lt;img" in found["asked"] and "<strong>there</strong>" in found["asked"]
    assert all(url.startswith((served.url, "blob:", "data:")) for url in found["requests"])
    assert "tokens" in found["chat"] and "tok/s" in found["speed"], found
    assert found["sees"] == (which == "sees") and found["hears"] == (which == "hears")
    if which == "sees":
        assert "tokens" in found["picture"], found
    if which == "hears":
        assert found["pieces"] >= 5, found  # they came up while it was spoken
        assert "tokens" in found["speech"], found
    assert found["stopped"] == "stopped" or "tokens" in found["stopped"], found
    assert found["axe"] == [] and not found["overflow"], found
    faults = [fault for fault in found["faults"] if "401" not in fault]
    assert faults == [], faults
