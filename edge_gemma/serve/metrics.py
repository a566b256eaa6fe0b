"""What happens, for Prometheus: the only module that knows prometheus_client.

In: answers and requests as they end, a service to look at. Out: the text of ``/metrics``.
Histograms of time have the names of OpenTelemetry's conventions for generative AI
(gen_ai.server.*); tokens and queues the words of llama.cpp's server, with our own prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, Info
from prometheus_client import generate_latest as rendered
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_gemma.machine.footprint import footprint
from edge_gemma.machine.heat import temperatures, throttle_count, throttling
from edge_gemma.serve.answer import Answer, Observer
from edge_gemma.serve.visit import Visit
from edge_gemma.serve.watch.recent import figures_of

if TYPE_CHECKING:
    from edge_gemma.serve.service import Service
    from edge_gemma.serve.watch.quality import Quality

# OpenTelemetry's advice for gen_ai.server.time_to_first_token and its fellows, made longer for
# boards
TTFT_S = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
DURATION_S = (0.01, 0.04, 0.16, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84)
QUEUE_S = (0.001, 0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60)
FACTORS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 4)
ERROR_KINDS = {
    400: "bad_request",
    401: "no_token",
    403: "forbidden",
    404: "not_found",
    405: "not_found",
    408: "too_slow",
    413: "too_large",
    429: "too_many",
    499: "client_left",
    503: "closing",
}


class Metrics(Observer):
    """Counters and histograms since the start. ``service`` is looked at when it is scraped."""

    CONTENT_TYPE = CONTENT_TYPE_LATEST

    def __init__(self, quality: Quality | None = None) -> None:
        self.service: Service | None = None
        self.paths: frozenset[str] = frozenset()  # that are told apart
        self.quality = quality
        self._registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self._ttft = histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From the whole request to the first token.",
            TTFT_S,
        )
        self._per_token = histogram(
            "gen_ai_server_time_per_output_token_seconds", "After the first one.", PER_TOKEN_S
        )
        self._duration = histogram(
            "gen_ai_server_request_duration_seconds",
            "From the whole request to the last token.",
            DURATION_S,
        )
        self._queue = histogram("edge_gemma_queue_seconds", "Waited for a lane.", QUEUE_S)
        self._factor = histogram(
            "edge_gemma_speech_real_time_factor", "Seconds of work per second of speech.", FACTORS
        )
        self._prompt = counter("edge_gemma_prompt_tokens_total", "Of answers that ended.")
        self._reused = counter(
            "edge_gemma_prompt_tokens_reused_total", "Of them, in the KV cache already."
        )
        self._prompt_s = counter("edge_gemma_prompt_seconds_total", "Spent on prefill.")
        self._predicted = counter("edge_gemma_tokens_predicted_total", "Generated.")
        self._predicted_s = counter("edge_gemma_tokens_predicted_seconds_total", "Spent on it.")
        self._speech = counter("edge_gemma_speech_seconds_total", "Speech that was taken in.")
        self._dropped = counter(
            "edge_gemma_audio_dropped_seconds_total",
            "Speech that was taken in and got no answer: cancelled, failed.",
        )
        self._answers = counter("edge_gemma_answers_total", "By how they ended.", ("outcome",))
        self._requests = counter(
            "edge_gemma_http_requests_total", "By route and status.", ("route", "status")
        )
        self._errors = counter("edge_gemma_errors_total", "By kind.", ("kind",))
        self._rules = counter("edge_gemma_content_rules_total", "Verdicts, by rule.", ("rule",))
        self._info = Info("edge_gemma_build", "What is served.", registry=registry)
        for kind in sorted({*ERROR_KINDS.values(), "server", "answer_failed"}):
            self._errors.labels(kind)  # there from the beginning, so that rates begin at 0
        registry.register(_Now(self))

    def bind(self, service: Service, paths: frozenset[str]) -> None:
        """What is looked at from here on, and the paths of its routes."""
        from edge_gemma import __version__

        self.service, self.paths = service, paths
        manifest = service.model.bundle.manifest
        self._info.info({"version": __version__, "model": manifest.name, "family": manifest.family})

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return rendered(self._registry)

    def ended(self, answer: Answer) -> None:
        figures = figures_of(answer)
        self._answers.labels(figures.outcome).inc()
        for histogram, value in (
            (self._queue, figures.queue_s),
            (self._ttft, figures.ttft_s),
            (self._per_token, figures.time_per_token_s),
            (self._factor, figures.real_time_factor),
        ):
            if value is not None:
                histogram.observe(value)
        if figures.ttft_s is not None:
            self._duration.observe(figures.duration_s)
        self._predicted.inc(figures.completion_tokens)
        self._speech.inc(figures.audio_s)
        if figures.outcome in ("failed", "cancelled"):
            self._dropped.inc(figures.audio_s)
        last = answer.last
        if last is not None and last.usage is not None:
            self._prompt.inc(last.usage.prompt_tokens)
            self._reused.inc(last.usage.reused_tokens)
        if last is not None and last.timings is not None:
            self._prompt_s.inc(last.timings.prefill_s)
            self._predicted_s.inc(last.timings.decode_s)

    def visited(self, visit: Visit) -> None:
        route = visit.path if visit.path in self.paths else "other"
        status = 499 if visit.status is None else visit.status
        self._requests.labels(route, str(status)).inc()
        if status >= 400:
            self._errors.labels(ERROR_KINDS.get(status, "server")).inc()
        elif "failed" in visit.finish_reasons:
            self._errors.labels("answer_failed").inc()  # behind a status that was sent
        for rule in visit.verdicts:
            self._rules.labels(rule).inc()


class _Now(Collector):
    """What is read when somebody asks."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from _machine()
        if self._metrics.service is not None:
            yield from _service(self._metrics.service)
        if self._metrics.quality is not None:
            yield from _quality(self._metrics.quality)


