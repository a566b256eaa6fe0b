"""What a Gemma 3 or 3n GGUF says about itself, held against what its family must have.

In: a GGUF that nobody has checked. Out: :class:`Description`: dimensions, tensor table, special
tokens, chat template. Every tensor's name and shape is compared with the family's table, because
llama.cpp would divide by zero, assert or answer nonsense on some contradictions. The converter
describes what it wrote by the same function, so there is one derivation of the facts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from edge_gemma.bundles.gguf import Header, Skipped, TensorInfo, read_header
from edge_gemma.bundles.manifest import (
    MAX_COUNT,
    DecoderPart,
    EmbeddingPart,
    Family,
    KvLayer,
    Tensor,
    Use,
)
from edge_gemma.bundles.metadata import Metadata
from edge_gemma.bundles.token_roles import read_roles
from edge_gemma.errors import BundleError, UnsupportedModel

SUPPORTED = "gemma3 (270M, 1B, 4B) and gemma3n (E2B, E4B), and EmbeddingGemma (300M)"
GEMMA3N_KV_LAYERS = 20  # llama.cpp src/models/gemma3n.cpp: n_layer_kv_from_start
GEMMA3N_ALTUP, GEMMA3N_LAUREL, GEMMA3N_PLE_WIDTH = 4, 64, 256
GEMMA3N_SOFTCAP = 30.0
# one global layer per period, the last, unless the file says otherwise
SWA_PERIOD: dict[Family, int] = {"gemma3": 6, "gemma3n": 5, "gemma-embedding": 6}
DENSE = ("dense_2", "dense_3")  # EmbeddingGemma's layers after pooling, by their GGUF names
MRL_DIMENSIONS = (768, 512, 256, 128)  # to which EmbeddingGemma's vectors may be cut
# A GGUF does not keep EmbeddingGemma's prompts: these are what its repository gives
EMBEDDING_PROMPTS = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
}
_MEAN = 1  # llama.h, enum llama_pooling_type
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
# Keys below the family's name that llama.cpp reads for every architecture (llama-model.cpp,
# load_hparams) and that change what it computes: the only value with which a Gemma is a Gemma.
_NEUTRAL_COUNTS = ("expert_count", "expert_used_count", "nextn_predict_layers")
_NEUTRAL_NUMBERS = ("attention.max_alibi_bias", "attention.clamp_kqv")
_ROPE_SCALINGS = ("none", "linear", "yarn")
# key → (lowest, highest) of the float32 keys that llama.cpp reads for a Gemma if they are there
_NUMBERS = {
    "rope.freq_base": (1.0, 1e12),
    "rope.freq_base_swa": (1.0, 1e12),
    "rope.scaling.factor": (0.0, 1e6),
    "rope.scale_linear": (0.0, 1e6),
    "rope.scaling.attn_factor": (1e-6, 1e6),
    "rope.scaling.alpha": (0.0, 1e6),
    "rope.scaling.yarn_log_multiplier": (-1e6, 1e6),
    "rope.scaling.yarn_ext_factor": (-1.0, 1e6),
    "rope.scaling.yarn_attn_factor": (0.0, 1e6),
    "rope.scaling.yarn_beta_fast": (-1.0, 1e6),
    "rope.scaling.yarn_beta_slow": (-1.0, 1e6),
    "final_logit_softcapping": (0.0, 1e6),
    "attn_logit_softcapping": (0.0, 1e6),
}
# what Ollama calls the tensors of encoders that it keeps in the decoder's file
_ENCODER_PREFIXES = ("v.", "mm.", "a.")
# types that llama.cpp multiplies no weight in
_NO_WEIGHT_TYPES = ("I8", "I16", "I32", "I64", "F64")


@dataclass(frozen=True)
class Description:
    """What a GGUF says about itself, checked."""

    family: Family
    name: str
    decoder: DecoderPart
    special_tokens: dict[str, int]
    end_tokens: tuple[int, ...]
    chat_template: str | None
    licence: str
    notes: tuple[str, ...] = ()  # what the file says wrongly or leaves out, and what is taken
    embedding: EmbeddingPart | None = None


def expected_tensors(family: Family, d: dict[str, int]) -> dict[str, tuple[tuple[int, ...], Use]]:
    """name → (shape in ggml order, use) of every tensor llama.cpp reads for this family
    (src/models/gemma3.cpp, gemma3n.cpp, gemma-embedding.cpp).

    ``output.weight`` (the untied head) is not in it: it is optional, as EmbeddingGemma's dense
    layers are. ``use`` of the token embedding is for the tied layout; EmbeddingGemma has no head.
    """
    n_embd, n_ff, width = d["n_embd"], d["n_ff"], d["head_dim"]
    q, kv = d["n_head"] * width, d["n_head_kv"] * width
    is_embedding = family == "gemma-embedding"
    table: dict[str, tuple[tuple[int, ...], Use]] = {
        "token_embd": ((n_embd, d["n_vocab"]), "lookup" if is_embedding else "matmul"),
        "output_norm": ((n_embd,), "matmul"),
    }
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (n_embd,),
        "attn_q": (n_embd, q),
        "attn_k": (n_embd, kv),
        "attn_v": (n_embd, kv),
        "attn_output": (q, n_embd),
        "attn_q_norm": (width,),
        "attn_k_norm": (width,),
        "post_attention_norm": (n_embd,),
        "ffn_norm": (n_embd,),
        "ffn_gate": (n_embd, n_ff),
        "ffn_up": (n_embd, n_ff),
        "ffn_down": (n_ff, n_embd),
        "post_ffw_norm": (n_embd,),
    }
    owners = d["n_layer"]
    if family == "gemma3n":
        ple, altup, rank, owners = d["ple_width"], GEMMA3N_ALTUP, GEMMA3N_LAUREL, GEMMA3N_KV_LAYERS
        table |= {
            "altup_proj": ((n_embd, n_embd, altup - 1), "matmul"),
            "altup_unembd_proj": ((n_embd, n_embd, altup - 1), "matmul"),
            "per_layer_token_embd": ((ple * d["n_layer"], d["n_vocab"]), "lookup"),
            "per_layer_model_proj": ((n_embd, ple * d["n_layer"]), "matmul"),
            "per_layer_proj_norm": ((ple,), "matmul"),
        }
        layer |= {
            "inp_gate": (n_embd, ple),
            "proj": (ple, n_embd),
            "post_norm": (n_embd,),
            "altup_correct_coef": (altup, altup),
            "altup_correct_scale": (n_embd,),
            "altup_predict_coef": (altup, altup * altup),
            "altup_router": (n_embd, altup),
            "altup_router_norm": (n_embd,),
            "laurel_l": (n_embd, rank),
            "laurel_r": (rank, n_embd),
            "laurel_post_norm": (n_embd,),
        }
    shared = {"attn_k", "attn_v", "attn_k_norm"}
    result = {f"{name}.weight": value for name, value in table.items()}
    for i in range(d["n_layer"]):
        for name, shape in layer.items():
            use: Use = "unused" if name in shared and i >= owners else "matmul"
            result[f"blk.{i}.{name}.weight"] = (shape, use)
    return result


def describe(path: str | Path, *, repairable: bool = False) -> Description:
    """Read a GGUF's header and check that it is a Gemma this runtime can run. Raises BundleError,
    UnsupportedModel (the file's name, and the key's where one is at fault).

    ``repairable``: let pass what an import writes otherwise: tensors of an encoder beside the
    decoder's (they are not in the table), and norms in F16 or BF16.
    """
    path = Path(path)
    header = read_header(path)
    meta = Metadata(header, path)
    family = _family(meta, path)
    _check_file_kind(meta, path)
    vocabulary = _vocabulary(header, meta)
    dims = _dimensions(header, meta, path, family, vocabulary.length)
    _check_numbers(meta, family, dims)
    if family == "gemma3n":
        _check_gemma3n(meta, path, dims["n_layer"])

    dense = _dense(meta, header, path, dims["n_embd"]) if family == "gemma-embedding" else ()
    uses = _check_tensors(header, path, family, dims, dense, repairable)
    sliding_window, kv_layers = _kv_layers(meta, family, dims["n_layer"])
    with open(path, "rb") as file:
        header_sha256 = hashlib.sha256(file.read(header.data_offset)).hexdigest()
    n_ctx_train = meta.integer(f"{family}.context_length", 1, MAX_COUNT)
    decoder = DecoderPart(
        file="decoder.gguf",
        n_ctx_train=n_ctx_train,
        sliding_window=sliding_window,
        kv_layers=kv_layers,
        tied_head="output.weight" not in uses,
        head_from_embedding=False,  # a file does not say: the converter does
        header_bytes=header.data_offset,
        header_sha256=header_sha256,
        tensors=tuple(
            Tensor(t.name, t.type, t.shape, t.offset, t.nbytes, uses[t.name])
            for t in header.tensors
            if t.name in uses
        ),
        **dims,
    )
    template = meta.text("tokenizer.chat_template", "")
    roles = read_roles(meta, path, vocabulary)
    return Description(
        family=family,
        name=meta.text("general.name", "") or path.stem,
        decoder=decoder,
        special_tokens=roles.special_tokens,
        end_tokens=roles.end_tokens,
        chat_template=template if template.strip() else None,
        licence=meta.text("general.license", "gemma"),
        notes=(*roles.notes, *_flag_notes(meta, family), *_dense_notes(family, dense)),
        embedding=(
            _embedding(meta, dense, dims["n_embd"], n_ctx_train)
            if family == "gemma-embedding"
            else None
        ),
    )


def _family(meta: Metadata, path: Path) -> Family:
    architecture = meta.text("general.architecture")
    if architecture in ("clip", "mmproj"):
        raise UnsupportedModel(
            f"{path} is a vision projector (mmproj); import it together with its decoder: "
            f"edge-gemma import DECODER.gguf OUT --mmproj {path.name}"
        )
    for family in SWA_PERIOD:
        if architecture == family:
            return family
    raise UnsupportedModel(
        f"{path} holds the architecture {architecture!r}; supported are {SUPPORTED}"
    )


def _check_file_kind(meta: Metadata, path: Path) -> None:
    """That the file is a whole model, and that llama.cpp can read what it reads of any file."""
    if "split.count" in meta:
        if meta.type("split.count") != "uint16":
            meta.refuse("split.count", "uint16")
        if meta.value("split.count") not in (0, 1):
            raise UnsupportedModel(
                f"{path} is one part of a split GGUF; join the parts first "
                "(llama-gguf-split --merge)"
            )
    kind = meta.text("general.type", "model")
    if kind != "model":
        hint = "; use it with its model: edge-gemma run BUNDLE --lora FILE" * (kind == "adapter")
        raise UnsupportedModel(f"{path} is of type {kind!r}, not a model{hint}")
    meta.integer("general.file_type", 0, MAX_COUNT, 0)
    meta.integer("general.quantization_version", 0, MAX_COUNT, 2)


def _vocabulary(header: Header, meta: Metadata) -> Skipped:
    """The vocabulary, its scores and token types: of the right type and of one length."""
    if meta.text("tokenizer.ggml.model") != "llama":
        meta.refuse("tokenizer.ggml.model", "'llama': every Gemma has a sentencepiece vocabulary")
    meta.text("tokenizer.ggml.pre", "default")
    n_vocab = meta.array("tokenizer.ggml.tokens", ("string",))
    tokens = header.metadata["tokenizer.ggml.tokens"]
    if not isinstance(tokens, Skipped) or not 1 <= n_vocab <= MAX_COUNT:
        meta.refuse("tokenizer.ggml.tokens", f"1 to {MAX_COUNT} strings")
    meta.finite("tokenizer.ggml.scores", n_vocab)
    meta.array("tokenizer.ggml.token_type", ("int32", "uint32"), n_vocab)
    for key in meta.keys():
        if key.startswith("tokenizer.ggml.add_"):
            meta.flag(key)
    for name in ("remove_extra_whitespaces", "escape_whitespaces"):
        meta.flag(f"tokenizer.ggml.{name}", False)
    return tokens


# flags of the tokenizer: (the only right value of a Gemma, what llama.cpp assumes for a
# sentencepiece vocabulary where the key is missing)
_FLAGS = {
    "add_space_prefix": (False, True),
    "add_bos_token": (True, True),
    "add_eos_token": (False, False),
}
_EMBEDDING_FLAGS = ("add_bos_token", "add_eos_token")  # which an embedding part keeps


def _flag_notes(meta: Metadata, family: Family) -> list[str]:
    """What a file says wrongly about its tokenizer; the engine sets the right value."""
    notes = []
    for name, (right, assumed) in _FLAGS.items():
        if family == "gemma-embedding" and name in _EMBEDDING_FLAGS:
            continue
        key = f"tokenizer.ggml.{name}"
        if meta.flag(key, assumed) != right:
            found = meta.value(key) if key in meta else "missing"
            notes.append(f"{key} is {found}; taken is {right}, as every Gemma has it")
    return notes


def _dimensions(
    header: Header, meta: Metadata, path: Path, family: Family, n_vocab: int
) -> dict[str, int]:
    """The decoder's dimensions by their names in the manifest.

    The size of a head is that of its norm where the file does not say it; llama.cpp would take
    n_embd / n_head, which no Gemma has, so the engine is told.
    """
    norm = header.tensor("blk.0.attn_q_norm.weight")
    default_head_dim = norm.shape[0] if norm is not None else 256
    n_layer = meta.integer(f"{family}.block_count", 1, MAX_LAYERS)

    def per_layer(key: str, default: int | None = None) -> int:
        return meta.layers(f"{family}.{key}", n_layer, MAX_COUNT, default)

    dims = {
        "n_layer": n_layer,
        "n_embd": meta.integer(f"{family}.embedding_length", 1, MAX_COUNT),
        "n_ff": per_layer("feed_forward_length"),
        "n_head": per_layer("attention.head_count"),
        "head_dim": meta.integer(f"{family}.attention.key_length", 1, MAX_COUNT, default_head_dim),
        "n_vocab": n_vocab,
        "ple_width": 0,
    }
    if family == "gemma3n":
        key = f"{family}.embedding_length_per_layer_input"
        dims["ple_width"] = meta.integer(key, GEMMA3N_PLE_WIDTH, GEMMA3N_PLE_WIDTH)
    dims["n_head_kv"] = per_layer("attention.head_count_kv", dims["n_head"])
    key = f"{family}.attention.value_length"
    value_length = meta.integer(key, 1, MAX_COUNT, default_head_dim)
    if value_length != dims["head_dim"] or dims["n_head"] % dims["n_head_kv"]:
        raise UnsupportedModel(
            f"{path}: {dims['n_head']} heads with {family}.attention.head_count_kv "
            f"{dims['n_head_kv']}, {family}.attention.key_length {dims['head_dim']} and "
            f"{family}.attention.value_length {value_length} are not a Gemma's"
        )
    return dims


def _check_numbers(meta: Metadata, family: Family, dims: dict[str, int]) -> None:
    """The hyperparameters that the manifest does not keep, and that llama.cpp computes with."""
    meta.number(f"{family}.attention.layer_norm_rms_epsilon", 1e-12, 1.0)
    for name, (low, high) in _NUMBERS.items():
        meta.number(f"{family}.{name}", low, high, low)
    for name in _NEUTRAL_COUNTS:
        meta.integer(f"{family}.{name}", 0, 0, 0)
    for name in _NEUTRAL_NUMBERS:
        meta.number(f"{family}.{name}", 0.0, 0.0, 0.0)
    is_causal, pooling = family != "gemma-embedding", f"{family}.pooling_type"
    if meta.flag(f"{family}.attention.causal", is_causal) != is_causal:
        meta.refuse(f"{family}.attention.causal", str(is_causal))
    only = 0 if is_causal else _MEAN
    meta.integer(pooling, only, only, only)
    meta.flag(f"{family}.rope.scaling.finetuned", False)
    scaling = f"{family}.rope.scaling.type"
    if meta.text(scaling, "linear") not in _ROPE_SCALINGS:
        meta.refuse(scaling, " or ".join(_ROPE_SCALINGS))
    meta.integer(f"{family}.rope.scaling.original_context_length", 1, MAX_COUNT, 1)
    same_as = {
        "vocab_size": "n_vocab",
        "embedding_length_out": "n_embd",
        "rope.dimension_count": "head_dim",
        "rope.dimension_count_swa": "head_dim",
        "attention.key_length_swa": "head_dim",
        "attention.value_length_swa": "head_dim",
    }
    for name, dimension in same_as.items():
        size = dims[dimension]
        meta.integer(f"{family}.{name}", size, size, size)


def _check_gemma3n(meta: Metadata, path: Path, n_layer: int) -> None:
    """llama.cpp fixes these numbers in code; a file that says otherwise would run and answer
    nonsense.
    """
    owners = GEMMA3N_KV_LAYERS
    # the published files write this one as a float32
    shared = meta.whole(
        "gemma3n.attention.shared_kv_layers", 0, MAX_LAYERS, max(0, n_layer - owners)
    )
    if n_layer < owners or shared != n_layer - owners:
        raise UnsupportedModel(
            f"{path}: gemma3n.block_count is {n_layer} and gemma3n.attention.shared_kv_layers "
            f"{shared}; llama.cpp runs gemma3n with exactly {owners} layers that own KV"
        )
    fixed = {"altup.num_inputs": GEMMA3N_ALTUP, "altup.active_idx": 0}
    for name, only in fixed.items():
        meta.integer(f"gemma3n.{name}", only, only, only)
    softcap = "gemma3n.final_logit_softcapping"
    meta.number(softcap, GEMMA3N_SOFTCAP, GEMMA3N_SOFTCAP, GEMMA3N_SOFTCAP)
    sparsity = "gemma3n.activation_sparsity_scale"
    if sparsity in meta:
        meta.array(sparsity, ("float32",), n_layer)  # −inf in the layers without sparsity


def _dense(meta: Metadata, header: Header, path: Path, n_embd: int) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of EmbeddingGemma's dense layers; () where the file has none. llama.cpp
    aborts where they do not begin and end at the width of the embedding.
    """
    present = [name for name in DENSE if header.tensor(f"{name}.weight") is not None]
    if not present:
        return ()
    if len(present) < len(DENSE):
        raise UnsupportedModel(
            f"{path} holds {present[0]} alone of EmbeddingGemma's dense layers "
            f"({', '.join(DENSE)}); convert the checkpoint instead"
        )
    inner = meta.integer("gemma-embedding.dense_2_feat_out", 1, MAX_COUNT)
    meta.integer("gemma-embedding.dense_2_feat_in", n_embd, n_embd, n_embd)
    meta.integer("gemma-embedding.dense_3_feat_in", inner, inner)
    meta.integer("gemma-embedding.dense_3_feat_out", n_embd, n_embd, n_embd)
    return (n_embd, inner), (inner, n_embd)


