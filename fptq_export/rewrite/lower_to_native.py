"""Lower the portable graph for a TensorRT that has no plugin."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from fptq_export.rewrite.functions import DOMAIN
from fptq_export.rewrite.names import UniqueNames

__all__ = ["LowerToNative"]

_OWNER_KEY = "fptq.linear"


class LowerToNative(ir.passes.InPlacePass):
    """Inline every `fptq` function, merge equal activation quantizations, and give every node a unique name.

    Rules:
        1. Every node of domain `fptq` is replaced by its function body; TensorRT-RTX refuses a function that is called
           twice ("name is already in use").
        2. The nodes of the body are named `<torch path>/<OpType>`: the layer list of the engine is matched by them.
        3. q, k and v quantize the same tensor with the same scale: equal nodes are merged.
        4. A graph without `fptq` nodes is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inline, rename, merge."""
        calls = [node for node in model.graph if node.domain == DOMAIN]
        if not calls:
            return ir.passes.PassResult(model, modified=False)
        for node in calls:
            # The inliner copies the metadata of a call to every node it puts in its place.
            node.metadata_props[_OWNER_KEY] = (node.name or "").rpartition("/")[0]
        common.InlinePass(lambda function: function.domain == DOMAIN)(model)
        _name_inlined(model)
        common.CommonSubexpressionEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
        model.graph.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """No `fptq` node or function is left, and names are unique."""
        names = [node.name for node in model.graph]
        if len(names) != len(set(names)):
            raise ir.passes.PostconditionError("two nodes have the same name")
        if model.functions or any(node.domain == DOMAIN for node in model.graph):
            raise ir.passes.PostconditionError("a function was not inlined")


def _name_inlined(model: ir.Model) -> None:
    names = UniqueNames(model)
    for node in model.graph:
        owner = node.metadata_props.pop(_OWNER_KEY, None)
        if owner is not None:
            names.name_nodes([node], owner)
