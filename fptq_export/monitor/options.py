"""What the monitor is asked to compare."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["MonitorOptions"]


class MonitorOptions(BaseModel):
    """Options of `fptq-export monitor`, checked; `max_drift` is `--max-drift`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    """Run directory; `range_outputs.json` and `policy.json` are read."""
    values: tuple[Path, ...] = Field(min_length=1)
    """Files with the collected output: `.npz`, `.npy` or `.jsonl`."""
    output: Path | None = None
    """Directory of `monitor.json`; None is the run directory."""
    max_saturation: float = Field(default=0.001, ge=0.0, le=1.0)
    """Share of a layer's values that may be clipped. Text like that of calibration clips a millionth."""
    max_drift: float = Field(default=2.0, gt=0.0, allow_inf_nan=False)
    """Largest |x| that may come, in units of the largest of calibration. Text like that of calibration gives up to 1.8
    on SmolLM2-135M: single values, which do no harm."""
