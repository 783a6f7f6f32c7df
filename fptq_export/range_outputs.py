"""`range_outputs.json`: which row of the graph's output `range_monitor` is which static layer.

The rewrite that adds the output writes it; whatever collects the output in production, and `fptq-export monitor`, read
it. The graph carries the same text in its metadata under `METADATA_KEY`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator

from fptq_export.files import read_json_model
from fptq_export.numerics import INT8_MAX

__all__ = ["COLUMNS", "METADATA_KEY", "OUTPUT_NAME", "RangeOutputs", "RangeRow", "name_of_layers", "read_range_outputs"]

OUTPUT_NAME: Final = "range_monitor"
"""FLOAT [rows, 3], one row for each static quantization of the graph; columns are `COLUMNS`."""
METADATA_KEY: Final = "fptq.range_outputs"
COLUMNS = ("saturation_rate", "peak_over_range", "values")
"""Of one call, over every value that is quantized:

* `saturation_rate`: share whose x / scale rounds to no INT8 number, so that it is clipped; NaN counts;
* `peak_over_range`: largest |x| over 127 scale;
* `values`: how many there are, the weight of the other two where calls are pooled.
"""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RangeRow(_Model):
    """One static quantization: a tensor, its scale, and the layers that read it so."""

    layers: tuple[str, ...] = Field(min_length=1)
    """Paths, in the order of the graph; q, k and v share a row where they share a scale."""
    scale: PositiveFloat
    calibrated_absmax: NonNegativeFloat | None
    """Largest magnitude of the (equalized) tensor in calibration; null where the policy carries no measurement."""
    expert: str | None = None
    """Path of the expert the layers belong to. The graph runs it on every token, and calibration on its own only."""

    @property
    def range(self) -> float:
        """The magnitude from which on positive values are clipped, give or take half a step."""
        return INT8_MAX * self.scale


class RangeOutputs(_Model):
    """`range_outputs.json`."""

    schema_version: Literal[1] = 1
    output: Literal["range_monitor"] = OUTPUT_NAME
    columns: tuple[str, ...] = COLUMNS
    rows: tuple[RangeRow, ...] = Field(min_length=1)
    """In the order of the output's first axis."""

    @model_validator(mode="after")
    def _has_our_columns(self) -> RangeOutputs:
        if self.columns != COLUMNS:
            raise ValueError(f"columns are {list(self.columns)}, not {list(COLUMNS)}")
        return self


def name_of_layers(layers: Sequence[str]) -> str:
    """What people are shown of a row's layers: `a.q_proj`, `a.k_proj` -> `a.q_proj, k_proj`."""
    parent = layers[0].rpartition(".")[0]
    return ", ".join((layers[0], *(path.removeprefix(f"{parent}.") for path in layers[1:])))


def read_range_outputs(path: Path) -> RangeOutputs:
    """Read `range_outputs.json`. Raises UserErrors naming every field that is wrong."""
    return read_json_model(path, RangeOutputs)
