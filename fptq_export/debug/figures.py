"""How far two tensors are apart."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fptq_export.debug.report import Match

__all__ = ["decibels", "match", "power", "sqnr_db"]

Real = NDArray[np.float32]


def power(array: NDArray[np.floating]) -> float:
    """Sum of squares, in float64."""
    flat = array.reshape(-1).astype(np.float64)
    return float(flat @ flat)


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise): infinite without noise, None without signal or where one is not finite."""
    if not (math.isfinite(signal) and math.isfinite(noise)) or signal == 0.0:
        return None
    return math.inf if noise == 0.0 else 10.0 * math.log10(signal / noise)


def sqnr_db(reference: Real, found: Real) -> float | None:
    """Power of the reference over that of the difference, in dB."""
    return decibels(power(reference), power(found - reference))


def match(reference: Real, found: Real) -> Match:
    """SQNR and cosine of two tensors of one shape."""
    if not np.isfinite(found).all():
        return Match(sqnr_db=None, cosine=None)
    norms = math.sqrt(power(reference) * power(found))
    dot = float(reference.reshape(-1).astype(np.float64) @ found.reshape(-1).astype(np.float64))
    return Match(sqnr_db=sqnr_db(reference, found), cosine=dot / norms if norms else None)
