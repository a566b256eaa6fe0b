"""How the kernels of a checkpoint's convolutions lie: channel-first ``[out, in, height, width]`` as
PyTorch stores them, or channel-last ``[out, height, width, in]`` as MLX does.

In: the shapes of the tensors, the configuration and the framework that wrote the files. Out: the
permutation that turns each channel-last kernel. A kernel that fits neither is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from edge_gemma.errors import CheckpointError

Shape = tuple[int, ...]
PATCHES = "model.vision_tower.embeddings.patch_embedding.weight"
_TOWERS = ("model.vision_tower.timm_model.", "model.audio_tower.", PATCHES)
_CONV_1D = re.compile(r"depthwise_conv1d\.weight$")
_TURN_2D, _TURN_1D = (0, 3, 1, 2), (0, 2, 1)
_DEFAULT_PATCH = 16  # of transformers' SiglipVisionConfig


def channel_first(
    shapes: Mapping[str, Shape], config: dict, framework: str
) -> dict[str, tuple[int, ...]]:
    """Name → axes in the order that makes the kernel channel-first, for those that are not.

    ``shapes`` are as stored, by canonical name. Square kernels are told apart by their equal sides;
    where all three sides are equal, the other convolutions of the tower decide, else
    ``framework`` ("mlx" is channel-last). Raises CheckpointError for a kernel that fits neither.

    >>> channel_first({PATCHES: (8, 14, 14, 3)}, {"vision_config": {"patch_size": 14}}, "mlx")
    {'model.vision_tower.embeddings.patch_embedding.weight': (0, 3, 1, 2)}
    """
    turned: dict[str, tuple[int, ...]] = {}
    for tower in _TOWERS:
        found = {
            name: _is_last(name, shape, config)
            for name, shape in shapes.items()
            if name.startswith(tower) and _is_kernel(name, shape)
        }
        votes = {is_last for is_last in found.values() if is_last is not None}
        unclear = votes.pop() if len(votes) == 1 else framework == "mlx"
        for name, is_last in found.items():
            if unclear if is_last is None else is_last:
                turned[name] = _TURN_2D if len(shapes[name]) == 4 else _TURN_1D
    return turned


def _is_kernel(name: str, shape: Shape) -> bool:
    return len(shape) == 4 or (len(shape) == 3 and bool(_CONV_1D.search(name)))


def _is_last(name: str, shape: Shape, config: dict) -> bool | None:
    """Whether a kernel is channel-last; None when its shape does not tell."""
    if name == PATCHES:
        return _patches_last(shape, config)
    if len(shape) == 3:
        _, a, b = shape  # a depthwise kernel: one of them is the single input
        choices = {False: a == 1, True: b == 1}
    else:
        _, a, b, c = shape
        choices = {False: b == c, True: a == b}
    if not any(choices.values()):
        raise CheckpointError(
            f"tensor {name!r} has shape {list(shape)}, which is a convolution's kernel neither "
            "channel-first (PyTorch) nor channel-last (MLX)"
        )
    return None if all(choices.values()) else choices[True]


def _patches_last(shape: Shape, config: dict) -> bool | None:
    """SigLIP's first layer, against the sizes that config.json gives."""
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        vision = {"patch_size": shape[2]}  # an adapter has no config of the model
    patch, channels = vision.get("patch_size", _DEFAULT_PATCH), vision.get("num_channels", 3)
    first = shape[1:] == (channels, patch, patch)
    last = shape[1:] == (patch, patch, channels)
    if not (first or last):
        raise CheckpointError(
            f"tensor {PATCHES!r} has shape {list(shape)}; config.json's vision_config asks for "
            f"[width, {channels}, {patch}, {patch}]"
        )
    return None if first and last else last
