"""Two-level scales (DGQ, arXiv 2310.04836; QoQ, arXiv 2405.04532): the weight is INT8 with one scale a channel.

The scale of a group is n x unit: `n` an integer of the group, `unit` a scale of the output channel. So code x n is an
exact INT8 weight, which a plain INT8 GEMM can run. QoQ rounds twice, to INT8 and then to INT4, and needs first-level
weights within +-119 so that the second rounding cannot leave INT8. Here nothing is rounded twice: with n <= 15 no INT4
code exceeds 8 x 15 = 120.

The symmetric form only. Zero points, which QoQ and the kernels' two_level layout have, need an array beside the codes.
"""

from __future__ import annotations

import torch

from calib.weights.coordinate_descent import quantize_gptq_cd, refined
from calib.weights.gptq import gptq_codes, hessian_of
from calib.weights.grid import IntegerGrid
from calib.weights.problem import QuantizedWeight, WeightProblem
from calib.weights.scales import SMALLEST_SCALE, codes_from_scale, group_weight

__all__ = ["HIGHEST_INTEGER", "quantize_two_level"]

HIGHEST_INTEGER = 15
"""Of a group: 15 x -8 is within INT8."""
_UNIT_BITS = 7
"""Significant bits of a unit: with 4 bits of the integer, products have the 11 bits of float16."""
_INTEGERS_OF_LARGEST = (15, 14, 13, 12, 11, 10, 9, 8, 7, 6)
"""Integers that the largest scale of a channel may get; the search takes the one of least error."""


def quantize_two_level(problem: WeightProblem) -> QuantizedWeight:
    """`gptq` and coordinate descent with the two-level scales nearest to those that `gptq+cd` finds without a grid.

    Raises:
        ValueError: As `quantize_gptq`.
    """
    groups = group_weight(problem.weight, problem.group_size)
    importance = hessian_of(problem).diagonal().reshape(-1, problem.group_size)
    free = quantize_gptq_cd(problem)
    grid = _searched_grid(groups, free.scales.to(torch.float32), importance, signed=problem.signed_scales)
    nearest = grid.nearest(free.scales.to(torch.float32).T, slice(None)).T.to(torch.float16)
    # A channel with a scale beyond float16 has no grid: it keeps that scale, for the caller to refuse.
    scales = torch.where(free.scales.isfinite().all(dim=1, keepdim=True), nearest, free.scales)
    rounded = codes_from_scale(groups, scales).to(torch.int8).reshape(problem.weight.shape)
    starts = [QuantizedWeight(codes, scales) for codes in (gptq_codes(problem, scales), free.codes, rounded)]
    return refined(problem, starts, grid)


def _searched_grid(
    groups: torch.Tensor, wanted: torch.Tensor, importance: torch.Tensor, *, signed: bool
) -> IntegerGrid:
    """The unit of least error for each channel."""
    largest = wanted.abs().amax(dim=1)
    best = _grid(largest / HIGHEST_INTEGER, signed=signed)
    least = torch.full_like(largest, torch.inf)
    for integer in _INTEGERS_OF_LARGEST:
        grid = _grid(largest / integer, signed=signed)
        scales = grid.nearest(wanted.T, slice(None)).T
        error = codes_from_scale(groups, scales).mul_(scales[..., None]).sub_(groups).square_().mul_(importance)
        summed = error.sum(dim=(1, 2))
        better = summed < least
        least = torch.where(better, summed, least)
        best = _grid(torch.where(better, grid.unit, best.unit), signed=signed)
    return best


def _grid(unit: torch.Tensor, *, signed: bool) -> IntegerGrid:
    mantissa, exponent = torch.frexp(unit)
    rounded = torch.ldexp((mantissa * 2**_UNIT_BITS).round(), exponent - _UNIT_BITS)
    return IntegerGrid(signed, rounded.clamp(min=SMALLEST_SCALE), torch.ones_like(unit), HIGHEST_INTEGER)
