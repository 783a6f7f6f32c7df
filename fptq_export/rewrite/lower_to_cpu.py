"""Lower the portable graph for the CPU kernels, which ONNX Runtime runs as operators of its own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from fptq_export.rewrite.functions import DOMAIN, W4A8_PER_TOKEN, W4A8_STATIC
from fptq_export.rewrite.matching import has_shape, producer, replace_node, sizes

__all__ = ["CPU_DOMAIN", "HALF_LINEAR", "LowerToCpu"]

CPU_DOMAIN = "fptq.cpu"
"""ONNX domain of the operators in plugins/cpu/ort_ops.cpp."""
HALF_LINEAR = "FptqHalfLinear"
_MOST_WEIGHTS = 3
"""Weights that one node multiplies with the same activation: those of q, k and v."""


class LowerToCpu(ir.passes.InPlacePass):
    """W4A8 linears and the head become the operators of `plugins/cpu/ort_ops.cpp`.

    Rules:
        1. `fptq::FptqW4A8Gemm*(x, codes, scales[, x_scale])` becomes the node of the same name in domain `fptq.cpu`,
           with the inputs x[, x_scale], codes, scales.
        2. Up to three such nodes that read the same x with the same operator, activation scale, group size and number
           of input channels become one with as many weights and outputs, so that x is quantized once. It stands where
           the first of them stood.
        3. Group scales in FLOAT, which a graph in FLOAT has, go back to the FLOAT16 that they were widened from.
        4. The head, a `MatMul` of one token a sequence and a constant in FLOAT16 that is [in, out] or the `Transpose`
           of [out, in], becomes `FptqHalfLinear(x, w)`, which widens the weight where it reads it. Other float linears
           stay: with many tokens, widening pays once for all.
        5. Left alone, with a reason in `left_alone`: weights, scales or activation scales that are no constants, or of
           other types.

    The operators compute in FLOAT: `WidenToFloat` widens what lies between them.

    Attributes:
        lowered: Torch path, or the name of a weight -> operator.
        left_alone: Torch path -> why it stays as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lowered: dict[str, str] = {}
        self.left_alone: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every linear that the kernels can run."""
        self.lowered, self.left_alone = {}, {}
        groups: dict[Hashable, list[ir.Node]] = {}
        for node in list(model.graph):
            if node.domain == DOMAIN and node.op_type in (W4A8_STATIC, W4A8_PER_TOKEN):
                if reason := _obstacle(node):
                    self.left_alone[_path(node)] = reason
                else:
                    groups.setdefault(_key(node), []).append(node)
            elif (weight := _half_weight(node)) is not None:
                turned = {"inputs_first": int(weight is node.inputs[1])}
                half = ir.node(HALF_LINEAR, [node.inputs[0], weight], turned, domain=CPU_DOMAIN, name=node.name)
                replace_node(model, node, half)
                self.lowered[weight.name or ""] = HALF_LINEAR
        for group in groups.values():
            for nodes in (group[i : i + _MOST_WEIGHTS] for i in range(0, len(group), _MOST_WEIGHTS)):
                _lower(model, nodes)
                self.lowered |= {_path(node): node.op_type for node in nodes}
        if self.lowered:
            model.graph.opset_imports[CPU_DOMAIN] = 1
            common.RemoveUnusedFunctionsPass()(model)
            if not model.functions:
                model.graph.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, modified=bool(self.lowered))


def _path(node: ir.Node) -> str:
    return (node.name or "").rpartition("/")[0]


def _obstacle(node: ir.Node) -> str:
    """Why the kernels cannot run a W4A8 node; empty where they can."""
    codes, scales, x_scale = (*node.inputs, None)[1:4]
    tensor = codes.const_value if codes is not None else None
    if tensor is None or tensor.dtype != ir.DataType.INT4 or len(tensor.shape) != 2:
        return "its weight is not an INT4 constant [in, out]"
    tensor = scales.const_value if scales is not None else None
    if tensor is None or tensor.dtype not in (ir.DataType.FLOAT16, ir.DataType.FLOAT) or len(tensor.shape) != 2:
        return "its scales are not FLOAT16 or FLOAT constants [groups, out]"
    tensor = x_scale.const_value if x_scale is not None else None
    if node.op_type == W4A8_STATIC and (tensor is None or tensor.size != 1 or tensor.dtype != ir.DataType.FLOAT):
        return "its activation scale is not one FLOAT constant"
    return ""


def _key(node: ir.Node) -> Hashable:
    """Equal for linears that one node can compute."""
    x, codes, _, x_scale = (*node.inputs, None)[:4]
    scale = x_scale.const_value if x_scale is not None else None
    return (
        x,
        node.op_type,
        None if scale is None else scale.tobytes(),
        node.attributes.get_int("group_size", 0),
        None if codes is None else sizes(codes, 2)[0],
    )


def _lower(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    """Rule 2."""
    first = nodes[0]
    weights = [value for node in nodes for value in (node.inputs[1], _half_scales(model, node))]
    lowered = ir.Node(
        CPU_DOMAIN,
        first.op_type,
        [first.inputs[0], *first.inputs[3:], *weights],
        [first.attributes["group_size"]],
        num_outputs=len(nodes),
        name=first.name,
    )
    model.graph.insert_before(first, lowered)
    for node, after in zip(nodes, lowered.outputs, strict=True):
        before = node.outputs[0]
        after.name, after.type, after.shape = before.name, before.type, before.shape
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _half_scales(model: ir.Model, node: ir.Node) -> ir.Value:
    """Rule 3."""
    scales = node.inputs[2]
    assert scales is not None  # _obstacle
    assert scales.const_value is not None
    if scales.dtype == ir.DataType.FLOAT16:
        return scales
    name = f"{scales.name}.half"
    if name not in model.graph.initializers:
        tensor = ir.tensor(scales.const_value.numpy().astype(np.float16), name=name)
        value = ir.Value(name=name, shape=scales.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def _half_weight(node: ir.Node) -> ir.Value | None:
    """The weight of rule 4."""
    if node.op_type != "MatMul" or node.domain or not has_shape(node.inputs[0], None, 1, None):
        return None
    turned, weight = producer(node.inputs[1], "Transpose"), node.inputs[1]
    if turned is not None:
        weight = turned.inputs[0] if tuple(turned.attributes.get_ints("perm", (1, 0))) == (1, 0) else None
    fits = weight is not None and weight.is_initializer() and weight.dtype == ir.DataType.FLOAT16
    return weight if fits and None not in sizes(weight, 2) else None
