"""Gemma 3n's audio tower in numpy, one whole clip at a time: what the streaming encoder is held
against at its real size.

    python -m edge_gemma.benchmarks.dev.audio_reference [--work DIR]    the largest difference

In: a checkpoint and a clip's samples. Out: soft tokens ``[k, n_embd]`` float32. Nothing is shared
with what it checks: no stream, no state, no graph; weights are read as they lie in the checkpoint,
one at a time; attention and group norms are written over the whole clip, as transformers 5.23
(``modeling_gemma3n.py``) computes them. tests/test_audio_encoder.py holds it against transformers'
own answers.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from pathlib import Path

import numpy as np

from edge_gemma.benchmarks.inputs import sound
from edge_gemma.convert.audio import EMBEDDER, TOWER, AudioConfig
from edge_gemma.convert.checkpoint import Checkpoint
from edge_gemma.hearing.encoder import AudioEncoder
from edge_gemma.hearing.log_mel import LogMel


def encode(checkpoint: Checkpoint, samples: np.ndarray) -> np.ndarray:
    """``samples [n]`` of one clip, 16 kHz, at most 30 s → its soft tokens."""
    c = AudioConfig.of(checkpoint)

    def weight(name: str, tower: str = TOWER) -> np.ndarray:
        return checkpoint.read(tower + name)

    mel = LogMel()
    x = np.concatenate([mel.push(samples), mel.finish()])  # [T, 128]
    if not len(x):
        return np.zeros((0, weight("embedding_projection.weight", EMBEDDER).shape[0]), np.float32)
    x = x[None]  # [channels, T, F]
    for k in range(2):
        x = _convolution(x, weight(f"subsample_conv_projection.conv_{k}.conv.weight"))
        x = (
            _group_norm(x, c.group_norm_epsilon)
            * weight(f"subsample_conv_projection.conv_{k}.norm.weight")[:, None, None]
        )
        x = np.maximum(x, 0)
    x = (
        x.transpose(1, 2, 0).reshape(x.shape[1], -1)
        @ weight("subsample_conv_projection.input_proj_linear.weight").T
    )  # [n, hidden]
    for i in range(c.n_layer):
        layer = f"conformer.{i}."
        x = x + c.residual * _feed_forward(x, layer + "ffw_layer_start.", weight, c)
        x = x + _attention(x, layer + "attention.", weight, c)
        x = x + _light_convolution(x, layer + "lconv1d.", weight, c)
        x = x + c.residual * _feed_forward(x, layer + "ffw_layer_end.", weight, c)
        x = _rms(np.clip(x, -c.clip, c.clip), weight(layer + "norm.weight"), c)
    x = _rms(x[:: c.reduction], weight("soft_embedding_norm.weight", EMBEDDER), c)
    return _rms(x @ weight("embedding_projection.weight", EMBEDDER).T, 1.0, c)


def _rms(x: np.ndarray, weight, c: AudioConfig) -> np.ndarray:
    return (
        x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(c.epsilon)) * weight
    )


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _convolution(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """3×3, stride 2, frequency padded by 1 on both sides, time by 2 behind. [C, T, F] → [C',
    ceil(T/2), F/2]
    """
    rows = -(-x.shape[1] // 2)
    x = np.pad(x, ((0, 0), (0, 2 * rows + 1 - x.shape[1]), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2][
        :, :rows
    ]  # [C, T', F', 3, 3]
    return np.einsum("itfhw,oihw->otf", windows, weight, optimize=True)


def _group_norm(x: np.ndarray, epsilon: float) -> np.ndarray:
    """Cumulative over time: each row's mean and variance are over all rows up to it, each of those
    with its own mean. [C, T, F]
    """
    count = (np.arange(1, x.shape[1] + 1) * x.shape[0] * x.shape[2])[None, :, None]
    x = x - np.cumsum(x.sum((0, 2), dtype=np.float64))[None, :, None] / count
    variance = np.cumsum(np.square(x).sum((0, 2), dtype=np.float64))[None, :, None] / count
    return (x / np.sqrt(variance + epsilon)).astype(np.float32)


def _feed_forward(x: np.ndarray, at: str, weight, c: AudioConfig) -> np.ndarray:
    y = _rms(np.clip(x, -c.clip, c.clip), weight(at + "pre_layer_norm.weight"), c)
    y = _silu(y @ weight(at + "ffw_layer_1.weight").T) @ weight(at + "ffw_layer_2.weight").T
    return _rms(np.clip(y, -c.clip, c.clip), weight(at + "post_layer_norm.weight"), c)


def _attention(x: np.ndarray, at: str, weight, c: AudioConfig) -> np.ndarray:
    n = len(x)
    y = _rms(np.clip(x, -c.clip, c.clip), weight(at + "pre_attn_norm.weight"), c)
    q, k, v = (
        (y @ weight(f"{at}attn.{a}_proj.weight").T).reshape(n, c.n_head, c.head_dim) for a in "qkv"
    )
    q = q * (c.head_dim**-0.5 / math.log(2) * np.log1p(np.exp(weight(at + "attn.per_dim_scale"))))
    # a sinusoid for each distance 0 … 12 between query and key, projected
    half = c.hidden // 2
    angle = np.arange(c.left)[:, None] * np.exp(
        np.arange(half) * (-math.log(1e4) / max(half - 1, 1))
    )
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
    table = (table @ weight(at + "attn.relative_position_embedding.pos_proj.weight").T).reshape(
        c.left, c.n_head, c.head_dim
    )
    logits = np.einsum("qhd,khd->hqk", q, k, optimize=True)
    by_distance = np.einsum("qhd,fhd->hqf", q, table, optimize=True)
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    seen = (distance >= 0) & (distance < c.left)
    logits = logits + np.take_along_axis(
        by_distance, np.where(seen, distance, 0)[None].repeat(c.n_head, axis=0), axis=2
    )
    logits = np.where(seen, c.logit_cap * np.tanh(logits / c.logit_cap), -np.inf)
    logits = np.exp(logits - logits.max(axis=-1, keepdims=True))
    o = np.einsum(
        "hqk,khd->qhd", logits / logits.sum(axis=-1, keepdims=True), v, optimize=True
    ).reshape(n, -1)
    return _rms(
        np.clip(o @ weight(at + "post.weight").T, -c.clip, c.clip),
        weight(at + "post_norm.weight"),
        c,
    )


def _light_convolution(x: np.ndarray, at: str, weight, c: AudioConfig) -> np.ndarray:
    y, gate = np.split(
        _rms(x, weight(at + "pre_layer_norm.weight"), c) @ weight(at + "linear_start.weight").T,
        2,
        axis=1,
    )
    y = np.pad(y / (1 + np.exp(-gate)), ((c.kernel - 1, 0), (0, 0)))
    taps = weight(at + "depthwise_conv1d.weight")[:, 0]  # [hidden, kernel]
    y = sum(y[j : j + len(x)] * taps[:, j] for j in range(c.kernel))
    return (
        _silu(_rms(np.clip(y, -c.clip, c.clip), weight(at + "conv_norm.weight"), c))
        @ weight(at + "linear_end.weight").T
    )


def largest_difference(tower: Path, seconds: float) -> float:
    """Of the values of soft tokens, which have an rms of 1: the encoder converted to f32 from the
    checkpoint ``tower`` against :func:`encode`.
    """
    from edge_gemma.benchmarks.dev.bundles import audio_encoder_bundle

    checkpoint, samples = Checkpoint.open(tower), sound(seconds)
    with tempfile.TemporaryDirectory(dir=tower.parent) as scratch:
        bundle = audio_encoder_bundle(checkpoint, Path(scratch) / "bundle")
        with AudioEncoder(bundle, n_threads=os.cpu_count() or 1) as encoder:
            found = encoder.encode(samples)
    wanted = encode(checkpoint, samples)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.abs(found - wanted).max())


def main() -> None:
    from edge_gemma.benchmarks.dev.bundles import Maker
    from edge_gemma.benchmarks.presets import DEFAULT_WORK

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="where weights are kept")
    options = parser.parse_args()
    tower = Maker(options.work, small=False, note=print).tower("audio")
    for seconds in (3.0, 10.0):
        print(f"{seconds:g} s: {largest_difference(tower, seconds):.2e}")


if __name__ == "__main__":
    main()
