"""Write the tensors of a torch checkpoint one at a time: memory does not follow the size of the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from fptq_export import tensor_writer

__all__ = ["TensorSpec", "write_tensors"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to write."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    """Gives it when its turn comes."""


def write_tensors(specs: Mapping[str, TensorSpec], path: Path) -> None:
    """Write a safetensors file in one step; tensors are read one after another.

    Raises:
        ValueError: A tensor is not what its spec says.
    """
    announced = {
        name: tensor_writer.TensorSpec(_array_from_tensor(torch.empty(0, dtype=spec.dtype)).dtype, spec.shape)
        for name, spec in specs.items()
    }
    with tensor_writer.tensor_writer(path, announced, {"format": "pt"}) as writer:
        for name, spec in specs.items():
            writer.write(name, _array_from_tensor(spec.read()))


def _array_from_tensor(tensor: torch.Tensor) -> NDArray[Any]:
    """The same memory; numpy alone has no bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.dtype(ml_dtypes.bfloat16))
    array: NDArray[Any] = tensor.numpy()
    return array
