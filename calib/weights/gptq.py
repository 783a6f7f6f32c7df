"""GPTQ (arXiv 2210.17323): round column by column, and let the columns that are still float make up for the error.

With H = mean x x^T + damping, the output error of a row is dw H dw^T. Quantizing column j by e_j leaves the least
error when the later columns move by -e_j / U_jj x U_j, where U^T U = H^-1 and U is upper triangular.

Scales are fixed before the first column ("static groups"), so columns can be taken in order of decreasing H_jj ("act
order") while groups stay contiguous channels: no other order can be stored in an ONNX file. The scale of a group is the
one whose rounding error, weighted by diag H, is least.
"""

from __future__ import annotations

import torch

from calib.weights.problem import QuantizedWeight, WeightProblem
from calib.weights.scales import group_weight, searched_scale
from fptq_export.packing import INT4_MAX, INT4_MIN

__all__ = ["BLOCK", "DAMPING", "damped", "gptq_codes", "hessian_of", "inverse_factor", "quantize_gptq"]

DAMPING = 0.01
"""Part of the mean of diag H that is added to the diagonal, as in the paper's code."""

_MAX_DAMPING = 1.0
BLOCK = 128
"""Columns between two updates of everything behind them: one matrix product instead of 128 rank-one updates."""


def quantize_gptq(problem: WeightProblem) -> QuantizedWeight:
    """Quantize with error feedback.

    Raises:
        ValueError: The Hessian is missing, or not even strong damping makes it positive definite (it holds NaN).
    """
    importance = hessian_of(problem).diagonal().reshape(-1, problem.group_size)
    groups = group_weight(problem.weight, problem.group_size)
    scales = searched_scale(groups, importance, signed=problem.signed_scales)
    return QuantizedWeight(gptq_codes(problem, scales), scales)


def hessian_of(problem: WeightProblem) -> torch.Tensor:
    """The Hessian. Raises ValueError if it is missing."""
    if problem.hessian is None:
        raise ValueError("it needs the Hessian of the input")
    return problem.hessian


def gptq_codes(problem: WeightProblem, scales: torch.Tensor) -> torch.Tensor:
    """Codes with error feedback, for float16 group scales [out, in/group_size]: int8 [out, in].

    Raises:
        ValueError: As `quantize_gptq`.
    """
    weight, hessian = problem.weight, hessian_of(problem)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    column_scales = scales.to(weight.dtype).repeat_interleave(problem.group_size, dim=1)[:, order]
    factor = inverse_factor(hessian[order][:, order])
    codes = torch.empty(weight.shape, dtype=torch.int8)
    codes[:, order] = _codes_with_feedback(weight[:, order].clone(), column_scales, factor).to(torch.int8)
    return codes


def damped(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """H + damping x mean of diag H, on the diagonal; the identity for an input that was always zero. A copy."""
    mean = hessian.diagonal().mean()
    result = hessian.clone()
    result.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return result


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with U^T U = (H + damping)^-1: float32 [in, in] -> [in, in].

    Damping grows tenfold until the Cholesky factorization succeeds. An input that was always zero gets the identity.
    """
    damping = DAMPING
    factor: torch.Tensor
    while damping <= _MAX_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping))
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor
        damping *= 10
    raise ValueError("the Hessian is not positive definite")


def _codes_with_feedback(weight: torch.Tensor, scales: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Codes as floats [out, in] for columns in the given order; `weight` is used up."""
    codes = torch.empty_like(weight)
    columns = weight.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(weight.shape[0], stop - start, dtype=weight.dtype)
        for column in range(start, stop):
            code = (weight[:, column] / scales[:, column]).round().clamp(INT4_MIN, INT4_MAX)
            codes[:, column] = code
            error = (weight[:, column] - code * scales[:, column]) / factor[column, column]
            weight[:, column + 1 : stop] -= torch.outer(error, factor[column, column + 1 : stop])
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes
