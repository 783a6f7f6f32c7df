"""`monitor.json`: how far what production saw lies from what calibration saw."""

from __future__ import annotations

import math
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from fptq_export.range_outputs import RangeRow

__all__ = ["MONITOR_SCHEMA_VERSION", "Finding", "MonitorReport", "RowFigures", "figures_of_row"]

MONITOR_SCHEMA_VERSION: Final = 1
Finding = Literal["saturates", "drifted", "not_finite"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class RowFigures(_Model):
    """One static quantization, over all calls."""

    layers: dict[str, str]
    """Path -> what it runs, from the policy."""
    expert: str | None
    """Set for experts, which are not judged: the graph runs each on every token and drops what chose another."""
    range: PositiveFloat
    """Magnitude that the scale covers, 127 scale."""
    calibrated_absmax: float | None
    """Largest magnitude in calibration; null where the policy carries no measurement."""
    absmax: float
    """Largest magnitude seen; infinite where a value was infinite or NaN."""
    drift: float | None
    """`absmax` over `calibrated_absmax`; null where that is null or 0."""
    saturation_rate: float
    """Share of all values that were clipped."""
    worst_call: float
    """The same share of the call with the most."""
    values: PositiveFloat
    """How many values were quantized."""
    findings: tuple[Finding, ...]
    """`saturates`: the rate is above `max_saturation`; `drifted`: the drift is above `max_drift`; `not_finite`: a value
    was infinite or NaN."""


class MonitorReport(_Model):
    """`monitor.json`."""

    schema_version: Literal[1] = MONITOR_SCHEMA_VERSION
    tool_version: str
    command: str
    model: str
    files: dict[str, str]
    """SHA-256 of each file of values."""
    calls: PositiveInt
    max_saturation: float
    max_drift: float
    rows: tuple[RowFigures, ...]
    """In the order of the output."""
    hints: tuple[str, ...]
    """What to do about the findings; empty where there are none."""


def figures_of_row(
    row: RangeRow,
    runs: dict[str, str],
    figures: tuple[float, float, float, float],
    max_saturation: float,
    max_drift: float,
) -> RowFigures:
    """Judge a row.

    Args:
        row: What it is.
        runs: Path -> what the layer runs.
        figures: Saturation rate, worst rate of a call, largest |x| over the range, number of values.
        max_saturation: Largest rate without a finding.
        max_drift: Largest drift without a finding.
    """
    rate, worst, peak, values = figures
    absmax = peak * row.range
    drift = absmax / row.calibrated_absmax if row.calibrated_absmax else None
    findings: list[Finding] = []
    if row.expert is None:
        findings += ["saturates"] if rate > max_saturation else []
        findings += ["drifted"] if drift is not None and drift > max_drift else []
        findings += ["not_finite"] if math.isinf(peak) else []
    return RowFigures(
        layers=runs,
        expert=row.expert,
        range=row.range,
        calibrated_absmax=row.calibrated_absmax,
        absmax=absmax,
        drift=drift,
        saturation_rate=rate,
        worst_call=worst,
        values=values,
        findings=tuple(findings),
    )
