"""The metrics of a text model, on the page that Triton's server gives to Prometheus.

They are counted in this process and handed over once a second: a call to the server for every token and every bucket
would take longer than a token does on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry

__all__ = ["MetricsMirror"]

_SECONDS = 1.0
_CREATED = "_created"
"""Behind the names of samples that say when counting began; Triton's page has no such."""


class MetricsMirror:
    """Keeps Triton's metrics at the values of a registry.

    Histograms become counters of their buckets, their sum and their count, which is what Prometheus reads of them;
    Triton 24.10 knows no others.

    Args:
        registry: Counters, gauges and histograms; all of their labels are kept.
        backend: `triton_python_backend_utils`.
        labels: Added to each metric.
    """

    def __init__(self, registry: CollectorRegistry, backend: Any, labels: Mapping[str, str]) -> None:
        self._registry = registry
        self._backend = backend
        self._labels = dict(labels)
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
        self._given: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="fptq-metrics")
        self.update()
        self._thread.start()

    def update(self) -> None:
        """Hand over what has changed."""
        for name, kind, text, labels, value in self._samples():
            key = (name, tuple(sorted(labels.items())))
            if key not in self._metrics:
                self._metrics[key] = self._family(name, kind, text).Metric(labels=labels)
                self._given[key] = 0.0
            if kind == "gauge":
                self._metrics[key].set(value)
            elif value > self._given[key]:
                self._metrics[key].increment(value - self._given[key])
            self._given[key] = value

    def close(self) -> None:
        """Hand over the last values, and stop."""
        self._ended.set()
        self._thread.join()
        self.update()

    def _run(self) -> None:
        while not self._ended.wait(_SECONDS):
            self.update()

    def _samples(self) -> Iterator[tuple[str, str, str, dict[str, str], float]]:
        """Name, kind, description, labels and value of everything in the registry."""
        for family in self._registry.collect():
            kind = "gauge" if family.type == "gauge" else "counter"
            for sample in family.samples:
                if not sample.name.endswith(_CREATED):
                    labels = {**sample.labels, **self._labels}
                    yield sample.name, kind, family.documentation, labels, sample.value

    def _family(self, name: str, kind: str, text: str) -> Any:
        if name not in self._families:
            families = self._backend.MetricFamily
            number = families.GAUGE if kind == "gauge" else families.COUNTER
            self._families[name] = families(name=name, description=text, kind=number)
        return self._families[name]
