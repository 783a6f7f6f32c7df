"""Formulas of s: values by hand, and no input that makes s zero, negative or not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib.equalizers import LARGEST_SCALE, SiteStatistics, normalised, scale_from_formula
from fptq_export.policy import SiteEqualization

FLOAT32_UNIT = 2.0**-24
"""Largest relative error of one float32 rounding; the formulas are float64, rounded once."""
ROUNDED_ONCE = FLOAT32_UNIT + 16 * 2.0**-53
"""That rounding, and some 16 float64 operations before it."""

magnitudes = hnp.arrays(np.float32, 8, elements=st.floats(0.0, 2.0**100, width=32))
exponents = st.floats(0.0, 1.0)

Vector = NDArray[np.float32]


def entries(alpha: float, first: float, second: float) -> list[SiteEqualization]:
    return [
        SiteEqualization(method="lae"),
        SiteEqualization(method="smoothquant", alpha=alpha),
        SiteEqualization(method="awq", ratio=first),
        SiteEqualization(method="search", lae_exponent=first, rms_exponent=second),
    ]


@given(magnitudes, magnitudes, magnitudes, exponents, exponents, exponents)
def test_scales_are_usable_whatever_was_measured(
    absmax: Vector, weight: Vector, rms: Vector, alpha: float, first: float, second: float
) -> None:
    """Dead channels, zero weights and huge outliers give finite positive float32 scales with every method."""
    for entry in entries(alpha, first, second):
        s = scale_from_formula(entry, SiteStatistics(absmax, weight, rms))
        assert s.dtype == np.float32
        assert np.isfinite(s).all()
        assert (s > 0).all(), entry


def test_smoothquant_by_hand() -> None:
    """Alpha 0.5 of m = 16, w = 4 is 4 / 2; alpha 1 is m; alpha 0 is 1 / w; a floor of 1e-5 replaces 0."""
    statistics = SiteStatistics(np.array([16.0, 0.0], np.float32), np.array([4.0, 4.0], np.float32))
    for alpha, expected in ((0.5, [2.0, np.sqrt(1e-5) / 2.0]), (1.0, [16.0, 1e-5]), (0.0, [0.25, 0.25])):
        s = scale_from_formula(SiteEqualization(method="smoothquant", alpha=alpha), statistics)
        np.testing.assert_allclose(s, expected, rtol=ROUNDED_ONCE, atol=0.0)


def test_awq_by_hand() -> None:
    """Rms 1 and 16 at ratio 0.5 are 1 and 4, centred to 1/2 and 2; ratio 0 changes nothing."""
    statistics = SiteStatistics(np.ones(2, np.float32), rms=np.array([1.0, 16.0], np.float32))
    half, none = (scale_from_formula(SiteEqualization(method="awq", ratio=r), statistics) for r in (0.5, 0.0))
    np.testing.assert_allclose(half, [0.5, 2.0], rtol=ROUNDED_ONCE, atol=0.0)
    assert none.tolist() == [1.0, 1.0]


def test_search_by_hand() -> None:
    """Maxima 2 and 6 have LAE scales 1 and 2; 1^2 x rms 1 and 2^2 x rms 4 are centred to 1/4 and 4."""
    statistics = SiteStatistics(np.array([2.0, 6.0], np.float32), rms=np.array([1.0, 4.0], np.float32))
    entry = SiteEqualization(method="search", lae_exponent=2.0, rms_exponent=1.0)
    np.testing.assert_allclose(scale_from_formula(entry, statistics), [0.25, 4.0], rtol=ROUNDED_ONCE, atol=0.0)


def test_dead_channels_weigh_least() -> None:
    """A channel that was always 0 gets the smallest s of the others: its weights do not widen the group scale."""
    assert normalised(np.array([0.0, 1.0, 16.0])).tolist() == [0.25, 0.25, 4.0]
    assert normalised(np.zeros(3)).tolist() == [1.0, 1.0, 1.0]


@given(hnp.arrays(np.float64, 6, elements=st.floats(0.0, 1e300)))
def test_normalised_scales_stay_clear_of_float16_limits(scale: NDArray[np.float64]) -> None:
    """Whatever the spread, folded weights change by a factor of a thousand at most."""
    s = normalised(scale)
    assert (s <= LARGEST_SCALE).all()
    assert (s >= 1.0 / LARGEST_SCALE).all()


@pytest.mark.parametrize("factor", [0.125, 8.0])
def test_a_common_factor_is_normalised_away(factor: float) -> None:
    """Twice the input everywhere is the same question: awq and the search give the same s."""
    rms = np.array([0.5, 2.0, 8.0], np.float32)
    ratio = SiteEqualization(method="awq", ratio=1.0)
    before, after = (scale_from_formula(ratio, SiteStatistics(rms, rms=rms * f)) for f in (1.0, factor))
    assert np.array_equal(before, after)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "smoothquant"}, "smoothquant needs alpha"),
        ({"method": "smoothquant", "alpha": 1.5}, "less than or equal to 1"),
        ({"method": "awq", "ratio": -0.1}, "greater than or equal to 0"),
        ({"method": "awq", "ratio": 0.5, "alpha": 0.5}, "awq has no alpha"),
        ({"method": "search", "lae_exponent": 0.5}, "search needs rms_exponent"),
        ({"method": "lae", "ratio": 0.5}, "lae has no ratio"),
        ({"method": "omniquant"}, "Input should be"),
    ],
)
def test_entries_with_other_parameters_are_refused(fields: dict[str, Any], message: str) -> None:
    """A parameter of another method would be ignored silently: it is refused, and a missing one too."""
    with pytest.raises(ValueError, match=message):
        SiteEqualization(**fields)


@pytest.mark.parametrize("method", ["smoothquant", "awq", "search"])
def test_a_missing_statistic_is_an_error(method: str) -> None:
    """Nothing is made up for weights or root mean squares that were not measured."""
    entry = next(entry for entry in entries(0.5, 0.5, 0.5) if entry.method == method)
    with pytest.raises(ValueError, match="it needs the"):
        scale_from_formula(entry, SiteStatistics(np.ones(2, np.float32)))
