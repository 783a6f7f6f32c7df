from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fptq_export import numerics

CLOSED_FORM = 4 * 2.0**-53
"""Relative: four float64 roundings (logarithm, two quotients, sum) of 2^-53."""


def test_equalization_of_known_maxima() -> None:
    """The scale is m / log2(2 + m): 2 -> 1, 6 -> 2, 14 -> 3.5; a channel that was always 0 is left as it is."""
    s = numerics.equalization_from_absmax(np.array([2.0, 6.0, 14.0, 0.0]))
    np.testing.assert_allclose(s, [1.0, 2.0, 3.5, 1.0], rtol=CLOSED_FORM, atol=0.0)


@given(arrays(np.float32, 8, elements=st.floats(0, 65504, width=32)))
def test_equalization_is_positive_and_invertible(maxima: NDArray[np.float32]) -> None:
    """Whatever was measured, s can divide: positive, finite, and at least `MIN_EQUALIZATION`."""
    s = numerics.equalization_from_absmax(maxima)
    assert np.isfinite(s).all()
    assert (s >= numerics.MIN_EQUALIZATION).all()


@given(st.floats(1e-3, 65504))
def test_equalized_maximum_is_the_closed_form(absmax: float) -> None:
    """Divided by s, m becomes log2(2 + m), the range that the static scale is made from."""
    s = numerics.equalization_from_absmax(np.array([absmax]))
    np.testing.assert_allclose(absmax / s[0], numerics.equalized_absmax(absmax), rtol=CLOSED_FORM, atol=0.0)


def test_static_scale_reaches_127() -> None:
    """The largest magnitude seen gets code 127; a tensor of zeros gets a scale that divides."""
    assert numerics.quantize_activation(np.array([[-3.0, 3.0]]), numerics.static_scale(3.0)).tolist() == [[-127, 127]]
    assert numerics.static_scale(0.0) == np.float32(1 / 127)


def test_activation_ties_go_to_even_and_clip() -> None:
    """0.5 -> 0, 1.5 -> 2, -2.5 -> -2; beyond the range the codes stop at -128 and 127."""
    x = np.array([0.5, 1.5, -2.5, 200.0, -200.0])
    assert numerics.quantize_activation(x, np.float32(1)).tolist() == [0, 2, -2, 127, -128]


def test_activation_division_is_float32() -> None:
    """The quotient is rounded to float32 first, as in the kernel: 2.5 - 2^-27 becomes the tie 2.5."""
    x = np.array([2.5 - 2.0**-27])
    assert numerics.quantize_activation(x, np.float32(1)).tolist() == [2]
    assert numerics.quantize_activation(np.array([3.5 - 2.0**-27]), np.float32(1)).tolist() == [4]


def test_each_token_has_its_scale() -> None:
    """Tokens are quantized alone, and a token of zeros gets the guard."""
    scale = numerics.per_token_scale(np.array([[1.0, -2.0], [100.0, 3.0], [0.0, 0.0]], np.float16))
    assert scale.shape == (3, 1)
    assert scale.dtype == np.float32
    expected = np.array([[2.0], [100.0], [numerics.PER_TOKEN_EPS]], np.float32) / np.float32(127)
    np.testing.assert_array_equal(scale, expected)


@given(arrays(np.float32, (3, 16), elements=st.floats(-1e4, 1e4, width=32)))
def test_rtn_error_is_half_a_step(weight: NDArray[np.float32]) -> None:
    """Every weight is within half a group step of its code, plus what rounding the scale to float16 moves."""
    scale = numerics.weight_scale_rtn(weight, 16)
    codes = numerics.quantize_weight_rtn(weight, scale, 16)
    error = np.abs(numerics.dequantize_weight(codes, scale, 16) - weight)
    # The scale may be rounded down by 2^-11, which clips the largest weight, of 7 steps, by 7 * 2^-11 steps; a quotient
    # within 2^-21 of a tie may be rounded over it.
    assert (error <= scale.astype(np.float64) * (0.5 + 2.0**-21) + 1e-30).all()
    assert codes.min() >= -8
    assert codes.max() <= 7


def test_weight_of_zeros_has_a_scale() -> None:
    """A dead group gets the smallest normal float16, and zeros."""
    scale = numerics.weight_scale_rtn(np.zeros((1, 16), np.float32), 16)
    assert scale.dtype == np.float16
    assert scale.tolist() == [[float(np.finfo(np.float16).tiny)]]
    assert not numerics.quantize_weight_rtn(np.zeros((1, 16), np.float32), scale, 16).any()


def test_group_size_that_does_not_divide_is_refused() -> None:
    """A last group that is shorter would shift every scale after it."""
    weight = np.ones((2, 20), np.float32)
    scale = np.ones((2, 1), np.float16)
    with pytest.raises(ValueError, match=r"16 does not divide 20"):
        numerics.weight_scale_rtn(weight, 16)
    with pytest.raises(ValueError, match=r"16 does not divide 20"):
        numerics.quantize_weight_rtn(weight, scale, 16)
    with pytest.raises(ValueError, match=r"16 does not divide 20"):
        numerics.dequantize_weight(weight.astype(np.int8), scale, 16)


@given(seed=st.integers(0, 2**32 - 1), per_token=st.booleans(), biased=st.booleans())
def test_w4a8_linear_is_the_product_of_what_the_codes_mean(seed: int, per_token: bool, biased: bool) -> None:
    """Integer sums in groups, then scales: equal to multiplying dequantized values, up to float64 rounding."""
    rng = np.random.default_rng(seed)
    x_codes, w_codes = rng.integers(-128, 128, (3, 32)), rng.integers(-8, 8, (5, 32))
    w_scale = rng.uniform(1e-3, 1, (5, 2)).astype(np.float16)
    x_scale = rng.uniform(1e-3, 1, (3, 1) if per_token else ()).astype(np.float32)
    bias = rng.normal(size=5).astype(np.float16) if biased else None
    y = numerics.w4a8_linear(x_codes, x_scale, w_codes, w_scale, 16, bias)
    x, w = x_codes * x_scale.astype(np.float64), numerics.dequantize_weight(w_codes, w_scale, 16)
    expected = x @ w.T + (0 if bias is None else bias.astype(np.float64))
    # 32 products and sums in float64, each rounded by 2^-53 of what has been summed.
    tolerance = 40 * 2.0**-53 * (np.abs(x) @ np.abs(w).T + 10)
    assert (np.abs(y - expected) <= tolerance).all()


def test_w4a8_linear_sums_integers_exactly() -> None:
    """A sum that float32 could not hold is exact: 4096 products of 128 x 8 and one of 1."""
    x_codes = np.full((1, 4112), -128)
    w_codes = np.full((1, 4112), -8)
    x_codes[0, 4096:], w_codes[0, 4096:] = 0, 0
    x_codes[0, 4096], w_codes[0, 4096] = 1, 1
    scale = np.ones((1, 257), np.float16)
    assert numerics.w4a8_linear(x_codes, np.float32(1), w_codes, scale, 16)[0, 0] == 4096 * 1024 + 1
