"""The commands as a user types them: what they print, how they end, and what Ctrl-C does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

RUN = [sys.executable, "-c", "from edge_gemma.cli import main; main()"]


def one_thread(arguments) -> list[str]:
    """llama.cpp's threads wait for each other by spinning, which crawls on a machine that does
    something else as well.
    """
    return [*map(str, arguments), *(["-t", "1"] if arguments[0] in ("run", "chat") else [])]


def cli(*arguments, stdin: str | None = None, timeout: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*RUN, *one_thread(arguments)], capture_output=True, text=True, input=stdin, timeout=timeout
    )


def test_run_json_ends_with_one_object(tiny_bundle):
    done = cli("run", tiny_bundle, "hello", "-n", 6, "--seed", 1, "--ctx", 256, "--json")
    result = json.loads(done.stdout)
    assert (
        done.returncode == 0
        and result["finish_reason"] in ("length", "stop")
        and isinstance(result["text"], str)
    )
    assert {"prompt_tokens", "completion_tokens"} <= set(result["usage"])
    assert {"load_s", "ttft_s", "prefill_tok_s", "decode_tok_s"} <= set(result["timings"])
    assert 0 < result["memory"]["peak_pss_bytes"] and 0 < result["memory"]["planned_peak_bytes"]


def test_run_streams_plain_text_and_reads_stdin(tiny_bundle):
    a = cli("run", tiny_bundle, "hello", "-n", 6, "--seed", 1)
    b = cli("run", tiny_bundle, "-", "-n", 6, "--seed", 1, "--stats", stdin="hello\n")
    assert a.returncode == 0 and a.stdout == b.stdout and a.stderr == "" and "tok/s" in b.stderr


def test_plan_json(tiny_bundle):
    done = cli(
        "plan", tiny_bundle, "--device", "pi-5-4gb", "--budget", "2GiB", "--ctx", 1024, "--json"
    )
    plan = json.loads(done.stdout)
    assert (
        done.returncode == 0
        and plan["fits"] is True
        and plan["total_bytes"]
        == max(
            sum(
                i["bytes"] for i in plan["items"] if p in i["phases"] and i["kind"] != "reclaimable"
            )
            for p in ("prefill", "decode")
        )
    )
    assert "in use at the peak" in cli("plan", tiny_bundle, "--device", "pi-zero-2w-512mb").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "{bundle}", "hi", "--budget", "1MiB"], 4, "does not fit"),
        (["plan", "{bundle}", "--budget", "1MiB"], 4, ""),
        (["run", "no-such-bundle", "hi"], 3, "no-such-bundle"),
        (["run", "{bundle}", ""], 2, "empty"),
        (["run", "{bundle}", "hi", "--ctx", "99999999"], 2, "context of 99999999"),
        (["run", "{bundle}", "hi", "--budget", "lots"], 2, "lots"),
        (["run", "{bundle}", "hi", "--schema", "{"], 2, "not JSON"),
        (["run", "{bundle}", "hi", "--schema", '{"uniqueItems":true}'], 2, "uniqueItems"),
        (["run", "{bundle}", "hi", "--temp", "-3"], 2, "temperature"),
        (["run", "{bundle}", "hi", "--image", "cat.png"], 3, "cannot see"),
        (["run", "{bundle}", "hi", "--no-such-option"], 2, "no-such-option"),
        (["run", "{bundle}", "hi", "--device", "pi-9"], 2, "pi-9"),
        (["run", "{bundle}", "hi", "--lora", "absent.gguf"], 2, "absent.gguf"),
        (["run", "{bundle}", "hi", "--logprobs", "2"], 2, "needs --json"),
        (["run", "{bundle}", "hi", "--raw", "--system", "Be brief."], 2, "not both"),
        (["import", "absent.gguf", "out", "--vision-encoder", "f16"], 3, "no GGUF file"),
        (
            ["import", "{bundle}/decoder.gguf", "out", "--vision-encoder", "f16"],
            2,
            "needs --mmproj",
        ),
        (["import", "absent.gguf", "out"], 3, "no GGUF file"),
        (["inspect", "."], 3, "manifest.json"),
    ],
)
def test_mistakes_end_with_a_message_and_their_code(
    tiny_bundle, arguments, code, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    done = cli(*[a.replace("{bundle}", str(tiny_bundle)) for a in arguments])
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_import_inspect_verify(tiny_bundle, tmp_path):
    out = tmp_path / "copy"
    assert (
        cli("import", tiny_bundle / "decoder.gguf", out, "--relayout", "--name", "mine").returncode
        == 0
    )
    assert (
        "mine" in cli("inspect", out).stdout
        and json.loads(cli("inspect", out, "--json").stdout)["name"] == "mine"
    )
    assert cli("verify", out).returncode == 0
    again = cli("import", tiny_bundle / "decoder.gguf", out)
    assert again.returncode == 2 and "exists" in again.stderr
    data = bytearray((out / "decoder.gguf").read_bytes())
    data[-100] ^= 1
    (out / "decoder.gguf").write_bytes(data)
    bad = cli("verify", out)
    assert bad.returncode == 3 and "changed or damaged" in bad.stderr


def test_chat_from_a_pipe(tiny_bundle, tmp_path):
    said = (
        f"hello\n/nonsense\n/stats\n/save {tmp_path / 'talk'}\n/reset\n/load "
        f"{tmp_path / 'talk'}\nmore\n/exit\nnever\n"
    )
    done = cli("chat", tiny_bundle, "-n", 5, "--seed", 1, "--ctx", 512, stdin=said)
    assert (
        done.returncode == 0
        and "base weights" in done.stderr
        and "/nonsense is no command" in done.stderr
    )
    assert (
        "saved to" in done.stderr
        and "taken up from" in done.stderr
        and len(done.stdout.splitlines()) >= 2
    )


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [*RUN, *one_thread(arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_ends_a_run_with_what_it_has(tiny_bundle):
    process = start(
        "run",
        tiny_bundle,
        "hello",
        "-n",
        100000,
        "--seed",
        1,
        "--ctx",
        8192,
        "--grammar",
        "root ::= [a-z ]+",
        "--temp",
        3,
    )
    process.stdout.read(20)  # it is streaming
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def test_ctrl_c_stops_the_answer_and_not_the_chat(tiny_bundle):
    process = start("chat", tiny_bundle, "-n", 100000, "--seed", 1, "--ctx", 8192, "--temp", 3)
    process.stdin.write("hello\n")
    process.stdin.flush()
    process.stdout.read(20)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    out, err = process.communicate("/stats\n/exit\n", timeout=60)
    assert process.returncode == 0 and "cancelled" in err and "Traceback" not in err


def test_ctrl_c_while_loading_leaves_quietly(tiny_bundle, tmp_path):
    code = (
        "import os, signal, threading; from edge_gemma.cli import main; threading.Timer(0.25, "
        "lambda: os.kill(os.getpid(), signal.SIGINT)).start(); main()"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "run",
            str(tiny_bundle),
            "hi",
            "-n",
            "3000",
            "--ctx",
            "8192",
            "-t",
            "1",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (0, 130) and "Traceback" not in done.stderr


def test_two_processes_use_one_bundle(tiny_bundle):
    both = [
        start("run", tiny_bundle, "hello", "-n", 8, "--seed", 1, "--ctx", 256) for _ in range(2)
    ]
    texts = [process.communicate(timeout=120)[0] for process in both]
    assert texts[0] == texts[1] and all(process.returncode == 0 for process in both)


def test_a_bundle_deleted_while_loaded_goes_on(tiny_bundle, tmp_path):
    import edge_gemma

    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with edge_gemma.load(copy, n_ctx=256, request=edge_gemma.PlanRequest(n_threads=1)) as model:
        first = [
            c.text for c in model.generate("abc", edge_gemma.Sampling(temperature=0, max_tokens=5))
        ]
        shutil.rmtree(copy)
        assert [
            c.text for c in model.generate("abc", edge_gemma.Sampling(temperature=0, max_tokens=5))
        ] == first


def test_the_demo_stays_inside_its_budget(sample_gguf, tmp_path, monkeypatch):
    """What the README shows first: real weights in an empty store, and the second run finds them
    there.
    """
    monkeypatch.setenv("EDGE_GEMMA_HOME", str(tmp_path / "store"))
    for again in False, True:
        done = cli("demo", "-n", 4, "-t", 1, "--json")
        result = json.loads(done.stdout)
        assert (
            done.returncode == 0 and ("assembling the sample weights" in done.stderr) is not again
        )
        assert (
            result["usage"]["completion_tokens"] == 4
            and 0 < result["memory"]["peak_pss_bytes"] < 420 * 2**20
        )


def test_shell_completion_is_there():
    # as typer's own tests do: without it the shell is looked for among the parents of this process
    env = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [*RUN, "--show-completion", "bash"], capture_output=True, text=True, env=env
    )
    assert "complete" in done.stdout


def test_completion_knows_bundles_and_boards(tiny_bundle, tmp_path, monkeypatch):
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "my-gemma").symlink_to(tiny_bundle)
    for words, expected in (("run my-", "my-gemma"), ("plan my-gemma -d pi-z", "pi-zero-2w-512mb")):
        env = os.environ | {
            "EDGE_GEMMA_HOME": str(tmp_path),
            "_EDGE_GEMMA_COMPLETE": "complete_bash",
            "COMP_WORDS": f"edge-gemma {words}",
            "COMP_CWORD": str(len(words.split())),
        }
        done = subprocess.run(RUN, capture_output=True, text=True, env=env)
        assert done.stdout.split() == [expected], done.stderr
