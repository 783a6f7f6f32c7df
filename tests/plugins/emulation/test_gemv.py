"""The dp4a kernel for up to four rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.plugins.emulation import cases
from tests.plugins.emulation.expected import check
from tests.plugins.emulation.harness import BAD_CONFIG, Kernels, gemm, gemv
from tests.plugins.emulation.weights import GROUP, random_weight

ROWS = (1, 2, 3, 4)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("scheme", "group_size"), cases.SCHEMES)
def test_group_sums_are_exact(kernels: Kernels, m: int, scheme: int, group_size: int) -> None:
    """INT32 sums equal numerics.py, outputs are within the bound, shared loads have no bank conflict."""
    cases.check_gemv(kernels, m, scheme, group_size, 35 * 128)


@pytest.mark.parametrize("k", [128, 256, 1024, 11008])
def test_few_and_many_groups(kernels: Kernels, k: int) -> None:
    """One group (seven warps idle) to 86: exact sums."""
    cases.check_gemv(kernels, 1, GROUP, 128, k)


@pytest.mark.parametrize("k", [16, 48, 32 * 13])
def test_a_ragged_k_tile(kernels: Kernels, k: int) -> None:
    """Groups of 16 that end inside a k tile: the scales of groups that do not exist are not read."""
    cases.check_gemv(kernels, 2, GROUP, 16, k)


@pytest.mark.parametrize(("scheme", "group_size"), cases.SCHEMES)
def test_the_largest_sums_do_not_overflow(kernels: Kernels, scheme: int, group_size: int) -> None:
    """All activations -128 and all codes -8."""
    cases.check_extremes(kernels, gemv(2), 2, scheme, group_size)


@pytest.mark.parametrize(("scheme", "group_size"), cases.SCHEMES)
def test_a_row_does_not_depend_on_the_batch(kernels: Kernels, scheme: int, group_size: int) -> None:
    """A row alone gives the bytes it gives among four."""
    cases.check_rows_do_not_see_each_other(kernels, gemv(4), gemv(1), scheme, group_size)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("static_scale", [None, 0.03])
@pytest.mark.parametrize("with_bias", [False, True])
def test_output_types_modes_and_bias(kernels: Kernels, dtype: Any, static_scale: float | None, with_bias: bool) -> None:
    """FP16 and BF16, static and per token, bias or none."""
    cases.check_modes(kernels, gemv(3), 3, dtype, static_scale, with_bias)


def test_integer_schemes_equal_the_gemm(kernels: Kernels) -> None:
    """Where all sums are integers, both kernels give the same bytes."""
    rng = cases.generator(20)
    for scheme, group_size in cases.SCHEMES:
        if scheme == GROUP:
            continue
        x, weight = cases.random_x(rng, 2, 512), random_weight(rng, 24, 512, scheme, group_size)
        a, b = (kernels.linear(x, weight, config) for config in (gemv(2), gemm((16, 128, 16, 32, 6))))
        check(a, x, weight)
        np.testing.assert_array_equal(a.y, b.y)


def test_the_order_of_threads_does_not_matter(kernels: Kernels) -> None:
    """Threads run last to first give the same bytes."""
    rng = cases.generator(21)
    x, weight = cases.random_x(rng, 4, 1280), random_weight(rng, 24, 1280, GROUP, 128)
    first = kernels.linear(x, weight, gemv(4))
    check(first, x, weight)
    np.testing.assert_array_equal(kernels.linear(x, weight, gemv(4), reverse=True).y, first.y)


def test_an_activation_at_any_address(kernels: Kernels) -> None:
    """X that starts 2 bytes into a vector is read element by element."""
    rng = cases.generator(22)
    x, weight = cases.random_x(rng, 2, 256), random_weight(rng, 24, 256, GROUP, 64)
    result = kernels.linear(x, weight, gemv(2), x_offset=2)
    check(result, x, weight)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_configuration_for_other_rows_is_refused(kernels: Kernels, rows: int) -> None:
    """The configuration of 1, 3 or 5 rows does not run 2."""
    rng = cases.generator(23)
    x, weight = cases.random_x(rng, 2, 128), random_weight(rng, 24, 128, GROUP, 64)
    assert kernels.linear(x, weight, gemv(rows)).status == BAD_CONFIG
