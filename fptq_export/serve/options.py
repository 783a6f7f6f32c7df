"""What the server is asked to be."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

__all__ = ["ServeOptions"]


class ServeOptions(BaseModel):
    """Options of `fptq-export serve`, checked; `max_active` is `--max-active`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    """Run directory, engine or ONNX graph; the tokenizer lies beside it."""
    engine: Path | None = None
    """Another engine of the run than the last one built."""
    backend: Literal["auto", "onnxruntime", "tensorrt"] = "auto"
    """`auto` takes the engine where there is one and a GPU."""
    threads: PositiveInt | None = None
    """Of ONNX Runtime; None takes every core."""
    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one, which is then printed."""
    served_model_name: str | None = Field(default=None, min_length=1)
    """What requests call the model; None takes the name of the exported model."""
    api_key_file: Path | None = None
    """One key a line; requests to `/v1` must carry one of them. None asks for none."""
    max_active: PositiveInt = 16
    """Texts that are written at the same time, each with its own cache."""
    max_queue: PositiveInt = 256
    """Texts that wait; more are refused."""
    drain_timeout: PositiveFloat = 25.0
    """Seconds that running texts get after SIGTERM. Kubernetes kills after 30."""
