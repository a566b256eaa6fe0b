"""Gemma 3n's vision tower: MobileNetV5, multi-scale fusion and the
embedder, pixels → ``soft_tokens [256, n_embd]``.

In: weights and an output path. Out: the graph and the manifest's entry.
Sources of the arithmetic: timm 1.0 ``mobilenetv5.py`` and transformers 5.23
``modeling_gemma3n.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_gemma.bundles.manifest import VisionPart
from edge_gemma.convert.channel_last import NORM_EPSILON, STRIPS, ChannelLast
from edge_gemma.convert.onnx_writer import OPSET_OF_BLOCKS, OnnxWriter
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.errors import CheckpointError
from edge_gemma.units import MiB

TIMM, EMBEDDER = "model.vision_tower.timm_model.", "model.embed_vision."
FIRST_WEIGHT = TIMM + "conv_stem.conv.weight"
ARCHITECTURE = "mobilenetv5_300m_enc"
MSFA_SIDE = 16  # timm: msfa_output_resolution; 16 × 16 = 256 soft tokens for every input size
N_SOFT = MSFA_SIDE * MSFA_SIDE
# The model card's; each is a multiple of 16 · 16, so that fusion pools
# whole windows
IMAGE_SIZES = (768, 512, 256)
MSFA_STRIPS = 4  # divides MSFA_SIDE
# Peak beyond the weights of MobileNetV5 while it runs as
# edge_gemma.seeing.encoder runs it (MiB, by precision and input side),
# measured by `python -m edge_gemma.benchmarks.dev.vision activations FOLDER`;
# half and int8 weights are widened one at a time, which counts here. What
# lives at the same moment, and what the heap keeps between, differs from
# picture to picture by half: this is the highest of eight and a tenth.
ACTIVATION_MIB = {
    "f32": {768: 260, 512: 115, 256: 32},
    "f16": {768: 540, 512: 365, 256: 160},
    "int8": {768: 440, 512: 280, 256: 150},
}


def write(tensors: TensorReader, path: Path, precision: str, only: str | None) -> VisionPart:
    """Write the graph; ``only`` as in
    :func:`~edge_gemma.convert.vision.write_vision_encoder`.
    """
    vision = tensors.config.get("vision_config") or {}
    architecture = vision.get("architecture", ARCHITECTURE)
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"the vision tower is {architecture!r}; {ARCHITECTURE} is the one this converts"
        )
    n_embd = tensors.shape(EMBEDDER + "embedding_projection.weight")[0]
    with OnnxWriter(path, opset=OPSET_OF_BLOCKS) as writer:
        graph = ChannelLast(writer, tensors, precision, only)
        pixels = writer.input("pixels", np.float32, [1, 3, "side", "side"])
        x = graph.conv(pixels, TIMM + "conv_stem.conv", stride=2, channel_first=True)
        x = graph.gelu(graph.norm2d(x, TIMM + "conv_stem.bn.weight"))
        fine = x
        for number in _children(tensors, TIMM + "blocks."):
            x = _stage(graph, x, number)
            if number == 2:
                fine = x
        x = _fuse(graph, fine, x)
        writer.output("soft_tokens", _embed(graph, x, vision), np.float32, [N_SOFT, n_embd])
    activations = ACTIVATION_MIB[precision]
    return VisionPart(
        file=path.name,
        kind="mobilenetv5",
        precision=precision,
        n_embd=n_embd,
        n_soft_tokens=N_SOFT,
        image_sizes=IMAGE_SIZES,
        mean=0.0,
        std=1.0,
        weights_bytes=writer.weights_bytes,
        activation_bytes={str(size): mib * MiB for size, mib in activations.items()},
    )


def _embed(graph: ChannelLast, x: str, vision: dict) -> str:
    """The fused map [1, 16, 16, C] → rows in the decoder's space. Reshaping
    to rows is transformers' flatten and permute; its √hidden_size is lost
    in the next norm up to epsilon.
    """
    writer, tensors = graph.writer, graph.tensors
    width = vision.get("hidden_size", 2048)
    epsilon = vision.get("rms_norm_eps", NORM_EPSILON)
    rows = writer.reshape(x, N_SOFT, width)
    x = writer.mul(rows, writer.number(width**0.5))
    x = writer.rms_norm(x, tensors.read(EMBEDDER + "soft_embedding_norm.weight"), epsilon)
    projection = tensors.read(EMBEDDER + "embedding_projection.weight")  # [n_embd, width]
    x = graph.product(x, projection, EMBEDDER, exact=True)
    return writer.rms_norm(x, np.ones(len(projection), np.float32), epsilon)


def _stage(graph: ChannelLast, x: str, number: int) -> str:
    """The blocks of one stage; the first one halves h and w. In the first
    two stages pictures are still large, so what is wide runs in strips.
    """
    prefix = f"{TIMM}blocks.{number}."
    for block in _children(graph.tensors, prefix):
        name, stride = f"{prefix}{block}.", 2 if block == 0 else 1
        x = _block(graph, x, name, stride, in_strips=number < 2)
    return x


def _block(graph: ChannelLast, x: str, name: str, stride: int, in_strips: bool) -> str:
    """One block on ``x [1, h, w, C]``. What kind it is shows in the tensors
    it has.
    """
    if graph.has(name + "conv_exp.weight"):
        y = _edge_residual(graph, x, name, stride)
    elif graph.has(name + "attn.query.proj.weight"):
        y = _multi_query_attention(graph, graph.norm2d(x, name + "norm.weight"), name + "attn.")
        y = graph.scale(y, name + "layer_scale.gamma")
    else:
        y = _inverted_residual(graph, x, name, stride, in_strips)
    return y if stride > 1 else graph.writer.add(y, x)


def _edge_residual(graph: ChannelLast, x: str, name: str, stride: int) -> str:
    """One dense 3 × 3 convolution and a projection."""

    def body(strip: str) -> str:
        y = graph.conv(strip, name + "conv_exp", stride, whole=False)
        y = graph.gelu(graph.norm2d(y, name + "bn1.weight"))
        return graph.norm2d(graph.linear(y, name + "conv_pwl"), name + "bn2.weight")

    return graph.in_strips(x, graph.kernel_of(name + "conv_exp"), stride, body)


def _inverted_residual(graph: ChannelLast, x: str, name: str, stride: int, in_strips: bool) -> str:
    """timm's universal inverted residual: depthwise (optional), expand,
    depthwise (optional), project.
    """
    has, middle = graph.has, name + "dw_mid.conv"
    has_middle = has(middle + ".weight")
    if has(name + "dw_start.conv.weight"):
        x = graph.conv(x, name + "dw_start.conv", 1 if has_middle else stride)
        x = graph.norm2d(x, name + "dw_start.bn.weight")

    def body(strip: str) -> str:
        y = graph.linear(strip, name + "pw_exp.conv")
        y = graph.gelu(graph.norm2d(y, name + "pw_exp.bn.weight"))
        if has_middle:
            y = graph.conv(y, middle, stride, whole=False)
            y = graph.gelu(graph.norm2d(y, name + "dw_mid.bn.weight"))
        y = graph.linear(y, name + "pw_proj.conv")
        # the layer scale multiplies what the norm just multiplied: one
        # constant
        return graph.norm2d(y, name + "pw_proj.bn.weight", then=name + "layer_scale.gamma")

    # Rows of zeros stay zeros through product, norm and GELU, so padding
    # the input of pw_exp is padding the input of dw_mid.
    kernel = graph.kernel_of(middle) if has_middle else 1
    return graph.in_strips(x, kernel, stride, body) if kernel > 1 or in_strips else body(x)


def _multi_query_attention(graph: ChannelLast, x: str, name: str) -> str:
    """All heads share one K and V, so the queries of every head are simply
    more rows against one head.
    """
    writer = graph.writer
    key_dim, _ = graph.rows_of(name + "key.proj")
    value_dim, _ = graph.rows_of(name + "value.proj")
    k = v = x
    if graph.has(name + "key.down_conv.weight"):
        first = graph.to_channel_first(x)
        k = graph.conv(first, name + "key.down_conv", 2, channel_first=True)
        k = graph.norm2d(k, name + "key.norm.weight")
        v = graph.conv(first, name + "value.down_conv", 2, channel_first=True)
        v = graph.norm2d(v, name + "value.norm.weight")
    q = graph.linear(x, name + "query.proj")
    q = writer.reshape(q, STRIPS, -1, key_dim)  # h·w·heads rows in strips
    k = graph.linear(k, name + "key.proj")
    k = writer.reshape(k, -1, key_dim)
    v = graph.linear(v, name + "value.proj")
    v = writer.reshape(v, -1, value_dim)

    def attend(strip: str) -> tuple[str]:
        return (graph.attend(strip, k, v, key_dim),)

    (y,) = writer.scan([q], ["rows", key_dim], attend, [["rows", value_dim]])
    heads_wide = graph.rows_of(name + "output.proj")[1]
    shape = writer.concat([graph.grid(x), writer.ints(heads_wide)], axis=0)
    return graph.linear(writer.reshape_to(y, shape), name + "output.proj")


def _fuse(graph: ChannelLast, fine: str, coarse: str) -> str:
    """Multi-scale fusion: ``fine [1, h, w, 640]`` with ``coarse [1, h/2,
    w/2, 1280]`` doubled to it, one inverted residual, pooled to 16 × 16.

    A product over joined channels is the sum of two products, and doubling
    by repetition commutes with a product over channels, so the larger half
    runs on a quarter of the rows.
    """
    writer, name = graph.writer, TIMM + "msfa."
    expand = graph.weight(name + "ffn.pw_exp.conv")
    wide = expand.shape[0]
    channels, _ = graph.rows_of(f"{TIMM}blocks.2.0.pw_proj.conv")
    width, _ = graph.rows_of(name + "ffn.pw_proj.conv")
    from_fine = graph.matrix(expand[:, :channels], name + "ffn.pw_exp.conv")
    from_coarse = graph.matrix(expand[:, channels:], name + "ffn.pw_exp.conv")
    two, side = writer.ints(2), writer.ints(MSFA_SIDE)
    w = writer.slice(graph.grid(coarse), writer.ints(1), two, 0)
    # rows of coarse in a strip, half of fine's
    strip_rows = writer.div(w, writer.ints(MSFA_STRIPS))
    # side of what one soft token averages
    window = writer.div(writer.mul(w, two), side)
    pooled_rows = writer.ints(MSFA_SIDE // MSFA_STRIPS)
    parts = [pooled_rows, window, side, window, writer.ints(width)]
    by_window = writer.concat(parts, axis=0)
    strips = []
    for number in range(MSFA_STRIPS):
        start = writer.mul(strip_rows, writer.ints(number))
        stop = writer.mul(strip_rows, writer.ints(number + 1))
        fine_start = writer.mul(start, two)
        fine_stop = writer.mul(stop, two)
        y = writer.multiply(writer.slice(fine, fine_start, fine_stop, 1), from_fine)
        z = writer.multiply(writer.slice(coarse, start, stop, 1), from_coarse)
        # [1, h, w, C] → [h, 1, w, 1, C] + [h, 2, w, 2, C]: each value of
        # the coarse one meets its four of the fine one
        once = [strip_rows, writer.ints(1), w, writer.ints(1, wide)]
        z = writer.reshape_to(z, writer.concat(once, axis=0))
        twice = [strip_rows, two, w, writer.ints(2, wide)]
        y = writer.reshape_to(y, writer.concat(twice, axis=0))
        y = writer.add(y, z)
        y = graph.gelu(graph.norm2d(y, name + "ffn.pw_exp.bn.weight"))
        y = graph.linear(y, name + "ffn.pw_proj.conv")
        y = graph.norm2d(y, name + "ffn.pw_proj.bn.weight")
        strips.append(writer.mean(writer.reshape_to(y, by_window), 1, 3))  # [rows, 16, C]
    return graph.norm2d(writer.concat(strips, axis=0), name + "norm.weight")


def _children(tensors: TensorReader, prefix: str) -> list[int]:
    """The numbers that follow ``prefix`` in the tensors' names, sorted."""
    return sorted(
        {
            int(name[len(prefix) :].split(".", 1)[0])
            for name in tensors.names()
            if name.startswith(prefix)
        }
    )
