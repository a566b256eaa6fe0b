"""EmbeddingGemma checkpoints with random weights, laid out as the real repository is, and the texts
whose vectors are stored in reference/gemma-embedding.npz.
"""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints import REFERENCE

from edge_gemma.benchmarks.dev.models import values, write_safetensors

SEED = 300
PROMPTS = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "STS": "task: sentence similarity | query: ",
}
# Longer than the window, spaces at the ends, tokens written out, several scripts, nothing
LONG = "The river rose in the night, and by the morning the old bridge was gone. " * 16
TEXTS = (
    "What does the fox say?",
    " spaces around  and within ",
    "<bos>typed</s> <start_of_turn> tokens & <b>HTML</b>\n\nend",
    "Größe, 長さ, длина, 🦊",
    "",
    LONG,
)
WIDE = {  # the real model but for its vocabulary
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 24,
    "num_attention_heads": 3,
    "head_dim": 256,
    "sliding_window": 512,
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "head_dim": 128,
    "sliding_window": 64,
}
SIZES = {"small": SMALL, "wide": WIDE}


def config(size: str) -> dict:
    """config.json as the real repository has it."""
    shape = SIZES[size]
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(24)]
    return {
        "_sliding_window_pattern": 6,
        "architectures": ["Gemma3TextModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "dtype": "float32",
        "eos_token_id": 1,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "layer_types": kinds[: shape["num_hidden_layers"]],
        "max_position_embeddings": 2048,
        "model_type": "gemma3_text",
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": shape["head_dim"],
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "transformers_version": "4.57.0.dev0",
        "use_bidirectional_attention": True,
        "use_cache": True,
        "vocab_size": 768,
        **shape,
    }


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, spelled as Gemma3TextModel saves them: without ``model.``."""
    n_embd, n_ff, head = (config[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = {
        "self_attn.q_proj": (q, n_embd),
        "self_attn.k_proj": (kv, n_embd),
        "self_attn.v_proj": (kv, n_embd),
        "self_attn.o_proj": (n_embd, q),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (n_ff, n_embd),
        "mlp.up_proj": (n_ff, n_embd),
        "mlp.down_proj": (n_embd, n_ff),
        "input_layernorm": (n_embd,),
        "post_attention_layernorm": (n_embd,),
        "pre_feedforward_layernorm": (n_embd,),
        "post_feedforward_layernorm": (n_embd,),
    }
    found: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config["vocab_size"], n_embd),
        "norm.weight": (n_embd,),
    }
    for i in range(config["num_hidden_layers"]):
        found |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found


def write_embedding(out: Path, size: str = "small", *, dtype: str = "F32") -> Path:
    """A whole repository: weights, dense layers, tokenizer, prompts."""
    made = config(size)
    n_embd = made["hidden_size"]
    dense = {"2_Dense": (4 * n_embd, n_embd), "3_Dense": (n_embd, 4 * n_embd)}
    kinds = {
        "": "Transformer",
        "1_Pooling": "Pooling",
        "2_Dense": "Dense",
        "3_Dense": "Dense",
        "4_Normalize": "Normalize",
    }
    for folder in ("1_Pooling", "2_Dense", "3_Dense"):
        (out / folder).mkdir(parents=True)

    def put(name: str, content: object) -> None:
        (out / name).write_text(json.dumps(content))

    put("config.json", made)
    tensors = [(name, values(name, shape, SEED, "gemma3")) for name, shape in shapes(made).items()]
    write_safetensors(out / "model.safetensors", tensors, dtype)
    for folder, shape in dense.items():
        weight = values(folder, shape, SEED, "gemma3")
        write_safetensors(out / folder / "model.safetensors", [("linear.weight", weight)], dtype)
        settings = {"in_features": shape[1], "out_features": shape[0], "bias": False}
        activation = "torch.nn.modules.linear.Identity"
        put(f"{folder}/config.json", {**settings, "activation_function": activation})
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    put("modules.json", modules)
    modes = ("cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling = {f"pooling_mode_{mode}": False for mode in modes}
    pooling |= {"word_embedding_dimension": n_embd, "pooling_mode_mean_tokens": True}
    put("1_Pooling/config.json", {**pooling, "include_prompt": True})
    put("sentence_bert_config.json", {"max_seq_length": 2048, "do_lower_case": False})
    put(
        "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": PROMPTS,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    _write_tokenizer(out)
    return out


def _write_tokenizer(out: Path) -> None:
    """The small vocabulary beside the recipes, with begin and end around each text."""
    tokenizer = json.loads((REFERENCE / "tokenizer.json").read_text())
    special = {name: {"SpecialToken": {"id": name, "type_id": 0}} for name in ("<bos>", "<eos>")}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special["<bos>"], text, special["<eos>"]],
        "pair": [special["<bos>"], text, special["<eos>"]],
        "special_tokens": {
            name: {"id": name, "ids": [id], "tokens": [name]}
            for name, id in (("<eos>", 1), ("<bos>", 2))
        },
    }
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    (out / "tokenizer.model").write_bytes((REFERENCE / "tokenizer.model").read_bytes())
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    flags = {"add_bos_token": True, "add_eos_token": True, "model_max_length": 2048}
    kind = {"tokenizer_class": "GemmaTokenizer", "padding_side": "right"}
    (out / "tokenizer_config.json").write_text(json.dumps({**names, **flags, **kind}))
