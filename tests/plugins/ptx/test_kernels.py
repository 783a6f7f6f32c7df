"""The PTX that nvcc makes of the kernels, interpreted: bit for bit what the emulator computes from the C++ source."""

from __future__ import annotations

import itertools
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.plugins.emulation.cases import SCHEMES, bias_of, generator, is_offered, random_x
from tests.plugins.emulation.expected import check_quantized
from tests.plugins.emulation.harness import GEMV, TILES, Config, Kernels, gemm, gemv, quantize
from tests.plugins.emulation.weights import GROUP, PER_CHANNEL, TWO_LEVEL, plain_weight, random_weight, two_level_weight
from tests.plugins.ptx.agreement import (
    FEW_SCHEMES,
    FEW_TILES,
    STATIC_SCALE,
    assert_agree,
    assert_gemm_agrees,
    assert_gemv_agrees,
    assert_outputs_agree,
)
from tests.plugins.ptx.compile import Compiled
from tests.plugins.ptx.launch import Interpreted, Program

CONFIGS = (gemm(TILES[0], 2), gemm(TILES[2]), gemv(4))


@pytest.mark.parametrize(("scheme", "group_size"), SCHEMES)
def test_every_gemm_kernel(emulated: Kernels, interpreted: Interpreted, scheme: int, group_size: int) -> None:
    """All tiles with and without split-K and its reduction, ragged in m, n and k."""
    for tile, split_k in itertools.product(TILES, (1, 3)):
        if is_offered(tile, scheme, group_size):
            assert_gemm_agrees(emulated, interpreted, tile, scheme, group_size, split_k)


@pytest.mark.parametrize(("scheme", "group_size"), SCHEMES)
def test_every_gemv_kernel(emulated: Kernels, interpreted: Interpreted, scheme: int, group_size: int) -> None:
    """One to four rows, an odd number of channel tiles, warps with unequal shares of k."""
    for m in (1, 2, 3, 4):
        assert_gemv_agrees(emulated, interpreted, m, scheme, group_size)


def test_no_kernel_is_left_out(product: Compiled) -> None:
    """The configurations above launch every entry function that nvcc made."""
    program = Program(product.modules())
    recorder = Interpreted(product.library, program, runs=False)
    launched: set[str] = set()
    for scheme, group_size in SCHEMES:
        rng = generator(0)
        k = 2 * max(group_size, 64)
        weight = random_weight(rng, 16, k, scheme, group_size)
        tiles = [tile for tile in TILES if is_offered(tile, scheme, group_size)]
        for config in (*(gemm(tile, split) for tile in tiles for split in (1, 2)), *map(gemv, (1, 2, 3, 4))):
            m = config.block_m if config.kernel == GEMV else 1
            recorder.linear(random_x(rng, m, k), weight, config)
            launched.update(name for name, _ in recorder.host.launches)
    assert launched == set(program.texts)


@pytest.mark.parametrize("config", CONFIGS, ids=("split", "plain", "gemv"))
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=("fp16", "bf16"))
@pytest.mark.parametrize("static_scale", [None, STATIC_SCALE], ids=("per_token", "static"))
@pytest.mark.parametrize("with_bias", [False, True], ids=("plain", "bias"))
def test_modes(
    emulated: Kernels,
    interpreted: Interpreted,
    config: Config,
    dtype: Any,
    static_scale: float | None,
    with_bias: bool,
) -> None:
    """Every combination of output type, activation mode and bias, with a row of zeros."""
    rng = generator(13, with_bias)
    m = 4 if config.kernel == GEMV else 70
    x, weight = random_x(rng, m, 192, dtype), random_weight(rng, 24, 192, GROUP, 32)
    x[m // 2] = 0
    bias = bias_of(rng, 24, dtype) if with_bias else None
    assert_agree(emulated, interpreted, x, weight, config, static_scale=static_scale, bias=bias)


@pytest.mark.parametrize("config", [gemm(TILES[0]), gemv(2)], ids=("gemm", "gemv"))
@pytest.mark.parametrize(("scheme", "group_size"), [(PER_CHANNEL, 0), (GROUP, 128), (TWO_LEVEL, 16)])
def test_largest_sums(
    emulated: Kernels, interpreted: Interpreted, config: Config, scheme: int, group_size: int
) -> None:
    """All activations -128 and all weights at their largest: byte operands at the end of their range."""
    n, k, groups = 40, 512, 512 // (group_size or 512)
    if scheme == TWO_LEVEL:
        ones = np.ones((n, groups), dtype=np.int64)
        weight = two_level_weight(np.full((n, k), 15), 17 * ones, 128 * ones, np.full(n, 1e-5, np.float32), group_size)
    else:
        weight = plain_weight(np.full((n, k), -8), np.full((n, groups), 1e-2, np.float16), group_size)
    x = np.full((2, k), -128, dtype=np.float16)
    assert_agree(emulated, interpreted, x, weight, config, static_scale=1.0)


@pytest.mark.parametrize("config", [gemm(TILES[0]), gemv(3)], ids=("gemm", "gemv"))
def test_infinities_and_nan(emulated: Kernels, interpreted: Interpreted, config: Config) -> None:
    """Outputs past the range of FP16, a NaN and an infinity in a row: the same special values on both."""
    rng = generator(14)
    x, weight = random_x(rng, 3, 128), random_weight(rng, 24, 128, GROUP, 32)
    x[0] *= np.float16(5000)
    x[1, 5] = np.nan
    x[2, 7] = np.inf
    assert_outputs_agree(emulated, interpreted, x, weight, config)
    got, want = quantize(interpreted, x), quantize(emulated, x)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])  # a NaN equals a NaN here


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=("fp16", "bf16"))
@pytest.mark.parametrize("static_scale", [None, 0.37], ids=("per_token", "static"))
@pytest.mark.parametrize(("k", "offset"), [(8, 0), (200, 0), (200, 2), (201, 0), (4096, 0)])
def test_quantize_activation(
    emulated: Kernels, interpreted: Interpreted, dtype: Any, static_scale: float | None, k: int, offset: int
) -> None:
    """Codes, scales and row sums of both modes, for rows that are aligned, not aligned, and of odd length."""
    x = random_x(generator(15, k, offset), 3, k, dtype)
    got, want = quantize(interpreted, x, static_scale, offset), quantize(emulated, x, static_scale, offset)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1].view(np.uint32), want[1].view(np.uint32))
    np.testing.assert_array_equal(got[2], want[2])
    check_quantized(got, x, static_scale)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_longer_than_a_block_keeps(emulated: Kernels, interpreted: Interpreted, rows: int) -> None:
    """GEMV with more vectors than its threads hold in registers: the rest is read twice."""
    rng = generator(16, rows)
    k = 256 * 8 * 4 + 72  # threads x elements of a vector x vectors kept, and nine vectors more
    x, weight = random_x(rng, rows, k), random_weight(rng, 16, k, PER_CHANNEL, 0)
    assert_agree(emulated, interpreted, x, weight, gemv(rows))


@pytest.mark.parametrize(("scheme", "group_size"), FEW_SCHEMES)
def test_another_architecture(emulated: Kernels, other_architecture: Interpreted, scheme: int, group_size: int) -> None:
    """What nvcc's newer code generator makes of the same source computes the same bits."""
    for tile, split_k in itertools.product(FEW_TILES, (1, 3)):
        assert_gemm_agrees(emulated, other_architecture, tile, scheme, group_size, split_k)
    for m in (1, 4):
        assert_gemv_agrees(emulated, other_architecture, m, scheme, group_size)


def test_the_assembler_may_not_contract(interpreted: Interpreted, other_architecture: Interpreted) -> None:
    """No FP32 sum takes a product where neither names its rounding: ptxas would be free to fuse the two."""
    for program in (interpreted.host.program, other_architecture.host.program):
        for name, text in program.texts.items():
            products = set(re.findall(r"\bmul\.f32\s+(%\w+),", text))
            sums = re.findall(r"\b(?:add|sub)\.f32\s+%\w+, (%?\w+), (%?\w+);", text)
            fused = [pair for pair in sums if products & set(pair)]
            assert not fused, f"{name}: {fused}"
