"""Histograms merge without an error, and calibrators choose the ranges that their definitions give."""

from __future__ import annotations

import math
from collections import Counter
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib.histograms import BINS, Histogram, exponent_for
from calib.ranges import RangeCalibrator, calibrated_range

magnitudes = st.floats(0, 2.0**30, width=32) | st.floats(0, 1, width=32) | st.sampled_from([0.0, 2.0**-140, 2.0**-20])
arrays = hnp.arrays(np.float32, st.integers(1, 40), elements=magnitudes)


def histogram_of(values: NDArray[np.float32]) -> Histogram:
    return Histogram.from_values(torch.from_numpy(values), float(np.abs(values).max()))


def heavy_tailed(seed: int = 0, outlier: float = 60.0) -> NDArray[np.float32]:
    """20000 normal values and one outlier."""
    values = np.random.default_rng(seed).standard_normal(20000).astype(np.float32)
    values[7] = outlier
    return values


@settings(max_examples=50)
@given(arrays)
def test_values_are_counted_where_they_lie(values: NDArray[np.float32]) -> None:
    """Bin i covers [i, i + 1) widths, both signs; the largest value lies in the upper half, unless it is tiny."""
    histogram = histogram_of(np.where(np.arange(values.size) % 2, values, -values))
    expected = Counter(math.floor(float(value) / histogram.width) for value in values)
    assert {index: count for index, count in enumerate(histogram.counts.tolist()) if count} == expected
    assert histogram.used <= BINS
    assert histogram.used > BINS // 2 or histogram.exponent == exponent_for(0.0)


@settings(max_examples=40)
@given(st.lists(arrays, min_size=2, max_size=4), st.randoms())
def test_merging_is_counting_everything_at_once(parts: list[NDArray[np.float32]], random: Any) -> None:
    """Bit for bit, in whatever order and grouping: so batches and machines do not change a range."""
    whole = histogram_of(np.concatenate(parts))
    histograms = [histogram_of(part) for part in parts]
    random.shuffle(histograms)
    left = reduce(Histogram.merge, histograms)
    right = reduce(lambda a, b: b.merge(a), reversed(histograms))
    for merged in (left, right):
        assert merged.exponent == whole.exponent
        assert np.array_equal(merged.counts, whole.counts)


def test_bins_are_never_split() -> None:
    """A histogram cannot be made finer than it was counted."""
    with pytest.raises(ValueError, match="cannot be split"):
        histogram_of(np.ones(3, np.float32)).with_exponent(-30)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99])
def test_percentile_covers_its_share(percentile: float) -> None:
    """At least the share lies inside, and less without the last bin."""
    values = heavy_tailed()
    histogram = histogram_of(values)
    chosen = calibrated_range(histogram, 60.0, "percentile", percentile)
    inside = [(np.abs(values) < edge).mean() for edge in (chosen.absmax - histogram.width, chosen.absmax)]
    assert inside[0] < percentile / 100 <= inside[1]
    assert chosen.clipped == pytest.approx(1 - inside[1], abs=1e-12)  # one division and one difference in float64


def test_whole_percentile_is_absmax() -> None:
    """100 % clips nothing, and the range is the measured one, not the edge of its bin."""
    chosen = calibrated_range(histogram_of(heavy_tailed()), 60.0, "percentile", 100.0)
    assert (chosen.absmax, chosen.clipped) == (60.0, 0.0)


def test_mse_is_the_least_error_of_all_candidates() -> None:
    """An independent search over the values themselves finds no range that is better by more than the bins explain.

    A value is at most half a bin from the center that stands for it. So the root of a mean squared error is off by at
    most half a bin for each candidate: one bin in all.
    """
    values = np.abs(heavy_tailed()).astype(np.float64)
    histogram = histogram_of(heavy_tailed())

    def root_error(absmax: float) -> float:
        scale = absmax / 127
        return float(np.sqrt(np.mean((np.minimum(np.rint(values / scale), 127) * scale - values) ** 2)))

    chosen = calibrated_range(histogram, 60.0, "mse")
    best = min(root_error(absmax) for absmax in np.linspace(4.0, 60.0, 300))
    assert root_error(chosen.absmax) <= best + histogram.width
    assert chosen.absmax < 60.0
    assert chosen.clipped == 1 / values.size


def entropy_by_definition(histogram: Histogram) -> float:
    """The published loop, written out value by value: the range of least divergence, of equal ones the last."""
    counts = [int(count) for count in histogram.counts[: histogram.used]]
    counts[0] = counts[1]
    best, chosen = math.inf, 0
    for end in range(128, len(counts) + 1):
        reference = [float(count) for count in counts[:end]]
        reference[-1] += sum(counts[end:])
        edges = [math.ceil(end * level / 128) for level in range(129)]
        told: list[float] = []
        for low, high in pairwise(edges):
            occurring = [count for count in counts[low:high] if count]
            told += [sum(occurring) / len(occurring) if count else 0.0 for count in counts[low:high]]
        divergence = 0.0
        for p, q in zip(reference, told, strict=True):
            if p and not q:
                divergence = math.inf
            elif p:
                divergence += p / sum(reference) * math.log(p / sum(reference) * sum(told) / q)
        if divergence <= best:
            best, chosen = divergence, end
    return chosen * histogram.width


def test_entropy_is_its_definition() -> None:
    """The search agrees with a loop over levels and bins."""
    counts = np.zeros(BINS, np.int64)
    values = np.abs(np.random.default_rng(3).standard_normal(4000)) * 60
    counts[:400] = np.bincount(np.minimum(values, 399).astype(np.int64), minlength=400)
    histogram = Histogram(counts, -4)
    chosen = calibrated_range(histogram, histogram.used * histogram.width, "entropy")
    assert chosen.absmax == entropy_by_definition(histogram)
    assert 0 < chosen.clipped < 1


@pytest.mark.parametrize("calibrator", ["absmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("values", [[0.0], [3.0], [-2.0, 2.0], [2.0**-140], [1e30, 1e-30], [0.1, 0.2, 0.3]])
def test_few_values_have_a_usable_range(calibrator: RangeCalibrator, values: list[float]) -> None:
    """Zeros, constants, denormals and lone outliers: never above the largest magnitude, positive where that is."""
    array = np.array(values, np.float32)
    absmax = float(np.abs(array).max())
    chosen = calibrated_range(histogram_of(array), absmax, calibrator)
    assert 0.0 <= chosen.absmax <= absmax
    assert (chosen.absmax > 0) == (absmax > 0)
    assert 0.0 <= chosen.clipped < 1.0


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.5, math.nan])
def test_percentiles_outside_are_refused(percentile: float) -> None:
    """A share of nothing, or of more than everything, is no range."""
    with pytest.raises(ValueError, match="percentile"):
        calibrated_range(histogram_of(np.ones(3, np.float32)), 1.0, "percentile", percentile)


def test_empty_histograms_are_refused() -> None:
    """Nothing was measured: there is no range."""
    with pytest.raises(ValueError, match="empty"):
        calibrated_range(Histogram(np.zeros(BINS, np.int64), 0), 1.0, "mse")
