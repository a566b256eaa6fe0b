"""Pulling from a stand-in hub on loopback: resume, checksums, offline, and what people are told
when it fails.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import threading
from collections import namedtuple

import pytest
from ggufs import Parts
from hubserver import COMMIT, serve
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from edge_gemma.bundles.folder import Bundle
from edge_gemma.cli import app as cli
from edge_gemma.errors import BundleError, HashMismatch, HubError, RuntimeFailure, UsageError
from edge_gemma.store import hub
from edge_gemma.store import installed as store
from edge_gemma.store.pull import fetch_checkpoint, pull
from edge_gemma.store.reference import Reference, parse_reference

runner = CliRunner()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    from edge_gemma.benchmarks.dev.synthetic import tiny_gguf

    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf")


@pytest.fixture(scope="module")
def bundle(gguf):
    from edge_gemma.store.importer import import_gguf

    return import_gguf(gguf, gguf.parent / "bundle", name="tiny")


@pytest.fixture
def server(gguf, bundle, tmp_path, monkeypatch):
    """A hub with a GGUF in org/one, two in org/many, and a bundle in org/bundle and org/bundle:sub;
    an empty store and cache.
    """
    from huggingface_hub import constants

    monkeypatch.setenv("EDGE_GEMMA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda s: None)
    with serve() as found:
        found.add("org/one", gguf)
        found.files["org/one"]["README.md"] = b"hello"
        found.add("org/many", gguf)
        found.files["org/many"] |= {
            "tiny-Q4_0.gguf": b"x" * 10,
            "mmproj-tiny.gguf": b"x",
            "big-00001-of-00002.gguf": b"x",
        }
        found.add("org/bundle", bundle.folder)
        found.add("org/bundle", bundle.folder, "sub")
        found.files["org/checkpoint"] = {"model.safetensors": b"x", "config.json": b"{}"}
        found.files["org/empty"] = {"README.md": b"x"}
        yield found


def get(server, reference, **options):
    return pull(reference, endpoint=server.url, **options)


def stop_after(n_bytes):
    def on_progress(what, done, total):
        if what == "downloading" and n_bytes <= done < total:
            raise KeyboardInterrupt

    return on_progress


# ---- references


@pytest.mark.parametrize(
    "text, expected",
    [
        ("org/name", Reference("org/name")),
        ("org/name@v1", Reference("org/name", "v1")),
        ("org/name:file.gguf", Reference("org/name", path="file.gguf")),
        ("org/name@refs/pr/1:a/b.gguf", Reference("org/name", "refs/pr/1", "a/b.gguf")),
        ("hf.co/org/name:Q4_0", Reference("org/name", path="Q4_0")),
        ("https://huggingface.co/org/name", Reference("org/name")),
        ("https://huggingface.co/org/name/tree/v1/sub", Reference("org/name", "v1", "sub")),
        (
            "https://huggingface.co/org/name/resolve/main/a%20b.gguf?download=true",
            Reference("org/name", "main", "a b.gguf"),
        ),
    ],
)
def test_references(text, expected):
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "a/b/c",
        "/etc/passwd",
        "../x/y",
        "https://example.org/a/b",
        "org/name:../../x.gguf",
        "org/..",
        "org/name:a\\b",
    ],
)
def test_what_is_no_reference(text):
    with pytest.raises(UsageError, match="write it like org/name|leads out of the repository"):
        parse_reference(text)


@given(
    st.text(alphabet="abz09AZ/:@._-~%?#\\ \0é", max_size=40)
    | st.from_regex(r"https://huggingface\.co/[a-z./%2E]{1,30}", fullmatch=True)
)
def test_no_reference_leads_out_of_its_repository(text):
    try:
        found = parse_reference(text)
    except UsageError:
        return
    assert (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", found.repository)
        and ".." not in found.path.split("/")
        and not found.path.startswith("/")
    )


# ---- pulling


def test_a_gguf_becomes_a_bundle(server, gguf):
    bundle = get(server, "org/one")
    assert (
        bundle.folder == store.bundles() / "tiny-Q8_0"
        and bundle.decoder_path.read_bytes() == gguf.read_bytes()
    )
    assert bundle.manifest.source.origin == "org/one@0123456:tiny-Q8_0.gguf"
    assert (
        store.unfinished() == [] and bundle.decoder_path.stat().st_nlink == 1
    )  # one copy on the disk
    (entry,) = store.ls()
    assert (entry.name, entry.family, entry.problem) == (
        "tiny-Q8_0",
        "gemma3",
        "",
    ) and entry.size_bytes > gguf.stat().st_size


@pytest.mark.parametrize(
    "reference", ["org/many:tiny-Q8_0.gguf", "org/many:q8_0", "org/many@v1:tiny-Q8_0.gguf"]
)
def test_one_gguf_of_many(server, reference):
    assert get(server, reference).folder.name == "tiny-Q8_0"


@pytest.mark.parametrize(
    "reference, name, path",
    [
        ("org/bundle", "bundle", ""),
        ("org/bundle:sub", "sub", "sub"),
        (f"org/bundle@{COMMIT}", "bundle", ""),
    ],
)
def test_a_bundle(server, bundle, reference, name, path):
    found = get(server, reference)
    assert found.folder == store.bundles() / name and found.manifest == bundle.manifest
    assert store.read_pulled(found.folder) == store.Pulled("org/bundle", COMMIT, path)


ALIKE = (
    "x-Q6_K.gguf",
    "x-Q6_K_L.gguf",
    "x-Q2_K.gguf",
    "x-Q2_K_S.gguf",
    "x-UD-Q2_K_XL.gguf",
    "x-IQ2_M.gguf",
    "x-Q4_K_M.gguf",
    "x-qat-Q4_K_M.gguf",
    "x-Q5_K_M-imat.gguf",
    "x-BF16.gguf",
    "x.F16.gguf",
    "x-F16-00001-of-00002.gguf.part",
    "big-Q8_0-00001-of-00002.gguf",
    "big-Q8_0-00002-of-00002.gguf",
    "MXFP4/x-1.gguf",
    "mmproj-x-F16.gguf",
)


@pytest.fixture
def alike(server, gguf):
    """A repository of files whose names hold each other's quantization."""
    server.files["org/alike"] = {name: gguf.read_bytes() for name in ALIKE}
    return server


