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

from edge_gemma.bundles.gguf import (
    Header,
    Skipped,
    find_strings,
    read_header,
)
from edge_gemma.bundles.manifest import (
    DecoderPart,
    Tensor,
)
from edge_gemma.errors import BundleError, UnsupportedModel

SUPPORTED = "gemma3 (270M, 1B, 4B) and gemma3n (E2B, E4B)"
GEMMA3N_KV_LAYERS = 20  # llama.cpp src/models/gemma3n.cpp: n_layer_kv_from_start
GEMMA3N_ALTUP, GEMMA3N_LAUREL = 4, 64
SWA_PERIOD = {
    "gemma3": 6,
    "gemma3n": 5,
}  # one global layer per period, the last, unless the file says otherwise
# our name → Gemma's token; a vocabulary without one of these simply lacks that role
SPECIAL_TOKENS = {
    "start_of_turn": "<start_of_turn>",
    "end_of_turn": "<end_of_turn>",
    "start_of_image": "<start_of_image>",
    "end_of_image": "<end_of_image>",
    "image_soft": "<image_soft_token>",
    "start_of_audio": "<start_of_audio>",
    "end_of_audio": "<end_of_audio>",
    "audio_soft": "<audio_soft_token>",
}
_TOKEN_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
}


@dataclass(frozen=True)
class Description:
    """What a GGUF says about itself, checked."""

    family: str
    name: str
    decoder: DecoderPart
    special_tokens: dict[str, int]
    chat_template: str | None
    licence: str


