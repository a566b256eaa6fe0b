"""Vision towers of real size with random weights, as a Hugging Face checkpoint of that tower alone.

In: a kind and the decoder's width. Out: ``config.json`` and ``model.safetensors`` (bf16), written
one tensor at a time.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from edge_gemma.errors import UsageError

SIZES = {"siglip": 896, "mobilenetv5": 768}  # kind → pixels a side
MOBILENET_WIDTH = 2048  # of MobileNetV5's output


def siglip_shapes(
    n_embd: int = 2560,
    width: int = 1152,
    n_ff: int = 4304,
    n_layer: int = 27,
    size: int = 896,
    patch: int = 14,
) -> dict[str, tuple[int, ...]]:
    """Gemma 3 4B's vision tensors. Source: the public config.json of google/gemma-3-4b-it."""
    tower, shapes = "model.vision_tower.", {}
    (
        shapes[tower + "embeddings.patch_embedding.weight"],
        shapes[tower + "embeddings.patch_embedding.bias"],
    ) = (width, 3, patch, patch), (width,)
    shapes[tower + "embeddings.position_embedding.weight"] = ((size // patch) ** 2, width)
    for number in range(n_layer):
        layer = f"{tower}encoder.layers.{number}."
        for name, n_out, n_in in (
            *((f"self_attn.{part}_proj", width, width) for part in ("q", "k", "v", "out")),
            ("mlp.fc1", n_ff, width),
            ("mlp.fc2", width, n_ff),
        ):
            shapes[f"{layer}{name}.weight"], shapes[f"{layer}{name}.bias"] = (n_out, n_in), (n_out,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}{name}.weight"], shapes[f"{layer}{name}.bias"] = (width,), (width,)
    shapes[tower + "post_layernorm.weight"], shapes[tower + "post_layernorm.bias"] = (
        (width,),
        (width,),
    )
    shapes["model.multi_modal_projector.mm_input_projection_weight"] = (width, n_embd)
    shapes["model.multi_modal_projector.mm_soft_emb_norm.weight"] = (width,)
    return shapes


def mobilenet_shapes(n_embd: int = 2048) -> dict[str, tuple[int, ...]]:
    """Gemma 3n's vision tensors. Source: timm's mobilenetv5_300m_enc."""
    tower = "model.vision_tower.timm_model."
    shapes: dict[str, tuple[int, ...]] = {
        tower + "conv_stem.conv.weight": (64, 3, 3, 3),
        tower + "conv_stem.conv.bias": (64,),
        tower + "conv_stem.bn.weight": (64,),
    }

    def unit(name: str, conv: str, norm: str, *shape: int) -> None:
        shapes[f"{tower}{name}{conv}.weight"], shapes[f"{tower}{name}{norm}.weight"] = (
            shape,
            (shape[0],),
        )

    def residual(
        name: str, n_in: int, n_out: int, start: int, mid: int, factor: int, scaled: bool = True
    ) -> None:
        wide = n_in * factor
        if start:
            unit(name, "dw_start.conv", "dw_start.bn", n_in, 1, start, start)
        unit(name, "pw_exp.conv", "pw_exp.bn", wide, n_in, 1, 1)
        if mid:
            unit(name, "dw_mid.conv", "dw_mid.bn", wide, 1, mid, mid)
        unit(name, "pw_proj.conv", "pw_proj.bn", n_out, wide, 1, 1)
        if scaled:
            shapes[f"{tower}{name}layer_scale.gamma"] = (n_out,)

    def attention(name: str, width: int, heads: int, dim: int, strided: bool) -> None:
        shapes[f"{tower}{name}norm.weight"] = (width,)
        for part in ("key", "value"):
            if strided:
                unit(f"{name}attn.{part}.", "down_conv", "norm", width, 1, 3, 3)
            shapes[f"{tower}{name}attn.{part}.proj.weight"] = (dim, width, 1, 1)
        (
            shapes[f"{tower}{name}attn.query.proj.weight"],
            shapes[f"{tower}{name}attn.output.proj.weight"],
        ) = (heads * dim, width, 1, 1), (width, heads * dim, 1, 1)
        shapes[f"{tower}{name}layer_scale.gamma"] = (width,)

    for block, n_in in enumerate((64, 128, 128)):
        unit(f"blocks.0.{block}.", "conv_exp", "bn1", 4 * n_in, n_in, 3, 3)
        unit(f"blocks.0.{block}.", "conv_pwl", "bn2", 128, 4 * n_in, 1, 1)
    residual("blocks.1.0.", 128, 256, 3, 5, 6)
    for block in range(1, 5):
        residual(f"blocks.1.{block}.", 256, 256, 5 if block % 2 else 3, 0, 4)
    residual("blocks.2.0.", 256, 640, 5, 5, 6)
    for block in range(1, 8):
        residual(f"blocks.2.{block}.", 640, 640, 5, 0, 4)
    residual("blocks.2.8.", 640, 640, 0, 0, 1)
    for block in range(9, 37, 2):
        attention(f"blocks.2.{block}.", 640, 12, 64, True)
        residual(f"blocks.2.{block + 1}.", 640, 640, 0, 0, 2)
    residual("blocks.3.0.", 640, 1280, 5, 5, 6)
    for block in range(1, 39, 2):
        attention(f"blocks.3.{block}.", 1280, 16, 96, False)
        residual(f"blocks.3.{block + 1}.", 1280, 1280, 0, 0, 2)
    residual("msfa.ffn.", 1920, MOBILENET_WIDTH, 0, 0, 2, scaled=False)
    shapes[tower + "msfa.norm.weight"] = (MOBILENET_WIDTH,)
    shapes |= {
        "model.embed_vision.embedding.weight": (128, MOBILENET_WIDTH),
        "model.embed_vision.hard_embedding_norm.weight": (MOBILENET_WIDTH,),
        "model.embed_vision.soft_embedding_norm.weight": (MOBILENET_WIDTH,),
        "model.embed_vision.embedding_projection.weight": (n_embd, MOBILENET_WIDTH),
    }
    return shapes


def write_checkpoint(kind: str, folder: Path, n_embd: int | None = None, seed: int = 1) -> None:
    """``model.safetensors`` (bf16, random, unit gain) and ``config.json`` of one vision tower. One
    tensor in memory at a time.
    """
    if kind not in SIZES:
        raise UsageError(f"unknown tower {kind!r}; choose one of {', '.join(SIZES)}")
    n_embd = n_embd or {"siglip": 2560, "mobilenetv5": 2048}[kind]
    shapes = siglip_shapes(n_embd) if kind == "siglip" else mobilenet_shapes(n_embd)
    folder.mkdir(parents=True, exist_ok=True)
    vision = {
        "siglip": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        "mobilenetv5": {
            "model_type": "gemma3n_vision",
            "architecture": "mobilenetv5_300m_enc",
            "hidden_size": MOBILENET_WIDTH,
            "vocab_size": 128,
            "vocab_offset": 262144,
            "do_pooling": False,
        },
    }[kind]
    config = {
        "model_type": "gemma3" if kind == "siglip" else "gemma3n",
        "mm_tokens_per_image": 256,
        "vision_config": vision,
        "text_config": {"hidden_size": n_embd},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        n_bytes = 2 * int(np.prod(shape))
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [offset, offset + n_bytes],
        }
        offset += n_bytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    rng = np.random.default_rng(seed)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, shape in shapes.items():
            values = rng.standard_normal(shape, np.float32)
            if len(shape) == 1:
                norm = "norm" in name or ".bn" in name
                values = (
                    0.02 * values
                    if name.endswith("bias") or "mm_soft" in name
                    else 1 + 0.1 * values
                    if norm
                    else 0.1 * values
                )
            else:
                values /= np.float32(np.sqrt(np.prod(shape[1:])))
            (values.view(np.uint32) >> 16).astype(np.uint16).tofile(file)
