"""What can be pasted: the programs in examples/ and the blocks of Python in the documentation."""

from __future__ import annotations

import dataclasses
import doctest
import io
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
from test_doctests import user  # noqa: F401  (a fixture: the folder that the examples run in)

import edge_gemma

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MAX_LINES = 40


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Two of llama.cpp's threads wait for each other by spinning, which crawls on a machine that
    does something else as well.
    """
    load = edge_gemma.load

    def load_with_one_thread(bundle, *, request=edge_gemma.PlanRequest(), **options):  # noqa: B008
        return load(bundle, request=dataclasses.replace(request, n_threads=1), **options)

    monkeypatch.setattr(edge_gemma, "load", load_with_one_thread)


def run(name: str, *arguments) -> None:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"](*map(str, arguments))


def test_every_example_is_short_and_run_here():
    """And opens the front door only."""
    tested = set(re.findall(r'^    run\("(\w+)"', Path(__file__).read_text(), re.MULTILINE))
    # no programs: a file for --tools, run in test_cli_tools.py, and one for an assistant's hooks,
    # run in test_cli_assistant.py
    tested |= {"kitchen_tools", "assistant_led_button"}
    programs = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    assert set(programs) == tested
    for name, text in programs.items():
        assert len(text.splitlines()) <= MAX_LINES, name
        imported = re.findall(r"^from edge_gemma import (.*)$", text, re.MULTILINE)
        names = {part.strip() for line in imported for part in line.split(",")}
        assert names <= {*edge_gemma.__all__, "errors"}, name
        assert "edge_gemma." not in "".join(re.findall(r"^(?:from|import) .*$", text, re.M)), name


def test_chat(tiny_bundle, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand again\n"))
    run("chat", tiny_bundle)
    assert capsys.readouterr().out.count("\n> ") == 2


def test_plan_then_load(tiny_bundle, capsys):
    run("plan_then_load", tiny_bundle, "1GiB")
    assert capsys.readouterr().out.endswith("with 8192 tokens of context\nloaded, with 1 threads\n")
    with pytest.raises(edge_gemma.errors.PlanRefused):
        run("plan_then_load", tiny_bundle, "20MiB")
    refused = capsys.readouterr().out.splitlines()
    assert len(refused) == 4 and refused[0].startswith("8192 tokens of context need ")


def test_hear_a_file(hearing_bundle, tmp_path, capsys):
    import numpy as np
    import soundfile

    from edge_gemma.conversation.voice import espeak

    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed (make system)")
    samples, rate_hz = espeak("en")("One sentence.")
    silence = np.zeros(rate_hz, np.float32)
    soundfile.write(tmp_path / "said.wav", np.concatenate([silence, samples, silence]), rate_hz)
    run("hear_microphone", hearing_bundle.folder, tmp_path / "said.wav")
    said = r"\(\d+\.\d\d s from your last word to the first of the answer\)"
    assert re.search(said, capsys.readouterr().out)


def test_describe_picture(looking_bundle, cat_png, capsys):
    run("describe_picture", looking_bundle.folder, cat_png, cat_png, "Are they the same?")
    assert capsys.readouterr().out.endswith("\n")


def test_function_call(tiny_bundle, capsys):
    run("function_call", tiny_bundle, "What time is it in Rome?")
    assert re.match(r"time_in\(\{'zone': '\w+/\w+'\}\) = \d\d:\d\d\n", capsys.readouterr().out)


def test_serve_in_python(tiny_bundle, capsys):
    run("serve_in_python", tiny_bundle, "One?", "Two?", "Three?")
    out = capsys.readouterr().out
    assert all(f"{question}\n  " in out for question in ("One?", "Two?", "Three?"))
    assert "n_answered=3, n_failed=0" in out


def test_measure_a_board(tiny_bundle, capsys):
    run("measure_a_board", tiny_bundle)
    figures = json.loads(capsys.readouterr().out)
    assert figures["prefill_tok_s"] > 0 and figures["peak_rss_mib"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the training libraries' own
@pytest.mark.compat(
    kind="adapter",
    what="LoRA trained by peft and trl (examples/finetune_lora.py)",
    happens="converts, runs with --lora and says what was taught; merged: PEFT's own logits",
)
def test_finetune_lora(tmp_path, capfd, monkeypatch):
    """Train on a small replica of gemma-3-270m-it, convert, run; then hold the decoder's logits
    against PEFT's.
    """
    for library in ("torch", "transformers", "peft", "trl"):
        reason = f"the fine-tuning example needs {library} (pip install torch peft trl)"
        pytest.importorskip(library, reason=reason)
    from peft_models import logits_here, logits_of_peft
    from replicas import LAYOUTS

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    checkpoint = tmp_path / "gemma-3-270m-it"
    LAYOUTS["g270m_it"][2](checkpoint)
    run("finetune_lora", checkpoint, tmp_path, 20)
    assert capfd.readouterr().out.endswith("It is Paris.\n")
    adapter = tmp_path / "adapter"
    expected, plain = logits_of_peft(checkpoint, adapter), logits_of_peft(checkpoint, None)
    assert abs(expected - plain).max() > 1  # it learnt something
    by_file, by_merge = logits_here(checkpoint, adapter, tmp_path)
    assert abs(by_file - expected).max() < 0.02 and abs(by_merge - expected).max() < 0.02


def blocks() -> list:
    found = []
    for path in (ROOT / "docs" / "api.md", ROOT / "README.md"):
        for match in BLOCK.finditer(path.read_text()):
            line = path.read_text()[: match.start(1)].count("\n")
            found.append(pytest.param(path, line, match[1], id=f"{path.name}:{line}"))
    return found


@pytest.mark.parametrize(("path", "line", "code"), blocks())
def test_the_documentation_runs(path, line, code, user, capsys):  # noqa: F811
    """Pasted into an empty Python, each block prints what its ``# →`` comments say, in order."""
    user(doctest.DocTest([], {}, path.name, str(path), line, code))
    exec(compile("\n" * line + code, str(path), "exec"), {"__name__": "__main__"})
    out, position = capsys.readouterr().out, 0
    for expected in re.findall(r"# → (.*)$", code, re.MULTILINE):
        position = out.find(expected, position)
        assert position >= 0, f"{expected!r} is not in its place in {out!r}"
        position += len(expected)


def test_every_public_name_has_an_example():
    code = "\n".join(BLOCK.findall((ROOT / "docs" / "api.md").read_text()))
    imported = re.findall(r"^from edge_gemma import (.*)$", code, re.MULTILINE)
    names = {part.strip() for line in imported for part in line.split(",")} | {"Model", "load"}
    assert set(edge_gemma.__all__) - names == set()