def expected_tensors(family: str, d: dict[str, int]) -> dict[str, tuple[tuple[int, ...], str]]:
    """name → (shape in ggml order, use) of every tensor llama.cpp reads for this family
    (src/models/gemma3.cpp, gemma3n.cpp).

    ``output.weight`` (the untied head) is not in it: it is optional. ``use`` of the token embedding
    is for the tied layout.
    """
    n_embd, n_ff, width = d["n_embd"], d["n_ff"], d["head_dim"]
    q, kv = d["n_head"] * width, d["n_head_kv"] * width
    table = {"token_embd": ((n_embd, d["n_vocab"]), "matmul"), "output_norm": ((n_embd,), "matmul")}
    layer = {
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
            result[f"blk.{i}.{name}.weight"] = (
                shape,
                "unused" if name in shared and i >= owners else "matmul",
            )
    return result


def _integer(header: Header, path: Path, key: str, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if isinstance(value, list) and value and all(v == value[0] for v in value):
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 1 << 24:
        raise UnsupportedModel(
            f"{path} has {key} = {value!r}; expected one positive number for all layers"
        )
    return value


def describe(path: str | Path) -> Description:
    """Read a GGUF's header and check that it is a Gemma this runtime can run. Raises BundleError,
    UnsupportedModel.
    """
    path = Path(path)
    header = read_header(path)
    meta = header.metadata
    family = meta.get("general.architecture")
    if family in ("clip", "mmproj"):
        raise UnsupportedModel(
            f"{path} is a vision projector (mmproj); import it together with its decoder: "
            f"edge-gemma import DECODER.gguf OUT --mmproj {path.name}"
        )
    if family not in SWA_PERIOD:
        raise UnsupportedModel(
            f"{path} holds the architecture {family!r}; supported are {SUPPORTED}"
        )
    if meta.get("split.count", 1) not in (0, 1):
        raise UnsupportedModel(
            f"{path} is one part of a split GGUF; join the parts first (llama-gguf-split --merge)"
        )
    if meta.get("general.type", "model") != "model":
        raise UnsupportedModel(f"{path} is of type {meta['general.type']!r}, not a model")

    def number(key: str, default: int | None = None) -> int:
        return _integer(header, path, f"{family}.{key}", default)

    vocabulary = meta.get("tokenizer.ggml.tokens")
    n_vocab = vocabulary.length if isinstance(vocabulary, Skipped) else len(vocabulary or ())
    if not isinstance(vocabulary, Skipped) or meta.get("tokenizer.ggml.model") != "llama":
        raise UnsupportedModel(
            f"{path} has no sentencepiece vocabulary (tokenizer.ggml.model = "
            f"{meta.get('tokenizer.ggml.model')!r}); every Gemma has one"
        )
    dims = {
        "n_layer": number("block_count"),
        "n_embd": number("embedding_length"),
        "n_ff": number("feed_forward_length"),
        "n_head": number("attention.head_count"),
        "head_dim": number("attention.key_length", 256),
        "n_vocab": n_vocab,
        "ple_width": number("embedding_length_per_layer_input") if family == "gemma3n" else 0,
    }
    dims["n_head_kv"] = number("attention.head_count_kv", dims["n_head"])
    if (
        number("attention.value_length", 256) != dims["head_dim"]
        or dims["n_head"] % dims["n_head_kv"]
    ):
        raise UnsupportedModel(
            f"{path}: heads of {dims['n_head']}/{dims['n_head_kv']} with key length "
            f"{dims['head_dim']} are not a Gemma's"
        )
    if family == "gemma3n":
        _check_gemma3n(header, path, dims["n_layer"])

    uses = _check_tensors(header, path, family, dims)
    sliding_window, kv_layers = _kv_layers(header, path, family, dims["n_layer"])
    with open(path, "rb") as file:
        header_sha256 = hashlib.sha256(file.read(header.data_offset)).hexdigest()
    decoder = DecoderPart(
        file="decoder.gguf",
        n_ctx_train=number("context_length"),
        sliding_window=sliding_window,
        kv_layers=kv_layers,
        tied_head="output.weight" not in uses,
        header_bytes=header.data_offset,
        header_sha256=header_sha256,
        tensors=tuple(
            Tensor(t.name, t.type, t.shape, t.offset, t.nbytes, uses[t.name])
            for t in header.tensors
        ),
        **dims,
    )
    template = meta.get("tokenizer.chat_template")
    return Description(
        family=family,
        name=str(meta.get("general.name") or path.stem),
        decoder=decoder,
        special_tokens=_special_tokens(header, path, vocabulary),
        chat_template=template if isinstance(template, str) and template.strip() else None,
        licence=str(meta.get("general.license", "gemma")),
    )


def _special_tokens(header: Header, path: Path, vocabulary: Skipped) -> dict[str, int]:
    found = find_strings(path, vocabulary, set(SPECIAL_TOKENS.values()))
    tokens = {name: found[text] for name, text in SPECIAL_TOKENS.items() if text in found}
    for name, key in _TOKEN_KEYS.items():
        value = header.metadata.get(f"tokenizer.ggml.{key}")
        if value is None and name in ("unk", "pad"):
            continue
        if not isinstance(value, int) or not 0 <= value < vocabulary.length:
            raise BundleError(
                f"{path}: tokenizer.ggml.{key} is {value!r}, outside the vocabulary of "
                f"{vocabulary.length}"
            )
        tokens[name] = value
    return tokens


def _check_gemma3n(header: Header, path: Path, n_layer: int) -> None:
    """llama.cpp fixes these numbers in code; a file that says otherwise would run and answer
    nonsense.
    """
    meta = header.metadata
    shared = meta.get("gemma3n.attention.shared_kv_layers")
    if n_layer < GEMMA3N_KV_LAYERS or (
        shared is not None and shared != n_layer - GEMMA3N_KV_LAYERS
    ):
        raise UnsupportedModel(
            f"{path}: {n_layer} layers of which {shared} share KV; llama.cpp runs gemma3n "
            f"with exactly {GEMMA3N_KV_LAYERS} layers that own KV"
        )
    for key, expected in (("altup.num_inputs", GEMMA3N_ALTUP), ("altup.active_idx", 0)):
        if meta.get(f"gemma3n.{key}", expected) != expected:
            raise UnsupportedModel(
                f"{path}: gemma3n.{key} is {meta[f'gemma3n.{key}']}; llama.cpp runs {expected}"
            )


def _check_tensors(header: Header, path: Path, family: str, dims: dict[str, int]) -> dict[str, str]:
    expected, uses = expected_tensors(family, dims), {}
    untied = header.tensor("output.weight")
    for tensor in header.tensors:
        shape, use = expected.pop(tensor.name, (None, None))
        if tensor.name == "output.weight":
            shape, use = (dims["n_embd"], dims["n_vocab"]), "matmul"
        elif tensor.name == "token_embd.weight" and untied:
            use = "lookup"
        if shape is None:
            raise UnsupportedModel(
                f"{path} holds the tensor {tensor.name!r}, which a {family} of "
                f"{dims['n_layer']} layers does not have"
            )
        if tensor.shape != shape:
            raise BundleError(
                f"{path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, the "
                f"header's numbers say {list(shape)}"
            )
        if len(shape) == 1 and tensor.type != "F32":
            raise UnsupportedModel(
                f"{path}: tensor {tensor.name!r} is {tensor.type}; llama.cpp computes norms in F32"
            )
        uses[tensor.name] = use
    if expected:
        raise BundleError(
            f"{path} lacks {len(expected)} tensors, among them {next(iter(expected))!r}"
        )
    return uses


def _kv_layers(
    header: Header, path: Path, family: str, n_layer: int
) -> tuple[int, tuple[str, ...]]:
    """Sliding window in tokens and the kinds of the layers that own KV (llama.cpp
    load_swa_pattern).
    """
    window = header.metadata.get(f"{family}.attention.sliding_window", 0)
    if not isinstance(window, int) or not 0 <= window <= 1 << 24:
        raise UnsupportedModel(f"{path}: {family}.attention.sliding_window is {window!r}")
    pattern = header.metadata.get(f"{family}.attention.sliding_window_pattern", SWA_PERIOD[family])
    if isinstance(pattern, list):
        if len(pattern) < n_layer:
            raise BundleError(
                f"{path}: sliding_window_pattern has {len(pattern)} entries for {n_layer} layers"
            )
        sliding = [bool(p) for p in pattern[:n_layer]]
    else:
        period = int(pattern)
        sliding = [period == 0 or i % period < period - 1 for i in range(n_layer)]
    owners = GEMMA3N_KV_LAYERS if family == "gemma3n" else n_layer
    return window, tuple("sliding" if s and window else "global" for s in sliding[:owners])
