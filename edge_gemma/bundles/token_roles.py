"""Which token of a GGUF's vocabulary has which role: begin, turns, media, ends of an answer.

In: the metadata of a file that nobody has checked, and its vocabulary. Out: :class:`TokenRoles`. A
role is found by the token's spelling, which every Gemma shares; the ``…_token_id`` keys count where
the spelling is absent, and a key that contradicts it is reported. This module knows no tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_gemma.bundles.gguf import Skipped, find_strings
from edge_gemma.bundles.metadata import Metadata

# our name → Gemma's token; a vocabulary without one of these simply lacks that role
SPECIAL_TOKENS = {
    "start_of_turn": "<start_of_turn>",
    "end_of_turn": "<end_of_turn>",
    "start_of_image": "<start_of_image>",
    "end_of_image": "<end_of_image>",
    "image_soft": "<image_soft_token>",
    "start_of_audio": "<start_of_audio>",
    "end_of_audio": "<end_of_audio>",
    "audio_soft": "<audio_soft_token>",
}
# FunctionGemma's, in vocabularies that have them
FUNCTION_TOKENS = {
    "start_function_declaration": "<start_function_declaration>",
    "end_function_declaration": "<end_function_declaration>",
    "start_function_call": "<start_function_call>",
    "end_function_call": "<end_function_call>",
    "start_function_response": "<start_function_response>",
    "end_function_response": "<end_function_response>",
    "escape": "<escape>",
}
# our name → (Gemma's token, key below tokenizer.ggml, whether every Gemma has it)
_KEYED = {
    "bos": ("<bos>", "bos_token_id", True),
    "eos": ("<eos>", "eos_token_id", True),
    "unk": ("<unk>", "unknown_token_id", False),
    "pad": ("<pad>", "padding_token_id", False),
}
_SPELLED = SPECIAL_TOKENS | FUNCTION_TOKENS
CONTROL_TEXTS = _SPELLED | {name: text for name, (text, _, _) in _KEYED.items()}
# keys that name a further end of an answer: llama.cpp's end of turn, and the list of eos ids that
# Ollama's converter writes
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_ENDS = ("eos", "end_of_turn", "start_function_response")
_END_LIST = "tokenizer.ggml.eos_token_ids"
_MAX_ENDS = 64


@dataclass(frozen=True)
class TokenRoles:
    """``special_tokens`` by our name, the ids that end an answer, and what the keys said wrongly
    (sentences for people).
    """

    special_tokens: dict[str, int]
    end_tokens: tuple[int, ...]
    notes: tuple[str, ...]


def read_roles(meta: Metadata, path: Path, vocabulary: Skipped) -> TokenRoles:
    """Raises UnsupportedModel: an id outside the vocabulary, no begin or end of sequence."""
    found = find_strings(path, vocabulary, set(CONTROL_TEXTS.values()))
    tokens = {name: found[text] for name, text in _SPELLED.items() if text in found}
    highest = vocabulary.length - 1
    for key in meta.keys():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            meta.integer(key, 0, highest)
    notes: list[str] = []
    for name, (text, suffix, required) in _KEYED.items():
        key = f"tokenizer.ggml.{suffix}"
        spelled = found.get(text)
        if spelled is not None:
            tokens[name] = spelled
            notes += _keyed_note(meta, key, text, spelled)
        elif required or key in meta:
            tokens[name] = meta.integer(key, 0, highest)
    ends, end_notes = _ends(meta, tokens, highest)
    return TokenRoles(tokens, ends, (*notes, *end_notes))


def _keyed_note(meta: Metadata, key: str, text: str, spelled: int) -> list[str]:
    if key not in meta:
        return [f"{key} is missing; {text} is {spelled}"]
    value = meta.value(key)
    return [] if value == spelled else [f"{key} is {value}; taken is {text}, {spelled}"]


def _ends(
    meta: Metadata, tokens: dict[str, int], highest: int
) -> tuple[tuple[int, ...], list[str]]:
    """The ids that end an answer: eos, the end of a turn, FunctionGemma's begin of a result, and
    what the file's keys add.
    """
    usual = [tokens[name] for name in _ENDS if name in tokens]
    never = {id for name, id in tokens.items() if name not in _ENDS}
    named: list[tuple[str, int]] = []
    for suffix in _END_KEYS:
        key = f"tokenizer.ggml.{suffix}"
        if key in meta:
            named.append((key, meta.integer(key, 0, highest)))
    if _END_LIST in meta:
        named += [(_END_LIST, id) for id in meta.integers(_END_LIST, 0, highest, _MAX_ENDS)]
    ends, notes = list(usual), []
    for key, id in named:
        if id in never:
            role = next(name for name, other in tokens.items() if other == id)
            notes.append(f"{key} holds {id}, which is {role}: no end of an answer")
        elif id not in ends:
            ends.append(id)
            notes.append(f"an answer ends at token {id} too, which {key} names")
    return tuple(ends), notes
