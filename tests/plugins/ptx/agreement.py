"""The same call on the interpreter and on the emulator: every bit that they leave behind must agree."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.plugins.emulation.cases import bias_of, generator, random_x
from tests.plugins.emulation.harness import OK, OUTPUT_TYPES, Config, Kernels, Result, Shape, gemm, gemv
from tests.plugins.emulation.weights import GROUP, PER_CHANNEL, TWO_LEVEL, Weight, random_weight
from tests.plugins.ptx.launch import Interpreted

OTHER_ARCHITECTURE = "120"
"""From compute capability 10.0 on nvcc has another code generator: other text for the same source."""
FEW_SCHEMES = ((PER_CHANNEL, 0), (GROUP, 64), (GROUP, 16), (TWO_LEVEL, 32))
FEW_TILES: tuple[Shape, ...] = ((16, 128, 16, 32, 6), (64, 64, 32, 32, 4))
_SCHEME_NAMES = ("FPTQ_PER_CHANNEL", "FPTQ_GROUP", "FPTQ_TWO_LEVEL")
FEW_KERNELS = (
    f"#define FPTQ_GEMM_TILES(T) {' '.join(f'T{tile}' for tile in FEW_TILES)}\n"
    f"#define FPTQ_SCHEMES(S) {' '.join(f'S({_SCHEME_NAMES[kind]}, {group})' for kind, group in FEW_SCHEMES)}\n"
)
STATIC_SCALE = 0.02


def assert_agree(
    emulated: Kernels, interpreted: Interpreted, x: NDArray[Any], weight: Weight, config: Config, **options: Any
) -> None:
    """fptqW4A8Linear on both. Outputs, codes, scales, row sums and partial sums are compared as bits."""
    want, got = assert_outputs_agree(emulated, interpreted, x, weight, config, **options)
    np.testing.assert_array_equal(got.workspace, want.workspace)


def assert_outputs_agree(
    emulated: Kernels, interpreted: Interpreted, x: NDArray[Any], weight: Weight, config: Config, **options: Any
) -> tuple[Result, Result]:
    """Outputs as bits; the payload of a NaN is no part of the contract, so a NaN agrees with every NaN."""
    want = emulated.linear(x, weight, config, **options)
    assert want.status == OK, want.error
    got = interpreted.linear(x, weight, config, **options)
    assert got.status == OK, f"status {got.status}"
    is_nan = np.isnan(want.y.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.y.astype(np.float32)), is_nan)
    np.testing.assert_array_equal(got.y.view(np.uint16)[~is_nan], want.y.view(np.uint16)[~is_nan])
    return want, got


def ragged_k(group_size: int) -> int:
    """Ten k tiles, more than any pipeline has stages; or fewer, and the last one not whole, where groups allow it."""
    if group_size >= 64:
        return 640
    return 32 * 11 if group_size else 400


def assert_gemm_agrees(
    emulated: Kernels, interpreted: Interpreted, tile: Shape, scheme: int, group_size: int, split_k: int
) -> None:
    """Two row tiles and three channel tiles, the last ones ragged.

    Split-K is BF16, static and without bias; else FP16, per token and with bias.
    """
    rng = generator(11, *tile, scheme, group_size, split_k)
    m, n, k = tile[0] + 5, 2 * tile[1] + 24, ragged_k(group_size)
    dtype = OUTPUT_TYPES[split_k > 1]
    x, weight = random_x(rng, m, k, dtype), random_weight(rng, n, k, scheme, group_size)
    scale, bias = (STATIC_SCALE, None) if split_k > 1 else (None, bias_of(rng, n, dtype))
    assert_agree(emulated, interpreted, x, weight, gemm(tile, split_k), static_scale=scale, bias=bias)


def assert_gemv_agrees(emulated: Kernels, interpreted: Interpreted, m: int, scheme: int, group_size: int) -> None:
    """Warps with two units of k tiles and warps with one; even m: BF16, static and no bias."""
    rng = generator(12, m, scheme, group_size)
    k = 11 * max(group_size, 64)
    dtype = OUTPUT_TYPES[m % 2 == 0]
    x, weight = random_x(rng, m, k, dtype), random_weight(rng, 40, k, scheme, group_size)
    scale, bias = (STATIC_SCALE, None) if m % 2 == 0 else (None, bias_of(rng, 40, dtype))
    assert_agree(emulated, interpreted, x, weight, gemv(m), static_scale=scale, bias=bias)
