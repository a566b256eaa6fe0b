"""The examples in the docstrings, run. ``getfixture(name)`` in an example is pytest's."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import numpy as np
import pytest


def modules() -> list[str]:
    """Every module, wherever the folders of the subpackages lie."""
    folders = {
        package: importlib.import_module(package).__path__
        for package in (
            "edge_gemma",
            "edge_gemma.convert",
            "edge_gemma.benchmarks",
            "edge_gemma.benchmarks.dev",
        )
    }
    return sorted(
        {
            f"{package}.{module.name}"
            for package, path in folders.items()
            for module in pkgutil.iter_modules(path)
            if not module.ispkg
        }
    )


@pytest.mark.parametrize("name", modules())
def test_examples(name, request):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))
    globs = {"getfixture": request.getfixturevalue, "np": np}
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=globs):
        if example.examples:
            failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
            assert not failed, example.name