def _dense_notes(family: Family, dense: tuple[tuple[int, int], ...]) -> list[str]:
    if family != "gemma-embedding" or dense:
        return []
    return [
        "the file has no dense layers: its vectors differ from those of sentence-transformers; "
        "`edge-gemma convert` on the checkpoint keeps them"
    ]


def _embedding(
    meta: Metadata, dense: tuple[tuple[int, int], ...], n_embd: int, n_ctx_train: int
) -> EmbeddingPart:
    """How llama.cpp embeds with the file. Prompts and widths are EmbeddingGemma's own, which no
    GGUF keeps; a checkpoint's files say them (convert/embedding.py).
    """
    return EmbeddingPart(
        width=n_embd,
        dimensions=(n_embd, *(width for width in MRL_DIMENSIONS if width < n_embd)),
        max_tokens=n_ctx_train,
        add_bos=meta.flag("tokenizer.ggml.add_bos_token", True),
        add_eos=meta.flag("tokenizer.ggml.add_eos_token", True),
        dense=dense,
        prompts=EMBEDDING_PROMPTS,
    )


def dense_tensors(dense: tuple[tuple[int, int], ...]) -> dict[str, tuple[int, int]]:
    """GGUF name → shape in ggml order of EmbeddingGemma's dense layers."""
    return {f"{name}.weight": shape for name, shape in zip(DENSE, dense, strict=False)}


