"""Which equalization leaves the least error at one fold site, estimated without running the model.

With x' = x / s and W' = W s, a linear computes Q(W') q(x'). To first order its error is the sum of two parts:

* weights: tr(D H D^T) with D = (Q(W s) - W s) / s and H = mean x x^T, for round-to-nearest group scales Q, whatever
  method quantizes the weights in the end;
* a static INT8 input: uniform noise of variance step^2 / 12 in every channel of x', step = max_j(m_j / s_j) / 127,
  which reaches the output as step^2 / 12 |W s|^2 (Bennett, 1948). A per-token step is not known from maxima and is left
  out.

Where the producer is a linear, its rows are divided by s. Each row keeps its codes, for group scales divide too, so its
own error does not depend on s and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from calib.weights.problem import WeightProblem
from calib.weights.rtn import quantize_rtn
from fptq_export.numerics import INT8_MAX

__all__ = ["Consumer", "SiteProblem", "dequantized", "site_error"]

_ROWS = 512
"""Output channels of one consumer that are scored; of a larger one every n-th is taken. The sum is an estimate then."""


@dataclass(frozen=True)
class Consumer:
    """One quantized linear that reads the site."""

    weight: torch.Tensor
    """float32 [out, in], as the checkpoint has it."""
    group_size: int
    signed_scales: bool
    static: bool
    """Its input has one INT8 scale."""


@dataclass(frozen=True)
class SiteProblem:
    """One fold site to equalize."""

    consumers: Sequence[Consumer]
    hessian: torch.Tensor
    """float32 [in, in], mean x x^T."""
    absmax: NDArray[np.float32]
    """m, float32 [in]."""


def site_error(problem: SiteProblem, scale: NDArray[np.float32], *, static_input: bool = True) -> float:
    """Estimated squared error of all consumers' outputs, a token, for s [in].

    Args:
        problem: The site.
        scale: s; all ones for no equalization.
        static_input: Whether the error of static inputs counts.
    """
    s = torch.from_numpy(scale)
    step = float((problem.absmax / scale).max()) / INT8_MAX
    total = 0.0
    for consumer in problem.consumers:
        weight = _sampled(consumer.weight) * s
        error = (dequantized(weight, consumer.group_size, signed=consumer.signed_scales) - weight) / s
        part = float(((error @ problem.hessian) * error).sum(dtype=torch.float64))
        if static_input and consumer.static:
            part += step**2 / 12.0 * float(weight.square().sum(dtype=torch.float64))
        total += part * (consumer.weight.shape[0] / weight.shape[0])
    return total


def dequantized(weight: torch.Tensor, group_size: int, *, signed: bool) -> torch.Tensor:
    """Round to nearest and back: float32 [out, in]; infinite where a group scale does not fit float16."""
    quantized = quantize_rtn(WeightProblem(weight, group_size, signed_scales=signed))
    groups = quantized.codes.to(torch.float32).reshape(weight.shape[0], -1, group_size)
    return (groups * quantized.scales.to(torch.float32)[..., None]).reshape(weight.shape)


def _sampled(weight: torch.Tensor) -> torch.Tensor:
    stride = -(-weight.shape[0] // _ROWS)
    return weight[::stride]
