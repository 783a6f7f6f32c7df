"""Write a safetensors file tensor by tensor: memory does not follow the size of the file.

Format: 8 bytes little-endian length, that many bytes of JSON, then the tensors one after another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from fptq_export.files import atomic_path

__all__ = ["TensorSpec", "write_tensors"]

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to write."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    """Gives it when its turn comes."""

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(specs: Mapping[str, TensorSpec], path: Path) -> None:
    """Write the file in one step; tensors are read in order of their size of element, which keeps them aligned.

    Raises:
        ValueError: A tensor is not what its spec says.
    """
    ordered = sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize)
    ends = list(accumulate(spec.bytes for _, spec in ordered))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for (name, spec), begin, end in zip(ordered, [0, *ends], ends, strict=False):
        entries[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with atomic_path(path) as partial, partial.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, spec in ordered:
            tensor = spec.read()
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not what its spec says")
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)
