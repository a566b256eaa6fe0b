"""Plans: pure arithmetic that agrees with what llama.cpp reports, concedes in order, and refuses
with the sum shown.
"""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import edge_gemma
from edge_gemma import cli
from edge_gemma.benchmarks.dev.synthetic import tiny_gguf
from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.manifest import AudioPart, Manifest, VisionPart
from edge_gemma.engines.llama.decoder import Decoder
from edge_gemma.engines.llama.weights import repacked_here
from edge_gemma.errors import PlanRefused, UsageError
from edge_gemma.machine import probe as probing
from edge_gemma.machine.device import load_profile
from edge_gemma.machine.footprint import Footprint
from edge_gemma.machine.probe import probe
from edge_gemma.machine.repack import repacks_for
from edge_gemma.plan.catalogue import catalogue, manifest_of
from edge_gemma.plan.ladder import arithmetic, make_plan
from edge_gemma.plan.records import AFTER_LOAD, Plan, PlanRequest
from edge_gemma.store.importer import import_gguf
from edge_gemma.units import MiB, format_bytes

PI = load_profile("pi-5-4gb")


@pytest.fixture(scope="module", params=["gemma3", "gemma3n"])
def bundle(request, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("plan")
    return import_gguf(tiny_gguf(folder / "x.gguf", request.param), folder / "bundle")


@pytest.fixture(scope="module")
def manifest(bundle) -> Manifest:
    return bundle.manifest


def plan(manifest, request=PlanRequest(), device=PI) -> Plan:
    return make_plan(manifest, device, request, lambda tensor: tensor.type == "Q4_0")


def with_encoders(manifest: Manifest) -> Manifest:
    import msgspec

    audio = AudioPart(
        file="audio.onnx",
        precision="int8",
        n_embd=8,
        weights_bytes=300 * MiB,
        activation_bytes=50 * MiB,
    )
    vision = VisionPart(
        file="vision.onnx",
        kind="siglip",
        precision="f32",
        n_embd=8,
        n_soft_tokens=256,
        image_sizes=(896,),
        mean=0.5,
        std=0.5,
        weights_bytes=400 * MiB,
        activation_bytes={"896": 200 * MiB},
    )
    return msgspec.structs.replace(manifest, audio=audio, vision=vision)


def test_total_is_the_worst_phase_after_load(manifest):
    made = plan(manifest)
    sums = {
        p: sum(i.bytes for i in made.items if p in i.phases and i.kind != "reclaimable")
        for p in AFTER_LOAD
    }
    assert made.total_bytes == max(sums.values()) and made.fits
    assert all(
        isinstance(i.bytes, int)
        and i.bytes > 0
        and set(i.phases)
        and i.kind in ("anon", "file_hot", "file_cold", "reclaimable")
        for i in made.items
    )
    assert made.load_peak_bytes == made.phase_bytes("load")


def test_json_has_what_scripts_read(manifest):
    data = json.loads(json.dumps(dataclasses.asdict(plan(manifest))))
    assert data["fits"] is True and data["total_bytes"] > 0
    assert {"name", "bytes", "kind"} <= set(data["items"][0])


@settings(max_examples=60)
@given(
    a=st.integers(64, 1024),
    b=st.integers(64, 1024),
    ubatch=st.sampled_from([32, 64, 256, 512]),
    kv=st.sampled_from(["f16", "q8_0"]),
    n=st.integers(1, 4),
)
def test_bytes_never_fall_when_the_request_grows(manifest, a, b, ubatch, kv, n):
    small, large = (
        plan(manifest, PlanRequest(n_ctx=c, n_ubatch=ubatch, kv_type=kv, n_seq_max=n)).total_bytes
        for c in sorted((a, b))
    )
    assert small <= large
    assert (
        plan(manifest, PlanRequest(n_ctx=a, n_ubatch=ubatch, kv_type=kv, n_seq_max=n)).total_bytes
        <= plan(
            manifest, PlanRequest(n_ctx=a, n_ubatch=ubatch, kv_type=kv, n_seq_max=n + 1)
        ).total_bytes
    )


@settings(max_examples=60)
@given(budget=st.integers(1, 400 * MiB))
@example(budget=1)
@example(budget=400 * MiB)
def test_a_plan_that_fits_stays_inside_and_one_that_does_not_says_what_would(manifest, budget):
    made = plan(manifest, PlanRequest(budget_bytes=budget))
    assert (
        made.fits == (made.needed_bytes <= made.budget_bytes <= budget)
        and made.total_bytes <= made.needed_bytes
    )
    if not made.fits:
        assert f"{format_bytes(made.budget_bytes)} to spend on pi-5-4gb" in made.refusal
        suggested = re.search(r"nearest that fits: --budget (\d+)MiB --ctx (\d+)", made.refusal)
        nearest = PlanRequest(budget_bytes=int(suggested[1]) * MiB, n_ctx=int(suggested[2]))
        assert plan(manifest, nearest).fits


@pytest.mark.parametrize("n_ctx", [256, 1000])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_kv_and_repacked_bytes_are_what_llama_cpp_reports(bundle, n_ctx, kv_type):
    made = make_plan(
        bundle.manifest,
        probe(),
        PlanRequest(n_ctx=n_ctx, kv_type=kv_type, n_ubatch=128),
        repacked_here,
    )
    decoder = Decoder(bundle.decoder_path, made.settings)
    try:
        context = decoder.context()
        found = decoder.reported_bytes()
    finally:
        decoder.close()
    assert context.settings.n_ctx == n_ctx
    sums = {
        name: sum(i.bytes for i in made.items if i.name.startswith(name))
        for name in ("KV cache", "weights, repacked")
    }
    assert (
        abs(found.get("CPU KV", 0) - sums["KV cache"]) < 20_000
    )  # reported in hundredths of a MiB
    assert abs(found.get("CPU_REPACK model", 0) - sums["weights, repacked"]) < 20_000


def test_the_ladder_is_taken_in_order_and_never_concedes_what_was_named(manifest):
    comfortable = plan(manifest)
    assert comfortable.concessions == ()
    seen = []
    for budget in range(comfortable.needed_bytes, 0, -MiB // 4):
        made = plan(manifest, PlanRequest(budget_bytes=budget))
        if not made.fits:
            break
        if made.concessions and made.concessions not in seen:
            seen.append(made.concessions)
    lengths = [len(c) for c in seen]
    assert lengths == sorted(lengths) and lengths[-1] >= 2
    assert "n_ubatch" in seen[0][0] and any("q8_0" in line for line in seen[-1])
    named = PlanRequest(
        budget_bytes=comfortable.needed_bytes - MiB // 2,
        n_ctx=1024,
        n_ubatch=256,
        kv_type="f16",
        repack=True,
    )
    refused = plan(manifest, named)
    assert not refused.fits and refused.concessions == () and refused.settings.n_ctx == 1024


def test_structured_output_counts_where_it_is_asked_for_and_is_conceded(manifest):
    plain, asked = plan(manifest), plan(manifest, PlanRequest(structured=True))
    (item,) = (item for item in asked.items if item.name == "structured output")
    assert item.bytes == manifest.decoder.n_vocab * 272 and item.kind == "anon"
    assert asked.total_bytes == plain.total_bytes + item.bytes
    frugal = {"n_ctx": 512, "n_ubatch": 64, "kv_type": "q8_0", "repack": False}
    without = plan(manifest, PlanRequest(**frugal))
    budget = without.needed_bytes + item.bytes // 2
    conceded = plan(manifest, PlanRequest(**frugal, budget_bytes=budget, structured=True))
    assert conceded.fits and not conceded.settings.guidance
    assert conceded.concessions == (
        "structured output by llama.cpp's grammar: fewer schema keywords",
    )
    assert plan(manifest, PlanRequest(**frugal, structured=True)).settings.guidance


def test_refusal_prints_the_arithmetic_and_the_nearest_that_fits(manifest):
    named = PlanRequest(n_ctx=1024, n_ubatch=64, kv_type="f16", repack=True)
    budget = plan(manifest, named).needed_bytes - 100_000
    made = plan(manifest, dataclasses.replace(named, budget_bytes=budget))
    with pytest.raises(PlanRefused) as refusal:
        made.require()
    message = str(refusal.value)
    assert (
        "does not fit" in message
        and "KV cache, global layers" in message
        and refusal.value.plan is made
    )
    n_ctx = int(message.split("nearest that fits: --ctx ")[1].split()[0])
    assert 0 < n_ctx < 1024
    assert plan(manifest, dataclasses.replace(named, budget_bytes=budget, n_ctx=n_ctx)).fits
    assert not plan(
        manifest, dataclasses.replace(named, budget_bytes=budget, n_ctx=n_ctx + 256)
    ).fits
    tiny = plan(manifest, PlanRequest(budget_bytes=1, n_ctx=512))
    assert "nearest that fits: --budget" in tiny.refusal
    mib = int(tiny.refusal.split("--budget ")[1].split("MiB")[0])
    assert plan(manifest, PlanRequest(budget_bytes=mib * MiB, n_ctx=512)).fits


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PlanRequest(n_ctx=1 << 20), "a context of 1048576 tokens"),
        (PlanRequest(n_ctx=1), "takes 64"),
        (PlanRequest(kv_type="q2_k"), "KV type 'q2_k'"),
        (PlanRequest(n_ubatch=0), "n_ubatch"),
        (PlanRequest(n_seq_max=0), "parallel sequences"),
        (PlanRequest(n_threads=0), "threads"),
        (PlanRequest(senses=("smell",)), "'smell' is unknown"),
    ],
)
def test_requests_that_mean_nothing_are_usage_errors(manifest, request_, message):
    with pytest.raises(UsageError, match=message):
        plan(manifest, request_)


