"""A full-size Gemma 3n checkpoint with random weights: sharded bf16 safetensors, as large as the
real one.

    python -m edge_gemma.benchmarks.dev.synthetic_checkpoint e2b OUT          # 10.3 GB
    python -m edge_gemma.benchmarks.dev.synthetic_checkpoint e4b OUT          # 15.2 GB

In: the name of a size. Out: a Hugging Face folder with decoder and audio tower (no vision). Values
repeat a pool of 16 million normal deviates from another start in each tensor, scaled by a power of
two, so that writing is as fast as the disk; quantizing takes the time that real weights take. The
vocabulary is the sample model's real one.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from math import log2, prod
from pathlib import Path

import numpy as np
from edge_gemma.benchmarks.dev.real_checkpoint import _bf16, _tokenizer_model, sample_gguf
from edge_gemma.benchmarks.dev.synthetic import SHAPES

from edge_gemma.bundles.gguf import read_header

SIZES = {
    name: (shape.n_layer, shape.n_ff) for name, shape in SHAPES.items() if shape.family == "gemma3n"
}
_E2B = SHAPES["e2b"]  # the rest is the same in both
N_VOCAB, N_EMBD, N_HEAD, N_KV, HEAD_DIM = (
    _E2B.n_vocab,
    _E2B.n_embd,
    _E2B.n_head,
    _E2B.n_head_kv,
    _E2B.head_dim,
)
N_PLE, PLE = 262144, 256
SHARD_BYTES = 4 << 30
_POOL = 1 << 24


def shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the decoder and the audio tower, by transformers 5's names."""
    n_layer, n_ff = SIZES[size]
    text, d = "model.language_model.", N_EMBD
    yield f"{text}embed_tokens.weight", (N_VOCAB, d)
    yield f"{text}embed_tokens_per_layer.weight", (N_PLE, PLE * n_layer)
    for name, shape in {
        "norm": (d,),
        "per_layer_model_projection": (PLE * n_layer, d),
        "per_layer_projection_norm": (PLE,),
    }.items():
        yield f"{text}{name}.weight", shape
    for k in range(3):
        yield f"{text}altup_projections.{k}.weight", (d, d)
        yield f"{text}altup_unembed_projections.{k}.weight", (d, d)
    layer = {
        "self_attn.q_proj.weight": (N_HEAD * HEAD_DIM, d),
        "self_attn.k_proj.weight": (N_KV * HEAD_DIM, d),
        "self_attn.v_proj.weight": (N_KV * HEAD_DIM, d),
        "self_attn.o_proj.weight": (d, N_HEAD * HEAD_DIM),
        "self_attn.q_norm.weight": (HEAD_DIM,),
        "self_attn.k_norm.weight": (HEAD_DIM,),
        "mlp.gate_proj.weight": (n_ff, d),
        "mlp.up_proj.weight": (n_ff, d),
        "mlp.down_proj.weight": (d, n_ff),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "pre_feedforward_layernorm.weight": (d,),
        "post_feedforward_layernorm.weight": (d,),
        "altup.correct_output_scale": (d,),
        "altup.correction_coefs.weight": (4, 4),
        "altup.prediction_coefs.weight": (16, 4),
        "altup.modality_router.weight": (4, d),
        "altup.router_norm.weight": (d,),
        "laurel.linear_left.weight": (64, d),
        "laurel.linear_right.weight": (d, 64),
        "laurel.post_laurel_norm.weight": (d,),
        "per_layer_input_gate.weight": (PLE, d),
        "per_layer_projection.weight": (d, PLE),
        "post_per_layer_input_norm.weight": (d,),
    }
    for i in range(n_layer):
        for name, shape in layer.items():
            yield f"{text}layers.{i}.{name}", shape
    yield from _audio_shapes()


