"""Does a new bundle run: what the child process says, and what becomes of its failures."""

import importlib.util
import shutil
import subprocess
import sys

import numpy as np
import pytest

from edge_gemma.bundles.folder import Bundle
from edge_gemma.convert.trial import N_TOKENS, try_encoders, try_out
from edge_gemma.errors import BundleError


def copy_of(bundle: Bundle, folder) -> Bundle:
    folder.mkdir()
    (folder / "decoder.gguf").write_bytes(bundle.decoder_path.read_bytes())
    return Bundle(folder, bundle.manifest)


def test_it_says_what_the_model_says(tiny_bundle, tiny_model):
    import edge_gemma

    said = try_out(Bundle.open(tiny_bundle))
    greedy = edge_gemma.Sampling(temperature=0, max_tokens=N_TOKENS)
    text = "".join(chunk.text for chunk in tiny_model.generate("The", greedy))
    assert said.startswith(text) and said


def test_logits_that_are_not_finite_are_an_error(tiny_bundle, tmp_path):
    bundle = copy_of(Bundle.open(tiny_bundle), tmp_path / "nan")
    norm = next(t for t in bundle.manifest.decoder.tensors if t.name == "output_norm.weight")
    with open(bundle.decoder_path, "r+b") as file:
        file.seek(norm.offset)
        file.write(np.full(norm.nbytes // 4, np.nan, np.float32).tobytes())
    with pytest.raises(BundleError, match="short generation failed: the logits are not finite"):
        try_out(bundle)


def test_a_native_abort_is_an_error_of_ours(tiny_bundle, monkeypatch):
    run = subprocess.run

    def aborted(command, **options):
        return run([sys.executable, "-c", "import os; os.abort()"], **options)

    monkeypatch.setattr(subprocess, "run", aborted)
    with pytest.raises(BundleError, match="short generation stopped with signal 6: no message"):
        try_out(Bundle.open(tiny_bundle))


def test_a_file_cut_short_is_an_error(tiny_bundle, tmp_path):
    bundle = copy_of(Bundle.open(tiny_bundle), tmp_path / "short")
    data = bundle.decoder_path.read_bytes()
    bundle.decoder_path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match="was written, but a short generation failed"):
        try_out(bundle)


def test_each_encoder_is_run_once(encoder_bundle, looking_bundle, tiny_bundle, monkeypatch):
    for folder in (encoder_bundle, looking_bundle.folder, tiny_bundle):
        assert try_encoders(Bundle.open(folder))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    assert not try_encoders(Bundle.open(encoder_bundle)) and try_encoders(Bundle.open(tiny_bundle))


def test_an_encoder_that_cannot_run_is_an_error(encoder_bundle, tmp_path):
    """Its graph loads, and one of its weights has become infinite."""
    folder = tmp_path / "broken"
    shutil.copytree(encoder_bundle, folder)
    data = next(folder.glob("*.onnx.data"))
    with open(data, "r+b") as file:
        file.seek(data.stat().st_size // 2 // 4096 * 4096)
        file.write(np.full(4096, np.inf, np.float32).tobytes())
    with pytest.raises(
        BundleError, match="running an encoder failed: the soft tokens of the audio"
    ):
        try_encoders(Bundle.open(folder))


def test_without_the_extra_one_error_says_what_to_install():
    code = (
        "import importlib.util as u, edge_gemma.errors\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'ml_dtypes' else find(name, *rest)\n"
        "try:\n    import edge_gemma.convert\n"
        "except edge_gemma.errors.MissingExtra as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'edge-gemma[convert]'" in done.stdout
