"""Another form of a graph for ONNX Runtime, with operators of our own, and what ONNX Runtime raises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from fptq_export.errors import UserError

__all__ = ["ORT_ERRORS", "OrtForm", "first_line", "register_operators"]

# They share no base class but Exception.
ORT_ERRORS = tuple(
    error for error in vars(ort_errors).values() if isinstance(error, type) and issubclass(error, Exception)
)


@dataclass(frozen=True)
class OrtForm:
    """Another form of a graph, which ONNX Runtime runs in its place."""

    graph: bytes
    """Protobuf; weights that are not inside lie beside the graph that it is a form of."""
    operators: Path
    """Library with its custom operators."""


def register_operators(options: Any, library: Path) -> None:
    """Let a session that is made with these options use the operators of a library.

    Raises:
        UserError: ONNX Runtime cannot load it.
    """
    try:
        options.register_custom_ops_library(str(library))
    except ORT_ERRORS as error:
        cause = f"ONNX Runtime cannot load these operators ({first_line(error)})"
        raise UserError(str(library), cause, "build them again: python -m fptq_export.cpu build") from error


def first_line(error: Exception) -> str:
    """What ONNX Runtime says, without its stack."""
    return str(error).strip().partition("\n")[0]
