"""`hessians.safetensors`: H = mean over tokens of x x^T for every distinct input of a linear.

Methods with error feedback need it (GPTQ, arXiv 2210.17323). It is measured on the input as it is: for x' = x / s it is
H / (s s^T). Linears that read one tensor share one matrix, stored under the first of them.

The matrices of a model are several times larger than its largest layer, so the file is written as they come. Its
header, which lists names and offsets, is known beforehand: shapes come from `sites.json`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open

from fptq_export.errors import UserError
from fptq_export.files import atomic_path
from fptq_export.sites import Sites

__all__ = ["HESSIANS_FILE", "HessianWriter", "Hessians", "hessian_writer", "owners_from_sites"]

HESSIANS_FILE = "hessians.safetensors"
_SUFFIX = ".hessian"
_ITEM_BYTES = 4


def owners_from_sites(sites: Sites, paths: Collection[str]) -> dict[str, str]:
    """Path of each linear -> path of the first linear among `paths` that reads the same tensor."""
    first: dict[str, str] = {}
    for linear in sites.linears:
        if linear.path in paths:
            first.setdefault(linear.input, linear.path)
    return {linear.path: first[linear.input] for linear in sites.linears if linear.path in paths}


@dataclass(frozen=True)
class HessianWriter:
    """Puts matrices into their places in a file."""

    _file: IO[bytes]
    _offsets: Mapping[str, int]
    _sizes: Mapping[str, int]

    def write(self, path: str, hessian: torch.Tensor) -> None:
        """Store the matrix of one linear: float32 [in, in]."""
        if tuple(hessian.shape) != (self._sizes[path],) * 2 or hessian.dtype != torch.float32:
            raise ValueError(f"{path}: {hessian.dtype} {list(hessian.shape)} is not float32 [in, in]")
        self._file.seek(self._offsets[path])
        hessian.contiguous().numpy().tofile(self._file)


@contextmanager
def hessian_writer(path: Path, in_features: Mapping[str, int]) -> Iterator[HessianWriter]:
    """Open the file for writing; it appears under its name when the block ends without an error.

    Args:
        path: Where it goes.
        in_features: Linear path -> in, for every matrix that will be written.
    """
    ends = list(accumulate(size * size * _ITEM_BYTES for size in in_features.values()))
    begins = dict(zip(in_features, [0, *ends], strict=False))
    entries = {
        f"{name}{_SUFFIX}": {"dtype": "F32", "shape": [size, size], "data_offsets": [begins[name], end]}
        for (name, size), end in zip(in_features.items(), ends, strict=True)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    start = 8 + len(header)
    with atomic_path(path) as partial, partial.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(start + (ends[-1] if ends else 0))
        yield HessianWriter(file, {name: start + begin for name, begin in begins.items()}, in_features)


class Hessians:
    """The matrices on disk, one in memory at a time.

    Raises:
        UserError: The file is missing or damaged.
    """

    HINT = "calibrate with the weight method that needs it: --weight-method gptq"

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(str(path), framework="pt") as file:
                self._names = frozenset(file.keys())
        except FileNotFoundError:
            raise UserError(str(path), "no such file", self.HINT) from None
        except (SafetensorError, OSError) as error:
            raise UserError(str(path), f"damaged ({error})", "delete it and calibrate again") from None

    def read(self, path: str, owners: Mapping[str, str]) -> torch.Tensor:
        """The matrix of a linear's input: float32 [in, in], a copy.

        Args:
            path: The linear.
            owners: As `owners_from_sites` gave them.

        Raises:
            UserError: The file does not cover the linear.
        """
        name = f"{owners.get(path, path)}{_SUFFIX}"
        if name not in self._names:
            raise UserError(f"layer {path}", f"{self._path.name} does not cover it", self.HINT)
        with safe_open(str(self._path), framework="pt") as file:
            hessian: torch.Tensor = file.get_tensor(name).clone()
        return hessian
