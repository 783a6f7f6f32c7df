"""INT8 weights with one scale an output channel; bit for bit what `fptq_export.numerics` computes."""

from __future__ import annotations

import torch

from fptq_export.numerics import INT8_MAX

__all__ = ["quantize_int8"]


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest with the scale of the largest weight of each channel.

    Args:
        weight: float32 [out, in], equalized.

    Returns:
        Codes, int8 [out, in] in [-127, 127], and scales, float32 [out].
    """
    scale = (weight.abs().amax(dim=1) / INT8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    codes = (weight / scale[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scale
