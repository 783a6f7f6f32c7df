"""`triton.json`: what was written into a model repository, and what it needs of the server."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from fptq_export.triton.options import Variant

__all__ = ["REPORT_FILE", "TRITON_SCHEMA_VERSION", "ModelEntry", "TritonReport"]

TRITON_SCHEMA_VERSION: Final = 1
REPORT_FILE = "triton.json"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelEntry(_Model):
    """A model that got a version."""

    name: str
    version: PositiveInt
    backend: str
    files: tuple[str, ...]
    """In the version's directory."""


class TritonReport(_Model):
    """`triton.json`: the last command that wrote into the repository."""

    schema_version: Literal[1] = TRITON_SCHEMA_VERSION
    tool_version: str
    command: str
    source: str
    variant: Variant
    models: tuple[ModelEntry, ...]
    needs: tuple[str, ...]
    """What the server must have, in words."""
    notes: tuple[str, ...]
