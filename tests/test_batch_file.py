"""``edge-gemma batch``: OpenAI's batch lines, answered without a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_serve import HELLO

from edge_gemma.bundles.folder import Bundle
from edge_gemma.errors import UsageError
from edge_gemma.serve.batch import answered, read_lines


def line(custom_id, url="/v1/chat/completions", **body):
    defaults = {"model": "any", "messages": HELLO, "max_tokens": 4, "temperature": 0}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": defaults | body}


def write(path, lines):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def command(bundle, *arguments):
    given = [str(argument) for argument in arguments]
    options = ["--bundle", str(bundle), "--ctx", "256", "--threads", "1"]
    return [sys.executable, "-m", "edge_gemma", "batch", *given, *options]


def run(bundle, *arguments):
    return subprocess.run(command(bundle, *arguments), capture_output=True, text=True, timeout=120)


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_answers_by_custom_id(tiny_bundle, tmp_path):
    lines = [
        line("b-10"),
        line("b-9", max_tokens=-3),
        {**line("a", url="/v1/completions", prompt="abc")},
        line("c", url="/v1/responses", input="Hello", max_output_tokens=3),
        line("d", url="/v1/embeddings", input="Hello"),
    ]
    out = tmp_path / "out.jsonl"
    done = run(tiny_bundle, write(tmp_path / "in.jsonl", lines), out, "--parallel", "2")
    assert done.returncode == 0, done.stderr
    assert "5 answers, 2 of them errors" in done.stdout
    answers = read(out)
    assert [entry["custom_id"] for entry in answers] == ["a", "b-9", "b-10", "c", "d"]
    statuses = [entry["response"]["status_code"] for entry in answers]
    assert statuses == [200, 400, 200, 200, 400]
    chat = answers[2]["response"]["body"]
    assert chat["object"] == "chat.completion" and chat["usage"]["completion_tokens"] == 4
    assert chat["model"] == Bundle.open(tiny_bundle).manifest.name
    assert "max_tokens" in answers[1]["response"]["body"]["error"]["message"]
    assert all(entry["error"] is None for entry in answers)


def test_what_is_there_is_not_done_again(tiny_bundle, tmp_path):
    lines = [line(f"r-{i}") for i in range(4)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert run(tiny_bundle, source, out).returncode == 0
    whole = read(out)
    # as if it was killed while the third was written
    out.write_text(json.dumps(whole[0]) + "\n" + json.dumps(whole[1]) + "\n" + '{"id": "batch_r')
    again = run(tiny_bundle, source, out)
    assert again.returncode == 0 and "2 answers already; 2 are left" in again.stderr
    after = read(out)
    assert after[:2] == whole[:2]  # to the id of the answer

    def texts(answers):
        return [entry["response"]["body"]["choices"] for entry in answers]

    assert texts(after) == texts(whole)


@pytest.mark.slow
def test_kill_minus_nine_loses_only_what_was_running(tiny_bundle, tmp_path):
    lines = [line(f"r-{i}", max_tokens=40) for i in range(40)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    for _ in range(3):
        process = subprocess.Popen(command(tiny_bundle, source, out), stderr=subprocess.DEVNULL)
        n_before = len(answered(out)) if out.exists() else 0
        while process.poll() is None and (not out.exists() or len(answered(out)) < n_before + 3):
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(answered(out)) >= n_before + 3
    assert run(tiny_bundle, source, out).returncode == 0
    assert [entry["custom_id"] for entry in read(out)] == [f"r-{i}" for i in range(40)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no request"),
        ("not json\n", "line 1"),
        ('{"custom_id": "a"}\n', "line 1"),
        (json.dumps(line("a")) + "\n" + json.dumps(line("a")) + "\n", "comes twice"),
        (json.dumps(line("a", url="/v1/files")) + "\n", "/v1/files"),
        (json.dumps(line("a", stream=True)) + "\n", "whole answers"),
        ("[" * 100_000 + "\n", "line 1"),
        ("\xff\xfe\n", "line 1"),
    ],
)
def test_what_is_no_batch(tmp_path, text, said):
    path = tmp_path / "in.jsonl"
    path.write_text(text, "latin-1")
    with pytest.raises(UsageError, match=said):
        read_lines(path)


def test_an_output_that_is_something_else_is_kept(tiny_bundle, tmp_path):
    out = tmp_path / "letter.txt"
    out.write_text("Dear Sir\n")
    done = run(tiny_bundle, write(tmp_path / "in.jsonl", [line("a")]), out)
    assert done.returncode == 2 and "no output of a batch" in done.stderr
    assert out.read_text() == "Dear Sir\n"


def test_lines_for_several_models_need_a_bundle(tmp_path):
    lines = [line("a", model="x"), line("b", model="y")]
    source = write(tmp_path / "in.jsonl", lines)
    arguments = [sys.executable, "-m", "edge_gemma", "batch", str(source), str(tmp_path / "o")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 2 and "say --bundle" in done.stderr
