"""Integer group scales (Integer Scale, arXiv 2405.14597): scale = n / amplifier, a power of two for each channel.

A kernel multiplies the INT32 sum of each group by the integer `n`, adds the products in INT32, and converts to float
once a channel instead of once a group. So `n` is kept small enough that the sum cannot overflow for any INT8 input.
"""

from __future__ import annotations

import torch

from calib.weights.coordinate_descent import refined
from calib.weights.gptq import gptq_codes, hessian_of
from calib.weights.grid import IntegerGrid
from calib.weights.problem import QuantizedWeight, WeightProblem
from calib.weights.scales import SMALLEST_SCALE, codes_from_scale, group_weight, searched_scale
from fptq_export.packing import INT4_MIN

__all__ = ["highest_integer", "quantize_integer_scale"]

_FLOAT16_INTEGERS = 2**11 - 1
"""Up to here every integer times a power of two is exact in float16."""
_INT32_MAX = 2**31 - 1
_INT8_MAGNITUDE = 128


def quantize_integer_scale(problem: WeightProblem) -> QuantizedWeight:
    """`gptq` and coordinate descent with integer scales.

    Raises:
        ValueError: As `quantize_gptq`.
    """
    groups = group_weight(problem.weight, problem.group_size)
    importance = hessian_of(problem).diagonal().reshape(-1, problem.group_size)
    wanted = searched_scale(groups, importance, signed=problem.signed_scales)
    grid = _grid(wanted.to(torch.float32), highest_integer(problem.weight.shape[1]), signed=problem.signed_scales)
    nearest = grid.nearest(wanted.to(torch.float32).T, slice(None)).T.to(torch.float16)
    # A channel with a scale beyond float16 has no amplifier: it keeps that scale, for the caller to refuse.
    scales = torch.where(wanted.isfinite().all(dim=1, keepdim=True), nearest, wanted)
    rounded = codes_from_scale(groups, scales).to(torch.int8).reshape(problem.weight.shape)
    starts = [QuantizedWeight(codes, scales) for codes in (gptq_codes(problem, scales), rounded)]
    return refined(problem, starts, grid)


def highest_integer(in_features: int) -> int:
    """Largest n for which in x |INT8| x |INT4| x n fits INT32, and n fits float16."""
    return min(_FLOAT16_INTEGERS, _INT32_MAX // (in_features * _INT8_MAGNITUDE * -INT4_MIN))


def _grid(wanted: torch.Tensor, highest: int, *, signed: bool) -> IntegerGrid:
    """The largest amplifier with which the largest scale of a channel is at most `highest`."""
    largest = wanted.abs().amax(dim=1)
    mantissa, exponent = torch.frexp(largest / highest)
    # mantissa x 2^exponent with mantissa in [0.5, 1): the power of two that is not below it.
    unit = torch.ldexp(torch.ones_like(largest), torch.where(mantissa > 0.5, exponent, exponent - 1))
    return IntegerGrid(signed, unit, (SMALLEST_SCALE / unit).ceil().clamp(min=1.0), highest)
