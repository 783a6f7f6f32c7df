"""GPTQ (arXiv 2210.17323): round column by column, and let the columns that are still float make up for the error.

With H = mean x x^T + damping, the output error of a row is dw H dw^T. Quantizing column j by e_j leaves the least
error when the later columns move by -e_j / U_jj x U_j, where U^T U = H^-1 and U is upper triangular.

Scales are fixed before the first column ("static groups"), so columns can be taken in order of decreasing H_jj ("act
order") while groups stay contiguous channels: no other order can be stored in an ONNX file. The scale of a group is the
one whose rounding error, weighted by diag H, is least. On SmolLM2 that is worth more than the feedback itself.
"""

from __future__ import annotations

import torch

from calib.weights.problem import QuantizedWeight, WeightProblem
from calib.weights.scales import group_weight, searched_scale
from fptq_export.packing import INT4_MAX, INT4_MIN

__all__ = ["DAMPING", "inverse_factor", "quantize_gptq"]

DAMPING = 0.01
"""Part of the mean of diag H that is added to the diagonal, as in the paper's code."""

_MAX_DAMPING = 1.0
_BLOCK = 128
"""Columns between two updates of everything behind them: one matrix product instead of 128 rank-one updates."""


def quantize_gptq(problem: WeightProblem) -> QuantizedWeight:
    """Quantize with error feedback.

    Raises:
        ValueError: The Hessian is missing, or not even strong damping makes it positive definite (it holds NaN).
    """
    if problem.hessian is None:
        raise ValueError("gptq needs the Hessian of the input")
    weight, group_size = problem.weight, problem.group_size
    importance = problem.hessian.diagonal().reshape(-1, group_size)
    scales = searched_scale(group_weight(weight, group_size), importance, signed=problem.signed_scales)
    order = torch.argsort(problem.hessian.diagonal(), descending=True, stable=True)
    column_scales = scales.to(torch.float32).repeat_interleave(group_size, dim=1)[:, order]
    factor = inverse_factor(problem.hessian[order][:, order])
    codes = torch.empty(weight.shape, dtype=torch.int8)
    codes[:, order] = _codes_with_feedback(weight[:, order].clone(), column_scales, factor).to(torch.int8)
    return QuantizedWeight(codes, scales)


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with U^T U = (H + damping)^-1: float32 [in, in] -> [in, in].

    Damping grows tenfold until the Cholesky factorization succeeds. An input that was always zero gets the identity.
    """
    mean = hessian.diagonal().mean()
    damping = DAMPING
    factor: torch.Tensor
    while damping <= _MAX_DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor
        damping *= 10
    raise ValueError("the Hessian is not positive definite")


def _codes_with_feedback(weight: torch.Tensor, scales: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Codes as float32 [out, in] for columns in the given order; `weight` is used up."""
    codes = torch.empty_like(weight)
    columns = weight.shape[1]
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty(weight.shape[0], stop - start)
        for column in range(start, stop):
            code = (weight[:, column] / scales[:, column]).round().clamp(INT4_MIN, INT4_MAX)
            codes[:, column] = code
            error = (weight[:, column] - code * scales[:, column]) / factor[column, column]
            weight[:, column + 1 : stop] -= torch.outer(error, factor[column, column + 1 : stop])
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes
