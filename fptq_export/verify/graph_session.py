"""Any graph in ONNX Runtime: arrays in, arrays out, errors in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.verify.sessions import ORT_ERRORS, first_line, session_from_path

__all__ = ["OnnxGraphSession", "session_of_user_graph"]


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


def session_of_user_graph(path: Path) -> OnnxGraphSession:
    """A file as it is; ONNX Runtime wants unique node names, so those that are used twice are taken away in memory.

    Raises:
        UserError: ONNX Runtime cannot open it.
    """
    model = onnx.load(str(path), load_external_data=False)
    counts = Counter(node.name for node in _nodes(model.graph))
    doubled = [node for node in _nodes(model.graph) if node.name and counts[node.name] > 1]
    for node in doubled:
        node.ClearField("name")
    graph = model.SerializeToString() if doubled else None
    del model, doubled  # a file may hold its weights: the session reads them once more
    return OnnxGraphSession(path, graph)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body)
