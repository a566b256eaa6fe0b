"""``tokenizer.model`` or ``tokenizer.json`` → the vocabulary as GGUF wants
it, the same from either file.

In: a checkpoint's folder and config. Out: :class:`Vocabulary` — pieces,
scores, types, special ids, chat template. The tokenizer itself is never run
here; llama.cpp runs it from these tables.

Scores are sentencepiece's: 0, −1, −2 … in the order the BPE merges were
learned. ``tokenizer.json`` does not store them but keeps the merges in that
order, so they are counted again; where a published vocabulary numbers with
a gap, the gap is a fact below.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from edge_gemma.convert.checkpoint import MAX_JSON_BYTES, read_json
from edge_gemma.errors import CheckpointError, RuntimeFailure
from edge_gemma.units import format_bytes

# Token types: sentencepiece_model.proto and llama.cpp number them alike
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MAX_PIECES = 1 << 24
SPACE = "\u2581"  # sentencepiece's mark for a space
ADDED_SCORE = -1000.0  # what llama.cpp's converter writes for added tokens
PAD_SCORE = -10000.0  # and for rows of the table that no token has
# Tokens that some checkpoints list as plain although they steer the model
# (llama.cpp conversion/base.py does the same)
_CONTROL_NAMES = {"<pad>", "<mask>", "<2mass>", "[@BOS@]", "<start_of_turn>", "<end_of_turn>"}
_CONTROL_PATTERN = re.compile(r"<unused\d+>|<\|.*\|>")
# Gemma 3 numbers the single characters, which follow the 236,249 merged
# pieces, 31 lower than counting would: (id of the first merged piece, id of
# the first single character) → gap. Read from Google's own tokenizer.model.
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
    notes: tuple[str, ...] = ()  # what was left out, and why


Piece = tuple[str, float, int]  # text, score, type


def read_vocabulary(folder: Path, config: dict, n_vocab: int) -> Vocabulary:
    """The vocabulary of ``n_vocab`` tokens beside a checkpoint. Raises
    CheckpointError.
    """
    tokenizer_config: dict = {}
    if (folder / "tokenizer_config.json").is_file():
        tokenizer_config = read_json(folder / "tokenizer_config.json")
    unused: dict[int, str] = {}
    if (folder / "tokenizer.model").is_file():
        source = folder / "tokenizer.model"
        own_pieces, special, prefix = _from_sentencepiece(source)
    elif (folder / "tokenizer.json").is_file():
        source = folder / "tokenizer.json"
        own_pieces, special, prefix, unused = _from_tokenizer_json(source, n_vocab)
    else:
        raise CheckpointError(
            f"{folder} has neither tokenizer.model nor tokenizer.json; copy one of them "
            "there from the model this checkpoint was tuned from"
        )
    surplus = unused | _surplus(own_pieces, n_vocab, source)  # tokens without a row in the table
    pieces: list[Piece | None] = [*own_pieces[:n_vocab]]
    pieces += [None] * (n_vocab - len(pieces))
    for i, text, is_special in _added_tokens(folder, tokenizer_config):
        if i < n_vocab:
            pieces[i] = (text, ADDED_SCORE, CONTROL if is_special else USER_DEFINED)
        else:
            surplus[i] = text
    tokens, scores, types = _columns(pieces)
    notes = _surplus_notes(surplus, n_vocab)
    named, unusable = _special_ids(tokens, config, tokenizer_config)
    special = {name: i for name, i in special.items() if i < n_vocab} | named
    for name in ("bos", "eos"):
        if name not in special:
            raise _no_special_token(name, unusable, n_vocab, source)
    for name, i in unusable.items():
        notes.append(
            f"config.json gives {name} the id {i}, outside the vocabulary of {n_vocab}; ignored"
        )
    template = _chat_template(folder, tokenizer_config)
    return Vocabulary(tokens, scores, types, special, prefix, template, source.name, tuple(notes))


def _surplus(pieces: list[Piece], n_vocab: int, source: Path) -> dict[int, str]:
    """Id → text of the pieces behind the end of the table. Raises CheckpointError when text is
    made of them: then the tokenizer is another model's.
    """
    beyond = pieces[n_vocab:]
    if any(kind in (NORMAL, BYTE) for _, _, kind in beyond):
        raise _of_another_model(source, len(pieces), n_vocab)
    return {n_vocab + i: text for i, (text, _, _) in enumerate(beyond)}


def _of_another_model(source: Path, n_tokens: int, n_vocab: int) -> CheckpointError:
    return CheckpointError(
        f"{source} has {n_tokens} tokens, config.json says vocab_size {n_vocab}, and text "
        "is made of those that have no row; they are of different models"
    )


def _surplus_notes(surplus: dict[int, str], n_vocab: int) -> list[str]:
    if not surplus:
        return []
    first = min(surplus)
    named = f"{surplus[first]!r} ({first})"
    if len(surplus) > 1:
        named += f" and {len(surplus) - 1} more tokens have"
    else:
        named += " has"
    return [f"{named} no row in the table of {n_vocab}; ignored: the model cannot use them"]


def _columns(pieces: list[Piece | None]) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """Tokens, scores and types of all rows; a row without a piece becomes
    ``[PADn]``.
    """
    tokens: list[bytes] = []
    scores = np.empty(len(pieces), np.float32)
    types = np.empty(len(pieces), np.int32)
    for i, piece in enumerate(pieces):
        text, score, kind = _settle(*piece) if piece else (f"[PAD{i}]", PAD_SCORE, UNUSED)
        tokens.append(text.encode("utf-8", "surrogatepass"))
        scores[i], types[i] = score, kind
    return tokens, scores, types


def _no_special_token(
    name: str, unusable: dict[str, int], n_vocab: int, source: Path
) -> CheckpointError:
    if name in unusable:
        return CheckpointError(
            f"{source.parent}: the {name} token has id {unusable[name]}, outside the vocabulary "
            f"of {n_vocab}"
        )
    return CheckpointError(f"{source} and config.json name no {name} token; every Gemma has one")


def _settle(text: str, score: float, kind: int) -> Piece:
    """What a token is at run time, whichever file it came from: control
    tokens never match in plain text, user-defined ones always do.
    """
    named_control = text in _CONTROL_NAMES or _CONTROL_PATTERN.fullmatch(text)
    if kind in (UNKNOWN, CONTROL) or (kind == USER_DEFINED and named_control):
        return text, ADDED_SCORE, CONTROL
    if kind == USER_DEFINED:
        return text.replace(SPACE, " "), ADDED_SCORE, USER_DEFINED
    return text, score, kind


# --- tokenizer.model, read with sentencepiece's own protocol buffer definition ---


def _from_sentencepiece(path: Path) -> tuple[list[Piece], dict[str, int], bool]:
    """(pieces, special ids, whether a space is put before the text)."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} has {format_bytes(size)}; expected at most {format_bytes(MAX_JSON_BYTES)}"
        )
    messages = _sentencepiece_messages()
    from google.protobuf.message import DecodeError
    from google.protobuf.unknown_fields import UnknownFieldSet

    try:
        model = messages.ModelProto.FromString(path.read_bytes())
        pieces: list[Piece] = []
        for piece in model.pieces:
            text, score = piece.piece, piece.score  # bytes where the text is no UTF-8
            # a type that the definition lacks is kept among the unknown
            # fields
            unknown = {field.field_number: field.data for field in UnknownFieldSet(piece)}
            kind = unknown.get(piece.TYPE_FIELD_NUMBER, piece.type)
            readable = isinstance(text, str) and text and score == score
            if not readable or kind not in range(NORMAL, BYTE + 1):
                raise ValueError(f"a piece has the text {text!r}, score {score} and type {kind}")
            pieces.append((text, score, kind))
    except (DecodeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a sentencepiece model: {error}") from None
    if not pieces:
        raise CheckpointError(
            f"{path} holds no pieces ({format_bytes(size)}); expected a sentencepiece model"
        )
    trainer = model.trainer_spec
    ids = {
        "unk": trainer.unk_id,
        "bos": trainer.bos_id,
        "eos": trainer.eos_id,
        "pad": trainer.pad_id,  # −1 means none
    }
    special = {name: i for name, i in ids.items() if 0 <= i < len(pieces)}
    return pieces, special, model.normalizer_spec.add_dummy_prefix


def _sentencepiece_messages():
    """sentencepiece's generated module; it refuses to load beside an older
    protobuf than the one it was generated with.
    """
    from google.protobuf.runtime_version import VersionError

    try:
        from sentencepiece import sentencepiece_model_pb2
    except VersionError as error:
        raise RuntimeFailure(
            f"tokenizer.model cannot be read: {error}. pip install --upgrade protobuf"
        ) from None
    return sentencepiece_model_pb2


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


class _AddedOnly(msgspec.Struct):
    added_tokens: list[_Added] = []


class _Tokenizer(_AddedOnly, kw_only=True):
    model: _Model
    normalizer: dict | None = None
    pre_tokenizer: dict | None = None


T = TypeVar("T")


def _decode_tokenizer(path: Path, kind: type[T]) -> T:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} has {format_bytes(path.stat().st_size)}; expected at most "
            f"{format_bytes(MAX_JSON_BYTES)}"
        )
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a BPE tokenizer.json: {error}") from None


