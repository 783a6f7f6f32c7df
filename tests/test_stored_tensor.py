"""Tensors of safetensors files are read as they are, and converted without being held twice."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fptq_export import stored_tensor
from fptq_export.memory import PeakMemory
from fptq_export.stored_tensor import Rows, StoredTensor

_SHAPES = {"scalar": (), "vector": (7,), "empty": (0, 3), "matrix": (7, 3), "stack": (3, 5, 2)}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two rows of the matrix below, so that the last one is short."""
    monkeypatch.setattr(stored_tensor, "_BLOCK_ELEMENTS", 6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("stored_type", [np.float32, ml_dtypes.bfloat16, np.float16], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", _SHAPES)
def test_blocks_are_the_whole_converted(name: str, stored_type: type, tmp_path: Path) -> None:
    """Converting some rows at a time gives the bits of converting all at once."""
    values: NDArray[np.generic] = np.random.default_rng(0).normal(size=_SHAPES[name]).astype(stored_type)
    save_file({"w": values}, tmp_path / "w.safetensors")
    converted = StoredTensor(tmp_path / "w.safetensors", "w").read_as(np.float16)
    assert converted.dtype == np.float16
    assert converted.shape == values.shape
    assert converted.tobytes() == values.astype(np.float16).tobytes()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rows", [Rows(1, 4), Rows(1, 4, matrix=2), Rows(0, 5, matrix=0)], ids=str)
def test_blocks_of_rows_are_those_rows(rows: Rows, tmp_path: Path) -> None:
    """A part of a matrix, or of one matrix of a stack, starts where it starts in the file."""
    shape = (7, 3) if rows.matrix is None else (3, 5, 2)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    save_file({"w": values}, tmp_path / "w.safetensors")
    matrix = values if rows.matrix is None else values[rows.matrix]
    converted = StoredTensor(tmp_path / "w.safetensors", "w", rows).read_as(np.float16)
    assert converted.tobytes() == matrix[rows.start : rows.stop].astype(np.float16).tobytes()


def test_conversion_holds_less_than_the_tensor_once(tmp_path: Path) -> None:
    """float32 to float16 needs the result, half of the tensor, and a block mapped and copied, a third of this one."""
    values = np.ones((24, 1 << 20), np.float32)
    save_file({"w": values}, tmp_path / "w.safetensors")
    size = values.nbytes
    del values
    before = psutil.Process().memory_info().rss
    with PeakMemory() as peak:
        converted = StoredTensor(tmp_path / "w.safetensors", "w").read_as(np.float16)
    assert converted.nbytes == size // 2
    assert peak.bytes - before < size
