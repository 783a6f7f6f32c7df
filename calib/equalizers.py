"""Formulas of equalization scales: what a fold site was measured to hold becomes s, float32 [channels].

| method | source |
|---|---|
| `lae` | FPTQ, arXiv 2308.15987 |
| `smoothquant` | arXiv 2211.10438, equation 4, with the floor of 1e-5 of its code |
| `awq` | arXiv 2306.00978, section 3.2; the mean of a magnitude is taken as its root mean square, which diag H holds |
| `search` | our own: a power of the LAE scale times a power of the root mean square |

One factor for all channels changes neither codes nor errors. `awq` and `search` choose it so that the smallest and the
largest s are reciprocals, and keep both within `LARGEST_SCALE`: the folded weights then stay clear of FP16's limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fptq_export import numerics
from fptq_export.numerics import MIN_EQUALIZATION
from fptq_export.policy import EqualizationMethod, SiteEqualization

__all__ = ["LARGEST_SCALE", "NEEDS_RMS", "SiteStatistics", "normalised", "scale_from_formula"]

LARGEST_SCALE = 1000.0
"""Of a normalised s; the smallest is its reciprocal."""
NEEDS_RMS: frozenset[EqualizationMethod] = frozenset({"awq", "search"})

Vector = NDArray[np.float32]
Exact = NDArray[np.float64]
Value = TypeVar("Value")


@dataclass(frozen=True)
class SiteStatistics:
    """What is known of the tensor of one fold site and of the weights that read it; float32 [channels] each."""

    absmax: Vector
    """Largest magnitude of each channel."""
    weight_absmax: Vector | None = None
    """Largest |W_ij| over the rows of all quantized consumers; `smoothquant` only."""
    rms: Vector | None = None
    """Root mean square of each channel over the calibration tokens; `awq` and `search` only."""


def scale_from_formula(entry: SiteEqualization, statistics: SiteStatistics) -> Vector:
    """The s of a site: float32 [channels], positive; computed in float64, rounded once.

    Raises:
        ValueError: The method needs a statistic that is not there.
    """
    return _FORMULAS[entry.method](entry, statistics).astype(np.float32)


def normalised(scale: Exact) -> Exact:
    """`scale` / sqrt(largest x smallest), both of the positive ones, within `LARGEST_SCALE`.

    A channel of scale 0 was never seen to differ from 0 (or nearly so) and gets the smallest scale: its weights then
    weigh least in the group scales.
    """
    live = scale[scale > 0.0]
    if not live.size:
        return np.ones_like(scale)
    smallest, largest = float(live.min()), float(live.max())
    centred = np.maximum(scale, smallest) / (np.sqrt(largest) * np.sqrt(smallest))
    clipped: Exact = np.clip(centred, 1.0 / LARGEST_SCALE, LARGEST_SCALE)
    return clipped


def _lae(_entry: SiteEqualization, statistics: SiteStatistics) -> Exact:
    return numerics.equalization_from_absmax(statistics.absmax)


def _smoothquant(entry: SiteEqualization, statistics: SiteStatistics) -> Exact:
    alpha = _given(entry.alpha, "alpha")
    weight = _floored(_given(statistics.weight_absmax, "the weights of its consumers"))
    return np.maximum(_floored(statistics.absmax) ** alpha / weight ** (1.0 - alpha), MIN_EQUALIZATION)


def _awq(entry: SiteEqualization, statistics: SiteStatistics) -> Exact:
    return normalised(_power(_given(statistics.rms, "the rms of its input"), _given(entry.ratio, "ratio")))


def _search(entry: SiteEqualization, statistics: SiteStatistics) -> Exact:
    m = statistics.absmax.astype(np.float64)
    lae = np.where(m > 0.0, m / np.log2(2.0 + m), 0.0)
    of_lae = _power(lae, _given(entry.lae_exponent, "lae_exponent"))
    of_rms = _power(_given(statistics.rms, "the rms of its input"), _given(entry.rms_exponent, "rms_exponent"))
    return normalised(of_lae * of_rms)


_FORMULAS: Mapping[EqualizationMethod, Callable[[SiteEqualization, SiteStatistics], Exact]] = {
    "lae": _lae,
    "smoothquant": _smoothquant,
    "awq": _awq,
    "search": _search,
}


def _power(values: NDArray[np.floating], exponent: float) -> Exact:
    """values^exponent, and 0 where a value is below `MIN_EQUALIZATION` of the largest: such a channel is dead."""
    exact = values.astype(np.float64)
    if exponent == 0.0:
        return np.ones_like(exact)
    live = exact > MIN_EQUALIZATION * exact.max(initial=0.0)
    return np.where(live, np.where(live, exact, 1.0) ** exponent, 0.0)


def _floored(values: NDArray[np.floating]) -> Exact:
    return np.maximum(values.astype(np.float64), MIN_EQUALIZATION)


def _given(value: Value | None, name: str) -> Value:
    if value is None:
        raise ValueError(f"it needs {name}")
    return value