def _from_tokenizer_json(
    path: Path, n_vocab: int
) -> tuple[list[Piece], dict[str, int], bool, dict[int, str]]:
    """(pieces, special ids, whether a space is put before the text, id → text of what is listed
    at or behind the end of the table).
    """
    tokenizer = _decode_tokenizer(path, _Tokenizer)
    model = tokenizer.model
    if model.type not in (None, "BPE") or not model.byte_fallback:
        raise CheckpointError(
            f"{path} is a {model.type} tokenizer with byte_fallback {model.byte_fallback}; "
            "Gemma's is BPE with byte fallback"
        )
    beyond = _beyond(path, model, n_vocab)
    ids = sorted(i for i in model.vocab.values() if i not in beyond)
    if not ids or ids[-1] >= MAX_PIECES or ids != list(range(len(ids))):
        raise CheckpointError(
            f"{path}: the vocabulary's ids do not run from 0 to {len(ids) - 1} without gaps"
        )
    texts = sorted(
        (text for text in model.vocab if model.vocab[text] not in beyond),
        key=model.vocab.__getitem__,
    )
    types = [_type_of(text, model) for text in texts]
    for token in tokenizer.added_tokens:
        if 0 <= token.id < len(types):
            types[token.id] = CONTROL if token.special else USER_DEFINED
    scores = _scores(path, model, texts, types)
    special: dict[str, int] = {}
    if model.unk_token is not None and model.unk_token in model.vocab:
        special["unk"] = model.vocab[model.unk_token]
    steps = msgspec.json.encode([tokenizer.normalizer, tokenizer.pre_tokenizer])
    prefix = b'"Prepend"' in steps
    return list(zip(texts, scores, types, strict=True)), special, prefix, beyond


