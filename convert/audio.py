"""The audio tower and its embedder, from a checkpoint to
``audio_encoder.onnx``: one streaming step with its state in and out.

In: a Gemma 3n :class:`~edge_gemma.convert.tensors.TensorReader`. Out: the graph, its data
file and the manifest's :class:`AudioPart`. Weights are read, turned and written one at a
time. This module does not run the encoder, and does not know log-mel
(:mod:`edge_gemma.hearing.log_mel`) or the order of steps
(:mod:`edge_gemma.hearing.encoder`).

Source of the network: transformers 5.23 ``modeling_gemma3n.py``. What it
computes, as a stream:

- Conformer frame t needs mel rows 4t … 4t+6; its attention sees frames t−12
  … t; nothing emitted ever changes.
- A step makes n frames from ``mel [2·rows+1, 128]``, where ``rows`` is 2n+1
  for the first step and 2n after it, and gives every 4th frame as a soft
  token: ``soft [ceil(n/4), n_embd]``. A step that is not the last must have
  n divisible by 4.
- State, each name an input and, with ``next_``, an output: ``conv_0`` the
  last row after the first subsampling block, ``group_norm`` the 4 running
  sums of the cumulative group norms, ``keys`` and ``values`` 12 frames per
  layer, ``conv`` 4 frames per layer.
- ``frames`` counts the frames of earlier steps; of the new conv_0 rows only
  the first ``valid`` exist (the rest is zero padding at the clip's end,
  zeroed after norm and ReLU).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edge_gemma.bundles.manifest import AudioPart
from edge_gemma.convert.onnx_writer import OnnxWriter, Precision, Shape, check_precision
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.errors import CheckpointError, UnsupportedModel
from edge_gemma.hearing.encoder import STEP_FRAMES

FILE = "audio_encoder.onnx"
TOWER, EMBEDDER = "model.audio_tower.", "model.embed_audio."
_END = 1 << 40  # beyond every axis: a slice up to it goes to the end


# What transformers' Gemma3nAudioConfig assumes
_DEFAULTS: dict[str, object] = {
    "hidden_size": 1536,
    "conf_num_hidden_layers": 12,
    "conf_num_attention_heads": 8,
    "conf_attention_context_left": 13,
    "conf_attention_logit_cap": 50.0,
    "conf_conv_kernel_size": 5,
    "conf_reduction_factor": 4,
    "conf_residual_weight": 0.5,
    "rms_norm_eps": 1e-6,
    "sscp_conv_group_norm_eps": 1e-3,
    "sscp_conv_channel_size": [128, 32],
    "input_feat_size": 128,
    "gradient_clipping": 1e10,
}


@dataclass(frozen=True)
class AudioConfig:
    """The numbers of ``audio_config`` that the graph is made of."""

    hidden: int
    n_layer: int
    n_head: int
    left: int  # keys a query sees, itself included
    logit_cap: float
    kernel: int  # of the depthwise convolution
    reduction: int  # conformer frames per soft token
    residual: float
    epsilon: float
    group_norm_epsilon: float
    channels: tuple[int, ...]  # of both subsampling blocks
    n_mels: int
    clip: float

    @classmethod
    def of(cls, tensors: TensorReader) -> AudioConfig:
        """Read and check; raises CheckpointError without an audio tower,
        UnsupportedModel for one of another architecture.
        """
        raw = tensors.config.get("audio_config") or {}
        if f"{TOWER}conformer.0.norm.weight" not in tensors.names():
            raise CheckpointError(
                "the checkpoint has no audio tower (only Gemma 3n E2B and E4B have one); convert "
                "it with --audio-encoder none"
            )
        fixed = {
            "conf_attention_context_right": 0,
            "sscp_conv_kernel_size": [[3, 3], [3, 3]],
            "sscp_conv_stride_size": [[2, 2], [2, 2]],
        }
        for name, expected in fixed.items():
            if raw.get(name, expected) != expected:
                raise UnsupportedModel(
                    f"audio_config.{name} is {raw[name]}; this version writes encoders with "
                    f"{expected} only"
                )
        try:
            given = {key: value for key, value in dict(raw).items() if value is not None}
            if "sscp_conv_eps" in given:  # an earlier spelling
                given.setdefault("sscp_conv_group_norm_eps", given["sscp_conv_eps"])
            config = cls._read(_DEFAULTS | given)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"config.json: audio_config is malformed ({type(error).__name__}: {error})"
            ) from None
        if (
            STEP_FRAMES % config.reduction
            or config.n_mels != 128
            or len(config.channels) != 2
            or config.hidden % config.n_head
        ):
            raise UnsupportedModel(
                f"audio_config has reduction {config.reduction}, {config.n_mels} mel bins, "
                f"{len(config.channels)} subsampling blocks; "
                f"expected a divisor of {STEP_FRAMES}, 128 and 2"
            )
        return config

    @classmethod
    def _read(cls, raw: dict) -> AudioConfig:
        return cls(
            hidden=int(raw["hidden_size"]),
            n_layer=int(raw["conf_num_hidden_layers"]),
            n_head=int(raw["conf_num_attention_heads"]),
            left=int(raw["conf_attention_context_left"]),
            logit_cap=float(raw["conf_attention_logit_cap"]),
            kernel=int(raw["conf_conv_kernel_size"]),
            reduction=int(raw["conf_reduction_factor"]),
            residual=float(raw["conf_residual_weight"]),
            epsilon=float(raw["rms_norm_eps"]),
            group_norm_epsilon=float(raw["sscp_conv_group_norm_eps"]),
            channels=tuple(int(n) for n in raw["sscp_conv_channel_size"]),
            n_mels=int(raw["input_feat_size"]),
            clip=float(raw["gradient_clipping"]),
        )

    @property
    def context(self) -> int:
        """Earlier frames that a query sees."""
        return self.left - 1

    @property
    def head_dim(self) -> int:
        return self.hidden // self.n_head

    def activation_bytes(self, n_embd: int) -> int:
        """Values alive at once in a step of 12 frames, the step's state,
        and onnxruntime's fixed cost.
        """
        rows = 2 * STEP_FRAMES + 1
        conv = 3 * rows * self.channels[0] * (self.n_mels // 2)
        feed_forward = STEP_FRAMES * self.hidden * (4 * 3 + 4)
        state_frames = 2 * self.context + self.kernel - 1
        state = 2 * self.n_layer * self.hidden * state_frames  # in and out
        return 4 * (conv + feed_forward + state + STEP_FRAMES * n_embd)


def write_audio_encoder(
    tensors: TensorReader,
    folder: Path,
    precision: str,
    *,
    progress: Callable[[str], None] = lambda part: None,
) -> AudioPart:
    """Write ``audio_encoder.onnx`` and ``audio_encoder.onnx.data`` (list
    both under the manifest's files) into ``folder``.

    ``progress`` is told each part's name before it is written. The first
    and last projections, 1 % of the weights, stay at half precision when
    ``precision`` is coarser. Raises CheckpointError, UnsupportedModel.
    """
    config = AudioConfig.of(tensors)
    n_embd = tensors.shape(f"{EMBEDDER}embedding_projection.weight")[0]
    with OnnxWriter(Path(folder) / FILE) as graph:
        build = _Builder(tensors, config, graph, check_precision(precision))
        _write_step(build, n_embd, progress)
    return AudioPart(
        file=FILE,
        precision=precision,
        n_embd=n_embd,
        # half precision is widened when the session is opened: both are in
        # memory then
        weights_bytes=graph.weights_bytes + graph.half_bytes,
        activation_bytes=config.activation_bytes(n_embd),
        n_layer=config.n_layer,
        hidden=config.hidden,
    )


@dataclass(frozen=True)
class _Builder:
    """Where weights come from and where nodes go, with the few steps that
    all parts share.
    """

    tensors: TensorReader
    config: AudioConfig
    graph: OnnxWriter
    precision: Precision

    @property
    def outer_precision(self) -> Precision:
        """Of the first and the last projection."""
        return "f32" if self.precision == "f32" else "f16"

    def read(self, name: str, *shape: int, prefix: str = TOWER) -> np.ndarray:
        value = self.tensors.read(prefix + name)
        if value.shape != shape:
            raise CheckpointError(
                f"tensor {prefix + name} has shape "
                f"{list(value.shape)}, audio_config implies {list(shape)}"
            )
        return value

    def clip(self, x: str) -> str:
        limit = self.config.clip
        return self.graph.node("Clip", [x, self.graph.number(-limit), self.graph.number(limit)])

    def norm(self, x: str, name: str, *, prefix: str = TOWER, factor: float = 1.0) -> str:
        """RMS norm of ``x [n, hidden]`` with the weight ``name``, times
        ``factor``.
        """
        weight = self.read(name, self.config.hidden, prefix=prefix)
        return self.graph.rms_norm(x, factor * weight, self.config.epsilon)

    def linear(self, x: str, name: str, n_out: int, n_in: int) -> str:
        """``x [n, n_in]`` times the weight ``name [n_out, n_in]``."""
        leaf = name.split(".")[-2]
        return self.graph.linear(x, self.read(name, n_out, n_in), self.precision, name=leaf)

    def silu(self, x: str) -> str:
        return self.graph.mul(x, self.graph.node("Sigmoid", [x]))

    def range(self, stop: str) -> str:
        """[0, 1 … stop − 1] int64; ``stop`` is a vector of one element."""
        graph = self.graph
        start = graph.integer(0)
        return graph.node("Range", [start, graph.node("Squeeze", [stop]), graph.integer(1)])

    def last(self, x: str, n: int, axis: int) -> str:
        """The last ``n`` of ``x`` along ``axis``."""
        return self.graph.slice(x, self.graph.ints(-n), self.graph.ints(_END), axis=axis)


@dataclass(frozen=True)
class _Step:
    """The inputs that say where in the clip a step lies, and how long it
    is; each [1] int64.
    """

    frames: str  # conformer frames of earlier steps
    valid: str  # rows of conv_0 that exist
    n: str = ""  # conformer frames of this step, known after subsampling


def _write_step(build: _Builder, n_embd: int, progress: Callable[[str], None]) -> None:
    config, graph = build.config, build.graph
    mel = graph.input("mel", np.float32, ["mel_rows", config.n_mels])
    step = _Step(graph.input("frames", np.int64, [1]), graph.input("valid", np.int64, [1]))
    shapes = _state_shapes(config)
    state = {name: graph.input(name, np.float32, shape) for name, shape in shapes.items()}
    progress("subsampling")
    x, conv_0, group_norm = _subsample(build, step, mel, state)
    next_state = {"conv_0": conv_0, "group_norm": group_norm}
    step = replace(step, n=graph.node("Shape", [x], start=0, end=1))
    mask = _attention_mask(build, step)
    layers: dict[str, list[str]] = {"keys": [], "values": [], "conv": []}
    for i in range(config.n_layer):
        progress(f"conformer layer {i + 1}/{config.n_layer}")
        x = _feed_forward(build, x, f"conformer.{i}.ffw_layer_start.")
        x, key, value = _attention(build, step, x, i, mask, state)
        x, conv = _light_convolution(build, step, x, i, state["conv"])
        x = _feed_forward(build, x, f"conformer.{i}.ffw_layer_end.")
        x = build.norm(build.clip(x), f"conformer.{i}.norm.weight")
        for name, kept in (("keys", key), ("values", value), ("conv", conv)):
            layers[name].append(kept)
    progress("embedder")
    soft = _embed(build, step, x, n_embd)
    graph.output("soft", soft, np.float32, ["n_soft", n_embd])
    for name, parts in layers.items():
        next_state[name] = graph.concat(parts, axis=0)
    shapes["conv_0"] = [1, config.channels[0], 1, config.n_mels // 2]
    for name, made in next_state.items():
        graph.output(f"next_{name}", made, np.float32, shapes[name])


def _state_shapes(config: AudioConfig) -> dict[str, Shape]:
    per_layer = [config.n_layer, config.context, config.hidden]
    return {
        "conv_0": [1, config.channels[0], "conv_0_rows", config.n_mels // 2],  # no row at first
        "group_norm": [4],
        "keys": per_layer,
        "values": per_layer,
        "conv": [config.n_layer, config.kernel - 1, config.hidden],
    }


def _embed(build: _Builder, step: _Step, x: str, n_embd: int) -> str:
    """Every 4th frame of ``x [n, hidden]`` in the decoder's space:
    [ceil(n/4), n_embd].
    """
    config, graph = build.config, build.graph
    x = graph.slice(x, graph.ints(0), step.n, axis=0, step=config.reduction)
    x = build.norm(x, "soft_embedding_norm.weight", prefix=EMBEDDER)
    projection = build.read("embedding_projection.weight", n_embd, config.hidden, prefix=EMBEDDER)
    x = graph.linear(x, projection, build.outer_precision, name="embedding_projection")
    return graph.rms_norm(x, np.ones(n_embd, np.float32), config.epsilon)


# ---- subsampling: mel [m, 128] → x [n, hidden]
def _subsample(
    build: _Builder, step: _Step, mel: str, state: dict[str, str]
) -> tuple[str, str, str]:
    """Two convolution blocks that halve time and frequency each, and a
    projection. Returns x and the next ``conv_0`` and ``group_norm``.
    """
    config, graph = build.config, build.graph
    prefix = "subsample_conv_projection."
    x = graph.node("Unsqueeze", [mel, graph.ints(0, 1)])  # [1, 1, m, 128]
    carried = graph.node("Shape", [state["conv_0"]], start=2, end=3)  # 0 in the first step, then 1
    # conv_0 rows of earlier steps: 2t + 1 after the first
    doubled = graph.mul(step.frames, graph.ints(2))
    seen = graph.add(doubled, carried)
    first, second = config.channels
    weight = build.read(f"{prefix}conv_0.conv.weight", first, 1, 3, 3)
    x, rows, sums_0 = _conv_block(build, x, 0, weight, state["group_norm"], seen)
    is_real = graph.node("Less", [rows, step.valid])
    exists = graph.node("Cast", [is_real], to=1)  # [rows] float32
    x = graph.mul(x, graph.reshape(exists, 1, 1, -1, 1))
    x = graph.concat([state["conv_0"], x], axis=2)  # [1, C0, 2n + 1, 64]
    last_row = build.last(x, 1, axis=2)
    weight = build.read(f"{prefix}conv_1.conv.weight", second, first, 3, 3)
    x, _, sums_1 = _conv_block(build, x, 1, weight, state["group_norm"], step.frames)
    x = graph.transpose(x, 0, 2, 3, 1)  # [1, n, F, C1], channel fastest
    width = config.n_mels // 4 * second
    x = graph.reshape(x, -1, width)
    projection = build.read(f"{prefix}input_proj_linear.weight", config.hidden, width)
    x = graph.linear(x, projection, build.outer_precision, name="input_proj")
    return x, last_row, graph.concat([*sums_0, *sums_1], axis=0)


def _conv_block(
    build: _Builder, x: str, block: int, weight: np.ndarray, sums: str, seen: str
) -> tuple[str, str, tuple[str, str]]:
    """Convolution, cumulative group norm, ReLU; ``seen`` counts the rows of
    earlier steps. Returns x [1, C, rows, F], the new rows' numbers 0 …
    [rows], and both running sums [1].
    """
    config, graph = build.config, build.graph
    n_channels = weight.shape[0]
    kernel = graph.constant(weight, f"conv_{block}")
    x = graph.node("Conv", [x, kernel], strides=[2, 2], pads=[0, 1, 0, 1])  # no padding in time
    rows = build.range(graph.node("Shape", [x], start=2, end=3))  # [rows]
    before = graph.add(rows, seen)
    count = graph.node("Cast", [graph.add(before, graph.ints(1))], to=1)
    # how many values the mean of each row is over
    per_row = graph.number(n_channels * (config.n_mels >> (block + 1)))
    values = graph.mul(count, per_row)
    values = graph.reshape(values, 1, 1, -1, 1)
    total, last_total = _cumulative(build, x, sums, 2 * block)
    x = graph.sub(x, graph.div(total, values))
    squared = graph.mul(x, x)
    squares, last_squares = _cumulative(build, squared, sums, 2 * block + 1)
    variance = graph.div(squares, values)
    padded = graph.add(variance, graph.number(config.group_norm_epsilon))
    deviation = graph.node("Sqrt", [padded])
    scale = build.read(f"subsample_conv_projection.conv_{block}.norm.weight", n_channels)
    x = graph.div(x, deviation)
    x = graph.mul(x, graph.constant(scale.reshape(1, n_channels, 1, 1), "group_norm"))
    return graph.node("Relu", [x]), rows, (last_total, last_squares)


def _cumulative(build: _Builder, terms: str, sums: str, index: int) -> tuple[str, str]:
    """The sum of ``terms`` over all rows up to each, earlier steps included
    [1, 1, rows, 1], and its last value [1]; ``index`` is the sum's place in
    the state ``sums``.
    """
    graph = build.graph
    per_row = graph.node("ReduceSum", [terms, graph.ints(1, 3)], keepdims=1)  # [1, 1, rows, 1]
    before = graph.slice(sums, graph.ints(index), graph.ints(index + 1), axis=0)
    total = graph.add(graph.node("CumSum", [per_row, graph.integer(2)]), before)
    return total, graph.reshape(build.last(total, 1, axis=2), 1)


# ---- conformer: x [n, hidden]
def _feed_forward(build: _Builder, x: str, prefix: str) -> str:
    config, graph = build.config, build.graph
    hidden = config.hidden
    y = build.norm(build.clip(x), f"{prefix}pre_layer_norm.weight")
    y = build.silu(build.linear(y, f"{prefix}ffw_layer_1.weight", 4 * hidden, hidden))
    y = build.linear(y, f"{prefix}ffw_layer_2.weight", hidden, 4 * hidden)
    y = build.norm(build.clip(y), f"{prefix}post_layer_norm.weight", factor=config.residual)
    return graph.add(x, y)


def _attention_mask(build: _Builder, step: _Step) -> str:
    """[n, n + 12] float32: 0 where query i (frame t + i) sees key j (frame
    t + j − 12), far below every logit elsewhere.
    """
    graph, context = build.graph, build.config.context
    queries = build.range(step.n)
    keys = build.range(graph.add(step.n, graph.ints(context)))
    distance = graph.sub(keys, graph.node("Unsqueeze", [queries, graph.ints(1)]))
    not_before = graph.node("GreaterOrEqual", [distance, graph.integer(0)])
    not_after = graph.node("LessOrEqual", [distance, graph.integer(context)])
    near = graph.node("And", [not_before, not_after])
    key_frames = graph.add(keys, step.frames)
    in_clip = graph.node("GreaterOrEqual", [key_frames, graph.integer(context)])
    is_seen = graph.node("And", [near, in_clip])
    return graph.node("Where", [is_seen, graph.number(0.0), graph.number(-1e30)])


def _attention(
    build: _Builder, step: _Step, x: str, layer: int, mask: str, state: dict[str, str]
) -> tuple[str, str, str]:
    """Local attention with relative positions. Returns x and the next keys
    and values [1, 12, hidden].
    """
    config, graph = build.config, build.graph
    prefix, hidden = f"conformer.{layer}.attention.", config.hidden
    y = build.norm(build.clip(x), f"{prefix}pre_attn_norm.weight")
    weight = _scaled_qkv(build, prefix)
    y = graph.linear(y, weight, build.precision, name="qkv")
    q, k, v = graph.nodes("Split", [y, graph.ints(hidden, hidden, hidden)], 3, axis=1)
    k = _with_earlier(build, state["keys"], layer, k)
    v = _with_earlier(build, state["values"], layer, v)
    q = _heads(build, q, [1, 0, 2])  # [heads, n, head_dim]
    content = graph.node("MatMul", [q, _heads(build, k, [1, 2, 0])])  # [heads, n, n + 12]
    position = _position_logits(build, step, q, layer)
    logits = graph.add(content, position)
    logits = graph.div(logits, graph.number(config.logit_cap))
    logits = graph.node("Tanh", [logits])
    logits = graph.mul(logits, graph.number(config.logit_cap))
    weights = graph.node("Softmax", [graph.add(logits, mask)], axis=-1)
    y = graph.node("MatMul", [weights, _heads(build, v, [1, 0, 2])])  # [heads, n, head_dim]
    y = graph.transpose(y, 1, 0, 2)
    y = graph.reshape(y, -1, hidden)
    y = build.linear(y, f"{prefix}post.weight", hidden, hidden)
    y = build.norm(build.clip(y), f"{prefix}post_norm.weight")
    x = graph.add(x, y)
    return x, _last_frames(build, k, config.context), _last_frames(build, v, config.context)


def _scaled_qkv(build: _Builder, prefix: str) -> np.ndarray:
    """The weights of q, k and v [3 · hidden, hidden]. q is scaled by
    head_dim^-1/2 / ln 2 · softplus(per_dim_scale), which goes into the rows
    of its weight.
    """
    config = build.config
    scale = build.read(f"{prefix}attn.per_dim_scale", config.head_dim)
    softplus = np.logaddexp(np.float32(0), scale)
    scale = np.tile(softplus * np.float32(config.head_dim**-0.5 / math.log(2)), config.n_head)
    q, k, v = (
        build.read(f"{prefix}attn.{part}_proj.weight", config.hidden, config.hidden)
        for part in "qkv"
    )
    return np.concatenate([q * scale[:, None], k, v])


def _position_logits(build: _Builder, step: _Step, q: str, layer: int) -> str:
    """q·r[distance] [heads, n, n + 12]: computed for 13 distances, then
    each query's 13 values are moved to its own keys, because a row of n +
    13 read as rows of n + 12 moves one to the right.
    """
    config, graph = build.config, build.graph
    table = graph.constant(_relative_positions(build, layer), "relative")
    relative = graph.node("MatMul", [q, table])  # [heads, n, 13], oldest key first
    pads = graph.concat([graph.ints(0, 0, 0, 0, 0), step.n], axis=0)
    padded = graph.node("Pad", [relative, pads])
    flat = graph.reshape(padded, config.n_head, -1)
    n_keys = graph.add(step.n, graph.ints(config.context))
    start = graph.ints(0)
    flat = graph.slice(flat, start, graph.mul(step.n, n_keys), axis=1)
    shape = graph.concat([graph.ints(config.n_head), step.n, n_keys], axis=0)
    return graph.reshape_to(flat, shape)


def _relative_positions(build: _Builder, layer: int) -> np.ndarray:
    """r [heads, head_dim, 13]: the projected sinusoid of each distance, 12
    … 0. A constant, because only 13 distances are ever seen.
    """
    config, half = build.config, build.config.hidden // 2
    step = np.float32(math.log(1e4) / max(half - 1, 1))
    inverse = np.exp(np.arange(half, dtype=np.float32) * -step)
    distances = np.arange(config.context, -1, -1, dtype=np.float32)
    angle = distances[:, None] * inverse
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # [13, hidden]
    name = f"conformer.{layer}.attention.attn.relative_position_embedding.pos_proj.weight"
    table = table @ build.read(name, config.hidden, config.hidden).T
    heads = table.reshape(config.left, config.n_head, config.head_dim)
    return np.ascontiguousarray(heads.transpose(1, 2, 0))


def _heads(build: _Builder, x: str, perm: list[int]) -> str:
    """``x [n, hidden]`` as [n, heads, head_dim] with its axes in the order
    ``perm``.
    """
    shape = build.graph.ints(-1, build.config.n_head, build.config.head_dim)
    return build.graph.transpose(build.graph.reshape_to(x, shape), *perm)


def _with_earlier(build: _Builder, state: str, layer: int, x: str) -> str:
    """The frames that ``state`` carries for a layer, before the new ones."""
    graph = build.graph
    earlier = graph.node("Gather", [state, graph.integer(layer)], axis=0)
    return graph.concat([earlier, x], axis=0)


def _last_frames(build: _Builder, x: str, n: int) -> str:
    """What the next step needs of ``x [m, hidden]``: [1, n, hidden]."""
    return build.graph.node("Unsqueeze", [build.last(x, n, axis=0), build.graph.ints(0)])


def _light_convolution(
    build: _Builder, step: _Step, x: str, layer: int, state: str
) -> tuple[str, str]:
    """A gated depthwise convolution over time. Returns x and the next state
    [1, 4, hidden].
    """
    config, graph = build.config, build.graph
    prefix, hidden = f"conformer.{layer}.lconv1d.", config.hidden
    y = build.norm(x, f"{prefix}pre_layer_norm.weight")
    y = build.linear(y, f"{prefix}linear_start.weight", 2 * hidden, hidden)
    y, gate = graph.nodes("Split", [y, graph.ints(hidden, hidden)], 2, axis=1)
    gated = graph.mul(y, graph.node("Sigmoid", [gate]))
    y = _with_earlier(build, state, layer, gated)
    kept = _last_frames(build, y, config.kernel - 1)
    taps = build.read(f"{prefix}depthwise_conv1d.weight", hidden, 1, config.kernel)
    y = _convolve(build, step, y, taps)
    y = build.silu(build.norm(build.clip(y), f"{prefix}conv_norm.weight"))
    y = build.linear(y, f"{prefix}linear_end.weight", hidden, hidden)
    return graph.add(x, y), kept


def _convolve(build: _Builder, step: _Step, y: str, taps: np.ndarray) -> str:
    """The sum over j of frames j … j + n of ``y`` times tap j; ``taps
    [hidden, 1, kernel]``.
    """
    graph = build.graph
    total = ""
    for j in range(build.config.kernel):
        end = graph.add(step.n, graph.ints(j))
        frames = graph.slice(y, graph.ints(j), end, axis=0)
        tap = graph.constant(np.ascontiguousarray(taps[:, 0, j]), "tap")
        term = graph.mul(frames, tap)
        total = graph.add(total, term) if total else term
    return total