def test_encoders_count_and_go_one_at_a_time_when_that_is_what_fits(manifest):
    both = with_encoders(manifest)
    everything, text = plan(both), plan(both, PlanRequest(senses=()))
    assert (
        everything.total_bytes - text.total_bytes >= (300 + 400 + 200 - 10) * MiB
    )  # looking is the worst phase
    tight = plan(both, PlanRequest(budget_bytes=everything.needed_bytes - 250 * MiB))
    assert tight.fits and tight.settings.encoders == "one at a time"
    assert any("one at a time" in line for line in tight.concessions)
    for made in (everything, tight):  # the library stays when an encoder is let go
        assert next(item for item in made.items if item.name == "onnxruntime").phases == AFTER_LOAD
    assert all(item.name != "onnxruntime" for item in text.items)
    refused = plan(both, PlanRequest(budget_bytes=text.needed_bytes + MiB))
    assert not refused.fits and "without its audio and vision encoder" in refused.refusal


def hearing_only(manifest: Manifest) -> Manifest:
    import msgspec

    return msgspec.structs.replace(with_encoders(manifest), vision=None)


def in_use(made: Plan, phase: str) -> int:
    return sum(i.bytes for i in made.items if phase in i.phases and i.kind != "reclaimable")


def test_hearing_first_comes_before_a_refusal_and_with_its_price(manifest):
    hears = hearing_only(manifest)
    least = plan(hears, PlanRequest(budget_bytes=1, encoders="resident")).needed_bytes
    usual = plan(hears, PlanRequest(budget_bytes=least))
    assert usual.fits and usual.settings.encoders == "resident"
    made = plan(hears, PlanRequest(budget_bytes=least - 1))
    assert made.fits and made.settings.encoders == "hear first" and not made.settings.repack
    phases = {item.name: item.phases for item in made.items}
    assert phases["weights, mapped"] == ("load", "prefill", "decode")
    assert phases["audio encoder weights"] == ("listen",)
    mapped = sum(t.nbytes for t in hears.decoder.tensors if t.use == "matmul")
    assert next(i.bytes for i in made.items if i.name == "weights, mapped") == mapped
    assert made.total_bytes == max(in_use(made, phase) for phase in AFTER_LOAD) < least
    assert in_use(made, "listen") + mapped > least  # both at once would not fit
    price = made.concessions[0]
    assert price.startswith("hear first") and "300 MiB" in price and format_bytes(mapped) in price
    assert "from a memory card that reads 43 MB/s" in price and "400 MB/s" in price
    board = dataclasses.replace(PI, read_mb_s=10.0)
    price = plan(hears, PlanRequest(budget_bytes=least - 1), board).concessions[0]
    assert "31 s and" in price and "from this board's card that reads 10 MB/s" in price
    assert "while an encoder is open" in arithmetic(made)