def _beyond(path: Path, model: _Model, n_vocab: int) -> dict[int, str]:
    """Id → text of the vocabulary's entries without a row in the table. Raises CheckpointError
    when text is made of them: of single characters, bytes, or what merges make.
    """
    beyond = {i: text for text, i in model.vocab.items() if i >= n_vocab}
    if not beyond:
        return {}
    merged = {"".join(_pair(path, merge)) for merge in model.merges}
    for text in beyond.values():
        if len(text) == 1 or text in merged or _type_of(text, model) == BYTE:
            raise _of_another_model(path, len(model.vocab), n_vocab)
    return beyond


def _type_of(text: str, model: _Model) -> int:
    """The type of a piece that is no added token."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
        return BYTE
    return CONTROL if text == model.unk_token else NORMAL


def _pair(path: Path, merge: str | tuple[str, str]) -> tuple[str, str]:
    pair = tuple(merge.split(" ")) if isinstance(merge, str) else merge
    if len(pair) != 2:
        raise CheckpointError(f"{path}: the merge {merge!r} is not a pair")
    return pair


def _scores(path: Path, model: _Model, texts: list[str], types: list[int]) -> list[float]:
    """Counted by the merges' order: a piece's rank is where its first merge
    stands; pieces without one (single characters) follow by id.
    """
    rank: dict[str, int] = {}
    for merge in model.merges:
        rank.setdefault("".join(_pair(path, merge)), len(rank))
    normal = [i for i, kind in enumerate(types) if kind == NORMAL]
    last = len(rank)
    order = sorted(normal, key=lambda i: (rank.get(texts[i], last), i))
    first_single = next((i for i in order if texts[i] not in rank), -1)
    gap = _SCORE_GAPS.get((order[0], first_single), 0) if order else 0
    scores = [0.0] * len(texts)
    for place, i in enumerate(order):
        merged = texts[i] in rank
        scores[i] = -float(place if merged else place + gap)
    return scores


# --- what lies beside them ---


def _added_tokens(folder: Path, tokenizer_config: dict) -> Iterator[tuple[int, str, bool]]:
    """(id, text, special) of the tokens added after training, from
    whichever files list them.
    """
    path = folder / "added_tokens.json"
    if path.is_file():
        for text, i in read_json(path).items():
            yield _token_id(i, path), text, False
    path = folder / "tokenizer.json"
    if path.is_file():
        for added in _decode_tokenizer(path, _AddedOnly).added_tokens:
            yield _token_id(added.id, path), added.content, added.special
    path = folder / "tokenizer_config.json"
    decoder = tokenizer_config.get("added_tokens_decoder", {})
    for i, token in decoder.items() if isinstance(decoder, dict) else ():
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise CheckpointError(f"{path}: added_tokens_decoder[{i!r}] has no content")
        yield _token_id(i, path), token["content"], bool(token.get("special"))


def _token_id(value: str | int, path: Path) -> int:
    try:
        i = int(value)
    except (TypeError, ValueError):
        i = -1
    if not 0 <= i < MAX_PIECES:
        raise CheckpointError(f"{path} gives an added token the id {value!r}")
    return i


def _special_ids(
    tokens: list[bytes], config: dict, tokenizer_config: dict
) -> tuple[dict[str, int], dict[str, int]]:
    """bos, eos, unk, pad and eot: the tokens that tokenizer_config.json names, found in the
    vocabulary, else config.json's ids. With them, config.json's ids that have no row.
    """
    ids: dict[bytes, int] = {}
    for i, token in enumerate(tokens):
        ids.setdefault(token, i)
    named = {"eot": b"<end_of_turn>"}
    for name in ("bos", "eos", "unk", "pad"):
        value = tokenizer_config.get(f"{name}_token")
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[name] = text.encode()
    found = {name: ids[text] for name, text in named.items() if text in ids}
    unusable: dict[str, int] = {}
    for name in ("bos", "eos", "pad"):
        if name in found:
            continue
        configured = configured_ids(config, f"{name}_token_id")
        usable = [i for i in configured if 0 <= i < len(tokens)]
        own_spelling = ids.get(f"<{name}>".encode())  # as Gemma writes it, when no file names it
        if usable:
            # instruct checkpoints list <eos> and <end_of_turn>
            found[name] = usable[0]
        elif own_spelling is not None:
            found[name] = own_spelling
        if configured and not usable:
            unusable[name] = configured[0]
    return found, unusable


def configured_ids(config: dict, key: str) -> list[int]:
    """The id, or list of ids, that a config gives for ``key``; the decoder's own section counts
    first. Empty when there is none.
    """
    for section in (config.get("text_config"), config):
        value = section.get(key) if isinstance(section, dict) else None
        ids = [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]
        if ids:
            return ids
    return []


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
