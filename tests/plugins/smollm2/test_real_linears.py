"""Real SmolLM2 linears: emulated kernels, the function body in ONNX Runtime, and `numerics` compute one thing.

What is compared, for real text, real weights and the packed bytes that go into the engine:

* INT8 activations. Of the kernel: the codes that `quantize_activation` left in the workspace of the very call whose
  output is checked (GEMM), or of a call of its own where the kernel quantizes in registers (GEMV). Of the body: the
  output of its `QuantizeLinear` (static) or `Clip` (per token). Both equal `numerics.quantize_activation`.
* INT32 sums inside a group. The kernel hands every sum to `trace_group_sum` before it is scaled; the emulator keeps
  them, [tokens, out, groups]. They equal the sums of the integers of `numerics`, bit for bit.
* FP16 outputs, each within a bound that is derived here or in `emulation/expected.py`: kernel against `numerics`
  (float64), body against `numerics`, and kernel against body (the sum of the two).
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export import numerics
from fptq_export.rewrite.functions import W4A8_PER_TOKEN, W4A8_STATIC
from tests.plugins.emulation.expected import activation, float_bound
from tests.plugins.emulation.harness import GEMM, GEMV, PER_TOKEN, Desc, Kernels, Result, quantize
from tests.plugins.emulation.weights import GROUP, Weight, padded, plain_weight
from tests.plugins.smollm2.real_linears import RealLinear, RealModel, body_outputs
from tests.support.w4a8_cases import assert_same_integers, assert_within

pytestmark = pytest.mark.slow

FP16_ROUNDOFF = 2.0**-11
FP32_ROUNDOFF = 2.0**-24
FP16_HALF_STEP = 2.0**-25
"""Half the distance of FP16 numbers near zero."""
BODY_ACTIVATION_ERROR = FP16_ROUNDOFF + 2 * FP32_ROUNDOFF
"""Relative error of an activation in the body: code x scale is rounded to FP32, then to FP16; (1 + u16)(1 + u32) - 1
is below u16 + 2 u32."""
BODY_WEIGHT_ERROR = FP16_ROUNDOFF + 2 * FP32_ROUNDOFF
"""The same for a weight: INT4 code x FP16 group scale has 14 bits, is exact in FP32, and is rounded to FP16."""

CASES = {
    "q, k, v: static, K 576, g64": ("q_proj+k_proj+v_proj", "static", W4A8_STATIC),
    "q, k, v per token, K 576, g64": ("q_proj+k_proj+v_proj", "static", W4A8_PER_TOKEN),
    "gate, up: LAE, K 576, g64": ("gate_proj+up_proj", "lae_static", W4A8_STATIC),
    "down: static, K 1536, g128": ("down_proj", "static", W4A8_STATIC),
    "down: LAE, K 1536, g128": ("down_proj", "lae_static", W4A8_STATIC),
    "down: per token, K 1536, g128": ("down_proj", "per_token", W4A8_PER_TOKEN),
}
"""Names, tier of the policy, operator. No linear of 576 channels is per token in the policy: the second case runs the
same weight in that mode."""


def body_bound(codes: NDArray[np.int64], scale: NDArray[np.float32], linear: RealLinear) -> NDArray[np.float64]:
    """Largest distance of the function body from the float64 result, [tokens, out].

    With X = |code x scale| and W = |weight|, the factors are off by at most dX = `BODY_ACTIVATION_ERROR` X + e and
    dW = `BODY_WEIGHT_ERROR` W + e, e the half step near zero. Their products are exact in FP32 (22 bits); a sum of K of
    them in any order is off by gamma_K times the sum of magnitudes (Higham, Accuracy and Stability, 2002, 3.1), and
    the result is rounded once to FP16.
    """
    weight = linear.weight
    x = np.abs(codes).astype(np.float64) * scale.astype(np.float64)
    w = np.abs(weight.values) * np.repeat(np.abs(weight.scales), weight.group_size, axis=1)
    dx, dw = BODY_ACTIVATION_ERROR * x + FP16_HALF_STEP, BODY_WEIGHT_ERROR * w + FP16_HALF_STEP
    factors = dx @ w.T + x @ dw.T + dx @ dw.T
    terms = x.shape[1] * FP32_ROUNDOFF
    before = factors + terms / (1 - terms) * ((x + dx) @ (w + dw).T)
    bound: NDArray[np.float64] = before + FP16_ROUNDOFF * (np.abs(exact_output(codes, scale, linear)) + before)
    return bound + FP16_HALF_STEP


def exact_output(codes: NDArray[np.int64], scale: NDArray[np.float32], linear: RealLinear) -> NDArray[np.float64]:
    """`numerics.w4a8_linear` of the layer, [tokens, out]."""
    weight = linear.weight
    group_scales = weight.scales.astype(np.float16)
    return numerics.w4a8_linear(codes, scale, weight.values, group_scales, weight.group_size)


def group_sums(codes: NDArray[np.int64], weight: Weight) -> NDArray[np.int64]:
    """What `numerics` sums inside each group, [tokens, out, groups]: its linear of one group, with scales of 1."""
    size, one = weight.group_size, np.ones((len(weight.values), 1), np.float16)
    starts = range(0, codes.shape[1], size)
    sums = [
        numerics.w4a8_linear(
            codes[:, start : start + size], np.float32(1), weight.values[:, start : start + size], one, size
        )
        for start in starts
    ]
    return np.stack(sums, axis=-1).astype(np.int64)  # integers below 2^53: exact in float64


def kernel_codes(kernels: Kernels, result: Result, x: NDArray[np.float16], x_scale: float | None) -> NDArray[np.int64]:
    """INT8 activations of a call, [tokens, in]."""
    tokens, channels = x.shape
    if not len(result.workspace):
        return quantize(kernels, x, x_scale)[0][:, :channels].astype(np.int64)
    width = padded(channels, 64)
    codes = result.workspace[: tokens * width].view(np.int8).reshape(tokens, width)
    assert not codes[:, channels:].any()
    return codes[:, :channels].astype(np.int64)


@pytest.mark.parametrize("tokens", [1, 5, 17])
@pytest.mark.parametrize("case", CASES)
def test_kernel_body_and_numerics_agree(kernels: Kernels, real_model: RealModel, case: str, tokens: int) -> None:
    """INT8 activations and INT32 group sums are equal bit for bit; FP16 outputs are within the bounds of both."""
    names, tier, op_type = CASES[case]
    linear = real_model.linear(real_model.path(names, tier))
    x_scale = linear.x_scale if op_type == W4A8_STATIC else None
    assert (x_scale is None) == (op_type == W4A8_PER_TOKEN)
    x = linear.x[-tokens:]
    codes, scale = activation(x, x_scale)
    assert np.unique(codes).size > 16, "these activations would not tell a kernel from another"

    result = kernels.linear(x, linear.weight, static_scale=x_scale, trace=True)
    assert (result.status, result.error) == (0, "")
    assert_same_integers(kernel_codes(kernels, result, x, x_scale), codes, "INT8 activations of the kernel")
    assert_same_integers(result.group_sums, group_sums(codes, linear.weight), "INT32 group sums of the kernel")

    bodies = [body_outputs(real_model.body(path, op_type), x) for path in linear.paths]
    for _, body_codes in bodies:
        assert_same_integers(body_codes, codes, "INT8 activations of the function body")
    body = np.concatenate([y for y, _ in bodies], axis=1)

    exact = exact_output(codes, scale, linear)
    of_kernel, of_body = (
        float_bound(codes, scale, linear.weight, exact, np.float16),
        body_bound(codes, scale, linear),
    )
    assert_within(result.y, exact, of_kernel)
    assert_within(body, exact, of_body)
    assert_within(result.y, body.astype(np.float64), of_kernel + of_body)


def test_cases_run_both_kernels(kernels: Kernels, real_model: RealModel) -> None:
    """One token is the GEMV's, 17 are the tensor-core kernel's: the cases above are not one kernel three times."""
    linear = real_model.linear(real_model.path("down_proj", "per_token"))
    out, channels = linear.weight.values.shape
    kinds = [
        kernels.choose(Desc(m, out, channels, linear.weight.group_size, GROUP, PER_TOKEN, 0, 0)).kernel
        for m in (1, 5, 17)
    ]
    assert kinds == [GEMV, GEMM, GEMM]


def test_plugin_bytes_are_the_layout_of_the_kernels(real_model: RealModel) -> None:
    """The packed weight of a fused linear is the tile order of layout.h, written down a second time in the harness."""
    weight = real_model.linear(real_model.path("q_proj+k_proj+v_proj", "static")).weight
    again = plain_weight(weight.values, weight.scales.astype(np.float16), weight.group_size)
    np.testing.assert_array_equal(weight.codes, again.codes)
    np.testing.assert_array_equal(weight.scale_bytes, again.scale_bytes)
