"""Names for the nodes a pass inserts: unique, and readable as `<torch path>/<OpType>`."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

__all__ = ["UniqueNames"]


class UniqueNames:
    """Hands out node names that no node of the graph has, nor one of a branch or loop body."""

    def __init__(self, model: ir.Model) -> None:
        self._taken = {node.name for node in ir.traversal.RecursiveGraphIterator(model.graph)}

    def name_nodes(self, nodes: Iterable[ir.Node], owner: str) -> None:
        """Name nodes `<owner>/<OpType>`, `<owner>/<OpType>_1`, ..., and their outputs after them."""
        for node in nodes:
            base = name = f"{owner}/{node.op_type}"
            count = 0
            while name in self._taken:
                count += 1
                name = f"{base}_{count}"
            self._taken.add(name)
            node.name = name
            for output in node.outputs:
                if not output.is_graph_output():
                    output.name = f"{name}.output"