@pytest.mark.compat(
    kind="gguf", what="`pull ORG/NAME:Q6_K` beside Q6_K_L", happens="exactly that file"
)
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("Q6_K", "x-Q6_K"),
        ("q6_k", "x-Q6_K"),
        ("Q6_K_L", "x-Q6_K_L"),
        ("Q2_K", "x-Q2_K"),
        ("Q2_K_S", "x-Q2_K_S"),
        ("Q2_K_XL", "x-UD-Q2_K_XL"),
        ("UD-Q2_K_XL", "x-UD-Q2_K_XL"),
        ("IQ2_M", "x-IQ2_M"),
        ("Q5_K_M", "x-Q5_K_M-imat"),
        ("BF16", "x-BF16"),
        ("F16", "x.F16"),
        ("f16", "x.F16"),
        ("x.F16.gguf", "x.F16"),
        ("MXFP4", "x-1"),
        ("qat", "x-qat-Q4_K_M"),
        ("x-Q4_K_M", "x-Q4_K_M"),
    ],
)
def test_a_quantization_names_exactly_one_file(alike, part, name):
    bundle = get(alike, f"org/alike:{part}")
    (path,) = [path for path in ALIKE if path.endswith(f"{name}.gguf") and "mmproj" not in path]
    assert bundle.folder.name == name
    assert store.read_pulled(bundle.folder) == store.Pulled("org/alike", COMMIT, path)


@pytest.mark.compat(
    kind="gguf", what="`pull` with a name that fits none or several", happens="refused with a list"
)
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("Q6", "has no files for 'Q6'; its GGUF files: .*x-Q6_K.gguf"),
        ("Q2_K_M", "has no files for 'Q2_K_M'"),
        ("F32", "has no files for 'F32'"),
        ("K_M", "has 3 files for 'K_M'"),
        ("Q4_K_M", "has 2 files for 'Q4_K_M'"),
        ("Q6_K.gguf", "has no files for 'Q6_K.gguf'"),
        ("Q8_0", "one part of a split GGUF"),
    ],
)
def test_no_other_file_is_taken_for_it(alike, part, message):
    with pytest.raises(HubError, match=message):
        get(alike, f"org/alike:{part}")
    assert store.ls() == []


