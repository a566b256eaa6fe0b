"""The examples in the docstrings, run: every module of the package is walked.

How to write an example
-----------------------
It runs in a working folder of its own, with what a user of the documentation would have there. A
thing is made only for an example that names it:

- ``"my-gemma"``: an installed text bundle (Gemma 3); ``"my-gemma-3n"``: one that hears;
  ``"my-gemma-3"``: one that sees; ``"my-embedding-gemma"``: one that embeds. Each is both in
  the store and a folder here, so ``edge_gemma.load("my-gemma")`` and
  ``Bundle.open("my-gemma")`` work. They are tiny and answer nonsense. ``"my-checkpoint"`` is the
  Hugging Face folder of my-gemma.
- ``"clip.wav"``: half a second of a tone, 48 kHz, two channels; ``"cat.png"``: a picture of
  64 × 48; ``"clip.gif"``: an animation of 3 frames, half a second each.
- ``model``: ``edge_gemma.load("my-gemma", n_ctx=512)``, unless the example makes one itself.

An example of a public name (``edge_gemma.__all__``) or of its methods sees what somebody has who
typed ``import numpy as np``, ``import edge_gemma`` and ``from edge_gemma import *``, nothing else:
it can be pasted. Other examples see the names of their module too.

``getfixture(name)`` (pytest's) still works in an example; nobody can paste it, so new ones do
without.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import edge_gemma

PACKAGES = ("edge_gemma", "edge_gemma.convert", "edge_gemma.benchmarks")
# what `pip install edge-gemma[dev]` leaves out: a module that needs one may be skipped
NOT_IN_DEV = {
    "cv2",
    "jiwer",
    "litert_lm",
    "litert_torch",
    "onnxruntime_genai",
    "picamera2",
    "timm",
    "torch",
    "transformers",
}
# name in an example → the fixture whose value is the path of that thing
BUNDLES = {
    "my-gemma": "tiny_bundle",
    "my-gemma-3n": "hearing_bundle",
    "my-gemma-3": "looking_bundle",
    "my-embedding-gemma": "embedding_bundle",
}
FILES = {
    "my-checkpoint": "tiny_checkpoint",
    "clip.wav": "sine_wav",
    "cat.png": "cat_png",
    "clip.gif": "clip_gif",
}
MAKES_A_MODEL = re.compile(r"\b(as model:|model =|def \w+\(model\))")


def _names(package: str) -> Iterator[str]:
    module = importlib.import_module(package)
    yield package
    for found in pkgutil.iter_modules(module.__path__):
        name = f"{package}.{found.name}"
        if found.ispkg:
            yield from _names(name)
        elif found.name != "__main__":  # importing it runs the program
            yield name


def modules() -> list[str]:
    """Every module of the package, wherever the folders of its subpackages lie."""
    return sorted({name for package in PACKAGES for name in _names(package)})


def import_or_skip(name: str) -> ModuleType:
    """The module. Only a foreign package that the development install leaves out may be missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in NOT_IN_DEV:
            raise
        pytest.skip(f"{name} needs {missing}, which is not installed")


def public_prefixes() -> set[str]:
    """Where the public names are defined, as doctest calls them."""
    public = (getattr(edge_gemma, name) for name in edge_gemma.__all__)
    return {
        f"{value.__module__}.{value.__qualname__}"
        for value in public
        if hasattr(value, "__qualname__")
    }


def is_public(example: doctest.DocTest) -> bool:
    parts = example.name.split(".")
    prefixes = public_prefixes()
    return any(".".join(parts[:n]) in prefixes for n in range(1, len(parts) + 1))


@pytest.fixture
def user(tmp_path, monkeypatch, request):
    """``prepare(example)``: put what it names into the working folder, and make its globals."""
    folder, home = tmp_path / "here", tmp_path / "home"
    folder.mkdir()
    (home / "bundles").mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EDGE_GEMMA_HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def link(path: Path, fixture: str) -> None:
        if not path.exists():
            value = request.getfixturevalue(fixture)
            path.symlink_to(getattr(value, "folder", value))  # a Bundle, or a path

    def prepare(example: doctest.DocTest) -> dict[str, object]:
        source = example.docstring or ""
        for name, fixture in BUNDLES.items():
            if f'"{name}"' in source:
                link(folder / name, fixture)
                link(home / "bundles" / name, fixture)
        for name, fixture in FILES.items():
            if f'"{name}"' in source:
                link(folder / name, fixture)
        typed: dict[str, object] = {"np": np, "edge_gemma": edge_gemma}
        typed |= {name: getattr(edge_gemma, name) for name in edge_gemma.__all__}
        code = "".join(line.source for line in example.examples)
        if re.search(r"\bmodel\b", code) and not MAKES_A_MODEL.search(code):
            typed["model"] = request.getfixturevalue("tiny_model")
        if "getfixture" in code:
            return example.globs | typed | {"getfixture": request.getfixturevalue}
        return typed if is_public(example) else example.globs | typed

    return prepare


@pytest.mark.parametrize("name", modules())
def test_examples(name, user):
    module = import_or_skip(name)
    for example in doctest.DocTestFinder(exclude_empty=True).find(module):
        if example.examples:
            example.globs = user(example)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            failed, _ = runner.run(example)
            assert not failed, example.name


def test_every_file_of_the_package_is_walked():
    walked = set(modules())
    for package in PACKAGES:
        root = Path(importlib.import_module(package).__path__[0])
        for path in root.rglob("*.py"):
            inside = path.relative_to(root).with_suffix("").parts
            parts = [part for part in inside if part != "__init__"]
            name = ".".join([package, *parts])
            assert name in walked or path.stem == "__main__", f"{path} has no __init__.py beside it"


def test_a_missing_module_of_ours_is_no_reason_to_skip(monkeypatch, tmp_path):
    (tmp_path / "needs_ours.py").write_text("import edge_gemma.no_such_module")
    (tmp_path / "needs_torch.py").write_text("raise ModuleNotFoundError('', name='torch.nn')")
    (tmp_path / "wrong_name.py").write_text("from edge_gemma.errors import NoSuchError")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="edge_gemma.no_such_module"):
        import_or_skip("needs_ours")
    with pytest.raises(ImportError, match="NoSuchError"):
        import_or_skip("wrong_name")
    with pytest.raises(pytest.skip.Exception, match="needs_torch needs torch"):
        import_or_skip("needs_torch")
