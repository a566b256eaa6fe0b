"""What llama.cpp's mtmd makes of the same vision tower: its file of the weights, and its soft
tokens.

In: a checkpoint's tower; an image. Out: an ``mmproj`` GGUF; a measured system. What it does not
know: time, memory, what it is compared with.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_gemma.benchmarks.dev.shapes import MOBILENET_WIDTH, TOWER_PX
from edge_gemma.benchmarks.systems import System
from edge_gemma.bundles.gguf import read_header
from edge_gemma.errors import UsageError

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from edge_gemma.convert.checkpoint import Checkpoint

TYPES = ("f32", "f16", "q8_0")

_MMPROJ = (
    ("model.vision_tower.embeddings.patch_embedding", "v.patch_embd"),
    ("model.vision_tower.embeddings.position_embedding", "v.position_embd"),
    ("model.vision_tower.post_layernorm", "v.post_ln"),
    ("model.vision_tower.encoder.layers.", "v.blk."),
    ("layer_norm", "ln"),
    ("self_attn.out_proj", "attn_out"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("mlp.fc1", "ffn_up"),
    ("mlp.fc2", "ffn_down"),
    ("model.multi_modal_projector.mm_input_projection_weight", "mm.input_projection.weight"),
    ("model.multi_modal_projector.mm_soft_emb_norm", "mm.soft_emb_norm"),
    ("model.vision_tower.timm_model.blocks.", "v.blk."),
    ("model.vision_tower.timm_model.", "v."),
    ("model.embed_vision.soft_embedding_norm", "mm.soft_emb_norm"),
    ("model.embed_vision.embedding_projection", "mm.input_projection"),
)


def write_mmproj(checkpoint: Checkpoint, path: Path, dtype: str = "f16") -> None:
    """An ``mmproj`` GGUF of a checkpoint's tower, as llama.cpp's ``conversion/gemma.py`` lays it
    out (matrices and convolutions at ``dtype``, the rest F32). Raises UsageError.
    """
    import gguf

    if dtype not in TYPES:
        raise UsageError(
            f"unknown type {dtype!r} of an mmproj file; choose one of {', '.join(TYPES)}"
        )
    writer = gguf.GGUFWriter(path, "clip", use_temp_file=False)
    _describe(writer, checkpoint)
    for name in checkpoint.names():
        if _belongs(name):
            _add_tensor(writer, name, checkpoint.read(name), dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    siglip = "model.vision_tower.embeddings.patch_embedding.weight" in checkpoint.names()
    vision = checkpoint.config["vision_config"]
    size = vision.get("image_size", TOWER_PX["siglip" if siglip else "mobilenetv5"])
    n_soft = checkpoint.config.get("mm_tokens_per_image", 256)
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_image_size(size)
    if siglip:
        writer.add_clip_projector_type("gemma3")
        writer.add_vision_use_gelu(True)
        writer.add_vision_patch_size(vision["patch_size"])
        pool = size // vision["patch_size"] // int(n_soft**0.5)
        if pool != 4:
            writer.add_vision_projector_scale_factor(pool)
        n_layer, n_ff = vision["num_hidden_layers"], vision["intermediate_size"]
        n_head = vision["num_attention_heads"]
    else:
        writer.add_clip_vision_projector_type("gemma3nv")
        writer.add_vision_patch_size(size // 256)
        # as llama.cpp's own converter fills them; this tower does not read them
        n_layer, n_ff, n_head = 128, 4 * MOBILENET_WIDTH, 8
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(n_ff)
    writer.add_vision_block_count(n_layer)
    writer.add_vision_head_count(n_head)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_projection_dim(checkpoint.config["text_config"]["hidden_size"])
    writer.add_vision_image_mean([0.5] * 3 if siglip else [0.0] * 3)
    writer.add_vision_image_std([0.5] * 3 if siglip else [1.0] * 3)


def _belongs(name: str) -> bool:
    left_out = (".head.", "embed_vision.embedding.weight", "hard_embedding")
    return ("vision" in name or "multi_modal" in name) and not any(n in name for n in left_out)


def _add_tensor(writer: GGUFWriter, name: str, values: np.ndarray, dtype: str) -> None:
    import gguf

    from edge_gemma.convert.quantize import fitting_type, quantize_rows

    short = name
    for old, new in _MMPROJ:
        short = short.replace(old, new)
    if name.endswith("mm_soft_emb_norm.weight"):
        values = values + 1
    exact = values.ndim == 1 or any(part in name for part in ("position", "patch", "stem"))
    if name.endswith("gamma"):
        values = values.reshape(-1, 1, 1)  # llama.cpp multiplies [W, H, C]
    if exact or dtype == "f32":
        writer.add_tensor(short, values)
    elif dtype == "q8_0" and values.ndim == 2 and fitting_type("Q8_0", values.shape[1]) == "Q8_0":
        blocks = quantize_rows("Q8_0", np.ascontiguousarray(values, np.float32))
        raw = blocks.reshape(values.shape[0], -1)
        writer.add_tensor(short, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(short, values.astype(np.float16))


def of_width(text: Path, n_embd: int, out: Path) -> Path:
    """A text GGUF whose header claims the width ``n_embd``: mtmd compares it, and with
    ``vocab_only`` nothing else is read.
    """
    header = read_header(text)
    key = next(key for key in header.metadata if key.endswith(".embedding_length")).encode()
    data = bytearray(text.read_bytes())
    at = data.index(key) + len(key) + 4  # behind the key stands the value's type, uint32
    data[at : at + 4] = n_embd.to_bytes(4, "little")
    out.write_bytes(data)
    return out


class Mtmd(System):
    """mtmd in this process. ``path``: the mmproj file; setting ``text``: a text GGUF of the family,
    whose vocabulary llama.cpp asks for.
    """

    def load(self) -> None:
        from llama_cpp import llama_cpp as low
        from llama_cpp import mtmd_cpp as mtmd

        self.low, self.mtmd = low, mtmd
        self._quiet = low.llama_log_callback(lambda *_: None)
        low.llama_log_set(self._quiet, ctypes.c_void_p())
        if hasattr(mtmd, "mtmd_log_set"):
            mtmd.mtmd_log_set(self._quiet, ctypes.c_void_p())
        text = str(dict(self.task.settings)["text"])
        params = low.llama_model_default_params()
        params.vocab_only = True  # only its width and vocabulary are asked for
        model = low.llama_model_load_from_file(text.encode(), params)
        options = mtmd.mtmd_context_params_default()
        options.use_gpu, options.warmup = False, False
        options.n_threads = self.task.n_threads
        self.context = mtmd.mtmd_init_from_file(self.task.path.encode(), model, options)
        if not self.context:
            raise SystemExit(f"mtmd cannot load {self.task.path}")
        metadata = read_header(Path(text)).metadata  # vocab_only leaves the width unread
        self.width = next(v for k, v in metadata.items() if k.endswith(".embedding_length"))

    def encode_picture(self, pixels: np.ndarray) -> np.ndarray:
        mtmd = self.mtmd
        raw = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(*pixels.shape[:2], raw)
        chunks = mtmd.mtmd_input_chunks_init()
        prompt = mtmd.mtmd_input_text()
        prompt.text = mtmd.mtmd_default_marker()
        prompt.text_len = len(prompt.text)
        prompt.add_special, prompt.parse_special = False, True
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        try:
            if mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(prompt), bitmaps, 1) != 0:
                raise SystemExit("mtmd_tokenize failed")
            return self._encode(chunks)
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def _encode(self, chunks: object) -> np.ndarray:
        mtmd = self.mtmd
        for index in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, index)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                if mtmd.mtmd_encode_chunk(self.context, chunk) != 0:
                    raise SystemExit("mtmd_encode_chunk failed")
                n = mtmd.mtmd_input_chunk_get_n_tokens(chunk) * self.width
                found = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.context), (n,))
                return np.array(found)
        raise SystemExit("mtmd found no picture in its own prompt")
