"""Paths for the layers of a graph that knows no torch modules."""

from __future__ import annotations

import re

import onnx_ir as ir

from fptq_export.trace.find_linears import module_path

__all__ = ["LayerNames", "name_after_modules"]

_WEIGHT = ".weight"
_WEIGHTED = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_OPERATOR = re.compile(rf"(/({'|'.join(_WEIGHTED)})(_\d+)?)+$")
_ODD = re.compile(r"[^\w./:-]+")
"""What would be hard to type in a pattern, or to find in the builder's list of layers."""


def name_after_modules(model: ir.Model) -> None:
    """Name products and convolutions `<torch path>/<operator>` where the exporter's metadata has the path, in place."""
    for node in model.graph:
        if node.op_type in _WEIGHTED and not node.domain and (path := module_path(node)):
            node.name = f"{path}/{node.op_type}"


class LayerNames:
    """Hands out a path for each layer, no two equal.

    Rules, the first that gives something:
        1. The weight is called `X.weight`, as parameters of torch are: X.
        2. The node's name, without `/` before and `/MatMul` and the like after it.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def path(self, node: ir.Node, weight: ir.Value | None) -> str:
        """The path of a layer."""
        base = path = _ODD.sub("_", self._wish(node, weight)).strip("_/") or node.op_type
        count = 0
        while path in self._taken:
            count += 1
            path = f"{base}_{count}"
        self._taken.add(path)
        return path

    @staticmethod
    def _wish(node: ir.Node, weight: ir.Value | None) -> str:
        parameter = weight.name or "" if weight is not None else ""
        if parameter.endswith(_WEIGHT):
            return parameter.removesuffix(_WEIGHT)
        return _OPERATOR.sub("", node.name or "")
