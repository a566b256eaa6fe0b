"""Two servers behind LiteLLM's proxy, one killed in the middle (slow).

    pytest -m slow tests/test_serve_failover.py

``EDGE_GEMMA_LITELLM`` names the ``litellm`` program; without it it is installed into the temporary
folder (some minutes).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from serving import serving

pytestmark = pytest.mark.slow
KEY = "sk-a-key-of-this-test"
CONFIG = """
model_list:
{models}
router_settings: {{routing_strategy: simple-shuffle, num_retries: 2, allowed_fails: 1,
  cooldown_time: 30, timeout: 60}}
general_settings: {{master_key: {key}}}
"""
MODEL = """  - model_name: gemma
    litellm_params: {{model: "hosted_vllm/{name}", api_base: "{url}/v1", api_key: none}}
"""


@pytest.fixture(scope="module")
def litellm():
    if given := os.environ.get("EDGE_GEMMA_LITELLM"):
        return given
    folder = Path(tempfile.gettempdir()) / "edge-gemma-litellm"
    program = folder / "bin" / "litellm"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = folder / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", "litellm[proxy]"], check=True)
    return str(program)


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def ask(port, n):
    """The HTTP status of one answer through the proxy."""
    body = {"model": "gemma", "messages": [{"role": "user", "content": f"Hello {n}"}]}
    body |= {"max_tokens": 8, "temperature": 0}
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status if json.load(response)["choices"] else 0
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


@contextlib.contextmanager
def proxy(program, config):
    port = free_port()
    command = [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    log = config.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            address = f"http://127.0.0.1:{port}/health/liveliness"
            for _ in range(240):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(address, timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield port
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.compat(
    kind="client",
    what="LiteLLM's proxy over two servers, one killed",
    happens="nothing is lost but what ran there",
)
def test_one_of_two_is_killed(litellm, tiny_bundle, tmp_path):
    with serving(tiny_bundle) as first, serving(tiny_bundle) as second:
        models = "".join(MODEL.format(name=s.name, url=s.url) for s in (first, second))
        (tmp_path / "config.yaml").write_text(CONFIG.format(models=models, key=KEY))
        with proxy(litellm, tmp_path / "config.yaml") as port:
            assert ask(port, 0) == 200
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                asked = [pool.submit(ask, port, n) for n in range(1, 31)]
                while sum(each.done() for each in asked) < 8:
                    time.sleep(0.01)
                first.process.send_signal(signal.SIGKILL)
                statuses = [each.result() for each in asked]
    # two at a time: at most what ran on the one that was killed, and retries save even that
    assert sum(status != 200 for status in statuses) <= 2, statuses
