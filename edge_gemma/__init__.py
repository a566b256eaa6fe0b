"""Gemma 3n and small Gemma 3, offline, inside a planned memory budget.

The names below are the public ones; everything else may move. Importing this package loads nothing
else: no library, no device, no thread.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "Audio": "messages",
    "Bundle": "bundles.folder",
    "Chat": "conversation.chat",
    "Chunk": "conversation.stream",
    "EdgeGemmaError": "errors",
    "FunctionCall": "messages",
    "GenerationRequest": "serve.answer",
    "Image": "messages",
    "ListenOptions": "conversation.transcription",
    "Listener": "conversation.listener",
    "Message": "messages",
    "Microphone": "hearing.devices",
    "Model": "model",
    "Plan": "plan.records",
    "PlanRequest": "plan.records",
    "Rows": "spans",
    "Sampling": "options",
    "Service": "serve.service",
    "Session": "conversation.session",
    "Timers": "assistant.timers",
    "Tokens": "spans",
    "ToolLoop": "assistant.tool_loop",
    "Toolbox": "assistant.tools",
    "Video": "seeing.video",
    "load": "model",
    "plan_bundle": "model",
    "recommend": "recommendation",
    "tool_schema": "prompts.calls",
    "transcribe": "conversation.transcription",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
