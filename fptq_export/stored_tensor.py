"""A tensor of a safetensors file, or some rows of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401 (teaches numpy bfloat16, which safetensors asks it for by name)
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

__all__ = ["Rows", "StoredTensor"]


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
