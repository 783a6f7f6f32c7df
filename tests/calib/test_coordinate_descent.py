"""Coordinate descent: it only ever improves, ends where no single change helps, and stays within its grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.weights import QuantizedWeight, WeightProblem
from calib.weights.coordinate_descent import quantize_gptq_cd, refined
from calib.weights.gptq import damped, quantize_gptq
from calib.weights.grid import IntegerGrid, ScaleGrid
from calib.weights.group_scales import fitted_scales
from calib.weights.rtn import quantize_rtn
from tests.support.hessians import correlated_hessian, damped64, objective_rounding, row_errors, row_objectives

GROUP = 16


def drawn(out: int, channels: int, seed: int) -> torch.Tensor:
    return torch.randn(out, channels, generator=torch.Generator().manual_seed(seed))


def coarse_grid(out: int, *, signed: bool) -> IntegerGrid:
    """Steps so coarse that rounding least-squares scales to them makes many rows worse."""
    return IntegerGrid(signed, torch.full((out,), 0.125), torch.ones(out), 8)


@given(
    channels=st.sampled_from([16, 48, 160]),
    seed=st.integers(0, 2**16),
    signed=st.booleans(),
    coarse=st.booleans(),
    factor=st.sampled_from([2.0**-6, 1.0, 2.0**10]),
)
def test_no_row_gets_worse(*, channels: int, seed: int, signed: bool, coarse: bool, factor: float) -> None:
    """What the method promises, measured in float64: a scale or a code that hurts is never taken."""
    weight, hessian = drawn(6, channels, seed) * factor, correlated_hessian(channels, seed)
    problem = WeightProblem(weight, GROUP, hessian, signed)
    grid = coarse_grid(6, signed=signed) if coarse else ScaleGrid(signed)
    start = quantize_gptq(problem)
    if coarse:
        start = QuantizedWeight(start.codes, grid.nearest(start.scales.float().T, slice(None)).T.half())
    got = refined(problem, [start], grid)
    metric = damped64(hessian)
    before, after = (row_errors(weight, quantized, GROUP) for quantized in (start, got))
    allowed = objective_rounding(weight, before, metric) + objective_rounding(weight, after, metric)
    assert (row_objectives(after, metric) <= row_objectives(before, metric) + allowed).all()
    assert int(got.codes.min()) >= -8
    assert int(got.codes.max()) <= 7
    assert signed or (got.scales > 0).all()
    assert torch.equal(grid.nearest(got.scales.float().T, slice(None)).T.half(), got.scales)


def test_no_single_code_can_be_improved_at_the_end() -> None:
    """A wrong sign or a stale gradient would stop elsewhere: every other value of every code is tried in float64."""
    weight, hessian = drawn(4, 160, 0), correlated_hessian(160, 0)
    got = refined(
        WeightProblem(weight, GROUP, hessian), [quantize_rtn(WeightProblem(weight, GROUP))], ScaleGrid(False), 60
    )
    metric, error = damped64(hessian), row_errors(weight, got, GROUP)
    scales = np.repeat(got.scales.double().numpy(), GROUP, axis=1)
    slope, allowed = error @ metric, 2 * objective_rounding(weight, error, metric)
    for code in range(-8, 8):
        move = (code - got.codes.double().numpy()) * scales
        change = move * (2 * slope + move * metric.diagonal())
        assert (change >= -allowed[:, None]).all()


def test_better_than_feedback_alone() -> None:
    """What it is for: with correlated channels the gain is a tenth of the objective, not a rounding effect."""
    weight, hessian = drawn(32, 128, 1), correlated_hessian(128, 1)
    problem, metric = WeightProblem(weight, GROUP, hessian), damped64(hessian)
    plain, better = (
        row_objectives(row_errors(weight, method(problem), GROUP), metric).sum()
        for method in (quantize_gptq, quantize_gptq_cd)
    )
    assert better < 0.9 * plain


def test_weight_that_is_on_the_grid_is_left_alone() -> None:
    """Nothing is left to gain, so rounding noise must not move a code or a scale."""
    codes = torch.randint(-8, 8, (4, 64), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    exact = QuantizedWeight(codes, torch.full((4, 4), 0.25, dtype=torch.float16))
    problem = WeightProblem(codes * 0.25, GROUP, correlated_hessian(64, 2))
    got = refined(problem, [exact], ScaleGrid(False))
    assert torch.equal(got.codes, exact.codes)
    assert torch.equal(got.scales, exact.scales)


@pytest.mark.parametrize("seed", range(3))
def test_scales_are_the_least_squares_solution(seed: int) -> None:
    """Against `numpy.linalg.lstsq` in float64 on the factored problem.

    The ridge costs at most ridge x |s* - s0|^2, and a move of each scale by half an ulp of float16 at most
    (sum of |ds_a| sqrt(M_aa))^2, because M is positive semidefinite.
    """
    out, channels = 5, 96
    weight, hessian = drawn(out, channels, seed), correlated_hessian(channels, seed)
    start, metric = quantize_rtn(WeightProblem(weight, GROUP)), damped64(hessian)
    error = row_errors(weight, start, GROUP)
    got = fitted_scales(
        start.codes.T.float().contiguous(), start.scales.T.float().contiguous(),
        torch.from_numpy((metric @ error.T).astype(np.float32)), damped(hessian), ScaleGrid(False),
    ).T.half()  # fmt: skip
    found = row_objectives(row_errors(weight, QuantizedWeight(start.codes, got), GROUP), metric)
    factor = np.linalg.cholesky(metric)
    for row in range(out):
        columns = np.stack(
            [
                factor[a : a + GROUP].T @ start.codes[row, a : a + GROUP].double().numpy()
                for a in range(0, channels, GROUP)
            ]
        ).T
        best, (least,), *_ = np.linalg.lstsq(columns, factor.T @ weight[row].double().numpy())
        diagonal = np.square(columns).sum(axis=0)
        ridge = 1e-4 * diagonal.mean() * np.square(best - start.scales[row].double().numpy()).sum()
        rounding = np.square((2.0**-11 * np.abs(best) * np.sqrt(diagonal)).sum())
        assert least <= found[row] * (1 + 1e-9)
        # Both at once: (sqrt(ridge) + sqrt(rounding))^2 <= 2 (ridge + rounding).
        assert found[row] <= least + 2 * (ridge + rounding)


def test_chunks_of_rows_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by taking few rows at a time, which must not change a scale by more than summation order."""
    weight, hessian = drawn(7, 64, 3), correlated_hessian(64, 3)
    problem = WeightProblem(weight, GROUP, hessian)
    whole = quantize_gptq_cd(problem)
    monkeypatch.setattr("calib.weights.group_scales._ELEMENTS", 2 * 4**2)
    parts = quantize_gptq_cd(problem)
    metric = damped64(hessian)
    sums = [row_objectives(row_errors(weight, quantized, GROUP), metric).sum() for quantized in (whole, parts)]
    assert abs(sums[1] - sums[0]) < 0.01 * sums[0]


def test_missing_and_broken_statistics_are_refused() -> None:
    """No Hessian, or one of NaN, must not become codes."""
    with pytest.raises(ValueError, match="needs the Hessian"):
        quantize_gptq_cd(WeightProblem(torch.ones(2, 16), GROUP))
    with pytest.raises(ValueError, match="positive definite"):
        quantize_gptq_cd(WeightProblem(torch.ones(2, 16), GROUP, torch.full((16, 16), float("nan"))))


def test_row_beyond_float16_does_not_touch_the_others() -> None:
    """Infinite scales make NaN in their own row only; that row keeps the infinite scale for the caller to see."""
    weight, hessian = drawn(3, 32, 4), correlated_hessian(32, 4)
    alone = quantize_gptq_cd(WeightProblem(weight[[0, 2]], GROUP, hessian))
    weight[1, 20] = 1e6
    got = quantize_gptq_cd(WeightProblem(weight, GROUP, hessian))
    assert got.scales.isinf().tolist() == [[False, False], [False, True], [False, False]]
    assert got.codes[[0, 2]].shape == alone.codes.shape
    assert torch.equal(got.codes[[0, 2]], alone.codes)
