"""What a diagnosis is asked to do."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

__all__ = ["DebugOptions"]


class DebugOptions(BaseModel):
    """Options of `fptq-export debug`, checked; `leave_one_out` is `--no-leave-one-out`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    """A run directory."""
    output: Path | None = None
    """Where `debug.json`, or what is cut out, goes; None is the run directory."""
    text: str = "builtin"
    """`builtin` (held out), a `.txt`, `.jsonl` or `.npz` file, or a data set id."""
    windows: PositiveInt = 1
    """Windows of the text, run as one batch."""
    seq: int = Field(default=128, ge=2)
    """Tokens a window."""
    leave_one_out: bool = True
    """Measure what the model gains with each layer in float."""
    max_excess: PositiveFloat = 6.0
    """How many dB a layer's error may lie above what its rounding predicts."""
    cut: str | None = None
    """Write this layer as a graph of its own, and nothing else."""
