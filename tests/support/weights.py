"""Weights as models do have them, and what every quantizer must make of them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from calib.weights import QuantizedWeight, WeightProblem
from calib.weights.rtn import quantize_rtn
from tests.support.hessians import row_errors

__all__ = ["HALF_STEP", "KINDS", "assert_within_half_steps_of_rtn", "check_form", "drawn_weight"]

KINDS = ("normal", "zero rows", "outlier", "denormal", "huge", "constant", "half zero")
HALF_STEP = 0.5 + 2.0**-9
"""Steps that a code of 8 bits or less may be off: half a step, and the float16 rounding of a scale moves the largest
weight of at most 8 steps by 8 x 2^-11 of a step, less than the margin (float32 rounding of the quotient included)."""


def drawn_weight(kind: str, channels: int, seed: int) -> torch.Tensor:
    """Four rows, float32 [4, channels]; every scale fits float16."""
    weight = torch.randn(4, channels, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "zero rows":
            weight[::2] = 0.0
        case "outlier":
            weight[1, seed % channels] = 3e5 if seed % 2 else -3e5
        case "denormal":
            weight *= 1e-40
        case "huge":
            weight *= 4e5 / weight.abs().max()
        case "constant":
            weight[:] = -0.37
        case "half zero":
            weight[:, : channels // 2] = 0.0
    return weight


def check_form(problem: WeightProblem, got: QuantizedWeight) -> None:
    """Codes are INT4; scales are normal float16 of the allowed sign; a row of zeros stays zero."""
    out, channels = problem.weight.shape
    assert (got.codes.dtype, tuple(got.codes.shape)) == (torch.int8, (out, channels))
    assert (got.scales.dtype, tuple(got.scales.shape)) == (torch.float16, (out, channels // problem.group_size))
    assert int(got.codes.min()) >= -8
    assert int(got.codes.max()) <= 7
    assert got.scales.isfinite().all()
    assert (got.scales.abs() >= torch.finfo(torch.float16).tiny).all()
    assert problem.signed_scales or (got.scales > 0).all()
    nothing = (problem.weight == 0.0).all(dim=1)
    assert got.codes[nothing].count_nonzero() == 0


def assert_within_half_steps_of_rtn(
    problem: WeightProblem, got: QuantizedWeight, importance: NDArray[np.float64]
) -> None:
    """Group by group, sum of e_j^2 x importance_j [in] is at most that of half a step of unsigned `rtn` everywhere."""
    size = problem.group_size
    plain = quantize_rtn(WeightProblem(problem.weight, size)).scales.double().numpy()
    errors = row_errors(problem.weight, got, size)
    squares = (np.square(errors) * importance).reshape(len(errors), -1, size).sum(axis=-1)
    assert (squares <= importance.reshape(-1, size).sum(axis=-1) * np.square(HALF_STEP * plain)).all()
