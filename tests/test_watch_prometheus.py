"""A real Prometheus scrapes a server, promtool reads what it scrapes, and every expression of the
dashboard is one that it evaluates. Needs Debian's package ``prometheus``.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from serving import serving

httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.slow
DASHBOARD = Path(__file__).parent.parent / "packaging/grafana/edge-gemma.json"
CONFIG = """
global:
  scrape_interval: 1s
scrape_configs:
  - job_name: edge-gemma
    authorization:
      credentials: {token}
    static_configs:
      - targets: ["{target}"]
"""


@pytest.fixture(scope="module")
def server(tiny_bundle, tmp_path_factory):
    if shutil.which("prometheus") is None or shutil.which("promtool") is None:
        pytest.skip("apt install prometheus")
    folder = tmp_path_factory.mktemp("watch")
    (folder / "tokens").write_text("a-long-token\n")
    (folder / "watch.toml").write_text("every_seconds = 0.2\n[quality]\nevery = 1\n")
    options = ("--token-file", str(folder / "tokens"), "--watch", str(folder / "watch.toml"))
    with serving(tiny_bundle, *options) as served:
        with httpx.Client(
            base_url=served.url, headers={"authorization": "Bearer a-long-token"}, timeout=60
        ) as client:
            body = {"model": served.name, "max_tokens": 8, "temperature": 0}
            body["messages"] = [{"role": "user", "content": "Hello"}]
            for _ in range(3):
                assert client.post("/v1/chat/completions", json=body).status_code == 200
            yield client


def test_promtool_finds_nothing_to_complain_about(server):
    text = server.get("/metrics").text
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout + checked.stderr == ""


@pytest.mark.compat(
    kind="client",
    what="Prometheus 2.42 (Debian): scrape with a token; promtool check metrics",
    happens="every metric is taken; the dashboard's expressions are evaluated",
)
def test_prometheus_scrapes(server, tmp_path):
    token = server.headers["authorization"].split()[1]
    config = tmp_path / "prometheus.yml"
    config.write_text(CONFIG.format(token=token, target=server.base_url.netloc.decode()))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    arguments = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data"]
    arguments += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def query(expression):
        url = f"http://127.0.0.1:{port}/api/v1/query"
        try:
            response = httpx.get(url, params={"query": expression}, timeout=10)
        except httpx.TransportError:
            return []
        if response.status_code == 503:  # not ready yet
            return []
        answer = response.json()
        assert answer["status"] == "success", (expression, answer)
        return answer["data"]["result"]

    def value(expression):
        for _ in range(300):
            found = query(expression)
            if found:
                return float(found[0]["value"][1])
            time.sleep(0.2)
        raise AssertionError(f"{expression} has no value")

    try:
        assert value('up{job="edge-gemma"} == 1') == 1
        assert value("edge_gemma_http_requests_total") >= 1
        assert value("gen_ai_server_time_to_first_token_seconds_count") == 3
        assert value("edge_gemma_memory_planned_bytes") > 1e6
        for panel in json.loads(DASHBOARD.read_text())["panels"]:
            for target in panel["targets"]:
                query(target["expr"].replace("$__rate_interval", "1m"))
    finally:
        process.terminate()
        process.wait(30)
