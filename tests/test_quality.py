"""Calibration, receipts, the ladder and the commands, on models of a few MB."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from checkpoints import write_checkpoint

from edge_gemma.benchmarks.ladder import run as ladder
from edge_gemma.benchmarks.ladder import time_kept
from edge_gemma.bundles.folder import Bundle
from edge_gemma.cli import main
from edge_gemma.convert import imatrix as im
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.convert.quality import compare
from edge_gemma.engines.llama import decoder as decode
from edge_gemma.errors import BundleError, RuntimeFailure, UsageError
from edge_gemma.plan.records import Settings
from edge_gemma.spans import Tokens


@pytest.fixture(scope="module")
def world(tiny_checkpoint, tmp_path_factory):
    """(checkpoint, f32 bundle, text)"""
    folder = tmp_path_factory.mktemp("quality")
    text = folder / "text.txt"
    rng = np.random.default_rng(3)
    text.write_text(
        " ".join("".join(rng.choice(list("abcdefghij"), rng.integers(2, 8))) for _ in range(700))
    )
    return (
        tiny_checkpoint,
        convert(tiny_checkpoint, folder / "f32", Conversion(quant="f32", verify=False)).bundle,
        text,
    )


def test_calibration_measures_what_each_weight_is_multiplied_with(world, tmp_path):
    _, bundle, text = world
    result = im.calibrate(bundle, text, tmp_path / "m.gguf", max_tokens=1200, n_threads=1)
    assert result.n_tokens == 2 * 511 and result.missing == ()
    entries = im.read_imatrix(tmp_path / "m.gguf")
    assert len(entries) == 7 * 7 + 1 and entries["token_embd.weight"].shape == (
        256,
    )  # the tied head is in it
    # the first layer's queries, keys and values see RMS-normed embeddings: that can be computed
    # here
    decoder = decode.Decoder(bundle.decoder_path, Settings(n_ctx=64))
    try:
        ids = decoder.tokenize(text.read_text())[:1022]
        chunks = [[decoder.bos, *ids[:511]], [decoder.bos, *ids[511:]]]
    finally:
        decoder.close()
    tensors = {t.name: t for t in bundle.manifest.decoder.tensors}
    data = bundle.decoder_path.read_bytes()

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        values = np.frombuffer(data, np.float32, tensor.nbytes // 4, tensor.offset)
        return values.reshape(tuple(reversed(tensor.shape)))

    x = read("token_embd.weight")[sum(chunks, [])] * np.sqrt(256)
    normed = (
        x / np.sqrt(np.square(x).mean(1, keepdims=True) + 1e-6) * read("blk.0.attn_norm.weight")
    )
    expected = np.square(normed).mean(0)
    for tensor in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(entries[f"blk.0.{tensor}.weight"], expected, rtol=1e-4)


def test_llama_cpp_reads_our_importance_matrix(world, tmp_path):
    """Through gguf-py, llama.cpp's own reader in Python."""
    from gguf import GGUFReader

    im.write_imatrix(
        tmp_path / "m.gguf",
        {"blk.0.attn_q.weight": (np.arange(256.0), 2)},
        chunks=3,
        chunk_tokens=512,
        datasets=["a.txt"],
    )
    reader = GGUFReader(tmp_path / "m.gguf")
    assert (
        reader.fields["general.type"].contents() == "imatrix"
        and reader.fields["imatrix.chunk_count"].contents() == 3
    )
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    np.testing.assert_array_equal(
        tensors["blk.0.attn_q.weight.in_sum2"].reshape(-1), np.arange(256, dtype=np.float32)
    )
    np.testing.assert_array_equal(
        im.read_imatrix(tmp_path / "m.gguf")["blk.0.attn_q.weight"],
        np.arange(256, dtype=np.float32) / 2,
    )


