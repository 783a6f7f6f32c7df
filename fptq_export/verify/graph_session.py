"""Any graph in ONNX Runtime: arrays in, arrays out, errors in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.verify.sessions import ORT_ERRORS, first_line, session_from_path

__all__ = ["OnnxGraphSession"]


class OnnxGraphSession:
    """ONNX Runtime (CPU) on a graph.

    Args:
        path: The ONNX file.
        graph: Another graph, serialized, whose weights lie beside the file; None for that of the file.

    Raises:
        UserError: ONNX Runtime cannot open it.
    """

    def __init__(self, path: Path, graph: bytes | None = None) -> None:
        self.name = path.name
        self._path = path
        self._session = session_from_path(path, None, "all", graph)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(value.name for value in self._session.get_outputs())

    def run(self, outputs: Sequence[str], batch: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Arrays of these outputs.

        Raises:
            UserError: ONNX Runtime cannot run the graph on the batch.
        """
        try:
            arrays: list[NDArray[Any]] = self._session.run(list(outputs), dict(batch))
        except ORT_ERRORS as error:
            hint = "check that the program that wrote the data and the one that wrote the graph agree"
            raise UserError(str(self._path), f"ONNX Runtime cannot run it ({first_line(error)})", hint) from error
        return arrays
