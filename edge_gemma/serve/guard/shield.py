"""A bundle as a content rule: a second model, planned beside the first, that answers Yes or No.

In: policies out of the guard's settings. Out: rules for content.py. ShieldGemma 2 judges pictures;
any other bundle judges texts, as well as it can.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from edge_gemma.errors import EdgeGemmaError
from edge_gemma.machine.footprint import RUNTIME_ANON_BYTES, RUNTIME_FILE_BYTES
from edge_gemma.messages import Image
from edge_gemma.serve.guard.content import ModelRule
from edge_gemma.serve.guard.settings import GuardedModel, model_rule

if TYPE_CHECKING:
    from edge_gemma.model import Model
    from edge_gemma.plan.records import Plan, PlanRequest

_N_CTX = 2048  # of what is judged; more is cut
_MAX_CHARS = 6000  # fewer than so many tokens in most languages
_QUESTION = "Your answer must start with 'Yes' or 'No'."


def plan_shields(
    models: Sequence[GuardedModel], device: str, threads: int | None
) -> list[tuple[str, Plan]]:
    """Bundle and plan of each model that judges; each bundle once. Raises PlanRefused."""
    from edge_gemma.model import plan_bundle

    names = dict.fromkeys(model.bundle for model in models)
    request = _request(threads)
    return [(name, plan_bundle(name, device=device, request=request).require()) for name in names]


def shield_bytes(plans: Sequence[tuple[str, Plan]]) -> int:
    """What they take beside another model: Python and the libraries are there once."""
    runtime_bytes = RUNTIME_ANON_BYTES + RUNTIME_FILE_BYTES
    return sum(max(0, plan.total_bytes - runtime_bytes) for _, plan in plans)


@contextmanager
def opened_shields(
    models: Sequence[GuardedModel], device: str, threads: int | None
) -> Iterator[list[ModelRule]]:
    """The rules, while the bundles behind them are loaded. Raises PlanRefused, BundleError."""
    from edge_gemma.model import load

    with ExitStack() as stack:
        loaded: dict[str, _Shield] = {}
        rules = []
        for asked in models:
            if asked.bundle not in loaded:
                model = load(asked.bundle, device=device, request=_request(threads))
                loaded[asked.bundle] = _Shield(stack.enter_context(model))
            shield = loaded[asked.bundle]
            sees = shield.sees
            rules.append(model_rule(asked, shield.judge(asked), texts=not sees, pictures=sees))
        yield rules


def _request(threads: int | None) -> PlanRequest:
    from edge_gemma.plan.records import PlanRequest

    return PlanRequest(n_ctx=_N_CTX, n_threads=threads, senses=None)


class _Shield:
    """One loaded bundle; answers one question at a time."""

    def __init__(self, model: Model):
        self._model, self._lock = model, threading.Lock()
        self.sees = model.bundle.manifest.vision is not None

    def judge(self, asked: GuardedModel):
        def violates(content: str | Image) -> float:
            if isinstance(content, str):
                question = f"{asked.policy}\n\nText: {content[:_MAX_CHARS]}\n\nDoes the text "
                parts = [f"{question}violate this policy? {_QUESTION}"]
            else:
                question = f"{asked.policy}\n\nDoes the image violate this policy? {_QUESTION}"
                parts = [content, question]
            with self._lock:
                return self._model.classify(parts)["Yes"]

        return violates
