"""A residual sum and the norm behind it as one operator of ONNX Runtime."""

from __future__ import annotations

import onnx_ir as ir

from fptq_export.rewrite.matching import producer, sizes

__all__ = ["FuseSkipNorm"]

_ORT_DOMAIN = "com.microsoft"
_OPERATOR = "SkipSimplifiedLayerNormalization"


class FuseSkipNorm(ir.passes.InPlacePass):
    """`RMSNormalization(Add(x, y), w)` becomes `SkipSimplifiedLayerNormalization(x, y, w)`, sum included.

    Rules:
        1. x and y have the shape [batch, tokens, channels] of their sum, and w one number a channel; all are FLOAT: the
           operator computes in their type.
        2. Who reads the sum reads the operator's fourth output.
        3. Left alone: a norm of anything else than a sum, and a sum whose norm was fused already.
    """

    fused = 0
    """Norms replaced by the last call."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every norm that matches."""
        self.fused = 0
        for norm in [node for node in model.graph if node.op_type == "RMSNormalization" and not node.domain]:
            add = producer(norm.inputs[0], "Add")
            if add is not None and _fits(add, norm):
                _replace(model, add, norm)
                self.fused += 1
        if self.fused:
            model.graph.opset_imports[_ORT_DOMAIN] = 1
            model.graph.sort()  # a computed weight may stand between the sum and its other readers
        return ir.passes.PassResult(model, modified=self.fused > 0)


def _fits(add: ir.Node, norm: ir.Node) -> bool:
    """Rule 1."""
    total = add.outputs[0]
    if total.is_graph_output() or norm.attributes.get_int("axis", -1) not in (-1, 2):
        return False
    channels = sizes(total, 3)[2]
    shapes = [value.shape if value is not None else None for value in add.inputs]
    same = channels is not None and all(shape is not None and shape == total.shape for shape in shapes)
    return same and all(value is not None and value.dtype == ir.DataType.FLOAT for value in (*add.inputs, *norm.inputs))


def _replace(model: ir.Model, add: ir.Node, norm: ir.Node) -> None:
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    fused = ir.Node(
        _ORT_DOMAIN,
        _OPERATOR,
        [*add.inputs, norm.inputs[1]],
        [ir.AttrFloat32("epsilon", epsilon)],
        num_outputs=4,
        name=norm.name,
    )
    normalized, mean, deviation, total = fused.outputs
    mean.name = deviation.name = ""  # outputs that are not there
    model.graph.insert_before(norm, fused)
    for before, after in ((norm.outputs[0], normalized), (add.outputs[0], total)):
        after.name, after.type, after.shape = before.name, before.type, before.shape
        before.name = f"{before.name}.replaced"
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    for dead in (norm, add):
        model.graph.remove(dead, safe=True)
