"""``tokenizer.model`` or ``tokenizer.json`` → the vocabulary as GGUF wants it, the same from either
file.

In: a checkpoint's folder and config. Out: :class:`Vocabulary` — pieces, scores, types, special ids,
chat template. The tokenizer itself is never run here; llama.cpp runs it from these tables.

Scores are sentencepiece's: 0, −1, −2 … in the order the BPE merges were learned. ``tokenizer.json``
does not store them but keeps the merges in that order, so they are counted again; where a published
vocabulary numbers with a gap, the gap is a fact below.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from edge_gemma.convert.checkpoint import MAX_JSON_BYTES, read_json

from edge_gemma.errors import CheckpointError
from edge_gemma.units import format_bytes

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    1,
    2,
    3,
    4,
    5,
    6,
)  # sentencepiece_model.proto = llama.cpp's token types
MAX_PIECES = 1 << 24
SPACE = "\u2581"  # sentencepiece's mark for a space
ADDED_SCORE, PAD_SCORE = (
    -1000.0,
    -10000.0,
)  # what llama.cpp's converter writes for added and for padding tokens
# Tokens that some checkpoints list as plain although they steer the model (llama.cpp
# conversion/base.py does the same)
_CONTROL_NAMES = {"<pad>", "<mask>", "<2mass>", "[@BOS@]", "<start_of_turn>", "<end_of_turn>"}
_CONTROL_PATTERN = re.compile(r"<unused\d+>|<\|.*\|>")
# Gemma 3 numbers the single characters, which follow the 236,249 merged pieces, 31 lower than
# counting would: (id of the first merged piece, id of the first single character) → gap. Read from
# Google's own tokenizer.model.
_SCORE_GAPS = {(494, 236743): 31}


@dataclass(frozen=True)
class Vocabulary:
    tokens: list[bytes]  # n_vocab pieces
    scores: np.ndarray  # [n_vocab] float32
    types: np.ndarray  # [n_vocab] int32
    special: dict[str, int]  # bos, eos, unk, pad, eot: id
    add_space_prefix: bool
    chat_template: str | None
    source: str  # the file it was read from


def read_vocabulary(folder: Path, config: dict, n_vocab: int) -> Vocabulary:
    """The vocabulary of ``n_vocab`` tokens beside a checkpoint. Raises CheckpointError."""
    tokenizer_config = (
        read_json(folder / "tokenizer_config.json")
        if (folder / "tokenizer_config.json").is_file()
        else {}
    )
    if (folder / "tokenizer.model").is_file():
        source = folder / "tokenizer.model"
        pieces, special, prefix = _from_sentencepiece(source)
    elif (folder / "tokenizer.json").is_file():
        source = folder / "tokenizer.json"
        pieces, special, prefix = _from_tokenizer_json(source)
    else:
        raise CheckpointError(
            f"{folder} has neither tokenizer.model nor tokenizer.json; copy one of them "
            "there from the model this checkpoint was tuned from"
        )
    if len(pieces) > n_vocab:
        raise CheckpointError(
            f"{source} has {len(pieces)} tokens, config.json says vocab_size {n_vocab}; they "
            "are of different models"
        )
    for i, text, is_special in _added_tokens(folder, tokenizer_config, source):
        if i >= n_vocab:
            raise CheckpointError(
                f"{folder}: the added token {text!r} has id {i}, outside the vocabulary of "
                f"{n_vocab}"
            )
        pieces += [None] * (i + 1 - len(pieces))
        pieces[i] = (text, ADDED_SCORE, CONTROL if is_special else USER_DEFINED)
    tokens, scores, types = [], np.empty(n_vocab, np.float32), np.empty(n_vocab, np.int32)
    pieces += [None] * (n_vocab - len(pieces))
    for i, piece in enumerate(pieces):
        text, score, kind = _settle(*piece) if piece else (f"[PAD{i}]", PAD_SCORE, UNUSED)
        tokens.append(text.encode("utf-8", "surrogatepass"))
        scores[i], types[i] = score, kind
    special |= _special_ids(tokens, config, tokenizer_config)
    for name, i in special.items():
        if not 0 <= i < n_vocab:
            raise CheckpointError(
                f"{folder}: the {name} token has id {i}, outside the vocabulary of {n_vocab}"
            )
    for name in ("bos", "eos"):
        if name not in special:
            raise CheckpointError(
                f"{source} and config.json name no {name} token; every Gemma has one"
            )
    return Vocabulary(
        tokens,
        scores,
        types,
        special,
        prefix,
        _chat_template(folder, tokenizer_config),
        source.name,
    )


def _settle(text: str, score: float, kind: int) -> tuple[str, float, int]:
    """What a token is at run time, whichever file it came from: steering tokens never match in
    plain text, user-defined ones always do.
    """
    if kind in (UNKNOWN, CONTROL) or (
        kind == USER_DEFINED and (text in _CONTROL_NAMES or _CONTROL_PATTERN.fullmatch(text))
    ):
        return text, ADDED_SCORE, CONTROL
    if kind == USER_DEFINED:
        return text.replace(SPACE, " "), ADDED_SCORE, USER_DEFINED
    return text, score, kind


# --- tokenizer.model: a protocol buffer, of which three fields matter (sentencepiece_model.proto) ---


def _from_sentencepiece(path: Path) -> tuple[list, dict[str, int], bool]:
    data = path.read_bytes() if path.stat().st_size <= MAX_JSON_BYTES else b""
    pieces, prefix, trainer = [], True, {}
    try:
        for field, value in _fields(memoryview(data)):
            if field in (1, 2, 3) and not isinstance(value, memoryview):
                raise ValueError(f"field {field} is a number, expected a message")
            if field == 1:
                pieces.append(_sentencepiece(value))
            elif field == 2:
                trainer = {
                    number: content
                    for number, content in _fields(value)
                    if not isinstance(content, memoryview)
                }
            elif field == 3:
                prefix = dict(_fields(value)).get(3, 1) != 0  # normalizer_spec.add_dummy_prefix
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a sentencepiece model: {error}") from None
    if not pieces:
        raise CheckpointError(
            f"{path} holds no pieces ({format_bytes(path.stat().st_size)}); expected a "
            "sentencepiece model"
        )
    # trainer_spec: unk_id 40, bos_id 41, eos_id 42, pad_id 43, with the proto's defaults; −1 means
    # none
    ids = {
        name: _signed(trainer.get(number, default))
        for name, number, default in (
            ("unk", 40, 0),
            ("bos", 41, 1),
            ("eos", 42, 2),
            ("pad", 43, -1),
        )
    }
    return pieces, {name: i for name, i in ids.items() if 0 <= i < len(pieces)}, prefix


def _sentencepiece(data: memoryview) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for field, value in _fields(data):
        if field == 1:
            text = bytes(value).decode("utf-8") if isinstance(value, memoryview) else ""
        elif field == 2:
            score = (
                struct.unpack("<f", value)[0]
                if isinstance(value, memoryview) and len(value) == 4
                else float("nan")
            )
        elif field == 3:
            kind = value if isinstance(value, int) else 0
    if not NORMAL <= kind <= BYTE or not text or score != score:
        raise ValueError(f"a piece has the text {text!r}, score {score} and type {kind}")
    return text, score, kind


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The (number, value) pairs of one protocol buffer message; fixed-width and nested values as
    bytes.
    """
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            if position >= len(data) or shift > 63:
                raise ValueError("it ends inside a number")
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        if key & 7 not in (1, 2, 5):
            raise ValueError(f"field {key >> 3} has wire type {key & 7}")
        n = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
        if n > len(data) - position:
            raise ValueError(f"field {key >> 3} claims {n} bytes of {len(data) - position}")
        yield key >> 3, data[position : position + n]
        position += n