def test_what_is_installed_is_taken_for_nothing_else(alike):
    get(alike, "org/alike:BF16")
    get(alike, "org/alike:Q6_K_L")
    get(alike, "org/alike:Q5_K_M-imat")
    assert get(alike, "org/alike:F16").folder.name == "x.F16"
    assert get(alike, "org/alike:Q6_K").folder.name == "x-Q6_K"
    alike.files["org/alike"]["x-Q5_K_M.gguf"] = alike.files["org/alike"]["x-Q6_K.gguf"]
    assert get(alike, "org/alike:Q5_K_M").folder.name == "x-Q5_K_M"
    alike.requests.clear()
    assert get(alike, "org/alike:bf16").folder.name == "x-BF16"
    assert get(alike, "org/alike:x.F16.gguf").folder.name == "x.F16"
    assert alike.requests == []


def test_what_is_installed_is_not_asked_for_again(server):
    first = get(server, "org/one")
    server.requests.clear()
    for reference in ("org/one", "org/one:tiny-Q8_0.gguf", "org/one:q8_0", f"org/one@{COMMIT[:7]}"):
        assert get(server, reference).folder == first.folder
    assert server.requests == []
    get(server, "org/one", force=True)
    assert len(server.downloads()) == 1


def test_what_is_installed_as_base_weights_is_not_taken_for_instruct_ones(server):
    assert not get(server, "org/one").manifest.instruct
    with pytest.raises(UsageError, match="installed already, as base weights; add --force"):
        get(server, "org/one", instruct=True)
    assert get(server, "org/one", instruct=True, force=True).manifest.instruct
    assert get(server, "org/one", instruct=True).manifest.instruct


@pytest.mark.compat(
    kind="gguf", what="`pull` of a GGUF that needs a repair", happens="the bundle's copy is right"
)
def test_a_pulled_file_is_repaired(server, gguf, tmp_path):
    """The hub's hash is that of the file, not of the copy."""
    bare = Parts.read(gguf).with_value("gemma3.rope.freq_base", None)
    server.files["org/bare"] = {"x.gguf": bare.write(tmp_path / "x.gguf").read_bytes()}
    bundle = get(server, "org/bare")
    assert bundle.manifest.notes[0] == "gemma3.rope.freq_base is missing; written as 1e+06"
    bundle.verify()
    server.damage = True
    with pytest.raises((HashMismatch, BundleError)):
        get(server, "org/bare", name="other")
    assert [entry.name for entry in store.ls()] == ["x"]


def test_names(server):
    assert get(server, "org/one", name="mine").folder.name == "mine"
    with pytest.raises(
        UsageError,
        match="'mine' is installed already, from org/one; use --name for another name, --force to "
        "replace it",
    ):
        get(server, "org/bundle", name="mine")
    assert get(server, "org/bundle", name="mine", force=True).manifest.name == "tiny"
    with pytest.raises(UsageError, match="is no name for a bundle"):
        get(server, "org/one", name="../x")


