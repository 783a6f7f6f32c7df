"""Round to nearest with the scale of the largest weight; bit for bit what `fptq_export.numerics` computes."""

from __future__ import annotations

import torch

from calib.weights.problem import QuantizedWeight, WeightProblem
from calib.weights.scales import codes_from_scale, full_scale, group_weight, storable_scale

__all__ = ["quantize_rtn"]


def quantize_rtn(problem: WeightProblem) -> QuantizedWeight:
    """Quantize every weight on its own."""
    groups = group_weight(problem.weight, problem.group_size)
    scale = storable_scale(full_scale(groups, signed=problem.signed_scales))
    return QuantizedWeight(codes_from_scale(groups, scale).to(torch.int8).reshape(problem.weight.shape), scale)
