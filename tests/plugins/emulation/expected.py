"""What a call must give: integers exactly, floats within a derived bound."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fptq_export import numerics
from tests.plugins.emulation.harness import FLOAT32_UNIT_ROUNDOFF, Quantized, Result
from tests.plugins.emulation.weights import Weight

OUTPUT_UNIT_ROUNDOFF = {np.float16: 2.0**-11, ml_dtypes.bfloat16: 2.0**-8}
OUTPUT_SMALLEST = {np.float16: 2.0**-25, ml_dtypes.bfloat16: 2.0**-134}  # half a step of the subnormals


def activation(x: NDArray[Any], static_scale: float | None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """INT8 codes [m, k] and FP32 scales [m, 1] of the numeric contract."""
    if static_scale is None:
        scale = numerics.per_token_scale(x)
    else:
        scale = np.full((x.shape[0], 1), static_scale, dtype=np.float32)
    return numerics.quantize_activation(x, scale), scale


def group_sums(codes: NDArray[np.int64], weight: Weight) -> NDArray[np.int64]:
    """Exact sums [m, n, groups]."""
    groups = codes.shape[1] // weight.group_size
    x = codes.reshape(codes.shape[0], groups, weight.group_size).astype(np.float64)
    w = weight.values.reshape(weight.values.shape[0], groups, weight.group_size).astype(np.float64)
    exact = np.matmul(x.transpose(1, 0, 2), w.transpose(1, 2, 0))  # below 2**53: exact in float64
    sums: NDArray[np.int64] = np.rint(exact.transpose(1, 2, 0)).astype(np.int64)
    return sums


def float_bound(
    codes: NDArray[np.int64], scale: NDArray[np.float32], weight: Weight, exact: NDArray[np.float64], dtype: Any
) -> NDArray[np.float64]:
    """Largest distance a correct kernel may have from the float64 result, [m, n].

    Each output is a sum of one term a group. A kernel rounds each fused step to FP32; sums over lanes, warps and parts
    of K add at most 4 + 8 + 16 further steps; the conversion of an INT32 sum, the channel scale, the activation scale
    and the bias add one each. So the error is at most steps x 2**-24 x the sum of magnitudes (Higham, Accuracy and
    Stability, 3.1), where a magnitude may be split over lanes: sum |x| |w| x scale. Then one rounding to the output.
    """
    groups = codes.shape[1] // weight.group_size
    steps = groups + 4 + 8 + 16 + 4
    per_weight = np.abs(weight.values) * np.repeat(np.abs(weight.scales), weight.group_size, axis=1)
    magnitude = (np.abs(codes).astype(np.float64) @ per_weight.T) * scale.astype(np.float64) + np.abs(exact)
    gamma = steps * FLOAT32_UNIT_ROUNDOFF / (1 - steps * FLOAT32_UNIT_ROUNDOFF)
    before = gamma * magnitude
    after = OUTPUT_UNIT_ROUNDOFF[dtype] * (np.abs(exact) + before) + OUTPUT_SMALLEST[dtype]
    bound: NDArray[np.float64] = before + after
    return bound


def check(
    result: Result,
    x: NDArray[Any],
    weight: Weight,
    *,
    static_scale: float | None = None,
    bias: NDArray[Any] | None = None,
    trace: bool = False,
) -> None:
    """Asserts success, exact group sums when traced, and outputs within the bound."""
    assert result.status == 0, f"status {result.status}: {result.error}"
    assert result.error == ""
    codes, scale = activation(x, static_scale)
    sums = group_sums(codes, weight)
    if trace:
        wrong = np.argwhere(result.group_sums != sums)
        assert not len(wrong), first_wrong(wrong, result.group_sums, sums)
    exact = (sums * weight.scales[None]).sum(axis=-1) * scale.astype(np.float64)
    if bias is not None:
        exact = exact + bias.astype(np.float64)
    dtype = x.dtype.type
    distance = np.abs(result.y.astype(np.float64) - exact)
    wrong = np.argwhere(~(distance <= float_bound(codes, scale, weight, exact, dtype)))
    assert not len(wrong), first_wrong(wrong, result.y, exact)


def first_wrong(wrong: NDArray[np.int64], got: NDArray[Any], want: NDArray[Any]) -> str:
    at = tuple(int(i) for i in wrong[0])
    return f"{len(wrong)} of {got.size} wrong, first at {at}: got {got[at]}, want {want[at]}"


def check_quantized(got: Quantized, x: NDArray[Any], static_scale: float | None = None) -> None:
    m, k = x.shape
    scale = numerics.per_token_scale(x) if static_scale is None else np.full((m, 1), static_scale, dtype=np.float32)
    codes = numerics.quantize_activation(x, scale)
    np.testing.assert_array_equal(got[0][:, :k], codes)
    np.testing.assert_array_equal(got[0][:, k:], 0)
    np.testing.assert_array_equal(got[1], scale[:, 0])
    np.testing.assert_array_equal(got[2], codes.sum(axis=1))
