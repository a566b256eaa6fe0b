"""Vision towers → ``vision_encoder.onnx``:

SigLIP + projector (Gemma 3) and MobileNetV5 + fusion + embedder (Gemma 3n), straight from weights.

In: anything with ``config``, ``names()``, ``shape(name)`` and ``read(name)`` under canonical names:
a :class:`~edge_gemma.convert.checkpoint.Checkpoint`, or an ``mmproj`` GGUF
(:class:`~edge_gemma.convert.mmproj.Mmproj`). Out: the ONNX files in a folder and the manifest's
:class:`~edge_gemma.bundles.manifest.VisionEncoder`. One tensor is in memory at a time. It never
imports torch or timm.

The graph takes ``pixels [1, 3, side, side]`` float32 and gives ``soft_tokens [256, n_embd]``
float32. Inside, values lie channel-last, ``[rows, C]``: a 1×1 convolution is then a plain matrix
product on weights used as they lie in the mapped file, and a norm over channels is one operator.
Only real spatial convolutions turn to channel-first and back.

Sources of the arithmetic: transformers 5.23 ``modeling_siglip.py``, ``modeling_gemma3.py`` and
``modeling_gemma3n.py``; timm 1.0 ``mobilenetv5.py``.
"""

from __future__ import annotations

import re
from itertools import pairwise
from math import gcd, isqrt
from pathlib import Path

import numpy as np
from edge_gemma.convert.onnx_writer import MICROSOFT, OPSET_OF_BLOCKS, OnnxWriter

from edge_gemma.bundles.manifest import VisionPart
from edge_gemma.errors import CheckpointError, UsageError
from edge_gemma.units import MiB

FILE = "vision_encoder.onnx"
PRECISIONS = ("f32", "f16", "int8")
TIMM = "model.vision_tower.timm_model."
MSFA_SIDE = 16  # timm: msfa_output_resolution; 16 × 16 = 256 soft tokens for every input size
MOBILENET_SIZES = (
    768,
    512,
    256,
)  # the model card's; each is a multiple of 16 · 16, so that fusion pools whole windows
# the early stages run in strips of the picture: 192² × 768 values would be 113 MB, several times
# over
STRIPS = 8
MSFA_STRIPS = 4  # divides MSFA_SIDE
# Peak beyond the weights of MobileNetV5 while it runs as edge_gemma.seeing.encoder runs it (MiB, by
# precision and input side), measured by `python -m edge_gemma.benchmarks.vision activations
# FOLDER`; half and int8 weights are widened one at a time, which counts here. What lives at the
# same moment, and what the heap keeps between, differs from picture to picture by half: this is the
# highest of eight and a tenth.
MOBILENET_ACTIVATION_MIB = {
    "f32": {768: 260, 512: 115, 256: 32},
    "f16": {768: 540, 512: 365, 256: 160},
    "int8": {768: 440, 512: 280, 256: 150},
}
# Kept in half precision, which costs 2 MiB and takes the error of all in 8 bits from 0.0247 to
# 0.0203: `python -m edge_gemma.benchmarks.vision kinds FOLDER`
NOT_IN_8_BITS = re.compile(r"timm_model\.blocks\.[01]\.")
NORM_EPSILON = 1e-6  # timm RmsNorm2d, SigLIP's layer_norm_eps, Gemma's rms_norm_eps


