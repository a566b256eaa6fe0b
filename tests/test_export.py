"""Folders for other programs: called as those call them, they answer as our engine does. The slow
tests run the programs themselves, as they are published.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoints import REFERENCE, write_checkpoint
from test_cli import cli

import edge_gemma
from edge_gemma import PlanRequest, Sampling, Tokens
from edge_gemma.convert import export as module
from edge_gemma.convert.export import GENAI, HOSTS, TRANSFORMERS_JS, export, plan_export
from edge_gemma.convert.pipeline import Conversion, convert
from edge_gemma.errors import RuntimeFailure, UnsupportedModel, UsageError

N = 12


def no_towers(name: str) -> bool:
    return "_tower" not in name


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        name: write_checkpoint(name, folder / name, keep=no_towers)
        for name in ("g3text", "g3mm", "g3n")
    }


class Host:
    """Runs a folder's graphs as transformers.js or onnxruntime-genai do: a cache that starts empty
    and is handed back, ids or embeddings, logits of rows that are wanted.
    """

    def __init__(self, folder: Path):
        self.sessions = {
            path.name.partition("_q")[0].partition("_fp16")[0].removesuffix(".onnx"): (
                onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            )
            for path in sorted(folder.rglob("*.onnx"))
        }
        self.decoder = self.sessions.get("decoder_model_merged") or self.sessions["model"]
        self.past = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
            for value in self.decoder.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.n_past = 0

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of the last row."""
        self.n_past += len(ids)
        given = {"input_ids": np.array([ids], np.int64)}
        if "embed_tokens" in self.sessions:
            found = self.sessions["embed_tokens"].run(["inputs_embeds", "per_layer_inputs"], given)
            given = dict(zip(("inputs_embeds", "per_layer_inputs"), found, strict=True))
        given["attention_mask"] = np.ones((1, self.n_past), np.int64)
        if "num_logits_to_keep" in {value.name for value in self.decoder.get_inputs()}:
            given["num_logits_to_keep"] = np.array(1, np.int64)
        else:  # onnxruntime-genai makes room for the logits of one row
            shapes = {value.name: value.shape for value in self.decoder.get_outputs()}
            assert shapes["logits"][1] == 1
        names = [value.name for value in self.decoder.get_outputs()]
        found = self.decoder.run(names, given | self.past)
        present = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(names, found, strict=True)
            if name != "logits"
        }
        assert present.keys() == self.past.keys()
        self.past = present
        return found[names.index("logits")][0, -1]

    def greedy(self, ids: list[int], n: int) -> list[int]:
        tokens = []
        for _ in range(n):
            tokens.append(int(self.logits(ids).argmax()))
            ids = tokens[-1:]
        return tokens


@pytest.mark.parametrize(
    ("name", "host"),
    [("g3text", host) for host in HOSTS]
    + [("g3mm", host) for host in HOSTS]
    + [("g3n", TRANSFORMERS_JS)],
)
def test_called_as_its_host_does_a_graph_gives_transformers_logits(
    checkpoints, tmp_path, name, host
):
    done = export(checkpoints[name], tmp_path / "out", host, Conversion(onnx_quant="f32"))
    reference = np.load(REFERENCE / f"{name}-text.npz")
    ids = [int(i) for i in reference["input_ids"]]
    called = Host(done.folder)
    called.logits(ids[:-3])
    for k in (3, 2, 1):
        expected = reference["logits_last8"][-k]
        assert np.abs(called.logits([ids[-k]])[: len(expected)] - expected).max() < 1e-3


@pytest.mark.parametrize(("name", "recipe"), [("g3text", "q8_0"), ("g3n", "q8_0"), ("g3n", "f16")])
def test_quantized_it_answers_as_our_engine(checkpoints, tmp_path, name, recipe):
    """The head's rows are the table's, where they are tied and in 8 bits."""
    options = Conversion(
        quant="f32",
        onnx_quant=recipe,
        decoder="both",
        verify=False,
        audio="none",
        vision="none",
    )
    bundle = convert(checkpoints[name], tmp_path / "bundle", options).bundle
    prompt = list(range(20, 60))
    with edge_gemma.load(bundle, engine="onnx", request=PlanRequest(n_threads=1)) as model:
        chunks = model.generate([Tokens(tuple(prompt))], Sampling(temperature=0, max_tokens=N))
        ours = [token for chunk in chunks for token in chunk.token_ids]
    done = export(checkpoints[name], tmp_path / "out", TRANSFORMERS_JS, options)
    assert Host(done.folder).greedy(prompt, N)[: len(ours)] == ours


