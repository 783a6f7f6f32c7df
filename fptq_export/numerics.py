"""The slow, obvious truth that every other path is compared with.

Nothing here is fast and nothing here is clever: float64 for real numbers, int64 for integers, one formula a function.
The function body in the ONNX graph, the plugin, the CPU path and the torch fake-quant model all implement this page
(the numeric contract):

    x and scale are float32;  q = clip(rint(x / scale), -128, 127), ties to even
    per token: scale = max(max|x|, eps) / 127 in float32
    exact integer sums inside each group; sum over groups of (integer sum x group scale)
    times the activation scale; plus bias; rounded once to the output type

INT8 weights are the same with one group: one float32 scale for each output channel.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fptq_export.packing import INT4_MAX, INT4_MIN

__all__ = [
    "INT8_MAX",
    "INT8_MIN",
    "MIN_EQUALIZATION",
    "PER_TOKEN_EPS",
    "dequantize_weight",
    "equalization_from_absmax",
    "equalized_absmax",
    "integer_scales",
    "per_token_scale",
    "quantize_activation",
    "quantize_weight_int8",
    "quantize_weight_rtn",
    "static_scale",
    "w4a8_linear",
    "w8a8_linear",
    "weight_scale_int8",
    "weight_scale_rtn",
]

Scalar = TypeVar("Scalar", bound=np.generic)

INT8_MIN = -128
INT8_MAX = 127
PER_TOKEN_EPS = np.float32(1e-6)
"""Smallest absmax a token is given, so that an all-zero token divides by a positive scale.

1e-6 / 127 = 7.9e-9 is a normal float32, and 127 x 7.9e-9 is below half an ulp of any FP16 output that is not itself
tiny, so a token that small adds nothing to the result.
"""
MIN_EQUALIZATION = 1e-5
"""Smallest equalization scale; a smaller one would push folded norm weights towards overflow."""


def equalization_from_absmax(channel_absmax: NDArray[np.floating]) -> NDArray[np.float64]:
    """Logarithmic activation equalization (FPTQ, arXiv 2308.15987): s_j = m_j / log2(2 + m_j).

    Args:
        channel_absmax: m_j = max over tokens of |x_j|, shape [in], not negative.

    Returns:
        s_j, float64, shape [in]; 1 for channels that were always 0, at least `MIN_EQUALIZATION` otherwise.
    """
    m = np.asarray(channel_absmax, dtype=np.float64)
    s = np.maximum(m / np.log2(2.0 + m), MIN_EQUALIZATION)
    return np.where(m == 0.0, 1.0, s)


def equalized_absmax(absmax: float) -> float:
    """Largest magnitude after equalization, in closed form: log2(2 + v), because m_j / s_j = log2(2 + m_j)."""
    return float(np.log2(2.0 + np.float64(absmax)))


def static_scale(absmax: float) -> np.float32:
    """Per-tensor INT8 scale of a tensor whose largest magnitude is `absmax`: absmax / 127 (1 / 127 for all zeros)."""
    return np.float32((absmax if absmax > 0.0 else 1.0) / INT8_MAX)


def per_token_scale(x: NDArray[np.floating]) -> NDArray[np.float32]:
    """INT8 scale of each token: max(max|x|, eps) / 127 in float32, shape [..., in] -> [..., 1]."""
    absmax = np.abs(x.astype(np.float32)).max(axis=-1, keepdims=True)
    scale: NDArray[np.float32] = np.maximum(absmax, PER_TOKEN_EPS) / np.float32(INT8_MAX)
    return scale


def quantize_activation(x: NDArray[np.floating], scale: NDArray[np.float32] | np.float32) -> NDArray[np.int64]:
    """clip(rint(x / scale), -128, 127) with the division in float32 and ties to even; shape kept."""
    ratio = x.astype(np.float32) / np.asarray(scale, dtype=np.float32)
    return np.clip(np.rint(ratio), INT8_MIN, INT8_MAX).astype(np.int64)


def weight_scale_rtn(weight: NDArray[np.floating], group_size: int) -> NDArray[np.float16]:
    """Round-to-nearest group scales: max|w| / 7 rounded to float16, the type the kernel reads.

    Args:
        weight: [out, in], in a multiple of `group_size`.
        group_size: Consecutive input channels that share a scale.

    Returns:
        float16, [out, in/group_size], positive: an all-zero group, or one below float16, gets the smallest positive
        float16 step that is normal.
    """
    groups = _grouped(weight.astype(np.float32), group_size)
    scale: NDArray[np.float16] = (np.abs(groups).max(axis=-1) / np.float32(INT4_MAX)).astype(np.float16)
    return np.maximum(scale, np.finfo(np.float16).tiny)


def quantize_weight_rtn(weight: NDArray[np.floating], scale: NDArray[np.float16], group_size: int) -> NDArray[np.int64]:
    """INT4 codes clip(rint(w / scale), -8, 7), division in float32; [out, in] -> [out, in]."""
    ratio = _grouped(weight.astype(np.float32), group_size) / scale.astype(np.float32)[..., None]
    codes: NDArray[np.int64] = np.clip(np.rint(ratio), INT4_MIN, INT4_MAX).astype(np.int64)
    return codes.reshape(weight.shape)


def dequantize_weight(codes: NDArray[np.integer], scale: NDArray[np.floating], group_size: int) -> NDArray[np.float64]:
    """Group scale x code in float64: codes [out, in], scale [out, in/group_size] -> [out, in]."""
    values = _grouped(codes.astype(np.float64), group_size) * scale.astype(np.float64)[..., None]
    return values.reshape(codes.shape)


def integer_scales(scale: NDArray[np.float16]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Group scales as integers times the largest unit of each output channel, exactly.

    A float16 is a multiple of 2^-24, so a row of them has a greatest common divisor. For the methods `two_level` and
    `integer_scale` the integers are small; for any others they merely exist.

    Args:
        scale: float16 [out, groups], finite, none of them 0.

    Returns:
        Units, float64 [out], positive, and integers, int64 [out, groups], with scale = unit x integer.

    Raises:
        ValueError: A scale is 0 or not finite.
    """
    if not (np.isfinite(scale).all() and scale.all()):
        raise ValueError("a scale is 0 or not finite")
    multiples = (scale.astype(np.float64) * 2.0**24).astype(np.int64)
    divisor = np.gcd.reduce(multiples, axis=1)
    return divisor * 2.0**-24, multiples // divisor[:, None]


