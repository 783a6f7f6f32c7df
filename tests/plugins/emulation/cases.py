"""The calls that must come out right, on the kernels (tests) and on broken copies of them (mutation run)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.plugins.emulation.expected import activation, check, group_sums
from tests.plugins.emulation.harness import Config, Kernels, Shape, gemm, gemv
from tests.plugins.emulation.weights import (
    GROUP,
    PER_CHANNEL,
    TWO_LEVEL,
    Weight,
    plain_weight,
    random_weight,
    two_level_weight,
)

SCHEMES = (
    (PER_CHANNEL, 0),
    *((GROUP, g) for g in (128, 64, 32, 16)),
    *((TWO_LEVEL, g) for g in (128, 64, 32, 16)),
)


def is_offered(tile: Shape, scheme: int, group_size: int) -> bool:
    """As tile_is_offered of gemm_tiles.h."""
    _, _, warp_m, warp_n, _ = tile
    if scheme == GROUP:
        return warp_m * warp_n <= (1024 if group_size == 16 else 2048)
    return scheme != TWO_LEVEL or group_size > 16 or warp_m < 64 or warp_n >= 64


def generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def random_x(rng: np.random.Generator, m: int, k: int, dtype: Any = np.float16) -> NDArray[Any]:
    return rng.normal(0, 1.5, (m, k)).astype(dtype)


def bias_of(rng: np.random.Generator, n: int, dtype: Any = np.float16) -> NDArray[Any]:
    return rng.normal(0, 3, n).astype(dtype)


def check_gemm(kernels: Kernels, tile: Shape, scheme: int, group_size: int, split_k: int) -> None:
    """Two row tiles and three channel tiles, the last ones ragged; a ragged k tile where groups allow it."""
    rng = generator(1, *tile, scheme, group_size, split_k)
    m, n = tile[0] + 5, 2 * tile[1] + 24
    k = 10 * max(group_size, 64) if group_size >= 64 else 32 * 11 if group_size else 400
    x, weight, bias = random_x(rng, m, k), random_weight(rng, n, k, scheme, group_size), bias_of(rng, n)
    result = kernels.linear(x, weight, gemm(tile, split_k), bias=bias, trace=True)
    check(result, x, weight, bias=bias, trace=True)
    assert result.counters["ldmatrix_conflicts"] == 0, "bank conflicts of ldmatrix"
    if scheme == GROUP:
        np.testing.assert_array_equal(result.y, folded_in_order(x, weight, bias, split_k))


def check_gemv(kernels: Kernels, m: int, scheme: int, group_size: int, k: int) -> None:
    """Every warp has k tiles, some have one more; the last channel tile is half padding."""
    rng = generator(2, m, scheme, group_size, k)
    x, weight, bias = random_x(rng, m, k), random_weight(rng, 40, k, scheme, group_size), bias_of(rng, 40)
    result = kernels.linear(x, weight, gemv(m), bias=bias, trace=True, load_conflicts=True)
    check(result, x, weight, bias=bias, trace=True)
    assert result.counters["load_conflicts"] == 0, "bank conflicts of shared loads"


def check_extremes(kernels: Kernels, config: Config, m: int, scheme: int, group_size: int) -> None:
    """The largest sums there are: all activations -128, all codes -8 (two_level: all weights at their largest)."""
    n, k = 40, 1024
    x = np.full((m, k), -128, dtype=np.float16)
    if scheme == TWO_LEVEL:
        groups = (n, k // group_size)
        u, s1, z = np.full((n, k), 15), np.full(groups, 17), np.full(groups, 128)
        weight = two_level_weight(u, s1, z, np.full(n, 1e-5, np.float32), group_size)
    else:
        weight = plain_weight(np.full((n, k), -8), np.full((n, k // (group_size or k)), 1e-2, np.float16), group_size)
    result = kernels.linear(x, weight, config, static_scale=1.0, trace=True)
    check(result, x, weight, static_scale=1.0, trace=True)


def check_split_is_deterministic(kernels: Kernels, tile: Shape, scheme: int, group_size: int) -> None:
    """The same bytes whatever thread runs first; integer schemes also whatever the split."""
    rng = generator(3, *tile, scheme, group_size)
    x, weight = random_x(rng, 7, 1024), random_weight(rng, 40, 1024, scheme, group_size)
    first = kernels.linear(x, weight, gemm(tile, 4))
    check(first, x, weight)
    np.testing.assert_array_equal(kernels.linear(x, weight, gemm(tile, 4), reverse=True).y, first.y)
    if scheme != GROUP:
        np.testing.assert_array_equal(kernels.linear(x, weight, gemm(tile, 1)).y, first.y)


def check_rows_do_not_see_each_other(
    kernels: Kernels, config: Config, row_alone: Config, scheme: int, group_size: int
) -> None:
    """A row alone gives the bytes it gives in a batch."""
    rng = generator(4, scheme, group_size)
    m = config.block_m if config.kernel == 0 else 21
    x, weight = random_x(rng, m, 640), random_weight(rng, 24, 640, scheme, group_size)
    batch = kernels.linear(x, weight, config)
    check(batch, x, weight)
    for row in (0, m - 1):
        np.testing.assert_array_equal(kernels.linear(x[row : row + 1], weight, row_alone).y[0], batch.y[row])


def check_gemm_panels(kernels: Kernels, tile: Shape) -> None:
    """More row tiles than a panel of the block order holds: every output is made, once."""
    rng = generator(6, *tile)
    m, n = tile[0] * 10 + 3, 2 * tile[1] + 8
    x, weight = random_x(rng, m, 64), random_weight(rng, n, 64, GROUP, 32)
    check(kernels.linear(x, weight, gemm(tile), trace=True), x, weight, trace=True)


def check_modes(
    kernels: Kernels, config: Config, m: int, dtype: Any, static_scale: float | None, with_bias: bool
) -> None:
    """Output types, static and per-token activations, with and without bias."""
    rng = generator(5, m, with_bias)
    x, weight = random_x(rng, m, 192, dtype), random_weight(rng, 24, 192, GROUP, 32)
    x[m // 2] = 0
    bias = bias_of(rng, 24, dtype) if with_bias else None
    result = kernels.linear(x, weight, config, static_scale=static_scale, bias=bias, trace=True)
    check(result, x, weight, static_scale=static_scale, bias=bias, trace=True)


def folded_in_order(x: NDArray[Any], weight: Weight, bias: NDArray[Any] | None, split_k: int) -> NDArray[Any]:
    """The GEMM's outputs bit for bit: groups in order within a part of K, one rounding each, then the parts."""
    codes, scale = activation(x, None)
    sums = group_sums(codes, weight)
    groups = sums.shape[2]
    tiles_per_group = max(1, weight.group_size // 64)
    k_tiles = -(-x.shape[1] // 64)
    units = k_tiles // tiles_per_group
    groups_per_unit = max(1, 64 // weight.group_size)
    total = np.zeros(sums.shape[:2], dtype=np.float32)
    for part in range(split_k):
        begin, end = (min(units * p // split_k * groups_per_unit, groups) for p in (part, part + 1))
        folded = np.zeros_like(total)
        for g in range(begin, end):
            term = (16 * sums[:, :, g]).astype(np.longdouble) * weight.scales[None, :, g]
            folded = (folded + term).astype(np.float32)
        total = folded if split_k == 1 else (total + folded).astype(np.float32)
    y = total.astype(np.longdouble) * (scale * np.float32(1 / 16))
    return (y if bias is None else y + bias.astype(np.float32)).astype(np.float32).astype(x.dtype)


SMALL_TILES: tuple[Shape, ...] = ((16, 128, 16, 32, 6), (64, 64, 32, 32, 4))
SMALL_SCHEMES = ((PER_CHANNEL, 0), (GROUP, 128), (GROUP, 32), (GROUP, 16), (TWO_LEVEL, 128), (TWO_LEVEL, 16))


def check_everything_small(kernels: Kernels) -> None:
    """The cases that a mutation has to get past: two tiles, six schemes, all paths."""
    for scheme, group_size in SMALL_SCHEMES:
        for m in (1, 3):
            check_gemv(kernels, m, scheme, group_size, 35 * 128)
        for tile in SMALL_TILES:
            for split_k in (1, 3):
                check_gemm(kernels, tile, scheme, group_size, split_k)
            check_extremes(kernels, gemm(tile), 5, scheme, group_size)
            check_split_is_deterministic(kernels, tile, scheme, group_size)
        check_extremes(kernels, gemv(2), 2, scheme, group_size)
    check_gemv(kernels, 1, PER_CHANNEL, 0, 12288 + 40)
    check_gemm_panels(kernels, SMALL_TILES[0])
    for config, m in ((gemm(SMALL_TILES[0], 2), 70), (gemm(SMALL_TILES[1]), 70), (gemv(4), 4)):
        check_modes(kernels, config, m, ml_dtypes.bfloat16, 0.02, with_bias=True)
        check_modes(kernels, config, m, np.float16, None, with_bias=False)
