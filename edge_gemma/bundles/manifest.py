"""The manifest: the one contract between converting and running.

In: ``manifest.json`` of a bundle. Out: :class:`Manifest`, checked. No model fact is ever guessed
from a file or model name.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Literal, overload

import msgspec

from edge_gemma.errors import BundleError, UnsupportedModel
from edge_gemma.units import MiB

FORMAT = "edge-gemma-bundle"
VERSION = 1
MANIFEST = "manifest.json"
MAX_COUNT = 1 << 24  # of any dimension of a decoder
MAX_MANIFEST_BYTES = 64 * MiB  # a 35-layer table is 0.3 MiB; anything near this is not a manifest
Use = Literal["lookup", "matmul", "unused"]
KvLayer = Literal["global", "sliding"]
Family = Literal["gemma3", "gemma3n", "gemma-embedding"]  # general.architecture of the GGUF
Sense = Literal["audio", "vision"]
SENSES: tuple[Sense, ...] = ("audio", "vision")


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row of the tensor table. ``use`` says how the decoder reads it:

    - ``lookup``: a few rows per token (PLE, an untied token embedding): may stay on disk;
    - ``matmul``: whole, for every token (a tied token embedding too, because it is the output
      head);
    - ``unused``: never (K/V of KV-sharing layers, rope factors).
    """

    name: str
    type: str  # ggml's name: F32, Q4_0, Q6_K …
    shape: tuple[int, ...]  # ggml order: shape[0] is the row length
    offset: int  # absolute byte offset in the file
    nbytes: int
    use: Use


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int
    sha256: str


class DecoderPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    file: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx_train: int
    sliding_window: int
    kv_layers: tuple[KvLayer, ...]  # the layers that own a KV cache, in order
    ple_width: int = 0  # 256 for gemma3n, 0 for gemma3
    tied_head: bool = True  # the output head is the token embedding
    # a head of its own that holds the token embedding's values, in another type (`untied` recipes)
    head_from_embedding: bool = False
    # of the GGUF before its first tensor, checked by hash at every load: llama.cpp aborts on some
    # damage there
    header_bytes: int
    header_sha256: str
    tensors: tuple[Tensor, ...] = ()


class RowTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Rows that are read one by one, in ggml's layout, beside the graph that takes them."""

    file: str
    type: Literal["F32", "F16", "Q8_0"]
    n_rows: int
    n_per_row: int


class OnnxPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The same decoder once more, as a graph for onnxruntime."""

    file: str
    recipe: str
    n_positions: int  # rows of its rotary tables: no longer context is possible
    embeddings: RowTable  # the graph's inputs_embeds are these rows · √n_embd
    per_layer: RowTable | None = None  # gemma3n: per_layer_inputs are these rows · √ple_width
    weights_bytes: int
    # of the GGUF that was written from the same weights; "" in a bundle from before this field
    decoder_sha256: str = ""
    # the graph is told who attends to whom (attention_bias.global|sliding), so that rows of a
    # Gemma 3's picture may attend to each other
    takes_masks: bool = False


class VocabularyPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A vocabulary that was cut: which rows of the whole one are left, and what that costs."""

    n_whole: int  # tokens of the whole vocabulary
    languages: tuple[str, ...] = ()  # whose words chose; none: only unused tokens are gone
    texts: tuple[str, ...] = ()  # names of files that chose
    file: str = "kept_tokens.npy"  # [n_vocab] int32: id here → id in the whole vocabulary
    # language of a text that chose nothing → tokens per character before and after, share
    # tokenized identically; bits per character and divergence where they were measured
    receipt: dict[str, dict[str, float]] = {}


class AudioPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    file: str
    precision: str  # f32 | f16 | int8 | int8-block | int4-block
    n_embd: int  # width of a soft token
    weights_bytes: int
    activation_bytes: int  # measured or derived peak beyond the weights, one 12-frame step
    n_layer: int = 12
    hidden: int = 1536


class VisionPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    file: str
    kind: Literal["siglip", "mobilenetv5"]
    precision: str  # f32 | f16 | int8
    n_embd: int
    n_soft_tokens: int  # per image
    image_sizes: tuple[int, ...]  # square inputs the graph takes; the first is the default
    mean: float  # pixels are (x/255 − mean) / std
    std: float
    weights_bytes: int
    activation_bytes: dict[str, int]  # peak beyond the weights, by image size ("768": …)


class EmbeddingPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How texts become vectors (EmbeddingGemma): a bundle with this part generates no text."""

    width: int  # of a vector, before ``dimensions`` are chosen
    # widths to which a vector may be cut, the largest first (Matryoshka representation)
    dimensions: tuple[int, ...]
    max_tokens: int  # of one text with its prompt, begin and end of sequence
    add_bos: bool
    add_eos: bool
    pooling: Literal["mean"] = "mean"
    # (inputs, outputs) of each layer after pooling, in order; () in a GGUF that was made without
    # them: its vectors are not those of sentence-transformers
    dense: tuple[tuple[int, int], ...] = ()
    normalize: bool = True
    prompts: dict[str, str] = {}  # name → text in front of what is embedded: query, document …
    default_prompt: str | None = None  # the name of the prompt that is used when none is asked for


class SamplingDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the model's authors sample it; None where they say nothing. Greedy is temperature 0."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    origin: str  # file name, folder name or hub id, never an absolute path
    sha256: str | None = None
    licence: str = "Gemma Terms of Use (ai.google.dev/gemma/terms)"
    tool: str = ""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: str = FORMAT
    version: int = VERSION
    name: str
    family: Family
    instruct: bool  # was tuned to follow turns: has a chat template, or somebody said so
    decoder: DecoderPart
    source: Source
    files: dict[str, File]
    chat_template: str | None = None
    # bos, eos, eot (<end_of_turn>), start_of_image, end_of_image, image_soft, start_of_audio,
    # end_of_audio, audio_soft, pad …
    special_tokens: dict[str, int] = {}
    # ids that end an answer: eos, <end_of_turn>, generation_config.json's list. Empty in a bundle
    # that was written before this field: eos and eot of special_tokens then
    end_tokens: tuple[int, ...] = ()
    sampling: SamplingDefaults | None = None
    # row order of special_rows.npy [n, n_embd] float32: end_of_image, end_of_audio, audio_padding
    # (gemma3n; see gemma3n's hard embeddings)
    special_rows: tuple[str, ...] = ()
    audio: AudioPart | None = None
    vision: VisionPart | None = None
    embedding: EmbeddingPart | None = None
    onnx: OnnxPart | None = None
    vocabulary: VocabularyPart | None = None  # of a vocabulary that was cut
    recipe: dict[str, str] = {}  # name, and the type of each group of tensors
    quality: dict[str, float | int | str] | None = None  # the receipt of `convert --check`
    # sentences for people: what was repaired, left out or taken otherwise than the source says
    notes: tuple[str, ...] = ()


def end_tokens(manifest: Manifest) -> tuple[int, ...]:
    """The ids that end an answer, also of a manifest from before that field."""
    tokens = manifest.special_tokens
    usual = tuple(tokens[name] for name in ("eos", "end_of_turn") if name in tokens)
    return manifest.end_tokens or usual


@overload
def require(manifest: Manifest, sense: Literal["audio"]) -> AudioPart: ...
@overload
def require(manifest: Manifest, sense: Literal["vision"]) -> VisionPart: ...
@overload
def require(manifest: Manifest, sense: Sense) -> AudioPart | VisionPart: ...
def require(manifest: Manifest, sense: Sense) -> AudioPart | VisionPart:
    """The encoder of that name. Raises UnsupportedModel when the bundle has none; every entry point
    that needs an encoder asks here, so the error and its exit code are the same everywhere.
    """
    part = manifest.audio if sense == "audio" else manifest.vision
    if part is None:
        raise no_encoder(manifest.name, sense)
    return part


def require_embedding(manifest: Manifest) -> EmbeddingPart:
    """How the bundle embeds. Raises UnsupportedModel for a bundle that generates text."""
    if manifest.embedding is None:
        raise UnsupportedModel(
            f"{manifest.name} is a {manifest.family} that generates text, so it cannot embed; "
            "EmbeddingGemma can"
        )
    return manifest.embedding


def require_generation(manifest: Manifest) -> None:
    """Raises UnsupportedModel for a bundle that embeds texts and generates none."""
    if manifest.embedding is not None:
        raise UnsupportedModel(
            f"{manifest.name} embeds texts and generates none; use `edge-gemma embed` or "
            "model.embed, or a bundle of Gemma 3 or 3n"
        )


def is_loaded_to_multiply(manifest: Manifest, tensor: Tensor) -> bool:
    """Whether llama.cpp loads the tensor as a weight that it multiplies, and so may repack it.

    Tables that are only looked up are not. EmbeddingGemma's token table is: llama.cpp loads it a
    second time as an output head, which nothing reads.
    """
    is_unread_head = manifest.embedding is not None and tensor.name == "token_embd.weight"
    return tensor.use != "lookup" or is_unread_head


def finer_head_rows(decoder: DecoderPart) -> Tensor | None:
    """The token embedding, where the head of its own holds the same rows more coarsely (the
    converter says so); else None.
    """
    if not decoder.head_from_embedding:
        return None
    by_name = {tensor.name: tensor for tensor in decoder.tensors}
    head, table = by_name.get("output.weight"), by_name.get("token_embd.weight")
    if head is None or table is None or table.type not in ("Q8_0", "F16"):
        return None
    return table if head.nbytes < table.nbytes else None


def no_encoder(name: str, sense: Sense) -> UnsupportedModel:
    """The error for a bundle called ``name`` that lacks an encoder."""
    verb, models = {
        "audio": ("hear", "Gemma 3n E2B and E4B can"),
        "vision": ("see", "Gemma 3 4B and Gemma 3n can"),
    }[sense]
    return UnsupportedModel(
        f"{name} has no {sense} encoder, so it cannot {verb}; {models} "
        f"(convert them without --{sense}-encoder none)"
    )


def encode_manifest(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode_manifest(data: bytes) -> Manifest:
    """Validate the bytes of a manifest. Raises BundleError with the field that is wrong; never
    anything else.
    """
    try:
        head = msgspec.json.decode(data, type=_Head)
    except (ValueError, RecursionError) as error:  # DecodeError, or UnicodeDecodeError in a string
        raise BundleError(
            f"{MANIFEST} is not a manifest of this format ({error}); expected a JSON object "
            "with format and version"
        ) from None
    if head.format != FORMAT:
        raise BundleError(f"{MANIFEST} says format {head.format!r}, expected {FORMAT!r}")
    if head.version > VERSION:
        raise BundleError(
            f"the bundle has manifest version {head.version}, this edge-gemma reads up to "
            f"{VERSION}; upgrade edge-gemma"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (ValueError, RecursionError) as error:  # DecodeError, or UnicodeDecodeError in a string
        raise BundleError(f"{MANIFEST} is damaged: {error}") from None
    check_manifest(manifest)
    return manifest


class _Head(msgspec.Struct):
    format: str
    version: int


def check_manifest(manifest: Manifest) -> None:
    """What the types cannot say: every path stays inside, every artifact is listed, every range
    lies inside its file. Raises BundleError.
    """
    _check_files(manifest)
    _check_decoder(manifest.decoder, manifest.files[manifest.decoder.file].size)
    _check_answers(manifest)
    _check_embedding(manifest)
    _check_onnx(manifest)
    whole = manifest.vocabulary.n_whole if manifest.vocabulary else MAX_COUNT
    if not manifest.decoder.n_vocab <= whole <= MAX_COUNT:
        raise BundleError(
            f"{MANIFEST}: a vocabulary of {manifest.decoder.n_vocab} tokens cannot be cut from "
            f"one of {whole}"
        )


def _check_files(manifest: Manifest) -> None:
    for path, file in manifest.files.items():
        if not _stays_inside(path):
            raise BundleError(
                f"{MANIFEST} names the file {path!r}; paths must stay inside the bundle's folder"
            )
        if file.size < 0 or len(file.sha256) != 64:
            raise BundleError(f"{MANIFEST} gives no usable size and sha256 for {path!r}")
    artifacts = [manifest.decoder.file]
    parts = (manifest.audio, manifest.vision, manifest.onnx)
    artifacts += [part.file for part in parts if part]
    tables = (manifest.onnx.embeddings, manifest.onnx.per_layer) if manifest.onnx else ()
    artifacts += [table.file for table in tables if table]
    if manifest.special_rows:
        artifacts.append("special_rows.npy")
    if manifest.vocabulary:
        artifacts.append(manifest.vocabulary.file)
    for path in artifacts:
        if path not in manifest.files:
            raise BundleError(
                f"{MANIFEST} uses {path!r} but does not list its size and hash under files"
            )


def _stays_inside(path: str) -> bool:
    pure = PurePosixPath(path)
    if not path or path == MANIFEST or "\\" in path or "\0" in path:
        return False
    return not pure.is_absolute() and ".." not in pure.parts


def _check_decoder(decoder: DecoderPart, file_bytes: int) -> None:
    counts = {
        "n_layer": decoder.n_layer,
        "n_embd": decoder.n_embd,
        "n_ff": decoder.n_ff,
        "n_head": decoder.n_head,
        "n_head_kv": decoder.n_head_kv,
        "head_dim": decoder.head_dim,
        "n_vocab": decoder.n_vocab,
        "n_ctx_train": decoder.n_ctx_train,
    }
    for name, count in counts.items():
        if not 0 < count <= MAX_COUNT:
            raise BundleError(f"{MANIFEST}: decoder.{name} is {count}, expected 1 … {MAX_COUNT}")
    window_fits = 0 <= decoder.sliding_window <= MAX_COUNT
    if not window_fits or not 0 < len(decoder.kv_layers) <= decoder.n_layer:
        raise BundleError(
            f"{MANIFEST}: decoder.sliding_window or kv_layers does not fit {decoder.n_layer} layers"
        )
    if not 0 < decoder.header_bytes <= file_bytes:
        raise BundleError(
            f"{MANIFEST}: decoder.header_bytes is {decoder.header_bytes} of a file of "
            f"{file_bytes} bytes"
        )
    for tensor in decoder.tensors:
        end = tensor.offset + tensor.nbytes
        if tensor.offset < 0 or tensor.nbytes < 0 or end > file_bytes:
            raise BundleError(
                f"{MANIFEST}: tensor {tensor.name!r} ends at byte {end} of a file of "
                f"{file_bytes} bytes"
            )


# (least, most) of each sampling default
_SAMPLING_RANGES = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 1 << 24),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (0.01, 100.0),
}


def usable_sampling(name: str, value: object) -> bool:
    """Whether ``value`` can be the sampling default ``name``."""
    low, high = _SAMPLING_RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high


def _check_answers(manifest: Manifest) -> None:
    n_vocab = manifest.decoder.n_vocab
    for token in manifest.end_tokens:
        if not 0 <= token < n_vocab:
            raise BundleError(
                f"{MANIFEST}: end_tokens holds {token}, outside the vocabulary of {n_vocab}"
            )
    defaults = {} if manifest.sampling is None else msgspec.structs.asdict(manifest.sampling)
    for name, value in defaults.items():
        if value is not None and not usable_sampling(name, value):
            low, high = _SAMPLING_RANGES[name]
            raise BundleError(f"{MANIFEST}: sampling.{name} is {value}, expected {low} … {high}")


def _check_onnx(manifest: Manifest) -> None:
    """That both decoders were made of the same weights."""
    made_with = manifest.onnx.decoder_sha256 if manifest.onnx else ""
    if made_with and made_with != manifest.files[manifest.decoder.file].sha256:
        raise BundleError(
            f"{MANIFEST}: {manifest.decoder.file} is not the file that the ONNX decoder was "
            "converted with; the two would answer differently. Convert both again (--decoder both)"
        )


def _check_embedding(manifest: Manifest) -> None:
    part = manifest.embedding
    if (part is not None) != (manifest.family == "gemma-embedding"):
        raise BundleError(
            f"{MANIFEST}: a {manifest.family} {'with' if part else 'without'} an embedding part; "
            "gemma-embedding has one, the other families have none"
        )
    if part is None:
        return
    widths = (
        part.width,
        part.max_tokens,
        *part.dimensions,
        *(n for pair in part.dense for n in pair),
    )
    if not all(0 < width <= MAX_COUNT for width in widths):
        raise BundleError(f"{MANIFEST}: embedding has a size outside 1 … {MAX_COUNT}")
    if any(width > part.width for width in part.dimensions):
        raise BundleError(
            f"{MANIFEST}: embedding.dimensions {list(part.dimensions)} exceed the width of "
            f"{part.width}"
        )
    if part.default_prompt is not None and part.default_prompt not in part.prompts:
        raise BundleError(
            f"{MANIFEST}: embedding.default_prompt {part.default_prompt!r} is not among its prompts"
        )