def _signed(value) -> int:
    return (
        value - (1 << 64)
        if isinstance(value, int) and value >= 1 << 63
        else value
        if isinstance(value, int)
        else -1
    )


# --- tokenizer.json ---


class _Model(msgspec.Struct):
    vocab: dict[str, int]
    type: str | None = None
    merges: list[str | tuple[str, str]] = []
    unk_token: str | None = None
    byte_fallback: bool = False


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Tokenizer(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] = []
    normalizer: dict | None = None
    pre_tokenizer: dict | None = None


def _decode_tokenizer(path: Path, kind: type):
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} has {format_bytes(path.stat().st_size)}; expected at most "
            f"{format_bytes(MAX_JSON_BYTES)}"
        )
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a BPE tokenizer.json: {error}") from None


def _from_tokenizer_json(path: Path) -> tuple[list, dict[str, int], bool]:
    tokenizer = _decode_tokenizer(path, _Tokenizer)
    model = tokenizer.model
    if model.type not in (None, "BPE") or not model.byte_fallback:
        raise CheckpointError(
            f"{path} is a {model.type} tokenizer with byte_fallback {model.byte_fallback}; "
            "Gemma's is BPE with byte fallback"
        )
    ids = sorted(model.vocab.values())
    if not ids or ids[0] < 0 or ids[-1] >= MAX_PIECES or ids != list(range(len(ids))):
        raise CheckpointError(
            f"{path}: the vocabulary's ids do not run from 0 to {len(ids) - 1} without gaps"
        )
    kinds = {
        token.id: CONTROL if token.special else USER_DEFINED for token in tokenizer.added_tokens
    }
    texts = sorted(model.vocab, key=model.vocab.__getitem__)
    types = [
        kinds.get(i)
        or (
            BYTE
            if re.fullmatch(r"<0x[0-9A-F]{2}>", text)
            else CONTROL
            if text == model.unk_token
            else NORMAL
        )
        for i, text in enumerate(texts)
    ]
    scores = _scores(path, model, texts, types)
    special = {"unk": model.vocab[model.unk_token]} if model.unk_token in model.vocab else {}
    prefix = (
        '"Prepend"' in msgspec.json.encode([tokenizer.normalizer, tokenizer.pre_tokenizer]).decode()
    )
    return list(zip(texts, scores, types)), special, prefix


