"""A tensor of a safetensors file, or some rows of one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401 (teaches numpy bfloat16, which safetensors asks it for by name)
import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import safe_open

__all__ = ["Rows", "StoredTensor"]

_BLOCK_ELEMENTS = 1 << 22
"""Read at once where a tensor is converted."""


class Rows(NamedTuple):
    """Rows `start` to `stop` of a matrix, or of one matrix of a stack of them."""

    start: int
    stop: int
    matrix: int | None = None


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    key: str
    """Name inside the file."""
    rows: Rows | None = None
    """None for all of it."""

    def read(self) -> NDArray[np.generic]:
        """A copy; nothing else of the file is read."""
        with safe_open(str(self.file), framework="np") as tensors:
            if self.rows is None:
                array: NDArray[np.generic] = tensors.get_tensor(self.key)
                return array
            part, rows = tensors.get_slice(self.key), slice(self.rows.start, self.rows.stop)
            array = part[rows] if self.rows.matrix is None else part[self.rows.matrix, rows]
        return array

    def read_as(self, dtype: DTypeLike) -> NDArray[np.generic]:
        """A copy of another type, converted some rows at a time: the tensor is not held in both types."""
        shape = self._shape()
        if not shape:
            return self.read().astype(dtype)
        first, matrix = (0, None) if self.rows is None else (self.rows.start, self.rows.matrix)
        step = max(1, _BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
        array = np.empty(shape, dtype)
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            # The file is opened again for each block: pages that were read count as long as it is open.
            array[start:stop] = replace(self, rows=Rows(first + start, first + stop, matrix)).read()
        return array

    def _shape(self) -> tuple[int, ...]:
        with safe_open(str(self.file), framework="np") as tensors:
            shape = tensors.get_slice(self.key).get_shape()
        if self.rows is None:
            return tuple(shape)
        return (self.rows.stop - self.rows.start, *shape[1 if self.rows.matrix is None else 2 :])
