"""Alert rules: a figure that stays above or below a limit becomes a line in the log, and a POST to
a program on this machine.

In: figures by name, now and then. Out: alerts that begin and end. Nothing leaves the machine.
"""

from __future__ import annotations

import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from edge_gemma.errors import UsageError
from edge_gemma.serve.guard.door import is_loopback

log = logging.getLogger("edge_gemma.serve")
_WEBHOOK_S = 5.0
# what a rule may look at; percentiles are those of the last requests
FIGURES = (
    *(f"{name}_p{p}" for name in ("ttft_s", "queue_s", "duration_s") for p in (50, 95, 99)),
    "time_per_token_s_p95",
    "real_time_factor_p95",
    "median_tok_s",
    "success_rate",
    "n_waiting",
    "memory_bytes",
    "memory_planned_ratio",
    "temperature_celsius",
    "quality_mean_logprob",
)


@dataclass(frozen=True)
class AlertRule:
    """Fires once its figure was ``above`` or ``below`` a limit for ``for_s`` seconds."""

    name: str
    figure: str
    above: float | None = None
    below: float | None = None
    for_s: float = 0.0
    webhook: str | None = None

    def __post_init__(self) -> None:
        if self.figure not in FIGURES:
            raise UsageError(
                f"alert {self.name}: no figure {self.figure!r}; there are {', '.join(FIGURES)}"
            )
        if (self.above is None) == (self.below is None):
            raise UsageError(f"alert {self.name}: give above or below, and not both")
        if self.webhook is not None:
            check_webhook(self.name, self.webhook)

    def broken(self, value: float) -> bool:
        if self.above is not None:
            return value > self.above
        return self.below is not None and value < self.below


def check_webhook(name: str, address: str) -> None:
    """Raises UsageError for an address that is not on this machine."""
    try:
        parts = urlsplit(address)
        fine = parts.scheme == "http" and is_loopback(parts.hostname or "") and bool(parts.port)
    except ValueError:
        fine = False
    if not fine:
        raise UsageError(
            f"alert {name}: the webhook is {address!r}; expected one on this machine, like "
            "http://127.0.0.1:9000/alert"
        )


@dataclass
class _State:
    since_s: float | None = None  # when the limit was passed
    firing: bool = False


class Alerts:
    """``check`` the figures every few seconds.

    >>> alerts = Alerts([AlertRule("slow", "ttft_s_p95", above=2.0)])
    >>> [event["state"] for event in alerts.check({"ttft_s_p95": 3.0})]
    ['firing']
    >>> alerts.check({"ttft_s_p95": 2.5}), alerts.firing
    ([], ['slow'])
    >>> [event["state"] for event in alerts.check({"ttft_s_p95": 1.0})]
    ['resolved']
    """

    def __init__(self, rules: Sequence[AlertRule], clock: Callable[[], float] = time.monotonic):
        self.rules, self._clock = rules, clock
        self._states = {rule.name: _State() for rule in rules}
        if len(self._states) != len(rules):
            raise UsageError("two alerts have one name")

    @property
    def firing(self) -> list[str]:
        return [name for name, state in self._states.items() if state.firing]

    def check(self, figures: Mapping[str, float | None]) -> list[dict[str, object]]:
        """Log and send what begins or ends now → those events. A figure that is not known changes
        nothing.
        """
        events = []
        for rule in self.rules:
            value = figures.get(rule.figure)
            if value is None or not self._changed(rule, value):
                continue
            state = "firing" if self._states[rule.name].firing else "resolved"
            event = {"alert": rule.name, "state": state, "figure": rule.figure, "value": value}
            limit = rule.above if rule.above is not None else rule.below
            side = "above" if rule.above is not None else "below"
            event |= {"limit": limit, "side": side}
            level = logging.WARNING if state == "firing" else logging.INFO
            log.log(level, "alert %s %s: %s is %g", rule.name, state, rule.figure, value)
            events.append(event)
            if rule.webhook is not None:
                _send(rule.name, rule.webhook, event)
        return events

    def _changed(self, rule: AlertRule, value: float) -> bool:
        state, now = self._states[rule.name], self._clock()
        if not rule.broken(value):
            state.since_s = None
            was, state.firing = state.firing, False
            return was
        state.since_s = now if state.since_s is None else state.since_s
        if state.firing or now - state.since_s < rule.for_s:
            return False
        state.firing = True
        return True


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead off this machine."""

    def redirect_request(self, *_: object) -> None:
        return None


def _send(name: str, address: str, event: Mapping[str, object]) -> None:
    request = urllib.request.Request(
        address, json.dumps(event).encode(), {"content-type": "application/json"}, method="POST"
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
    try:
        opener.open(request, timeout=_WEBHOOK_S).close()
    except (OSError, urllib.error.URLError) as error:
        log.warning("alert %s: its webhook did not take it: %s", name, error)
