"""The packer in Python and the packer in C++ write the same bytes, and both can be undone."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fptq_export.packing import (
    TILE_IN,
    TILE_OUT,
    groups_from_packed_scales,
    int4_from_packed_tiles,
    packed_scales_from_groups,
    packed_tiles_from_int4,
    padded_shape,
)
from fptq_export.plugin.status import Status
from tests.support.plugin import built_double

SHAPES = st.tuples(st.integers(1, 9).map(lambda n: 8 * n), st.integers(1, 200))
EXAMPLES = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(built_double(targets=("fptq_packing",)) / "libfptq_packing.so"))


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def random_codes(n: int, k: int, seed: int) -> NDArray[np.int8]:
    return np.random.default_rng(seed).integers(-8, 8, (n, k)).astype(np.int8)


@EXAMPLES
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
def test_codes_survive_packing(shape: tuple[int, int], seed: int) -> None:
    """What is unpacked is what was packed, for every shape."""
    codes = random_codes(*shape, seed)
    packed = packed_tiles_from_int4(codes)
    padded_n, padded_k = padded_shape(*shape)
    assert packed.shape == (padded_n * padded_k // 2,)
    np.testing.assert_array_equal(int4_from_packed_tiles(packed, *shape), codes)


@EXAMPLES
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
def test_both_packers_write_the_same_bytes(library: ctypes.CDLL, shape: tuple[int, int], seed: int) -> None:
    """Two programs made from one page, `layout.h`, agree bit for bit, and each reads the other's bytes."""
    codes = random_codes(*shape, seed)
    packed = packed_tiles_from_int4(codes)
    from_cpp, unpacked = np.empty_like(packed), np.empty_like(codes)
    assert library.fptqPackTiles(pointer(codes), *shape, pointer(from_cpp)) == Status.OK
    np.testing.assert_array_equal(from_cpp, packed)
    assert library.fptqUnpackTiles(pointer(packed), *shape, pointer(unpacked)) == Status.OK
    np.testing.assert_array_equal(unpacked, codes)


@EXAMPLES
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))
def test_scales_survive_packing_and_equal_those_of_cpp(library: ctypes.CDLL, shape: tuple[int, int], seed: int) -> None:
    """Scales are transposed and padded with zeros the same way on both sides, negative ones too."""
    n, groups = shape
    scales = np.random.default_rng(seed).standard_normal((n, groups)).astype(np.float16)
    packed = packed_scales_from_groups(scales)
    np.testing.assert_array_equal(groups_from_packed_scales(packed, n), scales)
    np.testing.assert_array_equal(packed[:, n:], 0)
    from_cpp = np.empty_like(packed)
    assert library.fptqPackScales(pointer(scales), n, groups, pointer(from_cpp)) == Status.OK
    np.testing.assert_array_equal(from_cpp.view(np.uint16), packed.view(np.uint16))


@pytest.mark.parametrize("lane", [0, 5, 31])
@pytest.mark.parametrize(("word", "byte", "high"), [(0, 0, 0), (1, 2, 1), (2, 3, 0), (3, 1, 1)])
def test_one_code_lies_where_the_header_says(lane: int, word: int, byte: int, high: int) -> None:
    """The formula of `layout.h`, applied by hand to single codes of the second tile in both directions."""
    n = TILE_OUT + 8 * (word // 2) + lane // 4
    k = TILE_IN + 32 * (word % 2) + 4 * (lane % 4) + byte + 16 * high
    codes = np.zeros((2 * TILE_OUT, 3 * TILE_IN), np.int8)
    codes[n, k] = -3
    packed = packed_tiles_from_int4(codes)
    (place,) = np.flatnonzero(packed)
    assert place == (1 * 3 + 1) * 512 + lane * 16 + word * 4 + byte
    assert packed[place] == 13 << (4 * high)


@pytest.mark.parametrize("shape", [(12, 64), (0, 64), (16, 0)])
def test_shape_that_the_kernels_do_not_take_is_refused(library: ctypes.CDLL, shape: tuple[int, int]) -> None:
    """Output channels that are no multiple of 8, and empty weights."""
    codes, target = np.zeros(shape, np.int8), np.empty(4096, np.uint8)
    with pytest.raises(ValueError, match="multiple of 8 output channels"):
        packed_tiles_from_int4(codes)
    assert library.fptqPackTiles(pointer(target), *shape, pointer(target)) == Status.BAD_SHAPE


@pytest.mark.parametrize("code", [-9, 8, 127])
def test_code_that_does_not_fit_is_refused(library: ctypes.CDLL, code: int) -> None:
    """A code is never cut to four bits in silence."""
    codes, target = np.full((8, 64), code, np.int8), np.empty(512, np.uint8)
    with pytest.raises(ValueError, match="INT4 codes lie in"):
        packed_tiles_from_int4(codes)
    assert library.fptqPackTiles(pointer(codes), 8, 64, pointer(target)) == Status.BAD_CONFIG


def test_null_pointer_is_refused(library: ctypes.CDLL) -> None:
    """A missing array is a status, not a crash."""
    assert library.fptqPackTiles(None, 8, 64, None) == Status.NULL_POINTER
    assert library.fptqUnpackTiles(None, 8, 64, None) == Status.NULL_POINTER
    assert library.fptqPackScales(None, 8, 1, None) == Status.NULL_POINTER


def test_bytes_of_another_shape_are_refused() -> None:
    """Neither tiles nor scales of another weight are unpacked into nonsense."""
    with pytest.raises(ValueError, match="do not hold"):
        int4_from_packed_tiles(np.zeros(512, np.uint8), 32, 64)
    with pytest.raises(ValueError, match="have rows of 32"):
        groups_from_packed_scales(np.zeros((2, 16), np.float16), 24)
