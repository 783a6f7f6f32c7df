"""Range calibrators: how much of an input one static INT8 scale covers.

A range below the largest magnitude clips outliers and gives everything else a finer step. Definitions are those of
NVIDIA's pytorch-quantization (`calib.HistogramCalibrator`) and Model Optimizer, on histograms of |x|:

* `percentile`: the smallest range that covers a share of the values (S. Migacz, 8-bit Inference with TensorRT, GTC
  2017; H. Wu et al., arXiv 2004.09602, section 5.2).
* `mse`: the range of least squared error between values and their INT8 codes times the scale.
* `entropy`: the range whose distribution over 128 levels is nearest to that of the clipped values (least
  Kullback-Leibler divergence; Migacz 2017).

`absmax` covers everything; it needs no histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from calib.histograms import Histogram
from fptq_export.numerics import INT8_MAX

__all__ = ["CalibratedRange", "RangeCalibrator", "calibrated_range"]

RangeCalibrator = Literal["absmax", "percentile", "mse", "entropy"]

_LEVELS = INT8_MAX + 1
"""Of one sign. A search starts where each level has a bin of its own."""
_CANDIDATES_AT_ONCE = 128
"""Bounds the memory of a search to 2 MiB an array."""


@dataclass(frozen=True)
class CalibratedRange:
    """What a calibrator chose."""

    absmax: float
    """Largest magnitude that is not clipped."""
    clipped: float
    """Share of the values in bins above it."""


def calibrated_range(
    histogram: Histogram, absmax: float, calibrator: RangeCalibrator, percentile: float = 99.99
) -> CalibratedRange:
    """Choose the range of a static scale.

    Args:
        histogram: Of |x|, over all tokens and channels.
        absmax: The largest |x|; never exceeded.
        calibrator: How to choose.
        percentile: Share of values to cover in percent, `percentile` only.

    Raises:
        ValueError: The histogram is empty, or the percentile is not in (0, 100].
    """
    if not histogram.used:
        raise ValueError("the histogram is empty")
    if not 0.0 < percentile <= 100.0:
        raise ValueError(f"percentile {percentile} is not in (0, 100]")
    if calibrator == "absmax" or absmax == 0.0:
        return CalibratedRange(absmax, 0.0)
    end = _percentile_end(histogram, percentile) if calibrator == "percentile" else _SEARCHES[calibrator](histogram)
    chosen = min(end * histogram.width, absmax)
    clipped = histogram.counts[int(np.ceil(end)) :].sum() / histogram.counts.sum()
    return CalibratedRange(float(chosen), float(clipped))


def _percentile_end(histogram: Histogram, percentile: float) -> float:
    """Upper edge, in bins, of the first bin up to which the share is reached."""
    cumulative = histogram.counts.cumsum()
    return float(np.searchsorted(cumulative, percentile / 100.0 * cumulative[-1]) + 1)


def _mse_end(histogram: Histogram) -> float:
    """The center of a bin, in bins, that gives the least squared error; values stand at the centers of their bins."""
    centers = np.arange(histogram.used) + 0.5
    counts = histogram.counts[: histogram.used].astype(np.float64)
    candidates = centers[_LEVELS:]
    if not candidates.size:
        return float(histogram.used)
    errors = []
    for start in range(0, candidates.size, _CANDIDATES_AT_ONCE):
        scales = candidates[start : start + _CANDIDATES_AT_ONCE, None] / INT8_MAX
        rounded = np.minimum(np.rint(centers / scales), INT8_MAX) * scales
        errors.append(np.square(rounded - centers) @ counts)
    return float(candidates[int(np.concatenate(errors).argmin())])


def _entropy_end(histogram: Histogram) -> float:
    """Upper edge, in bins, of least divergence; of equal ones the largest.

    Bin 0, which holds exact zeros, counts as much as bin 1.
    """
    counts = histogram.counts[: histogram.used].astype(np.float64)
    if counts.size <= _LEVELS:
        return float(counts.size)
    counts[0] = counts[1]
    ends = range(_LEVELS, counts.size + 1)
    divergences = np.array([_divergence(counts[:end], counts[end:].sum()) for end in ends])
    return float(ends[len(ends) - 1 - int(divergences[::-1].argmin())])


def _divergence(kept: NDArray[np.float64], clipped: float) -> float:
    """KL(clipped values || what 128 levels tell of them); infinite where the levels rule out what occurs."""
    reference = kept.copy()
    reference[-1] += clipped
    levels = np.arange(kept.size) * _LEVELS // kept.size
    filled = np.bincount(levels, weights=kept > 0, minlength=_LEVELS)
    sums = np.bincount(levels, weights=kept, minlength=_LEVELS)
    # A level's sum is spread over those of its bins that were not empty.
    told = np.where(kept > 0, (sums / np.maximum(filled, 1.0))[levels], 0.0)
    occurs = reference > 0
    if not told.any() or (told[occurs] == 0).any():
        return float("inf")
    p, q = reference[occurs] / reference.sum(), told[occurs] / told.sum()
    return float(p @ np.log(p / q))


_SEARCHES: Mapping[str, Callable[[Histogram], float]] = {"mse": _mse_end, "entropy": _entropy_end}
