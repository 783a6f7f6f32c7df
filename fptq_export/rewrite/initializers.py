"""Initializers that passes add: large ones that are computed when they are written, and small constants."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fptq_export.graph_io import lazy_tensor

__all__ = ["ZERO_POINT", "constant_initializer", "element_type", "lazy_initializer"]

ZERO_POINT = "fptq.zero_point"
"""INT8 0, shared by all static quantizations."""


def element_type(value: ir.Value) -> ir.DataType:
    """Type of the elements of a value that must have one."""
    if value.dtype is None:
        raise RuntimeError(f"value {value.name!r} has no type")
    return value.dtype


def lazy_initializer(
    model: ir.Model, name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], NDArray[np.generic]]
) -> ir.Value:
    """Add an initializer that is computed when it is written (see `graph_io.lazy_tensor`)."""
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    value.const_value = lazy_tensor(name, dtype, shape, make)
    model.graph.register_initializer(value)
    return value


def constant_initializer(model: ir.Model, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Add a small constant; one of that name that is there already is taken."""
    existing = model.graph.initializers.get(name)
    if existing is not None:
        return existing
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value
