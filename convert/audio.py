"""The audio tower and its embedder, from a checkpoint to ``audio_encoder.onnx``: one streaming step
with its state in and out.

In: a Gemma 3n :class:`Checkpoint`. Out: the graph, its data file and the manifest's
:class:`AudioEncoder`. Weights are read, turned and written one at a time. This room does not run
the encoder, and does not know log-mel (``edge_gemma/features.py``) or the order of steps
(``edge_gemma/encode.py``).

Source of the network: transformers 5.23 ``modeling_gemma3n.py``. What it computes, as a stream:

- Conformer frame t needs mel rows 4t … 4t+6; its attention sees frames t−12 … t; nothing emitted
  ever changes.
- A step makes n frames from ``mel [2·rows+1, 128]``, where ``rows`` is 2n+1 for the first step and
  2n after it, and gives every 4th frame as a soft token: ``soft [ceil(n/4), n_embd]``. A step that
  is not the last must have n divisible by 4.
- State, each name an input and, with ``next_``, an output: ``conv_0`` the last row after the first
  subsampling block, ``group_norm`` the 4 running sums of the cumulative group norms, ``keys`` and
  ``values`` 12 frames per layer, ``conv`` 4 frames per layer.
- ``frames`` counts the frames of earlier steps; of the new conv_0 rows only the first ``valid``
  exist (the rest is zero padding at the clip's end, zeroed after norm and ReLU).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from edge_gemma.convert.checkpoint import Checkpoint
from edge_gemma.convert.onnx_writer import OnnxWriter, Precision

from edge_gemma.bundles.manifest import AudioPart
from edge_gemma.errors import CheckpointError, UnsupportedModel
from edge_gemma.hearing.encoder import STEP_FRAMES

FILE = "audio_encoder.onnx"
TOWER, EMBEDDER = "model.audio_tower.", "model.embed_audio."


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
    channels: tuple[int, int]
    n_mels: int
    clip: float

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> AudioConfig:
        """Read and check; raises CheckpointError without an audio tower, UnsupportedModel for one
        of another architecture.
        """
        raw = checkpoint.config.get("audio_config")
        if not isinstance(raw, dict) or f"{TOWER}conformer.0.norm.weight" not in checkpoint.names():
            raise CheckpointError(
                f"{checkpoint.folder} has no audio tower (only Gemma 3n E2B and E4B have "
                "one); convert it with --audio-encoder none"
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
            config = cls(
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
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint.folder}: audio_config is incomplete or malformed "
                f"({type(error).__name__}: {error})"
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

    @property
    def head_dim(self) -> int:
        return self.hidden // self.n_head

    def activation_bytes(self, n_embd: int) -> int:
        """Values alive at once in a step of 12 frames, the step's state, and onnxruntime's fixed
        cost.
        """
        rows = 2 * STEP_FRAMES + 1
        conv = 3 * rows * self.channels[0] * (self.n_mels // 2)
        feed_forward = STEP_FRAMES * self.hidden * (4 * 3 + 4)
        state = (
            2 * self.n_layer * self.hidden * (2 * (self.left - 1) + self.kernel - 1)
        )  # in and out
        return 4 * (conv + feed_forward + state + STEP_FRAMES * n_embd)


def write_audio_encoder(
    checkpoint: Checkpoint,
    folder: Path,
    precision: Precision,
    *,
    progress: Callable[[str], None] = lambda part: None,
) -> AudioPart:
    """Write ``audio_encoder.onnx`` and ``audio_encoder.onnx.data`` (list both under the manifest's
    files) into ``folder``.

    ``progress`` is told each part's name before it is written. The first and last projections, 1 %
    of the weights, stay at half precision when ``precision`` is coarser. Raises CheckpointError,
    UnsupportedModel.
    """
    config = AudioConfig.of(checkpoint)
    n_embd = checkpoint.shape(f"{EMBEDDER}embedding_projection.weight")[0]
    with OnnxWriter(Path(folder) / FILE) as graph:
        _Tower(checkpoint, config, graph, precision, progress).write(n_embd)
    return AudioPart(
        file=FILE,
        precision=precision,
        n_embd=n_embd,
        weights_bytes=graph.weights_bytes
        + graph.half_bytes,  # in memory: half precision is widened when the session is opened
        activation_bytes=config.activation_bytes(n_embd),
        n_layer=config.n_layer,
        hidden=config.hidden,
    )


def hard_rows(checkpoint: Checkpoint, embedder: str, indices: list[int]) -> np.ndarray:
    """Rows ``[len(indices), n_embd]`` float32 that stand for special tokens among embedding rows:
    entry ``i`` of the hard embedding table, normed, projected, normed. ``embedder`` is
    ``model.embed_audio.`` (0 = end of audio, 127 = audio padding) or ``model.embed_vision.`` (0 =
    end of image). The table's own ids start at its ``vocab_offset``.
    """
    part = (
        checkpoint.config.get(
            {"model.embed_audio.": "audio_config", "model.embed_vision.": "vision_config"}[embedder]
        )
        or {}
    )
    epsilon = float(part.get("rms_norm_eps", 1e-6))
    n_rows = checkpoint.shape(f"{embedder}embedding.weight")[0]
    if not all(0 <= i < n_rows for i in indices):
        raise CheckpointError(f"{embedder}embedding.weight has {n_rows} rows, asked for {indices}")
    x = np.concatenate(
        [checkpoint.read(f"{embedder}embedding.weight", slice(i, i + 1)) for i in indices]
    )  # [k, hidden]
    x = _rms(x, epsilon) * checkpoint.read(f"{embedder}hard_embedding_norm.weight")
    return _rms(x @ checkpoint.read(f"{embedder}embedding_projection.weight").T, epsilon)


def _rms(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(epsilon))


class _Tower:
    """One write of the graph; methods follow the data."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: AudioConfig,
        graph: OnnxWriter,
        precision: Precision,
        progress: Callable[[str], None],
    ):
        self.c, self.g, self.precision, self.progress, self._checkpoint = (
            config,
            graph,
            precision,
            progress,
            checkpoint,
        )
        self.edge_precision: Precision = precision if precision == "f32" else "f16"

    def read(self, name: str, *shape: int, tower: str = TOWER) -> np.ndarray:
        value = self._checkpoint.read(tower + name)
        if value.shape != shape:
            raise CheckpointError(
                f"{self._checkpoint.folder}: tensor {tower + name} has shape "
                f"{list(value.shape)}, audio_config implies {list(shape)}"
            )
        return value

    def write(self, n_embd: int) -> None:
        c, g = self.c, self.g
        state_shapes = {
            "conv_0": [1, c.channels[0], "conv_0_rows", c.n_mels // 2],
            "group_norm": [4],
            "keys": [c.n_layer, c.left - 1, c.hidden],
            "values": [c.n_layer, c.left - 1, c.hidden],
            "conv": [c.n_layer, c.kernel - 1, c.hidden],
        }
        mel = g.input("mel", np.float32, ["mel_rows", c.n_mels])
        self.frames = g.input("frames", np.int64, [1])
        self.valid = g.input("valid", np.int64, [1])
        state = {name: g.input(name, np.float32, shape) for name, shape in state_shapes.items()}
        self.progress("subsampling")
        x, next_conv_0, sums = self._subsample(mel, state["conv_0"], state["group_norm"])
        self.n = g.node("Shape", [x], start=0, end=1)  # [1] int64: frames of this step
        mask = self._mask()
        keys, values, convs = [], [], []
        for i in range(c.n_layer):
            self.progress(f"conformer layer {i + 1}/{c.n_layer}")
            x = self._feed_forward(x, f"conformer.{i}.ffw_layer_start.")
            x, key, value = self._attention(x, i, mask, state["keys"], state["values"])
            x, conv = self._light_convolution(x, i, state["conv"])
            x = self._feed_forward(x, f"conformer.{i}.ffw_layer_end.")
            x = g.rms_norm(
                self._clip(x), self.read(f"conformer.{i}.norm.weight", c.hidden), c.epsilon
            )
            keys.append(key), values.append(value), convs.append(conv)
        self.progress("embedder")
        x = g.slice(x, g.ints(0), self.n, axis=0, step=c.reduction)
        x = g.rms_norm(
            x, self.read("soft_embedding_norm.weight", c.hidden, tower=EMBEDDER), c.epsilon
        )
        x = g.linear(
            x,
            self.read("embedding_projection.weight", n_embd, c.hidden, tower=EMBEDDER),
            self.edge_precision,
            name="embedding_projection",
        )
        g.output(
            "soft",
            g.rms_norm(x, np.ones(n_embd, np.float32), c.epsilon),
            np.float32,
            ["n_soft", n_embd],
        )
        stacked = {"conv_0": next_conv_0, "group_norm": sums}
        for name, parts in (("keys", keys), ("values", values), ("conv", convs)):
            stacked[name] = g.node("Concat", parts, axis=0)
        for name, value in stacked.items():
            shape = [1, c.channels[0], 1, c.n_mels // 2] if name == "conv_0" else state_shapes[name]
            g.output(f"next_{name}", value, np.float32, shape)

    # ---- subsampling: mel [m, 128] → x [n, hidden]
    def _subsample(self, mel: str, conv_0: str, sums: str) -> tuple[str, str, str]:
        c, g = self.c, self.g
        prefix = "subsample_conv_projection."
        x = g.node("Unsqueeze", [mel, g.ints(0, 1)])  # [1, 1, m, 128]
        carried = g.node("Shape", [conv_0], start=2, end=3)  # 0 in the first step, then 1
        seen = g.node(
            "Add", [g.node("Mul", [self.frames, g.ints(2)]), carried]
        )  # conv_0 rows of earlier steps: 2t + 1 after the first
        x, rows, sum_0, square_0 = self._conv_block(
            x, 0, self.read(f"{prefix}conv_0.conv.weight", c.channels[0], 1, 3, 3), sums, seen
        )
        exists = g.node("Cast", [g.node("Less", [rows, self.valid])], to=1)  # [rows] float32
        x = g.node("Mul", [x, g.node("Reshape", [exists, g.ints(1, 1, -1, 1)])])
        x = g.node("Concat", [conv_0, x], axis=2)  # [1, C0, 2n + 1, 64]
        last = g.slice(x, g.ints(-1), g.ints(1 << 40), axis=2)
        x, _, sum_1, square_1 = self._conv_block(
            x,
            1,
            self.read(f"{prefix}conv_1.conv.weight", c.channels[1], c.channels[0], 3, 3),
            sums,
            self.frames,
        )
        x = g.node("Transpose", [x], perm=[0, 2, 3, 1])  # [1, n, F, C1], channel fastest
        width = c.n_mels // 4 * c.channels[1]
        x = g.node("Reshape", [x, g.ints(-1, width)])
        x = g.linear(
            x,
            self.read(f"{prefix}input_proj_linear.weight", c.hidden, width),
            self.edge_precision,
            name="input_proj",
        )
        return x, last, g.node("Concat", [sum_0, square_0, sum_1, square_1], axis=0)

    def _conv_block(
        self, x: str, k: int, weight: np.ndarray, sums: str, seen: str
    ) -> tuple[str, str, str, str]:
        """Convolution, cumulative group norm, ReLU. Returns x [1, C, rows, F], the new rows'
        numbers 0 … [rows], and both running sums [1].
        """
        c, g = self.c, self.g
        n_channels = weight.shape[0]
        x = g.node(
            "Conv", [x, g.constant(weight, f"conv_{k}")], strides=[2, 2], pads=[0, 1, 0, 1]
        )  # no padding in time
        n_rows = g.node("Shape", [x], start=2, end=3)
        rows = g.node("Range", [g.integer(0), g.node("Squeeze", [n_rows]), g.integer(1)])  # [rows]
        count = g.node("Cast", [g.node("Add", [g.node("Add", [rows, seen]), g.ints(1)])], to=1)
        values = g.node("Mul", [count, g.number(n_channels * (c.n_mels >> (k + 1)))])
        values = g.node(
            "Reshape", [values, g.ints(1, 1, -1, 1)]
        )  # how many values the mean of row s is over

        def cumulative(terms: str, index: int) -> tuple[str, str]:
            per_row = g.node("ReduceSum", [terms, g.ints(1, 3)], keepdims=1)  # [1, 1, rows, 1]
            before = g.slice(sums, g.ints(index), g.ints(index + 1), axis=0)
            total = g.node("Add", [g.node("CumSum", [per_row, g.integer(2)]), before])
            return total, g.node(
                "Reshape", [g.slice(total, g.ints(-1), g.ints(1 << 40), axis=2), g.ints(1)]
            )

        total, last_total = cumulative(x, 2 * k)
        x = g.node("Sub", [x, g.node("Div", [total, values])])
        squares, last_squares = cumulative(g.node("Mul", [x, x]), 2 * k + 1)
        deviation = g.node(
            "Sqrt",
            [g.node("Add", [g.node("Div", [squares, values]), g.number(c.group_norm_epsilon)])],
        )
        scale = self.read(f"subsample_conv_projection.conv_{k}.norm.weight", n_channels).reshape(
            1, n_channels, 1, 1
        )
        x = g.node(
            "Relu",
            [g.node("Mul", [g.node("Div", [x, deviation]), g.constant(scale, "group_norm")])],
        )
        return x, rows, last_total, last_squares

    # ---- conformer: x [n, hidden]
    def _clip(self, x: str) -> str:
        return self.g.node("Clip", [x, self.g.number(-self.c.clip), self.g.number(self.c.clip)])

    def _feed_forward(self, x: str, prefix: str) -> str:
        c, g = self.c, self.g
        y = g.rms_norm(
            self._clip(x), self.read(f"{prefix}pre_layer_norm.weight", c.hidden), c.epsilon
        )
        y = g.linear(
            y,
            self.read(f"{prefix}ffw_layer_1.weight", 4 * c.hidden, c.hidden),
            self.precision,
            name="ffw_1",
        )
        y = g.node("Mul", [y, g.node("Sigmoid", [y])])
        y = g.linear(
            y,
            self.read(f"{prefix}ffw_layer_2.weight", c.hidden, 4 * c.hidden),
            self.precision,
            name="ffw_2",
        )
        y = g.rms_norm(
            self._clip(y),
            c.residual * self.read(f"{prefix}post_layer_norm.weight", c.hidden),
            c.epsilon,
        )
        return g.node("Add", [x, y])

    def _mask(self) -> str:
        """[n, n + 12] float32: 0 where query i (frame t + i) sees key j (frame t + j − 12), far
        below every logit elsewhere.
        """
        c, g = self.c, self.g
        context = c.left - 1
        queries = g.node("Range", [g.integer(0), g.node("Squeeze", [self.n]), g.integer(1)])
        n_keys = g.node("Add", [self.n, g.ints(context)])
        keys = g.node("Range", [g.integer(0), g.node("Squeeze", [n_keys]), g.integer(1)])
        distance = g.node(
            "Sub", [keys, g.node("Unsqueeze", [queries, g.ints(1)])]
        )  # 0 … 12 is seen
        near = g.node(
            "And",
            [
                g.node("GreaterOrEqual", [distance, g.integer(0)]),
                g.node("LessOrEqual", [distance, g.integer(context)]),
            ],
        )
        started = g.node(
            "GreaterOrEqual", [g.node("Add", [keys, self.frames]), g.integer(context)]
        )  # not before the clip
        return g.node("Where", [g.node("And", [near, started]), g.number(0.0), g.number(-1e30)])

    def _attention(
        self, x: str, i: int, mask: str, all_keys: str, all_values: str
    ) -> tuple[str, str, str]:
        c, g = self.c, self.g
        prefix, d, context = f"conformer.{i}.attention.", c.hidden, c.left - 1
        y = g.rms_norm(self._clip(x), self.read(f"{prefix}pre_attn_norm.weight", d), c.epsilon)
        # q is scaled by head_dim^-1/2 / ln 2 · softplus(per_dim_scale): into the rows of its weight
        scale = self.read(f"{prefix}attn.per_dim_scale", c.head_dim)
        scale = np.tile(
            np.logaddexp(np.float32(0), scale) * np.float32(c.head_dim**-0.5 / math.log(2)),
            c.n_head,
        )
        q, k, v = (self.read(f"{prefix}attn.{a}_proj.weight", d, d) for a in "qkv")
        y = g.linear(y, np.concatenate([q * scale[:, None], k, v]), self.precision, name="qkv")
        del q, k, v
        q, k, v = g.node("Split", [y, g.ints(d, d, d)], n_outputs=3, axis=1)
        k = self._with_state(all_keys, i, k)
        v = self._with_state(all_values, i, v)
        q = self._heads(q, [1, 0, 2])  # [heads, n, head_dim]
        content = g.node("MatMul", [q, self._heads(k, [1, 2, 0])])  # [heads, n, n + 12]
        # q·r[distance] for 13 distances, then each query's 13 values moved to its own keys: a row
        # of n + 13 read as rows of n + 12 moves one to the right
        relative = g.node(
            "MatMul", [q, g.constant(self._relative(i), "relative")]
        )  # [heads, n, 13], oldest key first
        pads = g.node("Concat", [g.ints(0, 0, 0, 0, 0), self.n], axis=0)
        flat = g.node("Reshape", [g.node("Pad", [relative, pads]), g.ints(c.n_head, -1)])
        n_keys = g.node("Add", [self.n, g.ints(context)])
        flat = g.slice(flat, g.ints(0), g.node("Mul", [self.n, n_keys]), axis=1)
        relative = g.node(
            "Reshape", [flat, g.node("Concat", [g.ints(c.n_head), self.n, n_keys], axis=0)]
        )
        logits = g.node("Div", [g.node("Add", [content, relative]), g.number(c.logit_cap)])
        logits = g.node("Mul", [g.node("Tanh", [logits]), g.number(c.logit_cap)])
        weights = g.node("Softmax", [g.node("Add", [logits, mask])], axis=-1)
        o = g.node("MatMul", [weights, self._heads(v, [1, 0, 2])])  # [heads, n, head_dim]
        o = g.node("Reshape", [g.node("Transpose", [o], perm=[1, 0, 2]), g.ints(-1, d)])
        o = g.linear(o, self.read(f"{prefix}post.weight", d, d), self.precision, name="post")
        o = g.rms_norm(self._clip(o), self.read(f"{prefix}post_norm.weight", d), c.epsilon)
        return g.node("Add", [x, o]), self._keep(k, context), self._keep(v, context)

    def _relative(self, i: int) -> np.ndarray:
        """r [heads, head_dim, 13]: the projected sinusoid of each distance, 12 … 0. A constant,
        because only 13 distances are ever seen.
        """
        c, half = self.c, self.c.hidden // 2
        inverse = np.exp(
            np.arange(half, dtype=np.float32) * -np.float32(math.log(1e4) / max(half - 1, 1))
        )
        angle = np.arange(c.left - 1, -1, -1, dtype=np.float32)[:, None] * inverse
        table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # [13, hidden]
        name = f"conformer.{i}.attention.attn.relative_position_embedding.pos_proj.weight"
        table = table @ self.read(name, c.hidden, c.hidden).T
        return np.ascontiguousarray(table.reshape(c.left, c.n_head, c.head_dim).transpose(1, 2, 0))

    def _heads(self, x: str, perm: list[int]) -> str:
        x = self.g.node("Reshape", [x, self.g.ints(-1, self.c.n_head, self.c.head_dim)])
        return self.g.node("Transpose", [x], perm=perm)

    def _with_state(self, state: str, i: int, x: str) -> str:
        """The carried frames of layer i before the new ones."""
        return self.g.node(
            "Concat", [self.g.node("Gather", [state, self.g.integer(i)], axis=0), x], axis=0
        )

    def _keep(self, x: str, n: int) -> str:
        return self.g.node(
            "Unsqueeze",
            [self.g.slice(x, self.g.ints(-n), self.g.ints(1 << 40), axis=0), self.g.ints(0)],
        )

    def _light_convolution(self, x: str, i: int, all_convs: str) -> tuple[str, str]:
        c, g = self.c, self.g
        prefix, d = f"conformer.{i}.lconv1d.", c.hidden
        y = g.rms_norm(x, self.read(f"{prefix}pre_layer_norm.weight", d), c.epsilon)
        y = g.linear(
            y,
            self.read(f"{prefix}linear_start.weight", 2 * d, d),
            self.precision,
            name="linear_start",
        )
        y, gate = g.node("Split", [y, g.ints(d, d)], n_outputs=2, axis=1)
        y = self._with_state(all_convs, i, g.node("Mul", [y, g.node("Sigmoid", [gate])]))
        kept = self._keep(y, c.kernel - 1)
        taps = self.read(f"{prefix}depthwise_conv1d.weight", d, 1, c.kernel)
        total = None
        for j in range(c.kernel):
            end = g.node("Add", [self.n, g.ints(j)])
            term = g.node(
                "Mul",
                [
                    g.slice(y, g.ints(j), end, axis=0),
                    g.constant(np.ascontiguousarray(taps[:, 0, j]), "tap"),
                ],
            )
            total = term if total is None else g.node("Add", [total, term])
        y = g.rms_norm(self._clip(total), self.read(f"{prefix}conv_norm.weight", d), c.epsilon)
        y = g.node("Mul", [y, g.node("Sigmoid", [y])])
        y = g.linear(
            y, self.read(f"{prefix}linear_end.weight", d, d), self.precision, name="linear_end"
        )
        return g.node("Add", [x, y]), kept
