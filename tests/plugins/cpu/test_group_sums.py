from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_export import cpu, numerics
from fptq_export.cpu import InstructionSet, available_instruction_sets, packed_weight_from_codes
from fptq_export.cpu.extension import ALIGNMENT
from fptq_export.cpu.packed_weight import GROUP_SIZES, MAX_CHANNEL_GROUP
from tests.support.w4a8_cases import Case, assert_same_integers, make_case

ROOT = Path(__file__).parents[3]
SHAPES = [
    (1, 1, 128, 128),  # one of everything
    (1, 33, 128, 128),  # one channel in the last block
    (2, 31, 64, 64),
    (3, 64, 576, 64),  # SmolLM2's width
    (4, 40, 96, 32),
    (5, 100, 48, 16),
    (6, 8, 11008, 128),  # LLaMA-7B's MLP
    (7, 65, 256, 128),
    (8, 96, 1152, 128),  # more than one chunk of K, not a whole number of them
    (9, 3, 2048, 64),
    (1, 40, 77, 77),  # per channel: widths that end inside a step, a vector and a flush
    (3, 5, 1, 1),
    (9, 34, 4097, 4097),
    (2, 9, 11008, 11008),
    (130, 34, 1280, 128),  # more rows than a chunk
    (11, 33, 576, 64),  # rows that share widened weights, in chunks of which the last is short
    (17, 40, 77, 77),
]


def check(case: Case, instruction_set: InstructionSet, x_scale: float | None = None, threads: int = 1) -> None:
    weight = packed_weight_from_codes(case.w_codes, case.w_scale, case.group_size)
    sums = cpu.group_sums(case.x, weight, x_scale, instruction_set=instruction_set, threads=threads)
    assert sums.dtype == np.int32
    assert_same_integers(sums, case.group_sums(x_scale), f"group sums of {instruction_set.value}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(instruction_set: InstructionSet, shape: tuple[int, int, int, int]) -> None:
    """Ragged rows, channels and widths: every INT32 sum is bit-exact, per token and static."""
    case = make_case(*shape)
    check(case, instruction_set)
    check(case, instruction_set, x_scale=0.05)


@pytest.mark.parametrize("tokens", range(1, 10))
def test_every_count_of_rows_is_exact(instruction_set: InstructionSet, tokens: int) -> None:
    """1 to 9 rows: each size of tile, and a whole tile with a rest."""
    check(make_case(tokens, 45, 192, 64), instruction_set)


@settings(max_examples=40)
@given(tokens=st.integers(1, 20), out=st.integers(1, 70), groups=st.integers(1, 12), group=st.sampled_from(GROUP_SIZES))
def test_sums_of_any_shape_agree(tokens: int, out: int, groups: int, group: int) -> None:
    """Shapes nobody thought of, on all instruction sets of this machine."""
    for instruction_set in available_instruction_sets():
        check(make_case(tokens, out, groups * group, group), instruction_set)


@pytest.mark.parametrize("w", [-8, -1, 0, 7])
@pytest.mark.parametrize("x", [-128, -1, 127])
@pytest.mark.parametrize("group_size", [16, 128, 11008, MAX_CHANNEL_GROUP])
def test_extreme_codes_neither_saturate_nor_wrap(
    instruction_set: InstructionSet, group_size: int, x: int, w: int
) -> None:
    """All codes at the ends of their ranges, up to the longest group: the worst case of every accumulator."""
    case = Case(
        x=np.full((3, group_size), x, dtype=np.float32),
        w_codes=np.full((2, group_size), w, dtype=np.int8),
        w_scale=np.ones((2, 1), dtype=np.float16),
        bias=np.zeros(2, dtype=np.float32),
        group_size=group_size,
    )
    weight = packed_weight_from_codes(case.w_codes, case.w_scale, group_size)
    sums = cpu.group_sums(case.x, weight, 1.0, instruction_set=instruction_set)
    assert_same_integers(sums, np.full((3, 2, 1), group_size * x * w, dtype=np.int64), "group sums")


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_do_not_change_sums(instruction_set: InstructionSet, threads: int) -> None:
    """More threads than blocks, and a number that does not divide them."""
    check(make_case(20, 130, 256, 64), instruction_set, threads=threads)


def test_one_position_reaches_one_sum(instruction_set: InstructionSet) -> None:
    """Each input channel meets its own weight: a permutation inside a group would keep no sum but the total."""
    rng = np.random.default_rng(5)
    codes = rng.integers(-8, 8, (37, 256), dtype=np.int8)
    weight = packed_weight_from_codes(codes, np.ones((37, 2), dtype=np.float16), 128)
    sums = cpu.group_sums(np.eye(256, dtype=np.float32) * 3, weight, 1.0, instruction_set=instruction_set)
    expected = np.zeros((256, 37, 2), dtype=np.int64)
    for k in range(256):
        expected[k, :, k // 128] = 3 * codes[:, k]
    assert_same_integers(sums, expected, "group sums")


@pytest.mark.parametrize(("out", "channels", "group_size"), [(33, 256, 128), (32, 64, 16), (5, 77, 77)])
def test_packed_bytes_are_those_of_the_header(out: int, channels: int, group_size: int) -> None:
    """The layout that w4a8_cpu.h describes, byte for byte, with its padding."""
    case = make_case(1, out, channels, group_size)
    weight = packed_weight_from_codes(case.w_codes, case.w_scale, group_size)
    padded = np.zeros((-(-out // 32) * 32, -(-channels // 16) * 16), dtype=np.int64)
    padded[:out, :channels] = case.w_codes
    steps = (padded + 8).reshape(-1, 32, padded.shape[1] // 8, 2, 4).transpose(0, 2, 1, 4, 3)  # block step n j nibble
    assert_same_integers(weight.codes, (steps[..., 0] | steps[..., 1] << 4).ravel(), "packed codes")
    scales = np.zeros((len(padded), case.groups), dtype=np.float16)
    scales[:out] = case.w_scale
    expected = np.ascontiguousarray(scales.reshape(-1, 32, case.groups).transpose(0, 2, 1)).view(np.uint8).ravel()
    assert_same_integers(weight.scales, expected, "packed scales")


def test_python_and_headers_name_the_same_constants() -> None:
    """Group sizes, alignment, longest group and epsilon are written in C++ and in Python: they agree."""
    layout = (ROOT / "plugins/include/fptq/layout.h").read_text(encoding="utf-8")
    sizes = re.search(r"FPTQ_GROUP_SIZES \{([\d, ]+)\}", layout)
    assert sizes is not None
    assert tuple(int(size) for size in sizes[1].split(",")) == GROUP_SIZES
    sources = {
        "w4a8_cpu.h": rf"#define FPTQ_CPU_ALIGNMENT {ALIGNMENT}\b",
        "kernels.h": rf"kMaxGroupK = {MAX_CHANNEL_GROUP};",
        "vector_kernels.h": rf"kPerTokenEps = {numerics.PER_TOKEN_EPS:.0e}f;".replace("e-06", "e-6"),
    }
    for name, pattern in sources.items():
        assert re.search(pattern, (ROOT / "plugins" / "cpu" / name).read_text(encoding="utf-8")), f"{pattern} in {name}"
