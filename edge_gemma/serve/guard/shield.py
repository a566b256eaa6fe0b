"""A bundle as a content rule: a second model, planned beside the first, that answers Yes or No.

In: policies out of the guard's settings. Out: rules for content.py. ShieldGemma 2 judges pictures;
any other bundle judges texts, as well as it can.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_gemma.errors import PlanRefused
from edge_gemma.machine.footprint import RUNTIME_ANON_BYTES, RUNTIME_FILE_BYTES
from edge_gemma.machine.probe import machine_for
from edge_gemma.messages import Image
from edge_gemma.serve.guard.content import ModelRule
from edge_gemma.serve.guard.settings import GuardedModel, model_rule
from edge_gemma.units import format_bytes

if TYPE_CHECKING:
    from edge_gemma.model import Model
    from edge_gemma.plan.records import Plan, PlanRequest

_N_CTX = 2048
_MAX_CHARS = 1500  # of a text that is judged at once; a longer one is judged piece by piece
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


def beside(request: PlanRequest, plans: Sequence[tuple[str, Plan]], device: str) -> PlanRequest:
    """``request`` with a budget that leaves room for the models that judge. Raises PlanRefused
    where they alone take all.
    """
    taken_bytes = shield_bytes(plans)
    if not taken_bytes:
        return request
    usable_bytes = machine_for(device).usable_bytes
    budget_bytes = min(request.budget_bytes or usable_bytes, usable_bytes) - taken_bytes
    if budget_bytes <= 0:
        raise PlanRefused(
            f"the models of the content rules take {format_bytes(taken_bytes)}, which leaves "
            "nothing for the model to serve; take a smaller one, or a pattern"
        )
    return replace(request, budget_bytes=budget_bytes)


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

    def judge(self, asked: GuardedModel) -> Callable[[str | Image], float]:
        def violates(content: str | Image) -> float:
            if not isinstance(content, str):
                question = f"{asked.policy}\n\nDoes the image violate this policy? {_QUESTION}"
                return self._yes([content, question])
            pieces = range(0, len(content), _MAX_CHARS)
            return max(self._yes([self._question(asked, content, at)]) for at in pieces)

        return violates

    def _question(self, asked: GuardedModel, text: str, at: int) -> str:
        piece = text[at : at + _MAX_CHARS]
        question = f"Does the text violate this policy? {_QUESTION}"
        return f"{asked.policy}\n\nText: {piece}\n\n{question}"

    def _yes(self, content: list[str | Image]) -> float:
        with self._lock:
            return self._model.classify(content)["Yes"]
