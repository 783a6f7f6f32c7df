"""A norm or a gate and the linears behind it as one operator of `plugins/cpu/ort_ops.cpp`."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from fptq_export.rewrite.functions import W4A8_PER_TOKEN, W4A8_STATIC
from fptq_export.rewrite.lower_to_cpu import CPU_DOMAIN
from fptq_export.rewrite.matching import only_reader, operand_beside, producer

__all__ = ["SKIP_NORM", "SWI_GLU", "FusePrologue"]

SKIP_NORM = "FptqSkipNorm"
SWI_GLU = "FptqSwiGlu"
"""Before the name of a W4A8 operator: what that operator does first."""
_PREFIX = "Fptq"
_NORM = "SkipSimplifiedLayerNormalization"
_ORT_DOMAIN = "com.microsoft"


class FusePrologue(ir.passes.InPlacePass):
    """Let W4A8 linears compute what they quantize.

    Rules:
        1. A `SkipSimplifiedLayerNormalization` without a bias, whose normalized output one W4A8 node reads and nothing
           else, goes into that node, which gives the sum, too.
        2. `Mul(Mul(gate, Sigmoid(gate)), up)` that one W4A8 node reads and nothing else, with gate and up of the same
           shape, goes into that node.
        3. Left alone: what others read too, a norm or a gate before anything else, gates of another form or order.

    Runs after `LowerToCpu`, `WidenToFloat` and `FuseSkipNorm`: everything is FLOAT.
    """

    fused = 0
    """Nodes that got a prologue in the last call."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse what stands before every W4A8 node."""
        self.fused = 0
        for node in [node for node in model.graph if node.domain == CPU_DOMAIN]:
            if node.op_type in (W4A8_STATIC, W4A8_PER_TOKEN):
                self.fused += _fuse_norm(model, node) or _fuse_gate(model, node)
        return ir.passes.PassResult(model, modified=self.fused > 0)


def _fuse_norm(model: ir.Model, linear: ir.Node) -> bool:
    """Rule 1."""
    x = linear.inputs[0]
    norm = x.producer() if x is not None else None
    if x is None or norm is None or (norm.domain, norm.op_type) != (_ORT_DOMAIN, _NORM) or len(norm.inputs) != 3:
        return False
    normalized, *_, total = norm.outputs
    if normalized is not x or not _is_read_by_one(x):
        return False
    fused = _with_prologue(linear, SKIP_NORM, norm.inputs, [norm.attributes["epsilon"]], outputs=1)
    model.graph.insert_before(norm, fused)  # others may read the sum before the linear
    _take_over(model, [total, *linear.outputs], fused)
    for dead in (linear, norm):
        model.graph.remove(dead, safe=True)
    return True


def _fuse_gate(model: ir.Model, linear: ir.Node) -> bool:
    """Rule 2."""
    x = linear.inputs[0]
    product = producer(x, "Mul")
    silu = _silu_of(product)
    if x is None or product is None or silu is None or not _is_read_by_one(x):
        return False
    inner, curve = silu
    gate, up = curve.inputs[0], operand_beside(product, inner.outputs[0])
    if gate is None or up is None or gate.shape is None or gate.shape != up.shape:
        return False
    fused = _with_prologue(linear, SWI_GLU, (gate, up), [], outputs=0)
    model.graph.insert_before(linear, fused)
    _take_over(model, linear.outputs, fused)
    for dead in (linear, product, inner, curve):
        model.graph.remove(dead, safe=True)
    return True


def _silu_of(product: ir.Node | None) -> tuple[ir.Node, ir.Node] | None:
    """`Mul(gate, Sigmoid(gate))` that goes into a product and nowhere else, and its `Sigmoid`."""
    for value in product.inputs if product is not None else ():
        inner = producer(value, "Mul")
        if value is None or inner is None or only_reader(value, "Mul") is not product:
            continue
        for sigmoid in inner.inputs:
            curve = producer(sigmoid, "Sigmoid")
            if curve is None or sigmoid is None or only_reader(sigmoid, "Mul") is not inner:
                continue
            if operand_beside(inner, sigmoid) is curve.inputs[0]:
                return inner, curve
    return None


def _is_read_by_one(value: ir.Value) -> bool:
    return len(tuple(value.uses())) == 1 and not value.is_graph_output()


def _with_prologue(
    linear: ir.Node, prologue: str, operands: Sequence[ir.Value | None], attributes: Sequence[ir.Attr], *, outputs: int
) -> ir.Node:
    return ir.Node(
        CPU_DOMAIN,
        f"{prologue}{linear.op_type.removeprefix(_PREFIX)}",
        [*operands, *linear.inputs[1:]],
        [*linear.attributes.values(), *attributes],
        num_outputs=outputs + len(linear.outputs),
        name=linear.name,
    )


def _take_over(model: ir.Model, before: Sequence[ir.Value], fused: ir.Node) -> None:
    """Give the outputs of a fused node the names and the readers of those that they replace."""
    for old, new in zip(before, fused.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}.replaced"
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