def write_vision_encoder(
    checkpoint, folder: Path, precision: str, *, only: str | None = None
) -> VisionPart:
    """Write ``vision_encoder.onnx`` (+ ``.data``) into ``folder``.

    Raises CheckpointError, UsageError.

    ``only``: a pattern; weights whose names do not match it stay float32 (to measure one kind of
    layer at a time).
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"unknown precision {precision!r} for a vision encoder; choose one of "
            f"{', '.join(PRECISIONS)}, or none"
        )
    vision = checkpoint.config.get("vision_config")
    if not isinstance(vision, dict):
        raise CheckpointError(
            "config.json has no vision_config: this checkpoint has no vision tower"
        )
    if TIMM + "conv_stem.conv.weight" in checkpoint.names():
        return _write_mobilenet(checkpoint, vision, Path(folder), precision, only)
    if "model.vision_tower.embeddings.patch_embedding.weight" in checkpoint.names():
        return _write_siglip(checkpoint, vision, Path(folder), precision, only)
    raise CheckpointError(
        "the checkpoint has a vision_config but neither SigLIP nor MobileNetV5 tensors; "
        "download it whole"
    )


# ---- Gemma 3: SigLIP and the projector
def _write_siglip(
    checkpoint, vision: dict, folder: Path, precision: str, only: str | None
) -> VisionPart:
    tower, projector = "model.vision_tower.", "model.multi_modal_projector."
    width, _, patch, _ = checkpoint.shape(tower + "embeddings.patch_embedding.weight")
    size, n_head = int(vision.get("image_size", 896)), int(vision.get("num_attention_heads", 16))
    side = size // patch  # patches along one edge
    n_soft = int(checkpoint.config.get("mm_tokens_per_image", 256))
    pool = side // isqrt(n_soft)
    if (
        vision.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh"
        or width % n_head
        or (side // pool) ** 2 != n_soft
    ):
        raise CheckpointError(
            f"this SigLIP variant is not supported: hidden_act {vision.get('hidden_act')}, "
            f"width {width}, {n_head} heads, {side}² patches → {n_soft}"
        )
    positions = checkpoint.shape(tower + "embeddings.position_embedding.weight")[0]
    if positions != side * side:
        raise CheckpointError(
            f"the position table has {positions} rows; {size} px in patches of {patch} px "
            f"need {side * side}"
        )
    n_layer = 1 + max(
        int(m[1])
        for m in (
            re.match(r"model\.vision_tower\.encoder\.layers\.(\d+)\.", n)
            for n in checkpoint.names()
        )
        if m
    )
    n_ff = checkpoint.shape(tower + "encoder.layers.0.mlp.fc1.weight")[0]
    epsilon = float(vision.get("layer_norm_eps", NORM_EPSILON))

    with OnnxWriter(folder / FILE, opset=OPSET_OF_BLOCKS) as writer:
        graph = _Rows(writer, checkpoint, precision, only)
        pixels = writer.input("pixels", np.float32, [1, 3, size, size])
        # patches of the image as rows [side², 3 · patch²]: the patch convolution as one product
        x = writer.node("Reshape", [pixels, writer.ints(3, side, patch, side, patch)])
        x = writer.node(
            "Reshape",
            [
                writer.node("Transpose", [x], perm=[1, 3, 0, 2, 4]),
                writer.ints(side * side, 3 * patch * patch),
            ],
        )
        x = graph.linear(
            x, tower + "embeddings.patch_embedding", exact=True
        )  # the first layer sees pixels: never quantized
        x = writer.node("Add", [x, graph.table(tower + "embeddings.position_embedding.weight")])
        n_strips = gcd(STRIPS, side * side)
        step, whole = [side * side // n_strips, width], [side * side, width]
        x = writer.node("Reshape", [x, writer.ints(n_strips, *step)])
        for number in range(n_layer):
            x = _siglip_layer(
                graph, x, f"{tower}encoder.layers.{number}.", n_head, epsilon, n_strips, step
            )
        x = writer.node("Reshape", [x, writer.ints(*whole)])
        x = graph.layer_norm(x, tower + "post_layernorm", epsilon)
        # the projector: mean over pool × pool patches, norm (Gemma 3 stores weight − 1), product
        x = writer.node("Reshape", [x, writer.ints(side // pool, pool, side // pool, pool, width)])
        x = writer.mean(x, 1, 3)
        x = writer.node("Reshape", [x, writer.ints(n_soft, width)])
        x = writer.rms_norm(x, 1 + checkpoint.read(projector + "mm_soft_emb_norm.weight"), epsilon)
        projection = checkpoint.read(projector + "mm_input_projection_weight")  # [width, n_embd]
        x = graph.product(x, projection.T, projector, exact=True)
        writer.output("soft_tokens", x, np.float32, [n_soft, projection.shape[1]])
    return VisionPart(
        file=FILE,
        kind="siglip",
        precision=precision,
        n_embd=projection.shape[1],
        n_soft_tokens=n_soft,
        image_sizes=(size,),
        mean=0.5,
        std=0.5,
        weights_bytes=writer.weights_bytes,
        activation_bytes={str(size): _siglip_activation_bytes(side * side, width, n_ff, precision)},
    )


def _siglip_layer(
    graph: _Rows, x: str, layer: str, n_head: int, epsilon: float, n_strips: int, step: list[int]
) -> str:
    """One transformer layer on ``x [n_strips, *step]``. All but attention runs strip by strip: what
    is widest is never there whole, and a strip stays near the cores.
    """
    writer = graph.writer
    graph.ready(*(f"{layer}self_attn.{part}_proj" for part in "qkv"))

    def before(strip: str) -> tuple[str, ...]:
        y = graph.layer_norm(strip, layer + "layer_norm1", epsilon)
        return tuple(graph.linear(y, f"{layer}self_attn.{part}_proj") for part in "qkv")

    def after(strip: str, seen: str) -> tuple[str]:
        strip = writer.node("Add", [strip, graph.linear(seen, layer + "self_attn.out_proj")])
        y = graph.layer_norm(strip, layer + "layer_norm2", epsilon)
        return (
            writer.node(
                "Add",
                [
                    strip,
                    graph.linear(graph.gelu(graph.linear(y, layer + "mlp.fc1")), layer + "mlp.fc2"),
                ],
            ),
        )

    y = graph.attention(
        *writer.scan([x], step, before, [step] * 3), n_head, n_strips * step[0], step[1]
    )
    graph.ready(layer + "self_attn.out_proj", layer + "mlp.fc1", layer + "mlp.fc2")
    return writer.scan(
        [x, writer.node("Reshape", [y, writer.ints(n_strips, *step)])], step, after, [step]
    )[0]


def _siglip_activation_bytes(rows: int, width: int, n_ff: int, precision: str) -> int:
    """Attention is the widest moment: the residual, q, k and v as they are and head by head, the
    output twice, two strips of scores, and a strip of the MLP that the heap still keeps. Measured
    for Gemma 3 4B, whole process: 291 MiB anonymous at f32, 419 at f16, 441 at int8, of which about
    65 are libraries.
    """
    widened = (
        0 if precision == "f32" else 2 * (4 * width * width + 2 * n_ff * width) + n_ff * width
    )  # float32 matrices of this layer and of the one before
    return 4 * (rows * (11 * width + 2 * n_ff // STRIPS + 2 * rows // STRIPS) + widened)


# ---- Gemma 3n: MobileNetV5, multi-scale fusion and the embedder
def _write_mobilenet(
    checkpoint, vision: dict, folder: Path, precision: str, only: str | None
) -> VisionPart:
    architecture = vision.get("architecture", "mobilenetv5_300m_enc")
    if architecture != "mobilenetv5_300m_enc":
        raise CheckpointError(
            f"the vision tower is {architecture!r}; mobilenetv5_300m_enc is the one this converts"
        )
    embed = "model.embed_vision."
    width, n_embd = (
        vision.get("hidden_size", 2048),
        checkpoint.shape(embed + "embedding_projection.weight")[0],
    )
    with OnnxWriter(folder / FILE, opset=OPSET_OF_BLOCKS) as writer:
        graph = _Rows(writer, checkpoint, precision, only)
        pixels = writer.input("pixels", np.float32, [1, 3, "side", "side"])
        x = graph.gelu(
            graph.norm2d(
                graph.conv(pixels, TIMM + "conv_stem.conv", stride=2, channel_first=True),
                TIMM + "conv_stem.bn.weight",
            )
        )
        for number in _children(checkpoint, TIMM + "blocks."):
            for block in _children(checkpoint, f"{TIMM}blocks.{number}."):
                x = _mobilenet_block(
                    graph,
                    x,
                    f"{TIMM}blocks.{number}.{block}.",
                    stride=2 if block == 0 else 1,
                    early=number < 2,
                )
            if number == 2:
                fine = x
        x = _fuse(graph, fine, x)
        # the embedder; reshaping [1, 16, 16, C] to rows is transformers' flatten and permute, and
        # its √hidden_size is lost in the next norm up to epsilon
        x = writer.node(
            "Mul",
            [
                writer.node("Reshape", [x, writer.ints(MSFA_SIDE * MSFA_SIDE, width)]),
                writer.number(width**0.5),
            ],
        )
        x = writer.rms_norm(
            x,
            checkpoint.read(embed + "soft_embedding_norm.weight"),
            vision.get("rms_norm_eps", NORM_EPSILON),
        )
        x = graph.product(
            x, checkpoint.read(embed + "embedding_projection.weight"), embed, exact=True
        )
        x = writer.rms_norm(
            x, np.ones(n_embd, np.float32), vision.get("rms_norm_eps", NORM_EPSILON)
        )
        writer.output("soft_tokens", x, np.float32, [MSFA_SIDE * MSFA_SIDE, n_embd])
    return VisionPart(
        file=FILE,
        kind="mobilenetv5",
        precision=precision,
        n_embd=n_embd,
        n_soft_tokens=MSFA_SIDE * MSFA_SIDE,
        image_sizes=MOBILENET_SIZES,
        mean=0.0,
        std=1.0,
        weights_bytes=writer.weights_bytes,
        activation_bytes={
            str(size): mib * MiB for size, mib in MOBILENET_ACTIVATION_MIB[precision].items()
        },
    )


def _mobilenet_block(graph: _Rows, x: str, name: str, stride: int, early: bool) -> str:
    """One block on ``x [1, h, w, C]``.

    What kind it is shows in the tensors it has; the first block of a stage halves h and w.

    ``early``: in the first two stages, where pictures are still large.
    """
    has, writer = graph.has, graph.writer
    if has(name + "conv_exp.weight"):  # edge residual: one dense 3 × 3

        def body(strip: str) -> str:
            y = graph.gelu(
                graph.norm2d(
                    graph.conv(strip, name + "conv_exp", stride, whole=False), name + "bn1.weight"
                )
            )
            return graph.norm2d(graph.linear(y, name + "conv_pwl"), name + "bn2.weight")

        y = graph.in_strips(x, graph.kernel_of(name + "conv_exp"), stride, body)
    elif has(name + "attn.query.proj.weight"):
        y = _multi_query_attention(graph, graph.norm2d(x, name + "norm.weight"), name + "attn.")
        y = graph.scale(y, name + "layer_scale.gamma")
    else:  # universal inverted residual
        y = x
        if has(name + "dw_start.conv.weight"):
            start_stride = 1 if has(name + "dw_mid.conv.weight") else stride
            y = graph.norm2d(
                graph.conv(y, name + "dw_start.conv", start_stride), name + "dw_start.bn.weight"
            )
        mid = name + "dw_mid.conv"

        def body(strip: str) -> str:
            z = graph.gelu(
                graph.norm2d(graph.linear(strip, name + "pw_exp.conv"), name + "pw_exp.bn.weight")
            )
            if has(mid + ".weight"):
                z = graph.gelu(
                    graph.norm2d(graph.conv(z, mid, stride, whole=False), name + "dw_mid.bn.weight")
                )
            # the layer scale multiplies what the norm just multiplied: one constant
            return graph.norm2d(
                graph.linear(z, name + "pw_proj.conv"),
                name + "pw_proj.bn.weight",
                then=name + "layer_scale.gamma",
            )

        # Rows of zeros stay zeros through product, norm and GELU, so padding the input of pw_exp is
        # padding the input of dw_mid.
        kernel = graph.kernel_of(mid) if has(mid + ".weight") else 1
        y = graph.in_strips(y, kernel, stride, body) if kernel > 1 or early else body(y)
    return y if stride > 1 else writer.node("Add", [y, x])


def _multi_query_attention(graph: _Rows, x: str, name: str) -> str:
    """All heads share one K and V, so the queries of every head are simply more rows against one
    head.
    """
    writer = graph.writer
    key_dim, _ = graph.rows_of(name + "key.proj")
    value_dim, _ = graph.rows_of(name + "value.proj")
    k, v = x, x
    if graph.has(name + "key.down_conv.weight"):
        first = graph.to_channel_first(x)
        k = graph.norm2d(
            graph.conv(first, name + "key.down_conv", 2, channel_first=True),
            name + "key.norm.weight",
        )
        v = graph.norm2d(
            graph.conv(first, name + "value.down_conv", 2, channel_first=True),
            name + "value.norm.weight",
        )
    q = writer.node(
        "Reshape", [graph.linear(x, name + "query.proj"), writer.ints(STRIPS, -1, key_dim)]
    )  # h·w·heads rows in strips
    k = writer.node("Reshape", [graph.linear(k, name + "key.proj"), writer.ints(-1, key_dim)])
    v = writer.node("Reshape", [graph.linear(v, name + "value.proj"), writer.ints(-1, value_dim)])
    (y,) = writer.scan(
        [q],
        ["rows", key_dim],
        lambda strip: (graph.attend(strip, k, v, key_dim),),
        [["rows", value_dim]],
    )
    heads_wide = graph.rows_of(name + "output.proj")[1]
    shape = writer.node("Concat", [graph.grid(x), writer.ints(heads_wide)], axis=0)
    return graph.linear(writer.node("Reshape", [y, shape]), name + "output.proj")


def _fuse(graph: _Rows, fine: str, coarse: str) -> str:
    """Multi-scale fusion:

    ``fine [1, h, w, 640]`` with ``coarse [1, h/2, w/2, 1280]`` doubled to it, one inverted
    residual, pooled to 16 × 16.

    A product over joined channels is the sum of two products, and doubling by repetition commutes
    with a product over channels, so the larger half runs on a quarter of the rows.
    """
    writer, name = graph.writer, TIMM + "msfa."
    expand = graph.weight(name + "ffn.pw_exp.conv")
    wide, channels = expand.shape[0], graph.rows_of(f"{TIMM}blocks.2.0.pw_proj.conv")[0]
    width = graph.rows_of(name + "ffn.pw_proj.conv")[0]
    from_fine, from_coarse = (
        graph.matrix(part, name + "ffn.pw_exp.conv")
        for part in (expand[:, :channels], expand[:, channels:])
    )
    w = writer.slice(graph.grid(coarse), writer.ints(1), writer.ints(2), 0)
    q = writer.node(
        "Div", [w, writer.ints(MSFA_STRIPS)]
    )  # rows of coarse in a strip, half of fine's
    window = writer.node(
        "Div", [writer.node("Mul", [w, writer.ints(2)]), writer.ints(MSFA_SIDE)]
    )  # side of what one soft token averages
    rows = MSFA_SIDE // MSFA_STRIPS
    by_window = writer.node(
        "Concat",
        [writer.ints(rows), window, writer.ints(MSFA_SIDE), window, writer.ints(width)],
        axis=0,
    )
    strips = []
    for number in range(MSFA_STRIPS):
        start, stop = (writer.node("Mul", [q, writer.ints(number + k)]) for k in (0, 1))
        y = writer.multiply(
            writer.slice(
                fine,
                writer.node("Mul", [start, writer.ints(2)]),
                writer.node("Mul", [stop, writer.ints(2)]),
                1,
            ),
            from_fine,
        )
        z = writer.multiply(writer.slice(coarse, start, stop, 1), from_coarse)
        # [1, h, w, C] → [h, 1, w, 1, C] + [h, 2, w, 2, C]: each value of the coarse one meets its
        # four of the fine one
        z = writer.node(
            "Reshape",
            [z, writer.node("Concat", [q, writer.ints(1), w, writer.ints(1, wide)], axis=0)],
        )
        y = writer.node(
            "Reshape",
            [y, writer.node("Concat", [q, writer.ints(2), w, writer.ints(2, wide)], axis=0)],
        )
        y = graph.gelu(graph.norm2d(writer.node("Add", [y, z]), name + "ffn.pw_exp.bn.weight"))
        y = graph.norm2d(graph.linear(y, name + "ffn.pw_proj.conv"), name + "ffn.pw_proj.bn.weight")
        strips.append(writer.mean(writer.node("Reshape", [y, by_window]), 1, 3))  # [rows, 16, C]
    return graph.norm2d(writer.node("Concat", strips, axis=0), name + "norm.weight")


def _children(checkpoint, prefix: str) -> list[int]:
    return sorted(
        {
            int(name[len(prefix) :].split(".", 1)[0])
            for name in checkpoint.names()
            if name.startswith(prefix)
        }
    )


def _same_padding(kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, for sides that are multiples of the stride (timm: get_same_padding)."""
    total = kernel - stride
    return total // 2, total - total // 2


