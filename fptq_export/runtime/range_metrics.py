"""For Prometheus: what the static layers of a model clip."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from fptq_export.range_outputs import name_of_layers
from fptq_export.runtime.ranges import RangeMonitor

__all__ = ["RangeCollector"]

_LABELS = ("model_name", "layers")


class RangeCollector(Collector):
    """Two counters for each row of a range monitor, read when they are scraped, so that a step counts none of them.

    Rows of experts are left out: the graph runs each expert on tokens that chose another one, which calibration did
    not, and `fptq-export monitor` does not judge them either.

    Args:
        model: Its name, a label.
        monitor: Of the model.
    """

    def __init__(self, model: str, monitor: RangeMonitor) -> None:
        self._model = model
        self._monitor = monitor
        rows = enumerate(monitor.outputs.rows)
        self._names = {index: name_of_layers(row.layers) for index, row in rows if row.expert is None}

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counters."""
        totals = self._monitor.totals
        for name, text, numbers in (
            ("values", "Values that static layers quantized", totals.values),
            ("saturated_values", "Of these, values beyond the static scale, which were clipped", totals.clipped),
        ):
            family = CounterMetricFamily(f"fptq_static_activation_{name}", text, labels=_LABELS)
            for index, layers in self._names.items():
                family.add_metric((self._model, layers), float(numbers[index]))
            yield family
