"""Figures of inputs: what they count, and when they warn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.histograms import Histogram
from calib.stats import Stats
from fptq_export.activations.figures import OUTLIER_RATIO, LayerRange, inputs_from_stats
from fptq_export.activations.report import InputFigures

CHANNELS = 6
STATIC = LayerRange("static", static_range=4.0)


def stats_of(*values: NDArray[np.float32], paths: tuple[str, ...] = ("a",)) -> Stats:
    """Statistics of one array [tokens, channels] for each path, the last one for those that are left."""
    arrays = [*values, *[values[-1]] * (len(paths) - len(values))]
    return Stats(
        {path: np.abs(array).max(axis=0) for path, array in zip(paths, arrays, strict=True)},
        len(values[0]),
        "made up",
        {
            path: Histogram.from_values(torch.from_numpy(array), float(np.abs(array).max()))
            for path, array in zip(paths, arrays, strict=True)
        },
    )


def values(seed: int, largest: float = 4.0) -> NDArray[np.float32]:
    """[50, 6] whose largest magnitude, in channel 2, is exactly `largest`; all others are below 1."""
    array = np.random.default_rng(seed).uniform(-1.0, 1.0, (50, CHANNELS)).astype(np.float32)
    array[7, 2] = -largest
    return array


def figures_of(calibration: list[Stats], held_out: Stats, found: LayerRange = STATIC) -> InputFigures:
    (figures,) = inputs_from_stats(calibration, held_out, {"a": found}, max_range_ratio=1.2)
    return figures


def test_octaves_are_counts_of_powers_of_two() -> None:
    """Each magnitude is counted in its octave, by an independent count; the smallest ones together."""
    array = values(0) * np.logspace(-3, 0, 50, dtype=np.float32)[:, None]
    histogram = figures_of([stats_of(array), stats_of(array)], stats_of(array)).held_out_histogram
    magnitudes = np.abs(array).ravel().astype(np.float64)
    ends = 2.0 ** np.arange(histogram.exponent + 1, histogram.exponent + 1 + len(histogram.counts))
    below = [(magnitudes < end).sum() for end in ends]
    assert histogram.counts == tuple(np.diff([0, *below]))
    assert sum(histogram.counts) == array.size


def test_quantiles_are_ends_of_the_bins_that_reach_them() -> None:
    """Median and 99.9 % are at most one bin above the sorted value at that place, and never below it."""
    array = values(1)
    calibration = stats_of(array)
    figures = figures_of([calibration, calibration], calibration)
    ordered, width = np.sort(np.abs(array).ravel()), calibration.histograms["a"].width
    for share, found in ((0.5, figures.median), (0.999, figures.p999)):
        exact = ordered[int(np.ceil(share * array.size)) - 1]
        assert exact < found <= exact + width


def test_range_that_covers_held_out_text_is_not_warned_of() -> None:
    """The ratio is that of the magnitudes, and one below the limit is no warning."""
    figures = figures_of([stats_of(values(0)), stats_of(values(1))], stats_of(values(2, largest=4.5)))
    assert figures.held_out_ratio == 4.5 / 4.0
    assert figures.exceeding_channels == ()
    assert figures.warnings == ()


def test_range_that_held_out_text_exceeds_is_warned_of_with_its_channel() -> None:
    """The channel that leaves the calibrated range is named, and how far it goes."""
    figures = figures_of([stats_of(values(0)), stats_of(values(1))], stats_of(values(2, largest=6.0)))
    assert figures.held_out_ratio == 6.0 / 4.0
    assert figures.exceeding_channels == (2,)
    (warning,) = figures.warnings
    assert "1.5 x" in warning
    assert "channel 2" in warning


def test_excess_counts_after_equalization() -> None:
    """A small channel that doubles is an excess where equalization had made it as large as the others."""
    calibrated, seen = values(0), values(0)
    seen[:, 0] *= 2.0
    s = np.abs(calibrated).max(axis=0)
    found = LayerRange("lae_static", static_range=1.0, equalization=s)
    figures = figures_of([stats_of(calibrated), stats_of(calibrated)], stats_of(seen), found)
    assert figures.exceeding_channels == (0,)
    plain = figures_of([stats_of(calibrated), stats_of(calibrated)], stats_of(seen))
    assert plain.exceeding_channels == ()


def test_range_that_clips_calibration_itself_is_compared_with_what_calibration_reached() -> None:
    """A range calibrator clips on purpose: held-out text like the calibration text is no warning."""
    clipped = LayerRange("static", static_range=1.0, clips=True)
    figures = figures_of([stats_of(values(0)), stats_of(values(1))], stats_of(values(2)), clipped)
    assert figures.held_out_ratio == 1.0
    assert figures.warnings == ()


def test_range_below_what_calibration_reached_is_warned_of() -> None:
    """Without a range calibrator nothing is left out on purpose: such a scale is wrong."""
    narrow = LayerRange("static", static_range=1.0)
    figures = figures_of([stats_of(values(0)), stats_of(values(1))], stats_of(values(2)), narrow)
    assert figures.held_out_ratio == 4.0
    assert len(figures.warnings) == 1


def test_range_that_the_last_part_widens_is_warned_of() -> None:
    """Calibration that has not seen the range yet says so; a part in the middle is no reason."""
    low, high = stats_of(values(0, largest=2.0)), stats_of(values(1))
    growing = figures_of([low, high], high)
    assert any("still widens the range, 2 x" in warning for warning in growing.warnings)
    assert figures_of([high, low], high).warnings == ()


@pytest.mark.parametrize("activation", ["per_token", None])
def test_inputs_without_a_static_range_are_never_warned_of(activation: str | None) -> None:
    """Per-token and float inputs have no range that could be left."""
    found = LayerRange(activation)  # type: ignore[arg-type] # one of the literals
    figures = figures_of([stats_of(values(0, largest=2.0)), stats_of(values(1))], stats_of(values(2, 99.0)), found)
    assert figures.held_out_ratio is None
    assert figures.warnings == ()


def test_outlier_channels_reach_far_beyond_the_median_channel() -> None:
    """Only the channels above the ratio are listed, the largest first."""
    array = np.ones((4, 9), np.float32)
    array[0, 4], array[1, 1], array[2, 5] = OUTLIER_RATIO + 1.0, OUTLIER_RATIO + 2.0, OUTLIER_RATIO
    figures = figures_of([stats_of(array), stats_of(array)], stats_of(array))
    assert figures.outlier_channels == (1, 4)


def test_linears_that_read_one_tensor_are_one_input() -> None:
    """Q and k with equal statistics are one row; another tensor and another tier are others."""
    paths = ("q", "k", "o", "k2")
    same, other = values(0), values(1)
    parts = [stats_of(same, same, other, same, paths=paths)] * 2
    ranges = {"q": STATIC, "k": STATIC, "o": STATIC, "k2": LayerRange("per_token")}
    found = inputs_from_stats(parts, parts[0], ranges, max_range_ratio=1.2)
    assert [figures.linears for figures in found] == [("q", "k"), ("o",), ("k2",)]
