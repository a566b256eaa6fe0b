"""What a GGUF of another's making lacks or says wrongly, and how a copy of it is made right.

In: a GGUF's header and description. Out: :class:`Repairs`: what :func:`~.rewrite.rewritten` writes
otherwise, and a sentence for people about each. What the engine is told instead (begin and end of
sequence, spaces) is not here: that needs no copy.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_gemma.bundles.description import Description
from edge_gemma.bundles.gguf import Header, Skipped, read_strings
from edge_gemma.bundles.token_roles import CONTROL_TEXTS

# llama.cpp's llama_token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_TYPE_NAMES = {0: "undefined", 1: "normal", 2: "unknown", 3: "control", 4: "user-defined"}
_TYPE_NAMES |= {5: "unused", 6: "byte"}
# Gemma's HTML tags, each of which is one token of text (tokenizer.json, added_tokens)
_TAGS = (
    "table caption thead tbody tfoot tr th td h1 h2 h3 h4 h5 h6 blockquote strong em b i u s sub "
    "sup code a html body img span bbox ul li div iframe footer"
).split()
_TEXT = {f"<{slash}{tag}>".encode() for tag in _TAGS for slash in ("", "/")} | {b"[multimodal]"}
_RUN = re.compile(rb"\n+|\t+|(?: ){2,}|(?:\xe2\x96\x81){2,}")  # ▁ is how a space is written
_BYTE_TOKEN = re.compile(rb"<0x[0-9A-F]{2}>")
_CONTROLS = {text.encode() for text in CONTROL_TEXTS.values()} | {b"<mask>"}
_UNUSED = re.compile(rb"<unused\d+>")

_ROPE_BASE, _ROPE_BASE_SLIDING = 1_000_000.0, 10_000.0  # Gemma3TextConfig, Gemma3nTextConfig
_FLOAT32, _STRING = 6, 8  # GGUF value types


@dataclass(frozen=True)
class Repairs:
    """``added`` are metadata that the file lacks, ``patches`` bytes that are otherwise in its
    header, of the same length; tensors in ``dropped`` belong to no decoder, those in ``widened``
    become F32.
    """

    added: dict[str, bytes] = field(default_factory=dict)  # key → type and value
    patches: dict[int, bytes] = field(default_factory=dict)  # absolute offset → bytes
    dropped: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def needs_copy(self) -> bool:
        return bool(self.added or self.patches or self.dropped or self.widened)


NO_REPAIRS = Repairs()


def find_repairs(path: Path, header: Header, description: Description) -> Repairs:
    """What must be different in the bundle's copy of ``path``."""
    kept = {tensor.name for tensor in description.decoder.tensors}
    dropped = tuple(tensor.name for tensor in header.tensors if tensor.name not in kept)
    widened = tuple(
        tensor.name
        for tensor in header.tensors
        if tensor.name in kept and len(tensor.shape) == 1 and tensor.type != "F32"
    )
    types, type_notes = _token_types(path, header)
    added, rope_notes = _rope(header, description)
    values, value_notes = _values(header, description)
    notes = [*rope_notes, *value_notes, *type_notes]
    if dropped:
        notes.append(_left_out(dropped))
    if widened:
        notes.append(f"{len(widened)} norms were widened to F32, as llama.cpp computes them")
    return Repairs(added, types | values, dropped, widened, tuple(notes))


def _left_out(names: tuple[str, ...]) -> str:
    what = "sound" if all(name.startswith("a.") for name in names) else "pictures"
    return (
        f"{len(names)} tensors of an encoder for {what} ({names[0]!r} …) were left out: the bundle "
        "holds the decoder. Its own encoder comes with `edge-gemma convert`, or from llama.cpp's "
        "vision file with --mmproj"
    )


# ---- token types


