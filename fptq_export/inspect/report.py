"""What `inspect` says of a file, as it is printed and as JSON."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

__all__ = ["Cell", "Inspection", "Section"]

Cell: TypeAlias = str | int | float | None


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Section(_Model):
    """One table."""

    name: str
    """For machines: `inputs`, `operators`, `layers`, ..."""
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


class Inspection(_Model):
    """What `fptq-export inspect --json` prints."""

    schema_version: Literal[1] = 1
    path: str
    kind: Literal["engine", "onnx", "policy", "proof", "run"]
    sections: tuple[Section, ...]
    precision_problems: tuple[str, ...] = ()
    """Something runs, or would run, another precision than its policy says."""
    file_problems: tuple[str, ...] = ()
    """Files that are not what was recorded of them."""
