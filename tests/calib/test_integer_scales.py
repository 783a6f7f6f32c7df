"""`two_level` and `integer_scale`: what a kernel reads back is exact, and its integer arithmetic cannot overflow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.weights import WEIGHT_METHODS, QuantizedWeight, WeightProblem
from calib.weights.gptq import quantize_gptq
from calib.weights.integer_scale import highest_integer
from calib.weights.two_level import HIGHEST_INTEGER
from fptq_export import numerics
from fptq_export.policy import WeightMethod
from tests.support.hessians import correlated_hessian, damped64, row_errors, row_objectives

GROUP = 16
METHODS: tuple[WeightMethod, ...] = ("two_level", "integer_scale")


def quantized(method: WeightMethod, seed: int, *, spread: int = 0, signed: bool = False) -> QuantizedWeight:
    """Six rows of 96 channels; groups differ by up to 2^spread in magnitude."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-spread, spread + 1, (6, 96 // GROUP), generator=generator).float()
    weight = torch.randn(6, 96, generator=generator) * torch.exp2(exponents / 2).repeat_interleave(GROUP, dim=1)
    return WEIGHT_METHODS[method].quantize(WeightProblem(weight, GROUP, correlated_hessian(96, seed), signed))


@given(seed=st.integers(0, 2**16), spread=st.integers(0, 16), signed=st.booleans())
def test_two_level_weights_are_exact_int8(*, seed: int, spread: int, signed: bool) -> None:
    """Code x integer lies in [-127, 127], and times the unit of its channel it is the policy's weight bit for bit."""
    got = quantized("two_level", seed, spread=spread, signed=signed)
    codes, scales = got.codes.numpy(), got.scales.numpy()
    unit, integers = numerics.integer_scales(scales)
    assert np.abs(integers).max() <= HIGHEST_INTEGER
    assert signed or integers.min() >= 1
    int8 = codes.astype(np.int64) * np.repeat(integers, GROUP, axis=1)
    assert np.abs(int8).max() <= 127
    assert np.array_equal(int8 * unit[:, None], numerics.dequantize_weight(codes, scales, GROUP))


@given(seed=st.integers(0, 2**16), spread=st.integers(0, 16), signed=st.booleans())
def test_integer_scales_are_integers_over_a_power_of_two(*, seed: int, spread: int, signed: bool) -> None:
    """Scale x amplifier is an integer within the limit, so the float16 in the policy is exact."""
    got = quantized("integer_scale", seed, spread=spread, signed=signed)
    unit, integers = numerics.integer_scales(got.scales.numpy())
    amplifier = 2.0 ** -np.floor(np.log2(unit))
    # The greatest common divisor may be odd times a power of two; the amplifier is that power.
    odd = unit * amplifier
    while (odd != np.rint(odd)).any():
        amplifier = np.where(odd != np.rint(odd), amplifier * 2, amplifier)
        odd = unit * amplifier
    assert np.abs(integers * odd[:, None]).max() <= highest_integer(96)


@pytest.mark.parametrize("in_features", [16, 576, 1536, 4096, 11008, 28672])
def test_sum_of_a_whole_channel_fits_int32(in_features: int) -> None:
    """The kernel adds every group in INT32: the largest input times the largest weight times the largest scale."""
    highest = highest_integer(in_features)
    assert 1 <= highest <= 2047
    assert in_features * 128 * 8 * highest <= np.iinfo(np.int32).max
    assert np.float16(highest) == highest


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("signed", [False, True])
def test_little_is_lost_against_float_scales(method: WeightMethod, *, signed: bool) -> None:
    """With coordinate descent a coarse grid must still do about as well as plain `gptq` with any float16."""
    weight, hessian = torch.randn(48, 256, generator=torch.Generator().manual_seed(5)), correlated_hessian(256, 5)
    problem, metric = WeightProblem(weight, 32, hessian, signed), damped64(hessian)
    float_scales, integer = (
        row_objectives(row_errors(weight, quantize(problem), 32), metric).sum()
        for quantize in (quantize_gptq, WEIGHT_METHODS[method].quantize)
    )
    assert integer < float_scales


@pytest.mark.parametrize("method", METHODS)
def test_channel_beyond_float16_is_visible(method: WeightMethod) -> None:
    """One infinite scale leaves the other channels on their grid."""
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(6))
    weight[1, 20] = 1e6
    got = WEIGHT_METHODS[method].quantize(WeightProblem(weight, GROUP, correlated_hessian(32, 6)))
    assert got.scales.isinf().tolist() == [[False, False], [False, True]]
    with pytest.raises(ValueError, match="not finite"):
        numerics.integer_scales(got.scales.numpy())


@pytest.mark.parametrize("method", METHODS)
def test_missing_hessian_is_refused(method: WeightMethod) -> None:
    """These methods choose codes by output error, which needs statistics."""
    with pytest.raises(ValueError, match="needs the Hessian"):
        WEIGHT_METHODS[method].quantize(WeightProblem(torch.ones(2, 16), GROUP))


def test_reference_finds_the_largest_unit() -> None:
    """3 and 5 units of 0.25, negative too; a zero has no integer scale."""
    unit, integers = numerics.integer_scales(np.array([[0.75, -1.25], [2.0, 2.0]], np.float16))
    assert unit.tolist() == [0.25, 2.0]
    assert integers.tolist() == [[3, -5], [1, 1]]
    with pytest.raises(ValueError, match="is 0"):
        numerics.integer_scales(np.zeros((1, 2), np.float16))
