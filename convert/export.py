"""Checkpoint → the folder that another program loads: transformers.js, onnxruntime-genai.

In: a checkpoint, a host's name. Out: graphs under the names and with the inputs that the host asks
for, the checkpoint's own tokenizer files, and the configuration it reads. The graphs are
``decoder.onnx``'s (onnx_decoder.py) in another :class:`~.onnx_decoder.Form`, from the same weights;
no bundle is made, and edge-gemma does not read them back.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from edge_gemma.bundles.folder import BundleWriter
from edge_gemma.convert.decoder import Progress, in_order
from edge_gemma.convert.onnx_decoder import Form, build_decoder, build_embeddings
from edge_gemma.convert.onnx_weights import OnnxPlan, Weights, shares_rows, table_bytes
from edge_gemma.convert.onnx_writer import OPSET_OF_BLOCKS, OnnxWriter
from edge_gemma.convert.pipeline import Report
from edge_gemma.convert.prepare import Conversion, Prepared, prepare
from edge_gemma.errors import RuntimeFailure, UnsupportedModel, UsageError
from edge_gemma.units import GiB, MiB, format_bytes

TRANSFORMERS_JS, GENAI = "transformers.js", "onnxruntime-genai"
HOSTS = (TRANSFORMERS_JS, GENAI)
_MARGIN_BYTES = 16 * MiB
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")  # both hosts read these two
# recipe → transformers.js' name of a file's weights, and the word that asks for them
_DTYPES = {"f32": ("", "fp32"), "q8_0": ("_quantized", "q8"), "f16": ("_fp16", "fp16")}
_FOUR_BITS = ("_q4", "q4")
_BROWSER_BYTES = 2 * GiB  # of one file: what an ArrayBuffer holds


@dataclass(frozen=True)
class Graph:
    """One file to write, below the folder, with its data beside it."""

    path: str
    data_suffix: str
    build: Callable[[OnnxWriter, Weights, OnnxPlan], None]


@dataclass(frozen=True)
class Exported:
    folder: Path
    host: str
    graphs: tuple[str, ...]
    bytes: int
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Export:
    """What will be written, decided before a weight is read."""

    host: str
    prepared: Prepared
    plan: OnnxPlan
    graphs: tuple[Graph, ...]
    notes: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """At most."""
        is_split = self.prepared.mapping.dims.family == "gemma3n"  # tables in a graph of their own
        has_tables = is_split or not shares_rows(self.plan)
        return self.plan.graph_bytes + (table_bytes(self.plan) if has_tables else 0)


def plan_export(folder: str | Path, host: str, options: Conversion = Conversion()) -> Export:
    """Raises CheckpointError, UnsupportedModel, UsageError."""
    if host not in HOSTS:
        raise UsageError(f"--for is {host!r}; expected {' or '.join(HOSTS)}")
    prepared = prepare(folder, replace(options, decoder="both", audio="none", vision="none"))
    plan, family = prepared.onnx, prepared.mapping.dims.family
    assert plan is not None
    if host == GENAI and family == "gemma3n":
        raise UnsupportedModel(
            "onnxruntime-genai runs no Gemma 3n; export it for transformers.js, or run the bundle "
            "with --engine onnx"
        )
    graphs = _genai_graphs() if host == GENAI else _js_graphs(plan, family)
    return Export(host, prepared, plan, graphs, _notes(prepared, host))


def export(
    folder: str | Path,
    out: str | Path,
    host: str,
    options: Conversion = Conversion(),
    report: Report = Report(),
) -> Exported:
    """Write what ``host`` loads into the folder ``out``, whole or not at all. Of ``options`` the
    ONNX recipe, the importance matrix, adapters, threads and overwriting count.

    Raises CheckpointError, UnsupportedModel, UsageError, RuntimeFailure (the disk).
    """
    started = time.perf_counter()
    with BundleWriter(out, overwrite=options.overwrite) as writer:
        planned = plan_export(folder, host, options)
        _check_disk(planned, writer.folder)
        for note in planned.notes:
            report.note(note)
        report.total(planned.total_bytes)
        report.stage("decoder")
        notes = list(planned.notes)
        for graph in planned.graphs:
            _write_graph(planned, graph, writer.folder, options.threads(), report.advance)
            _note_size(writer.folder / f"{graph.path}{graph.data_suffix}", host, notes, report)
        _write_files(planned, writer.folder)
        n_bytes = sum(path.stat().st_size for path in writer.folder.rglob("*") if path.is_file())
        writer.publish()
    return Exported(
        Path(out),
        host,
        tuple(graph.path for graph in planned.graphs),
        n_bytes,
        time.perf_counter() - started,
        tuple(notes),
    )


# ---- graphs


def _genai_graphs() -> tuple[Graph, ...]:
    form = Form(takes_ids=True, asks_rows=False)
    return (Graph("model.onnx", ".data", partial(build_decoder, form=form)),)


def _js_graphs(plan: OnnxPlan, family: str) -> tuple[Graph, ...]:
    suffix, _ = _DTYPES.get(plan.recipe, _FOUR_BITS)
    if family != "gemma3n":
        build = partial(build_decoder, form=Form(takes_ids=True))
        return (Graph(f"onnx/model{suffix}.onnx", "_data", build),)
    # its onnxruntime-node (1.30 in 4.3) dies where layers share K/V without rows of their own
    build = partial(build_decoder, form=Form(repeats_kv=True))
    return (
        Graph(f"onnx/embed_tokens{suffix}.onnx", "_data", build_embeddings),
        Graph(f"onnx/decoder_model_merged{suffix}.onnx", "_data", build),
    )


def _write_graph(
    planned: Export, graph: Graph, folder: Path, n_threads: int, progress: Progress
) -> None:
    prepared = planned.prepared
    path = folder / graph.path
    path.parent.mkdir(exist_ok=True)
    sources = {source.name: source for source in planned.plan.mapping.sources}
    with _pool(n_threads) as written:
        with OnnxWriter(path, opset=OPSET_OF_BLOCKS, data_suffix=graph.data_suffix) as writer:
            weights = Weights(
                writer,
                planned.plan,
                sources,
                prepared.tensors,
                prepared.importance or {},
                written,
                progress,
            )
            graph.build(writer, weights, planned.plan)


@contextmanager
def _pool(n_threads: int):
    with ThreadPoolExecutor(n_threads, thread_name_prefix="quantize") as pool:
        yield partial(in_order, pool, n_threads + 1)


# ---- what stands beside them


def _notes(prepared: Prepared, host: str) -> tuple[str, ...]:
    notes = list(prepared.onnx.notes) if prepared.onnx else []
    missing = [name for name in _TOKENIZER if not (prepared.checkpoint.folder / name).is_file()]
    if missing:
        notes.append(
            f"the checkpoint has no {' and no '.join(missing)}, and {host} reads no other "
            "tokenizer: it can be given token ids alone"
        )
    left = [
        name
        for name, tower in (("sound", "audio"), ("pictures", "vision"))
        if _has(prepared, tower)
    ]
    if left:
        notes.append(f"text only: the encoders of {' and '.join(left)} are not exported")
    return tuple(notes)


def _has(prepared: Prepared, tower: str) -> bool:
    return prepared.checkpoint.config.get(f"{tower}_config") is not None


def _note_size(path: Path, host: str, notes: list[str], report: Report) -> None:
    n_bytes = path.stat().st_size
    if host == TRANSFORMERS_JS and n_bytes > _BROWSER_BYTES:
        said = (
            f"{path.name} has {format_bytes(n_bytes)}: Node loads it, a browser takes "
            f"{format_bytes(_BROWSER_BYTES)} in one file"
        )
        notes.append(said)
        report.note(said)


def _write_files(planned: Export, folder: Path) -> None:
    source = planned.prepared.checkpoint.folder
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    config = _text_config(planned)
    if planned.host == GENAI:
        _write_json(folder / "genai_config.json", _genai_config(planned))
    else:
        _, dtype = _DTYPES.get(planned.plan.recipe, _FOUR_BITS)
        config["transformers.js_config"] = {"dtype": dtype, "use_external_data_format": True}
    _write_json(folder / "config.json", config)


def _text_config(planned: Export) -> dict[str, Any]:
    """The checkpoint's own; of a Gemma 3 that sees, the part that is exported."""
    config = dict(planned.prepared.checkpoint.config)
    text = config.get("text_config")
    if planned.prepared.mapping.dims.family == "gemma3n" or not isinstance(text, dict):
        return config
    kept = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if key in config
    }
    return kept | text | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}


def _genai_config(planned: Export) -> dict[str, Any]:
    """What onnxruntime-genai 0.18 reads for a Gemma 3 of text."""
    dims, prepared = planned.plan.mapping.dims, planned.prepared
    special = prepared.vocabulary.special
    n_positions = planned.plan.n_positions
    return {
        "model": {
            "type": "gemma3_text",
            "bos_token_id": special["bos"],
            "eos_token_id": list(prepared.answers.end_tokens),
            "pad_token_id": special.get("pad", 0),
            "context_length": n_positions,
            "vocab_size": len(prepared.vocabulary.tokens),
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": dims.head_dim,
                "hidden_size": dims.n_embd,
                "num_attention_heads": dims.n_head,
                "num_hidden_layers": dims.n_layer,
                "num_key_value_heads": dims.n_head_kv,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": min(n_positions, 2048),
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _check_disk(planned: Export, folder: Path) -> None:
    needed, free = planned.total_bytes + _MARGIN_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise RuntimeFailure(
            f"the export needs {format_bytes(needed)} on disk, {folder.parent} has "
            f"{format_bytes(free)} free; choose another folder or a smaller recipe"
        )
