"""What `fptq-export triton` is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

__all__ = ["TritonOptions", "Variant"]

Variant = Literal["stateless", "stateful", "cpu"]
"""The text model carries the KV cache from call to call; the server keeps it; ONNX Runtime runs the portable graph."""


class TritonOptions(BaseModel):
    """Options, checked. Field names are the option names of the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    """Run directory."""
    repository: Path
    """Model repository; created, or extended by a version."""
    engine: Path | None = None
    """An engine of the run; None takes the last one built."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Of the text model; None takes the name of the run directory."""
    variant: Variant = "stateless"
    version: PositiveInt | None = None
    """None takes the next free one."""
    keep_versions: PositiveInt = 1
    """Newest versions of the text model that the server has loaded."""
    instances: PositiveInt = 1
    """Execution contexts of the engine on each GPU."""
    max_queue_delay: NonNegativeInt = 500
    """Microseconds a call waits for others of the same shape."""
    max_sequences: PositiveInt = 64
    """Sequences whose cache the server keeps at once (`stateful`)."""
    max_sequence_idle: PositiveInt = 60
    """Seconds until the server forgets a sequence that nobody goes on with (`stateful`)."""
    max_active: PositiveInt = 16
    """Texts that are written at once; the others wait."""
    max_queue: PositiveInt = 256
    """Texts that may wait; more are refused."""
    threads: PositiveInt | None = None
    """Of ONNX Runtime inside an operator (`cpu`); None takes every core."""
