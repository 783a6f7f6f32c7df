"""GPTQ against a slow independent implementation, and the errors it must and must not make."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from calib.weights import WeightProblem
from calib.weights.gptq import DAMPING, inverse_factor, quantize_gptq
from calib.weights.rtn import quantize_rtn
from fptq_export import numerics

GROUP = 16


def correlated_hessian(channels: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((8 * channels, channels)) @ (
        rng.standard_normal((channels, channels)) + 2 * np.eye(channels)
    )
    return torch.from_numpy((x.T @ x / len(x)).astype(np.float32))


def slow_codes(
    weight: NDArray[np.float64], scales: NDArray[np.float64], hessian: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Optimal brain surgeon as in the paper's equation 2: after each column the inverse is reduced by elimination.

    No Cholesky factor, no blocks, no permutation: the next column is the one of the largest diagonal that is left.
    """
    damped = hessian + DAMPING * hessian.diagonal().mean() * np.eye(len(hessian))
    inverse = np.linalg.inv(damped)
    weight, codes = weight.copy(), np.zeros(weight.shape, np.int64)
    for column in np.argsort(-hessian.diagonal(), kind="stable"):
        codes[:, column] = np.clip(np.rint(weight[:, column] / scales[:, column]), -8, 7)
        error = (weight[:, column] - codes[:, column] * scales[:, column]) / inverse[column, column]
        weight -= np.outer(error, inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0
    return codes


def output_error(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor) -> float:
    error = numerics.dequantize_weight(codes.numpy(), scales.numpy(), GROUP) - weight.double().numpy()
    return float(np.einsum("ij,jk,ik->", error, hessian.double().numpy(), error))


@pytest.mark.parametrize("channels", [16, 48, 160])
@pytest.mark.parametrize("seed", range(4))
def test_codes_are_those_of_the_slow_implementation(channels: int, seed: int) -> None:
    """Every code: order, feedback and block update, with fewer and more columns than one block.

    Both compute in float64, so that no value comes close enough to a tie to round differently.
    """
    hessian = correlated_hessian(channels, seed).double()
    weight = torch.randn(20, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = quantize_gptq(WeightProblem(weight, GROUP, hessian))
    scales = np.repeat(got.scales.numpy().astype(np.float64), GROUP, axis=1)
    assert np.array_equal(got.codes.numpy(), slow_codes(weight.numpy(), scales, hessian.numpy()))


def test_factor_is_the_inverse() -> None:
    """U^T U (H + damping) is the identity."""
    hessian = correlated_hessian(64, 0)
    factor = inverse_factor(hessian).double().numpy()
    damped = hessian.double().numpy() + DAMPING * hessian.diagonal().double().mean().item() * np.eye(64)
    condition = np.linalg.cond(damped)
    # Forward error of a float32 factorization and inversion: a few n u cond (Higham, Accuracy and Stability, 10, 14).
    bound = 8 * 64 * 2.0**-24 * condition
    assert np.abs(np.triu(factor) - factor).max() == 0.0
    assert np.abs(factor.T @ factor @ damped - np.eye(64)).max() <= bound


def test_output_error_is_below_that_of_rounding() -> None:
    """What the method is for: correlated inputs let later columns make up for earlier ones."""
    hessian = correlated_hessian(128, 1)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    feedback = quantize_gptq(WeightProblem(weight, GROUP, hessian))
    rounded = quantize_rtn(WeightProblem(weight, GROUP))
    assert output_error(weight, feedback.codes, feedback.scales, hessian) < 0.7 * output_error(
        weight, rounded.codes, rounded.scales, hessian
    )


def test_independent_channels_are_rounded() -> None:
    """With a diagonal Hessian there is nothing to make up for: every weight goes to its nearest code."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    got = quantize_gptq(WeightProblem(weight, GROUP, torch.diag(torch.arange(1.0, 65.0))))
    expected = numerics.quantize_weight_rtn(weight.numpy(), got.scales.numpy(), GROUP)
    assert np.array_equal(got.codes.numpy(), expected)


@given(st.integers(0, 63), st.floats(2.0**-20, 2.0**20))
def test_dead_channels_and_outliers_are_no_obstacle(channel: int, factor: float) -> None:
    """A channel that calibration never saw, and one far larger than the rest, still give finite codes."""
    hessian = correlated_hessian(64, 3)
    hessian[channel] = hessian[:, channel] = 0.0
    other = (channel + 1) % 64
    hessian[other] *= factor
    hessian[:, other] *= factor
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    got = quantize_gptq(WeightProblem(weight, GROUP, hessian))
    assert got.scales.isfinite().all()
    # Nothing is known of the dead channel: its weights are rounded, not dropped.
    nearest = numerics.quantize_weight_rtn(weight.numpy(), got.scales.numpy(), GROUP)
    assert np.array_equal(got.codes[:, channel].numpy(), nearest[:, channel])


def test_input_that_was_always_zero_is_rounded() -> None:
    """No information at all is no failure."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    got = quantize_gptq(WeightProblem(weight, GROUP, torch.zeros(32, 32)))
    assert np.array_equal(got.codes.numpy(), numerics.quantize_weight_rtn(weight.numpy(), got.scales.numpy(), GROUP))


def test_hessian_without_factor_is_refused() -> None:
    """NaN in the statistics must not become codes."""
    with pytest.raises(ValueError, match="positive definite"):
        quantize_gptq(WeightProblem(torch.ones(2, 16), GROUP, torch.full((16, 16), float("nan"))))
    with pytest.raises(ValueError, match="needs the Hessian"):
        quantize_gptq(WeightProblem(torch.ones(2, 16), GROUP))
