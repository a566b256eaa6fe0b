"""A checkpoint with Gemma 3n's audio tower at its real size and random weights: what conversion,
memory and speed are measured on.

    python -m edge_gemma.benchmarks.dev.audio_checkpoint OUT

In: nothing. Out: a Hugging Face style folder (config.json, model.safetensors in bf16, 1.4 GB)
holding the audio tower and its embedder only. What it hears is noise; memory and speed are those of
real weights.

Dimensions: the public config.json of google/gemma-3n-E2B-it (E4B has the same audio tower).
"""

from __future__ import annotations

import argparse
import json
import struct
import zlib
from pathlib import Path

import numpy as np

AUDIO_CONFIG = {
    "vocab_size": 128,
    "vocab_offset": 262272,
    "input_feat_size": 128,
    "hidden_size": 1536,
    "rms_norm_eps": 1e-6,
    "gradient_clipping": 1e10,
    "conf_attention_chunk_size": 12,
    "conf_attention_context_left": 13,
    "conf_attention_context_right": 0,
    "conf_attention_logit_cap": 50.0,
    "conf_num_attention_heads": 8,
    "conf_num_hidden_layers": 12,
    "conf_conv_kernel_size": 5,
    "conf_reduction_factor": 4,
    "conf_residual_weight": 0.5,
    "sscp_conv_channel_size": [128, 32],
    "sscp_conv_group_norm_eps": 1e-3,
    "sscp_conv_kernel_size": [[3, 3], [3, 3]],
    "sscp_conv_stride_size": [[2, 2], [2, 2]],
}
N_EMBD = 2048


def shapes(config: dict = AUDIO_CONFIG, n_embd: int = N_EMBD) -> dict[str, tuple[int, ...]]:
    """Every tensor of the tower and the embedder, by canonical name, rows first."""
    d, heads = config["hidden_size"], config["conf_num_attention_heads"]
    c0, c1 = config["sscp_conv_channel_size"]
    tower = {
        "subsample_conv_projection.conv_0.conv.weight": (c0, 1, 3, 3),
        "subsample_conv_projection.conv_0.norm.weight": (c0,),
        "subsample_conv_projection.conv_1.conv.weight": (c1, c0, 3, 3),
        "subsample_conv_projection.conv_1.norm.weight": (c1,),
        "subsample_conv_projection.input_proj_linear.weight": (
            d,
            config["input_feat_size"] // 4 * c1,
        ),
    }
    layer = {
        **{
            f"ffw_layer_{end}.{name}": shape
            for end in ("start", "end")
            for name, shape in {
                "pre_layer_norm.weight": (d,),
                "ffw_layer_1.weight": (4 * d, d),
                "ffw_layer_2.weight": (d, 4 * d),
                "post_layer_norm.weight": (d,),
            }.items()
        },
        **{f"attention.attn.{a}_proj.weight": (d, d) for a in "qkv"},
        "attention.pre_attn_norm.weight": (d,),
        "attention.attn.per_dim_scale": (d // heads,),
        "attention.attn.relative_position_embedding.pos_proj.weight": (d, d),
        "attention.post.weight": (d, d),
        "attention.post_norm.weight": (d,),
        "lconv1d.pre_layer_norm.weight": (d,),
        "lconv1d.linear_start.weight": (2 * d, d),
        "lconv1d.depthwise_conv1d.weight": (d, 1, config["conf_conv_kernel_size"]),
        "lconv1d.conv_norm.weight": (d,),
        "lconv1d.linear_end.weight": (d, d),
        "norm.weight": (d,),
    }
    tower |= {
        f"conformer.{i}.{name}": shape
        for i in range(config["conf_num_hidden_layers"])
        for name, shape in layer.items()
    }
    embedder = {
        "embedding.weight": (config["vocab_size"], d),
        "hard_embedding_norm.weight": (d,),
        "soft_embedding_norm.weight": (d,),
        "embedding_projection.weight": (n_embd, d),
    }
    return {
        **{f"model.audio_tower.{k}": v for k, v in tower.items()},
        **{f"model.embed_audio.{k}": v for k, v in embedder.items()},
    }


def _values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Unit gain through every matrix, norms near 1; seeded by the tensor's name."""
    rng = np.random.Generator(np.random.Philox(zlib.crc32(f"{seed}:{name}".encode())))
    x = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("per_dim_scale"):
        return x * np.float32(0.1)
    if "norm" in name:
        return 1 + np.float32(0.1) * x
    if name.endswith("embedding.weight"):
        return x * np.float32(0.05)
    return x / np.float32(np.sqrt(np.prod(shape[1:])))


def write(out: Path, *, seed: int = 0, config: dict = AUDIO_CONFIG, n_embd: int = N_EMBD) -> Path:
    """Write the folder, one tensor in memory at a time."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    header, offset = {}, 0
    for name, shape in (table := shapes(config, n_embd)).items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(out / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, shape in table.items():
            bits = _values(name, shape, seed).view(np.uint32)
            ((bits + 0x8000) >> 16).astype(np.uint16).tofile(file)  # to bf16, halves upwards
    (out / "config.json").write_text(
        json.dumps(
            {
                "model_type": "gemma3n",
                "audio_config": config,
                "text_config": {"hidden_size": n_embd},
            },
            indent=1,
        )
    )
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(write(options.out, seed=options.seed))
