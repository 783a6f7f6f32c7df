"""Arrays in and out of ONNX Runtime, BF16 included, which NumPy does not know."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto

__all__ = ["DTYPE_FROM_ORT_TYPE", "array_from_ort_value", "float32_from_ort_value", "ort_value_from_array"]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPE_FROM_ORT_TYPE: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": _BFLOAT16,
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int8)": np.dtype(np.int8),
}


def ort_value_from_array(array: NDArray[Any]) -> Any:
    """A copy of an array that ONNX Runtime owns."""
    if array.dtype == _BFLOAT16:  # NumPy has no such type, so ONNX Runtime takes the bits
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def array_from_ort_value(value: Any) -> NDArray[Any]:
    """The memory of ONNX Runtime as an array: valid as long as `value` lives, and not to be written to."""
    memory = (ctypes.c_byte * value.tensor_size_in_bytes()).from_address(value.data_ptr())
    array: NDArray[Any] = np.frombuffer(memory, dtype=DTYPE_FROM_ORT_TYPE[value.data_type()])
    return array.reshape(value.shape())


def float32_from_ort_value(value: Any) -> NDArray[np.float32]:
    """Copy once, straight from the memory of ONNX Runtime: OrtValue.numpy() copies before a cast could."""
    return array_from_ort_value(value).astype(np.float32)
