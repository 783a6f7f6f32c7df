"""Clip search: each group takes the scale that leaves the least squared weight error.

As in AWQ's clip search (arXiv 2306.00978), with the weight error in place of the output error.
"""

from __future__ import annotations

import torch

from calib.weights.problem import QuantizedWeight, WeightProblem
from calib.weights.scales import codes_from_scale, group_weight, searched_scale

__all__ = ["quantize_mse"]


def quantize_mse(problem: WeightProblem) -> QuantizedWeight:
    """Quantize with the best clip ratio of each group; with signed scales, also with the better sign."""
    groups = group_weight(problem.weight, problem.group_size)
    scale = searched_scale(groups, None, signed=problem.signed_scales)
    return QuantizedWeight(codes_from_scale(groups, scale).to(torch.int8).reshape(problem.weight.shape), scale)
