"""The front door: the public names, and that walking in costs nothing."""

import subprocess
import sys

import edge_gemma

NAMES = [
    "Audio",
    "Bundle",
    "Chat",
    "Chunk",
    "EdgeGemmaError",
    "Image",
    "Model",
    "Picture",
    "PlanRequest",
    "Rows",
    "Sampling",
    "Session",
    "Tokens",
    "Video",
    "load",
]


def test_exported_names():
    assert edge_gemma.__all__ == NAMES
    assert all(getattr(edge_gemma, name) is not None for name in NAMES)


def test_importing_loads_nothing_and_starts_nothing():
    code = (
        "import sys, threading, logging; before = logging.getLogger().handlers[:]; import "
        "edge_gemma\n"
        "heavy = {'numpy', 'llama_cpp', 'onnxruntime', 'sounddevice', 'huggingface_hub', "
        "'jinja2', 'typer', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy; assert threading.active_count() == 1; assert "
        "logging.getLogger().handlers == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_walls_import_foreign_libraries():
    """One module per foreign library."""
    import re
    from pathlib import Path

    allowed = {
        "llama_cpp": {"engines/llama/library.py", "engines/llama/grammar.py"},
        "onnxruntime": {"engines/onnx/runtime.py"},
        "sounddevice": {"hearing/devices.py"},
        "huggingface_hub": {"store/hub.py"},
    }
    found: dict[str, set[str]] = {library: set() for library in allowed}
    package = Path(edge_gemma.__file__).parent
    for path in package.rglob("*.py"):
        for library in allowed:
            if re.search(rf"^\s*(import|from) {library}\b", path.read_text(), re.M):
                found[library].add(path.relative_to(package).as_posix())
    for library, names in found.items():
        assert names <= allowed[library], (library, names)
