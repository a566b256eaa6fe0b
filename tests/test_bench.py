"""The benchmarks on a tiny real bundle: real workers, real limits; what they say, keep, compare and
draw.
"""

import json
import re
import sys

import pytest

from edge_gemma.benchmarks import (
    machine,
    measure,
    memory,
    pictures,
    presets,
    quality,
    regress,
    rivals,
    sections,
    speed,
    start,
    turns,
    worker,
)
from edge_gemma.benchmarks.caps import Limits
from edge_gemma.benchmarks.dev.synthetic import Types, tiny_gguf
from edge_gemma.benchmarks.report import write_report
from edge_gemma.benchmarks.sections import Section
from edge_gemma.benchmarks.systems import Task
from edge_gemma.errors import UsageError
from edge_gemma.units import MiB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle of a gemma3n whose PLE and embedding are cold, large enough to be seen."""
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


def test_base_runs_by_itself(folder):
    """Its script is text that no linter follows into the modules it names."""
    section = memory.base([folder])
    assert [row["loaded"] for row in section.rows] == [
        "Python",
        "numpy",
        "edge-gemma and llama.cpp",
        "a vocabulary of 4096 tokens",
    ]
    assert section.rows[-1]["anon_bytes"] > section.rows[0]["anon_bytes"]
    assert "| Python |" in section.markdown()


# --- one run ---


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


class Timed:
    """Stands in for LiveTurn: the same surface, and a record of what was called."""

    def __init__(self, chat, instruction="", *, pad_audio=False, max_tokens=512):
        self.calls.append(("turn", instruction, pad_audio, max_tokens))

    def push(self, samples):
        self.calls.append(("push", len(samples)))

    def finish(self):
        self.calls.append(("finish",))

    def generate(self, sampling):
        from edge_gemma.conversation.stream import Chunk

        self.calls.append(("generate", sampling.max_tokens))
        yield Chunk("a", token_ids=(5,))


@pytest.mark.parametrize("mode", ["speech", "speech, encoded after its end"])
def test_the_wait_for_an_answer_is_the_products_own(folder, monkeypatch, capsys, mode):
    """Nothing but LiveTurn's own methods between the last packet and the first token."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    from edge_gemma.benchmarks.systems import EdgeGemma
    from edge_gemma.conversation import live_turn

    monkeypatch.setattr(live_turn, "LiveTurn", type("Recorded", (Timed,), {"calls": []}))
    system = EdgeGemma(task(folder, mode=mode, audio_s=0.1, n_predict=3, pad_audio=True))
    system.model = SimpleNamespace(chat=lambda pad_audio: nullcontext(pad_audio))
    (found,) = turns.spoken_rounds(system)
    begun, *pushed, finished, answered = live_turn.LiveTurn.calls
    assert begun == ("turn", turns.INSTRUCTION, True, 3)
    live = [512, 512, 512, 64]  # 0.1 s are 1600 samples
    assert pushed == [("push", n) for n in (live if mode == "speech" else [1600])]
    assert (finished, answered) == (("finish",), ("generate", 3))
    assert found["ttft_s"] >= found["encoder_s"] > 0
    assert (found["rtf"] is None) == (mode != "speech")


# --- sections ---


