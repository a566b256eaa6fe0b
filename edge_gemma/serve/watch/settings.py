"""The watch as a TOML file, and what of it runs beside a service.

In: a file, or nothing. Out: :class:`Watch`: observers, routes, and a task that looks every few
seconds. docs/serve.md shows a whole file.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edge_gemma.errors import UsageError
from edge_gemma.machine.footprint import footprint
from edge_gemma.machine.heat import temperatures
from edge_gemma.serve.answer import Observer
from edge_gemma.serve.guard.settings import read_toml
from edge_gemma.serve.metrics import Metrics
from edge_gemma.serve.service import Service
from edge_gemma.serve.watch.alerts import AlertRule, Alerts
from edge_gemma.serve.watch.quality import Quality, read_references
from edge_gemma.serve.watch.recent import Recent

log = logging.getLogger("edge_gemma.serve")


class _Table(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A table of the file; a key that is not known is an error."""


class AlertTable(_Table):
    name: str
    figure: str
    above: float | None = None
    below: float | None = None
    for_seconds: float = 0.0
    webhook: str | None = None


class QualityTable(_Table):
    every: int
    references: str | None = None


class WatchTable(_Table):
    every_seconds: float = 10.0
    keep: int = 1000
    alert: list[AlertTable] = []
    quality: QualityTable | None = None


class Watch:
    """Metrics, the last requests, alerts and samples of quality around one service.

    Give ``observers`` to the service, then :meth:`bind` it, and have :meth:`run` run.
    """

    def __init__(
        self,
        *,
        n_kept: int = 1000,
        alerts: Sequence[AlertRule] = (),
        quality: Quality | None = None,
        every_s: float = 10.0,
    ):
        if n_kept < 1 or every_s <= 0:
            raise UsageError("keep and every_seconds: expected more than 0")
        self.recent, self.alerts, self.quality = Recent(n_kept), Alerts(alerts), quality
        self.metrics = Metrics(quality)
        self._every_s = every_s
        self._service: Service | None = None

    @classmethod
    def read(cls, path: Path) -> Watch:
        """Raises UsageError, which names what is wrong and where."""
        table = read_toml(path, WatchTable)
        rules = [
            AlertRule(
                each.name, each.figure, each.above, each.below, each.for_seconds, each.webhook
            )
            for each in table.alert
        ]
        quality = None
        if table.quality is not None:
            file = table.quality.references
            references = read_references(path.parent / file) if file else {}
            quality = Quality(table.quality.every, references)
        return cls(n_kept=table.keep, alerts=rules, quality=quality, every_s=table.every_seconds)

    @property
    def observers(self) -> list[Observer]:
        found: list[Observer] = [self.recent, self.metrics]
        return found if self.quality is None else [*found, self.quality]

    def bind(self, service: Service, routes: Sequence[Route]) -> None:
        self._service = service
        self.metrics.bind(service, frozenset(route.path for route in routes))

    async def run(self) -> None:
        """Look at the figures and score samples, until cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self._look()
            except Exception:  # what watches must not end what is watched, or itself
                log.exception("the watch failed; it goes on")

    async def _look(self) -> None:
        if self.alerts.rules:
            await asyncio.to_thread(lambda: self.alerts.check(self.figures()))
        if self.quality is not None and self._service is not None:
            await self.quality.score_one(self._service)

    def figures(self) -> dict[str, float | None]:
        """What alerts look at, by name; None: not known now."""
        found: dict[str, float | None] = {}
        summary = self.recent.summary()
        for name, value in summary.items():
            if isinstance(value, dict) and name != "outcomes":
                found |= {f"{name}_{p}": each for p, each in value.items()}
            elif isinstance(value, float):
                found[name] = value
        heat = temperatures()
        found["temperature_celsius"] = max(heat.values()) if heat else None
        found["memory_bytes"] = pss_bytes = float(footprint().pss_bytes)
        if self._service is not None:
            found["n_waiting"] = self._service.health().n_waiting
            found["memory_planned_ratio"] = pss_bytes / self._service.model.plan.total_bytes
        if self.quality is not None:
            found |= {f"quality_{name}": mean for name, mean in self.quality.means().items()}
        return found

    def stats(self) -> dict[str, object]:
        """What ``/stats`` gives."""
        now = footprint()
        planned = self._service.model.plan.total_bytes if self._service else None
        quality = None
        if self.quality is not None:
            quality = {"scored": self.quality.n_scored, **self.quality.means()}
        return {
            **self.recent.summary(),
            "memory": {
                "pss_bytes": now.pss_bytes,
                "anonymous_bytes": now.anon_bytes,
                "file_bytes": now.file_bytes,
                "planned_bytes": planned,
            },
            "alerts": self.alerts.firing,
            "quality": quality,
        }

    def routes(self) -> list[Route]:
        async def metrics(request: Request) -> Response:
            text = await asyncio.to_thread(self.metrics.text)
            return Response(text, headers={"content-type": Metrics.CONTENT_TYPE})

        async def stats(request: Request) -> Response:
            found = await asyncio.to_thread(self.stats)
            if "answers" in request.query_params:
                found["last_answers"] = self.recent.figures()
            return _json(found)

        async def slots(request: Request) -> Response:
            return _json(self._bound().slots())

        async def live(request: Request) -> Response:
            return _status("live", self._bound().health().live)

        async def ready(request: Request) -> Response:
            return _status("ready", self._bound().health().ready)

        return [
            Route("/metrics", metrics, methods=["GET"]),
            Route("/stats", stats, methods=["GET"]),
            Route("/slots", slots, methods=["GET"]),
            Route("/health/live", live, methods=["GET"]),
            Route("/health/ready", ready, methods=["GET"]),
        ]

    def _bound(self) -> Service:
        assert self._service is not None, "bind the watch first"
        return self._service


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _status(name: str, good: bool) -> Response:
    return _json({name: good}, 200 if good else 503)