def _check_tensors(
    header: Header,
    path: Path,
    family: Family,
    dims: dict[str, int],
    dense: tuple[tuple[int, int], ...],
    repairable: bool,
) -> dict[str, Use]:
    expected = expected_tensors(family, dims)
    expected |= {name: (shape, "matmul") for name, shape in dense_tensors(dense).items()}
    head_use: Use = "unused" if family == "gemma-embedding" else "matmul"
    head: tuple[tuple[int, ...], Use] = ((dims["n_embd"], dims["n_vocab"]), head_use)
    untied = header.tensor("output.weight") is not None
    if untied:
        expected["output.weight"] = head
    uses: dict[str, Use] = {}
    for tensor in header.tensors:
        if repairable and tensor.name.startswith(_ENCODER_PREFIXES):
            continue
        if tensor.name not in expected:
            raise UnsupportedModel(
                f"{path} holds the tensor {tensor.name!r}, which a {family} of "
                f"{dims['n_layer']} layers does not have"
            )
        shape, use = expected.pop(tensor.name)
        if tensor.name == "token_embd.weight" and untied:
            use = "lookup"
        if tensor.shape != shape:
            raise BundleError(
                f"{path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, the "
                f"header's numbers say {list(shape)}"
            )
        _check_type(tensor, path, repairable)
        uses[tensor.name] = use
    if expected:
        raise BundleError(
            f"{path} lacks {len(expected)} tensors, among them {next(iter(expected))!r}"
        )
    return uses


