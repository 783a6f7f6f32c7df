"""Least-squares group scales for given codes.

With codes C and scales s, the error of a row is e = sum_a s_a C_a - w, and its objective e H e^T is quadratic in s: the
gradient is g_a = C_a H e^T and the curvature M_ab = C_a H C_b^T. First all scales of a row move by -M^-1 g, then each
moves alone to the best scale of the grid, which is the one nearest to s_a - g_a / M_aa. No move that makes a row worse
is taken (COMQ, arXiv 2403.07134, moves scales one by one too).
"""

from __future__ import annotations

import torch

from calib.weights.grid import ScaleGrid

__all__ = ["fitted_scales"]

_RIDGE = 1e-4
"""Part of the mean of diag M that pulls scales towards the present ones; M is singular where codes are zero."""
_ELEMENTS = 2**24
"""Of M in memory at a time: rows are taken in chunks."""


def fitted_scales(
    codes: torch.Tensor, scales: torch.Tensor, gradient: torch.Tensor, hessian: torch.Tensor, grid: ScaleGrid
) -> torch.Tensor:
    """Scales that leave no row worse, up to float32 rounding.

    Args:
        codes: float32 [in, out], transposed.
        scales: float32 [groups, out], on the grid.
        gradient: H e^T of these codes and scales, float32 [in, out].
        hessian: float32 [in, in], positive definite.
        grid: The scales that may be stored.

    Returns:
        float32 [groups, out], on the grid.
    """
    groups, rows = scales.shape
    result = torch.empty_like(scales)
    chunk = max(1, _ELEMENTS // groups**2)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        of_part = codes[:, part].contiguous()
        slope = (of_part * gradient[:, part]).reshape(groups, -1, of_part.shape[1]).sum(dim=1)
        curvature = _curvature(of_part, hessian, groups)
        now = _moved_together(scales[:, part], slope, curvature, grid, part)
        slope += _product(curvature, now - scales[:, part])
        result[:, part] = _moved_one_by_one(now, slope, curvature, grid, part)
    return result


def _curvature(codes: torch.Tensor, hessian: torch.Tensor, groups: int) -> torch.Tensor:
    """M of every row: float32 [groups, groups, rows]."""
    channels, rows = codes.shape
    size = channels // groups
    result = torch.empty(groups, groups, rows)
    for group in range(groups):
        start = group * size
        block = hessian[start:, start : start + size] @ codes[start : start + size]
        block *= codes[start:]
        sums = block.reshape(groups - group, size, rows).sum(dim=1)
        result[group, group:] = sums
        result[group:, group] = sums
    return result


def _moved_together(
    scales: torch.Tensor, slope: torch.Tensor, curvature: torch.Tensor, grid: ScaleGrid, rows: slice
) -> torch.Tensor:
    """All scales of a row at once, where that is better."""
    system = curvature.permute(2, 0, 1).contiguous()
    mean = system.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
    system.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, _RIDGE * mean, 1.0))
    lower, _ = torch.linalg.cholesky_ex(system)
    # A row whose factorization failed gets garbage here, and the comparison below refuses it.
    step = torch.cholesky_solve(slope.T[..., None], lower)[..., 0].T
    moved = grid.nearest(scales - step, rows)
    step = moved - scales
    change = (step * (_product(curvature, step) + 2 * slope)).sum(dim=0)
    return torch.where(change < 0, moved, scales)


def _moved_one_by_one(
    scales: torch.Tensor, slope: torch.Tensor, curvature: torch.Tensor, grid: ScaleGrid, rows: slice
) -> torch.Tensor:
    scales, slope = scales.clone(), slope.clone()
    for group, of_group in enumerate(curvature):
        diagonal = of_group[group]
        best = grid.nearest((scales[group] - slope[group] / diagonal)[None], rows)[0]
        step = best - scales[group]
        step = torch.where(step * (diagonal * step + 2 * slope[group]) < 0, step, torch.zeros_like(step))
        scales[group] += step
        slope += of_group * step
    return scales


def _product(curvature: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """M s of every row: [groups, groups, rows], [groups, rows] -> [groups, rows]."""
    return torch.einsum("abr,br->ar", curvature, scales)
