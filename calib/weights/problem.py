"""What a weight method is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["QuantizedWeight", "WeightMethodEntry", "WeightProblem"]


@dataclass(frozen=True)
class WeightProblem:
    """One linear to quantize."""

    weight: torch.Tensor
    """float32 [out, in], equalized."""
    group_size: int
    """Consecutive input channels that share a scale; divides `in`."""
    hessian: torch.Tensor | None = None
    """float32 [in, in], mean over tokens of x x^T of the (equalized) input; given to methods that need it."""
    signed_scales: bool = False
    """Let a group whose largest weight is positive have a negative scale, so that it maps to code -8."""


@dataclass(frozen=True)
class QuantizedWeight:
    """INT4 codes and group scales."""

    codes: torch.Tensor
    """int8 [out, in] in [-8, 7]."""
    scales: torch.Tensor
    """float16 [out, in/group_size]. A scale that float16 cannot hold is inf: callers name the layer and refuse it."""


@dataclass(frozen=True)
class WeightMethodEntry:
    """One method and what it needs."""

    quantize: Callable[[WeightProblem], QuantizedWeight]
    needs_hessian: bool = False