def w4a8_linear(
    x_codes: NDArray[np.integer],
    x_scale: NDArray[np.float32] | np.float32,
    w_codes: NDArray[np.integer],
    w_scale: NDArray[np.float16],
    group_size: int,
    bias: NDArray[np.floating] | None = None,
) -> NDArray[np.float64]:
    """The W4A8 linear of the numeric contract, before the one rounding to the output type.

    Args:
        x_codes: INT8 activation codes, [tokens, in].
        x_scale: float32, a scalar or [tokens, 1].
        w_codes: INT4 weight codes, [out, in].
        w_scale: float16 group scales, [out, in/group_size].
        group_size: Consecutive input channels that share a weight scale.
        bias: [out] or None.

    Returns:
        float64, [tokens, out].
    """
    tokens, channels = x_codes.shape
    x = x_codes.astype(np.int64).reshape(tokens, channels // group_size, group_size)
    w = w_codes.astype(np.int64).reshape(w_codes.shape[0], channels // group_size, group_size)
    group_sums = np.einsum("tgk,ngk->tng", x, w)
    y: NDArray[np.float64] = (group_sums.astype(np.float64) * w_scale.astype(np.float64)[None]).sum(axis=-1)
    y = y * np.asarray(x_scale, dtype=np.float64)
    return y if bias is None else y + bias.astype(np.float64)


def weight_scale_int8(weight: NDArray[np.floating]) -> NDArray[np.float32]:
    """Scales of INT8 weights: max|w| / 127 of each output channel.

    Args:
        weight: [out, in].

    Returns:
        float32 [out], positive: a channel of zeros gets the smallest normal float32. float16 would not do: a channel
        whose largest weight is below 127 x 2^-14 = 0.0078 has no normal float16 scale.
    """
    scale: NDArray[np.float32] = np.abs(weight.astype(np.float32)).max(axis=1) / np.float32(INT8_MAX)
    return np.maximum(scale, np.finfo(np.float32).tiny)


def quantize_weight_int8(weight: NDArray[np.floating], scale: NDArray[np.float32]) -> NDArray[np.int64]:
    """INT8 codes clip(rint(w / scale), -127, 127), division in float32; [out, in], [out] -> [out, in]."""
    ratio = weight.astype(np.float32) / scale.astype(np.float32)[:, None]
    codes: NDArray[np.int64] = np.clip(np.rint(ratio), -INT8_MAX, INT8_MAX).astype(np.int64)
    return codes


def w8a8_linear(
    x_codes: NDArray[np.integer],
    x_scale: NDArray[np.float32] | np.float32,
    w_codes: NDArray[np.integer],
    w_scale: NDArray[np.float32],
    bias: NDArray[np.floating] | None = None,
) -> NDArray[np.float64]:
    """The W8A8 linear of the numeric contract, before the one rounding to the output type.

    Args:
        x_codes: INT8 activation codes, [tokens, in].
        x_scale: float32, a scalar or [tokens, 1].
        w_codes: INT8 weight codes, [out, in].
        w_scale: float32 channel scales, [out].
        bias: [out] or None.

    Returns:
        float64, [tokens, out].
    """
    sums = x_codes.astype(np.int64) @ w_codes.astype(np.int64).T
    y: NDArray[np.float64] = sums.astype(np.float64) * w_scale.astype(np.float64)
    y = y * np.asarray(x_scale, dtype=np.float64)
    return y if bias is None else y + bias.astype(np.float64)


def _grouped(values: NDArray[Scalar], group_size: int) -> NDArray[Scalar]:
    rows, channels = values.shape
    if channels % group_size:
        raise ValueError(f"group_size must divide the input channels ({group_size} does not divide {channels})")
    return values.reshape(rows, channels // group_size, group_size)
