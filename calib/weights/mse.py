"""Clip search: each group takes the scale that leaves the least squared weight error.

Candidates are max|w| / 7 times a ratio of `CLIP_RATIOS`. A smaller scale clips the largest weights and rounds the
others finer (as in AWQ's clip search, arXiv 2306.00978, with the weight error in place of the output error).
"""

from __future__ import annotations

import torch

from calib.weights.rtn import absmax_scale, codes_from_scale, group_weight, storable_scale

__all__ = ["CLIP_RATIOS", "quantize_mse"]

CLIP_RATIOS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.825, 0.8, 0.775, 0.75, 0.7, 0.65, 0.6)
"""1 is round to nearest, so the result is never worse. 0.875 = 7/8 lets a group whose largest weight is negative use
code -8. Normal weights in groups of 128, which clip most, choose between 0.675 and 1."""


def quantize_mse(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with the best clip ratio of each group.

    Args:
        weight: float32 [out, in].
        group_size: Consecutive input channels that share a scale; divides `in`.

    Returns:
        INT4 codes, int8 [out, in], and scales, float16 [out, in/group_size].
    """
    groups = group_weight(weight, group_size)
    full = absmax_scale(groups)
    best = storable_scale(full)
    least = _squared_error(groups, best)
    for ratio in CLIP_RATIOS[1:]:
        scale = storable_scale(full * ratio)
        error = _squared_error(groups, scale)
        better = error < least
        best = torch.where(better, scale, best)
        least = torch.where(better, error, least)
    return codes_from_scale(groups, best).to(torch.int8).reshape(weight.shape), best


def _squared_error(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Sum over each group of (w - code x scale)^2, in float32: [..., group_size], [...] -> [...]."""
    rounded = codes_from_scale(groups, scale).mul_(scale.to(torch.float32)[..., None])
    return rounded.sub_(groups).square_().sum(dim=-1)
