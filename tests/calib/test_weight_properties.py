"""Every quantizer, on weights that models do have: zero rows, single outliers, denormals, huge values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.weights import WEIGHT_METHODS, QuantizedWeight, WeightProblem, adaround
from calib.weights.gptq import gptq_codes, inverse_factor
from calib.weights.per_channel import quantize_int8
from calib.weights.rtn import quantize_rtn
from fptq_export.policy import WeightMethod
from tests.support.hessians import (
    FLOAT32_UNIT,
    correlated_hessian,
    damped64,
    objective_rounding,
    row_errors,
    row_objectives,
)
from tests.support.weights import HALF_STEP, KINDS, assert_within_half_steps_of_rtn, check_form, drawn_weight

METHODS = tuple(WEIGHT_METHODS)
NEED_HESSIAN = tuple(name for name, entry in WEIGHT_METHODS.items() if entry.needs_hessian)
NEVER_WORSE_THAN_RTN: tuple[WeightMethod, ...] = ("gptq+cd", "adaround")
GROUP = 16
CHANNELS = (16, 32, 48, 128, 144, 576)
WIDE = (*CHANNELS, 2048, 11008)
"""For what needs no matrix of that size."""


@pytest.fixture(scope="module", autouse=True)
def _few_steps_of_learning() -> Iterator[None]:
    """What holds of every result holds after any number of steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaround, "ITERATIONS", 10)
        yield


def solved(
    method: WeightMethod, kind: str, channels: int, seed: int, *, signed: bool
) -> tuple[WeightProblem, QuantizedWeight]:
    hessian = correlated_hessian(channels, seed % 8, low_rank=True) if method in NEED_HESSIAN else None
    problem = WeightProblem(drawn_weight(kind, channels, seed), GROUP, hessian, signed)
    return problem, WEIGHT_METHODS[method].quantize(problem)


cases = given(
    kind=st.sampled_from(KINDS), channels=st.sampled_from(CHANNELS), seed=st.integers(0, 2**16), signed=st.booleans()
)
wide_cases = given(
    kind=st.sampled_from(KINDS), channels=st.sampled_from(WIDE), seed=st.integers(0, 2**16), signed=st.booleans()
)


@pytest.mark.parametrize("method", METHODS)
@cases
@settings(max_examples=30)
def test_codes_and_scales_can_be_stored(
    method: WeightMethod, *, kind: str, channels: int, seed: int, signed: bool
) -> None:
    """Codes are INT4; scales are normal float16 of the allowed sign; a row of zeros stays zero."""
    check_form(*solved(method, kind, channels, seed, signed=signed))


@wide_cases
def test_rtn_is_off_by_half_a_step(*, kind: str, channels: int, seed: int, signed: bool) -> None:
    """Weight by weight; with signed scales a weight of 8 steps on the side of code 7 clips, and is off by one."""
    problem, got = solved("rtn", kind, channels, seed, signed=signed)
    steps = got.scales.abs().double().repeat_interleave(GROUP, dim=1).numpy()
    assert (np.abs(row_errors(problem.weight, got, GROUP)) <= (HALF_STEP + (0.5 if signed else 0.0)) * steps).all()


@wide_cases
def test_mse_is_within_the_bound_of_rtn(*, kind: str, channels: int, seed: int, signed: bool) -> None:
    """Group by group the squared error is at most that of half a step of unsigned `rtn` for every weight."""
    problem, got = solved("mse", kind, channels, seed, signed=signed)
    check_form(problem, got)
    assert_within_half_steps_of_rtn(problem, got, np.ones(channels))


@cases
def test_clip_is_within_the_bound_of_rtn(*, kind: str, channels: int, seed: int, signed: bool) -> None:
    """As for `mse`, with each square counted as much as the second moment of its channel."""
    problem, got = solved("clip", kind, channels, seed, signed=signed)
    assert problem.hessian is not None
    assert_within_half_steps_of_rtn(problem, got, problem.hessian.diagonal().double().numpy())


