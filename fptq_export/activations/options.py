"""What `fptq-export stats` is asked to do."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

__all__ = ["StatsOptions"]


class StatsOptions(BaseModel):
    """Options, checked; `calib_size` is `--calib-size`. None takes the run's value where the source is a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """A run directory, or a model: Hugging Face directory, hub id or `.gguf` file."""
    output: Path | None = None
    """Where the files go; None is the run directory, or `NAME-stats`."""
    calib_dataset: str | None = None
    """As in `RunOptions`."""
    calib_size: PositiveInt | None = None
    """Windows of calibration text."""
    calib_seq: int | None = Field(default=None, ge=2)
    """Tokens a window."""
    parts: int = Field(default=4, ge=2, le=64)
    """Parts that calibration is split into, to see whether ranges still grow."""
    text: str = "builtin"
    """Held-out text."""
    eval_windows: PositiveInt = 16
    """Windows of it, from its beginning."""
    eval_seq: int = Field(default=512, ge=2)
    """Tokens a window."""
    layer: str | None = None
    """Regular expression: layers that are shown one by one."""
    max_range_ratio: float = Field(default=1.2, ge=1.0)
    """Warn where a held-out input is larger than this many times the calibrated range."""
    plot: bool = True
    """Draw `stats.svg`, where matplotlib is installed."""
    seed: NonNegativeInt = 0
    """Draw of calibration windows; a run's own where the source is a run."""
    trust_remote_code: bool = False