def test_refusals_of_importance_matrices(world, tmp_path):
    checkpoint, bundle, text = world
    options = lambda path: Conversion(quant="q4_0", imatrix=path, verify=False)  # noqa: E731
    (tmp_path / "old.dat").write_bytes(b"\1\0\0\0")
    for path, message in [
        (tmp_path / "old.dat", "old .dat format"),
        (tmp_path / "none.gguf", "cannot open"),
        (bundle.decoder_path, "not an importance matrix"),
    ]:
        with pytest.raises(BundleError, match=message):
            convert(checkpoint, tmp_path / "out", options(path))
    for entries, message in [
        (
            {"blk.0.attn_q.weight": (np.ones(128), 1)},
            "has 128 columns for 'blk.0.attn_q.weight', this model 256",
        ),
        ({"blk.99.attn_q.weight": (np.ones(256), 1)}, "names none of this model's tensors"),
        ({"blk.0.attn_q.weight": (np.full(256, np.nan), 1)}, "holds NaN"),
    ]:
        im.write_imatrix(tmp_path / "m.gguf", entries, chunks=1, chunk_tokens=1, datasets=["x"])
        with pytest.raises(BundleError, match=message):
            convert(checkpoint, tmp_path / "out", options(tmp_path / "m.gguf"))
    (tmp_path / "short.txt").write_text("few words")
    with pytest.raises(UsageError, match="calibrating needs at least 511"):
        im.calibrate(bundle, tmp_path / "short.txt", tmp_path / "new.gguf")


def test_receipts_are_the_textbook_numbers(world, tmp_path):
    checkpoint, bundle, text = world
    small = convert(checkpoint, tmp_path / "q4", Conversion(quant="q4_0", verify=False)).bundle
    receipts = compare(
        bundle.decoder_path,
        {"same": bundle.decoder_path, "q4": small.decoder_path},
        text,
        max_tokens=600,
        n_threads=1,
    )
    assert (
        receipts["same"].kld_mean < 1e-6
        and receipts["same"].top1_agreement == 1
        and receipts["same"].tokens == 511
    )

    def log_softmax(path):
        decoder = decode.Decoder(
            path, Settings(n_ctx=512, n_ubatch=64, n_threads=1, flash_attention=False)
        )
        try:
            ids = [decoder.bos, *decoder.tokenize(text.read_text())[:511]]
            x = np.concatenate(
                list(decoder.context(n_outputs=64).evaluate([Tokens(tuple(ids))]))
            ).astype(np.float64)[:-1]
        finally:
            decoder.close()
        return x - np.log(np.exp(x).sum(1, keepdims=True)), ids

    (p, ids), (q, _) = log_softmax(bundle.decoder_path), log_softmax(small.decoder_path)
    klds = (np.exp(p) * (p - q)).sum(1)
    got = receipts["q4"]
    np.testing.assert_allclose(got.kld_mean, klds.mean(), rtol=1e-3)
    np.testing.assert_allclose(got.kld_p99, np.percentile(klds, 99), rtol=1e-3)
    assert got.top1_agreement == np.mean(p.argmax(1) == q.argmax(1))
    np.testing.assert_allclose(got.ppl, np.exp(-q[np.arange(511), ids[1:]].mean()), rtol=1e-5)
    np.testing.assert_allclose(
        got.ppl_reference, np.exp(-p[np.arange(511), ids[1:]].mean()), rtol=1e-5
    )


def test_the_receipt_is_in_the_manifest_and_the_reference_is_gone(world, tmp_path):
    checkpoint, _, text = world
    bundle = convert(
        checkpoint,
        tmp_path / "out",
        Conversion(quant="q8_0", check=text, check_tokens=600, n_threads=1),
    ).bundle
    quality = bundle.manifest.quality
    assert (
        quality["tokens"] == 511
        and 0 < quality["kld_mean"] < 0.01
        and quality["text"] == "text.txt"
    )
    assert sorted(path.name for path in bundle.folder.iterdir()) == [
        "decoder.gguf",
        "manifest.json",
    ]


def test_a_cut_vocabulary_is_held_against_the_tokens_that_stay(world, tmp_path):
    """The same weights with fewer tokens diverge in nothing but what went; tokens that went are
    left out of the text for all.
    """
    from edge_gemma.convert.trim.choice import Wanted
    from edge_gemma.convert.trim.cut import read_kept, trim

    _, bundle, text = world
    words = tmp_path / "words.txt"
    words.write_text("the and of to")
    cut = trim(bundle, tmp_path / "cut", Wanted(files=(words,)), measure=False).bundle
    kept = read_kept(cut)
    decoders = {"cut": cut.decoder_path, "whole": bundle.decoder_path}
    found = compare(
        bundle.decoder_path, decoders, text, max_tokens=600, n_threads=1, kept={"cut": kept}
    )
    assert found["cut"].kld_mean == pytest.approx(0.0, abs=1e-9)
    assert found["cut"].ppl <= found["whole"].ppl
    with pytest.raises(UsageError, match="vocabularies of different sizes"):
        compare(bundle.decoder_path, {"cut": cut.decoder_path}, text, max_tokens=600, n_threads=1)


