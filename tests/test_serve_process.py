"""``edge-gemma serve`` as a process: ready, refused, stopped, and what it leaves alone."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from serving import command, serving

from edge_gemma import PlanRequest, plan_bundle
from edge_gemma.units import MiB

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")


def run(*arguments):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_and_ends_with_0_in_the_middle_of_an_answer(tiny_bundle, number):
    with serving(tiny_bundle, "--stop-seconds", "0.05") as server:
        body = {"model": server.name, "messages": [{"role": "user", "content": "Hi"}]}
        schema = {"type": "string", "minLength": 900}  # an answer that takes a while
        body |= {"format": schema, "options": {"num_predict": 900}}
        seen, lines = threading.Event(), []

        def read():
            with httpx.stream("POST", f"{server.url}/api/chat", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    lines.append(json.loads(line))
                    seen.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert seen.wait(30)
        started = time.perf_counter()
        server.process.send_signal(number)
        assert server.process.wait(20) == 0
        assert time.perf_counter() - started < 10
        reader.join(10)
        assert "cut off" in lines[-1]["error"], lines[-1]


def test_what_is_refused_before_the_socket_opens(tiny_bundle, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = run(*command(tiny_bundle, "--port", str(other.getsockname()[1])))
    assert taken.returncode == 7 and "--port" in taken.stderr
    assert "Traceback" not in taken.stderr
    everybody = run(*command(tiny_bundle, "--host", "0.0.0.0"))
    assert everybody.returncode == 2 and "--token-file" in everybody.stderr
    missing = run(*command(tiny_bundle, "--token-file", str(tmp_path / "none")))
    assert missing.returncode == 2 and "token file" in missing.stderr
    request = PlanRequest(n_ctx=1024, n_threads=1, kv_type="q4_0", n_ubatch=32, structured=False)
    budget_bytes = plan_bundle(tiny_bundle, request=request).needed_bytes + MiB
    options = ("--parallel", "64", "--budget", str(budget_bytes), "--kv", "q4_0")
    many = run(*command(tiny_bundle, *options))
    assert many.returncode == 4 and "does not fit" in many.stderr


def test_the_server_costs_nothing_where_it_is_not_used():
    code = (
        "import sys, edge_gemma, edge_gemma.model, edge_gemma.cli.app;"
        "foreign = {'starlette', 'uvicorn', 'wyoming', 'zeroconf', 'edge_gemma.serve'};"
        "print(sorted(foreign & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"
