"""`hessians.safetensors`: H = mean over tokens of x x^T for every distinct input of a linear.

Methods with error feedback need it (GPTQ, arXiv 2210.17323). It is measured on the input as it is: for x' = x / s it is
H / (s s^T). Linears that read one tensor share one matrix, stored under the first of them.

The matrices of a model are larger than the model, so they are written as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fptq_export.errors import UserError
from fptq_export.sites import Sites
from fptq_export.tensor_writer import TensorSpec, tensor_writer

__all__ = ["HESSIANS_FILE", "Hessians", "hessian_writer", "owners_from_sites"]

HESSIANS_FILE = "hessians.safetensors"
_SUFFIX = ".hessian"


def owners_from_sites(sites: Sites, paths: Container[str]) -> dict[str, str]:
    """Path of each linear -> path of the first linear among `paths` that reads the same tensor."""
    first: dict[str, str] = {}
    for linear in sites.linears:
        if linear.path in paths:
            first.setdefault(linear.input, linear.path)
    return {linear.path: first[linear.input] for linear in sites.linears if linear.path in paths}


@contextmanager
def hessian_writer(
    path: Path, in_features: Mapping[str, int], *, draft: Path | None = None, written: Collection[str] = ()
) -> Iterator[Callable[[str, torch.Tensor], None]]:
    """Open the file for writing; it appears under its name when the block ends and every matrix came.

    Args:
        path: Where it goes.
        in_features: Linear path -> in, for every matrix of the file.
        draft: Where it lies until it is complete; see `tensor_writer`.
        written: Linears whose matrices an earlier process put into the draft.

    Yields:
        A function that stores the matrix of one linear, float32 [in, in].
    """
    specs = {f"{name}{_SUFFIX}": TensorSpec.of("float32", size, size) for name, size in in_features.items()}
    names = [f"{name}{_SUFFIX}" for name in written]
    with tensor_writer(path, specs, draft=draft, written=names) as writer:
        yield lambda name, hessian: writer.write(f"{name}{_SUFFIX}", hessian.numpy())


class Hessians:
    """The matrices on disk, one in memory at a time.

    Args:
        path: The file.
        sites: Say which linears read the same tensor.

    Raises:
        UserError: The file is missing or damaged.
    """

    HINT = "calibrate with the weight method of the layer, e.g. --weight-method gptq"

    def __init__(self, path: Path, sites: Sites) -> None:
        self._path = path
        self._inputs = {linear.path: linear.input for linear in sites.linears}
        try:
            with safe_open(str(path), framework="pt") as file:
                stored = [name.removesuffix(_SUFFIX) for name in file.keys()]  # noqa: SIM118 (not a dict)
        except FileNotFoundError:
            raise UserError(str(path), "no such file", self.HINT) from None
        except (SafetensorError, OSError) as error:
            raise UserError(str(path), f"damaged ({error})", "delete it and calibrate again") from None
        self._owner_by_input = {self._inputs[owner]: owner for owner in stored if owner in self._inputs}

    def covers(self, path: str) -> bool:
        """Whether the file holds the matrix of a linear's input."""
        return self._inputs.get(path, "") in self._owner_by_input

    def read(self, path: str) -> torch.Tensor:
        """The matrix of a linear's input: float32 [in, in], a copy.

        Raises:
            UserError: The file does not cover the linear.
        """
        owner = self._owner_by_input.get(self._inputs.get(path, ""))
        if owner is None:
            raise UserError(f"layer {path}", f"{self._path.name} does not cover it", self.HINT)
        with safe_open(str(self._path), framework="pt") as file:
            hessian: torch.Tensor = file.get_tensor(f"{owner}{_SUFFIX}").clone()
        return hessian
