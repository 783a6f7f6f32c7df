"""Codes and scales of one linear, as the policy files hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.weights import WEIGHT_METHODS, WeightProblem
from calib.weights.per_channel import quantize_int8
from fptq_export.errors import UserError
from fptq_export.packing import packed_from_int4
from fptq_export.policy import LayerPolicy
from fptq_export.tensor_writer import TensorSpec

__all__ = ["needs_hessian", "quantized_arrays", "weight_specs"]


def quantized_arrays(
    path: str, layer: LayerPolicy, weight: torch.Tensor, hessian: torch.Tensor | None
) -> dict[str, NDArray[Any]]:
    """Quantize one weight.

    Args:
        path: Of the linear.
        layer: Its entry.
        weight: float32 [out, in], equalized.
        hessian: Mean x x^T of the equalized input, float32 [in, in], where the weight method needs it.

    Returns:
        `<path>.weight_codes` and `<path>.weight_scales`.

    Raises:
        UserError: The weight method fails, or a scale does not fit its type.
    """
    codes, scales = (
        _int8_arrays(path, weight) if layer.precision == "w8a8" else _int4_arrays(path, layer, weight, hessian)
    )
    return {f"{path}.weight_codes": codes, f"{path}.weight_scales": scales}


def weight_specs(path: str, layer: LayerPolicy) -> dict[str, TensorSpec]:
    """Types and shapes of a layer's codes and scales."""
    if layer.precision == "w8a8":
        return {
            f"{path}.weight_codes": TensorSpec.of("int8", layer.out_features, layer.in_features),
            f"{path}.weight_scales": TensorSpec.of("float32", layer.out_features),
        }
    if layer.group_size is None:
        raise RuntimeError(f"{path} is to be quantized, but its policy has no group size")
    return {
        f"{path}.weight_codes": TensorSpec.of("uint8", layer.out_features, layer.in_features // 2),
        f"{path}.weight_scales": TensorSpec.of("float16", layer.out_features, layer.in_features // layer.group_size),
    }


def needs_hessian(layer: LayerPolicy) -> bool:
    """Whether the layer's weight method needs the Hessian of its input."""
    method = WEIGHT_METHODS.get(layer.weight_method) if layer.weight_method is not None else None
    return method is not None and method.needs_hessian


def _int8_arrays(path: str, weight: torch.Tensor) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    codes, scales = quantize_int8(weight)
    if not torch.isfinite(scales).all():
        cause = "its equalized weight is not finite in float32"
        raise UserError(f"layer {path}", cause, f"leave it in float: --precision '{path}=float'")
    return codes.numpy(), scales.numpy()


def _int4_arrays(
    path: str, layer: LayerPolicy, weight: torch.Tensor, hessian: torch.Tensor | None
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    if layer.weight_method is None or layer.group_size is None:
        raise RuntimeError(f"{path} is to be quantized, but its policy has no weight method or no group size")
    problem = WeightProblem(weight, layer.group_size, hessian, signed_scales=layer.signed_scales)
    try:
        quantized = WEIGHT_METHODS[layer.weight_method].quantize(problem)
    except ValueError as error:
        hint = "calibrate on more text, or use another --weight-method"
        raise UserError(f"layer {path}", f"{layer.weight_method} failed: {error}", hint) from error
    if not torch.isfinite(quantized.scales).all():
        raise UserError(
            f"layer {path}",
            f"its equalized weight reaches {weight.abs().max().item():.4g}: the group scale does not fit float16",
            f"exclude the layer: --exclude '{path}'",
        )
    return packed_from_int4(quantized.codes.numpy()), quantized.scales.numpy()
