"""Fuse each quantized linear of the Q/DQ form into one node of domain `fptq`."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common

from fptq_export.rewrite.functions import (
    DOMAIN,
    PER_TOKEN_QDQ,
    PLUGIN_ATTRIBUTES,
    W4A8_PER_TOKEN,
    W4A8_STATIC,
    register_function,
    w4a8_function,
)

__all__ = ["FuseW4A8Linears"]


@dataclass(frozen=True)
class _Match:
    """A quantized linear of the Q/DQ form."""

    op_type: str
    x: ir.Value
    codes: ir.Value
    scales: ir.Value
    x_scale: ir.Value | None
    group_size: int

    @property
    def inputs(self) -> list[ir.Value]:
        """Inputs of the fused node."""
        return [self.x, self.codes, self.scales, *([self.x_scale] if self.x_scale is not None else [])]


class FuseW4A8Linears(ir.passes.InPlacePass):
    """`MatMul(QDQ(x), DQ(codes))` becomes `fptq::FptqW4A8Gemm{Static,PerToken}(x, codes, scales[, x_scale])`.

    Rules:
        1. The right operand is `[Cast](DequantizeLinear(codes, scales, axis=0, block_size))` of INT4 initializers.
        2. The left operand is `[Cast](DequantizeLinear(QuantizeLinear([Cast](x), s, z), s, z))` with a scalar constant s
           and z = 0 (static), or `FptqQuantizeDequantizePerToken(x)`.
        3. A MatMul that matches only one of the two is left alone: it is not a W4A8 linear.
        4. The bias Add stays: it is rounded in the graph's type with or without the plugin.

    Equal outputs: the function body of the node holds the nodes it replaces.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every match and drop the Q/DQ nodes that nothing reads any more."""
        fused = 0
        for node in list(model.graph):
            match = _match(node)
            if match is None:
                continue
            _fuse(model, node, match)
            fused += 1
        if fused:
            common.RemoveUnusedNodesPass()(model)
            common.RemoveUnusedFunctionsPass()(model)
        return ir.passes.PassResult(model, modified=fused > 0)


def _fuse(model: ir.Model, node: ir.Node, match: _Match) -> None:
    if match.x.dtype is None:
        raise RuntimeError(f"value {match.x.name!r} has no type")
    register_function(model, w4a8_function(match.op_type, match.x.dtype))
    owner = (node.name or "").removesuffix("/MatMul")
    attributes = [ir.AttrString(name, value) for name, value in PLUGIN_ATTRIBUTES.items()]
    attributes.append(ir.AttrInt64("group_size", match.group_size))
    fused = ir.Node(DOMAIN, match.op_type, match.inputs, attributes, name=f"{owner}/{match.op_type}")
    output, replacement = node.outputs[0], fused.outputs[0]
    replacement.name, replacement.dtype, replacement.shape = output.name, output.dtype, output.shape
    model.graph.insert_before(node, fused)
    ir.convenience.replace_all_uses_with(output, replacement, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _match(node: ir.Node) -> _Match | None:
    if node.op_type != "MatMul" or node.domain:
        return None
    weight = _before_cast(node.inputs[1])
    if weight is None or weight.op_type != "DequantizeLinear" or weight.attributes.get_int("axis", 1) != 0:
        return None
    codes, scales = weight.inputs[:2]
    group_size = weight.attributes.get_int("block_size", 0)
    if codes is None or scales is None or codes.dtype != ir.DataType.INT4 or not codes.is_initializer() or not group_size:
        return None
    left = node.inputs[0]
    producer = left.producer() if left is not None else None
    if producer is not None and producer.domain == DOMAIN and producer.op_type == PER_TOKEN_QDQ:
        x = producer.inputs[0]
        return None if x is None else _Match(W4A8_PER_TOKEN, x, codes, scales, None, group_size)
    return _static_match(left, codes, scales, group_size)


def _static_match(left: ir.Value | None, codes: ir.Value, scales: ir.Value, group_size: int) -> _Match | None:
    dequantize = _before_cast(left)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    quantized, scale, zero_point = (*dequantize.inputs, None)[:3]
    quantize = quantized.producer() if quantized is not None else None
    if quantize is None or quantize.op_type != "QuantizeLinear" or quantize.inputs[1] is not scale:
        return None
    if scale is None or not scale.is_initializer() or scale.const_value is None or scale.const_value.size != 1:
        return None
    if zero_point is not None and (zero_point.const_value is None or zero_point.const_value.numpy().any()):
        return None
    wide = quantize.inputs[0]
    cast = wide.producer() if wide is not None else None
    x = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else wide
    return None if x is None else _Match(W4A8_STATIC, x, codes, scales, scale, group_size)


def _before_cast(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Cast":
        source = node.inputs[0]
        return source.producer() if source is not None else None
    return node