@given(kind=st.sampled_from(KINDS), channels=st.sampled_from(WIDE), seed=st.integers(0, 2**16))
def test_int8_is_off_by_half_a_step(*, kind: str, channels: int, seed: int) -> None:
    """Channel by channel, with codes in [-127, 127] and a normal scale; a row of zeros stays zero.

    A quotient is at most 127: its rounding and that of the scale move it by 127 x 2 x 2^-24 steps.
    """
    weight = drawn_weight(kind, channels, seed)
    codes, scales = quantize_int8(weight)
    assert (codes.dtype, scales.dtype, tuple(scales.shape)) == (torch.int8, torch.float32, (4,))
    assert int(codes.min()) >= -127
    assert (scales >= torch.finfo(torch.float32).tiny).all()
    assert codes[(weight == 0.0).all(dim=1)].count_nonzero() == 0
    steps = scales.double()[:, None]
    assert ((codes * steps - weight).abs() <= (0.5 + 127 * 2 * FLOAT32_UNIT) * steps).all()


@pytest.mark.parametrize("method", NEVER_WORSE_THAN_RTN)
@cases
@settings(max_examples=40)
def test_objective_is_never_above_that_of_rtn(
    method: WeightMethod, *, kind: str, channels: int, seed: int, signed: bool
) -> None:
    """Row by row e H e^T, up to the rounding of the two float32 evaluations that were compared."""
    problem, got = solved(method, kind, channels, seed, signed=signed)
    assert problem.hessian is not None
    metric = damped64(problem.hessian)
    plain, better = (row_errors(problem.weight, quantized, GROUP) for quantized in (quantize_rtn(problem), got))
    allowed = sum(objective_rounding(problem.weight, error, metric) for error in (plain, better))
    assert (row_objectives(better, metric) <= row_objectives(plain, metric) + allowed).all()


@pytest.mark.parametrize("method", ["two_level", "integer_scale"])
@cases
@settings(max_examples=30)
def test_objective_is_never_above_that_of_rounding_on_the_grid(
    method: WeightMethod, *, kind: str, channels: int, seed: int, signed: bool
) -> None:
    """Row by row e H e^T is at most |e| |H| |e| for the errors of rounding, which are at most half the largest weight.

    With M the largest weight of the row and m that of a group: a searched scale is at least 0.6 m / 7, a unit at most
    M / 42 or 2^-14, and a scale of the grid at most half a unit from the searched one. So 7 codes reach at least
    0.6 m - M / 12 - 2^-12, and what clips is off by at most 0.484 M + 2^-12; half a step is less than that. The margin
    up to 0.5 is above the rounding of the float32 evaluations.
    """
    problem, got = solved(method, kind, channels, seed, signed=signed)
    assert problem.hessian is not None
    metric = damped64(problem.hessian)
    largest = problem.weight.abs().amax(dim=1, keepdim=True).double().numpy()
    step = np.repeat(0.5 * largest + 2.0**-12, problem.weight.shape[1], axis=1)
    objective = row_objectives(row_errors(problem.weight, got, GROUP), metric)
    assert (objective <= row_objectives(step, np.abs(metric))).all()


@given(channels=st.sampled_from(CHANNELS), seed=st.integers(0, 2**16))
@settings(max_examples=40)
def test_feedback_is_within_the_bound_of_rtn(*, channels: int, seed: int) -> None:
    """`gptq` may lose to `rtn` where codes clip. Where none does, e H e^T = sum of (rounding error_j / U_jj)^2.

    Rounding errors are half a step, and 1 / U_jj^2 is at most H_jj. Scales of twice the size keep codes from clipping.
    Rows where one did all the same say nothing and are left out. The factor is float32: its square is good to
    8 n u cond(H).
    """
    hessian = correlated_hessian(channels, seed % 8, low_rank=True)
    problem = WeightProblem(drawn_weight("normal", channels, seed), GROUP, hessian)
    scales = quantize_rtn(problem).scales * 2
    codes = gptq_codes(problem, scales)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    metric = damped64(hessian)
    steps = scales.double().repeat_interleave(GROUP, dim=1).numpy()
    bound = np.square(HALF_STEP * steps[:, order] / inverse_factor(hessian[order][:, order]).diagonal().numpy()).sum(
        axis=1
    )
    slack = 1 + 8 * channels * FLOAT32_UNIT * np.linalg.cond(metric)
    free = ((codes > -8) & (codes < 7)).all(dim=1).numpy()
    objective = row_objectives(row_errors(problem.weight, QuantizedWeight(codes, scales), GROUP), metric)
    assert free.any()
    assert (objective[free] <= bound[free] * slack).all()
    assert (bound <= row_objectives(HALF_STEP * steps, np.diag(metric.diagonal())) * slack).all()
