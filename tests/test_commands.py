"""Every command alike: help, --debug, --json, and options that mean the same everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest
import typer
from typer.testing import CliRunner

import edge_gemma
from edge_gemma.cli import main
from edge_gemma.cli.app import app
from edge_gemma.errors import BundleError, EdgeGemmaError

WITHOUT_JSON = {"chat", "bench report", "serve"}  # for people, a file, and a socket


def commands(tree=None, above: str = "") -> dict:
    """Every command by its words, like "bench memory"."""
    found = {}
    for name, command in (tree or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, f"{above}{name} ")
        else:
            found[above + name] = command
    return found


COMMANDS = commands()


def options(command) -> list:
    return [parameter for parameter in command.params if parameter.param_type_name == "option"]


def names(command) -> set[str]:
    return {name for option in options(command) for name in option.opts}


@pytest.fixture
def run(capsys):
    def run(*arguments):
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_purpose(name):
    """The first sentence of what a command is for, and an explanation of every option."""
    done = CliRunner().invoke(app, [*name.split(), "--help"])
    purpose = COMMANDS[name].help.split(".")[0].split()
    assert done.exit_code == 0 and " ".join(purpose) in " ".join(done.stdout.split())
    assert [option.opts for option in options(COMMANDS[name]) if not option.help] == []


def test_the_lists_of_commands_cut_no_purpose_short():
    """80 columns, as a terminal has over ssh."""
    for arguments in (["--help"], ["bench", "--help"]):
        shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"}).stdout
        listed = shown.partition("Commands:")[2].splitlines()
        assert len(listed) > 5 and max(map(len, listed)) <= 80
        assert [line for line in listed if line.endswith("...")] == []


def test_help_loads_no_library():
    """What makes a start slow on a board is loaded by the command that needs it."""
    code = (
        "import sys; from edge_gemma.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "slow = {'numpy', 'llama_cpp', 'onnxruntime', 'huggingface_hub', 'jinja2', 'PIL', 'av',"
        " 'msgspec', 'psutil', 'rich', 'sounddevice', 'matplotlib', 'gguf', 'onnx',"
        " 'edge_gemma.model', 'edge_gemma.convert', 'edge_gemma.benchmarks'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {slow}' if slow else 0)"
    )
    for arguments in (["--help"], ["run", "--help"], ["bench", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, (arguments, done.stderr)


def test_an_option_means_the_same_in_every_command():
    """One explanation and one short name for each long name."""
    meanings: dict[str, dict] = defaultdict(lambda: defaultdict(list))
    for name, command in COMMANDS.items():
        for option in options(command):
            for long_name in (opt for opt in option.opts if opt.startswith("--")):
                meaning = (*option.opts, *option.secondary_opts, option.help)
                meanings[long_name][meaning].append(name)
    assert {name: dict(found) for name, found in meanings.items() if len(found) > 1} == {}


def test_every_command_for_scripts_has_json():
    assert {name for name, command in COMMANDS.items() if "--json" not in names(command)} == (
        WITHOUT_JSON
    )


def test_every_command_takes_debug():
    assert [name for name, command in COMMANDS.items() if "--debug" not in names(command)] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--debug", "inspect", "no-such-bundle"],
        ["inspect", "--debug", "no-such-bundle"],
        ["inspect", "no-such-bundle", "--debug"],
    ],
)
def test_debug_before_or_behind_the_command(arguments):
    with pytest.raises(BundleError, match="no-such-bundle"):
        main(arguments)


def test_debug_between_a_group_and_its_command():
    with pytest.raises(EdgeGemmaError, match="absent.json"):
        main(["bench", "--debug", "diff", "absent.json", "absent.json"])


def test_debug_by_the_environment_and_where_errors_are_raised(run, monkeypatch):
    assert run("inspect", "no-such-bundle")[0] == 3
    assert run("pull", "not a reference")[0] == 2
    assert run("bench", "diff", "absent.json", "absent.json")[0] in (1, 2)
    monkeypatch.setenv("EDGE_GEMMA_DEBUG", "1")
    for arguments in (
        ["inspect", "no-such-bundle"],
        ["pull", "not a reference"],
        ["bench", "diff", "absent.json", "absent.json"],
    ):
        with pytest.raises(EdgeGemmaError):
            main(arguments)


def test_debug_as_the_value_of_another_option_is_a_value(run):
    """--system takes the next word, whatever it is; the error stays one line."""
    code, _, err = run("run", "no-such-bundle", "hi", "--system", "--debug")
    assert code == 3 and "Traceback" not in err


def test_version_and_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "edge_gemma", "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert (done.returncode, done.stdout) == (0, f"edge-gemma {edge_gemma.__version__}\n")
    wrong = subprocess.run(
        [sys.executable, "-m", "edge_gemma", "pul"], capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "Usage: edge-gemma" in wrong.stderr


def test_json_is_json(run, tiny_bundle, tiny_checkpoint, embedding_bundle, tmp_path, monkeypatch):
    """One value on stdout and nothing else there, from the commands that take no time."""
    monkeypatch.setenv("EDGE_GEMMA_HOME", str(tmp_path / "store"))
    gguf = tiny_bundle / "decoder.gguf"
    for arguments in (
        ["ls"],
        ["doctor"],
        ["profiles"],
        ["profiles", "pi-5-4gb"],
        ["profiles", "auto"],
        ["devices"],
        ["plan", tiny_bundle],
        ["inspect", tiny_bundle],
        ["verify", tiny_bundle],
        ["embed", embedding_bundle, "a text", "--ctx", 128],
        ["import", gguf, tmp_path / "imported"],
        ["convert", tiny_checkpoint, tmp_path / "converted", "--dry-run"],
        ["bench", "memory", tiny_bundle, "--plan-only", "-d", "pi-5-4gb"],
        ["rm", "--unfinished"],
        ["assistant", "init", tmp_path / "assistant"],
    ):
        code, out, err = run(*arguments, "--json")
        assert code == 0, (arguments, err)
        assert json.loads(out) is not None, arguments


def test_scales_behind_a_path(tmp_path):
    from edge_gemma.cli.common import parse_scaled
    from edge_gemma.errors import UsageError

    there = tmp_path / "adapter:2"
    there.touch()
    assert parse_scaled(str(there), "--lora") == (there, 1.0)
    assert parse_scaled(f"{there}:0.25", "--lora") == (there, 0.25)
    for wrong in ("a.gguf:half", "a.gguf:nan", "a.gguf:inf", "a.gguf:"):
        with pytest.raises(UsageError, match="cannot read --lora.*PATH:0.5"):
            parse_scaled(wrong, "--lora")


def test_figures_that_json_does_not_know(capsys):
    from edge_gemma.cli.common import print_json

    print_json({"ppl": float("nan"), "rate": [1.5, float("inf")], 3: "é"})
    assert capsys.readouterr().out == '{"ppl": null, "rate": [1.5, null], "3": "é"}\n'


def test_progress_off_a_terminal_is_plain_lines(capsys, monkeypatch):
    from edge_gemma.cli.common import Progress

    with Progress() as progress:
        assert not progress.started
        progress.stage("reading", total_bytes=4 << 20)
        progress.add_bytes(1 << 20)  # too early for a line
        monkeypatch.setattr(Progress, "LINE_EVERY_S", 0.0)
        progress.stage("writing", total_bytes=4 << 20)
        progress.add_bytes(1 << 20)
        progress.add_bytes(3 << 20)
        progress.note("a note")
        progress.bytes("checking", 1 << 20, 4 << 20)
        progress.stage("counting")
        progress.steps(2, 3)
    assert progress.started
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "reading",
        "writing",
        "writing: 1.0 MiB of 4.0 MiB",
        "writing: 4.0 MiB of 4.0 MiB",
        "a note",
        "checking",
        "checking: 1.0 MiB of 4.0 MiB",
        "counting",
        "counting: 2 of 3",
    ]


def test_progress_on_a_terminal_is_a_bar_that_goes_away():
    """In a pseudo-terminal of its own: what was drawn, and that the cursor is shown again."""
    import pty

    code = (
        "import time; from edge_gemma.cli.common import Progress\n"
        "with Progress('reading [file]', total_bytes=4 << 20) as progress:\n"
        "    progress.add_bytes(1 << 20); time.sleep(0.3)\n"
        "    progress.note('a [note]')\n"
        "    progress.stage('counting'); progress.steps(2, 3); time.sleep(0.3)\n"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    drawn = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        drawn += piece
    os.close(ours)
    assert process.wait(30) == 0
    text = drawn.decode()
    for shown in ("reading [file]", "1.0 MiB of 4.0 MiB", "a [note]", "counting", "2 of 3"):
        assert shown in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0


def test_ctrl_c_ends_any_command_quietly(run, monkeypatch):
    """Where no answer is running: one word, and the exit code that shells expect."""

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("edge_gemma.store.installed.ls", interrupted)
    assert run("ls") == (130, "", "\nstopped\n")
