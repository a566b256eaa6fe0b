"""Names and shapes of the tensors of Gemma's checkpoints at their real sizes, and their
``config.json``.

In: a family and a size. Out: ``{name: shape}``, rows first, by transformers' names; dictionaries
for ``config.json``. What it does not know: values, files.

Sources: the public config.json of google/gemma-3n-E2B-it, -E4B-it and google/gemma-3-4b-it; timm's
mobilenetv5_300m_enc.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_gemma.benchmarks.dev.synthetic import SHAPES
from edge_gemma.errors import UsageError

Shapes = dict[str, tuple[int, ...]]

TOWER_PX = {"siglip": 896, "mobilenetv5": 768}  # vision tower → pixels a side
TOWER_N_EMBD = {"siglip": 2560, "mobilenetv5": 2048}  # the decoder it belongs to
MOBILENET_WIDTH = 2048  # channels of MobileNetV5's output
N_PLE, PLE = 262144, 256  # rows and row length of Gemma 3n's per-layer embeddings


def shapes(family: str, size: str) -> Shapes:
    """Every tensor of one checkpoint.

    ``gemma3n`` with ``e2b`` or ``e4b``: decoder and audio tower; ``audio`` with ``full``: the audio
    tower and its embedder; ``vision`` with ``siglip`` or ``mobilenetv5``: that tower and its
    projector. Raises UsageError for anything else.

    >>> shapes("gemma3n", "e2b")["model.language_model.norm.weight"]
    (2048,)
    """
    match family, size:
        case "gemma3n", "e2b" | "e4b":
            return {**text_shapes(size), **audio_shapes()}
        case "audio", "full":
            return audio_shapes()
        case "vision", "siglip":
            return siglip_shapes()
        case "vision", "mobilenetv5":
            return mobilenet_shapes()
    raise UsageError(
        f"no shapes of {family} {size}; there are: gemma3n e2b, gemma3n e4b, audio full, "
        "vision siglip, vision mobilenetv5"
    )


# --- the decoder of Gemma 3n ---


def text_shapes(size: str) -> Shapes:
    """The decoder of ``e2b`` or ``e4b``."""
    s = SHAPES[size]
    d, q, kv = s.n_embd, s.n_head * s.head_dim, s.n_head_kv * s.head_dim
    layer: Shapes = {
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "self_attn.q_norm.weight": (s.head_dim,),
        "self_attn.k_norm.weight": (s.head_dim,),
        "mlp.gate_proj.weight": (s.n_ff, d),
        "mlp.up_proj.weight": (s.n_ff, d),
        "mlp.down_proj.weight": (d, s.n_ff),
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
    text: Shapes = {
        "embed_tokens.weight": (s.n_vocab, d),
        "embed_tokens_per_layer.weight": (N_PLE, PLE * s.n_layer),
        "norm.weight": (d,),
        "per_layer_model_projection.weight": (PLE * s.n_layer, d),
        "per_layer_projection_norm.weight": (PLE,),
    }
    for k in range(3):
        text[f"altup_projections.{k}.weight"] = (d, d)
        text[f"altup_unembed_projections.{k}.weight"] = (d, d)
    for i in range(s.n_layer):
        text |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return {f"model.language_model.{name}": shape for name, shape in text.items()}


def text_config(size: str) -> dict[str, Any]:
    s = SHAPES[size]
    return {
        "model_type": "gemma3n_text",
        "vocab_size": s.n_vocab,
        "vocab_size_per_layer_input": N_PLE,
        "hidden_size": s.n_embd,
        "intermediate_size": [s.n_ff] * s.n_layer,
        "num_hidden_layers": s.n_layer,
        "num_attention_heads": s.n_head,
        "num_key_value_heads": s.n_head_kv,
        "head_dim": s.head_dim,
        "hidden_size_per_layer_input": PLE,
        "num_kv_shared_layers": s.n_layer - 20,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * (s.n_layer // 5),
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "laurel_rank": 64,
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * (s.n_layer - 10),
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    }


def gemma3n_config(size: str) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "text_config": text_config(size),
        "audio_config": audio_config(),
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


# --- the audio tower of Gemma 3n ---


def audio_config(**changes: object) -> dict[str, Any]:
    """``audio_config`` of Gemma 3n (both sizes have the same tower), with some fields changed."""
    return {
        "model_type": "gemma3n_audio",
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
    } | changes


def audio_shapes(config: Mapping[str, Any] | None = None, n_embd: int = 2048) -> Shapes:
    """The audio tower of ``config`` and its embedder into a decoder ``n_embd`` wide."""
    config = config or audio_config()
    d, heads = config["hidden_size"], config["conf_num_attention_heads"]
    c0, c1 = config["sscp_conv_channel_size"]
    tower: Shapes = {
        "subsample_conv_projection.conv_0.conv.weight": (c0, 1, 3, 3),
        "subsample_conv_projection.conv_0.norm.weight": (c0,),
        "subsample_conv_projection.conv_1.conv.weight": (c1, c0, 3, 3),
        "subsample_conv_projection.conv_1.norm.weight": (c1,),
        "subsample_conv_projection.input_proj_linear.weight": (
            d,
            config["input_feat_size"] // 4 * c1,
        ),
    }
    feed_forward: Shapes = {
        "pre_layer_norm.weight": (d,),
        "ffw_layer_1.weight": (4 * d, d),
        "ffw_layer_2.weight": (d, 4 * d),
        "post_layer_norm.weight": (d,),
    }
    layer: Shapes = {
        "attention.pre_attn_norm.weight": (d,),
        "attention.attn.q_proj.weight": (d, d),
        "attention.attn.k_proj.weight": (d, d),
        "attention.attn.v_proj.weight": (d, d),
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
    for end in ("start", "end"):
        layer |= {f"ffw_layer_{end}.{name}": shape for name, shape in feed_forward.items()}
    for i in range(config["conf_num_hidden_layers"]):
        tower |= {f"conformer.{i}.{name}": shape for name, shape in layer.items()}
    embedder = _embedder(config["vocab_size"], d, n_embd)
    return {
        **{f"model.audio_tower.{name}": shape for name, shape in tower.items()},
        **{f"model.embed_audio.{name}": shape for name, shape in embedder.items()},
    }


def _embedder(n_rows: int, width: int, n_embd: int) -> Shapes:
    return {
        "embedding.weight": (n_rows, width),
        "hard_embedding_norm.weight": (width,),
        "soft_embedding_norm.weight": (width,),
        "embedding_projection.weight": (n_embd, width),
    }


# --- vision towers ---


def vision_config(kind: str) -> dict[str, Any]:
    if kind == "siglip":
        return {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        }
    return {
        "model_type": "gemma3n_vision",
        "architecture": "mobilenetv5_300m_enc",
        "hidden_size": MOBILENET_WIDTH,
        "vocab_size": 128,
        "vocab_offset": 262144,
        "do_pooling": False,
    }


def siglip_shapes(n_embd: int = 2560, config: Mapping[str, Any] | None = None) -> Shapes:
    """Gemma 3's vision tower and its projector."""
    config = config or vision_config("siglip")
    width, n_ff = config["hidden_size"], config["intermediate_size"]
    patch, side = config["patch_size"], config["image_size"] // config["patch_size"]
    matrices = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width, width),
        "self_attn.v_proj": (width, width),
        "self_attn.out_proj": (width, width),
        "mlp.fc1": (n_ff, width),
        "mlp.fc2": (width, n_ff),
    }
    tower: Shapes = {
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding.weight": (side * side, width),
        "post_layernorm.weight": (width,),
        "post_layernorm.bias": (width,),
    }
    for number in range(config["num_hidden_layers"]):
        at = f"encoder.layers.{number}."
        for name, (n_out, n_in) in matrices.items():
            tower[f"{at}{name}.weight"] = (n_out, n_in)
            tower[f"{at}{name}.bias"] = (n_out,)
        for name in ("layer_norm1", "layer_norm2"):
            tower[f"{at}{name}.weight"] = tower[f"{at}{name}.bias"] = (width,)
    projector: Shapes = {
        "mm_input_projection_weight": (width, n_embd),
        "mm_soft_emb_norm.weight": (width,),
    }
    return {
        **{f"model.vision_tower.{name}": shape for name, shape in tower.items()},
        **{f"model.multi_modal_projector.{name}": shape for name, shape in projector.items()},
    }


