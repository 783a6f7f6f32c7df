"""Modelled time of one linear for one token, whatever it runs.

A per-token input costs one launch more than a static one, the reduction that must end before the first product.
Kernels that fuse it cost less.
"""

from __future__ import annotations

from fptq_export.policy import Activation, Precision
from fptq_export.roofline.devices import LAUNCH_S, Device
from fptq_export.roofline.instructions import Scheme
from fptq_export.roofline.model import Shape, bound_s, time_s, weight_bytes_of

__all__ = ["decode_s"]


def decode_s(
    shape: Shape, precision: Precision, activation: Activation | None, group_size: int | None, device: Device
) -> float:
    """Seconds for one token: modelled of W4A8, a lower bound of everything else.

    Raises:
        ValueError: A precision with INT4 weights has no group size, or one that does not divide K.
        KeyError: No kernel is compiled for the group size or the architecture.
    """
    reduction = LAUNCH_S if activation == "per_token" else 0.0
    if precision == "float":
        return bound_s(shape, 1, device, weight_bytes=2.0, activation_bytes=2.0)
    if precision == "w8a8":
        bound = bound_s(shape, 1, device, weight_bytes=1.0 + 4.0 / shape.k, activation_bytes=1.0)
        return bound + LAUNCH_S + reduction  # x is quantized in a launch of its own
    if group_size is None:
        raise ValueError(f"{precision} needs a group size")
    scheme = Scheme("group", group_size)
    if precision == "w4a16":
        return bound_s(shape, 1, device, weight_bytes=weight_bytes_of(scheme, shape.k), activation_bytes=2.0)
    return time_s(shape, scheme, 1, device).total + reduction
