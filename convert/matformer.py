"""A MatFormer cut: which layers and how many FFN columns of a Gemma 3n go
into the file.

Slicing only, nothing is retrained.

In: ``e2b`` or a TOML file. Out: a :class:`~.gemma.Cut`, checked against
what Gemma 3n and llama.cpp allow, before any work starts.

A file holds ``ffn = 8192`` (one width for all layers) and ``drop_layers =
[20, 21, 22, 23, 24]``, either alone or both. The rules: the first 20 layers
own the KV cache and stay (18 and 19 are also what the later ones read); FFN
rows and columns are kept from the front, as they were nested in training;
all layers have one width, because llama.cpp reads one for the file.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec

from edge_gemma.bundles.description import GEMMA3N_KV_LAYERS
from edge_gemma.convert.gemma import Cut, Dims
from edge_gemma.errors import UnsupportedModel, UsageError

E4B_LAYERS = 35
E2B_DROPS = tuple(range(20, 25))  # and half the FFN: what Google's E2B is of E4B


class _Slice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ffn: int | list[int] | None = None
    drop_layers: list[int] = []


def read_cut(slice: str, dims: Dims) -> Cut:
    """The cut that ``slice`` (``e2b`` or a ``.toml`` file) makes of a
    checkpoint with ``dims``. Raises UsageError, UnsupportedModel.
    """
    if dims.family != "gemma3n":
        raise UnsupportedModel(
            "--slice cuts Gemma 3n, whose layers were trained nested (MatFormer); this "
            f"checkpoint is a {dims.family}"
        )
    if slice.lower() == "e2b":
        if dims.n_layer != E4B_LAYERS:
            raise UsageError(
                f"--slice e2b cuts an E4B of {E4B_LAYERS} layers; this checkpoint has "
                f"{dims.n_layer}" + (" and is an E2B already" if dims.n_layer == 30 else "")
            )
        return Cut(tuple(i for i in range(dims.n_layer) if i not in E2B_DROPS), dims.n_ff // 2)
    path = Path(slice)
    if not path.is_file():
        raise UsageError(f"--slice {slice}: expected e2b, or a TOML file with ffn and drop_layers")
    try:
        wanted = msgspec.convert(tomllib.loads(path.read_text("utf-8")), _Slice)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is not a slice: {error}; expected ffn = WIDTH and drop_layers = [LAYER, …]"
        ) from None
    widths = (
        wanted.ffn
        if isinstance(wanted.ffn, list)
        else [dims.n_ff if wanted.ffn is None else wanted.ffn]
    )
    if len(set(widths)) != 1:
        raise UnsupportedModel(
            f"{path} asks for the FFN widths {sorted(set(widths))}; llama.cpp reads one "
            "width for all layers, so a mixed cut cannot be a smaller GGUF. Give one ffn "
            "value"
        )
    if not 0 < widths[0] <= dims.n_ff:
        raise UsageError(
            f"{path}: ffn is {widths[0]}; this checkpoint has {dims.n_ff}, and a slice takes "
            "its first columns"
        )
    drops = set(wanted.drop_layers)
    if len(drops) != len(wanted.drop_layers) or not drops <= set(range(dims.n_layer)):
        raise UsageError(
            f"{path}: drop_layers {wanted.drop_layers} must name layers 0 to "
            f"{dims.n_layer - 1}, each once"
        )
    if owners := sorted(i for i in drops if i < GEMMA3N_KV_LAYERS):
        raise UnsupportedModel(
            f"{path} drops layer {owners[0]}; layers 0 to {GEMMA3N_KV_LAYERS - 1} own the KV "
            "cache (18 and 19 serve all later ones) and must stay, "
            f"layers {GEMMA3N_KV_LAYERS} to {dims.n_layer - 1} may go"
        )
    return Cut(tuple(i for i in range(dims.n_layer) if i not in drops), widths[0])