def mobilenet_shapes(n_embd: int = 2048) -> Shapes:
    """Gemma 3n's vision tower and its embedder."""
    tower: Shapes = {
        "conv_stem.conv.weight": (64, 3, 3, 3),
        "conv_stem.conv.bias": (64,),
        "conv_stem.bn.weight": (64,),
    }
    for block, n_in in enumerate((64, 128, 128)):
        tower |= _unit(f"blocks.0.{block}.", "conv_exp", "bn1", (4 * n_in, n_in, 3, 3))
        tower |= _unit(f"blocks.0.{block}.", "conv_pwl", "bn2", (128, 4 * n_in, 1, 1))
    tower |= _residual("blocks.1.0.", 128, 256, start=3, mid=5, factor=6)
    for block in range(1, 5):
        start = 5 if block % 2 else 3
        tower |= _residual(f"blocks.1.{block}.", 256, 256, start=start, factor=4)
    tower |= _residual("blocks.2.0.", 256, 640, start=5, mid=5, factor=6)
    for block in range(1, 8):
        tower |= _residual(f"blocks.2.{block}.", 640, 640, start=5, factor=4)
    tower |= _residual("blocks.2.8.", 640, 640, factor=1)
    for block in range(9, 37, 2):
        tower |= _attention(f"blocks.2.{block}.", 640, heads=12, dim=64, strided=True)
        tower |= _residual(f"blocks.2.{block + 1}.", 640, 640, factor=2)
    tower |= _residual("blocks.3.0.", 640, 1280, start=5, mid=5, factor=6)
    for block in range(1, 39, 2):
        tower |= _attention(f"blocks.3.{block}.", 1280, heads=16, dim=96, strided=False)
        tower |= _residual(f"blocks.3.{block + 1}.", 1280, 1280, factor=2)
    fusion = _residual("msfa.ffn.", 1920, MOBILENET_WIDTH, factor=2)
    del fusion["msfa.ffn.layer_scale.gamma"]  # the fusion has none
    tower |= fusion
    tower["msfa.norm.weight"] = (MOBILENET_WIDTH,)
    embedder = _embedder(128, MOBILENET_WIDTH, n_embd)
    return {
        **{f"model.vision_tower.timm_model.{name}": shape for name, shape in tower.items()},
        **{f"model.embed_vision.{name}": shape for name, shape in embedder.items()},
    }


