"""What the generators of this folder share: the reference models in transformers, and a tokenizer.

Needs torch 2.13, transformers 5.23 or 5.24, timm 1.0 and the `dev` extra, but no torchvision:
transformers and timm import it for the vision towers, which never call it. Where it is missing,
empty modules stand in for it.
"""

from __future__ import annotations

import enum
import importlib.util
import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import torch
from checkpoints import REFERENCE, recipe, write_checkpoint

torch.set_grad_enabled(False)


class _Unused:
    """Whatever is asked of torchvision while modules are imported."""

    def __init__(self, *_, **__) -> None:
        pass


class _InterpolationMode(enum.Enum):
    NEAREST, NEAREST_EXACT, BILINEAR = "nearest", "nearest-exact", "bilinear"
    BICUBIC, BOX, HAMMING, LANCZOS = "bicubic", "box", "hamming", "lanczos"


class _Module(types.ModuleType):
    InterpolationMode = _InterpolationMode
    __version__ = "0.28.0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unused


def stand_in_for_torchvision() -> None:
    if importlib.util.find_spec("torchvision") is not None:
        return
    names = (
        *("", ".transforms", ".transforms.functional", ".transforms.v2"),
        *(".transforms.v2.functional", ".datasets", ".io", ".ops", ".ops.misc"),
        *(".models", ".models.feature_extraction"),
    )
    for name in ("torchvision" + name for name in names):
        module = _Module(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)


def load(name: str, folder: Path, *, with_vision: bool = False):
    """The model of recipe ``name`` (g3text, g3mm, g3n), float32, eager attention, written into
    ``folder`` first. ``with_vision`` adds the vision tower of g3n, which is a recipe of its own;
    without it the tower is random and answers to text and sound are the same.
    """
    stand_in_for_torchvision()
    import transformers

    kinds = {
        "g3text": transformers.Gemma3ForCausalLM,
        "g3mm": transformers.Gemma3ForConditionalGeneration,
        "g3n": transformers.Gemma3nForConditionalGeneration,
    }
    wanted = recipe(name)
    if with_vision and name == "g3n":
        wanted["tensors"] |= json.loads((REFERENCE / "g3n-vision.json").read_text())["tensors"]
    write_checkpoint(wanted, folder)
    kind = kinds[name]
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def encode(text: str) -> list[int]:
    """Ids of the small vocabulary beside the recipes."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(str(REFERENCE / "tokenizer.model")).encode(text)


def logits(model, ids, **media) -> np.ndarray:
    """[n_ids, n_vocab] float32."""
    out = model(input_ids=torch.tensor([list(ids)]), use_cache=False, **media)
    return out.logits[0].float().numpy()


def report(path: Path, answers: dict[str, np.ndarray]) -> None:
    """Save ``answers`` and say how far they are from those stored here."""
    with np.load(REFERENCE / path.name) as stored:
        assert stored.keys() == answers.keys(), (list(stored), list(answers))
        for key, value in answers.items():
            old = stored[key]
            assert old.shape == value.shape and old.dtype == value.dtype, (key, old.shape)
            same = np.array_equal(old, value)
            is_number = old.dtype.kind == "f"
            print(f"{key:24} {'equal' if same else 'differs'}", end=" ")
            print(f"by {np.abs(old - value).max():.2g}" if is_number and not same else "")
    np.savez_compressed(path, **answers)