def _gauge(name: str, text: str, value: float | None = None) -> GaugeMetricFamily:
    """Without a value: one that nothing is known of now."""
    family = GaugeMetricFamily(f"edge_gemma_{name}", text)
    if value is not None:
        family.add_metric([], value)
    return family


def _labelled(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"edge_gemma_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _machine() -> Iterator[Metric]:
    now = footprint()
    kinds = {"pss": now.pss_bytes, "anonymous": now.anon_bytes, "file": now.file_bytes}
    kinds |= {"rss": now.rss_bytes, "swap": now.swap_bytes}
    yield _labelled("memory_bytes", "Of this process, as the kernel counts it.", "kind", kinds)
    heat = temperatures()
    yield _labelled("temperature_celsius", "By thermal zone.", "zone", dict(heat))
    reasons = {reason: float(on) for reason, on in (throttling() or {}).items()}
    yield _labelled("throttled", "1 while the firmware slows the machine.", "reason", reasons)
    count = CounterMetricFamily(
        "edge_gemma_core_throttles", "Cores slowed down for heat since boot."
    )
    if (n_throttles := throttle_count()) is not None:
        count.add_metric([], n_throttles)
    yield count


def _service(service: Service) -> Iterator[Metric]:
    state, n_cached = service.health(), service.cached_tokens()
    n_all = service.n_lanes * service.n_ctx
    planned_bytes = service.model.plan.total_bytes
    yield _gauge("requests_processing", "Requests that have a lane.", state.n_running)
    yield _gauge("requests_deferred", "Requests that wait for a lane.", state.n_waiting)
    yield _gauge("requests_deferred_max", "As many may wait.", state.max_waiting)
    yield _gauge("slots", "Lanes.", state.n_lanes)
    yield _gauge("ready", "1 while requests are taken.", float(state.ready))
    yield _gauge("kv_cache_tokens", "Positions in the KV cache.", n_cached)
    yield _gauge("kv_cache_usage_ratio", "Of all positions.", n_cached / n_all)
    yield _gauge("memory_planned_bytes", "What the plan counted at its peak.", planned_bytes)


def _quality(quality: Quality) -> Iterator[Metric]:
    scored = CounterMetricFamily("edge_gemma_quality_samples", "Answers that were scored.")
    scored.add_metric([], quality.n_scored)
    yield scored
    for name, value in quality.means().items():
        yield _gauge(f"quality_{name}", "Mean of the last samples; see docs/serve.md.", value)
