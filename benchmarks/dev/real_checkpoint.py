"""Real weights to convert:

Gemma 3 270M, dequantized from the GGUF of the ``sample`` extra into a bf16 Hugging Face folder.

    python -m edge_gemma.benchmarks.dev.real_checkpoint OUT

In: the sample package (or any Gemma 3 GGUF). Out: config.json, model.safetensors (bf16) and
tokenizer.model, as Google's own checkpoint has them. The weights had been quantized once already,
so it is a real model at the sample's quality, and the reference for what another quantization adds.
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.benchmarks.dev.models import stream_safetensors, to_bf16
from edge_gemma.benchmarks.dev.sample import length, sample_gguf, tokenizer_model
from edge_gemma.bundles.gguf import Header, TensorInfo, read_header

# GGUF → transformers, the inverse of the converter's table for gemma3
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def write_checkpoint(gguf_path: Path, out: Path) -> Path:
    """Dequantize a gemma3 GGUF into the folder ``out``."""
    header = read_header(gguf_path)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {_checkpoint_name(tensor.name): tensor for tensor in header.tensors}
    data = np.memmap(gguf_path, np.uint8, "r")

    def pieces(name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        # Gemma 3 stores norms less one
        less = 1.0 if name.endswith("norm.weight") else 0.0
        for rows in _dequantized(data, tensors[name]):
            yield to_bf16(rows - less)

    shapes = {name: tuple(reversed(tensor.shape)) for name, tensor in tensors.items()}
    stream_safetensors(out / "model.safetensors", shapes, pieces)
    (out / "config.json").write_text(json.dumps(_config(header), indent=1))
    (out / "tokenizer.model").write_bytes(tokenizer_model(gguf_path))
    return out


def _dequantized(data: np.ndarray, tensor: TensorInfo) -> Iterator[np.ndarray]:
    """Rows of a tensor as float32, some 4 million values at a time."""
    from gguf import GGMLQuantizationType, dequantize

    n_rows = int(np.prod(tensor.shape[1:], dtype=np.int64))
    step = max(1, (1 << 22) // tensor.shape[0])
    blocks = data[tensor.offset : tensor.offset + tensor.nbytes].reshape(n_rows, -1)
    for start in range(0, n_rows, step):
        rows = blocks[start : start + step]
        if tensor.type == "F32":
            yield rows.copy().view(np.float32)
        else:
            yield dequantize(rows, GGMLQuantizationType[tensor.type])


def _checkpoint_name(name: str) -> str:
    fixed = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if name in fixed:
        return fixed[name]
    _, layer, tensor, _ = name.split(".")
    return f"model.layers.{layer}.{_LAYER[tensor]}.weight"


def _config(header: Header) -> dict[str, Any]:
    def get(key: str) -> Any:
        return header.metadata[f"gemma3.{key}"]

    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": length(header.metadata["tokenizer.ggml.tokens"]),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length"),
        "query_pre_attn_scalar": get("attention.key_length"),
        "max_position_embeddings": get("context_length"),
        "sliding_window": get("attention.sliding_window"),
        "rope_theta": get("rope.freq_base"),
        "rope_local_base_freq": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="another Gemma 3 GGUF; default: the sample's")
    arguments = parser.parse_args()
    print(write_checkpoint(arguments.gguf or sample_gguf(), arguments.out))


if __name__ == "__main__":
    main()
