"""GGUF → bundle: what is taken, what is refused and why, and that a relayout changes no answer."""

from __future__ import annotations

import os

import numpy as np
import pytest

from edge_gemma.benchmarks.dev.synthetic import Types, tiny_gguf
from edge_gemma.bundles.description import describe
from edge_gemma.bundles.folder import Bundle
from edge_gemma.bundles.gguf import read_header
from edge_gemma.engines.llama.decoder import Decoder
from edge_gemma.errors import BundleError, UnsupportedModel
from edge_gemma.plan.records import Settings
from edge_gemma.spans import Tokens
from edge_gemma.store.importer import import_gguf


@pytest.fixture(scope="module", params=["gemma3", "gemma3n"])
def gguf(request, tmp_path_factory):
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf", request.param)


def answer(path) -> np.ndarray:
    decoder = Decoder(path, Settings(n_ctx=64, n_ubatch=64))
    try:
        return np.concatenate(list(decoder.context(n_outputs=64).evaluate([Tokens(range(2, 40))])))
    finally:
        decoder.close()


def test_import_links_and_describes(gguf, tmp_path):
    bundle = import_gguf(gguf, tmp_path / "out")
    assert os.stat(bundle.decoder_path).st_ino == os.stat(gguf).st_ino
    bundle.verify()
    manifest = bundle.manifest
    assert (
        manifest.family == gguf.stem
        and not manifest.instruct
        and manifest.special_tokens["bos"] == 2
    )
    uses = {t.name: t.use for t in manifest.decoder.tensors}
    assert uses["token_embd.weight"] == "matmul" and uses["blk.0.attn_k.weight"] == "matmul"
    if manifest.family == "gemma3n":
        assert (
            uses["per_layer_token_embd.weight"] == "lookup"
            and uses["blk.21.attn_v.weight"] == "unused"
            and len(manifest.decoder.kv_layers) == 20
        )


def test_relayout_puts_cold_first_and_changes_no_answer(gguf, tmp_path):
    # hot first: the table in the opposite order
    bundle = import_gguf(gguf, tmp_path / "out", relayout=True)
    order = {"unused": 0, "lookup": 1, "matmul": 2}
    uses = [order[t.use] for t in bundle.manifest.decoder.tensors]
    assert uses == sorted(uses)
    before, after = read_header(gguf), read_header(bundle.decoder_path)
    assert before.metadata.keys() == after.metadata.keys()
    data, moved = gguf.read_bytes(), bundle.decoder_path.read_bytes()
    for t in before.tensors:
        new = after.tensor(t.name)
        assert moved[new.offset : new.offset + new.nbytes] == data[t.offset : t.offset + t.nbytes]
    np.testing.assert_array_equal(answer(gguf), answer(bundle.decoder_path))


def test_an_untied_embedding_is_only_looked_up(tmp_path):
    path = tiny_gguf(tmp_path / "x.gguf", "gemma3n", types=Types("q4_0", "q8_0", "q4_0", "q8_0"))
    described = describe(path)
    uses = {t.name: t.use for t in described.decoder.tensors}
    assert (
        uses["token_embd.weight"] == "lookup"
        and uses["output.weight"] == "matmul"
        and not described.decoder.tied_head
    )


def patched(path, tmp_path, old: bytes, new: bytes):
    data = path.read_bytes()
    assert len(old) == len(new) and old in data
    (tmp_path / "patched.gguf").write_bytes(data.replace(old, new))
    return tmp_path / "patched.gguf"


def test_other_architectures_are_refused(tmp_path):
    path = patched(tiny_gguf(tmp_path / "x.gguf"), tmp_path, b"gemma3", b"gemma4")
    with pytest.raises(UnsupportedModel, match="'gemma4'; supported are gemma3"):
        describe(path)


def test_contradictions_are_refused_by_name(tmp_path):
    good = tiny_gguf(tmp_path / "x.gguf")
    with pytest.raises(
        UnsupportedModel, match="'blk.0.attn_x.weight', which a gemma3 of 7 layers does not have"
    ):
        describe(patched(good, tmp_path, b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    layers = b"gemma3.block_count\x04\x00\x00\x00" + (7).to_bytes(4, "little")
    with pytest.raises(BundleError, match="lacks .* tensors"):
        describe(patched(good, tmp_path, layers, layers[:-4] + (8).to_bytes(4, "little")))
    heads = b"gemma3.attention.head_count\x04\x00\x00\x00" + (4).to_bytes(4, "little")
    for n in (0, 8):
        with pytest.raises(BundleError, match="head_count|shape"):
            describe(patched(good, tmp_path, heads, heads[:-4] + n.to_bytes(4, "little")))


def test_what_llama_cpp_refuses_is_our_error_and_leaves_nothing(tmp_path):
    """A vocabulary type that our reader steps over: llama.cpp reads it in a child process first."""
    good = tiny_gguf(tmp_path / "x.gguf")
    bad = patched(good, tmp_path, b"tokenizer.ggml.pre", b"tokenizer.ggml.prX")
    data = bytearray(bad.read_bytes())
    at = data.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type")
    data[at + 4 : at + 8] = (6).to_bytes(4, "little")  # int32 types said to be floats
    bad.write_bytes(data)
    with pytest.raises(BundleError, match="llama.cpp"):
        import_gguf(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_import_of_an_import_opens(gguf, tmp_path):
    first = import_gguf(gguf, tmp_path / "a")
    second = import_gguf(first.decoder_path, tmp_path / "b", name="again")
    assert Bundle.open(tmp_path / "b").manifest.name == second.manifest.name == "again"
