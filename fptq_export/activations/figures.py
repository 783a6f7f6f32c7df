"""From the statistics of calibration and held-out text to figures and warnings, one distinct input at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from calib.histograms import BINS, Histogram
from calib.stats import Stats
from fptq_export.activations.report import HistogramFigures, InputFigures
from fptq_export.policy import Activation

__all__ = ["OUTLIER_RATIO", "LayerRange", "inputs_from_stats", "merged"]

OUTLIER_RATIO = 10.0
"""An outlier channel reaches this many times as far as half of the channels do. One INT8 scale then leaves those 12 of
127 steps of a sign: less than 5 of the 8 bits."""

Vector = NDArray[np.float32]
LayerKey = tuple[bytes, Activation | None, float | None]
"""What the statistics of linears that read one tensor have in common, beside the maxima."""


@dataclass(frozen=True)
class LayerRange:
    """What a policy does with the input of a linear."""

    activation: Activation | None
    static_range: float | None = None
    """127 times its static scale; None without one."""
    equalization: Vector | None = None
    """s of its input, float32 [in]; None where it is not equalized."""
    clips: bool = False
    """Whether a range calibrator chose the range, which then leaves out a part of calibration on purpose."""


def merged(parts: Sequence[Stats]) -> Stats:
    """The statistics of all parts together; exact."""
    return reduce(Stats.merge, parts)


def inputs_from_stats(
    parts: Sequence[Stats], held_out: Stats, ranges: Mapping[str, LayerRange], max_range_ratio: float
) -> tuple[InputFigures, ...]:
    """Figures of each tensor that linears read.

    Linears read the same tensor when their statistics are equal to the last bit.

    Args:
        parts: Calibration, in parts, with histograms.
        held_out: Held-out text, with histograms.
        ranges: Linear path -> what is done with its input.
        max_range_ratio: Above it a warning is given.
    """
    whole = merged(parts)
    groups: dict[tuple[bytes, LayerKey], list[str]] = {}
    for path, absmax in whole.channel_absmax.items():
        groups.setdefault((absmax.tobytes(), _key(whole.histogram(path), ranges[path])), []).append(path)
    return tuple(_figures(tuple(paths), parts, whole, held_out, ranges, max_range_ratio) for paths in groups.values())


def _key(histogram: Histogram, found: LayerRange) -> LayerKey:
    return histogram.counts.tobytes(), found.activation, found.static_range


def _figures(
    paths: tuple[str, ...],
    parts: Sequence[Stats],
    whole: Stats,
    held_out: Stats,
    ranges: Mapping[str, LayerRange],
    max_range_ratio: float,
) -> InputFigures:
    path = paths[0]
    calibrated, seen = whole.channel_absmax[path], held_out.channel_absmax[path]
    ratios = _ratios(calibrated, seen, ranges[path])
    histogram = whole.histogram(path)
    part_absmax = tuple(part.absmax(path) for part in parts)
    return InputFigures(
        linears=paths,
        channels=calibrated.size,
        activation=ranges[path].activation,
        absmax=whole.absmax(path),
        median=_quantile(histogram, 0.5),
        p999=_quantile(histogram, 0.999),
        channel_median=float(np.median(calibrated)),
        outlier_channels=_largest(calibrated, OUTLIER_RATIO * float(np.median(calibrated))),
        part_absmax=part_absmax,
        held_out_absmax=held_out.absmax(path),
        static_range=ranges[path].static_range,
        held_out_ratio=None if ratios is None else float(ratios.max()),
        exceeding_channels=() if ratios is None else _largest(ratios, max_range_ratio),
        histogram=_octaves(histogram),
        held_out_histogram=_octaves(held_out.histogram(path)),
        warnings=_warnings(ratios, part_absmax, ranges[path].activation, max_range_ratio),
    )


def _ratios(calibrated: Vector, seen: Vector, found: LayerRange) -> NDArray[np.float64] | None:
    """How many times the calibrated range each channel's held-out maximum is, float64 [in]; None without a range.

    Where a range calibrator clips, calibration itself exceeds the range: then what it reached counts.
    """
    if found.static_range is None:
        return None
    s = 1.0 if found.equalization is None else found.equalization.astype(np.float64)
    reached = max(found.static_range, float((calibrated / s).max())) if found.clips else found.static_range
    return np.asarray(seen / s / reached, np.float64)


def _largest(values: NDArray[np.floating], above: float) -> tuple[int, ...]:
    """Indices of the values above a limit, largest first."""
    order = np.argsort(-values, kind="stable")
    return tuple(int(index) for index in order[: int((values > above).sum())])


def _quantile(histogram: Histogram, share: float) -> float:
    """End of the bin up to which a share of the magnitudes lies; 0 where there is none."""
    cumulative = histogram.counts.cumsum()
    if not cumulative[-1]:
        return 0.0
    return float(np.searchsorted(cumulative, share * cumulative[-1]) + 1) * histogram.width


def _octaves(histogram: Histogram) -> HistogramFigures:
    """Counts of powers of two; bin i of the histogram, [i, i + 1), lies in octave floor(log2 i)."""
    octave = np.floor(np.log2(np.maximum(np.arange(BINS), 0.5))).astype(np.int64) + 1  # bin 0 -> 0
    counts = np.bincount(octave, weights=histogram.counts.astype(np.float64), minlength=BINS.bit_length())
    return HistogramFigures(exponent=histogram.exponent - 1, counts=tuple(int(count) for count in counts))


def _warnings(
    ratios: NDArray[np.float64] | None,
    part_absmax: tuple[float, ...],
    activation: Activation | None,
    max_range_ratio: float,
) -> tuple[str, ...]:
    found = []
    if ratios is not None and ratios.max() > max_range_ratio:
        channels = int((ratios > max_range_ratio).sum())
        found.append(
            f"held-out text reaches {ratios.max():.3g} x the calibrated range (channel {int(ratios.argmax())},"
            f" {channels} channel{'s' * (channels > 1)} above {max_range_ratio:g} x): it is clipped there"
        )
    before = max(part_absmax[:-1])
    if activation in ("static", "lae_static") and part_absmax[-1] > max_range_ratio * before:
        grown = math.inf if before == 0.0 else part_absmax[-1] / before
        found.append(f"the last part of the calibration text still widens the range, {grown:.3g} x")
    return tuple(found)