def test_the_ladder_makes_a_table_and_a_plot(world, tmp_path, capsys):
    checkpoint, bundle, text = world
    matrix = tmp_path / "m.gguf"
    main_ok("calibrate", str(bundle.folder), str(text), str(matrix), "--tokens", "600")
    rungs = ladder(
        checkpoint,
        tmp_path / "ladder",
        text,
        ["q8_0", "edge+imatrix", "q8_0@en-sl"],
        imatrix=matrix,
        max_tokens=600,
        rounds=1,
        n_threads=1,
        speed_threads=1,
    )
    assert [rung.recipe for rung in rungs] == ["q8_0", "edge+imatrix", "q8_0@en-sl"]
    assert (
        rungs[0].bits_per_weight < 9
        and rungs[0].decode_tok_s > 0
        and rungs[0].receipt.kld_mean < rungs[1].receipt.kld_mean
    )
    assert sorted(path.name for path in (tmp_path / "ladder").iterdir()) == [
        "ladder.png",
        "table.json",
        "table.md",
    ]
    assert (
        json.loads((tmp_path / "ladder" / "table.json").read_text())[1]["recipe"] == "edge+imatrix"
    )
    assert "| edge+imatrix |" in (tmp_path / "ladder" / "table.md").read_text()
    with pytest.raises(UsageError, match=r"give the importance matrix with --imatrix"):
        ladder(checkpoint, tmp_path / "other", text, ["q4_0+imatrix"])
    with pytest.raises(UsageError, match="'klingon' is not known"):
        ladder(checkpoint, tmp_path / "other", text, ["q4_0@klingon"])
    with pytest.raises(UsageError, match="no recipe 'q9'"):
        ladder(checkpoint, tmp_path / "other", text, ["q9"])
    with pytest.raises(UsageError, match="there is no text .*nowhere.txt"):
        ladder(checkpoint, tmp_path / "other", tmp_path / "nowhere.txt", ["q8_0"])
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(
        UsageError, match="short.txt has .* tokens"
    ):  # known once the reference is there
        ladder(checkpoint, tmp_path / "other", tmp_path / "short.txt", ["q8_0"])
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_speeds_can_be_added_to_a_kept_ladder_later(world, tmp_path, capsys):
    checkpoint, _, text = world
    where = [str(checkpoint), str(tmp_path / "ladder"), str(text), "--recipes", "q8_0,q4_0"]
    main_ok("bench", "ladder", *where, "--rounds", "0", "--keep", "--tokens", "600", "--json")
    quality = json.loads(capsys.readouterr().out)
    assert [rung["decode_tok_s"] for rung in quality] == [0, 0]
    main_ok(
        "bench",
        "ladder",
        *where[:-1],
        "q8_0,q6_k",
        "--add",
        "--rounds",
        "0",
        "--keep",
        "--tokens",
        "600",
        "--json",
    )
    added = json.loads(capsys.readouterr().out)
    assert added[:2] == quality and [rung["recipe"] for rung in added] == ["q8_0", "q4_0", "q6_k"]
    quality = added
    with pytest.raises(UsageError, match="was measured on other text"):
        ladder(
            checkpoint,
            tmp_path / "ladder",
            text,
            ["q5_k_m"],
            max_tokens=1200,
            add=True,
            rounds=0,
            keep=True,
        )
    main_ok("bench", "ladder", *where, "--speed-only", "--rounds", "1", "--json")
    timed = json.loads(capsys.readouterr().out)
    assert all(rung["decode_tok_s"] > 0 and rung["pss_bytes"] > 0 for rung in timed)
    assert [(rung["recipe"], rung["receipt"]) for rung in timed] == [
        (rung["recipe"], rung["receipt"]) for rung in quality
    ]
    assert json.loads((tmp_path / "ladder" / "table.json").read_text()) == timed
    assert sorted(path.name for path in (tmp_path / "ladder").iterdir()) == [
        "ladder.png",
        "table.json",
        "table.md",
    ]  # without --keep the bundles went
    with pytest.raises(UsageError, match="no longer holds the bundles of q8_0, q4_0, q6_k"):
        time_kept(tmp_path / "ladder")
    with pytest.raises(UsageError, match="holds no ladder to go on with"):
        time_kept(tmp_path)


