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
    "FunctionCall",
    "GenerationRequest",
    "Image",
    "ListenOptions",
    "Listener",
    "Message",
    "Microphone",
    "Model",
    "Plan",
    "PlanRequest",
    "Rows",
    "Sampling",
    "Service",
    "Session",
    "Timers",
    "Tokens",
    "ToolLoop",
    "Toolbox",
    "Video",
    "load",
    "plan_bundle",
    "recommend",
    "tool_schema",
    "transcribe",
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