def _storage(precision: str) -> str:
    return "f32" if precision == "f32" else "f16"


class _Rows:
    """The vocabulary both towers are written in: values ``[…, C]`` channel-last, weights by name,
    stored at one precision.
    """

    def __init__(self, writer: OnnxWriter, checkpoint, precision: str, only: str | None = None):
        self.writer, self.checkpoint, self.precision, self.only = (
            writer,
            checkpoint,
            precision,
            re.compile(only or ""),
        )
        self._all_in_8_bits = only is not None  # who asks for a kind of layer gets it
        self._names = frozenset(checkpoint.names())
        self._made: dict = {}

    def has(self, name: str) -> bool:
        return name in self._names

    def rows_of(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a linear layer or 1×1 convolution, without reading it."""
        shape = self.checkpoint.shape(name + ".weight")
        return shape[0], int(np.prod(shape[1:]))

    def weight(self, name: str) -> np.ndarray:
        return self.checkpoint.read(name + ".weight").reshape(self.rows_of(name))

    def ready(self, *names: str) -> None:
        """Make the matrices of linear layers here, for use in the body of a loop."""
        for name in names:
            self._once(name, lambda name=name: self.matrix(self.weight(name), name))

    def linear(self, x: str, name: str, *, exact: bool = False) -> str:
        bias = (
            self._once(
                name + ".bias",
                lambda: self.writer.constant(self.checkpoint.read(name + ".bias"), "bias"),
            )
            if self.has(name + ".bias")
            else None
        )
        y = self.writer.multiply(
            x, self._once(name, lambda: self.matrix(self.weight(name), name, exact))
        )
        return y if bias is None else self.writer.node("Add", [y, bias])

    def product(self, x: str, weight: np.ndarray, name: str, *, exact: bool = False) -> str:
        return self.writer.multiply(x, self.matrix(weight, name, exact))

    def matrix(self, weight: np.ndarray, name: str, exact: bool = False):
        if not self.only.search(name):
            return self.writer.matrix(weight, "f32")
        if (
            self.precision == "int8"
            and not exact
            and (self._all_in_8_bits or not NOT_IN_8_BITS.search(name))
        ):
            return self.writer.widened_blocks(weight)
        return self.writer.matrix(weight, _storage(self.precision))

    def table(self, name: str) -> str:
        """A tensor that is added, not multiplied by: never in 8 bits."""
        return self.writer.stored(
            self.checkpoint.read(name),
            _storage(self.precision) if self.only.search(name) else "f32",
        )

    def _once(self, name: str, make):
        """Strips share their constants: each is read and written once."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def kernel_of(self, name: str) -> int:
        return self.checkpoint.shape(name + ".weight")[-1]

    def conv(
        self, x: str, name: str, stride: int, *, channel_first: bool = False, whole: bool = True
    ) -> str:
        """A spatial convolution as timm pads it ('same': the odd row at the end).

        In ``[1, h, w, C]`` (or channel-first), out ``[1, h', w', C']``.

        ``whole=False``: ``x`` is a strip of :meth:`in_strips`, padded above and below already.
        """
        n_out, per_group, kernel, _ = self.checkpoint.shape(name + ".weight")
        weight = self._once(
            name, lambda: self.writer.constant(self.checkpoint.read(name + ".weight"), "kernel")
        )  # 7 MB in all: kept exact
        inputs = [x if channel_first else self.to_channel_first(x), weight]
        if self.has(name + ".bias"):
            inputs.append(self.writer.constant(self.checkpoint.read(name + ".bias"), "bias"))
        groups = n_out if per_group == 1 and n_out > 1 else 1
        before, after = _same_padding(kernel, stride)
        rows = (before, after) if whole else (0, 0)
        y = self.writer.node(
            "Conv",
            inputs,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            group=groups,
            pads=[rows[0], before, rows[1], after],
        )
        return self.writer.node("Transpose", [y], perm=[0, 2, 3, 1])

    def in_strips(self, x: str, kernel: int, stride: int, body) -> str:
        """``body`` on ``x [1, h, w, C]`` cut into STRIPS along h, each with the rows above and
        below that a kernel reaches: what is widest is never there whole.
        """
        writer, (before, after) = self.writer, _same_padding(kernel, stride)
        h = writer.slice(self.grid(x), writer.ints(1), writer.ints(2), 0)
        step = writer.node("Div", [h, writer.ints(STRIPS)])
        padded = (
            writer.node("Pad", [x, writer.ints(0, before, 0, 0, 0, after, 0, 0)])
            if kernel > 1
            else x
        )
        strips = []
        for number in range(STRIPS):
            start = writer.node("Mul", [step, writer.ints(number)])
            stop = writer.node(
                "Add",
                [writer.node("Mul", [step, writer.ints(number + 1)]), writer.ints(before + after)],
            )
            strips.append(body(writer.slice(padded, start, stop, 1)))
        return writer.node("Concat", strips, axis=1)

    def to_channel_first(self, x: str) -> str:
        return self.writer.node("Transpose", [x], perm=[0, 3, 1, 2])

    def norm2d(self, x: str, name: str, *, then: str | None = None) -> str:
        def make() -> str:
            weight = self.checkpoint.read(name)
            if then is not None and self.has(then):
                weight = weight * self.checkpoint.read(then)
            return self.writer.constant(weight, "norm")

        weight = self._once(name, make)
        return self.writer.node(
            "SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=NORM_EPSILON, stash_type=1
        )

    def scale(self, x: str, name: str) -> str:
        return (
            self.writer.node("Mul", [x, self.writer.constant(self.checkpoint.read(name), "scale")])
            if self.has(name)
            else x
        )

    def layer_norm(self, x: str, name: str, epsilon: float) -> str:
        weight, bias = (
            self.writer.constant(self.checkpoint.read(f"{name}.{leaf}"), leaf)
            for leaf in ("weight", "bias")
        )
        return self.writer.node("LayerNormalization", [x, weight, bias], axis=-1, epsilon=epsilon)

    def gelu(self, x: str) -> str:
        return self.writer.node(
            "FastGelu", [x], domain=MICROSOFT
        )  # the tanh form, as both towers were trained

    def attention(self, q: str, k: str, v: str, n_head: int, n_rows: int, width: int) -> str:
        """Full attention over ``n_rows`` rows of ``width``: head by head, a strip of queries at a
        time, so that the scores of a strip stay near the cores.

        onnxruntime's MultiHeadAttention takes twice the time here: its blocks are small, and it
        packs keys and values anew for each of them.
        """
        writer, n_head_dim = self.writer, width // n_head
        split = writer.ints(n_rows, n_head, n_head_dim)
        q, k, v = (
            writer.node("Transpose", [writer.node("Reshape", [part, split])], perm=[1, 0, 2])
            for part in (q, k, v)
        )

        def head(q: str, k: str, v: str) -> tuple[str]:
            bounds = [writer.ints(n_rows * step // STRIPS) for step in range(STRIPS + 1)]
            return (
                writer.node(
                    "Concat",
                    [
                        self.attend(writer.slice(q, *pair, 0), k, v, n_head_dim)
                        for pair in pairwise(bounds)
                    ],
                    axis=0,
                ),
            )

        (y,) = writer.scan([q, k, v], [n_rows, n_head_dim], head, [[n_rows, n_head_dim]])
        return writer.node(
            "Reshape", [writer.node("Transpose", [y], perm=[1, 0, 2]), writer.ints(n_rows, width)]
        )

    def attend(self, q: str, k: str, v: str, dim: int) -> str:
        """``softmax(q kᵀ / √dim) v`` for ``q [n, dim]``, ``k [m, dim]``, ``v [m, …]``; the scores
        ``[n, m]`` are there whole.
        """
        scores = self.writer.node(
            "FusedMatMul", [q, k], domain=MICROSOFT, transB=1, alpha=dim**-0.5
        )
        return self.writer.node("MatMul", [self.writer.node("Softmax", [scores], axis=-1), v])

    def grid(self, x: str) -> str:
        """int64 ``[1, h, w]`` of a value ``[1, h, w, C]``."""
        return self.writer.slice(
            self.writer.node("Shape", [x]), self.writer.ints(0), self.writer.ints(3), 0
        )