@pytest.fixture(scope="module")
def memory_section(folder):
    return memory.memory(
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
    section = memory.memory(
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
    section = memory.memory([folder], [str(board)])
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
    assert sections.board_overview(rows) == [
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
    section = speed.latency([folder], turns=(0, 64), repeats=1)
    assert (
        section.stopped
        and len(section.rows) == 1
        and "stopped by Ctrl-C; these are the results until then" in section.notes
    )


@pytest.fixture(scope="module")
def compare_section(folder):
    return speed.compare(folder, n_prompt=32, n_predict=4, n_ctx=128, n_threads=1, repeats=1)


def test_compare_runs_the_stock_library_on_the_same_file(compare_section):
    assert [row["system"] for row in compare_section.rows] == ["edge-gemma", "llama_cpp.Llama"]
    assert all(
        row["decode_tok_s"] > 0 and row["peak_pss_bytes"] > MiB and row["runs"] == 1
        for row in compare_section.rows
    )


def test_compare_runs_both_engines_of_a_bundle(both_bundle):
    section = speed.compare(
        both_bundle, n_prompt=32, n_predict=4, n_ctx=128, n_threads=1, repeats=1
    )
    assert [row["system"] for row in section.rows] == [
        "edge-gemma",
        "llama_cpp.Llama",
        "edge-gemma, ONNX engine",
    ]
    assert any(said.startswith("edge-gemma, ONNX engine over") for said in section.notes)


def test_compare_says_what_is_not_installed(folder):
    with pytest.raises(
        UsageError,
        match="no system 'ollama' to compare with; there are: edge-gemma, llama_cpp.Llama, "
        "transformers",
    ):
        speed.compare(folder, [("ollama", folder)])
    for system in rivals.SYSTEMS:
        if reason := rivals.missing(system):
            with pytest.raises(UsageError, match=re.escape(reason)):
                speed.compare(folder, [(system, folder)])


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
    section = speed.speed([folder], depths=(32,), threads=(1,), repeats=1, n_predict=4)
    (row,) = section.rows
    assert (
        row["decode_tok_s"] > 0
        and row["prefill_tok_s"] > 0
        and row["load_cold_s"] > 0
        and 0 < row["roof_share"] < 1.5
    )
    assert "GB/s with 1 thread;" in section.notes[0]


def test_start_tells_kept_prompts_from_prefilled_ones(folder):
    section = start.start([folder], n_prompt=300, n_predict=8, n_threads=1, repeats=1)
    (row,) = section.rows
    assert min(row["cold_s"], row["memory_s"], row["disk_s"]) > 0
    assert row["tokens_per_pass"] >= 1 and 0 < row["forced_share"] < 1


def test_quality_against_itself_is_zero(folder, tmp_path):
    pytest.importorskip("edge_gemma.convert.quality")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 60)
    section = quality.quality(folder, [folder], text, max_tokens=512)
    assert (
        section.rows[1]["kld_mean"] == pytest.approx(0, abs=1e-6)
        and section.rows[1]["top1_agreement"] == 1.0
    )


def test_unknown_profile():
    with pytest.raises(UsageError, match="no device profile 'pi-9'"):
        memory.device_names(["pi-9"])
    assert len(memory.device_names(["all"])) >= 11


# --- presets ---


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_runs(tmp_path_factory, name):
    """On models of a few MB under the presets' names, which the tests share."""
    work = tmp_path_factory.getbasetemp() / "presets"
    found = presets.Runner(work=work, small=True).run(presets.read(name))
    assert found and all(section.rows for section in found)
    for section in found:
        text = section.markdown()
        assert section.title in text and text.count("\n| ") >= len(section.rows)
        assert not section.stopped


@pytest.mark.parametrize(
    "text, message",
    [
        ("about = 'x'", "a line `about` and at least one"),
        ("about = [", "cannot read the preset"),
        ("about = 'x'\n[[step]]\nbench = 'sped'", "no benchmark 'sped'; a step names one of"),
        ("about = 'x'\n[[step]]\nbench = 'speed'", "the step speed names no models"),
        (
            "about = 'x'\n[[step]]\nbench = 'speed'\nmodels = ['270m']\ndepth = [1]",
            "speed has no argument depth; it has depths, threads, repeats, n_predict",
        ),
    ],
)
def test_wrong_presets_are_refused(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        presets.read(str(path))
    with pytest.raises(UsageError, match="no preset 'smal'; there are base, boards,"):
        presets.read("smal")


def test_a_preset_takes_a_bundle_of_ones_own(folder, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "about = 'mine'\n[[step]]\nbench = 'memory'\nmodels = ['e2b']\n"
        "devices = ['pi-5-4gb']\nrun = false\n"
    )
    (section,) = presets.Runner(tmp_path, {"e2b": folder}).run(presets.read(str(path)))
    assert section.rows[0]["device"] == "pi-5-4gb" and "outcome" not in section.rows[0]


def test_what_a_preset_lacks_is_told(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="soak listens to speech; give --clips FOLDER"):
        presets.Runner(tmp_path).run(presets.read("soak"))
    with pytest.raises(UsageError, match="no recordings in"):
        presets.Runner(tmp_path, clips=tmp_path).run(presets.read("soak"))
    # an installed wheel has no benchmarks/dev
    monkeypatch.setattr(presets, "MAKER", "edge_gemma.benchmarks.absent.bundles")
    with pytest.raises(UsageError, match="only a source checkout makes: .*--model e2b=BUNDLE"):
        presets.Runner(tmp_path).run(presets.read("deep"))


def test_what_is_shipped_does_not_import_what_is_not():
    """The wheel leaves benchmarks/dev out."""
    import ast
    from pathlib import Path

    for path in Path(presets.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [alias.name for alias in getattr(node, "names", [])]
            imported.append(getattr(node, "module", None) or "")
            assert not any("benchmarks.dev" in str(name) or name == "dev" for name in imported), (
                path
            )


# --- keeping and comparing ---

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


# --- the report ---


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
        for text in pictures._timeline(
            [{"budget_bytes": 0, "phases": phases, "items": []}, *samples]
        )
        .axes[0]
        .texts
    ]
    assert drawn == ["load", "loaded, prefill", "decode"]
    row = {"decode_tok_s": 1.0, "prefill_tok_s": 1.0, "peak_pss_bytes": MiB}
    rows = [
        {"system": system, "file": file, **row}
        for system, file in (("edge-gemma", "a"), ("llama_cpp.Llama", "b"), ("edge-gemma", "c"))
    ]
    _, _, figure = next(pictures.draw(Section("compare", rows)))
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
    assert "llama_cpp.Llama" in page and "pip install &#39;edge-gemma[plots]&#39;" in page


# --- the command line and rows ---


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
    row = memory.planned_row("tiny", 256, run)
    assert row["error"] == pytest.approx(run.planned_peak_bytes / run.peak_pss_bytes - 1)
    assert "| tiny | 256 |" in Section("plan", [row]).markdown()
    stock = {
        "system": "llama_cpp.Llama",
        "file": "f",
        **measure.timed([run]),
        **measure.memory_of([run]),
    }
    ours = measure.timed([run, run]) | measure.memory_of([run, run])
    rows = [stock | {"system": "edge-gemma"} | ours, stock]
    (told,) = speed._ratios(rows)
    assert told.startswith("edge-gemma over llama_cpp.Llama, f: decode 1.00×, prefill 1.00×")


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


# --- tables of the documentation ---


def test_the_documentations_tables_are_current():
    from edge_gemma.benchmarks.dev import doc_tables

    stale = [path.name for path, old, new in doc_tables.pages(doc_tables.CHECKOUT) if old != new]
    assert stale == []


def test_a_kept_file_becomes_a_table(tmp_path, monkeypatch):
    from edge_gemma.benchmarks.dev import doc_tables

    data = tmp_path / "docs" / "data"
    data.mkdir(parents=True)
    page = tmp_path / "docs" / "page.md"
    page.write_text("Before.\n<!-- table: fast -->\nold\n<!-- end -->\nAfter.\n")
    made = HERE | {"command": "edge-gemma bench speed m", "date": "2026-01-02"}
    regress.save(data / "fast.json", [speed_section(20.0)], made)
    ((path, _, text),) = doc_tables.pages(tmp_path)
    assert path == page and text.startswith("Before.\n<!-- table: fast -->\n| model | threads |")
    assert "| 20.0 ± 0% |" in text and "\nold\n" not in text and text.endswith("\nAfter.\n")
    assert "<sub>`edge-gemma bench speed m`; machine A; 2026-01-02</sub>" in text
    page.write_text(text)
    assert [old == new for _, old, new in doc_tables.pages(tmp_path)] == [True]
    regress.save(data / "unseen.json", [], made)
    with pytest.raises(UsageError, match="no page shows docs/data: unseen"):
        list(doc_tables.pages(tmp_path))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ('{"head": ["a"], "rows": [["1"]]}', "does not say its command, machine, date"),
        ('{"head": ["a"], "rows": [["1", "2"]]}', "each row needs a cell for each of the head's 1"),
    ],
)
def test_wrong_figures_are_refused(tmp_path, content, message):
    from edge_gemma.benchmarks.dev import doc_tables

    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        doc_tables.table(tmp_path / "x.json")
    with pytest.raises(UsageError, match="cannot read"):
        doc_tables.table(tmp_path / "y.json")
