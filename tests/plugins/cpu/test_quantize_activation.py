from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export import cpu, numerics
from fptq_export.cpu import InstructionSet
from tests.support.w4a8_cases import assert_same_bits, assert_same_integers

CHANNELS = (1, 7, 8, 15, 16, 17, 31, 33, 64, 127, 576, 1000, 11008)
"""Around the 8 and 16 lanes of a vector, and real widths."""


def check(x: NDArray[np.floating], scale: float | None, instruction_set: InstructionSet, threads: int = 1) -> None:
    codes, scales = cpu.quantize_activation(x, scale, instruction_set=instruction_set, threads=threads)
    expected_scale = numerics.per_token_scale(x) if scale is None else np.full((len(x), 1), scale, dtype=np.float32)
    assert_same_bits(scales, expected_scale, "scales")
    with np.errstate(over="ignore"):  # a quotient above FP32 is clipped like any large one
        expected = numerics.quantize_activation(x, expected_scale)
    assert_same_integers(codes, expected, "codes")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("scale", [None, 0.0137])
def test_codes_and_scales_are_those_of_numerics(
    instruction_set: InstructionSet, scale: float | None, dtype: type[np.floating]
) -> None:
    """Every width, both modes, both types: codes and scales are bit-exact, in vectors and in tails."""
    rng = np.random.default_rng(1)
    for channels in CHANNELS:
        check((rng.standard_normal((5, channels)) * 3).astype(dtype), scale, instruction_set)


def test_ties_go_to_even_and_limits_clip(instruction_set: InstructionSet) -> None:
    """Halves between two codes, and values beyond both ends of the range."""
    halves = np.arange(-140, 140, dtype=np.float32) + np.float32(0.5)
    x = np.concatenate([halves, np.arange(-140, 140, dtype=np.float32)])[None] * np.float32(0.125)
    check(x, 0.125, instruction_set)
    codes, _ = cpu.quantize_activation(x, 0.125, instruction_set=instruction_set)
    assert (codes.min(), codes.max()) == (-128, 127)


def test_division_is_not_a_multiplication_with_the_reciprocal(instruction_set: InstructionSet) -> None:
    """Quotients next to a tie, where x * (1 / scale) rounds to another code."""
    rng = np.random.default_rng(2)
    scale = np.float32(0.0731)
    x = ((rng.integers(-127, 127, (8, 4096)) + np.float32(0.5)) * scale).astype(np.float32)
    by_reciprocal = np.clip(np.rint(x * (np.float32(1.0) / scale)), -128, 127)
    assert (by_reciprocal != numerics.quantize_activation(x, scale)).any(), "the data cannot tell the two apart"
    check(x, float(scale), instruction_set)


@pytest.mark.parametrize("scale", [1e-8, 7.9e-9, 1.0, 3e38])
def test_extreme_values_are_clipped_not_wrapped(instruction_set: InstructionSet, scale: float) -> None:
    """Quotients far outside INT32, infinities, subnormal numbers and both zeros."""
    limits = np.finfo(np.float32)
    x = np.array([[limits.max, limits.min, np.inf, -np.inf, limits.tiny, 1e-45, -1e-45, 0.0, -0.0, 1e10, -1e10]], "f4")
    check(x, scale, instruction_set)


def test_silent_tokens_get_the_smallest_scale(instruction_set: InstructionSet) -> None:
    """A token of zeros, or below PER_TOKEN_EPS, is divided by a positive scale."""
    x = np.zeros((4, 100), dtype=np.float32)
    x[1, 99], x[2, 50], x[3, 0] = 1e-7, -numerics.PER_TOKEN_EPS, 1e-45
    check(x, None, instruction_set)


def test_largest_magnitude_is_found_in_every_lane(instruction_set: InstructionSet) -> None:
    """The one large value of a token may stand anywhere, with either sign, the tail included."""
    x = np.full((2 * 37, 37), 0.01, dtype=np.float32)
    x[np.arange(37), np.arange(37)] = 5.0
    x[37 + np.arange(37), np.arange(37)] = -5.0
    check(x, None, instruction_set)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_codes(instruction_set: InstructionSet, threads: int) -> None:
    """Rows that several threads share."""
    x = np.random.default_rng(3).standard_normal((97, 129)).astype(np.float32)
    check(x, None, instruction_set, threads)


def test_token_that_is_not_finite_keeps_its_mark(instruction_set: InstructionSet) -> None:
    """Per token a NaN or an infinity reaches the scale, and leaves the other tokens alone."""
    x = np.ones((4, 40), dtype=np.float32)
    x[1, 39], x[2, 3] = np.nan, -np.inf
    codes, scales = cpu.quantize_activation(x, instruction_set=instruction_set)
    assert np.isnan(scales[1, 0])
    assert np.isinf(scales[2, 0])
    assert (codes[[0, 3]] == 127).all()
    assert_same_bits(scales[[0, 3]], numerics.per_token_scale(x[[0, 3]]), "scales of the finite tokens")


def test_nan_has_one_code_with_a_static_scale(instruction_set: InstructionSet) -> None:
    """No code says NaN; it is -128 on every instruction set, as documented."""
    x = np.full((1, 19), np.nan, dtype=np.float32)
    codes, _ = cpu.quantize_activation(x, 1.0, instruction_set=instruction_set)
    assert (codes == -128).all()
