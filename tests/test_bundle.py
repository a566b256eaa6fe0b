"""Bundles: what a manifest may say, what is checked when, and that a bundle appears whole or not at
all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_gemma.bundles.folder import Bundle, BundleWriter
from edge_gemma.bundles.manifest import (
    MANIFEST,
    VERSION,
    decode_manifest,
    encode_manifest,
)
from edge_gemma.errors import BundleError, HashMismatch, UsageError


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    """A private copy of the tiny bundle to damage."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def edit(folder, change) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_round_trip(copy):
    manifest = Bundle.open(copy).manifest
    assert decode_manifest(encode_manifest(manifest)) == manifest


def test_a_manifest_of_before_end_tokens_and_sampling_opens(copy):
    edit(copy, lambda m: (m.pop("end_tokens", None), m.pop("sampling", None)))
    manifest = Bundle.open(copy).manifest
    assert manifest.end_tokens == () and manifest.sampling is None


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "..\\up", ""])
def test_paths_stay_inside(copy, path):
    edit(copy, lambda m: m["files"].update({path: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(BundleError, match="stay inside"):
        Bundle.open(copy)


def test_a_link_out_of_the_folder_is_refused(copy, tmp_path):
    outside = tmp_path / "outside.gguf"
    (copy / "decoder.gguf").rename(outside)
    (copy / "decoder.gguf").symlink_to(outside)
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=VERSION + 1), "upgrade edge-gemma"),
        (lambda m: m.update(format="other"), "format 'other'"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.pop("decoder"), "decoder"),
        (lambda m: m["decoder"].update(n_layer=0), "n_layer"),
        (lambda m: m["decoder"].update(n_embd=1 << 40), "n_embd"),
        (lambda m: m["decoder"].update(file="other.gguf"), "does not list"),
        (lambda m: m["decoder"].update(header_bytes=1 << 50), "header_bytes"),
        (lambda m: m["decoder"]["tensors"][0].update(nbytes=1 << 50), "ends at byte"),
        (lambda m: m["decoder"]["tensors"][0].update(use="sometimes"), "use"),
        (lambda m: m["files"]["decoder.gguf"].update(sha256="short"), "sha256"),
        (lambda m: m.update(end_tokens=[1, 1 << 20]), "end_tokens holds 1048576"),
        (lambda m: m.update(end_tokens=[-1]), "end_tokens holds -1"),
        (lambda m: m.update(sampling={"temperature": -1.0}), "sampling.temperature is -1"),
        (lambda m: m.update(sampling={"top_p": 1.5}), "sampling.top_p is 1.5"),
        (lambda m: m.update(sampling={"beams": 4}), "beams"),
        (
            lambda m: m["files"]["decoder.gguf"].update(size=5),
            "header_bytes|ends at byte|truncated",
        ),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(copy, change, message):
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


def test_missing_truncated_and_damaged_files(copy):
    decoder = copy / "decoder.gguf"
    data = decoder.read_bytes()
    decoder.write_bytes(data[:-10])
    with pytest.raises(BundleError, match="truncated or replaced"):
        Bundle.open(copy)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    decoder.write_bytes(flipped)
    bundle = Bundle.open(copy)  # same size: only the hash can tell
    bundle.check_header()
    with pytest.raises(HashMismatch, match="changed or damaged"):
        bundle.verify()
    flipped = bytearray(data)
    flipped[40] ^= 1
    decoder.write_bytes(flipped)
    with pytest.raises(HashMismatch, match="header"):
        Bundle.open(copy).check_header()
    decoder.unlink()
    with pytest.raises(BundleError, match="lacks decoder.gguf"):
        Bundle.open(copy)


def test_what_is_no_bundle_says_what_to_do(tmp_path):
    with pytest.raises(BundleError, match="edge-gemma ls"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match="has no manifest.json"):
        Bundle.open(tmp_path)


@settings(max_examples=300)
@given(data=st.data())
def test_no_bytes_make_the_manifest_reader_fall_over(tiny_bundle, data):
    good = (tiny_bundle / MANIFEST).read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    piece = data.draw(
        st.one_of(
            st.binary(max_size=8),
            st.sampled_from(
                [b"null", b"-1", b"1e400", b'"\\ud800"', b"[[[[", b"{" * 5000, b"9" * 40]
            ),
        )
    )
    damaged = good[:at] + piece + good[at + data.draw(st.integers(0, 12)) :]
    try:
        decode_manifest(damaged)
    except BundleError:
        pass


def test_a_writer_publishes_whole_or_not_at_all(tmp_path, tiny_bundle):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        with BundleWriter(out) as writer:
            (writer.folder / "decoder.gguf").write_bytes(b"half")
            raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    manifest = Bundle.open(tiny_bundle).manifest
    with BundleWriter(out) as writer:
        for name in manifest.files:
            shutil.copy(tiny_bundle / name, writer.folder / name)
        assert not out.exists()
        writer.commit(msgspec.structs.replace(manifest, name="first"))
    assert sorted(os.listdir(tmp_path)) == ["out"] and Bundle.open(out).manifest.name == "first"
    with pytest.raises(UsageError, match="--force"):
        BundleWriter(out)
    with BundleWriter(out, overwrite=True) as writer:
        for name in manifest.files:
            shutil.copy(tiny_bundle / name, writer.folder / name)
        writer.commit(msgspec.structs.replace(manifest, name="second"))
    assert sorted(os.listdir(tmp_path)) == ["out"] and Bundle.open(out).manifest.name == "second"


def test_a_killed_writer_is_cleaned_up_by_the_next(tmp_path):
    code = (
        "import os, sys; from edge_gemma.bundles.folder import BundleWriter; w = "
        "BundleWriter(sys.argv[1]).__enter__(); (w.folder/'x').write_bytes(b'1'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert len(os.listdir(tmp_path)) == 1
    with BundleWriter(tmp_path / "out"):
        assert len(os.listdir(tmp_path)) == 1  # only the new one


def test_a_full_disk_leaves_nothing_behind(tmp_path, tiny_bundle):
    """A file-size limit stands in for the full disk: the write fails with an OSError too."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from edge_gemma.store.importer import import_gguf\n"
        "from edge_gemma.errors import RuntimeFailure\n"
        "try: import_gguf(sys.argv[1], sys.argv[2], relayout=True)\n"
        "except RuntimeFailure as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle / "decoder.gguf"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert "nothing was left behind" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []
