"""Clip search weighted by the input: each group takes the scale of least sum (w - code x scale)^2 H_jj.

AWQ's second step (arXiv 2306.00978) minimises the output error of each group on sample tokens. Here the input's second
moments stand for the tokens and its channels count as uncorrelated; query and key projections are clipped too.
"""

from __future__ import annotations

import torch

from calib.weights.gptq import hessian_of
from calib.weights.problem import QuantizedWeight, WeightProblem
from calib.weights.scales import codes_from_scale, group_weight, searched_scale

__all__ = ["quantize_clip"]


def quantize_clip(problem: WeightProblem) -> QuantizedWeight:
    """Quantize with the best clip ratio of each group; with signed scales, also with the better sign.

    Raises:
        ValueError: The Hessian is missing.
    """
    importance = hessian_of(problem).diagonal().reshape(-1, problem.group_size)
    groups = group_weight(problem.weight, problem.group_size)
    scale = searched_scale(groups, importance, signed=problem.signed_scales)
    return QuantizedWeight(codes_from_scale(groups, scale).to(torch.int8).reshape(problem.weight.shape), scale)
