"""The estimate that equalizers are compared by is the error that they leave."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from calib.search_equalization import Consumer, SiteProblem, site_error
from fptq_export import numerics
from tests.support.hessians import correlated_hessian

FLOAT32_UNIT = 2.0**-24
CHANNELS, GROUP = 64, 16
SUMMED = 4 * CHANNELS * FLOAT32_UNIT
"""Relative. e H e^T is two sums of 64 float32 products each, whose terms partly cancel; D has three roundings more."""


def problem(*, static: bool = False, rows: int = 8) -> SiteProblem:
    random = np.random.default_rng(3)
    weight = torch.from_numpy(random.standard_normal((rows, CHANNELS)).astype(np.float32))
    absmax = random.lognormal(sigma=1.0, size=CHANNELS).astype(np.float32)
    return SiteProblem(
        [Consumer(weight, GROUP, signed_scales=False, static=static)], correlated_hessian(CHANNELS, 3), absmax
    )


def scale(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).lognormal(size=CHANNELS).astype(np.float32)


def reference(at: SiteProblem, s: NDArray[np.float32]) -> tuple[float, float]:
    """Weight error and activation error in float64, output by output."""
    weights = activations = 0.0
    hessian = at.hessian.double().numpy()
    step = float((at.absmax.astype(np.float64) / s).max()) / 127
    for consumer in at.consumers:
        equalized = consumer.weight.numpy() * s
        scales = numerics.weight_scale_rtn(equalized, GROUP)
        codes = numerics.quantize_weight_rtn(equalized, scales, GROUP)
        error = (numerics.dequantize_weight(codes, scales, GROUP) - equalized) / s
        weights += float(np.trace(error @ hessian @ error.T))
        activations += step**2 / 12 * float((equalized.astype(np.float64) ** 2).sum())
    return weights, activations


def test_weight_error_is_that_of_rounding() -> None:
    """For any s it is tr(D H D^T) with the codes that rounding to nearest would store."""
    at = problem()
    for seed in range(3):
        np.testing.assert_allclose(site_error(at, scale(seed)), reference(at, scale(seed))[0], rtol=SUMMED, atol=0.0)


def test_static_inputs_add_their_rounding_noise() -> None:
    """step^2 / 12 through the equalized weights, for static consumers only, and only where it is asked for."""
    at = problem(static=True)
    weights, activations = reference(at, scale())
    np.testing.assert_allclose(site_error(at, scale()), weights + activations, rtol=SUMMED, atol=0.0)
    np.testing.assert_allclose(site_error(at, scale(), static_input=False), weights, rtol=SUMMED, atol=0.0)


def test_powers_of_two_common_to_all_channels_change_nothing() -> None:
    """A common factor moves no code: the error is the same, bit for bit."""
    at = problem(static=True)
    s = scale()
    assert site_error(at, s) == site_error(at, s * np.float32(8.0))


def test_consumers_add_up() -> None:
    """The error of a site is the sum over what reads it."""
    one, two = problem(), problem(static=True, rows=24)
    both = SiteProblem([*one.consumers, *two.consumers], one.hessian, one.absmax)
    two = SiteProblem(two.consumers, one.hessian, one.absmax)
    expected = site_error(one, scale()) + site_error(two, scale())
    np.testing.assert_allclose(site_error(both, scale()), expected, rtol=2.0**-50, atol=0.0)


def test_scales_that_float16_cannot_hold_are_never_better() -> None:
    """A group scale above 65504 makes the estimate infinite or NaN: no candidate wins by it."""
    at = problem()
    huge = np.full(CHANNELS, 1e7, np.float32)
    assert not site_error(at, huge) < site_error(at, np.ones(CHANNELS, np.float32))


def test_large_layers_are_sampled_evenly() -> None:
    """Of 1024 equal pairs of rows every second row is scored, and the sum stands for all."""
    small = problem(rows=512)
    (consumer,) = small.consumers
    doubled = Consumer(consumer.weight.repeat_interleave(2, dim=0), GROUP, signed_scales=False, static=False)
    large = SiteProblem([doubled], small.hessian, small.absmax)
    assert site_error(large, scale()) == 2 * site_error(small, scale())