def _scores(path: Path, model: _Model, texts: list[str], types: list[int]) -> list[float]:
    """Counted by the merges' order: a piece's rank is where its first merge stands; pieces without
    one (single characters) follow by id.
    """
    rank: dict[str, int] = {}
    for merge in model.merges:
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else merge
        if len(pair) != 2:
            raise CheckpointError(f"{path}: the merge {merge!r} is not a pair")
        rank.setdefault("".join(pair), len(rank))
    normal = [i for i, kind in enumerate(types) if kind == NORMAL]
    last = len(rank)
    order = sorted(normal, key=lambda i: (rank.get(texts[i], last), i))
    scores = [0.0] * len(texts)
    first_single = next((i for i in order if texts[i] not in rank), -1)
    gap = _SCORE_GAPS.get((order[0], first_single), 0) if order else 0
    for place, i in enumerate(order):
        scores[i] = -float(place + (gap if texts[i] not in rank else 0))
    return scores


# --- what lies beside them ---


def _added_tokens(
    folder: Path, tokenizer_config: dict, source: Path
) -> Iterator[tuple[int, str, bool]]:
    """(id, text, special) of the tokens added after training, from whichever files list them."""
    if (folder / "added_tokens.json").is_file():
        for text, i in read_json(folder / "added_tokens.json").items():
            yield _token_id(i, folder / "added_tokens.json"), text, False
    if (folder / "tokenizer.json").is_file():

        class AddedOnly(msgspec.Struct):
            added_tokens: list[_Added] = []

        for token in _decode_tokenizer(folder / "tokenizer.json", AddedOnly).added_tokens:
            yield _token_id(token.id, folder / "tokenizer.json"), token.content, token.special
    decoder = tokenizer_config.get("added_tokens_decoder", {})
    for i, token in decoder.items() if isinstance(decoder, dict) else ():
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder[{i!r}] has no content"
            )
        yield (
            _token_id(i, folder / "tokenizer_config.json"),
            token["content"],
            bool(token.get("special")),
        )


def _token_id(value, path: Path) -> int:
    try:
        i = int(value)
    except (TypeError, ValueError):
        i = -1
    if not 0 <= i < MAX_PIECES:
        raise CheckpointError(f"{path} gives an added token the id {value!r}")
    return i


def _special_ids(tokens: list[bytes], config: dict, tokenizer_config: dict) -> dict[str, int]:
    """bos, eos, unk, pad and eot: config.json's ids, else the tokens tokenizer_config.json names,
    found in the vocabulary.
    """
    where: dict[bytes, int] = {}
    wanted, fallback = {}, {}
    for name in ("bos", "eos", "unk", "pad"):
        value = tokenizer_config.get(f"{name}_token")
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            wanted[name] = text.encode()
    wanted["eot"] = b"<end_of_turn>"
    for i, token in enumerate(tokens):
        where.setdefault(token, i)
    found = {name: where[text] for name, text in wanted.items() if text in where}
    text_config = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    for name in ("bos", "eos", "pad"):
        if (
            name not in found and (i := where.get(f"<{name}>".encode())) is not None
        ):  # Gemma's own spelling, when no file names it
            fallback[name] = i
        for holder in (text_config, config):
            value = holder.get(f"{name}_token_id")
            value = (
                value[0] if isinstance(value, list) and value else value
            )  # instruct checkpoints list <eos> and <end_of_turn>
            if type(value) is int and name not in found:
                found[name] = value
    return fallback | found


def _chat_template(folder: Path, tokenizer_config: dict) -> str | None:
    template = tokenizer_config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8", "replace")
    elif (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json").get("chat_template", template)
    if isinstance(template, list):  # several by name: the default one
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) and template.strip() else None
