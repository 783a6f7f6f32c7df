"""Round to nearest: the group scale is max|w| / 7; bit for bit what `fptq_export.numerics` computes."""

from __future__ import annotations

import torch

from fptq_export.packing import INT4_MAX, INT4_MIN

__all__ = ["absmax_scale", "codes_from_scale", "group_weight", "quantize_rtn", "storable_scale"]

_SMALLEST_SCALE = torch.finfo(torch.float16).tiny
"""Scale of groups that are zero, or too small for a normal float16."""


def quantize_rtn(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with the scale that lets the largest weight of each group through.

    Args:
        weight: float32 [out, in].
        group_size: Consecutive input channels that share a scale; divides `in`.

    Returns:
        INT4 codes, int8 [out, in], and scales, float16 [out, in/group_size].
    """
    groups = group_weight(weight, group_size)
    scale = storable_scale(absmax_scale(groups))
    return codes_from_scale(groups, scale).to(torch.int8).reshape(weight.shape), scale


def group_weight(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """[out, in] -> [out, in/group_size, group_size], a view."""
    return weight.reshape(weight.shape[0], -1, group_size)


def absmax_scale(groups: torch.Tensor) -> torch.Tensor:
    """max|w| / 7 of each group in float32: [..., group_size] -> [...]."""
    return groups.abs().amax(dim=-1) / INT4_MAX


def storable_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round scales to the float16 that the kernel reads; never below the smallest normal one."""
    return scale.to(torch.float16).clamp(min=_SMALLEST_SCALE)


def codes_from_scale(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """clip(rint(w / scale), -8, 7) as float32, ties to even: [..., group_size], [...] -> [..., group_size]."""
    return (groups / scale.to(torch.float32)[..., None]).round_().clamp_(INT4_MIN, INT4_MAX)
