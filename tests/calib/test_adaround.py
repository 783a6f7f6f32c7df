"""`adaround`: learned rounding against what can be known of its result, exhaustive search included."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from calib.weights import WeightProblem
from calib.weights.adaround import ITERATIONS, learned_codes, quantize_adaround
from calib.weights.gptq import quantize_gptq
from calib.weights.rtn import quantize_rtn
from calib.weights.scales import codes_from_scale, group_weight
from tests.support.hessians import correlated_hessian, damped64, objective_rounding, row_errors, row_objectives

GROUP = 16
FLOAT64_SLACK = 2.0**-40
"""The same sum of 256 products in another order: 2^9 roundings of 2^-53, times 2^4 for terms that cancel."""


def problem_of(rows: int, channels: int, seed: int, *, signed: bool = False) -> WeightProblem:
    weight = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))
    return WeightProblem(weight, GROUP, correlated_hessian(channels, seed), signed)


def rounded(problem: WeightProblem, scales: torch.Tensor) -> torch.Tensor:
    codes = codes_from_scale(group_weight(problem.weight, GROUP), scales)
    return codes.reshape(problem.weight.shape).to(torch.int8)


def objectives(
    problem: WeightProblem, codes: torch.Tensor, scales: torch.Tensor
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    assert problem.hessian is not None
    steps = scales.double().repeat_interleave(GROUP, dim=1)
    error = (codes.double() * steps - problem.weight.double()).numpy()
    return row_objectives(error, damped64(problem.hessian))


@pytest.mark.parametrize("signed", [False, True])
def test_learning_beats_rounding_with_the_same_scales(signed: bool) -> None:
    """Correlated channels make up for each other: over 32 rows the error must fall, and by more than a tenth."""
    problem = problem_of(32, 64, 1, signed=signed)
    scales = quantize_gptq(problem).scales
    learned = objectives(problem, learned_codes(problem, scales, ITERATIONS), scales)
    plain = objectives(problem, rounded(problem, scales), scales)
    assert learned.sum() < 0.9 * plain.sum()


def test_uncorrelated_channels_are_rounded_to_nearest() -> None:
    """With a diagonal H every weight is on its own, and the nearest code is best; near ties may fall either way."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    problem = WeightProblem(weight, GROUP, torch.eye(64))
    scales = quantize_rtn(problem).scales
    got, nearest = learned_codes(problem, scales, ITERATIONS), rounded(problem, scales)
    steps = scales.float().repeat_interleave(GROUP, dim=1)
    from_tie = ((weight / steps) % 1.0 - 0.5).abs()
    assert torch.equal(got[from_tie > 0.05], nearest[from_tie > 0.05])


def test_no_row_is_better_than_the_best_of_all() -> None:
    """Of all 2^12 ways to round twelve weights (four are zero), learning finds none below the least."""
    problem = problem_of(8, GROUP, 3)
    problem.weight[:, 12:] = 0.0
    scales = quantize_rtn(problem).scales
    learned = objectives(problem, learned_codes(problem, scales, 100), scales)
    choices = torch.tensor(list(itertools.product((0.0, 1.0), repeat=12)))
    for row, found in enumerate(learned):
        weight, scale = problem.weight[row], scales[row : row + 1]
        lower = (weight / scale.float()).floor().clamp(-8, 6)[0, :12]
        every = torch.nn.functional.pad(lower + choices, (0, 4))
        same = WeightProblem(weight.expand(len(every), GROUP), GROUP, problem.hessian)
        assert objectives(same, every, scale.expand(len(every), 1)).min() <= found * (1 + FLOAT64_SLACK)


def test_row_is_never_worse_than_error_feedback() -> None:
    """Coordinate descent starts from the better codes, row by row."""
    problem = problem_of(24, 64, 5)
    assert problem.hessian is not None
    metric = damped64(problem.hessian)
    before, after = (
        row_errors(problem.weight, method(problem), GROUP) for method in (quantize_gptq, quantize_adaround)
    )
    allowed = sum(objective_rounding(problem.weight, error, metric) for error in (before, after))
    assert (row_objectives(after, metric) <= row_objectives(before, metric) + allowed).all()


def test_same_weight_gives_the_same_codes() -> None:
    """Nothing is drawn, and the caller's random numbers are left alone."""
    problem = problem_of(4, 32, 6)
    state = torch.get_rng_state()
    first, second = quantize_adaround(problem), quantize_adaround(problem)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(state, torch.get_rng_state())


def test_codes_are_neighbours_of_the_weight() -> None:
    """Only up or down: no code is further from w / s than one step, but for those that clip."""
    problem = problem_of(16, 64, 7)
    scales = quantize_rtn(problem).scales
    codes = learned_codes(problem, scales, 40)
    ratio = problem.weight / scales.float().repeat_interleave(GROUP, dim=1)
    # Half an ulp of float16 in the scale moves a ratio of 7 by 7 x 2^-11.
    assert ((codes - ratio.clamp(-8, 7)).abs() <= 1.0 + 7 * 2.0**-11).all()


def test_missing_hessian_is_refused() -> None:
    """It is an error of the caller, not a silent fall back to rounding."""
    problem = WeightProblem(torch.ones(1, GROUP), GROUP)
    with pytest.raises(ValueError, match="Hessian"):
        quantize_adaround(problem)
    with pytest.raises(ValueError, match="Hessian"):
        learned_codes(problem, quantize_rtn(problem).scales, 1)
