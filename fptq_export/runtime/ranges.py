"""What the static layers of a session have clipped since it was opened."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fptq_export.monitor.totals import RangeTotals
from fptq_export.range_outputs import RangeOutputs
from fptq_export.verify.range_output import RangeOutput

__all__ = ["RangeMonitor", "range_monitor_of"]


class RangeMonitor:
    """Pools the output `range_monitor` over all calls of a model; threads may add to it at once.

    Args:
        outputs: What the rows are.
    """

    def __init__(self, outputs: RangeOutputs) -> None:
        self.outputs = outputs
        self._totals = RangeTotals.none(len(outputs.rows))
        self._lock = threading.Lock()

    @property
    def totals(self) -> RangeTotals:
        """All calls so far, row by row: `monitor.run.compare` judges them."""
        return self._totals

    def add(self, rows: NDArray[np.float32]) -> None:
        """Add a call, [rows, 3]."""
        calls = rows[None].astype(np.float64)
        with self._lock:
            self._totals = self._totals.with_calls(calls)


def range_monitor_of(model: Any) -> RangeMonitor | None:
    """Pool what a `CausalSession` gives from now on; None where it does not say what it clips."""
    output = getattr(model, "range_output", None)
    if not isinstance(output, RangeOutput) or output.described is None:
        return None
    monitor = RangeMonitor(output.described)
    output.listen(monitor.add)
    return monitor
