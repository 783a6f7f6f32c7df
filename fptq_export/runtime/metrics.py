"""What Prometheus scrapes. Names are vLLM's with the prefix `fptq_`, so that its dashboards need a new prefix only."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from fptq_export.runtime import Observer
from fptq_export.runtime.range_metrics import RangeCollector
from fptq_export.runtime.ranges import RangeMonitor

__all__ = ["METRICS_MEDIA_TYPE", "Metrics"]

METRICS_MEDIA_TYPE = CONTENT_TYPE_LATEST
_OUTCOMES = ("stop", "length", "cancelled", "error")
_WAIT_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Bounds of waits for a first token: a short prompt on a GPU, up to a long queue on a CPU."""
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Bounds of the time between two tokens."""
_LABEL = ("model_name",)


class Metrics(Observer):
    """Counts what the scheduler tells, from its threads.

    Args:
        model: Its name, a label of every metric.
        with_process: Count memory, CPU time and open files of this process too.
        ranges: What the model's static layers clip; None where it does not say so, and there is no such metric.
    """

    def __init__(self, model: str, *, with_process: bool = True, ranges: RangeMonitor | None = None) -> None:
        self.registry = CollectorRegistry()
        """Everything that is counted."""
        if with_process:
            ProcessCollector(registry=self.registry)
        if ranges is not None:
            self.registry.register(RangeCollector(model, ranges))
        self._requests = Counter(
            "fptq_requests", "Texts that ended, by outcome", (*_LABEL, "outcome"), registry=self.registry
        )
        self._refused = Counter(
            "fptq_requests_refused", "Requests that were answered with an error", (*_LABEL, "status"),
            registry=self.registry,
        )  # fmt: skip
        self._model = model
        self._waiting = self._gauge("fptq_num_requests_waiting", "Texts in the queue")
        self._running = self._gauge("fptq_num_requests_running", "Texts that are being written")
        self._prompt_tokens = self._counter("fptq_prompt_tokens", "Tokens of prompts of texts that were begun")
        self._tokens = self._counter("fptq_generation_tokens", "Tokens that were written")
        self._queue_seconds = self._histogram("fptq_request_queue_time_seconds", "Time in the queue", _WAIT_SECONDS)
        self._first = self._histogram(
            "fptq_time_to_first_token_seconds", "From the request to its first token", _WAIT_SECONDS
        )
        self._next = self._histogram("fptq_inter_token_latency_seconds", "Between two tokens of a text", _TOKEN_SECONDS)
        for outcome in _OUTCOMES:  # from the start, so that rates have a zero to start from
            self._requests.labels(model, outcome)

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)

    def refused(self, status: int) -> None:
        """A request was answered with an error."""
        self._refused.labels(self._model, str(status)).inc()

    def queued(self, waiting: int, running: int) -> None:
        """So many texts wait, and so many run."""
        self._waiting.set(waiting)
        self._running.set(running)

    def started(self, queue_seconds: float, prompt_tokens: int) -> None:
        """A text left the queue."""
        self._queue_seconds.observe(queue_seconds)
        self._prompt_tokens.inc(prompt_tokens)

    def first_token(self, seconds: float) -> None:
        """The first token came."""
        self._first.observe(seconds)
        self._tokens.inc()

    def next_token(self, seconds: float) -> None:
        """Another token came."""
        self._next.observe(seconds)
        self._tokens.inc()

    def finished(self, outcome: str, tokens: int) -> None:
        """A text ended."""
        self._requests.labels(self._model, outcome).inc()

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, _LABEL, registry=self.registry).labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABEL, registry=self.registry).labels(self._model)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, _LABEL, buckets=bounds, registry=self.registry).labels(self._model)