def _unit(at: str, conv: str, norm: str, shape: tuple[int, ...]) -> Shapes:
    """One convolution and the norm behind it."""
    return {f"{at}{conv}.weight": shape, f"{at}{norm}.weight": shape[:1]}


def _residual(
    at: str, n_in: int, n_out: int, *, factor: int, start: int = 0, mid: int = 0
) -> Shapes:
    """An inverted residual: depthwise kernels of ``start`` and ``mid`` pixels (0: none)."""
    wide = n_in * factor
    found: Shapes = {}
    if start:
        found |= _unit(at, "dw_start.conv", "dw_start.bn", (n_in, 1, start, start))
    found |= _unit(at, "pw_exp.conv", "pw_exp.bn", (wide, n_in, 1, 1))
    if mid:
        found |= _unit(at, "dw_mid.conv", "dw_mid.bn", (wide, 1, mid, mid))
    found |= _unit(at, "pw_proj.conv", "pw_proj.bn", (n_out, wide, 1, 1))
    found[f"{at}layer_scale.gamma"] = (n_out,)
    return found


def _attention(at: str, width: int, *, heads: int, dim: int, strided: bool) -> Shapes:
    """Multi-query attention: one key and one value head, for stage 3 on a coarser grid."""
    found: Shapes = {f"{at}norm.weight": (width,)}
    for part in ("key", "value"):
        if strided:
            found |= _unit(f"{at}attn.{part}.", "down_conv", "norm", (width, 1, 3, 3))
        found[f"{at}attn.{part}.proj.weight"] = (dim, width, 1, 1)
    found[f"{at}attn.query.proj.weight"] = (heads * dim, width, 1, 1)
    found[f"{at}attn.output.proj.weight"] = (width, heads * dim, 1, 1)
    found[f"{at}layer_scale.gamma"] = (width,)
    return found
