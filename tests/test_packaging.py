"""The files of packaging/: read by the programs they are for, compared with the command line."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import command

from edge_gemma import PlanRequest, plan_bundle
from edge_gemma.cli.options import LoadingOptions
from edge_gemma.cli.serve_unit import service_words
from edge_gemma.serve.systemd_unit import drop_in, memory_max_bytes
from edge_gemma.units import GiB, MiB

PACKAGING = Path(__file__).resolve().parent.parent / "packaging"
UNIT = PACKAGING / "systemd" / "edge-gemma.service"


def run(*arguments, **options):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture(scope="module")
def serve_options():
    help_text = run(sys.executable, "-m", "edge_gemma", "serve", "--help").stdout
    return set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", help_text))


@pytest.fixture
def plan_conf(tiny_bundle):
    done = run(*command(tiny_bundle, "--print-unit"))
    assert done.returncode == 0 and "ready" not in done.stderr, done.stderr
    return done.stdout


def test_the_memory_limit_is_that_of_the_plan(tiny_bundle, plan_conf):
    request = LoadingOptions(ctx=1024, threads=1).request(structured=True)
    plan = plan_bundle(tiny_bundle, request=request)
    limit = re.search(r"^MemoryMax=(\d+)M$", plan_conf, re.M)
    assert limit and int(limit[1]) * MiB == memory_max_bytes(plan.needed_bytes)
    words = shlex.split(re.findall(r"^ExecStart=(.+)$", plan_conf, re.M)[0])
    assert words == command(Path(tiny_bundle).resolve())
    assert "IPAddressDeny" not in plan_conf


def test_the_plan_inside_that_limit_is_the_same(tiny_bundle):
    free = plan_bundle(tiny_bundle, request=PlanRequest(n_ctx=1024, n_threads=1))
    limit = memory_max_bytes(free.needed_bytes)
    request = PlanRequest(n_ctx=1024, n_threads=1, budget_bytes=limit)
    assert plan_bundle(tiny_bundle, request=request).settings == free.settings
    assert memory_max_bytes(3 * GiB) < 3.5 * GiB


def test_what_other_machines_reach_is_not_shut_by_the_unit(tiny_bundle, tmp_path):
    (tmp_path / "to kens").write_text("0123456789abcdef0123456789abcdef\n")
    options = ("--host", "0.0.0.0", "--token-file", "to kens", "--print-unit")
    done = subprocess.run(
        command(Path(tiny_bundle).resolve(), *options),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(PACKAGING.parent), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr
    assert "\nIPAddressDeny=\n" in done.stdout
    assert f'"{tmp_path / "to kens"}"' in done.stdout


def test_paths_are_whole_and_names_stay():
    words = ["serve", "gemma", "--zeroconf", "gemma-2", "--print-unit", "--guard=none.toml"]
    whole = ["serve", "/srv/b", "--zeroconf", "gemma-2", "--guard=none.toml"]
    assert service_words(words, "gemma", Path("/srv/b")) == whole


def test_systemd_reads_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    folder = tmp_path / "edge-gemma.service.d"
    folder.mkdir()
    shutil.copy(UNIT, tmp_path)
    words = [sys.executable, "-m", "edge_gemma", "serve", '/srv/a 100% $HOME "b" \\c']
    (folder / "plan.conf").write_text(drop_in(words, 3 * GiB, to_network=False))
    verified = run("systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name))
    ours = [line for line in verified.stderr.splitlines() if "edge-gemma" in line]
    assert not ours and verified.returncode == 0, verified.stderr
    judged = run(
        *("systemd-analyze", "security", "--offline=true", "--json=short"),
        *("--threshold=20", str(tmp_path / UNIT.name)),
    )
    assert judged.returncode == 0, judged.stdout[-3000:] + judged.stderr
    assert json.loads(judged.stdout)


def test_the_unit_can_be_told(serve_options):
    text = UNIT.read_text()
    for needed in ("Type=notify", "DynamicUser=yes", "ProtectSystem=strict", "IPAddressDeny=any"):
        assert f"\n{needed}\n" in text
    assert "--print-unit" in serve_options
    for words in re.findall(r"edge-gemma serve ([^>\n]*)", text):
        assert set(re.findall(r"--[a-z-]+", words)) <= serve_options


def test_the_containerfile(serve_options):
    """Its instructions, what it installs, and the command it shows. It is not built here."""
    text = (PACKAGING / "Containerfile").read_text()
    joined = text.replace("\\\n", " ")
    known = {"FROM", "RUN", "COPY", "ENV", "USER", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    instructions = re.findall(r"^([A-Z]+) ", joined, re.M)
    assert set(instructions) == known and "\nUSER edge-gemma\n" in text
    project = (PACKAGING.parent / "pyproject.toml").read_text()
    for extra in re.findall(r"/source\[([a-z,]+)\]", text)[0].split(","):
        assert re.search(rf"^{extra} = \[", project, re.M)
    shown = re.findall(r"edge-gemma serve .*", text)
    assert shown and set(re.findall(r"--[a-z-]+", shown[0])) <= serve_options


def test_the_configurations_of_others(serve_options):
    yaml = pytest.importorskip("yaml")
    litellm = yaml.safe_load((PACKAGING / "litellm" / "config.yaml").read_text())
    boards = litellm["model_list"]
    assert len({board["litellm_params"]["api_base"] for board in boards}) == 2
    assert {board["model_name"] for board in boards} == {"gemma"}
    assert litellm["router_settings"]["num_retries"] >= 1
    path = PACKAGING / "home-assistant" / "configuration.yaml"
    (rest,) = yaml.safe_load(path.read_text())["rest"]
    from edge_gemma.serve.service import Health

    used = [sensor["value_template"] for sensor in rest["sensor"] + rest["binary_sensor"]]
    names = {re.search(r"value_json\.(\w+)", template)[1] for template in used}
    assert names <= set(Health.__dataclass_fields__)
    for shown in re.findall(r"edge-gemma serve .*", path.read_text()):
        assert set(re.findall(r"--[a-z-]+", shown)) <= serve_options
