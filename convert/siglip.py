"""Gemma 3's vision tower: SigLIP and the projector, pixels → ``soft_tokens
[n_soft, n_embd]``.

In: weights and an output path. Out: the graph and the manifest's entry.
Sources of the arithmetic: transformers 5.23 ``modeling_siglip.py`` and
``modeling_gemma3.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import gcd, isqrt
from pathlib import Path

import numpy as np

from edge_gemma.bundles.manifest import VisionPart
from edge_gemma.convert.channel_last import NORM_EPSILON, STRIPS, ChannelLast
from edge_gemma.convert.onnx_writer import OPSET_OF_BLOCKS, OnnxWriter
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.errors import CheckpointError

TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
FIRST_WEIGHT = TOWER + "embeddings.patch_embedding.weight"
_POSITIONS = TOWER + "embeddings.position_embedding.weight"
_LAYER = re.compile(re.escape(TOWER) + r"encoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class SiglipDims:
    """The tower's numbers, checked; ``side`` and ``pool`` are patches along
    one edge.
    """

    image_size: int  # pixels along one edge
    patch: int  # pixels along one edge
    width: int
    n_layer: int
    n_head: int
    n_ff: int
    n_soft: int
    epsilon: float

    @property
    def side(self) -> int:
        return self.image_size // self.patch

    @property
    def n_rows(self) -> int:
        return self.side * self.side

    @property
    def pool(self) -> int:
        """Patches along one edge that one soft token averages."""
        return self.side // isqrt(self.n_soft)

    @property
    def n_strips(self) -> int:
        return gcd(STRIPS, self.n_rows)

    @property
    def strip(self) -> list[int]:
        """The shape of a strip of rows."""
        return [self.n_rows // self.n_strips, self.width]


def read_dims(tensors: TensorReader) -> SiglipDims:
    """From config and shapes. Raises CheckpointError for a variant that is
    not Gemma 3's.
    """
    vision = tensors.config.get("vision_config") or {}
    width, _, patch, _ = tensors.shape(FIRST_WEIGHT)
    layers = {int(match[1]) for match in map(_LAYER.match, tensors.names()) if match}
    dims = SiglipDims(
        # what config.json leaves out is what transformers' SiglipVisionConfig has
        image_size=int(vision.get("image_size", 224)),
        patch=patch,
        width=width,
        n_layer=1 + max(layers),
        n_head=int(vision.get("num_attention_heads", 12)),
        n_ff=tensors.shape(TOWER + "encoder.layers.0.mlp.fc1.weight")[0],
        n_soft=int(tensors.config.get("mm_tokens_per_image", 256)),
        epsilon=float(vision.get("layer_norm_eps", NORM_EPSILON)),
    )
    activation = vision.get("hidden_act", "gelu_pytorch_tanh")
    pools_evenly = (dims.side // dims.pool) ** 2 == dims.n_soft
    if activation != "gelu_pytorch_tanh" or width % dims.n_head or not pools_evenly:
        raise CheckpointError(
            f"this SigLIP variant is not supported: hidden_act {vision.get('hidden_act')}, "
            f"width {width}, {dims.n_head} heads, {dims.side}² patches → {dims.n_soft}"
        )
    positions = tensors.shape(_POSITIONS)[0]
    if positions != dims.n_rows:
        raise CheckpointError(
            f"the position table has {positions} rows; {dims.image_size} px in patches of "
            f"{patch} px need {dims.n_rows}"
        )
    return dims


def write(tensors: TensorReader, path: Path, precision: str, only: str | None) -> VisionPart:
    """Write the graph; ``only`` as in
    :func:`~edge_gemma.convert.vision.write_vision_encoder`.
    """
    dims = read_dims(tensors)
    with OnnxWriter(path, opset=OPSET_OF_BLOCKS) as writer:
        graph = ChannelLast(writer, tensors, precision, only)
        size = dims.image_size
        pixels = writer.input("pixels", np.float32, [1, 3, size, size])
        x = _embed_patches(graph, dims, pixels)
        x = writer.reshape(x, dims.n_strips, *dims.strip)
        for number in range(dims.n_layer):
            x = _layer(graph, dims, x, f"{TOWER}encoder.layers.{number}.")
        x = writer.reshape(x, dims.n_rows, dims.width)
        x = graph.layer_norm(x, TOWER + "post_layernorm", dims.epsilon)
        x, n_embd = _project(graph, dims, x)
        writer.output("soft_tokens", x, np.float32, [dims.n_soft, n_embd])
    return VisionPart(
        file=path.name,
        kind="siglip",
        precision=precision,
        n_embd=n_embd,
        n_soft_tokens=dims.n_soft,
        image_sizes=(size,),
        mean=0.5,
        std=0.5,
        weights_bytes=writer.weights_bytes,
        activation_bytes={str(size): _activation_bytes(dims, precision)},
    )


def _embed_patches(graph: ChannelLast, dims: SiglipDims, pixels: str) -> str:
    """[side², width]. The patch convolution is one product over rows
    [side², 3 · patch²].
    """
    writer, side, patch = graph.writer, dims.side, dims.patch
    x = writer.reshape(pixels, 3, side, patch, side, patch)
    x = writer.transpose(x, 1, 3, 0, 2, 4)
    x = writer.reshape(x, dims.n_rows, 3 * patch * patch)
    # the first layer sees pixels: never quantized
    x = graph.linear(x, TOWER + "embeddings.patch_embedding", exact=True)
    return writer.add(x, graph.table(_POSITIONS))


def _layer(graph: ChannelLast, dims: SiglipDims, x: str, name: str) -> str:
    """One transformer layer on ``x [n_strips, *strip]``. All but attention
    runs strip by strip: what is widest is never there whole, and a strip
    stays near the cores.
    """
    writer = graph.writer
    projections = [f"{name}self_attn.{part}_proj" for part in "qkv"]
    graph.ready(*projections)

    def before(strip: str) -> tuple[str, ...]:
        y = graph.layer_norm(strip, name + "layer_norm1", dims.epsilon)
        return tuple(graph.linear(y, projection) for projection in projections)

    def after(strip: str, seen: str) -> tuple[str]:
        attended = graph.linear(seen, name + "self_attn.out_proj")
        strip = writer.add(strip, attended)
        y = graph.layer_norm(strip, name + "layer_norm2", dims.epsilon)
        y = graph.gelu(graph.linear(y, name + "mlp.fc1"))
        y = graph.linear(y, name + "mlp.fc2")
        return (writer.add(strip, y),)

    q, k, v = writer.scan([x], dims.strip, before, [dims.strip] * 3)
    seen = graph.attention(q, k, v, dims.n_head, dims.n_rows, dims.width)
    graph.ready(name + "self_attn.out_proj", name + "mlp.fc1", name + "mlp.fc2")
    seen = writer.reshape(seen, dims.n_strips, *dims.strip)
    (x,) = writer.scan([x, seen], dims.strip, after, [dims.strip])
    return x


def _project(graph: ChannelLast, dims: SiglipDims, x: str) -> tuple[str, int]:
    """Mean over pool × pool patches, norm (Gemma 3 stores weight − 1),
    product. Returns the soft tokens and their width.
    """
    writer, pool = graph.writer, dims.pool
    pooled_side = dims.side // pool
    windows = writer.ints(pooled_side, pool, pooled_side, pool, dims.width)
    x = writer.mean(writer.reshape_to(x, windows), 1, 3)
    x = writer.reshape(x, dims.n_soft, dims.width)
    norm = 1 + graph.tensors.read(PROJECTOR + "mm_soft_emb_norm.weight")
    x = writer.rms_norm(x, norm, dims.epsilon)
    projection = graph.tensors.read(PROJECTOR + "mm_input_projection_weight")  # [width, n_embd]
    x = graph.product(x, projection.T, PROJECTOR, exact=True)
    return x, projection.shape[1]


def _activation_bytes(dims: SiglipDims, precision: str) -> int:
    """Attention is the widest moment: the residual, q, k and v as they are
    and head by head, the output twice, two strips of scores, and a strip of
    the MLP that the heap still keeps. Measured for Gemma 3 4B, whole
    process: 291 MiB anonymous at f32, 419 at f16, 441 at int8, of which
    about 65 are libraries.
    """
    rows, width, n_ff = dims.n_rows, dims.width, dims.n_ff
    per_row = 11 * width + 2 * n_ff // STRIPS + 2 * rows // STRIPS
    # float32 matrices of this layer and of the one before
    widened = 2 * (4 * width * width + 2 * n_ff * width) + n_ff * width
    return 4 * (rows * per_row + (0 if precision == "f32" else widened))
