"""Group scales and codes: the arithmetic that all methods share."""

from __future__ import annotations

import torch

from fptq_export.packing import INT4_MAX, INT4_MIN

__all__ = [
    "CLIP_RATIOS",
    "SMALLEST_SCALE",
    "codes_from_scale",
    "full_scale",
    "group_weight",
    "searched_scale",
    "storable_scale",
]

SMALLEST_SCALE = torch.finfo(torch.float16).tiny
"""Magnitude of the scale of groups that are zero, or too small for a normal float16."""

CLIP_RATIOS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.825, 0.8, 0.775, 0.75, 0.7, 0.65, 0.6)
"""Of max|w| / 7. 1 is round to nearest, so a search is never worse. 0.875 = 7/8 lets a largest weight of the other sign
than the scale use code -8. Normal weights in groups of 128, which clip most, choose between 0.675 and 1."""


def group_weight(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """[out, in] -> [out, in/group_size, group_size], a view."""
    return weight.reshape(weight.shape[0], -1, group_size)


def full_scale(groups: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """The scale that lets the largest weight of each group through: float32 [..., group_size] -> [...].

    Unsigned: max|w| / 7. Signed: the largest weight maps to -8, so the step is max|w| / 8 and all 16 levels are used;
    weights of the other sign clip at 7/8 of the largest.
    """
    if not signed:
        return groups.abs().amax(dim=-1) / INT4_MAX
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    return largest / INT4_MIN


def searched_scale(groups: torch.Tensor, importance: torch.Tensor | None, *, signed: bool) -> torch.Tensor:
    """The candidate of least error for each group: float32 [out, groups, group_size] -> float16 [out, groups].

    Candidates are max|w| / 7 times `CLIP_RATIOS`, with both signs where `signed`. The error is
    sum (w - code x scale)^2 x importance.

    Args:
        groups: Weights.
        importance: float32 [groups, group_size], how much an error of each input channel counts; None: all the same.
        signed: Whether a scale may be negative.
    """
    full = full_scale(groups, signed=False)
    best = storable_scale(full)
    least = _error(groups, best, importance)
    for sign in (1.0, -1.0) if signed else (1.0,):
        for ratio in CLIP_RATIOS:
            scale = storable_scale(full * (sign * ratio))
            error = _error(groups, scale, importance)
            better = error < least
            best = torch.where(better, scale, best)
            least = torch.where(better, error, least)
    return best


def storable_scale(scale: torch.Tensor) -> torch.Tensor:
    """Round scales to the float16 that the kernel reads; their magnitude is never below the smallest normal one."""
    half = scale.to(torch.float16)
    return torch.where(half.abs() < SMALLEST_SCALE, torch.full_like(half, SMALLEST_SCALE), half)


def codes_from_scale(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """clip(rint(w / scale), -8, 7) as float32, ties to even: [..., group_size], [...] -> [..., group_size]."""
    return (groups / scale.to(torch.float32)[..., None]).round_().clamp_(INT4_MIN, INT4_MAX)


def _error(groups: torch.Tensor, scale: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    rounded = codes_from_scale(groups, scale).mul_(scale.to(torch.float32)[..., None])
    squared = rounded.sub_(groups).square_()
    return (squared if importance is None else squared.mul_(importance)).sum(dim=-1)
