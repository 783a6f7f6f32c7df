"""Read a GPTQ checkpoint (AutoGPTQ, GPTQModel): symmetric INT4 weights in contiguous groups.

`qweight` int32 [in/8, out] holds code + 8 as nibbles along `in`, the first in the lowest bits. `scales` [groups, out].
`qzeros` int32 [groups, out/8] holds zero points: minus one in format `gptq`, as they are in `gptq_v2`. `g_idx` [in] is
the group of each input channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from torch import nn

from calib.interchange.columns import ColumnLayout, column_sources, validated
from calib.interchange.source import LinearSource, nibbles_from_int32
from calib.load import Checkpoint

__all__ = ["gptq_sources"]

_STORED_ZERO = {"gptq": 7, "gptq_v2": 8}


class _Config(BaseModel):
    """The entries that say how tensors are stored; the others say how they were found."""

    model_config = ConfigDict(frozen=True)

    bits: Literal[4]
    group_size: int = Field(default=128, ge=-1)
    checkpoint_format: Literal["gptq", "gptq_v2"] = Field(
        default="gptq", validation_alias=AliasChoices("checkpoint_format", "format")
    )
    pack_dtype: Literal["int32"] = "int32"
    is_marlin_format: Literal[False] = False
    dynamic: dict[str, Any] | None = Field(default=None, max_length=0)
    """Settings of single layers by regular expression: none is supported."""


def gptq_sources(
    checkpoint: Checkpoint, raw: Mapping[str, Any], linears: Mapping[str, nn.Module]
) -> dict[str, LinearSource]:
    """Find every quantized linear: those with a `qweight`. Arguments and errors as `compressed_tensors_sources`."""
    config = validated(_Config, raw, checkpoint)
    layout = ColumnLayout(
        name="gptq",
        packed_along_in=True,
        group_size=config.group_size,
        stored_zero=_STORED_ZERO[config.checkpoint_format],
        nibbles_of_weight=lambda packed: nibbles_from_int32(packed.T),
        nibbles_of_zeros=nibbles_from_int32,
    )
    return column_sources(checkpoint, linears, layout)
