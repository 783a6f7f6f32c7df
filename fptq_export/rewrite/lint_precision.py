"""Refuse graphs that TensorRT would build into the wrong numbers."""

from __future__ import annotations

import onnx_ir as ir

from fptq_export.errors import PrecisionError

__all__ = ["LintPrecision", "offending_nodes", "origin_of"]

_TRANSPARENT = frozenset({"Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})
"""Operators that TensorRT looks through when it fuses; `Mul` by one is handled apart."""
_WEIGHTED = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})


class LintPrecision(ir.passes.InPlacePass):
    """Changes nothing; raises when one operator multiplies block-quantized weights by INT8 Q/DQ activations.

    TensorRT builds `MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(codes, block))` without a warning into
    one INT8 GEMM over all input channels and multiplies by the group scales afterwards. The group scales differ along
    the summed channels, so the result is wrong (measured on TensorRT-RTX 1.7.1). Casts, reshapes, Identity and Mul by 1
    are optimised away and do not help; `Max(x, lowest)` does.

    Rules:
        1. Offends: a MatMul, Gemm or Conv with a block-INT4 or block-INT8 operand and an operand that comes from
           DequantizeLinear(QuantizeLinear), both through nothing but operators that TensorRT looks through.
        2. Fine: only one of the two; a barrier between activation and MatMul; a per-channel or per-tensor weight, which
           is what `w8a8` linears have: their scales do not differ along the summed channels.

    Raises:
        PrecisionError: Names every offending node.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Check every weighted operator of the graph."""
        offenders = offending_nodes(model)
        if offenders:
            listed = "\n  ".join(offenders)
            raise PrecisionError(
                f"{len(offenders)} operators multiply block-quantized weights by INT8 Q/DQ activations:\n  {listed}\n"
                "TensorRT fuses these into one INT8 GEMM and applies the group scales after the sum, which is wrong.\n"
                "  -> build engines from model.w4a8.onnx (this tool lowers it safely), not from the Q/DQ file"
            )
        return ir.passes.PassResult(model, modified=False)


def offending_nodes(model: ir.Model) -> list[str]:
    """Names of the operators that rule 1 of `LintPrecision` is about, in the order of the graph."""
    return [node.name or "?" for node in model.graph.all_nodes() if _offends(node)]


def _offends(node: ir.Node) -> bool:
    if node.op_type not in _WEIGHTED or node.domain or len(node.inputs) < 2:
        return False
    origins = [origin_of(value) for value in node.inputs[:2]]
    return any(_is_block_quantized(origin) for origin in origins) and any(_is_int8_qdq(origin) for origin in origins)


def origin_of(value: ir.Value | None) -> ir.Node | None:
    """The node a value comes from, past everything that TensorRT looks through."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in _TRANSPARENT:
            value = node.inputs[0]
        elif node.op_type == "Mul" and (factor := _unit_factor(node)) is not None:
            value = factor
        else:
            return node
    return None


def _unit_factor(node: ir.Node) -> ir.Value | None:
    """The other operand of a multiplication by a constant 1."""
    for one, other in (node.inputs, reversed(node.inputs)):
        tensor = ir.convenience.get_const_tensor(one) if one is not None else None
        if tensor is not None and tensor.size == 1 and float(tensor.numpy().reshape(())) == 1.0:
            return other
    return None


def _is_block_quantized(node: ir.Node | None) -> bool:
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return False
    scale = node.inputs[1]
    blocked = scale is not None and scale.shape is not None and len(scale.shape) > 1
    return node.inputs[0].dtype in (ir.DataType.INT4, ir.DataType.INT8) and blocked


def _is_int8_qdq(node: ir.Node | None) -> bool:
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return False
    producer = node.inputs[0].producer()
    return producer is not None and producer.op_type == "QuantizeLinear"
