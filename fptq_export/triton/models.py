"""What goes into a repository, before anything is written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fptq_export.errors import UserError
from fptq_export.triton.options import TritonOptions
from fptq_export.triton.repository import ModelVersion

__all__ = ["MODEL_FILE", "Models", "model_file", "model_name"]

MODEL_FILE = "model.py"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Models:
    """Versions of models that belong together."""

    versions: tuple[ModelVersion, ...]
    """In the order in which a server may see them: an engine before the text model that calls it."""
    needs: tuple[str, ...]
    """What the server must have, in words."""
    plugin: Path | None = None
    """The plugin library that an engine needs."""
    notes: tuple[str, ...] = ()


def model_name(options: TritonOptions) -> str:
    """What the text model is called.

    Raises:
        UserError: The run directory's name is none that a model can have in an address.
    """
    name = options.name or Path(options.source).resolve().name
    if not _NAME.fullmatch(name):
        raise UserError(str(options.source), f"{name!r} cannot be part of an address", "give the model a --name")
    return name


def model_file(module: str) -> str:
    """`model.py` of a model whose code is in a module of this package."""
    return f'''"""Runs in Triton's Python backend. What it does is in the package fptq_export."""

from {module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