@pytest.mark.parametrize("reference", ["org/one", "org/bundle"])
def test_an_interrupted_pull_goes_on_where_it_stopped(server, gguf, reference):
    size = gguf.stat().st_size
    with pytest.raises(KeyboardInterrupt):
        get(server, reference, on_progress=stop_after(size // 2))
    assert store.ls() == []
    (begun,) = store.unfinished()
    assert size // 2 <= begun[1] < size + 65536
    server.requests.clear()
    assert get(server, reference).decoder_path.stat().st_size == size
    resumed = [
        int(range.removeprefix("bytes=").rstrip("-")) for name, range in server.downloads() if range
    ]
    assert len(resumed) == 1 and resumed[0] > 0 and store.unfinished() == []


def test_a_server_without_ranges_starts_over(server, gguf):
    with pytest.raises(KeyboardInterrupt):
        get(server, "org/one", on_progress=stop_after(1))
    server.ignore_range = True
    assert get(server, "org/one").decoder_path.read_bytes() == gguf.read_bytes()


def test_a_line_that_keeps_breaking_still_gets_there(server, gguf):
    server.cut_after = gguf.stat().st_size // 3
    assert get(server, "org/one").decoder_path.read_bytes() == gguf.read_bytes()
    assert len(server.downloads()) >= 3


@pytest.mark.parametrize("reference", ["org/one", "org/bundle"])
@pytest.mark.parametrize("force", [False, True])
def test_damage_on_the_way_is_found_and_deleted(server, reference, force):
    server.damage = True
    with pytest.raises(
        (HashMismatch, BundleError),
        match="damaged and was deleted; pull it again|is not a manifest",
    ):
        get(server, reference, force=force)
    assert store.ls() == []
    server.damage = False
    get(server, reference)


@pytest.mark.parametrize("reference", ["org/one", "org/bundle"])
@pytest.mark.parametrize("relayout", [False, True])
def test_a_damaged_replacement_leaves_what_was_there(server, reference, relayout):
    good = get(server, reference)
    server.damage = True
    with pytest.raises((HashMismatch, BundleError)):
        get(server, reference, force=True, relayout=relayout)
    Bundle.open(good.folder).verify()


def test_two_at_once(server):
    done = []
    threads = [
        threading.Thread(target=lambda: done.append(get(server, "org/one").folder.name))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == ["tiny-Q8_0"] * 2 and len(server.downloads()) == 1


def test_a_checkpoint_that_embeds_comes_with_its_layers(server):
    layers = ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors")
    other = ("onnx/model.safetensors", "2_Dense/pytorch_model.bin")
    server.files["org/checkpoint"] |= dict.fromkeys((*layers, *other), b"x")
    folder = fetch_checkpoint("org/checkpoint", endpoint=server.url)
    assert all((folder / path).is_file() for path in layers)
    assert not any((folder / path).exists() for path in other)


@pytest.mark.parametrize("cached", [False, True])
def test_a_checkpoint_for_convert(server, tmp_path, cached):
    server.files["org/checkpoint"] |= {
        "evil.pkl": b"x",
        "pytorch_model.bin": b"x",
        "onnx/model.safetensors": b"x",
        "tokenizer.model": b"x",
    }
    if cached:
        cache(tmp_path, "org/checkpoint", server.files["org/checkpoint"])
    folder = fetch_checkpoint("org/checkpoint", endpoint=server.url)
    assert {"model.safetensors", "config.json", "tokenizer.model"} <= {
        path.name for path in folder.iterdir()
    }
    assert sorted(name for name, _ in server.downloads()) == (
        [] if cached else ["config.json", "model.safetensors", "tokenizer.model"]
    )
    with pytest.raises(HubError, match="org/one holds no safetensors.*edge-gemma pull org/one"):
        fetch_checkpoint("org/one", endpoint=server.url)


# ---- offline


def gone(server):
    server.status = 503


def cache(tmp_path, repository, files):
    """What another program left in the hub's own cache."""
    snapshot = (
        tmp_path / "cache" / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT
    )
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for n, (name, data) in enumerate(files.items()):
        (blobs / str(n)).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(n))


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("reference", ["org/one", "org/bundle"])
def test_the_hubs_own_cache_is_used(server, tmp_path, gguf, reference, offline):
    cache(tmp_path, reference, server.files[reference])
    if offline:
        gone(server)
    assert get(server, reference).decoder_path.read_bytes() == gguf.read_bytes()
    assert server.downloads() == []


def test_offline_without_it_says_so(server):
    gone(server)
    with pytest.raises(
        HubError,
        match="the hub answered 503 for org/one; try again later, what has arrived is kept",
    ):
        get(server, "org/one")
    with pytest.raises(
        HubError,
        match=r"cannot reach the hub for org/one \(ConnectError.*Installed bundles \(`edge-gemma "
        r"ls`\) work offline",
    ):
        pull("org/one", endpoint="http://127.0.0.1:9")


def test_offline_mode_is_respected(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        get(server, "org/one")
    assert server.requests == []


# ---- what goes wrong


@pytest.mark.parametrize(
    "reference, message",
    [
        ("org/none", "there is no org/none on the hub, or it is private"),
        ("org/one@v7", "org/one has no revision 'v7'"),
        (
            "org/many",
            r"org/many@0123456 has 3 GGUF files; name one, like org/many:.*tiny-Q8_0.gguf \(",
        ),
        ("org/many:q5", "has no files for 'q5'; its GGUF files: big"),
        ("org/many:tiny", "has 2 files for 'tiny'"),
        ("org/many:big-00001-of-00002.gguf", "one part of a split GGUF"),
        (
            "org/checkpoint",
            "is a checkpoint, neither a bundle nor a GGUF; make a bundle of it: edge-gemma "
            "convert org/checkpoint OUT",
        ),
        ("org/empty", "has neither a manifest.json nor a GGUF; it holds README.md"),
    ],
)
def test_what_cannot_be_pulled(server, reference, message):
    with pytest.raises(HubError, match=message):
        get(server, reference)
    assert store.ls() == [] and store.unfinished() == []


@pytest.mark.parametrize(
    "status, message",
    [
        (401, "denies access to org/one"),
        (403, r"denies access to org/one \(403\)"),
        (429, r"\(429\).*wait a few minutes"),
        (500, "answered 500"),
    ],
)
def test_answers_of_the_hub(server, status, message):
    server.status = status
    with pytest.raises(
        HubError,
        match=message + "|there is no org/one on the hub, or it is private" * (status == 401),
    ):
        get(server, "org/one")


@pytest.mark.parametrize("commit", ["../../../escape", None, "main"])
def test_a_hub_that_names_no_commit(server, commit):
    server.commit = commit
    with pytest.raises(HubError, match="names no commit for org/one@main .*is HF_ENDPOINT right"):
        get(server, "org/one")


def test_gated(server):
    server.gated.add("org/one")
    with pytest.raises(
        HubError,
        match="org/one:tiny-Q8_0.gguf is gated: accept the Gemma licence at "
        "https://huggingface.co/org/one .* `hf auth login`",
    ):
        get(server, "org/one")


def test_disk_full_is_known_before(server, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1 << 20))
    with pytest.raises(
        HubError,
        match=r"org/one needs .* MiB more on the disk of .*, where 1.0 MiB are free; make room or "
        r"set EDGE_GEMMA_HOME",
    ):
        get(server, "org/one")
    assert server.downloads() == []


def test_disk_full_while_downloading(server, monkeypatch):
    class Full(hub._Counted):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "_Counted", Full)
    with pytest.raises(
        HubError, match="the disk of .* is full; make room and run the same command again"
    ):
        get(server, "org/one")


def test_a_store_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGE_GEMMA_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(RuntimeFailure, match="cannot write below .*Not a directory"):
        get(server, "org/one")


def test_a_hostile_manifest_leads_nowhere(server):
    manifest = json.loads(server.files["org/bundle"]["manifest.json"])
    manifest["files"]["../../escape"] = manifest["files"]["decoder.gguf"]
    server.files["org/bundle"]["manifest.json"] = json.dumps(manifest).encode()
    with pytest.raises(BundleError, match="paths must stay inside"):
        get(server, "org/bundle")


def test_an_incomplete_upload(server):
    del server.files["org/bundle"]["decoder.gguf"]
    with pytest.raises(
        BundleError,
        match="org/bundle has decoder.gguf with no bytes, its manifest says .*the upload is "
        "incomplete",
    ):
        get(server, "org/bundle")


# ---- the store


def test_resolve(server, tmp_path, monkeypatch):
    bundle = get(server, "org/bundle", name="gemma-tiny")
    assert (
        store.resolve("gemma-tiny") == bundle.folder
        and Bundle.open(store.resolve("gemma-tiny")).manifest == bundle.manifest
    )
    assert store.resolve(tmp_path) == tmp_path
    with pytest.raises(
        BundleError, match=r"no bundle 'gemma-tyni': .*did you mean gemma-tiny\?.*edge-gemma pull"
    ):
        store.resolve("gemma-tyni")
    monkeypatch.setenv("EDGE_GEMMA_HOME", str(tmp_path / "empty"))
    with pytest.raises(BundleError, match="installed are: none"):
        store.resolve("x")


def test_where_the_store_is(monkeypatch, tmp_path):
    monkeypatch.delenv("EDGE_GEMMA_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert store.bundles() == tmp_path / "edge-gemma/bundles"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        store.bundles() == tmp_path / ".local/share/edge-gemma/bundles"
        and store.ls() == []
        and list(tmp_path.iterdir()) == []
    )


def test_ls_and_rm_on_the_command_line(server, monkeypatch):
    get(server, "org/bundle")
    os.truncate(get(server, "org/one").decoder_path, 5)
    listed = json.loads(runner.invoke(cli.app, ["ls", "--json"]).stdout)["bundles"]
    assert [(b["name"], b["origin"]) for b in listed][0] == ("bundle", "org/bundle@0123456")
    assert "decoder.gguf has 5 bytes" in listed[1]["problem"]
    shown = runner.invoke(cli.app, ["ls"])
    assert "broken" in shown.stdout and "decoder.gguf has 5 bytes" in shown.stderr
    with pytest.raises(UsageError, match=r"would delete bundle \(.*pass --yes"):
        runner.invoke(cli.app, ["rm", "bundle"], catch_exceptions=False)
    for name, message in (
        ("nothing", "no bundle 'nothing' is installed; installed are: bundle, tiny-Q8_0"),
        ("../x", "not the name of an installed bundle"),
    ):
        with pytest.raises((BundleError, UsageError), match=message):
            runner.invoke(cli.app, ["rm", "--yes", "bundle", name], catch_exceptions=False)
    assert (
        json.loads(runner.invoke(cli.app, ["rm", "--yes", "--json", "bundle", "tiny-Q8_0"]).stdout)[
            "freed_bytes"
        ]
        > 5
    )
    assert store.ls() == [] and list(store.bundles().iterdir()) == []
    with pytest.raises(UsageError, match="name the bundles to delete"):
        runner.invoke(cli.app, ["rm"], catch_exceptions=False)


def test_pull_on_the_command_line(server, gguf, monkeypatch):
    monkeypatch.setattr(
        "edge_gemma.store.pull.pull",
        lambda *a, **k: pull(*a, **{**k, "on_progress": stop_after(1)}, endpoint=server.url),
    )
    stopped = runner.invoke(cli.app, ["pull", "org/one"])
    assert (
        stopped.exit_code == 130
        and "what arrived is kept. Go on with: edge-gemma pull org/one" in stopped.stderr
    )
    assert "1 unfinished download" in runner.invoke(cli.app, ["ls"]).stderr
    monkeypatch.setattr(
        "edge_gemma.store.pull.pull", lambda *a, **k: pull(*a, **k, endpoint=server.url)
    )
    done = runner.invoke(cli.app, ["pull", "org/one"])
    assert (
        done.exit_code == 0
        and 'Try: edge-gemma run tiny-Q8_0 "Hello"' in done.stdout
        and "licence: Gemma" in done.stderr
    )
    again = json.loads(runner.invoke(cli.app, ["pull", "org/one", "--json"]).stdout)
    assert again["name"] == "tiny-Q8_0" and not again["fetched"]
    with pytest.raises(KeyboardInterrupt):
        get(server, "org/bundle", on_progress=stop_after(1))
    freed = json.loads(runner.invoke(cli.app, ["rm", "--unfinished", "--json"]).stdout)
    assert freed["freed_bytes"] > 0 and store.unfinished() == []


def test_a_client_of_the_server_pulls(server, tiny_model, monkeypatch):
    """Ollama's /api/pull: refused unless it was allowed; then installed beside what is served."""
    from test_serve import opened

    from edge_gemma.serve.guard import Limits

    here = functools.partial(pull, endpoint=server.url)
    monkeypatch.setattr("edge_gemma.store.pull.pull", here)

    def said(client, name):
        answer = client.post("/api/pull", json={"model": name})
        return answer.status_code, [json.loads(line) for line in answer.text.splitlines()]

    for client in opened(tiny_model):
        status, lines = said(client, "org/one")
        assert status == 404 and "--allow-pull" in lines[0]["error"]
        assert not server.downloads()
    for client in opened(tiny_model, limits=Limits(allow_pull=True)):
        status, lines = said(client, "org/one")
        assert status == 200 and lines[-1] == {"status": "success"}, lines
        assert any(line.get("total") for line in lines)
        (entry,) = store.ls()
        n_downloads = len(server.downloads())
        assert said(client, entry.name) == (200, [{"status": "success"}])
        assert len(server.downloads()) == n_downloads
        status, lines = said(client, "org/none")
        assert status == 200 and "error" in lines[-1]
        assert said(client, "../../etc/passwd")[0] == 400
