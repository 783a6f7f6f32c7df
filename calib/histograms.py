"""Histograms of magnitudes whose bins are powers of two wide, so that they can be merged without an error.

Bin i covers [i, i + 1) x 2^exponent. Merging neighbours in pairs doubles the width, and is what counting with the
doubled width would have given, because floor(floor(x) / 2) = floor(x / 2). So the histogram of all values does not
depend on how they were split into batches or machines, nor on the order in which the parts were merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["BINS", "Histogram", "exponent_for"]

BINS = 2048
"""As many as the published calibrators use; the largest value lies in the upper half of them."""
_SMALLEST_EXPONENT = -100
"""Far below any activation; 2^100 is still a float32."""


@dataclass(frozen=True)
class Histogram:
    """How often magnitudes occurred."""

    counts: NDArray[np.int64]
    """[BINS]."""
    exponent: int
    """Bins are 2^exponent wide."""

    @classmethod
    def from_values(cls, values: torch.Tensor, absmax: float) -> Histogram:
        """Count |x| of a float32 tensor of any shape, finite, whose largest magnitude is `absmax`."""
        exponent = exponent_for(absmax)
        bins = values.abs().mul_(2.0**-exponent).to(torch.int32).flatten()
        return cls(torch.bincount(bins, minlength=BINS).cpu().numpy(), exponent)

    @classmethod
    def empty(cls) -> Histogram:
        """No values: merged with another, it gives that other."""
        return cls(np.zeros(BINS, np.int64), _SMALLEST_EXPONENT)

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0**self.exponent

    @property
    def used(self) -> int:
        """Bins up to the last one that is not empty."""
        return int(self.counts.nonzero()[0].max(initial=-1)) + 1

    def with_exponent(self, exponent: int) -> Histogram:
        """The same values in bins that are as wide or wider.

        Raises:
            ValueError: The bins would be narrower.
        """
        if exponent < self.exponent:
            raise ValueError(f"bins of 2^{self.exponent} cannot be split into bins of 2^{exponent}")
        counts = np.zeros_like(self.counts)
        np.add.at(counts, np.arange(BINS) >> min(exponent - self.exponent, 62), self.counts)
        return Histogram(counts, exponent)

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of the values of both; exact."""
        exponent = max(self.exponent, other.exponent)
        counts = self.with_exponent(exponent).counts + other.with_exponent(exponent).counts
        return Histogram(counts, exponent)


def exponent_for(absmax: float) -> int:
    """The smallest exponent whose bins reach beyond `absmax`."""
    if absmax == 0.0:
        return _SMALLEST_EXPONENT
    _, power = math.frexp(absmax)  # absmax < 2^power
    return max(power - (BINS.bit_length() - 1), _SMALLEST_EXPONENT)
