"""The benchmarks on a tiny real bundle: real workers, real limits; what they say, keep, compare and
draw.
"""

import json
import re
import sys

import pytest
from edge_gemma.benchmarks import (
    bench,
    machine,
    measure,
    regress,
    report,
    rivals,
    spine,
)
from edge_gemma.benchmarks.bench import Section
from edge_gemma.benchmarks.caps import Limits
from edge_gemma.benchmarks.dev.synthetic import Types, tiny_gguf
from edge_gemma.benchmarks.report import write_report
from edge_gemma.benchmarks.systems import Task

from edge_gemma.errors import UsageError
from edge_gemma.units import MiB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle of a gemma3n whose PLE and embedding are cold, large enough to be seen in a process."""
    from edge_gemma.store.importer import import_gguf

    work = tmp_path_factory.mktemp("bench")
    import_gguf(
        tiny_gguf(
            work / "tiny.gguf", "gemma3n", types=Types(head="q4_0", embed="q8_0"), n_vocab=4096
        ),
        work / "tiny",
    )
    return work / "tiny"


def task(folder, **changes):
    return Task(
        "edge-gemma",
        str(folder),
        **{"n_ctx": 256, "n_threads": 1, "n_prompt": 40, "n_predict": 4, **changes},
    )


def test_spine_base_runs_by_itself(folder):
    """Its script is text that no linter follows into the modules it names."""
    from types import SimpleNamespace

    text, rows = spine.base(SimpleNamespace(gguf=lambda name: folder / "decoder.gguf"))
    assert [row["loaded"] for row in rows] == [
        "Python",
        "numpy",
        "edge-gemma and llama.cpp",
        "a vocabulary of 4096 tokens",
    ]
    assert rows[-1]["anon_bytes"] > rows[0]["anon_bytes"] and "| Python |" in text


# --- one run -------------------------------------------------------------------------------------------------------


def test_a_run_is_timed_and_its_memory_counted(folder):
    run = measure.measure(task(folder, rounds=2), Limits(700 * MiB), watch_pages=True)
    assert run.ok and run.outcome.describe() == "done", run.outcome
    assert [phase["name"] for phase in run.phases] == [
        "start",
        "load",
        "loaded",
        "prefill",
        "decode",
        "prefill",
        "decode",
        "exit",
    ]
    assert (
        10 * MiB < run.peak_pss_bytes <= run.peak_rss_bytes < 700 * MiB
        and run.load_peak_rss_bytes > 10 * MiB
    )
    assert (
        run.planned_peak_bytes > 10 * MiB
        and run.median("decode_tok_s") > 0
        and run.median("ttft_s") > 0
    )
    assert run.timeline[-1].seconds > run.timeline[0].seconds and run.timeline[-1].anon_bytes > MiB
    assert json.loads(json.dumps(run.to_dict()))["task"]["n_prompt"] == 40


def test_each_round_reads_its_whole_prompt(folder):
    """The runtime reuses what two prompts share; a benchmark must not be flattered by it."""
    from edge_gemma.benchmarks import worker

    seen = []

    class Fake(worker.System):
        def tokenize(self, text):
            return list(range(len(text)))

        def generate(self, ids, n_predict):
            seen.append(ids)
            yield from range(2)

    worker.generate_rounds(Fake(task(folder, rounds=3)))
    assert all(len(ids) == 40 and ids[0] == 0 for ids in seen)
    assert seen[0][1] != seen[1][1] != seen[2][1]


def test_interleaving_turns_around(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "measure", lambda task, limits: order.append(task) or task)
    assert measure.interleave("ab", 3, [[], []]) == [["a"] * 3, ["b"] * 3]
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_a_failing_worker_is_described(folder):
    run = measure.measure(task(folder, n_ctx=1 << 20))
    assert not run.ok and "1048576 tokens" in run.outcome.describe()
    assert "nothing at" in measure.measure(task(folder / "absent")).outcome.describe()


def test_answer_latency_of_text(folder):
    run = measure.measure(task(folder, mode="text", n_prompt=64, rounds=2))
    assert run.ok and run.median("ttft_s") > 0 and len(run.result["rounds"]) == 2


# --- sections ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memory_section(folder):
    return bench.memory(
        [folder], ["pi-zero-2w-512mb", "laptop-8gb"], n_ctx=256, n_prompt=32, n_predict=4
    )


def test_memory_plans_runs_and_holds_one_against_the_other(memory_section):
    first, second = memory_section.rows
    assert (
        first["fits"] and first["outcome"].startswith("done") and first["peak_pss_bytes"] > 10 * MiB
    )
    assert first["error"] == pytest.approx(
        first["here_planned_bytes"] / first["peak_pss_bytes"] - 1
    )
    assert first["settings"]["n_ctx"] == 256 and second["fits"]
    assert "| fits |" in memory_section.markdown()
    assert list(memory_section.timelines)[0].endswith("on pi-zero-2w-512mb")
    if len(machine.usable_cpus()) < 4:
        assert any(
            "for want of the board's own" in note and "pi-zero-2w-512mb (4)" in note
            for note in memory_section.notes
        )


def test_memory_without_cgroups_says_so(folder):
    section = bench.memory(
        [folder], ["pi-4-2gb"], n_ctx=256, n_prompt=32, n_predict=2, permit_groups=False
    )
    assert section.rows[0]["limit"] == "rlimit" and any(
        "no permission to make a memory cgroup" in note for note in section.notes
    )


def test_a_file_that_others_have_mapped_is_told(folder):
    """PSS shares out common pages; a forgotten process with the same model would make every figure
    look better.
    """
    import subprocess

    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, "
            "prot=mmap.PROT_READ); print(m[0], flush=True); input()",
            str(folder / "decoder.gguf"),
        ],
        stdin=-1,
        stdout=-1,
    )
    try:
        other.stdout.readline()
        assert measure._held_by_others([folder / "decoder.gguf", folder / "manifest.json"]) == [
            (other.pid, "decoder.gguf")
        ]
    finally:
        other.communicate(b"\n")
    assert measure._held_by_others([folder / "decoder.gguf"]) == []


def test_memory_of_what_does_not_fit_is_not_run(folder, tmp_path):
    board = tmp_path / "tight.toml"
    board.write_text(
        'board="tight"\ncpu="small"\ntotal="48 MiB"\navailable="40 MiB"\npage="4 '
        'KiB"\ncpus=1\nfeatures=[]\nmemory_cgroup=true\n'
    )
    section = bench.memory([folder], [str(board)])
    assert (
        not section.rows[0]["fits"]
        and "peak_pss_bytes" not in section.rows[0]
        and "does not fit" in section.markdown()
    )


def test_several_models_get_a_table_of_boards_by_models():
    row = {
        "usable_bytes": 400 * MiB,
        "fits": True,
        "planned_bytes": 300 * MiB,
        "needed_bytes": 310 * MiB,
    }
    rows = [
        row | {"device": "a", "model": "m", "peak_pss_bytes": 290 * MiB, "error": 0.034},
        row | {"device": "a", "model": "n", "fits": False},
        row | {"device": "b", "model": "m"},
    ]
    assert bench.board_overview(rows) == [
        ["MiB", "to spend", "m", "n"],
        ["a", "400", "300; 290 (+3.4%)", "no: 310"],
        ["b", "400", "300", "–"],
    ]
    assert Section("memory", [rows[0]]).overview == []


def test_ctrl_c_keeps_what_was_measured(folder, monkeypatch):
    real, calls = measure.measure, []

    def interrupted(*arguments, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(measure, "measure", interrupted)
    section = bench.latency([folder], turns=(0, 64), repeats=1)
    assert (
        section.stopped
        and len(section.rows) == 1
        and "stopped by Ctrl-C; these are the results until then" in section.notes
    )


@pytest.fixture(scope="module")
def compare_section(folder):
    return bench.compare(folder, n_prompt=32, n_predict=4, n_ctx=128, n_threads=1, repeats=1)


def test_compare_runs_the_stock_library_on_the_same_file(compare_section):
    assert [row["system"] for row in compare_section.rows] == ["edge-gemma", "llama_cpp.Llama"]
    assert all(
        row["decode_tok_s"] > 0 and row["peak_pss_bytes"] > MiB and row["runs"] == 1
        for row in compare_section.rows
    )


def test_compare_says_what_is_not_installed(folder):
    with pytest.raises(
        UsageError,
        match="no system 'ollama' to compare with; there are: edge-gemma, llama_cpp.Llama, "
        "transformers",
    ):
        bench.compare(folder, [("ollama", folder)])
    for system in rivals.SYSTEMS:
        if reason := rivals.missing(system):
            with pytest.raises(UsageError, match=re.escape(reason)):
                bench.compare(folder, [(system, folder)])


def test_litert_lm_is_asked_as_its_interface_wants(folder, monkeypatch):
    """A stand-in with the signatures of litert-lm-api 0.18 (engine.py, session.py); no model of
    theirs is at hand in tests.
    """
    from contextlib import contextmanager
    from types import SimpleNamespace

    asked = []

    class Session:
        def run_prefill(self, contents):
            asked.append(contents)

        def run_decode_async(self):
            yield from "abc"

    class Engine:
        def __init__(self, model_path, backend, max_num_tokens=None):
            asked.append((model_path, backend, max_num_tokens))

        def tokenize(self, text):
            return [ord(letter) for letter in text]

        def detokenize(self, token_ids):
            return "".join(map(chr, token_ids))

        @contextmanager
        def create_session(self, *, apply_prompt_template, sampler_config, max_output_tokens):
            asked.append((apply_prompt_template, sampler_config["top_k"], max_output_tokens))
            yield Session()

        def close(self):
            asked.append("closed")

    fake = SimpleNamespace(
        Engine=Engine,
        SamplerConfig=dict,
        Backend=SimpleNamespace(CPU=lambda thread_count: thread_count),
        LogSeverity=SimpleNamespace(ERROR=1),
        set_min_log_severity=lambda level: None,
    )
    monkeypatch.setitem(sys.modules, "litert_lm", fake)
    system = rivals.LiteRtLm(task(folder, n_threads=2))
    system.load()
    assert len(list(system.generate(system.tokenize("hi"), 3))) == 3
    system.close()
    assert asked == [(str(folder), 2, 256), (False, 1, 3), ["hi"], "closed"]


def test_speed_knows_the_roof(folder):
    section = bench.speed([folder], depths=(32,), threads=(1,), repeats=1, n_predict=4)
    (row,) = section.rows
    assert (
        row["decode_tok_s"] > 0
        and row["prefill_tok_s"] > 0
        and row["load_cold_s"] > 0
        and 0 < row["roof_share"] < 1.5
    )
    assert "GB/s with 1 thread;" in section.notes[0]


def test_quality_against_itself_is_zero(folder, tmp_path):
    pytest.importorskip("edge_gemma.convert.quality")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 60)
    section = bench.quality(folder, [folder], text, max_tokens=512)
    assert (
        section.rows[1]["kld_mean"] == pytest.approx(0, abs=1e-6)
        and section.rows[1]["top1_agreement"] == 1.0
    )


def test_unknown_profile():
    with pytest.raises(UsageError, match="no device profile 'pi-9'"):
        bench.device_names(["pi-9"])
    assert len(bench.device_names(["all"])) >= 11


# --- keeping and comparing -----------------------------------------------------------------------------------------

HERE = {"cpu": "A", "cores": 2, "page_bytes": 4096, "features": ["avx2"], "text": "machine A"}


def speed_section(decode, spread=0.0):
    row = {
        "model": "m",
        "threads": 1,
        "depth": 128,
        "decode_tok_s": decode,
        "decode_tok_s_spread": spread,
        "prefill_tok_s": 100.0,
        "ttft_s": 1.0,
        "roof_share": 0.5,
        "load_cold_s": 1.0,
        "load_s": 0.5,
    }
    return Section("speed", [row])


@pytest.mark.parametrize(
    "now, spread, verdict",
    [
        (20.0, 0, "same"),
        (19.5, 0, "same"),
        (18.0, 0, "worse"),
        (23.0, 0, "better"),
        (18.0, 0.06, "same"),
    ],
)
def test_regressions_are_flagged_beyond_the_noise(tmp_path, now, spread, verdict):
    regress.save(tmp_path / "a.json", [speed_section(20.0)], HERE)
    changes, notes = regress.compare(
        regress.read(tmp_path / "a.json"), [speed_section(now, spread)], HERE
    )
    assert [change.verdict for change in changes if change.field == "decode_tok_s"] == [
        verdict
    ] and notes == []


def test_bytes_that_changed_are_told_in_mib():
    change = regress.Change(
        "compare", "m", "peak_pss_bytes", 353 * MiB, 360 * MiB, 0.02, 0.02, "same"
    )
    assert "peak_pss 353 MiB → 360 MiB (+2.0%" in str(change)


def test_another_machine_is_not_compared_for_speed(tmp_path):
    regress.save(tmp_path / "a.json", [speed_section(20.0)], HERE)
    changes, notes = regress.compare(
        regress.read(tmp_path / "a.json"), [speed_section(1.0)], HERE | {"cpu": "B"}
    )
    assert changes == [] and "measured on another machine before (machine A)" in notes[0]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[]", "was not written by"),
        ('{"format": "edge-gemma-bench", "version": 9, "sections": []}', "has version 9"),
    ],
)
def test_wrong_files_to_compare_with(tmp_path, content, message):
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        regress.read(path)
    with pytest.raises(UsageError, match="cannot read .*; `bench … --save"):
        regress.read(tmp_path / "absent.json")


# --- the report ----------------------------------------------------------------------------------------------------


def test_the_report_is_one_page_without_a_network(tmp_path, memory_section, compare_section):
    quality = Section(
        "quality",
        [
            {
                "model": "q<4>",
                "size_bytes": 5 * MiB,
                "ppl": 9.0,
                "kld_mean": 0.1,
                "kld_p99": 1.0,
                "top1_agreement": 0.9,
            }
        ],
    )
    latency = Section(
        "latency",
        [
            {
                "model": "m",
                "mode": "speech",
                "amount": s,
                "padding": False,
                "first_token_s": 0.3,
                "first_token_s_spread": 0.1,
                "rtf": 0.4,
            }
            for s in (1.0, 5.0)
        ],
    )
    sections = [memory_section, compare_section, speed_section(20.0, 0.1), latency, quality]
    written = write_report(tmp_path / "report.html", sections, HERE, ["a note"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 9 and "q&lt;4&gt;" in page and "a note" in page
    links = set(re.findall(r"(?:src|href)=\"(?!#)([^\"]*)\"", page)) | set(
        re.findall(r"url\((?!#)", page)
    )
    assert links == set()  # namespaces are names, not addresses
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {path.suffix for path in written} == {".html", ".json", ".png"} and all(
        path.stat().st_size > 500 for path in written
    )
    assert [s.kind for s in regress.sections(regress.read(tmp_path / "report.json"))] == [
        "memory",
        "compare",
        "speed",
        "latency",
        "quality",
    ]


def test_labels_of_a_picture_are_told_apart():
    phases = [
        ["start", 0.0],
        ["load", 0.1],
        ["loaded", 5.0],
        ["prefill", 5.2],
        ["decode", 9.0],
        ["prefill", 9.5],
        ["exit", 10.0],
    ]
    samples = [
        {"seconds": float(n), "anon_bytes": 100 * MiB, "file_bytes": 50 * MiB, "cold_bytes": 0}
        for n in range(11)
    ]
    drawn = [
        text.get_text()
        for text in report._timeline([{"budget_bytes": 0, "phases": phases, "items": []}, *samples])
        .axes[0]
        .texts
    ]
    assert drawn == ["load", "loaded, prefill", "decode"]
    row = {"decode_tok_s": 1.0, "prefill_tok_s": 1.0, "peak_pss_bytes": MiB}
    rows = [
        {"system": system, "file": file, **row}
        for system, file in (("edge-gemma", "a"), ("llama_cpp.Llama", "b"), ("edge-gemma", "c"))
    ]
    _, _, figure = next(report.draw(Section("compare", rows)))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "edge-gemma, a",
        "llama_cpp.Llama",
        "edge-gemma, c",
    ]


def test_without_matplotlib_tables_and_json_remain(tmp_path, compare_section, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = write_report(tmp_path / "report.html", [compare_section], HERE)
    page = (tmp_path / "report.html").read_text()
    assert [path.suffix for path in written] == [".html", ".json"] and "<svg" not in page
    assert "llama_cpp.Llama" in page and "pip install &#x27;edge-gemma[plots]&#x27;" in page


# --- the command line and the spine's own tables -------------------------------------------------------------------


def cli(*arguments, capsys):
    from edge_gemma.cli import main

    try:
        main(list(arguments))
    except SystemExit as end:
        return end.code or 0, capsys.readouterr()
    return 0, capsys.readouterr()


def test_bench_commands(folder, tmp_path, capsys):
    code, out = cli(
        "bench",
        "memory",
        str(folder),
        "-d",
        "pi-5-4gb",
        "--plan-only",
        "--json",
        "--save",
        str(tmp_path / "kept.json"),
        capsys=capsys,
    )
    found = json.loads(out.out)
    assert (
        code == 0
        and found["sections"][0]["rows"][0]["device"] == "pi-5-4gb"
        and found["machine"]["cores"] >= 1
    )
    code, out = cli(
        "bench",
        "memory",
        str(folder),
        "-d",
        "pi-5-4gb",
        "--plan-only",
        "--against",
        str(tmp_path / "kept.json"),
        capsys=capsys,
    )
    assert code == 0 and "none of them changed by more than the noise" in out.out
    kept = json.loads((tmp_path / "kept.json").read_text())
    kept["sections"][0]["rows"][0]["planned_bytes"] //= 2
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    code, out = cli(
        "bench",
        "memory",
        str(folder),
        "-d",
        "pi-5-4gb",
        "--plan-only",
        "--against",
        str(tmp_path / "kept.json"),
        capsys=capsys,
    )
    assert code == 1 and "worse  memory" in out.out
    code, out = cli(
        "bench", "diff", str(tmp_path / "kept.json"), str(tmp_path / "kept.json"), capsys=capsys
    )
    assert code == 0 and "(+0.0%, noise 2.0%)" in out.out and "none of them changed" in out.out
    code, out = cli(
        "bench", "report", str(tmp_path / "kept.json"), str(tmp_path / "page.html"), capsys=capsys
    )
    assert code == 0 and (tmp_path / "page.html").exists()


def test_bench_refusals(folder, capsys):
    assert cli("bench", "memory", str(folder), "-d", "pi-9", capsys=capsys)[0] == 2
    code, out = cli("bench", "compare", str(folder), "--also", "transformers", capsys=capsys)
    assert code == 2 and "--also takes SYSTEM=MODEL" in out.err
    code, out = cli(
        "bench",
        "memory",
        str(folder),
        "--plan-only",
        "--save",
        str(folder / "absent" / "now.json"),
        capsys=capsys,
    )
    assert code == 2 and "to write now.json into" in out.err and out.out == ""


def test_planned_rows_and_ratios(folder):
    run = measure.measure(task(folder))
    row = spine.planned_row("tiny", 256, run)
    assert row["error"] == pytest.approx(
        run.planned_peak_bytes / run.peak_pss_bytes - 1
    ) and "| tiny | 256 |" in spine.plan_table([row])
    ours, theirs = spine.summary("edge-gemma", [run, run]), spine.summary("llama_cpp.Llama", [run])
    assert spine.ratio(ours, theirs)["decode_tok_s"] == pytest.approx(
        1
    ) and "| **ratio** | 1.00× |" in spine.system_table([ours, theirs, spine.ratio(ours, theirs)])


def test_the_machine_describes_itself():
    calm = machine.Calm(
        {"busy": 0.3, "clock_mhz": 2000, "governor": "powersave"},
        {"clock_mhz": 1000, "celsius": 84.0, "throttled": "0x4"},
    )
    text = " ".join(calm.warnings())
    assert (
        "busy when it began (30% of its cores in use)" in text
        and "fell from 2000 to 1000 MHz" in text
        and "84 °C" in text
        and "get_throttled 0x4" in text
        and "'powersave'" in text
    )
    assert machine.Calm({"busy": 0.05}, {}).warnings() == []
