"""One linear of a quantized checkpoint, whatever its format, and what all formats share.

A format module turns `config.json` and tensor headers into `LinearSource`s; no data is read before `read` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from calib.given import GivenActivation
from calib.load import Checkpoint
from fptq_export.errors import Problem, UserError
from fptq_export.packing import INT4_MAX, INT4_MIN
from fptq_export.policy import GROUP_SIZES

__all__ = [
    "FLOAT_DTYPES",
    "Expected",
    "LinearSource",
    "StoredWeight",
    "check_contiguous_groups",
    "check_zero_points",
    "kernel_groups",
    "nibbles_from_int32",
    "storable_scales",
    "tensor_problems",
]

FLOAT_DTYPES = ("F16", "BF16", "F32")
_SMALLEST_SCALE = torch.finfo(torch.float16).tiny


@dataclass(frozen=True)
class StoredWeight:
    """Codes and scales as a checkpoint stores them."""

    codes: torch.Tensor
    """int8 [out, in]."""
    scales: torch.Tensor
    """Floating point [out, in/group_size]."""


@dataclass(frozen=True)
class LinearSource:
    """Where the weight of one linear comes from."""

    path: str
    group_size: int
    """As the checkpoint has it; it divides the input channels."""
    tensors: frozenset[str]
    """Names of the tensors that make up the weight; nothing else reads them."""
    read: Callable[[], StoredWeight]
    activation: GivenActivation | None = None
    read_activation_scale: Callable[[], float] | None = None


@dataclass(frozen=True)
class Expected:
    """Dtypes and shape that a tensor must have."""

    dtypes: Collection[str]
    shape: tuple[int, ...]
    optional: bool = False


def tensor_problems(checkpoint: Checkpoint, expected: Mapping[str, Expected]) -> Iterator[Problem]:
    """What is missing, or of another dtype or shape; from headers alone."""
    for name, wanted in expected.items():
        entry = checkpoint.tensors.get(name)
        where = f'$["{name}"]'
        if entry is None:
            if not wanted.optional:
                yield Problem(where, "missing; the layer cannot be read without it")
        elif entry.dtype not in wanted.dtypes:
            yield Problem(where, f"is {entry.dtype}; {' or '.join(wanted.dtypes)} is expected")
        elif entry.shape != wanted.shape:
            yield Problem(where, f"is {list(entry.shape)}; {list(wanted.shape)} is expected")


def nibbles_from_int32(packed: torch.Tensor) -> torch.Tensor:
    """Split every int32 into eight nibbles, the lowest bits first: int32 [..., n] -> uint8 [..., 8n] in [0, 15]."""
    octets = packed.contiguous().view(torch.uint8)
    return torch.stack((octets & 0x0F, octets >> 4), dim=-1).reshape(*packed.shape[:-1], -1)


def check_zero_points(path: str, zero_points: torch.Tensor, symmetric: int) -> None:
    """Refuse zero points that differ from the one of symmetric codes.

    Raises:
        UserError: Some do; INT4 here has no zero point, and moving codes would change them.
    """
    other = zero_points[zero_points != symmetric]
    if other.numel():
        cause = f"{other.numel()} of its {zero_points.numel()} groups have a zero point other than {symmetric}"
        raise UserError(
            f"layer {path}",
            f"its weight is asymmetric ({cause}, e.g. {int(other[0])})",
            "INT4 kernels here are symmetric: quantize the original model, or take a symmetric checkpoint",
        )


def check_contiguous_groups(path: str, g_idx: torch.Tensor | None, group_size: int) -> None:
    """Refuse groups that are not consecutive input channels.

    Args:
        path: The linear.
        g_idx: Group of each input channel, integers [in]; None where the checkpoint has none.
        group_size: Channels a group.

    Raises:
        UserError: The groups follow the activation order, which no kernel here can gather.
    """
    if g_idx is None or torch.equal(g_idx.long(), torch.arange(g_idx.numel()) // group_size):
        return
    cause = "its groups follow the activation order (g_idx), so they are not consecutive channels"
    raise UserError(f"layer {path}", cause, "quantize with static groups, or without activation order")


def kernel_groups(group_size: int) -> int | None:
    """The largest group size of the kernels that divides a stored one: its groups can share a scale. None: none does.

    A checkpoint with one scale a row has groups of all input channels.
    """
    return next((size for size in GROUP_SIZES if group_size % size == 0), None)


def storable_scales(path: str, weight: StoredWeight) -> tuple[torch.Tensor, bool]:
    """Scales as float16, and whether any had to be rounded.

    The scale of a group whose codes are all zero does not matter; it is made the smallest normal float16 where it is
    below that.

    Raises:
        UserError: A code is not INT4, or a scale is no number, does not fit float16, or vanishes in it.
    """
    low, high = (int(value) for value in torch.aminmax(weight.codes))
    if low < INT4_MIN or high > INT4_MAX:
        cause = f"its codes lie in [{low}, {high}], not in [{INT4_MIN}, {INT4_MAX}]"
        raise UserError(f"layer {path}", cause, "the checkpoint is damaged, or not INT4")
    wide = weight.scales.to(torch.float32)
    half = wide.to(torch.float16)
    if not torch.isfinite(half).all():
        cause = f"a group scale is {wide[~torch.isfinite(half)][0].item():g}, which float16 cannot hold"
        raise UserError(f"layer {path}", cause, "the checkpoint is damaged, or its weights are too large")
    used = (weight.codes != 0).reshape(*half.shape, -1).any(dim=-1)
    if (used & (half == 0)).any():
        cause = f"a group scale is {wide[used & (half == 0)][0].item():g}, which is zero in float16"
        raise UserError(f"layer {path}", cause, "quantize the original model")
    rounded = bool((used & (half.to(torch.float32) != wide)).any())
    small = ~used & (half.abs() < _SMALLEST_SCALE)
    return torch.where(small, torch.full_like(half, _SMALLEST_SCALE), half), rounded