def test_hearing_first_begins_at_the_top_of_the_ladder_again():
    """A budget below what both at once need need not cost the context, too."""
    board = load_profile("pi-4-4gb")
    e2b = manifest_of(catalogue().models["e2b"], "edge_fast", ("audio",))

    def planned(mib: int) -> Plan:
        return make_plan(e2b, board, PlanRequest(budget_bytes=mib * MiB), repacks_for(board))

    made = [planned(mib) for mib in (1500, 1580, 1640, 1700, 2200, 2300)]
    assert [p.fits for p in made] == [False, *[True] * 5]
    modes = ["hear first"] * 5 + ["resident"]
    assert [p.settings.encoders for p in made] == modes
    assert [p.settings.n_ctx for p in made] == [512, 512, 2048, 4096, 4096, 2048]
    assert len(made[4].concessions) == 1
    assert "hear first" in made[0].refusal and "79.6 MiB too little" in made[0].refusal
    assert "without its audio encoder" in planned(1560).refusal


def test_hearing_first_is_not_conceded_where_it_cannot_help(manifest):
    hears = hearing_only(manifest)
    least = plan(hears, PlanRequest(budget_bytes=1, encoders="resident")).needed_bytes
    tight = PlanRequest(budget_bytes=least - 1)
    for request in (
        dataclasses.replace(tight, encoders="resident"),
        dataclasses.replace(tight, encoders="one at a time"),
        dataclasses.replace(tight, n_seq_max=2),
        dataclasses.replace(tight, n_gpu_layers=-1),
    ):
        made = plan(hears, request)
        assert made.settings.encoders != "hear first" and not made.fits, request
    mac = dataclasses.replace(PI, can_release=False)
    assert plan(hears, tight, mac).settings.encoders == "resident"
    with pytest.raises(UsageError, match="there are 1 sequences and 0 GPU layers"):
        plan(hears, PlanRequest(encoders="hear first"), mac)
    with pytest.raises(UsageError, match="expected one of resident, one at a time, hear first"):
        plan(hears, PlanRequest(encoders="first"))
    # nothing is heard, so nothing waits
    deaf = plan(hears, PlanRequest(encoders="hear first", senses=()))
    assert deaf.fits and not deaf.concessions


