"""Every quantizer on 11008 input channels, the width of a 7B down projection, with a Hessian where it needs one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.weights import WEIGHT_METHODS, QuantizedWeight, WeightProblem, adaround, gptq
from calib.weights.gptq import gptq_codes
from calib.weights.rtn import quantize_rtn
from fptq_export.policy import WeightMethod
from tests.support.hessians import FLOAT32_UNIT, LowRankHessian, row_errors
from tests.support.weights import HALF_STEP, assert_within_half_steps_of_rtn, check_form, drawn_weight

CHANNELS, GROUP = 11008, 16
FEEDBACK: tuple[WeightMethod, ...] = ("gptq", "gptq+cd", "adaround")
"""The latter two promise to be no worse than `rtn`. `gptq` does not; on this Hessian 0.09 of the objective is left."""
ON_A_GRID: tuple[WeightMethod, ...] = ("two_level", "integer_scale")
"""Their scales are multiples of one unit a channel: beside an outlier of 3e5, groups of small weights become 0."""
OUTLIER = 2
"""The row that has it."""

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Wide:
    """A Hessian of 11008 channels and its factor, in the order of the feedback."""

    low_rank: LowRankHessian
    hessian: torch.Tensor
    order: NDArray[np.int64]
    factor: torch.Tensor


@pytest.fixture(scope="module")
def wide() -> Iterator[Wide]:
    """Factored once for all methods: this takes half a minute, and nothing in it depends on the method."""
    low_rank = LowRankHessian.drawn(CHANNELS, 0)
    hessian = low_rank.matrix()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = gptq.inverse_factor(hessian[order][:, order])
    diagonal = hessian.diagonal()[order]

    def known(permuted: torch.Tensor) -> torch.Tensor:
        assert torch.equal(permuted.diagonal(), diagonal)
        return factor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "inverse_factor", known)
        patch.setattr(adaround, "ITERATIONS", 3)
        yield Wide(low_rank, hessian, order.numpy(), factor)


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """One row each: normal, zero, with an outlier, denormal, huge."""
    kinds = ("normal", "outlier", "denormal", "huge")
    normal, *others = (drawn_weight(kind, CHANNELS, 7)[1] for kind in kinds)
    return torch.stack([normal, torch.zeros(CHANNELS), *others])


def test_factor_is_that_of_the_conditional_variances(wide: Wide) -> None:
    """1 / U_jj^2 is the variance of channel j given all later ones; with low rank it has a closed form, in float64.

    H of the later ones is D + V V^T, so with A = I + V^T D^-1 V it is d_j + v_j A^-1 v_j. The float32 factor is good to
    sqrt(n) u cond(H): n roundings in a row, which add up like a random walk.
    """
    directions, diagonal = wide.low_rank.directions[wide.order], wide.low_rank.damped_diagonal()[wide.order]
    inner = np.eye(directions.shape[1])
    variances = np.empty(CHANNELS)
    for channel in reversed(range(CHANNELS)):
        along = inner @ directions[channel].astype(np.float64)
        extra = directions[channel] @ along
        variances[channel] = diagonal[channel] + extra
        inner -= np.outer(along, along) / variances[channel]
    largest = diagonal.max() + np.linalg.norm(directions, 2) ** 2
    tolerance = CHANNELS**0.5 * FLOAT32_UNIT * largest / diagonal.min()
    assert tolerance < 0.2
    assert (np.abs(1 / wide.factor.diagonal().double().numpy() ** 2 - variances) <= tolerance * variances).all()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("method", ["rtn", "mse", "clip"])
def test_searches_are_within_the_bound_of_rtn(
    wide: Wide, weight: torch.Tensor, method: WeightMethod, *, signed: bool
) -> None:
    """Group by group, as for narrow inputs; signed `rtn` itself clips, and is held to its form alone."""
    problem = WeightProblem(weight, GROUP, wide.hessian, signed)
    got = WEIGHT_METHODS[method].quantize(problem)
    check_form(problem, got)
    if method != "rtn" or not signed:
        importance = wide.hessian.diagonal().double().numpy() if method == "clip" else np.ones(CHANNELS)
        assert_within_half_steps_of_rtn(problem, got, importance)


@pytest.mark.parametrize("method", FEEDBACK)
def test_objective_is_not_above_that_of_rtn(wide: Wide, weight: torch.Tensor, method: WeightMethod) -> None:
    """Row by row e H e^T; feedback gains so much that no rounding of float32 could hide it."""
    objective, plain = objectives(wide, weight, method)
    assert (objective <= plain).all()


@pytest.mark.parametrize("method", ON_A_GRID)
def test_objective_on_a_grid_is_bounded(wide: Wide, weight: torch.Tensor, method: WeightMethod) -> None:
    """At most that of errors of half the largest weight, as for narrow inputs; without an outlier, at most `rtn`'s.

    The latter is no promise: feedback gains more here (0.1 is left) than coarser scales lose.
    """
    objective, plain = objectives(wide, weight, method)
    damping = (wide.low_rank.damped_diagonal() - wide.low_rank.diagonal).sum()
    spread = wide.hessian.abs().sum(dtype=torch.float64).item() + damping
    largest = weight.abs().amax(dim=1).double().numpy()
    assert (objective <= np.square(0.5 * largest + 2.0**-12) * spread).all()
    usual = np.arange(len(weight)) != OUTLIER
    assert (objective <= plain)[usual].all()


def objectives(
    wide: Wide, weight: torch.Tensor, method: WeightMethod
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Row by row e H e^T of a method and of `rtn`, with signed scales; the form is checked on the way."""
    problem = WeightProblem(weight, GROUP, wide.hessian, signed_scales=True)
    got = WEIGHT_METHODS[method].quantize(problem)
    check_form(problem, got)
    of_method, of_rtn = (row_errors(weight, quantized, GROUP) for quantized in (got, quantize_rtn(problem)))
    return wide.low_rank.row_objectives(of_method), wide.low_rank.row_objectives(of_rtn)


def test_feedback_is_within_the_bound_of_rtn(wide: Wide) -> None:
    """Where no code clips, e H e^T is at most the sum of (half a step)^2 H_jj, for 1 / U_jj^2 is at most H_jj.

    Scales of twice the size keep codes from clipping.
    """
    problem = WeightProblem(drawn_weight("normal", CHANNELS, 7), GROUP, wide.hessian)
    scales = quantize_rtn(problem).scales * 2
    codes = gptq_codes(problem, scales)
    assert ((codes > -8) & (codes < 7)).all()
    steps = scales.double().repeat_interleave(GROUP, dim=1).numpy()
    objective = wide.low_rank.row_objectives(row_errors(problem.weight, QuantizedWeight(codes, scales), GROUP))
    assert (objective <= (np.square(HALF_STEP * steps) * wide.hessian.diagonal().double().numpy()).sum(axis=1)).all()
