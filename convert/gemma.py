"""config.json + tensor names → what the decoder GGUF holds: its numbers,
and for each of its tensors where the rows come from.

In: a :class:`~.checkpoint.Checkpoint`. Out: :class:`Dims` and a list of
:class:`Source`. Every tensor of the checkpoint is mapped or listed as
skipped with the reason; a missing, unexpected or misshapen one is an error
that names it. This module does not know quantization. What llama.cpp fixes
in code (src/models/gemma3.cpp, gemma3n.cpp) is checked here, because a file
that says otherwise would load and answer nonsense.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from edge_gemma.bundles.description import (
    GEMMA3N_ALTUP,
    GEMMA3N_KV_LAYERS,
    GEMMA3N_LAUREL,
    SUPPORTED,
    SWA_PERIOD,
    dense_tensors,
    expected_tensors,
)
from edge_gemma.bundles.manifest import Family
from edge_gemma.convert.checkpoint import HEAD, Checkpoint
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.errors import CheckpointError, UnsupportedModel

PREFIX = "model.language_model."
EMBEDDING = PREFIX + "embed_tokens.weight"
SPARSE_LAYERS, SPARSITY = 10, 0.95
SPARSITY_MULTIPLIER = 1.6448536  # the 95 % quantile of a normal distribution
TOWERS = {
    "model.audio_tower.": "audio",
    "model.embed_audio.": "audio",
    "model.vision_tower.": "vision",
    "model.embed_vision.": "vision",
    "model.multi_modal_projector.": "vision",
}

# transformers' module → GGUF's tensor, within a layer: what both families
# have, then what gemma3n adds
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_LAYER_3N = _LAYER | {
    "altup.correct_output_scale": "altup_correct_scale",
    "altup.correction_coefs": "altup_correct_coef",
    "altup.prediction_coefs": "altup_predict_coef",
    "altup.modality_router": "altup_router",
    "altup.router_norm": "altup_router_norm",
    "laurel.linear_left": "laurel_l",
    "laurel.linear_right": "laurel_r",
    "laurel.post_laurel_norm": "laurel_post_norm",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
}
_BARE = ("altup.correct_output_scale",)  # a bare parameter, spelled without .weight

# What transformers assumes when config.json leaves a number out (old
# multimodal configs leave out most)
_DEFAULTS = {
    "gemma3": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
    "gemma3n": {
        "vocab_size": 262400,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "sliding_window": 512,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262144,
        "num_kv_shared_layers": 15,
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
        "laurel_rank": 64,
    },
}


@dataclass(frozen=True)
class Dims:
    """The decoder's numbers, checked. ``sliding`` has one entry a layer."""

    family: Family
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx_train: int
    sliding_window: int
    sliding: tuple[bool, ...]
    rms_eps: float
    rope_base: float
    rope_base_sliding: float
    rope_factor: float  # linear scaling of the global layers, 1 for none
    softcap: float
    tied: bool  # for gemma-embedding, which has no output head, always true
    dense: tuple[tuple[int, int], ...] = ()  # (inputs, outputs) of EmbeddingGemma's layers
    ple_width: int = 0
    ple_vocab: int = 0
    n_kv_shared: int = 0

    def table(self) -> dict[str, int]:
        names = (
            "n_layer",
            "n_embd",
            "n_ff",
            "n_head",
            "n_head_kv",
            "head_dim",
            "n_vocab",
            "ple_width",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Part:
    """Rows of one checkpoint tensor, or zeros where ``name`` is None.
    ``cols`` picks column ranges, in order; ``add`` is added to each value.
    """

    name: str | None
    n_rows: int
    first: int = 0
    cols: tuple[tuple[int, int], ...] | None = None
    add: float = 0.0

    def rows(self, tensors: TensorReader, start: int, stop: int, width: int) -> np.ndarray:
        """Rows ``start … stop`` of this part as float32 ``[stop − start,
        width]``.
        """
        if self.name is None:
            return np.zeros((stop - start, width), np.float32)
        is_vector = len(tensors.shape(self.name)) == 1  # a norm: one row
        wanted = None if is_vector else slice(self.first + start, self.first + stop)
        values = tensors.read(self.name, wanted).reshape(stop - start, -1)
        if self.cols is not None:
            pieces = [values[:, a:b] for a, b in self.cols]
            values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
        assert values.shape == (stop - start, width), (self, values.shape)
        return values + np.float32(self.add) if self.add else values


@dataclass(frozen=True)
class Source:
    """One tensor of the GGUF: ``shape`` in ggml order, its rows stacked
    from ``parts``.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    use: str  # lookup | matmul | unused, as in the manifest

    @property
    def n_per_row(self) -> int:
        return self.shape[0]

    @property
    def n_rows(self) -> int:
        return prod(self.shape[1:])

    def rows(self, tensors: TensorReader, start: int, stop: int) -> np.ndarray:
        """Rows ``start … stop`` as float32 ``[stop − start, n_per_row]``,
        contiguous.
        """
        pieces, at = [], 0
        for part in self.parts:
            a, b = max(start, at), min(stop, at + part.n_rows)
            if a < b:
                pieces.append(part.rows(tensors, a - at, b - at, self.n_per_row))
            at += part.n_rows
        return np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))


# --- config.json → numbers ---


def text_config(config: dict) -> dict:
    """The decoder's own section of a config, whichever way it is nested."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def family_of(config: dict) -> Family:
    """``gemma3``, ``gemma3n`` or ``gemma-embedding``. Raises
    UnsupportedModel naming what was found.
    """
    model_type = str(config.get("model_type", "")).removesuffix("_text")
    architectures = config.get("architectures") or []
    is_bidirectional = bool(text_config(config).get("use_bidirectional_attention"))
    if config.get("model_type") == "gemma3_text" and is_bidirectional:
        return "gemma-embedding"
    if model_type == "gemma3" and not is_bidirectional:
        return "gemma3"
    if model_type == "gemma3n" and not is_bidirectional:
        return "gemma3n"
    found = f"model_type {config.get('model_type')!r}"
    if architectures:
        found += f" ({architectures[0]})"
    if is_bidirectional:
        found += " with bidirectional attention"
    raise UnsupportedModel(f"config.json says {found}; supported are {SUPPORTED}, base or tuned")


def read_dims(config: dict) -> Dims:
    """The decoder's numbers from config.json. Raises UnsupportedModel for
    what llama.cpp would compute differently, CheckpointError for nonsense.
    """
    family = family_of(config)
    text = _DEFAULTS["gemma3n" if family == "gemma3n" else "gemma3"] | {
        key: value for key, value in text_config(config).items() if value is not None
    }

    def number(key: str) -> int:
        value = text.get(key)
        if type(value) is not int or not 0 < value <= 1 << 24:
            raise CheckpointError(
                f"config.json: {key} is {value!r}, expected a whole number from 1 to {1 << 24}"
            )
        return value

    n_layer = number("num_hidden_layers")
    if n_layer > 512:
        raise CheckpointError(
            f"config.json: num_hidden_layers is {n_layer}; no Gemma 3 has more than 62"
        )
    text["intermediate_size"] = _one_width(text["intermediate_size"], n_layer)
    rope_base, rope_base_sliding, rope_factor = _rope(text)
    dims = Dims(
        family=family,
        n_layer=n_layer,
        n_embd=number("hidden_size"),
        n_ff=number("intermediate_size"),
        n_head=number("num_attention_heads"),
        n_head_kv=number("num_key_value_heads"),
        head_dim=number("head_dim"),
        n_vocab=number("vocab_size"),
        n_ctx_train=number("max_position_embeddings"),
        sliding_window=number("sliding_window"),
        sliding=_sliding(text, family, n_layer),
        rms_eps=float(text["rms_norm_eps"]),
        rope_base=rope_base,
        rope_base_sliding=rope_base_sliding,
        rope_factor=rope_factor,
        softcap=float(text.get("final_logit_softcapping") or 0.0),
        tied=family == "gemma-embedding" or _is_tied(text, config),
        ple_width=number("hidden_size_per_layer_input") if family == "gemma3n" else 0,
        ple_vocab=number("vocab_size_per_layer_input") if family == "gemma3n" else 0,
        n_kv_shared=number("num_kv_shared_layers") if family == "gemma3n" else 0,
    )
    _check_fixed(text, dims)
    return dims


def _is_tied(text: dict, config: dict) -> bool:
    """What config.json says of the output head; transformers ties it unless told otherwise."""
    for section in (text, config):
        value = section.get("tie_word_embeddings")
        if value is not None:
            return bool(value)
    return True


def _one_width(size: object, n_layer: int) -> object:
    """The FFN width that all layers have, from one number or one for each
    layer.
    """
    widths = size if isinstance(size, list) else [size] * n_layer
    if len(widths) < n_layer or len(set(widths[:n_layer])) != 1:
        raise UnsupportedModel(
            "config.json: the FFN widths differ between layers "
            f"({sorted(set(map(str, widths)))}); llama.cpp reads one width for all, so a "
            "mixed MatFormer cut cannot become a smaller GGUF. Slice to one width: "
            "--slice FILE with a single ffn value"
        )
    return widths[0]


def _rope(text: dict) -> tuple[float, float, float]:
    """(base of the global layers, base of the sliding ones, linear factor
    of the global ones), from the old keys or the new table.
    """
    parameters = text.get("rope_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    full = parameters.get("full_attention", parameters) or {}
    sliding = parameters.get("sliding_attention") or {}
    old_scaling = text.get("rope_scaling")
    scaling = old_scaling if isinstance(old_scaling, dict) else full
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear") or sliding.get("rope_type", "default") != "default":
        raise UnsupportedModel(
            f"config.json: rope type {kind!r} is not one that Gemma 3 uses (default or linear)"
        )
    base = full.get("rope_theta", text.get("rope_theta", 1e6))
    base_sliding = sliding.get("rope_theta", text.get("rope_local_base_freq", 1e4))
    factor = scaling.get("factor") or 1.0
    return float(base), float(base_sliding), float(factor) if kind == "linear" else 1.0


def _sliding(text: dict, family: Family, n_layer: int) -> tuple[bool, ...]:
    kinds = text.get("layer_types")
    if kinds is not None:
        known = {"sliding_attention", "full_attention"}
        if not isinstance(kinds, list) or len(kinds) < n_layer or not set(kinds) <= known:
            raise CheckpointError(
                "config.json: layer_types has "
                f"{len(kinds) if isinstance(kinds, list) else kinds!r} entries for {n_layer} "
                "layers, or kinds other than sliding and full attention"
            )
        return tuple(kind == "sliding_attention" for kind in kinds[:n_layer])
    default = text.get("_sliding_window_pattern", SWA_PERIOD[family])
    period = text.get("sliding_window_pattern", default)
    if type(period) is not int or period < 1:
        raise CheckpointError(
            f"config.json: sliding_window_pattern is {period!r}, expected a positive number"
        )
    return tuple((i + 1) % period != 0 for i in range(n_layer))


def _check_fixed(text: dict, dims: Dims) -> None:
    """What llama.cpp takes as given for the family."""
    fixed: dict[str, object] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
    }
    if dims.family != "gemma3n":
        # llama.cpp scales its queries by the embedding's width
        is_27b = dims.family == "gemma3" and dims.n_layer == 62
        fixed["query_pre_attn_scalar"] = dims.n_embd // dims.n_head if is_27b else dims.head_dim
    else:
        fixed |= {
            "altup_num_inputs": GEMMA3N_ALTUP,
            "altup_active_idx": 0,
            "laurel_rank": GEMMA3N_LAUREL,
            "hidden_size_per_layer_input": 256,
            "final_logit_softcapping": 30.0,
            "num_kv_shared_layers": dims.n_layer - GEMMA3N_KV_LAYERS,
        }
        _check_sparsity(text, dims.n_layer)
        if dims.ple_vocab > dims.n_vocab:
            raise CheckpointError(
                f"config.json: vocab_size_per_layer_input {dims.ple_vocab} exceeds "
                f"vocab_size {dims.n_vocab}"
            )
    for key, expected in fixed.items():
        if text.get(key, expected) != expected:
            raise UnsupportedModel(
                f"config.json: {key} is {text[key]!r}; llama.cpp runs {dims.family} with "
                f"{expected!r}"
            )
    if dims.n_head % dims.n_head_kv:
        raise CheckpointError(
            f"config.json: {dims.n_head} heads cannot share {dims.n_head_kv} KV heads"
        )


def _check_sparsity(text: dict, n_layer: int) -> None:
    expected = [SPARSITY] * SPARSE_LAYERS + [0.0] * (n_layer - SPARSE_LAYERS)
    pattern = text.get("activation_sparsity_pattern", expected)
    if isinstance(pattern, float):
        pattern = [pattern] * n_layer
    if list(pattern)[:n_layer] != expected:
        raise UnsupportedModel(
            f"config.json: activation_sparsity_pattern is {pattern}; llama.cpp runs "
            f"{SPARSITY} in exactly the first {SPARSE_LAYERS} layers"
        )


# --- tensors ---


@dataclass(frozen=True)
class Cut:
    """Which of a checkpoint's layers and FFN columns go into the file. The
    whole checkpoint is ``Cut(range(n_layer), n_ff)``.
    """

    layers: tuple[int, ...]
    n_ff: int


@dataclass(frozen=True)
class Mapping:
    dims: Dims
    sources: tuple[Source, ...]
    skipped: dict[str, str]  # checkpoint name → reason


def map_tensors(
    checkpoint: Checkpoint,
    dims: Dims,
    cut: Cut | None = None,
    *,
    untied: bool = False,
    own_head: bool | None = None,
) -> Mapping:
    """Every tensor of the decoder with where it comes from, ``cut``
    applied; ``untied`` adds a separate output head.

    ``own_head``: the head is read from ``lm_head.weight``, not from the token embedding. Default:
    where config.json unties them and the checkpoint has one.

    Raises CheckpointError for a missing, unexpected or misshapen tensor.
    """
    _check_is_merged(checkpoint)
    cut = cut or Cut(tuple(range(dims.n_layer)), dims.n_ff)
    out_dims = cut_dims(dims, cut)
    shapes = checkpoint_shapes(dims)
    for name, shape in shapes.items():
        if name in checkpoint and checkpoint.shape(name) != shape:
            raise CheckpointError(
                f"tensor {checkpoint.entry(name).stored!r} has shape "
                f"{list(checkpoint.shape(name))}, config.json asks for {list(shape)}"
            )
    if own_head is None:
        own_head = not dims.tied and HEAD in checkpoint
    head = HEAD if own_head else None
    table = mapping_table(dims, out_dims, cut, head, untied)
    sources = tuple(
        source if source.parts == (Part(head, dims.n_vocab),) else _present(checkpoint, source)
        for source in table
    )
    used = {part.name for source in sources for part in source.parts}
    skipped = {name: "a buffer that is computed, not learnt" for name in checkpoint.ignored}
    for name in checkpoint.names():
        if name not in used:
            skipped[name] = _why_skipped(checkpoint, dims, name, name in shapes)
    tied = not any(source.name == "output.weight" for source in sources)
    return Mapping(replace(out_dims, tied=tied), sources, skipped)


def _check_is_merged(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for the state of a PEFT model that was saved as it was trained."""
    for entry in checkpoint.entries.values():
        if ".base_layer." in entry.stored or ".lora_" in entry.stored:
            raise CheckpointError(
                f"tensor {entry.stored!r} is of a PEFT adapter that was not merged; call "
                "merge_and_unload() before saving, or convert the base with --merge ADAPTER"
            )


def _present(checkpoint: Checkpoint, source: Source) -> Source:
    """``source`` if the checkpoint has all of it, zeros for what is never
    read. Raises CheckpointError.
    """
    for part in source.parts:
        if part.name is None or part.name in checkpoint:
            continue
        if source.use == "unused":  # KV of sharing layers: transformers 5 no longer saves it
            zeros = tuple(Part(None, part.n_rows) for part in source.parts)
            return replace(source, parts=zeros)
        checkpoint.entry(part.name)  # raises, naming it
    return source


def _why_skipped(checkpoint: Checkpoint, dims: Dims, name: str, is_known: bool) -> str:
    """Why no tensor of the GGUF comes from ``name``. Raises CheckpointError
    without a reason.
    """
    tower = next((what for prefix, what in TOWERS.items() if name.startswith(prefix)), None)
    if tower:
        return f"the {tower} tower, not part of the decoder"
    if name == HEAD and dims.family == "gemma-embedding":
        return "an output head, which embedding does not use"
    if name == HEAD:
        return "the output head, which is the token embedding"
    if is_known:
        return "a layer that the slice leaves out"
    raise CheckpointError(
        f"tensor {checkpoint.entry(name).stored!r} is not one that a {dims.family} "
        f"of {dims.n_layer} layers has; is config.json of this checkpoint?"
    )


def cut_dims(dims: Dims, cut: Cut) -> Dims:
    dropped = dims.n_layer - len(cut.layers)
    return replace(
        dims,
        n_layer=len(cut.layers),
        n_ff=cut.n_ff,
        sliding=tuple(dims.sliding[i] for i in cut.layers),
        n_kv_shared=dims.n_kv_shared - dropped if dims.n_kv_shared else 0,
    )


def _checkpoint_name(module: str, layer: int | None = None) -> str:
    place = "" if layer is None else f"layers.{layer}."
    leaf = "" if module in _BARE else ".weight"
    return f"{PREFIX}{place}{module}{leaf}"


def checkpoint_shapes(dims: Dims) -> dict[str, tuple[int, ...]]:
    """Every name a checkpoint of these dims has, with its shape in numpy
    order.
    """
    gguf = {
        name: tuple(reversed(shape))
        for name, (shape, _) in expected_tensors(dims.family, dims.table()).items()
    }
    shapes = {
        _checkpoint_name("embed_tokens"): gguf["token_embd.weight"],
        _checkpoint_name("norm"): gguf["output_norm.weight"],
        HEAD: gguf["token_embd.weight"],
    }
    for i in range(dims.n_layer):
        for module, name in _layer_modules(dims).items():
            shapes[_checkpoint_name(module, i)] = gguf[f"blk.{i}.{name}.weight"]
    shapes |= {name: shape[::-1] for name, shape in dense_tensors(dims.dense).items()}
    if dims.family == "gemma3n":
        ple_row = dims.ple_width * dims.n_layer
        square = (dims.n_embd, dims.n_embd)
        shapes |= {
            _checkpoint_name("embed_tokens_per_layer"): (dims.ple_vocab, ple_row),
            _checkpoint_name("per_layer_model_projection"): gguf["per_layer_model_proj.weight"],
            _checkpoint_name("per_layer_projection_norm"): gguf["per_layer_proj_norm.weight"],
        }
        for k in range(GEMMA3N_ALTUP - 1):
            shapes[_checkpoint_name(f"altup_projections.{k}")] = square
            shapes[_checkpoint_name(f"altup_unembed_projections.{k}")] = square
    return shapes


def _layer_modules(dims: Dims) -> dict[str, str]:
    return _LAYER_3N if dims.family == "gemma3n" else _LAYER


def mapping_table(dims: Dims, out: Dims, cut: Cut, head: str | None, untied: bool) -> list[Source]:
    """Every tensor that the GGUF of ``out`` has, from a checkpoint of
    ``dims``; ``head`` is the name of the checkpoint's own output head.
    """
    expected = expected_tensors(out.family, out.table())
    # Gemma3RMSNorm multiplies by 1 + weight, Gemma3nRMSNorm by weight
    norm_add = 0.0 if dims.family == "gemma3n" else 1.0
    sources: list[Source] = []

    def put(name: str, *parts: Part, use: str | None = None) -> None:
        shape, its_use = expected[name]
        sources.append(Source(name, shape, parts, use or its_use))

    embedding = Part(_checkpoint_name("embed_tokens"), dims.n_vocab)
    has_head = dims.family != "gemma-embedding"
    separate = has_head and (untied or head is not None)
    put("token_embd.weight", embedding, use="lookup" if separate else None)
    put("output_norm.weight", Part(_checkpoint_name("norm"), 1, add=norm_add))
    if separate:
        shape, _ = expected["token_embd.weight"]
        part = Part(head, dims.n_vocab) if head else embedding
        sources.append(Source("output.weight", shape, (part,), "matmul"))
    for new, old in enumerate(cut.layers):
        for module, tensor in _layer_modules(dims).items():
            name = f"blk.{new}.{tensor}.weight"
            shape, _ = expected[name]
            is_narrowed = tensor == "ffn_down" and cut.n_ff != dims.n_ff
            part = Part(
                _checkpoint_name(module, old),
                n_rows=prod(shape[1:]),
                cols=((0, cut.n_ff),) if is_narrowed else None,
                add=norm_add if tensor.endswith("norm") else 0.0,
            )
            put(name, part)
    for name, shape in dense_tensors(dims.dense).items():
        sources.append(Source(name, shape, (Part(name, shape[1]),), "matmul"))
    if dims.family == "gemma3n":
        for name, parts in _gemma3n_parts(dims, cut).items():
            put(name, *parts)
    return sources


def _gemma3n_parts(dims: Dims, cut: Cut) -> dict[str, list[Part]]:
    """What Gemma 3n has beside its layers. The per-layer tables hold one
    block of columns (or rows) for each layer; only those of ``cut.layers``
    are kept.
    """
    width = dims.ple_width
    spans = _joined([(i * width, (i + 1) * width) for i in cut.layers])
    is_whole = len(cut.layers) == dims.n_layer
    table = Part(
        _checkpoint_name("embed_tokens_per_layer"),
        dims.ple_vocab,
        cols=None if is_whole else spans,
    )
    parts = {"per_layer_token_embd.weight": [table]}
    if dims.ple_vocab < dims.n_vocab:  # soft tokens have no rows there
        parts["per_layer_token_embd.weight"].append(Part(None, dims.n_vocab - dims.ple_vocab))
    projection = _checkpoint_name("per_layer_model_projection")
    parts["per_layer_model_proj.weight"] = [Part(projection, b - a, first=a) for a, b in spans]
    norm = Part(_checkpoint_name("per_layer_projection_norm"), 1)
    parts["per_layer_proj_norm.weight"] = [norm]
    for ours, theirs in (
        ("altup_proj", "altup_projections"),
        ("altup_unembd_proj", "altup_unembed_projections"),
    ):
        parts[f"{ours}.weight"] = [
            Part(_checkpoint_name(f"{theirs}.{k}"), dims.n_embd) for k in range(GEMMA3N_ALTUP - 1)
        ]
    return parts


def _joined(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbouring ranges as one."""
    joined = [spans[0]]
    for start, stop in spans[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)