@pytest.mark.compat(
    kind="board",
    what="Gemma 3n E2B with its int8 audio encoder on a Raspberry Pi 4 of 2 GB",
    happens="planned: by the recipe edge_fast it hears first, in a context of 512 tokens",
)
def test_e2b_hears_on_a_board_of_2_gb():
    board = load_profile("pi-4-2gb")
    e2b = manifest_of(catalogue().models["e2b"], "edge_fast", ("audio",))
    made = make_plan(e2b, board, PlanRequest(), repacks_for(board))
    assert made.fits and made.needed_bytes <= board.usable_bytes == 1582.5 * MiB
    assert made.settings.encoders == "hear first" and not made.settings.rescore
    assert "from this board's card that reads 43 MB/s" in made.concessions[0]
    without = make_plan(e2b, board, PlanRequest(encoders="resident"), repacks_for(board))
    assert without.needed_bytes - made.needed_bytes > 600 * MiB  # what the refusal comes down by


@pytest.mark.parametrize("recipe", ["edge_fast", "edge"])
def test_with_a_smaller_vocabulary_e2b_hears_on_2_gb_in_a_whole_context(recipe):
    """95,386 tokens: 50,000 English words with what is made of them."""
    import msgspec

    board, whole = load_profile("pi-4-2gb"), catalogue().models["e2b"]
    cut = msgspec.structs.replace(whole, dims=whole.dims | {"n_vocab": 95_386})
    made = make_plan(manifest_of(cut, recipe, ("audio",)), board, PlanRequest(), repacks_for(board))
    assert made.fits and made.settings.encoders == "hear first" and made.settings.rescore
    assert (made.settings.n_ctx, made.settings.kv_type) == (4096, "f16")
    assert len(made.concessions) == 1


def test_where_pages_cannot_be_released_the_whole_file_counts(manifest):
    mac = dataclasses.replace(PI, can_release=False)
    assert plan(manifest, device=mac).total_bytes > plan(manifest).total_bytes
    assert any("cannot" in note for note in plan(manifest, device=mac).notes)


def test_headroom_is_kept_beside_repacked_weights_only(manifest):
    with_copies, without = (
        plan(manifest, PlanRequest(repack=True)),
        plan(manifest, PlanRequest(repack=False)),
    )
    assert (
        with_copies.needed_bytes > with_copies.total_bytes
        and without.needed_bytes == without.total_bytes
    )
    assert "headroom" in arithmetic(with_copies) and "headroom" not in arithmetic(without)


def test_a_budget_beyond_the_device_is_lowered_and_said(manifest):
    made = plan(manifest, PlanRequest(budget_bytes=1 << 50))
    assert made.budget_bytes == PI.usable_bytes and "lowered" in made.notes[0]


def test_plan_load_and_doctor_see_the_same_machine(bundle, monkeypatch, capsys):
    """A cgroup leaves 260 MiB beside the 24 MiB that Python holds: all plan with 284 MiB."""
    tight = dataclasses.replace(probe(), limit_bytes=300 * MiB, headroom_bytes=260 * MiB)
    held = Footprint(40 * MiB, 40 * MiB, 24 * MiB, 16 * MiB)
    monkeypatch.setattr(probing, "probe", lambda: tight)
    monkeypatch.setattr(probing, "footprint", lambda exact: held)

    def said(*arguments: str) -> dict:
        with pytest.raises(SystemExit) as end:
            cli.main([*arguments, "--json"])
        assert not end.value.code
        return json.loads(capsys.readouterr().out)

    with edge_gemma.load(bundle, n_ctx=256) as model:
        assert model.plan.budget_bytes == 284 * MiB
    assert said("plan", str(bundle.folder), "--ctx", "256")["budget_bytes"] == 284 * MiB
    assert said("doctor")["device"]["usable_bytes"] == 284 * MiB
    assert said("profiles", "auto")["usable_bytes"] == 284 * MiB
