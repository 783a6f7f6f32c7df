"""What kernels must do, through a `Driver`: run on the emulated kernels by every `make test`, on a GPU by `-m gpu`."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from tests.gpu.driver import Driver
from tests.plugins.emulation import cases
from tests.plugins.emulation.expected import activation, check, check_quantized, group_sums
from tests.plugins.emulation.harness import TILES, Config, Result, Shape, gemm, gemv
from tests.plugins.emulation.weights import GROUP, TWO_LEVEL, Weight, plain_weight, random_weight, two_level_weight

LARGEST_EXACT_FP16 = 2048
"""Every integer up to here is an FP16 number, so an output that is such an integer has no rounding at all."""
SPLITS = (1, 3)
FITTING = [(t, s, g) for t in TILES for s, g in cases.SCHEMES if cases.is_offered(t, s, g)]


def check_outputs(driver: Driver, x: Any, weight: Weight, config: Config, **options: Any) -> Any:
    """One call: outputs within the derived bound of the contract. Returns y."""
    y = driver.linear(x, weight, config, **options)
    options.pop("x_offset", None)
    check(Result(0, y, "", {}, np.zeros(0, np.int64), np.zeros(0, np.uint8)), x, weight, **options)
    return y


def integer_weight(rng: np.random.Generator, n: int, k: int, scheme: int, group_size: int) -> Weight:
    """A weight whose scales are all 1, so that outputs are sums of integers; two_level: INT8 values within [-8, 7]."""
    if scheme == TWO_LEVEL:
        groups = (n, k // group_size)
        unsigned, ones, eights = rng.integers(0, 16, (n, k)), np.ones(groups, np.int64), np.full(groups, 8)
        return two_level_weight(unsigned, ones, eights, np.ones(n, np.float32), group_size)
    scales = np.ones((n, k // (group_size or k)), dtype=np.float16)
    return plain_weight(rng.integers(-8, 8, (n, k)), scales, group_size)


def check_integers(driver: Driver, config: Config, m: int, n: int, k: int, scheme: int, group_size: int) -> None:
    """Scales of 1 and activations of -1, 0, 1: outputs are the exact integer sums of `numerics`, bit for bit."""
    rng = cases.generator(30, m, n, k, scheme, group_size)
    weight = integer_weight(rng, n, k, scheme, group_size)
    x = rng.integers(-1, 2, (m, k)).astype(np.float16)
    codes, _ = activation(x, 1.0)
    expected = group_sums(codes, weight).sum(axis=-1)
    assert 100 < np.abs(expected).max() <= LARGEST_EXACT_FP16, "the case proves nothing"
    np.testing.assert_array_equal(driver.linear(x, weight, config, static_scale=1.0), expected)


def check_gemm(driver: Driver, tile: Shape, scheme: int, group_size: int, split_k: int) -> None:
    """As cases.check_gemm, with ragged tiles: groups bit for bit, other schemes within the bound, integers exactly."""
    rng = cases.generator(1, *tile, scheme, group_size, split_k)
    m, n = tile[0] + 5, 2 * tile[1] + 24
    k = 10 * max(group_size, 64) if group_size >= 64 else 32 * 11 if group_size else 400
    x, weight = cases.random_x(rng, m, k), random_weight(rng, n, k, scheme, group_size)
    bias = cases.bias_of(rng, n)
    y = check_outputs(driver, x, weight, gemm(tile, split_k), bias=bias)
    if scheme == GROUP:
        np.testing.assert_array_equal(y, cases.folded_in_order(x, weight, bias, split_k))
    check_integers(driver, gemm(tile, split_k), m, n, k, scheme, group_size)


def check_gemv(driver: Driver, m: int, scheme: int, group_size: int) -> None:
    """As cases.check_gemv: 35 x 128 channels, the last channel tile half padding; the bound and exact integers."""
    rng = cases.generator(2, m, scheme, group_size, 35 * 128)
    x, weight = cases.random_x(rng, m, 35 * 128), random_weight(rng, 40, 35 * 128, scheme, group_size)
    check_outputs(driver, x, weight, gemv(m), bias=cases.bias_of(rng, 40))
    check_integers(driver, gemv(m), m, 40, 1024, scheme, group_size)


def check_modes(driver: Driver, config: Config, m: int, dtype: Any, static_scale: float | None) -> None:
    """Output types, static and per token, with a token of zeros, and an x at any even address."""
    rng = cases.generator(5, m)
    x, weight = cases.random_x(rng, m, 192, dtype), random_weight(rng, 24, 192, GROUP, 32)
    x[m // 2] = 0
    bias = cases.bias_of(rng, 24, dtype)
    y = check_outputs(driver, x, weight, config, static_scale=static_scale, bias=bias)
    shifted = driver.linear(x, weight, config, static_scale=static_scale, bias=bias, x_offset=2)
    np.testing.assert_array_equal(shifted.view(np.uint16), y.view(np.uint16))


def check_same_bits_each_run(driver: Driver, config: Config, m: int, scheme: int, group_size: int, runs: int) -> None:
    """Run after run, the same bytes."""
    rng = cases.generator(31, m, scheme, group_size)
    x, weight = cases.random_x(rng, m, 1024), random_weight(rng, 136, 1024, scheme, group_size)
    prepared = driver.prepare(x, weight, config)
    driver.boundary.check(prepared.launch())
    first = prepared.output()
    for run in range(1, runs):
        driver.boundary.check(prepared.launch())
        assert prepared.output().tobytes() == first.tobytes(), f"run {run} differs"


def check_rows_do_not_see_each_other(
    driver: Driver, batch: Config, alone: Config, m: int, scheme: int, group_size: int
) -> None:
    """A row alone gives the bytes it gives in a batch, whatever the other rows are."""
    rng = cases.generator(4, scheme, group_size)
    x, weight = cases.random_x(rng, m, 640), random_weight(rng, 24, 640, scheme, group_size)
    y = driver.linear(x, weight, batch)
    other = x.copy()
    other[1:] = 7 * cases.random_x(rng, m - 1, 640)
    np.testing.assert_array_equal(driver.linear(other, weight, batch)[0], y[0])
    for row in (0, m - 1):
        np.testing.assert_array_equal(driver.linear(x[row : row + 1], weight, alone)[0], y[row])


def check_quantize(driver: Driver, k: int, dtype: Any, static_scale: float | None) -> None:
    """Codes, scales and row sums as `numerics`, bit for bit."""
    x = np.random.default_rng(k).normal(0, 2, (3, k)).astype(dtype)
    check_quantized(driver.quantize(x, static_scale), x, static_scale)


def check_some_of_everything(driver: Driver) -> None:
    """A few calls on every path through the kernels: what the sanitizers watch."""
    for scheme, group_size in cases.SMALL_SCHEMES:
        check_gemv(driver, 3, scheme, group_size)
        for tile in cases.SMALL_TILES:
            check_gemm(driver, tile, scheme, group_size, 3)
    check_modes(driver, gemm(cases.SMALL_TILES[1]), 70, ml_dtypes.bfloat16, 0.02)
    for k in (37, 4096, 40000):
        check_quantize(driver, k, np.float16, None)
