"""Many calls of the output `range_monitor` as one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["RangeTotals"]

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class RangeTotals:
    """Sums over calls; every array is float64 [rows]."""

    calls: int
    clipped: Numbers
    """Values that were clipped."""
    values: Numbers
    """Values in all."""
    worst_rate: Numbers
    """Largest saturation rate of one call."""
    peak: Numbers
    """Largest |x| over 127 scale; infinite where a value was infinite or NaN."""

    @classmethod
    def none(cls, rows: int) -> RangeTotals:
        """Before the first call."""
        return cls(0, *(np.zeros(rows) for _ in range(4)))

    def with_calls(self, calls: Numbers) -> RangeTotals:
        """Add calls, float64 [calls, rows, 3]."""
        rate, peak, values = np.moveaxis(calls, -1, 0)
        finite = np.nan_to_num(peak, nan=np.inf, posinf=np.inf)
        return RangeTotals(
            calls=self.calls + len(calls),
            clipped=self.clipped + (rate * values).sum(axis=0),
            values=self.values + values.sum(axis=0),
            worst_rate=np.maximum(self.worst_rate, rate.max(axis=0, initial=0.0)),
            peak=np.maximum(self.peak, finite.max(axis=0, initial=0.0)),
        )

    @property
    def saturation_rate(self) -> Numbers:
        """Share of all values that were clipped; each call counts by its values."""
        return self.clipped / self.values
