"""Learned rounding (AdaRound, arXiv 2004.10568), one linear at a time, then coordinate descent.

Every weight may round down or up. The choice is a number h in [0, 1], the rectified sigmoid of a variable v:
h = clip(1.2 sigmoid(v) - 0.1, 0, 1). All of a linear's v move together, by Adam, to lower

    e H e^T / (that of rounding to nearest) + lambda mean(1 - |2 h - 1|^beta),    e = (floor(w / s) + h) s - w

row by row. The first term is the paper's layer-wise reconstruction error: mean (e x)^2 = e H e^T with H = mean x x^T.
The second makes h 0 or 1; beta falls from 20 to 2, after a start without it (equation 24; BRECQ, arXiv 2102.05426, has
the schedule). Dividing by the error of rounding gives lambda one meaning for all layers.

Scales are those of `gptq`. Learned rounding alone is worse than error feedback, which may move a code further than to
the next one: in a q projection of SmolLM2 it leaves 0.249 of the error of rounding, `gptq` 0.213. As one more start of
coordinate descent it helps: 0.183, against 0.188 of `gptq+cd`. Every row starts from the best of the learned codes,
`gptq` and `rtn`, so it is never worse than any of them.
"""

from __future__ import annotations

import torch

from calib.weights.coordinate_descent import refined
from calib.weights.gptq import damped, hessian_of, quantize_gptq
from calib.weights.grid import ScaleGrid
from calib.weights.problem import QuantizedWeight, WeightProblem
from calib.weights.rtn import quantize_rtn
from fptq_export.packing import INT4_MAX, INT4_MIN

__all__ = ["ITERATIONS", "learned_codes", "quantize_adaround"]

ITERATIONS = 500
"""Steps of Adam."""
_LEARNING_RATE = 1e-2
_LAMBDA = 200.0
"""In the q and gate projections of SmolLM2, 0.05 to 200 were tried; the error fell throughout."""
_BETA_FIRST, _BETA_LAST = 20.0, 2.0
_WARM_UP = 0.2
"""Part of the steps without the term that makes h 0 or 1."""
_STRETCH, _SHIFT = 1.2, -0.1
"""zeta - gamma and gamma of the rectified sigmoid: it reaches 0 and 1 at a finite v."""


def quantize_adaround(problem: WeightProblem) -> QuantizedWeight:
    """Quantize with learned rounding, then improve codes and scales in turn.

    Raises:
        ValueError: As `quantize_gptq`.
    """
    gptq = quantize_gptq(problem)
    codes = learned_codes(problem, gptq.scales, ITERATIONS)
    starts = [gptq, QuantizedWeight(codes, gptq.scales), quantize_rtn(problem)]
    return refined(problem, starts, ScaleGrid(problem.signed_scales))


def learned_codes(problem: WeightProblem, scales: torch.Tensor, iterations: int) -> torch.Tensor:
    """Codes for float16 group scales [out, in/group_size]: int8 [out, in].

    Raises:
        ValueError: The Hessian is missing.
    """
    weight, hessian = problem.weight, damped(hessian_of(problem))
    steps = scales.to(torch.float32).repeat_interleave(problem.group_size, dim=1)
    # Not the highest code: one above must be a code too.
    lower = (weight / steps).floor_().clamp_(INT4_MIN, INT4_MAX - 1)
    rest = (weight / steps - lower).clamp_(0.0, 1.0)
    least = _objective((lower + rest.round()) * steps - weight, hessian)
    unit = torch.where(least > 0, 2.0 / least, 0.0)[:, None]
    v = torch.nn.Parameter(torch.logit((rest - _SHIFT) / _STRETCH))
    adam = torch.optim.Adam([v], lr=_LEARNING_RATE)
    for iteration in range(iterations):
        with torch.no_grad():
            sigmoid = torch.sigmoid(v)
            h = (sigmoid * _STRETCH + _SHIFT).clamp_(0.0, 1.0)
            error = (lower + h).mul_(steps).sub_(weight)
            slope = (error @ hessian).mul_(steps).mul_(unit)
            slope += _rounding_slope(h, iteration / iterations)
            inside = (h > 0) & (h < 1)
            v.grad = slope.mul_(sigmoid * (1 - sigmoid)).mul_(_STRETCH).mul_(inside)
        adam.step()
    h = torch.sigmoid(v.detach()) * _STRETCH + _SHIFT
    return (lower + (h >= 0.5)).nan_to_num_().to(torch.int8)


def _objective(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Row by row e H e^T: [out, in] -> [out]."""
    return (error @ hessian).mul_(error).sum(dim=1)


def _rounding_slope(h: torch.Tensor, progress: float) -> torch.Tensor:
    """Derivative by h of lambda mean(1 - |2 h - 1|^beta).

    Args:
        h: float32 [out, in] in [0, 1].
        progress: Part of the steps that are done.
    """
    if progress < _WARM_UP:
        return torch.zeros_like(h)
    beta = _BETA_LAST + (_BETA_FIRST - _BETA_LAST) * (1.0 - progress) / (1.0 - _WARM_UP)
    away = 2.0 * h - 1.0
    return away.abs().pow_(beta - 1.0).mul_(away.sign()).mul_(-2.0 * beta * _LAMBDA / h.shape[1])
