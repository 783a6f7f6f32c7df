"""INT8 codes, scales and row sums of quantize_activation, bit for bit as fptq_export/numerics.py."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.plugins.emulation.expected import check_quantized
from tests.plugins.emulation.harness import (
    CUDA_ERROR,
    NULL_POINTER,
    OUTPUT_TYPES,
    PER_TOKEN,
    STATIC,
    Desc,
    Kernels,
    aligned_copy,
    quantize,
)
from tests.plugins.emulation.weights import PER_CHANNEL


@pytest.mark.parametrize("dtype", OUTPUT_TYPES)
@pytest.mark.parametrize("static_scale", [None, 0.0123])
@pytest.mark.parametrize("k", [1, 37, 64, 576, 1000, 4096, 9001])
def test_codes_scales_and_sums_are_exact(kernels: Kernels, dtype: Any, static_scale: float | None, k: int) -> None:
    """Codes, scales and row sums equal numerics.py for aligned and ragged K, padding is zero."""
    x = np.random.default_rng(k).normal(0, 2, (3, k)).astype(dtype)
    check_quantized(quantize(kernels, x, static_scale), x, static_scale)


def test_rows_longer_than_the_registers_are_read_again(kernels: Kernels) -> None:
    """K above 32768 takes the path that reads x twice, with the largest value in the part read twice."""
    x = np.random.default_rng(5).normal(0, 1, (1, 40000)).astype(np.float16)
    x[0, -1] = 77
    check_quantized(quantize(kernels, x), x)


def test_an_unaligned_activation_gives_the_same_codes(kernels: Kernels) -> None:
    """A view that starts 2 bytes into a vector is read element by element, with equal results."""
    x = np.random.default_rng(6).normal(0, 1, (2, 128)).astype(np.float16)
    check_quantized(quantize(kernels, x, offset=2), x)


def test_the_order_of_threads_does_not_matter(kernels: Kernels) -> None:
    """Threads run last to first give the same bytes."""
    x = np.random.default_rng(7).normal(0, 1, (2, 3000)).astype(np.float16)
    check_quantized(quantize(kernels, x, reverse=True), x)


def test_ties_go_to_even_and_large_values_saturate(kernels: Kernels) -> None:
    """X / scale of +-0.5, 1.5, 2.5 rounds to 0, 2, 2; values past the range become -128 and 127."""
    x = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.5, -128.5, 400, -400, np.inf, -np.inf]], dtype=np.float16)
    codes = quantize(kernels, x, 1.0)[0]
    np.testing.assert_array_equal(codes[0, :12], [0, 2, 2, 0, -2, -2, 127, -128, 127, -128, 127, -128])


def test_every_float16_is_quantized_exactly(kernels: Kernels) -> None:
    """All finite FP16 values, with a static scale that is no power of two."""
    bits = np.arange(65536, dtype=np.uint16).view(np.float16)
    x = bits[np.isfinite(bits)][:63488].reshape(16, -1)
    check_quantized(quantize(kernels, x, 0.37), x, 0.37)


def test_a_zero_token_has_a_positive_scale(kernels: Kernels) -> None:
    """All zeros: codes 0 and scale eps / 127, never a division by zero."""
    x = np.zeros((2, 128), dtype=np.float16)
    x[1, 3] = 1e-7
    check_quantized(quantize(kernels, x), x)


def test_a_nan_stays_in_its_row(kernels: Kernels) -> None:
    """Per token, a NaN makes its row's scale NaN, whatever the other values; other rows are as without it."""
    x = np.random.default_rng(8).normal(0, 1, (3, 256)).astype(ml_dtypes.bfloat16)
    clean = quantize(kernels, x)
    x[1, 77] = np.nan
    got = quantize(kernels, x)
    assert np.isnan(got[1][1])
    np.testing.assert_array_equal(got[0][[0, 2]], clean[0][[0, 2]])
    np.testing.assert_array_equal(got[1][[0, 2]], clean[1][[0, 2]])


def test_static_mode_without_a_scale_is_refused(kernels: Kernels) -> None:
    """A null x_scale in static mode is an error, not a crash."""
    x, codes, scales = np.zeros((1, 64), np.float16), np.zeros((1, 64), np.int8), np.zeros(1, np.float32)
    desc = Desc(1, 8, 64, 0, PER_CHANNEL, STATIC, 0, 0)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, codes, scales)]
    status = kernels.c.fptqQuantizeActivation(ctypes.byref(desc), pointers[0], None, *pointers[1:], None, None)
    assert status == NULL_POINTER


def test_a_failed_launch_is_reported(kernels: Kernels) -> None:
    """When the launch fails, so does the call."""
    x, codes, scales = (
        aligned_copy(a) for a in (np.zeros((1, 64), np.float16), np.zeros((1, 64), np.int8), np.zeros(1, np.float32))
    )
    desc = Desc(1, 8, 64, 0, PER_CHANNEL, PER_TOKEN, 0, 0)
    kernels.c.emulation_reset()
    kernels.options(fail_launch=0)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, codes, scales)]
    status = kernels.c.fptqQuantizeActivation(ctypes.byref(desc), pointers[0], None, *pointers[1:], None, None)
    assert status == CUDA_ERROR
