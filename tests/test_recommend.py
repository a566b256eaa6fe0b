"""Which model suits a machine: the catalogue against the converter, the ranking, the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edge_gemma.benchmarks.dev.catalogue import catalogue as made
from edge_gemma.cli import main
from edge_gemma.errors import UsageError
from edge_gemma.machine.bandwidth import decode_bytes_per_second
from edge_gemma.machine.device import Device, load_profile, profile_names
from edge_gemma.machine.repack import repacks_for
from edge_gemma.plan.catalogue import catalogue, encoder_bytes, manifest_of
from edge_gemma.plan.ladder import make_plan
from edge_gemma.plan.recommend import candidates, recommend
from edge_gemma.plan.records import PlanRequest
from edge_gemma.units import MiB

SHIPPED = Path(__file__).parent.parent / "edge_gemma" / "plan" / "catalogue.json"
SMALL = Device("test", "a board", 512 * MiB, 400 * MiB)


def on(device, purpose="text", **options):
    return recommend(candidates(purpose), device, repacks_for(device), purpose=purpose, **options)


def cli(*arguments, capsys):
    """(exit code, stdout, stderr) of ``edge-gemma recommend``."""
    with pytest.raises(SystemExit) as exit:
        main(["recommend", *arguments])
    return (exit.value.code or 0, *capsys.readouterr())


def test_the_shipped_catalogue_is_what_the_recipes_give():
    # python -m edge_gemma.benchmarks.dev.catalogue edge_gemma/plan/catalogue.json
    assert json.loads(SHIPPED.read_text()) == made()


def test_the_catalogue_gives_the_measured_sizes():
    """docs/data/recipes.json: the MiB that converting real 270M wrote."""
    rows = json.loads((SHIPPED.parent.parent.parent / "docs/data/recipes.json").read_text())["rows"]
    written = {row[0].removesuffix("+imatrix"): int(row[1]) for row in rows}
    model = catalogue().models["270m"]
    for recipe in model.types:
        size = manifest_of(model, recipe, ()).files["decoder.gguf"].size
        assert size / MiB == pytest.approx(written[recipe], rel=0.01), recipe


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("purpose", ["text", "voice", "pictures"])
def test_every_choice_is_a_plan_that_fits_its_board(profile, purpose):
    device = load_profile(profile)
    fitting, others = on(device, purpose)
    assert all(choice.plan.needed_bytes <= device.usable_bytes for choice in fitting)
    assert not any(choice.plan.fits for choice in others)
    assert len(fitting) + len(others) == len(list(candidates(purpose)))
    if purpose == "voice":
        assert all("3n" in choice.candidate.title for choice in fitting + others)


def test_levels_rank_by_what_they_are_named_after():
    device = load_profile("pi-5-8gb")
    by_level = {
        level: on(device, level=level, bytes_per_second=10e9)[0]
        for level in ("efficiency", "balanced", "performance")
    }
    needed = [choice.plan.needed_bytes for choice in by_level["efficiency"]]
    assert needed == sorted(needed)
    best = by_level["performance"][0]
    assert best.candidate.title == "Gemma 3n E4B" and best.plan.settings.n_ctx == 16384
    followed = by_level["balanced"][0]
    assert followed.tok_s >= 5 > best.tok_s  # E4B is more capable, and too slow to follow
    assert by_level["efficiency"][0].plan.settings.n_ctx == 2048


def test_a_cramped_context_comes_after_a_useful_one():
    for choice in on(load_profile("pi-5-4gb"), "voice", level="performance")[0][:1]:
        assert choice.plan.settings.n_ctx >= 1024


def test_speed_follows_the_bytes_that_a_token_reads():
    fast, slow = (on(SMALL, bytes_per_second=rate)[0] for rate in (10e9, 1e9))
    speeds = {c.candidate.recipe: c.tok_s for c in slow}
    for choice in fast:
        assert choice.tok_s == pytest.approx(10 * speeds[choice.candidate.recipe])
    assert all(choice.tok_s is None for choice in on(SMALL)[0])
    assert on(SMALL)[0][0].speed_class == "unknown"


def test_languages_make_the_same_model_smaller_and_faster():
    """Published models are planned with a vocabulary cut to what must be spoken."""
    whole = {c.title + c.recipe: c for c in candidates("text")}
    for cut in candidates("text", ("en", "sl")):
        other = whole[cut.title + cut.recipe].manifest
        assert cut.manifest.decoder.n_vocab < 0.5 * other.decoder.n_vocab
        assert cut.manifest.files["decoder.gguf"].size < other.files["decoder.gguf"].size
    device = load_profile("pi-4-2gb")
    (best, *_), _ = recommend(
        candidates("text", ("en",)), device, repacks_for(device), bytes_per_second=4e9
    )
    assert best.candidate.languages == ("en",)
    (same, *_), _ = recommend(
        [
            c
            for c in whole.values()
            if c.title + c.recipe == best.candidate.title + best.candidate.recipe
        ],
        device,
        repacks_for(device),
        bytes_per_second=4e9,
    )
    assert best.plan.needed_bytes < same.plan.needed_bytes
    assert best.tok_s > same.tok_s
    with pytest.raises(UsageError, match="'slo' is not known; did you mean"):
        list(candidates("text", ("slo",)))


def test_the_command_cuts_the_vocabulary(capsys):
    code, out, _ = cli("--device", "pi-4-2gb", "--languages", "en,sl", capsys=capsys)
    assert code == 0
    assert "en,sl" in out
    assert "--languages en,sl" in out
    code, _, err = cli("--device", "pi-4-2gb", "--languages", "klingon", capsys=capsys)
    assert code == 2
    assert "klingon" in err


def test_nonsense_is_refused():
    with pytest.raises(UsageError, match="purpose 'smell'"):
        list(candidates("smell"))
    model = catalogue().models["270m"]
    with pytest.raises(UsageError, match="level 'turbo' is unknown"):
        make_plan(
            manifest_of(model, "edge", ()), SMALL, PlanRequest(level="turbo"), lambda t: False
        )


def test_this_machines_bandwidth_is_a_speed():
    assert 1e8 < decode_bytes_per_second(SMALL) < 1e13


def test_encoders_count_on_disk():
    model = catalogue().models["e2b"]
    assert encoder_bytes(manifest_of(model, "edge", ())) == 0
    assert encoder_bytes(manifest_of(model, "edge", ("audio",))) == 636 * MiB


def test_the_command_says_what_to_type(capsys):
    code, out, _ = cli("--device", "pi-4-2gb", capsys=capsys)
    assert code == 0
    assert "Gemma 3 1B" in out and "edge-gemma convert gemma-3-1b-it" in out
    assert "do not fit" in out and "published of this board" in out


def test_the_command_as_json(capsys):
    line = ["--device", "pi-5-4gb", "--for", "voice", "--level", "efficiency", "--json"]
    code, out, _ = cli(*line, capsys=capsys)
    found = json.loads(out)
    assert code == 0 and found["level"] == "efficiency" and found["fits"][0]["n_ctx"] <= 2048


def test_nothing_fits(capsys):
    code, out, _ = cli("--device", "pi-zero-2w-512mb", "--for", "voice", capsys=capsys)
    assert code == 4 and "the smallest of them, Gemma 3n E2B" in out


def test_an_unknown_purpose(capsys):
    code, _, err = cli("--for", "smell", capsys=capsys)
    assert code == 2 and "expected one of text, voice, pictures" in err


def test_an_installed_bundle_is_among_them(tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EDGE_GEMMA_HOME", str(tmp_path))
    (tmp_path / "bundles").mkdir()
    shutil.copytree(tiny_bundle, tmp_path / "bundles" / "mine")
    code, out, _ = cli("--device", "pi-4-2gb", "--level", "efficiency", capsys=capsys)
    assert code == 0 and "(installed)" in out and "edge-gemma chat mine --level efficiency" in out
