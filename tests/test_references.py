"""Every stored answer of the reference models has a script that makes it again."""

import ast

import pytest
from checkpoints import REFERENCE

STORED = sorted(path.name for path in REFERENCE.glob("*.npz"))


def docstring(script: str) -> str:
    return ast.get_docstring(ast.parse((REFERENCE / script).read_text())) or ""


def test_there_are_stored_answers():
    assert len(STORED) >= 7


@pytest.mark.parametrize("name", STORED)
def test_a_generator_names_each_stored_file(name):
    """NAME-KIND.npz comes from make_KIND.py, whose usage line lists NAME (or the file itself)."""
    recipe, kind = name.removesuffix(".npz").split("-")
    text = docstring(f"make_{kind}.py")
    usage = next(
        line for line in text.splitlines() if line.strip().startswith("PYTHONPATH=tests python")
    )
    assert f"tests/reference/make_{kind}.py" in usage
    assert f"NAME-{kind}.npz" in text or name in text
    assert recipe in usage.replace("|", " ").split() or name in text


def test_the_prompt_ids_have_a_generator():
    assert "prompt-ids.json was made" in docstring("make_prompt_ids.py")
