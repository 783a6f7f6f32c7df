"""Paths for the layers of a graph that knows no torch modules."""

from __future__ import annotations

import re

import onnx_ir as ir

__all__ = ["LayerNames"]

_WEIGHT = ".weight"
_OPERATOR = re.compile(r"[/_.](MatMul|Gemm|Conv|ConvTranspose)(_\d+)?$")
_ODD = re.compile(r"[^\w./:-]+")
"""What would be hard to type in a pattern, or to find in the builder's list of layers."""


class LayerNames:
    """Hands out a path for each layer, no two equal.

    Rules, the first that gives something:
        1. The weight is called `X.weight`, as parameters of torch are: X.
        2. The node's name, without `/` before and `/MatMul` and the like after it.
        3. The name of the output.
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
        return _OPERATOR.sub("", node.name or "") or node.outputs[0].name or ""