def test_names_and_dimensions_are_those_that_hosts_look_for(checkpoints, tmp_path):
    done = export(checkpoints["g3n"], tmp_path / "js", TRANSFORMERS_JS)
    assert done.graphs == (
        "onnx/embed_tokens_quantized.onnx",
        "onnx/decoder_model_merged_quantized.onnx",
    )
    graph = onnx.load(str(done.folder / done.graphs[1]), load_external_data=False).graph
    inputs = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    assert {"inputs_embeds", "per_layer_inputs", "attention_mask"} <= inputs.keys()
    # transformers.js makes its first cache of these names
    assert all(dims[0].dim_param == "batch_size" for dims in inputs.values() if len(dims))
    assert (done.folder / "onnx/decoder_model_merged_quantized.onnx_data").is_file()
    config = json.loads((done.folder / "config.json").read_text())
    assert config["model_type"] == "gemma3n"
    assert config["transformers.js_config"] == {"dtype": "q8", "use_external_data_format": True}
    assert not list(done.folder.glob(".*"))


def test_a_gemma_that_sees_is_exported_as_its_text(checkpoints, tmp_path):
    done = export(checkpoints["g3mm"], tmp_path / "out", GENAI)
    config = json.loads((done.folder / "config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    assert "vision_config" not in config
    assert any("pictures are not exported" in said for said in done.notes)
    genai = json.loads((done.folder / "genai_config.json").read_text())["model"]
    assert genai["type"] == "gemma3_text"
    assert genai["decoder"]["num_hidden_layers"] == config["num_hidden_layers"]
    assert genai["eos_token_id"]


def test_the_checkpoints_own_tokenizer_goes_with_it(checkpoints, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(checkpoints["g3text"], folder)
    assert any("tokenizer.json" in said for said in plan_export(folder, GENAI).notes)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"top_k": 64}')
    done = export(folder, tmp_path / "out", GENAI)
    assert (done.folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((done.folder / "generation_config.json").read_text()) == {"top_k": 64}


def test_ids_of_media_have_a_row(checkpoints, tmp_path):
    """Ids beyond the tables are replaced by an encoder's rows; looking them up must not fail."""
    done = export(checkpoints["g3n"], tmp_path / "out", TRANSFORMERS_JS)
    embed = Host(done.folder).sessions["embed_tokens"]
    found = embed.run(None, {"input_ids": np.array([[5, 99_999_999]], np.int64)})
    assert all(np.isfinite(rows).all() for rows in found)


@pytest.mark.parametrize("recipe", ["f32", "q8_0", "edge_onnx", "f16"])
@pytest.mark.parametrize("name", ["g3text", "g3n"])
def test_a_dry_run_counts_what_will_be_written(checkpoints, tmp_path, name, recipe):
    options = Conversion(onnx_quant=recipe)
    planned = plan_export(checkpoints[name], TRANSFORMERS_JS, options).total_bytes
    written = export(checkpoints[name], tmp_path / "out", TRANSFORMERS_JS, options).bytes
    assert planned - (3 << 20) * 4 < written <= planned + (1 << 14)


# --- nonsense ---


def test_what_cannot_be_is_refused(checkpoints, embedding_checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"expected transformers\.js or onnxruntime-genai"):
        export(checkpoints["g3text"], out, "tensorflow")
    with pytest.raises(UnsupportedModel, match="runs no Gemma 3n"):
        export(checkpoints["g3n"], out, GENAI)
    with pytest.raises(UnsupportedModel, match="embedding model"):
        export(embedding_checkpoint, out, GENAI)
    with pytest.raises(UsageError, match="an ONNX decoder holds"):
        export(checkpoints["g3text"], out, GENAI, Conversion(onnx_quant="q4_k_m"))
    full = shutil._ntuple_diskusage(1, 1, 0)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(RuntimeFailure, match="on disk"):
        export(checkpoints["g3text"], out, GENAI)
    assert list(tmp_path.iterdir()) == []


def test_the_command(checkpoints, tmp_path):
    out = tmp_path / "out"
    dry = cli("export", checkpoints["g3text"], out, "--for", GENAI, "--dry-run", "--json")
    assert json.loads(dry.stdout)["graphs"] == ["model.onnx"]
    assert not out.exists()
    done = cli("export", checkpoints["g3text"], out, "--for", GENAI)
    assert done.returncode == 0, done.stderr
    assert "model.onnx for onnxruntime-genai" in done.stdout
    assert "tokenizer.json" in done.stderr
    again = cli("export", checkpoints["g3text"], out, "--for", GENAI)
    assert (again.returncode, "--force" in again.stderr) == (2, True)


# --- the programs themselves ---


@pytest.fixture(scope="module")
def real(sample_gguf, tmp_path_factory) -> tuple[Path, list[int]]:
    """Real Gemma 3 270M as a checkpoint, and what our engine says after six tokens."""
    from edge_gemma.benchmarks.dev import real_checkpoint

    folder = tmp_path_factory.mktemp("real")
    subprocess.run(
        [sys.executable, "-m", real_checkpoint.__name__, folder / "c", "--gguf", sample_gguf],
        check=True,
    )
    options = Conversion(quant="q8_0", decoder="both", verify=False)
    bundle = convert(folder / "c", folder / "b", options).bundle
    return folder / "c", greedy(bundle, CAPITAL, 32)


CAPITAL = [2, 818, 5279, 529, 7001, 563]  # "The capital of France is"


def greedy(bundle, ids: list[int], n: int) -> list[int]:
    with edge_gemma.load(bundle, engine="onnx", n_ctx=512) as model:
        chunks = model.generate([Tokens(tuple(ids))], Sampling(temperature=0, max_tokens=n))
        return [token for chunk in chunks for token in chunk.token_ids]


@pytest.fixture(scope="module")
def transformers_js(tmp_path_factory):
    """``run(folder, class, n, ids) -> ids`` by transformers.js from npm."""
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("npm")
    script = Path(__file__).parent / "transformers_js.mjs"
    shutil.copy(script, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    # its install script asks for GPU libraries elsewhere; those for the CPU are in the package
    subprocess.run(
        ["npm", "install", "--ignore-scripts", "--silent", "@huggingface/transformers@4"],
        cwd=folder,
        check=True,
    )

    def run(exported: Path, kind: str, n: int, ids: list[int]) -> list[int]:
        command = ["node", folder / script.name, exported, kind, str(n), *map(str, ids)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return run


@pytest.mark.slow
@pytest.mark.compat(
    kind="client",
    what="transformers.js 4 in Node",
    happens="`export --for transformers.js`: Gemma 3 and 3n, text; the same tokens as ours",
)
def test_transformers_js_answers_the_same(transformers_js, real, checkpoints, tmp_path):
    checkpoint, expected = real
    done = export(checkpoint, tmp_path / "real", TRANSFORMERS_JS)
    assert transformers_js(done.folder, "AutoModelForCausalLM", 32, CAPITAL) == expected
    ids = [2, 300, 41, 99, 512, 77, 600, 33, 21, 5, 400]
    for recipe in ("f32", "q8_0"):
        options = Conversion(
            quant="f32",
            onnx_quant=recipe,
            decoder="both",
            verify=False,
            audio="none",
            vision="none",
        )
        bundle = convert(checkpoints["g3n"], tmp_path / f"b-{recipe}", options).bundle
        ours = greedy(bundle, ids, 16)
        done = export(checkpoints["g3n"], tmp_path / recipe, TRANSFORMERS_JS, options)
        assert transformers_js(done.folder, "Gemma3nForCausalLM", 16, ids)[: len(ours)] == ours


@pytest.mark.slow
@pytest.mark.compat(
    kind="client",
    what="onnxruntime-genai 0.18",
    happens="`export --for onnxruntime-genai`: Gemma 3, text; the same tokens as ours",
)
def test_onnxruntime_genai_answers_the_same(real, tmp_path):
    checkpoint, expected = real
    done = export(checkpoint, tmp_path / "real", GENAI)
    program = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", program], check=True)
    python = program / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "onnxruntime-genai>=0.18", "numpy"], check=True
    )
    script = (
        "import json, sys, onnxruntime_genai as og\n"
        "params = og.GeneratorParams(model := og.Model(sys.argv[1]))\n"
        "params.set_search_options(max_length=512)\n"
        "generator = og.Generator(model, params)\n"
        "generator.append_tokens(json.loads(sys.argv[2]))\n"
        "found = []\n"
        "while len(found) < 32 and not generator.is_done():\n"
        "    generator.generate_next_token()\n"
        "    found.append(int(generator.get_next_tokens()[0]))\n"
        "print(json.dumps(found))\n"
    )
    command = [python, "-c", script, done.folder, json.dumps(CAPITAL)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == expected
