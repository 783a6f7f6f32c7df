from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from fptq_export.packing import INT4_MAX, INT4_MIN, int4_from_packed, packed_from_int4

SHAPES = array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6).map(lambda shape: (*shape[:-1], shape[-1] * 2))


@given(arrays(np.int8, SHAPES, elements=st.integers(INT4_MIN, INT4_MAX)))
def test_codes_survive_the_round_trip(codes: NDArray[np.int8]) -> None:
    """Unpacking gives back what was packed, in half the bytes."""
    packed = packed_from_int4(codes)
    assert packed.nbytes * 2 == codes.nbytes
    np.testing.assert_array_equal(int4_from_packed(packed), codes)


@given(arrays(np.uint8, SHAPES))
def test_bytes_survive_the_round_trip(packed: NDArray[np.uint8]) -> None:
    """Every byte is two codes, so packing is a bijection."""
    np.testing.assert_array_equal(packed_from_int4(int4_from_packed(packed)), packed)


def test_first_code_is_in_the_low_bits() -> None:
    """The byte order of ONNX and TensorRT: (1, -1) is 0xF1."""
    assert packed_from_int4(np.array([1, -1, -8, 7], np.int8)).tolist() == [0xF1, 0x78]


@given(arrays(np.int8, (3, 4), elements=st.integers(INT4_MIN, INT4_MAX)))
def test_layout_is_that_of_onnx(codes: NDArray[np.int8]) -> None:
    """An independent reader, onnx_ir, sees the same codes."""
    tensor = ir.PackedTensor(packed_from_int4(codes).reshape(-1), ir.DataType.INT4, shape=[3, 4])
    np.testing.assert_array_equal(tensor.numpy().astype(np.int8), codes)


def test_strided_codes_are_packed_in_their_order() -> None:
    """A transposed view is packed as it reads, not as it lies in memory."""
    codes = np.arange(-8, 8, dtype=np.int8).reshape(4, 4).T
    np.testing.assert_array_equal(int4_from_packed(packed_from_int4(codes)), codes)


@pytest.mark.parametrize("code", [8, -9, 127, -128])
def test_codes_beyond_four_bits_are_refused(code: int) -> None:
    """A code that loses bits is an error, not another number."""
    with pytest.raises(ValueError, match=r"INT4 codes lie in \[-8, 7\]"):
        packed_from_int4(np.array([0, code], np.int8))


def test_odd_number_of_codes_is_refused() -> None:
    """Half a byte has no place along the last axis."""
    with pytest.raises(ValueError, match="odd number of INT4 codes"):
        packed_from_int4(np.zeros((2, 3), np.int8))


def test_no_codes_are_packed_to_nothing() -> None:
    """An empty array is no error."""
    assert packed_from_int4(np.zeros((0, 4), np.int8)).shape == (0, 2)
