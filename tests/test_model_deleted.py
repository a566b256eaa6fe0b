"""A bundle that is deleted while it is served."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request

from serving import serving


def ask(served, **body):
    """(status, last line) of /api/chat."""
    body = {
        "model": served.name,
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": False,
        "options": {"num_predict": 4},
    } | body
    request = urllib.request.Request(f"{served.url}/api/chat", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_what_is_loaded_goes_on_and_what_is_gone_is_said(tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with serving(bundle) as served:
        assert ask(served)[0] == 200
        shutil.rmtree(bundle)
        assert ask(served)[0] == 200  # the file is mapped: its pages are there until it is closed
        assert ask(served, messages=[], keep_alive=0)[0] == 200  # unload
        for _ in range(2):
            status, answer = ask(served)
            assert status == 500 and "bundle" in answer["error"], answer
        with urllib.request.urlopen(f"{served.url}/health", timeout=10) as response:
            assert json.loads(response.read())["live"]
