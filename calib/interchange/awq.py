"""Read an AWQ checkpoint in AutoAWQ's GEMM layout, where its zero points are those of symmetric codes.

`qweight` int32 [in, out/8] holds code + 8 as nibbles along `out`; nibble i of a word, from the lowest bits, belongs to
output 0, 2, 4, 6, 1, 3, 5, 7 of its eight. `qzeros` int32 [groups, out/8] is packed alike. `scales` [groups, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from calib.interchange.columns import ColumnLayout, column_sources, validated
from calib.interchange.source import LinearSource, nibbles_from_int32
from calib.load import Checkpoint

__all__ = ["awq_sources"]

_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


class _Config(BaseModel):
    """The entries that say how tensors are stored."""

    model_config = ConfigDict(frozen=True)

    bits: Literal[4]
    group_size: int = Field(default=128, ge=-1)
    version: Literal["gemm", "GEMM"] = "gemm"


def awq_sources(
    checkpoint: Checkpoint, raw: Mapping[str, Any], linears: Mapping[str, nn.Module]
) -> dict[str, LinearSource]:
    """Find every quantized linear: those with a `qweight`. Arguments and errors as `compressed_tensors_sources`."""
    config = validated(_Config, raw, checkpoint)
    layout = ColumnLayout(
        name="awq",
        packed_along_in=False,
        group_size=config.group_size,
        stored_zero=8,
        nibbles_of_weight=lambda packed: _outputs_in_order(packed).T,
        nibbles_of_zeros=_outputs_in_order,
    )
    return column_sources(checkpoint, linears, layout)


def _outputs_in_order(packed: torch.Tensor) -> torch.Tensor:
    """int32 [rows, out/8] -> uint8 [rows, out]."""
    words = nibbles_from_int32(packed).reshape(*packed.shape, 8)
    return words[..., _NIBBLE_OF_OUTPUT].reshape(packed.shape[0], -1)