def _audio_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    tower, h = "model.audio_tower.", 1536
    sscp = {
        "conv_0.conv": (128, 1, 3, 3),
        "conv_0.norm": (128,),
        "conv_1.conv": (32, 128, 3, 3),
        "conv_1.norm": (32,),
        "input_proj_linear": (h, 1024),
    }
    for name, shape in sscp.items():
        yield f"{tower}subsample_conv_projection.{name}.weight", shape
    ffw = {
        "pre_layer_norm.weight": (h,),
        "ffw_layer_1.weight": (4 * h, h),
        "ffw_layer_2.weight": (h, 4 * h),
        "post_layer_norm.weight": (h,),
    }
    attention = {f"attn.{x}_proj.weight": (h, h) for x in "qkv"} | {
        "attn.per_dim_scale": (h // 8,),
        "attn.relative_position_embedding.pos_proj.weight": (h, h),
    }
    attention |= {"pre_attn_norm.weight": (h,), "post.weight": (h, h), "post_norm.weight": (h,)}
    conv = {
        "pre_layer_norm.weight": (h,),
        "linear_start.weight": (2 * h, h),
        "depthwise_conv1d.weight": (h, 1, 5),
        "conv_norm.weight": (h,),
        "linear_end.weight": (h, h),
    }
    for i in range(12):
        for group, members in {
            "ffw_layer_start": ffw,
            "attention": attention,
            "lconv1d": conv,
            "ffw_layer_end": ffw,
        }.items():
            for name, shape in members.items():
                yield f"{tower}conformer.{i}.{group}.{name}", shape
        yield f"{tower}conformer.{i}.norm.weight", (h,)
    for name, shape in {
        "embedding": (128, h),
        "hard_embedding_norm": (h,),
        "soft_embedding_norm": (h,),
        "embedding_projection": (N_EMBD, h),
    }.items():
        yield f"model.embed_audio.{name}.weight", shape


def config(size: str) -> dict:
    n_layer, n_ff = SIZES[size]
    text = {
        "model_type": "gemma3n_text",
        "vocab_size": N_VOCAB,
        "vocab_size_per_layer_input": N_PLE,
        "hidden_size": N_EMBD,
        "intermediate_size": [n_ff] * n_layer,
        "num_hidden_layers": n_layer,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_KV,
        "head_dim": HEAD_DIM,
        "hidden_size_per_layer_input": PLE,
        "num_kv_shared_layers": n_layer - 20,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * (n_layer // 5),
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "laurel_rank": 64,
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * (n_layer - 10),
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    }
    audio = {
        "model_type": "gemma3n_audio",
        "hidden_size": 1536,
        "conf_num_hidden_layers": 12,
        "conf_num_attention_heads": 8,
        "conf_attention_context_left": 13,
        "conf_attention_context_right": 0,
        "conf_attention_chunk_size": 12,
        "conf_attention_logit_cap": 50.0,
        "conf_conv_kernel_size": 5,
        "conf_reduction_factor": 4,
        "conf_residual_weight": 0.5,
        "rms_norm_eps": 1e-6,
        "gradient_clipping": 1e10,
        "input_feat_size": 128,
        "sscp_conv_channel_size": [128, 32],
        "sscp_conv_group_norm_eps": 1e-3,
        "sscp_conv_kernel_size": [[3, 3], [3, 3]],
        "sscp_conv_stride_size": [[2, 2], [2, 2]],
        "vocab_size": 128,
        "vocab_offset": 262272,
    }
    return {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "text_config": text,
        "audio_config": audio,
        "boi_token_id": 255999,
        "eoi_token_id": 262144,
        "image_token_id": 262145,
        "boa_token_id": 256000,
        "eoa_token_id": 262272,
        "audio_token_id": 262273,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "pad_token_id": 0,
    }


def write(size: str, out: Path, *, seed: int = 0) -> int:
    """Write the folder; returns the bytes of its weights."""
    out.mkdir(parents=True)
    pool = _bf16(np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32))
    shards, total, weight_map = [[]], 0, {}
    for name, shape in shapes(size):
        nbytes = 2 * prod(shape)
        if sum(n for _, _, n in shards[-1]) + nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
        shards[-1].append((name, shape, nbytes))
        total += nbytes
    for k, shard in enumerate(shards):
        file = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {name: file for name, _, _ in shard}
        _write_shard(out / file, shard, pool)
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    (out / "config.json").write_text(json.dumps(config(size), indent=1))
    gguf = sample_gguf()
    (out / "tokenizer.model").write_bytes(_tokenizer_model(gguf, read_header(gguf)))
    return total


def _write_shard(
    path: Path, shard: list[tuple[str, tuple[int, ...], int]], pool: np.ndarray
) -> None:
    table, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, nbytes in shard:
        table[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for k, (name, shape, nbytes) in enumerate(shard):
            if len(shape) == 1 and "norm" in name:
                file.write(np.full(shape, 0x3F80, np.uint16).tobytes())  # 1.0
                continue
            halvings = (
                4
                if "embed_tokens" in name or "embedding" in name
                else round(log2(max(2, prod(shape[1:]) or shape[0])) / 2)
            )
            scaled = np.where(
                pool & 0x7F80 > halvings << 7, pool - np.uint16(halvings << 7), np.uint16(0)
            )  # 2^−halvings: less in the exponent
            left, start = nbytes // 2, (k * 7_654_321) % _POOL
            while left:
                part = scaled[start : start + left]
                file.write(part.tobytes())
                left, start = left - len(part), 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    print(f"{arguments.out}: {write(arguments.size, arguments.out) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