def _check_type(tensor: TensorInfo, path: Path, repairable: bool) -> None:
    widened = ("F32", "F16", "BF16") if repairable else ("F32",)
    if len(tensor.shape) == 1 and tensor.type not in widened:
        raise UnsupportedModel(
            f"{path}: tensor {tensor.name!r} is {tensor.type}; llama.cpp computes norms in F32"
        )
    if tensor.type in _NO_WEIGHT_TYPES:
        raise UnsupportedModel(
            f"{path}: tensor {tensor.name!r} is {tensor.type}; llama.cpp multiplies no weights "
            "of that type"
        )


def _kv_layers(meta: Metadata, family: Family, n_layer: int) -> tuple[int, tuple[KvLayer, ...]]:
    """Sliding window in tokens and the kinds of the layers that own KV (llama.cpp,
    load_swa_pattern).
    """
    key = f"{family}.attention.sliding_window"
    window = meta.integer(key, 1, MAX_COUNT)  # without it llama.cpp slides in no layer
    pattern_key = f"{key}_pattern"
    if meta.type(pattern_key).startswith("array"):
        sliding = meta.flags(pattern_key, n_layer)
    else:
        period = meta.integer(pattern_key, 0, MAX_LAYERS, SWA_PERIOD[family])
        sliding = [period == 0 or i % period < period - 1 for i in range(n_layer)]
    owners = sliding
    if family == "gemma3n":
        owners, sharing = sliding[:GEMMA3N_KV_LAYERS], sliding[GEMMA3N_KV_LAYERS:]
        # a layer that shares KV reads the last but one owner's if it slides, else the last one's
        if (True in sharing and not owners[-2]) or (False in sharing and owners[-1]):
            meta.refuse(pattern_key, f"layers {len(owners) - 1} sliding and {len(owners)} global")
    if window and not any(owners):  # llama.cpp asserts that a window has a layer to slide in
        meta.refuse(pattern_key, f"at least one sliding layer for a window of {window}")
    kinds: list[KvLayer] = ["sliding" if slides and window else "global" for slides in owners]
    return window, tuple(kinds)