def _right_types(spelling: bytes) -> tuple[int, ...] | None:
    """The types that Gemma's token of that spelling may have, the usual one first; None where any
    will do.
    """
    if spelling in _TEXT or _RUN.fullmatch(spelling):
        return (_USER_DEFINED,)
    if not spelling.startswith(b"<"):
        return None
    if _BYTE_TOKEN.fullmatch(spelling):
        return (_BYTE,)
    if spelling == b"<unk>":
        return (_CONTROL, _USER_DEFINED, _UNKNOWN)
    if spelling in _CONTROLS or _UNUSED.fullmatch(spelling):
        return (_CONTROL, _USER_DEFINED)
    return None


def _token_types(path: Path, header: Header) -> tuple[dict[int, bytes], list[str]]:
    """Offset → the right type, for each token of a wrong one.

    llama.cpp tokenizes by these types: a control token that is a normal one becomes letters, a line
    break that is a control token becomes bytes.
    """
    vocabulary = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(vocabulary, Skipped)  # description.py has refused what is not
    offset = header.offsets["tokenizer.ggml.token_type"]
    types = np.fromfile(path, "<i4", vocabulary.length, offset=offset)
    wrong: dict[int, bytes] = {}
    told: list[str] = []
    for token, spelling in enumerate(read_strings(path, vocabulary)):
        right = _right_types(spelling)
        if right is None or types[token] in right:
            continue
        wrong[offset + 4 * token] = struct.pack("<i", right[0])
        if len(told) < 3:
            found = _TYPE_NAMES.get(int(types[token]), str(types[token]))
            told.append(f"{spelling.decode('utf-8', 'replace')!r} as {found}")
    if not wrong:
        return {}, []
    more = f" and {len(wrong) - len(told)} more" * (len(wrong) > len(told))
    return wrong, [f"tokens of a wrong type were corrected: {', '.join(told)}{more}"]


# ---- hyperparameters

_GEMMA2_SOFTCAP = 30.0


def _values(header: Header, description: Description) -> tuple[dict[int, bytes], list[str]]:
    """Gemma 2's bound on the logits, which Ollama's converter wrote for Gemma 3 as well and its
    engine ignores; llama.cpp would apply it.
    """
    key = "gemma3.final_logit_softcapping"
    if description.family != "gemma3" or header.metadata.get(key) != _GEMMA2_SOFTCAP:
        return {}, []
    note = f"{key} is {_GEMMA2_SOFTCAP:g}, which is Gemma 2's; written as 0"
    return {header.offsets[key]: struct.pack("<f", 0.0)}, [note]


def _rope(header: Header, description: Description) -> tuple[dict[str, bytes], list[str]]:
    """The bases of the rotary embedding that llama.cpp would otherwise take for 10,000 everywhere.

    Ollama's converter wrote them under keys of its own.
    """
    family, meta = description.family, header.metadata
    added, notes = {}, []

    def add(name: str, values: tuple[object, ...], assumed: float | None) -> None:
        key = f"{family}.rope.{name}"
        given = [value for value in values if isinstance(value, float) and value >= 1.0]
        value = given[0]
        if key in meta or value == assumed:
            return
        added[key] = struct.pack("<If", _FLOAT32, value)
        notes.append(f"{key} is missing; written as {value:g}")

    other = meta.get(f"{family}.rope.global.freq_base")
    add("freq_base", (other, _ROPE_BASE), None)
    names = (f"{family}.rope.local.freq_base", f"{family}.rope.freq_base_local")
    local = tuple(meta.get(name) for name in names)
    add("freq_base_swa", (*local, _ROPE_BASE_SLIDING), _ROPE_BASE_SLIDING)
    if _is_4b(description) and f"{family}.rope.scaling.factor" not in meta:
        added[f"{family}.rope.scaling.type"] = _text("linear")
        added[f"{family}.rope.scaling.factor"] = struct.pack("<If", _FLOAT32, 8.0)
        notes.append(f"{family}.rope.scaling is missing; written as linear, 8, as Gemma 3 4B has")
    return added, notes


def _is_4b(description: Description) -> bool:
    decoder = description.decoder
    size = (description.family, decoder.n_layer, decoder.n_embd)
    return size == ("gemma3", 34, 2560)


def _text(value: str) -> bytes:
    return struct.pack("<IQ", _STRING, len(value)) + value.encode()
