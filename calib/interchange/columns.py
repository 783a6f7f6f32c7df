"""What GPTQ and AWQ checkpoints have in common: `qweight`, `qzeros` and `scales`, with scales as [groups, out]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import nn

from calib.interchange.source import (
    FLOAT_DTYPES,
    Expected,
    LinearSource,
    StoredWeight,
    check_contiguous_groups,
    check_zero_points,
    tensor_problems,
)
from calib.linears import weight_from_linear
from calib.load import Checkpoint, read_tensor
from fptq_export.errors import Problem, UserErrors
from fptq_export.files import json_path_from_location
from fptq_export.packing import INT4_MIN

__all__ = ["ColumnLayout", "column_sources", "validated"]

ConfigT = TypeVar("ConfigT", bound=BaseModel)
_PACK_FACTOR = 8
_SYMMETRIC = -INT4_MIN
"""Zero point of symmetric codes."""
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class ColumnLayout:
    """How a format packs its tensors."""

    name: str
    packed_along_in: bool
    """Whether `qweight` is [in/8, out]; otherwise [in, out/8]."""
    group_size: int
    """-1: one scale for all input channels."""
    stored_zero: int
    """What `qzeros` holds for the zero point of symmetric codes, which is 8."""
    nibbles_of_weight: Callable[[torch.Tensor], torch.Tensor]
    """`qweight` -> uint8 [out, in]."""
    nibbles_of_zeros: Callable[[torch.Tensor], torch.Tensor]
    """`qzeros` -> uint8 [groups, out]."""


def validated(config_type: type[ConfigT], raw: Mapping[str, Any], checkpoint: Checkpoint) -> ConfigT:
    """Read `quantization_config`.

    Raises:
        UserErrors: Entries describe another format; every one is listed.
    """
    try:
        return config_type.model_validate(raw)
    except ValidationError as error:
        problems = [
            Problem(json_path_from_location(("quantization_config", *item["loc"])), item["msg"])
            for item in error.errors()
        ]
        hint = "only symmetric INT4 in the plain layout can be read: give the original float model"
        raise UserErrors(str(checkpoint.directory / "config.json"), problems, hint) from None


def column_sources(
    checkpoint: Checkpoint, linears: Mapping[str, nn.Module], layout: ColumnLayout
) -> dict[str, LinearSource]:
    """Every linear that has a `qweight`.

    Raises:
        UserErrors: Tensors are missing, or of another dtype or shape; all of them at once.
    """
    problems: list[Problem] = []
    sources = {}
    for path, linear in linears.items():
        if f"{path}.qweight" not in checkpoint.tensors:
            continue
        out_features, in_features = weight_from_linear(linear).shape
        group_size = in_features if layout.group_size == -1 else layout.group_size
        if group_size <= 0 or in_features % group_size or in_features % _PACK_FACTOR or out_features % _PACK_FACTOR:
            cause = f"[{out_features}, {in_features}] does not fit groups of {group_size} and words of {_PACK_FACTOR}"
            problems.append(Problem(f'$["{path}"]', cause))
            continue
        problems += tensor_problems(checkpoint, _expected(path, out_features, in_features, group_size, layout))
        names = (f"{path}.{part}" for part in _PARTS)
        tensors = frozenset(name for name in names if name in checkpoint.tensors)
        sources[path] = LinearSource(path, group_size, tensors, partial(_read, checkpoint, path, group_size, layout))
    if problems:
        raise UserErrors(str(checkpoint.directory), problems, "the checkpoint is damaged: fetch it again")
    return sources


def _expected(
    path: str, out_features: int, in_features: int, group_size: int, layout: ColumnLayout
) -> dict[str, Expected]:
    groups = in_features // group_size
    along_in = (in_features // _PACK_FACTOR, out_features)
    along_out = (in_features, out_features // _PACK_FACTOR)
    return {
        f"{path}.qweight": Expected(("I32",), along_in if layout.packed_along_in else along_out),
        f"{path}.scales": Expected(FLOAT_DTYPES, (groups, out_features)),
        f"{path}.qzeros": Expected(("I32",), (groups, out_features // _PACK_FACTOR), optional=True),
        f"{path}.g_idx": Expected(("I32", "I64"), (in_features,), optional=True),
    }


def _read(checkpoint: Checkpoint, path: str, group_size: int, layout: ColumnLayout) -> StoredWeight:
    def part(name: str) -> torch.Tensor | None:
        full = f"{path}.{name}"
        return read_tensor(checkpoint, full) if full in checkpoint.tensors else None

    check_contiguous_groups(path, part("g_idx"), group_size)
    zeros = part("qzeros")
    if zeros is not None:
        # Reported as zero points, whatever a format stores.
        zero_points = layout.nibbles_of_zeros(zeros) + (_SYMMETRIC - layout.stored_zero)
        check_zero_points(path, zero_points, _SYMMETRIC)
    nibbles = layout.nibbles_of_weight(read_tensor(checkpoint, f"{path}.qweight"))
    scales = read_tensor(checkpoint, f"{path}.scales").T
    return StoredWeight((nibbles.to(torch.int8) + INT4_MIN).contiguous(), scales.contiguous())