def test_where_a_small_file_cannot_be_written_is_said_before_the_work(world, tmp_path, monkeypatch):
    _, bundle, text = world
    with pytest.raises(UsageError, match="there is no folder .*nowhere to write m.gguf into"):
        im.calibrate(bundle, text, tmp_path / "nowhere" / "m.gguf", max_tokens=600, n_threads=1)
    with pytest.raises(UsageError, match="is a folder; give the name of a file"):
        im.calibrate(bundle, text, tmp_path, overwrite=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RuntimeFailure, match="cannot write .*m.gguf: No space left on device"):
        im.write_imatrix(
            tmp_path / "m.gguf",
            {"blk.0.attn_q.weight": (np.ones(32), 1)},
            chunks=1,
            chunk_tokens=1,
            datasets=["x"],
        )
    assert not list(tmp_path.iterdir())


def main_ok(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 0


def test_commands(world, tmp_path, capsys):
    checkpoint, _, text = world
    main_ok(
        "convert", str(checkpoint), str(tmp_path / "out"), "--quant", "edge", "--dry-run", "--json"
    )
    planned = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    main_ok("convert", str(checkpoint), str(tmp_path / "out"), "--quant", "edge", "--json")
    made = json.loads(capsys.readouterr().out)
    assert made["files"]["decoder.gguf"] == planned["decoder_bytes"] and made["sample"]
    manifest = Bundle.open(tmp_path / "out").manifest
    uses = {tensor.name: (tensor.type, tensor.use) for tensor in manifest.decoder.tensors}
    assert (
        not manifest.decoder.tied_head
        and uses["output.weight"] == ("IQ4_NL", "matmul")
        and uses["token_embd.weight"] == ("Q8_0", "lookup")
    )
    main_ok("convert", str(checkpoint), str(tmp_path / "out"), "--quant", "q4_k_m", "--dry-run")
    assert "memory about" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(checkpoint), str(tmp_path / "out")])
    assert (
        stop.value.code == 2
        and "exists; choose another folder or pass --force" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as stop:
        main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "out2")])
    assert stop.value.code == 3 and "is not a folder" in capsys.readouterr().err
    main_ok("convert", "--list-recipes")
    assert "q4_k_m" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_conversion_leaves_no_bundle_and_the_next_run_cleans_up(tmp_path):
    folder = write_checkpoint("g3n", tmp_path / "g3n", keep=lambda name: "_tower" not in name)
    code = (
        "import sys, time\nfrom edge_gemma.convert import decoder\nquantize = "
        "decoder.quantize_rows\n"
        "def slow(*a):\n    time.sleep(0.05)\n    return quantize(*a)\n"
        "decoder.quantize_rows = slow\nfrom edge_gemma.convert.pipeline import "
        "*\nconvert(sys.argv[1], sys.argv[2], Conversion(audio='none', vision='none', "
        "verify=False))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(folder), str(tmp_path / "out")])
    try:
        deadline = time.monotonic() + 60
        partial = lambda: list(tmp_path.glob(".out.partial-*/decoder.gguf"))  # noqa: E731
        while not (partial() and partial()[0].stat().st_size > 0) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert partial() and not (tmp_path / "out").exists()
    convert(folder, tmp_path / "out", Conversion(audio="none", vision="none", verify=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g3n", "out"]


def test_a_full_disk_is_seen_before_work_starts(world, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20)
    )
    with pytest.raises(RuntimeFailure, match=r"needs .* on disk, .* has 1.0 MiB free"):
        convert(world[0], tmp_path / "out", Conversion(quant="q8_0"))
    assert not (tmp_path / "out").exists()
