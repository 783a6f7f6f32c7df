"""Decode times that somebody measured, in place of the modelled ones: `--cost-table`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from fptq_export.files import read_json_model
from fptq_export.policy import Activation, Precision

__all__ = ["CostEntry", "CostTable", "read_cost_table"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CostEntry(_Model):
    """One measured time."""

    precision: Precision
    activation: Activation | None = None
    group_size: PositiveInt | None = None
    in_features: PositiveInt
    out_features: PositiveInt
    microseconds: PositiveFloat


class CostTable(_Model):
    """`--cost-table`: times measured for one token."""

    schema_version: Literal[1] = 1
    device: str
    entries: tuple[CostEntry, ...]


def read_cost_table(path: Path) -> CostTable:
    """Read a table. Raises UserErrors naming every field that is wrong."""
    return read_json_model(path, CostTable)
