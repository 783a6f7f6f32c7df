from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fptq_export import cpu
from fptq_export.cpu import InstructionSet, PackedWeight, packed_weight_from_codes
from tests.support.w4a8_cases import Case, assert_same_bits, assert_within, make_case

SHAPES = [
    (1, 33, 128, 128),
    (2, 31, 64, 16),
    (5, 64, 576, 64),
    (9, 40, 11008, 128),
    (3, 35, 11008, 32),
    (4, 9, 11008, 11008),
    (140, 70, 1152, 128),
]


def packed(case: Case) -> PackedWeight:
    return packed_weight_from_codes(case.w_codes, case.w_scale, case.group_size)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("x_scale", [None, 0.05])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_is_within_the_bound(
    instruction_set: InstructionSet, shape: tuple[int, int, int, int], x_scale: float | None, with_bias: bool
) -> None:
    """FP32 and FP16 outputs differ from float64 by no more than their roundings can make."""
    case = make_case(*shape)
    bias = case.bias if with_bias else None
    weight, expected = packed(case), case.linear(x_scale, bias)
    y = cpu.w4a8_linear(case.x, weight, x_scale, bias, instruction_set=instruction_set)
    assert_within(y, expected, case.fp32_bound(x_scale, bias))
    half = cpu.w4a8_linear(case.x, weight, x_scale, bias, output_type=np.float16, instruction_set=instruction_set)
    assert_within(half, expected, case.fp16_bound(x_scale, bias))
    assert_same_bits(half, y.astype(np.float16), "FP16 output, rounded once from FP32")


def test_bound_is_tight_enough_to_see_one_wrong_code() -> None:
    """The bound has power: one weight code off by one, in one of 11008 channels, is outside of it."""
    case = make_case(4, 8, 11008, 128)
    codes = case.w_codes.copy()
    codes[:, 5000] ^= 1
    wrong = Case(case.x, codes, case.w_scale, case.bias, case.group_size)
    error = np.abs(wrong.linear(None, None) - case.linear(None, None))
    assert (error > case.fp32_bound(None, None)).mean() > 0.9


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_instruction_sets_give_the_same_bits(instruction_set: InstructionSet, shape: tuple[int, int, int, int]) -> None:
    """One order of sums, one rounding a group: AVX-512, AVX2 and plain C++ cannot be told apart."""
    case = make_case(*shape)
    weight = packed(case)
    y, expected = (
        cpu.w4a8_linear(case.x, weight, None, case.bias, instruction_set=item)
        for item in (instruction_set, InstructionSet.SCALAR)
    )
    assert_same_bits(y, expected, "output")


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 9, 130])
def test_row_does_not_depend_on_its_batch(instruction_set: InstructionSet, tokens: int) -> None:
    """A token alone has the bits it has among others."""
    case = make_case(tokens, 40, 1152, 64)
    weight = packed(case)
    batch = cpu.w4a8_linear(case.x, weight, None, case.bias, instruction_set=instruction_set)
    for row in {0, tokens // 2, tokens - 1}:
        alone = cpu.w4a8_linear(case.x[row : row + 1], weight, None, case.bias, instruction_set=instruction_set)
        assert_same_bits(batch[row : row + 1], alone, f"row {row}")


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_do_not_change_bits(instruction_set: InstructionSet, threads: int) -> None:
    """Threads share blocks of output channels, never a sum."""
    case = make_case(70, 200, 512, 128)
    weight = packed(case)
    one = cpu.w4a8_linear(case.x, weight, None, case.bias, instruction_set=instruction_set)
    many = cpu.w4a8_linear(case.x, weight, None, case.bias, instruction_set=instruction_set, threads=threads)
    assert_same_bits(many, one, f"output of {threads} threads")


def test_calls_from_several_threads_do_not_meet() -> None:
    """A weight may be used by several Python threads at once."""
    cases = [make_case(5, 96, 256, 128, seed) for seed in range(4)]
    weight = packed(cases[0])
    expected = [cpu.w4a8_linear(case.x, weight) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for got, want in zip(pool.map(lambda case: cpu.w4a8_linear(case.x, weight), cases), expected, strict=True):
                assert_same_bits(got, want, "output")


def test_half_input_is_the_same_as_its_float_value(instruction_set: InstructionSet) -> None:
    """FP16 to FP32 is exact, so an FP16 activation gives the bits of its FP32 copy."""
    case = make_case(6, 40, 256, 128)
    half = case.x.astype(np.float16)
    weight = packed(case)
    got = cpu.w4a8_linear(half, weight, instruction_set=instruction_set)
    assert_same_bits(got, cpu.w4a8_linear(half.astype(np.float32), weight, instruction_set=instruction_set), "output")


def test_non_contiguous_activation_is_read_by_its_strides(instruction_set: InstructionSet) -> None:
    """A transposed or sliced activation is not read as the memory it lies in."""
    case = make_case(6, 40, 256, 128)
    weight = packed(case)
    wide = np.repeat(case.x, 2, axis=1)[:, ::2]
    expected = cpu.w4a8_linear(case.x, weight, instruction_set=instruction_set)
    for view in (np.asfortranarray(case.x), wide):
        assert not view.flags.c_contiguous
        assert_same_bits(cpu.w4a8_linear(view, weight, instruction_set=instruction_set), expected, "output")


def test_scale_that_is_subnormal_is_not_flushed(instruction_set: InstructionSet) -> None:
    """FP16 scales below 6.1e-5 keep their value, on every instruction set."""
    case = make_case(3, 33, 128, 128)
    tiny = Case(case.x, case.w_codes, np.full((33, 1), 5.96e-8, dtype=np.float16), case.bias, 128)
    y = cpu.w4a8_linear(tiny.x, packed(tiny), instruction_set=instruction_set)
    assert (y != 0.0).any()
    assert_within(y, tiny.linear(None, None), tiny.fp32_bound(None, None))


def test_output_above_half_becomes_infinite(instruction_set: InstructionSet) -> None:
    """FP16 overflow gives infinities, as in numpy and on the GPU, not the largest number."""
    case = Case(
        x=np.full((1, 128), 100.0, dtype=np.float32),
        w_codes=np.repeat(np.array([[7], [-8]], dtype=np.int8), 128, axis=1),
        w_scale=np.ones((2, 1), dtype=np.float16),
        bias=np.zeros(2, dtype=np.float32),
        group_size=128,
    )
    y = cpu.w4a8_linear(case.x, packed(case), output_type=np.float16, instruction_set=instruction_set)
    assert y.tolist() == [[np.inf, -np.inf]]


def test_token_that_is_not_finite_is_seen_in_its_output_only(instruction_set: InstructionSet) -> None:
    """Per token a NaN makes its own row NaN and no other."""
    case = make_case(4, 40, 128, 128)
    case.x[2, 77] = np.nan
    y = cpu.w4a8_linear(case.x, packed(case), instruction_set=instruction_set)
    assert np.isnan(y).all(axis=1).tolist() == [False, False, True, False]
    assert np.isfinite(y[[0, 1, 3]]).all()
