"""Fuse each quantized linear of the Q/DQ form into one node of domain `fptq`."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common

from fptq_export.rewrite.functions import (
    DOMAIN,
    ELEMENT_TYPES,
    PER_TOKEN_QDQ,
    PLUGIN_ATTRIBUTES,
    W4A8_PER_TOKEN,
    W4A8_STATIC,
    register_function,
    scale_type,
    w4a8_function,
)

__all__ = ["FuseW4A8Linears"]


@dataclass(frozen=True)
class _Weight:
    """INT4 codes [in, out], scales [in/group_size, out]."""

    codes: ir.Value
    scales: ir.Value
    group_size: int


@dataclass(frozen=True)
class _Match:
    """A quantized linear of the Q/DQ form; `x_scale` is None where each token has its own."""

    dtype: ir.DataType
    x: ir.Value
    weight: _Weight
    x_scale: ir.Value | None

    @property
    def op_type(self) -> str:
        """Operator of the fused node."""
        return W4A8_PER_TOKEN if self.x_scale is None else W4A8_STATIC

    @property
    def inputs(self) -> list[ir.Value]:
        """Inputs of the fused node."""
        scale = [] if self.x_scale is None else [self.x_scale]
        return [self.x, self.weight.codes, self.weight.scales, *scale]


class FuseW4A8Linears(ir.passes.InPlacePass):
    """`MatMul(QDQ(x), DQ(codes))` becomes `fptq::FptqW4A8Gemm{Static,PerToken}(x, codes, scales[, x_scale])`.

    Rules, for a graph of type T:
        1. The right operand is `[Cast](DequantizeLinear(codes, scales, axis=0, block_size))` of INT4 and FLOAT16
           initializers (FLOAT scales where T is FLOAT), with zero points 0 or none.
        2. The left operand is `[Cast](DequantizeLinear(QuantizeLinear([Cast](x), s, z), s, z))` with a scalar FLOAT
           constant s and an INT8 z = 0 (static), or `FptqQuantizeDequantizePerToken(x)`. x is of type T.
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
    register_function(model, w4a8_function(match.op_type, match.dtype))
    owner = (node.name or "").removesuffix("/MatMul")
    attributes = [ir.AttrString(name, value) for name, value in PLUGIN_ATTRIBUTES.items()]
    attributes.append(ir.AttrInt64("group_size", match.weight.group_size))
    fused = ir.Node(DOMAIN, match.op_type, match.inputs, attributes, name=f"{owner}/{match.op_type}")
    output, replacement = node.outputs[0], fused.outputs[0]
    replacement.name, replacement.dtype, replacement.shape = output.name, match.dtype, output.shape
    model.graph.insert_before(node, fused)
    ir.convenience.replace_all_uses_with(output, replacement, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _match(node: ir.Node) -> _Match | None:
    if node.op_type != "MatMul" or node.domain:
        return None
    left, right = node.inputs
    dtype = left.dtype if left is not None else None
    weight = _weight(right)
    if left is None or dtype not in ELEMENT_TYPES or weight is None or weight.scales.dtype != scale_type(dtype):
        return None
    producer = left.producer()
    if producer is not None and producer.domain == DOMAIN and producer.op_type == PER_TOKEN_QDQ:
        x, x_scale = producer.inputs[0], None
    else:
        x, x_scale = _static_activation(left)
        if x_scale is None:
            return None
    return None if x is None or x.dtype != dtype else _Match(dtype, x, weight, x_scale)


def _weight(value: ir.Value | None) -> _Weight | None:
    node = _before_cast(value)
    if node is None or node.op_type != "DequantizeLinear" or node.attributes.get_int("axis", 1) != 0:
        return None
    codes, scales, zero_point = (*node.inputs, None)[:3]
    group_size = node.attributes.get_int("block_size", 0)
    if codes is None or not codes.is_initializer() or codes.dtype != ir.DataType.INT4 or not group_size:
        return None
    if scales is None or not scales.is_initializer() or not (zero_point is None or _is_zero(zero_point)):
        return None
    return _Weight(codes, scales, group_size)


def _static_activation(value: ir.Value) -> tuple[ir.Value | None, ir.Value | None]:
    """(x, scale) where `value` is x quantized to INT8 and back with one constant scale, else (None, None)."""
    dequantize = _before_cast(value)
    codes = dequantize.inputs[0] if dequantize is not None and dequantize.op_type == "DequantizeLinear" else None
    quantize = codes.producer() if codes is not None else None
    if dequantize is None or quantize is None or quantize.op_type != "QuantizeLinear":
        return None, None
    scale = dequantize.inputs[1]
    # Without a zero point the codes are unsigned.
    zero_points = [(*node.inputs, None)[2] for node in (quantize, dequantize)]
    symmetric = all(zero is not None and zero.dtype == ir.DataType.INT8 and _is_zero(zero) for zero in zero_points)
    if scale is None or scale is not quantize.inputs[1] or not symmetric:
        return None, None
    if scale.const_value is None or scale.const_value.size != 1 or scale.dtype != ir.DataType.FLOAT:
        return None, None
    return _before_widening(quantize.inputs[0], value.dtype), scale


def _is_zero(value: ir.Value) -> bool:
    return value.const_value is not None and not value.const_value.numpy().any()


def _before_widening(value: ir.Value | None, dtype: ir.DataType | None) -> ir.Value | None:
    """What is cast to `value`, if that is of type `dtype`; else `value` itself."""
    node = value.producer() if value is not None else None
    source = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    return source if source is not None and source.dtype == dtype else value


def _before_cast(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Cast":
        source = node.inputs[0]
        return source.producer() if source is not None else None
    return node
