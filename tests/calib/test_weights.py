"""INT4 weights: `rtn` is the reference bit for bit, searches are never worse, and what does not fit is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib.weights import WEIGHT_METHODS, QuantizedWeight, WeightProblem
from calib.weights.clip import quantize_clip
from calib.weights.mse import quantize_mse
from calib.weights.rtn import quantize_rtn
from fptq_export import numerics
from fptq_export.policy import GROUP_SIZES, WeightMethod

METHODS = tuple(WEIGHT_METHODS)
FLOAT32_ULP = 2.0**-23
weights = hnp.arrays(np.float32, (3, 32), elements=st.floats(-(2.0**18), 2.0**18, width=32))


def quantize(method: WeightMethod, weight: torch.Tensor, group_size: int, *, signed: bool = False) -> QuantizedWeight:
    """Quantize with a Hessian of correlated channels where the method needs one."""
    entry = WEIGHT_METHODS[method]
    hessian = random_hessian(weight.shape[1]) if entry.needs_hessian else None
    return entry.quantize(WeightProblem(weight, group_size, hessian, signed))


def random_hessian(channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator) + 2 * torch.eye(channels)
    x = torch.randn(4 * channels, channels, generator=generator) @ mix
    return x.T @ x / len(x)


def squared_error(weight: NDArray[np.float32], quantized: QuantizedWeight) -> NDArray[np.float64]:
    """Sum of squares for each group of 16, in float64."""
    error = numerics.dequantize_weight(quantized.codes.numpy(), quantized.scales.numpy(), 16) - weight
    squares: NDArray[np.float64] = np.square(error.reshape(len(weight), -1, 16)).sum(axis=-1)
    return squares


@given(weights)
def test_rtn_is_the_reference(weight: NDArray[np.float32]) -> None:
    """Scales and codes are bit for bit those of `numerics`, for any finite weights."""
    got = quantize_rtn(WeightProblem(torch.from_numpy(weight), 16))
    expected = numerics.weight_scale_rtn(weight, 16)
    assert got.codes.dtype == torch.int8
    assert np.array_equal(got.scales.numpy().view(np.uint16), expected.view(np.uint16))
    assert np.array_equal(got.codes.numpy(), numerics.quantize_weight_rtn(weight, expected, 16))


@given(weights)
def test_mse_is_never_worse_than_rtn(weight: NDArray[np.float32]) -> None:
    """Group by group the error is at most that of `rtn`.

    The search compares float32 sums of 16 squares. Each is off by at most 16 roundings of the sum and 4 of a term
    (difference, counted twice by the square, product, square), so a winner may be worse by twice 20 half ulps.
    """
    problem = WeightProblem(torch.from_numpy(weight), 16)
    least, plain = (squared_error(weight, method(problem)) for method in (quantize_mse, quantize_rtn))
    # A rounded code x scale is off by half an ulp of the weight, whatever the difference is: an absolute term.
    absolute = 16 * np.square(np.abs(weight).max() * FLOAT32_ULP)
    assert (least <= plain * (1 + 20 * FLOAT32_ULP) + absolute).all()


def test_mse_gains_on_groups_with_an_outlier() -> None:
    """One weight of 0.7 among many of 0.55, which its scale of 0.1 rounds worst: the search finds a better scale."""
    weight = np.full((1, 64), 0.55, np.float32)
    weight[0, 0] = 0.7
    problem = WeightProblem(torch.from_numpy(weight), 16)
    plain, least = (squared_error(weight, method(problem))[0, 0] for method in (quantize_rtn, quantize_mse))
    assert least < 0.2 * plain


def test_clip_looks_where_the_input_is() -> None:
    """A weight of 7 on a channel that is always 0 need not get through: the others are rounded to steps of theirs."""
    weight = torch.full((1, 16), 0.8)
    weight[0, 0] = 7.0
    moments = torch.ones(16)
    moments[0] = 0.0
    clipped = quantize_clip(WeightProblem(weight, 16, torch.diag(moments)))
    everywhere = quantize_clip(WeightProblem(weight, 16, torch.eye(16)))
    assert clipped.scales.item() == np.float16(0.8)
    assert everywhere.scales.item() > 0.9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_method_keeps_the_signature(method: WeightMethod, group_size: int) -> None:
    """Codes int8 [out, in] in [-8, 7], scales positive float16 [out, in/group], and the weight is left alone."""
    weight = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    got = quantize(method, weight, group_size)
    assert (got.codes.dtype, got.codes.shape) == (torch.int8, (5, 256))
    assert (got.scales.dtype, got.scales.shape) == (torch.float16, (5, 256 // group_size))
    assert int(got.codes.min()) >= -8
    assert int(got.codes.max()) <= 7
    assert (got.scales > 0).all()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-30])
def test_groups_of_nothing_get_a_usable_scale(method: WeightMethod, value: float) -> None:
    """Zero and vanishing groups give codes 0 and the smallest normal float16, never 0 or a subnormal."""
    for signed in (False, True):
        got = quantize(method, torch.full((1, 16), value), 16, signed=signed)
        assert got.codes.count_nonzero() == 0
        assert got.scales.item() == np.finfo(np.float16).tiny


@pytest.mark.parametrize("method", METHODS)
def test_scale_beyond_float16_is_visible(method: WeightMethod) -> None:
    """A group whose scale does not fit comes out as inf, so that the caller can refuse the layer by name."""
    weight = torch.ones(1, 32)
    weight[0, 20] = 1e6
    assert quantize(method, weight, 16).scales.isinf().tolist() == [[False, True]]


def test_ties_round_to_even() -> None:
    """Half-way codes go to the even neighbour, as in the contract: 0.5 -> 0, 1.5 -> 2, -2.5 -> -2."""
    weight = torch.tensor([[7.0, 0.5, 1.5, -2.5] + [0.0] * 12])
    got = quantize_rtn(WeightProblem(weight, 16))
    assert got.scales.item() == 1.0
    assert got.codes[0, :4].tolist() == [7, 0, 2, -2]


@given(weights)
def test_signed_scale_maps_the_largest_weight_to_minus_eight(weight: NDArray[np.float32]) -> None:
    """All 16 levels are used: with 15 a group loses a sixteenth of its resolution."""
    got = quantize_rtn(WeightProblem(torch.from_numpy(weight), 16, signed_scales=True))
    groups = weight.reshape(len(weight), -1, 16)
    largest = np.abs(groups).argmax(axis=-1)[..., None]
    codes = got.codes.numpy().reshape(groups.shape)
    # A group whose step is below the smallest normal float16 keeps that step: its codes are smaller.
    usable = np.abs(groups).max(axis=-1) / 8 >= np.finfo(np.float16).tiny
    assert (np.take_along_axis(codes, largest, axis=-1)[..., 0][usable] == -8).all()


@pytest.mark.parametrize("method", METHODS)
def test_signed_scales_leave_less_error(method: WeightMethod) -> None:
    """Over many groups of normal weights one more level must pay, with every method."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    hessian = random_hessian(256).double().numpy()
    errors = []
    for signed in (False, True):
        got = quantize(method, weight, 32, signed=signed)
        error = numerics.dequantize_weight(got.codes.numpy(), got.scales.numpy(), 32) - weight.numpy()
        metric = hessian if WEIGHT_METHODS[method].needs_hessian else np.eye(256)
        errors.append(np.einsum("ij,jk,ik->", error, metric, error))
        assert bool((got.scales < 0).any()) is signed
    assert errors[1] < errors[0]
