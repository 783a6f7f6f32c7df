"""INT4 weights in the order in which the CPU kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fptq_export.cpu.extension import aligned_bytes, load_extension
from fptq_export.packing import INT4_MAX, INT4_MIN

__all__ = ["GROUP_SIZES", "MAX_CHANNEL_GROUP", "PackedWeight", "native_group_size", "packed_weight_from_codes"]

GROUP_SIZES = (128, 64, 32, 16)
"""FPTQ_GROUP_SIZES of plugins/include/fptq/layout.h; besides, a group may be the whole row."""
MAX_CHANNEL_GROUP = 524288
"""Longest group that is the whole row: INT32 holds its sums (kMaxGroupK of plugins/cpu/kernels.h)."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A packed weight; layout in plugins/cpu/w4a8_cpu.h."""

    out_channels: int
    in_channels: int
    group_size: int
    codes: NDArray[np.uint8]  # 64-byte aligned, read-only
    scales: NDArray[np.uint8]  # FP16 bytes, 64-byte aligned, read-only


def native_group_size(group_size: int, in_channels: int) -> int:
    """The group size as the kernels count it: 0 where the group is the whole row and no size of their own."""
    return 0 if group_size == in_channels and group_size not in GROUP_SIZES else group_size


def packed_weight_from_codes(
    w_codes: NDArray[np.integer], w_scale: NDArray[np.float16], group_size: int
) -> PackedWeight:
    """Pack a weight.

    Args:
        w_codes: INT4 codes in [-8, 7], any integer type, [out, in].
        w_scale: float16 group scales, [out, in/group_size]; finite, of either sign.
        group_size: 128, 64, 32 or 16, or `in` (one scale a channel).

    Raises:
        ValueError: A shape, type or value does not fit.
        UserError: The C++ part is not built.
    """
    _check_weight(w_codes, w_scale, group_size)
    extension = load_extension()
    (n, k), native = w_codes.shape, native_group_size(group_size, w_codes.shape[1])
    codes = aligned_bytes(extension.packed_code_bytes(n, k))
    scales = aligned_bytes(extension.packed_scale_bytes(n, k, native))
    extension.pack_weight(
        extension.make_problem(1, n, k, native, half_input=False, half_output=False),
        np.ascontiguousarray(w_codes, dtype=np.int8),
        np.ascontiguousarray(w_scale),
        codes,
        scales,
    )
    codes.flags.writeable = False
    scales.flags.writeable = False
    return PackedWeight(n, k, group_size, codes, scales)


def _check_weight(w_codes: NDArray[np.integer], w_scale: NDArray[np.float16], group_size: int) -> None:
    if w_codes.ndim != 2 or 0 in w_codes.shape:
        raise ValueError(f"w_codes must be [out, in] and not empty, got shape {w_codes.shape}")
    n, k = w_codes.shape
    if group_size not in (*GROUP_SIZES, k) or k % group_size:
        raise ValueError(f"group_size must be one of {GROUP_SIZES} and divide in, or be in = {k}; got {group_size}")
    if group_size > MAX_CHANNEL_GROUP:
        raise ValueError(f"a group of {group_size} channels overflows INT32; the longest is {MAX_CHANNEL_GROUP}")
    if not np.issubdtype(w_codes.dtype, np.integer) or w_codes.min() < INT4_MIN or w_codes.max() > INT4_MAX:
        raise ValueError(f"w_codes must be integers in [{INT4_MIN}, {INT4_MAX}]")
    if w_scale.dtype != np.float16 or w_scale.shape != (n, k // group_size):
        raise ValueError(f"w_scale must be float16 {(n, k // group_size)}, got {w_scale.dtype} {w_scale.shape}")
    if not np.isfinite(w_scale).all():
        raise ValueError("w_scale has values that are not finite")
