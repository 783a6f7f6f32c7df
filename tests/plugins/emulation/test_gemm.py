"""The tensor-core kernel: every tile and scheme, ragged edges, extremes, split-K."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.plugins.emulation import cases
from tests.plugins.emulation.expected import check
from tests.plugins.emulation.harness import TILES, Kernels, Shape, gemm
from tests.plugins.emulation.weights import GROUP, PER_CHANNEL, TWO_LEVEL, random_weight

FITTING = [(t, s, g) for t in TILES for s, g in cases.SCHEMES if cases.is_offered(t, s, g)]


@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize(("tile", "scheme", "group_size"), FITTING)
def test_group_sums_are_exact(kernels: Kernels, tile: Shape, scheme: int, group_size: int, split_k: int) -> None:
    """INT32 sums equal numerics.py, outputs are within the bound (groups: bit-exact), ldmatrix has no bank conflict."""
    cases.check_gemm(kernels, tile, scheme, group_size, split_k)


@pytest.mark.parametrize(("tile", "scheme", "group_size"), FITTING)
def test_the_largest_sums_do_not_overflow(kernels: Kernels, tile: Shape, scheme: int, group_size: int) -> None:
    """All activations -128 and all codes -8: no INT32 overflow, no magic float out of range."""
    cases.check_extremes(kernels, gemm(tile), 17, scheme, group_size)


@pytest.mark.parametrize(("scheme", "group_size"), cases.SCHEMES)
def test_split_k_is_deterministic(kernels: Kernels, scheme: int, group_size: int) -> None:
    """Partial sums are added in the order of k: the order of threads changes no byte."""
    cases.check_split_is_deterministic(kernels, TILES[0], scheme, group_size)


@pytest.mark.parametrize(("scheme", "group_size"), [(PER_CHANNEL, 0), (GROUP, 128), (TWO_LEVEL, 64)])
@pytest.mark.parametrize("tile", TILES[:4])
def test_a_row_does_not_depend_on_the_batch(kernels: Kernels, tile: Shape, scheme: int, group_size: int) -> None:
    """With the same split, any tile gives a row the bytes that the 16-row tile gives it alone."""
    cases.check_rows_do_not_see_each_other(kernels, gemm(tile, 2), gemm(TILES[0], 2), scheme, group_size)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("static_scale", [None, 0.03])
@pytest.mark.parametrize("with_bias", [False, True])
def test_output_types_modes_and_bias(kernels: Kernels, dtype: Any, static_scale: float | None, with_bias: bool) -> None:
    """FP16 and BF16, static and per token, bias or none."""
    cases.check_modes(kernels, gemm(TILES[1]), 35, dtype, static_scale, with_bias)


@pytest.mark.parametrize(("n", "k"), [(8, 128), (16, 128), (136, 256), (264, 128), (8, 11008)])
@pytest.mark.parametrize("m", [1, 16, 17, 130])
def test_edges_of_m_n_and_k(kernels: Kernels, m: int, n: int, k: int) -> None:
    """One group to 86 groups, 8 channels to three tiles, one row to a ragged second tile: exact sums."""
    rng = cases.generator(10, m, n, k)
    x, weight = cases.random_x(rng, m, k), random_weight(rng, n, k, GROUP, 128)
    check(kernels.linear(x, weight, gemm(TILES[3]), trace=True), x, weight, trace=True)


@pytest.mark.parametrize("k", [1, 63, 100, 4097])
def test_per_channel_takes_any_k(kernels: Kernels, k: int) -> None:
    """K needs no alignment when there are no groups: padding adds nothing."""
    rng = cases.generator(11, k)
    x, weight = cases.random_x(rng, 18, k), random_weight(rng, 24, k, PER_CHANNEL, 0)
    check(kernels.linear(x, weight, gemm(TILES[0]), trace=True), x, weight, trace=True)


def test_every_part_of_k_is_a_whole_number_of_groups(kernels: Kernels) -> None:
    """7 groups of 128 in 5 parts: uneven parts, and still exact sums of whole groups."""
    rng = cases.generator(12)
    x, weight = cases.random_x(rng, 9, 896), random_weight(rng, 24, 896, GROUP, 128)
    for split_k in range(1, 8):
        check(kernels.linear(x, weight, gemm(TILES[0], split_k), trace=True), x, weight, trace=True)


def test_many_row_tiles_are_all_computed(kernels: Kernels) -> None:
    """More row tiles than a panel of the block order: every output tile is made, once."""
    cases.check_gemm_panels(kernels, TILES[0])


def test_shared_loads_have_no_bank_conflict(kernels: Kernels) -> None:
    """Weights, scales and pairs are read from shared memory without a conflict."""
    rng = cases.generator(14)
    for scheme, group_size in cases.SCHEMES:
        x, weight = cases.random_x(rng, 20, 256), random_weight(rng, 136, 256, scheme, group_size)
        result = kernels.linear(x, weight, gemm(TILES[2]), load_conflicts=True)
        check(result, x, weight)
        assert (result.counters["load_conflicts"], result.counters["ldmatrix_conflicts"]) == (0, 0), (
            scheme,
            group_size,
        )


def test_a_nan_in_one_token_stays_there(kernels: Kernels) -> None:
    """Per token, a row with a NaN is all NaN, and the others are as without it."""
    rng = cases.generator(15)
    x, weight = cases.random_x(rng, 6, 128), random_weight(rng, 24, 128, GROUP, 32)
    clean = kernels.linear(x, weight, gemm(TILES[0])).y
    x[2, 5] = np.nan
    dirty = kernels.linear(x, weight, gemm(TILES[0])).y
    assert np.isnan(dirty[2]).all()
    np.testing.assert_array_equal(np.delete(dirty, 2, axis=0), np.delete(clean, 2, axis=0))
