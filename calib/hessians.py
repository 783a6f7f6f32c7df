"""`hessians.safetensors`: H = mean over tokens of x x^T for every distinct input of a linear.

Methods with error feedback need it (GPTQ, arXiv 2210.17323). It is measured on the input as it is: for x' = x / s it is
H / (s s^T). Linears that read one tensor share one matrix, stored under the first of them. Linears of an expert share
one of their own: the sum over the tokens that chose the expert, divided by the number of all tokens.

The matrices of a model are larger than the model, so they are written as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fptq_export.errors import UserError
from fptq_export.sites import Linear, Sites
from fptq_export.tensor_writer import TensorSpec, tensor_writer

__all__ = ["HESSIANS_FILE", "Hessians", "hessian_writer", "owners_from_sites"]

HESSIANS_FILE = "hessians.safetensors"
_SUFFIX = ".hessian"

_Seen = tuple[str, str | None]
"""A tensor, and the expert whose tokens of it count; None for all tokens."""


def owners_from_sites(sites: Sites, paths: Container[str]) -> dict[str, str]:
    """Path of each linear -> path of the first linear among `paths` that reads the same tensor for the same tokens."""
    first: dict[_Seen, str] = {}
    for linear in sites.linears:
        if linear.path in paths:
            first.setdefault(_seen(linear), linear.path)
    return {linear.path: first[_seen(linear)] for linear in sites.linears if linear.path in paths}


def _seen(linear: Linear) -> _Seen:
    return linear.input, linear.expert


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
        self._seen = {linear.path: _seen(linear) for linear in sites.linears}
        try:
            with safe_open(str(path), framework="pt") as file:
                stored = [name.removesuffix(_SUFFIX) for name in file.keys()]  # noqa: SIM118 (not a dict)
        except FileNotFoundError:
            raise UserError(str(path), "no such file", self.HINT) from None
        except (SafetensorError, OSError) as error:
            raise UserError(str(path), f"damaged ({error})", "delete it and calibrate again") from None
        self._owners = {self._seen[owner]: owner for owner in stored if owner in self._seen}

    def covers(self, path: str) -> bool:
        """Whether the file holds the matrix of a linear's input."""
        return self._owner(path) is not None

    def read(self, path: str) -> torch.Tensor:
        """The matrix of a linear's input: float32 [in, in], a copy.

        Raises:
            UserError: The file does not cover the linear.
        """
        owner = self._owner(path)
        if owner is None:
            raise UserError(f"layer {path}", f"{self._path.name} does not cover it", self.HINT)
        with safe_open(str(self._path), framework="pt") as file:
            hessian: torch.Tensor = file.get_tensor(f"{owner}{_SUFFIX}").clone()
        return hessian

    def read_sum(self, paths: Sequence[str]) -> torch.Tensor:
        """The matrix of a tensor, from linears that read it: float32 [in, in], a copy.

        Each expert among them saw some of the tokens; the sum has every token as often as it was seen. Linears that the
        file does not cover are left out.

        Raises:
            UserError: It covers none.
        """
        owners = dict.fromkeys(owner for path in paths if (owner := self._owner(path)) is not None)
        first, *others = owners or paths[:1]
        hessian = self.read(first)
        for owner in others:
            hessian += self.read(owner)
        return hessian

    def _owner(self, path: str) -> str | None:
        return self._owners.get(self._seen.get(path, ("", None)))
