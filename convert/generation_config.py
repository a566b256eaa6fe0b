"""What ends an answer and how it is sampled, from ``generation_config.json`` and ``config.json``.

In: a checkpoint's folder, its config and vocabulary. Out: the ids that end an answer and the
authors' sampling defaults. This module samples nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_gemma.bundles.manifest import SamplingDefaults, usable_sampling
from edge_gemma.convert.checkpoint import read_json
from edge_gemma.convert.vocabulary import Vocabulary, configured_ids

FILE = "generation_config.json"
# our name → transformers'
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
}


@dataclass(frozen=True)
class Answers:
    end_tokens: tuple[int, ...]
    sampling: SamplingDefaults | None
    notes: tuple[str, ...] = ()


def read_answers(folder: Path, config: dict, vocabulary: Vocabulary) -> Answers:
    """Ends: eos, ``<end_of_turn>``, and every id that either file lists. Sampling: what
    ``generation_config.json`` says; None where it says nothing. Raises CheckpointError (no JSON).
    """
    path = folder / FILE
    generation = read_json(path) if path.is_file() else {}
    notes: list[str] = []
    ends = [vocabulary.special[name] for name in ("eos", "eot") if name in vocabulary.special]
    if b"<eos>" in vocabulary.tokens:  # whatever another token was named eos
        ends.append(vocabulary.tokens.index(b"<eos>"))
    for source in (generation, config):
        for i in configured_ids(source, "eos_token_id"):
            if 0 <= i < len(vocabulary.tokens):
                ends.append(i)
            else:
                notes.append(f"the end token {i} has no row in the table; ignored")
    sampling, refused = _sampling(generation)
    return Answers(tuple(dict.fromkeys(ends)), sampling, tuple(dict.fromkeys([*notes, *refused])))


def _sampling(generation: dict) -> tuple[SamplingDefaults | None, list[str]]:
    found: dict[str, int | float] = {}
    notes = []
    for name, theirs in _SAMPLING.items():
        value = generation.get(theirs)
        is_count = name == "top_k"
        if value is None:
            continue
        if usable_sampling(name, value) and not (is_count and value != int(value)):
            found[name] = int(value) if is_count else float(value)
        else:
            notes.append(f"{FILE}: {theirs} is {value!r}, which cannot be; ignored")
    if generation.get("do_sample") is False:
        found["temperature"] = 0.0  # greedy, whatever else is there
    if not found:
        return None, notes
    return msgspec.convert(found, SamplingDefaults), notes
