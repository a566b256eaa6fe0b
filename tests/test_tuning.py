"""`tune`: what runs a bundle fastest is measured once and used; and packed weights in a file, which
are taken only where nobody but this machine's own runtime can have written them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from checkpoints import write_checkpoint
from test_cli import cli

import edge_gemma
from edge_gemma import PlanRequest, Tokens, tuning
from edge_gemma.bundles.folder import Bundle
from edge_gemma.cli import main
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.engines.onnx import prepacked
from edge_gemma.engines.onnx.prepacked import find_prepacked, make_prepacked
from edge_gemma.errors import BundleError, RuntimeFailure, UsageError
from edge_gemma.machine.probe import machine_for

PROMPT = [Tokens(tuple(range(20, 60)))]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Bundle:
    """Both decoders of a small Gemma 3n in 8 bits."""
    folder = tmp_path_factory.mktemp("both")
    write_checkpoint("g3n", folder / "c", keep=lambda name: "_tower" not in name)
    options = Conversion(
        quant="q8_0", decoder="both", onnx_quant="q8_0", audio="none", vision="none", verify=False
    )
    return convert(folder / "c", folder / "b", options).bundle


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edge-gemma"


def logits(bundle: Bundle, **wanted) -> np.ndarray:
    request = PlanRequest(n_threads=1, **wanted)
    with edge_gemma.load(bundle, engine="onnx", n_ctx=256, request=request) as model:
        return np.concatenate([*model.evaluate(PROMPT)])


# --- packed weights ---


def test_packed_weights_answer_to_the_bit_and_are_planned_as_a_file(both):
    before = logits(both)
    plan = edge_gemma.plan_bundle(both, engine="onnx")
    assert not plan.settings.prepacked_bytes
    graph = make_prepacked(both, both.manifest.onnx, 1)
    assert find_prepacked(both, both.manifest.onnx) == graph
    assert np.array_equal(before, logits(both))
    packed = edge_gemma.plan_bundle(both, engine="onnx")
    assert packed.settings.prepacked_bytes
    assert {item.kind for item in packed.items if item.name.startswith("weights")} == {"file_hot"}
    sizes = [plan.total_bytes, packed.total_bytes]
    assert max(sizes) - min(sizes) < 16 << 20
    assert not edge_gemma.plan_bundle(
        both, device="pi-5-4gb", engine="onnx"
    ).settings.prepacked_bytes
    assert not edge_gemma.plan_bundle(both, engine="llama").settings.prepacked_bytes


def damaged_graph(folder: Path) -> None:
    data = bytearray((folder / "decoder.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "decoder.onnx").write_bytes(data)


def damaged_about(folder: Path) -> None:
    (folder / "about.json").write_text("{}")


def shortened(folder: Path) -> None:
    os.truncate(folder / "decoder.onnx.data", 1000)


def for_all(folder: Path) -> None:
    (folder / "decoder.onnx.data").chmod(0o666)


def linked(folder: Path) -> None:
    (folder / "decoder.onnx.data").rename(folder.parent / "elsewhere")
    (folder / "decoder.onnx.data").symlink_to(folder.parent / "elsewhere")


def absent(folder: Path) -> None:
    (folder / "about.json").unlink()


@pytest.mark.parametrize("harm", [damaged_graph, damaged_about, shortened, for_all, linked, absent])
def test_packed_weights_that_are_not_as_they_were_made_are_not_used(both, harm):
    part = both.manifest.onnx
    graph = make_prepacked(both, part, 1)
    harm(graph.parent)
    assert find_prepacked(both, part) is None
    assert not edge_gemma.plan_bundle(both, engine="onnx").settings.prepacked_bytes
    assert logits(both).shape[0] == 40
    make_prepacked(both, part, 1)
    assert find_prepacked(both, part) is not None


@pytest.mark.parametrize("what", ["cpu", "release"])
def test_another_machine_or_release_packs_anew(both, monkeypatch, what):
    make_prepacked(both, both.manifest.onnx, 1)
    if what == "cpu":
        monkeypatch.setattr(prepacked, "cpu_kind", lambda: "another")
    else:
        monkeypatch.setattr(prepacked.metadata, "version", lambda name: "9.9.9")
    assert find_prepacked(both, both.manifest.onnx) is None


def test_a_full_disk_keeps_nothing(both, cache, monkeypatch):
    full = shutil._ntuple_diskusage(1, 1, 0)
    monkeypatch.setattr(prepacked.shutil, "disk_usage", lambda path: full)
    with pytest.raises(RuntimeFailure, match="are free; set XDG_CACHE_HOME"):
        make_prepacked(both, both.manifest.onnx, 1)
    assert not list((cache / "prepacked").iterdir())


def test_a_disk_that_fills_while_packing_keeps_nothing(both, cache, monkeypatch):
    def fills(path, *, n_threads, save_packed):
        save_packed.write_bytes(b"half")
        raise BundleError("Failed to write external initializers")

    monkeypatch.setattr(prepacked, "open_decoder", fills)
    with pytest.raises(RuntimeFailure, match="could not write packed weights"):
        make_prepacked(both, both.manifest.onnx, 1)
    assert not list((cache / "prepacked").iterdir())


def test_packed_weights_with_other_logits_are_thrown_away(both, cache, monkeypatch):
    answers = iter([np.zeros(3), np.ones(3)])
    monkeypatch.setattr(prepacked, "probe_logits", lambda graph: next(answers))
    with pytest.raises(RuntimeFailure, match="other logits"):
        make_prepacked(both, both.manifest.onnx, 1)
    assert not list((cache / "prepacked").iterdir())


def test_two_processes_and_old_ones(both, cache):
    """The second one's files take nobody's place; what was left by killed ones goes."""
    part = both.manifest.onnx
    first = make_prepacked(both, part, 1).stat().st_ino
    old = cache / "prepacked" / ".making-dead"
    old.mkdir()
    os.utime(old, (1, 1))
    for i in range(6):
        (cache / "prepacked" / f"{i:032}").mkdir()
        os.utime(cache / "prepacked" / f"{i:032}", (100 + i, 100 + i))
    assert make_prepacked(both, part, 1).stat().st_ino == first
    left = sorted(path.name for path in (cache / "prepacked").iterdir())
    assert len(left) == 4
    assert f"{5:032}" in left and f"{0:032}" not in left


def test_packed_weights_that_vanish_after_the_plan_are_an_error(both):
    make_prepacked(both, both.manifest.onnx, 1)
    plan = edge_gemma.plan_bundle(both, engine="onnx")
    tuning.forget(both)
    with pytest.raises(RuntimeFailure, match="load again"):
        edge_gemma.Model(both, plan)


# --- tuning ---


def keep(bundle: Bundle, **chosen) -> None:
    """As if it had been measured."""
    best = tuning.Measured(
        **{"engine": "onnx", "n_threads": 1, "n_ubatch": 128} | chosen,
        prefill_tokens_per_s=10.0,
        decode_tokens_per_s=10.0,
    )
    path = tuning.kept_in(bundle)
    path.parent.mkdir(parents=True, exist_ok=True)
    tuned = tuning.Tuned(bundle=bundle.manifest.name, chosen=best, measured=(best,))
    path.write_bytes(msgspec.json.encode(tuned))


def test_what_a_request_leaves_open_is_as_it_was_tuned(both):
    assert edge_gemma.plan_bundle(both).settings.engine == "llama"
    keep(both)
    settings = edge_gemma.plan_bundle(both).settings
    assert (settings.engine, settings.n_threads, settings.n_ubatch) == ("onnx", 1, 128)
    asked = PlanRequest(n_threads=2, n_ubatch=64)
    settings = edge_gemma.plan_bundle(both, request=asked).settings
    assert (settings.engine, settings.n_threads, settings.n_ubatch) == ("onnx", 2, 64)
    assert edge_gemma.plan_bundle(both, engine="llama").settings.engine == "llama"
    assert edge_gemma.plan_bundle(both, device="pi-5-4gb").settings.engine == "llama"
    # what that engine cannot do is done by the other one
    for asked in (
        PlanRequest(kv_type="q8_0"),
        PlanRequest(lora_bytes=5),
        PlanRequest(repack=True),
        PlanRequest(n_seq_max=2),
    ):
        assert edge_gemma.plan_bundle(both, request=asked).settings.engine == "llama"


def test_a_tuned_engine_that_does_not_fit_gives_way(both):
    keep(both)
    device = machine_for("auto")
    smallest = edge_gemma.plan_bundle(both, engine="llama", n_ctx=512).total_bytes
    tight = PlanRequest(budget_bytes=smallest + (1 << 20), n_ctx=512)
    plan = tuning.plan_here(both, device, tight)
    assert plan.fits
    assert plan.settings.engine == "llama"


def test_tuned_threads_count_for_the_engine_they_were_measured_with(both):
    keep(both, engine="llama")
    assert edge_gemma.plan_bundle(both).settings.n_threads == 1
    n = machine_for("auto").n_threads
    assert edge_gemma.plan_bundle(both, engine="onnx").settings.n_threads == n


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"bundle": 3}', b"\xff" * 100])
def test_a_broken_file_is_as_none(both, content):
    keep(both)
    tuning.kept_in(both).write_bytes(content)
    assert tuning.find_tuned(both) is None
    assert edge_gemma.plan_bundle(both).settings.engine == "llama"


def speeds(monkeypatch, onnx: float, llama: float) -> None:
    """Measured tokens per second, in place of a measurement."""

    def measured(asked, request):
        engine = "onnx" if request.engine == "onnx" else "llama"
        speed = onnx if engine == "onnx" else llama
        threads = request.n_threads or 2
        return tuning.Measured(
            engine=engine,
            n_threads=threads,
            n_ubatch=request.n_ubatch or 256,
            prefill_tokens_per_s=speed * threads,
            decode_tokens_per_s=speed * threads,
        )

    monkeypatch.setattr(tuning, "_measure", measured)


@pytest.mark.parametrize(
    ("onnx", "llama", "engine"), [(20, 10, "onnx"), (10, 20, "llama"), (10.1, 10, "llama")]
)
def test_the_faster_engine_is_chosen_where_the_difference_is_clear(
    both, monkeypatch, onnx, llama, engine
):
    speeds(monkeypatch, onnx, llama)
    tuned = tuning.tune(both, pack=False)
    assert tuned.chosen.engine == engine
    assert tuned.chosen.n_threads == 2
    assert tuning.find_tuned(both) == tuned
    assert any("not packed" in said for said in tuned.notes)


def test_a_coarser_decoder_is_not_chosen_for_its_speed(both, monkeypatch):
    speeds(monkeypatch, 20, 10)
    part = msgspec.structs.replace(both.manifest.onnx, recipe="edge_onnx")
    coarse = Bundle(both.folder, msgspec.structs.replace(both.manifest, onnx=part))
    tuned = tuning.tune(coarse, pack=False)
    assert tuned.chosen.engine == "llama"
    assert any("coarser (edge_onnx; the GGUF is q8_0)" in said for said in tuned.notes)


def test_the_command_measures_keeps_and_forgets(both, capsys, monkeypatch):
    done = cli("tune", both.folder, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert {each["engine"] for each in told["measured"]} == {"llama", "onnx"}
    assert find_prepacked(both, both.manifest.onnx) is not None
    speeds(monkeypatch, 20, 10)
    for arguments, said in ((["--no-pack"], "← chosen"), (["--forget"], "MiB removed")):
        with pytest.raises(SystemExit) as left:
            main(["tune", str(both.folder), *arguments])
        assert left.value.code == 0
        assert said in capsys.readouterr().out
    assert tuning.find_tuned(both) is None
    assert find_prepacked(both, both.manifest.onnx) is None


def test_what_cannot_be_tuned_is_refused(embedding_bundle, tiny_bundle):
    done = cli("tune", embedding_bundle)
    assert (done.returncode, "nothing to choose" in done.stderr) == (2, True)
    done = cli("tune", tiny_bundle, "--forget", "--no-pack")
    assert (done.returncode, "not both" in done.stderr) == (2, True)


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_measured(both, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(tuning, "_measure", None)
    with pytest.raises(RuntimeFailure, match="set XDG_CACHE_HOME"):
        tuning.tune(both)


def test_a_bundle_of_one_decoder_finds_its_threads(tiny_bundle):
    tuned = tuning.tune(Bundle.open(tiny_bundle))
    assert {each.engine for each in tuned.measured} == {"llama"}
    assert tuned.notes == ()


def test_pictures_of_gemma_3_stay_with_llama(both):
    keep(both)
    manifest = msgspec.structs.replace(both.manifest, family="gemma3")
    assert tuning._runs_all(manifest, PlanRequest())
    seeing = msgspec.structs.replace(manifest, vision=object())
    assert not tuning._runs_all(seeing, PlanRequest())
    assert tuning._runs_all(seeing, PlanRequest(senses=()))


def test_an_error_of_one_engine_is_told(both, monkeypatch):
    def fails(asked, request):
        raise UsageError("onnxruntime 1.20 is installed")

    speeds(monkeypatch, 20, 10)
    measured = tuning._measure
    monkeypatch.setattr(
        tuning,
        "_measure",
        lambda asked, request: (fails if request.engine == "onnx" else measured)(asked, request),
    )
    tuned = tuning.tune(both, pack=False)
    assert tuned.chosen.engine == "llama"
    assert sum("onnx was not measured: onnxruntime 1.20" in said for said in tuned.notes) == 1
