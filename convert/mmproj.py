"""An ``mmproj`` GGUF of Gemma 3 (llama.cpp's vision file) → the same ONNX
vision encoder a checkpoint gives.

In: a path. Out: :class:`Mmproj`, a
:class:`~edge_gemma.convert.tensors.TensorReader`, and
:func:`vision_from_mmproj`. What it does not know: the graph (:mod:`.vision`
writes it).

Names and values follow llama.cpp's ``conversion/gemma.py`` and
``tools/mtmd/clip.cpp``: the projector's norm holds weight + 1 there, and
files before mid-2025 call the MLP's two matrices by each other's names.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from edge_gemma.bundles.description import Description
from edge_gemma.bundles.gguf import Header, TensorInfo, read_header
from edge_gemma.bundles.manifest import VisionPart
from edge_gemma.convert.tensors import TensorReader
from edge_gemma.convert.vision import write_vision_encoder
from edge_gemma.errors import BundleError, UnsupportedModel
from edge_gemma.store.importer import WriteVision

_TOWER, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_FIXED = {
    "v.patch_embd.weight": _TOWER + "embeddings.patch_embedding.weight",
    "v.patch_embd.bias": _TOWER + "embeddings.patch_embedding.bias",
    "v.position_embd.weight": _TOWER + "embeddings.position_embedding.weight",
    "v.post_ln.weight": _TOWER + "post_layernorm.weight",
    "v.post_ln.bias": _TOWER + "post_layernorm.bias",
    "mm.input_projection.weight": _PROJECTOR + "mm_input_projection_weight",
    "mm.soft_emb_norm.weight": _PROJECTOR + "mm_soft_emb_norm.weight",
}
_LAYER = {
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_MAX_TENSOR_BYTES = 1 << 30


class Mmproj(TensorReader):
    """The tensors of an ``mmproj`` file by canonical name. Raises
    BundleError (damaged), UnsupportedModel (not Gemma 3's).
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        header = read_header(self.path)
        _check_kind(self.path, header)
        self._config = _config(header, self.path)
        swapped = self._swapped(header)
        self._tensors: dict[str, TensorInfo] = {}
        for tensor in header.tensors:
            if (name := _canonical(tensor.name, swapped)) is not None:
                self._tensors[name] = tensor

    @property
    def config(self) -> dict:
        return self._config

    @staticmethod
    def _swapped(header: Header) -> bool:
        """Whether the MLP's two matrices have each other's names."""
        down, ln = header.tensor("v.blk.0.ffn_down.weight"), header.tensor("v.blk.0.ln1.weight")
        return down is not None and ln is not None and down.shape[0] == ln.shape[0]

    def names(self) -> list[str]:
        return list(self._tensors)

    def _tensor(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise BundleError(
                f"{self.path} lacks the tensor for {name!r}; it is incomplete or of another "
                "version of llama.cpp"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(reversed(self._tensor(name).shape))

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """``name`` as float32, dequantized; whole, or a slice along its
        first axis.
        """
        tensor = self._tensor(name)
        values = self._dequantized(tensor).reshape(self.shape(name))
        if not np.isfinite(values).all():
            raise BundleError(
                f"{self.path}: tensor {tensor.name!r} holds NaN or infinity; the file is damaged"
            )
        if name.endswith("mm_soft_emb_norm.weight"):
            values = values - 1
        return values if rows is None else values[rows]

    def _dequantized(self, tensor: TensorInfo) -> np.ndarray:
        import gguf

        raw = self._bytes_of(tensor)
        n_rows = max(1, int(np.prod(tensor.shape[1:])))
        kind = gguf.GGMLQuantizationType[tensor.type]
        try:
            values = gguf.quants.dequantize(raw.reshape(n_rows, -1), kind)
        except (NotImplementedError, ValueError) as error:
            raise UnsupportedModel(
                f"{self.path}: tensor {tensor.name!r} is {tensor.type}, which cannot be read "
                f"back here ({error}); take an F16 or F32 mmproj"
            ) from None
        return np.ascontiguousarray(values, np.float32)

    def _bytes_of(self, tensor: TensorInfo) -> np.ndarray:
        if tensor.nbytes > _MAX_TENSOR_BYTES:
            raise BundleError(
                f"{self.path}: tensor {tensor.name!r} claims {tensor.nbytes} bytes; no "
                "vision tensor is that large"
            )
        with open(self.path, "rb") as file:
            file.seek(tensor.offset)
            raw = np.frombuffer(file.read(tensor.nbytes), np.uint8)
        if raw.size != tensor.nbytes:
            raise BundleError(
                f"{self.path} ended inside the tensor {tensor.name!r} while it was read"
            )
        return raw


def _check_kind(path: Path, header: Header) -> None:
    """That the file holds Gemma 3's vision tower. Raises UnsupportedModel."""
    meta = header.metadata
    architecture = meta.get("general.architecture")
    if architecture not in ("clip", "mmproj"):
        raise UnsupportedModel(
            f"{path} holds the architecture {architecture!r}; a vision file (mmproj) says 'clip'"
        )
    projector = meta.get("clip.vision.projector_type", meta.get("clip.projector_type"))
    if projector != "gemma3":
        is_3n = projector == "gemma3nv"
        hint = "; Gemma 3n's vision tower is converted from the checkpoint: edge-gemma convert"
        raise UnsupportedModel(
            f"{path} is a projector of kind {projector!r}; 'gemma3' is what is supported"
            + (hint if is_3n else "")
        )


def vision_from_mmproj(path: str | Path, folder: Path, precision: str = "f16") -> VisionPart:
    """Write ``vision_encoder.onnx`` (+ ``.data``) of an ``mmproj`` GGUF
    into ``folder``. Raises BundleError, UnsupportedModel, UsageError.
    """
    return write_vision_encoder(Mmproj(path), folder, precision)


def _canonical(name: str, swapped: bool) -> str | None:
    if name in _FIXED:
        return _FIXED[name]
    match = re.fullmatch(r"v\.blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER:
        return None
    part = match[2]
    if swapped:
        part = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(part, part)
    return f"{_TOWER}encoder.layers.{int(match[1])}.{_LAYER[part]}.{match[3]}"


def _config(header: Header, path: Path) -> dict:
    """What config.json would say, from the file's own numbers."""

    def number(key: str, kinds=(int,), default=None):
        value = header.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= 1 << 20:
            raise BundleError(f"{path} has {key} = {value!r}; expected a positive number")
        return value

    size, patch = number("clip.vision.image_size"), number("clip.vision.patch_size")
    pool = number("clip.vision.projector.scale_factor", default=4)
    mean, std = (header.metadata.get(f"clip.vision.image_{name}") for name in ("mean", "std"))
    if mean != [0.5] * 3 or std != [0.5] * 3:
        raise UnsupportedModel(
            f"{path} wants pixels with mean {mean} and deviation {std}; Gemma 3's are 0.5"
        )
    return {
        "mm_tokens_per_image": (size // patch // pool) ** 2,
        "vision_config": {
            "image_size": size,
            "num_attention_heads": number("clip.vision.attention.head_count"),
            "layer_norm_eps": number(
                "clip.vision.attention.layer_norm_epsilon", (int, float), 1e-6
            ),
        },
    }


def vision_writer(mmproj: str | Path, precision: str = "f16") -> WriteVision:
    """What ``import_gguf`` calls to give an imported Gemma 3 its vision
    encoder. It raises UnsupportedModel, BundleError.
    """
    mmproj = Path(mmproj)

    def write(folder: Path, description: Description) -> VisionPart:
        missing = [
            token
            for token in ("start_of_image", "end_of_image")
            if token not in description.special_tokens
        ]
        if description.family != "gemma3" or missing:
            without = f" without {missing[0]}" if missing else ""
            raise UnsupportedModel(
                f"{mmproj.name} belongs to a Gemma 3 that sees; {description.name} is a "
                f"{description.family}{without}"
            )
        part = vision_from_mmproj(mmproj, folder, precision)
        if part.n_embd != description.decoder.n_embd:
            raise BundleError(
                f"{mmproj.name} gives rows {part.n_embd} wide, {description.name} takes "
                f"{description.decoder.n_embd}: they belong to different models"
            )
        return part

    return write
