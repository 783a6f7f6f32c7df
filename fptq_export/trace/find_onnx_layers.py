"""The linears and convolutions of a prepared graph, found by their operators and constant weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, cast

import onnx_ir as ir

from fptq_export.sites import Convolution, UnmatchedLinear
from fptq_export.trace.find_linears import LinearNode, linear_or_reason
from fptq_export.trace.layer_names import LayerNames

__all__ = ["OnnxLayers", "find_onnx_layers"]

_PRODUCTS = ("MatMul", "Gemm")
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_KEEPS = "keeps the float precision"


@dataclass
class OnnxLayers:
    """What a graph has that could be quantized; names of nodes are those of the graph."""

    linears: dict[str, LinearNode] = field(default_factory=dict)
    unmatched: list[UnmatchedLinear] = field(default_factory=list)
    convolutions: list[tuple[ir.Node, Convolution]] = field(default_factory=list)


def find_onnx_layers(model: ir.Model) -> OnnxLayers:
    """Find every layer with a weight, and say of those that cannot be quantized why.

    Rules:
        1. A MatMul with a constant matrix on the right is a linear; the weight may be transposed where it is read.
        2. A MatMul or Gemm with another constant operand of two or more dimensions, one inside a subgraph, and one of
           another type than FLOAT, FLOAT16 and BFLOAT16 is a linear that stays float.
        3. A MatMul of two computed tensors is none: it has no weight.
        4. A Conv or ConvTranspose is a convolution. It stays float inside a subgraph, with a computed weight, and where
           one scale for each output channel cannot be written as a DequantizeLinear (a ConvTranspose in groups).
    """
    found, names = OnnxLayers(), LayerNames()
    for node, owner in _nodes(model.graph):
        if node.domain:
            continue
        reason = None
        if owner is not None:
            reason = f"inside {owner.op_type} node {owner.name!r}, which runs it as the data says: {_KEEPS}"
        if node.op_type in _PRODUCTS:
            _add_product(found, names, node, reason)
        elif node.op_type in _CONVOLUTIONS:
            found.convolutions.append((node, _convolution(names, node, reason)))
    return found


def _nodes(graph: ir.Graph, owner: ir.Node | None = None) -> Iterator[tuple[ir.Node, ir.Node | None]]:
    """Every node, and the outermost If, Loop or Scan that it is inside of."""
    for node in graph:
        yield node, owner
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _nodes(attribute.as_graph(), owner or node)


def _add_product(found: OnnxLayers, names: LayerNames, node: ir.Node, reason: str | None) -> None:
    left, right = (_constant(value) for value in node.inputs[:2])
    weight = right if right is not None else left
    if weight is None or weight.shape is None or len(weight.shape) < 2:
        return
    path = names.path(node, weight)
    in_features, out_features = _features(node, weight, right is not None)
    if reason is None:
        reason = _product_reason(node, weight, right is not None)
    linear = reason or linear_or_reason(path, node, in_features, out_features)
    if isinstance(linear, str):
        unmatched = UnmatchedLinear(path=path, in_features=in_features, out_features=out_features, reason=linear)
        found.unmatched.append(unmatched)
    else:
        found.linears[path] = linear


def _product_reason(node: ir.Node, weight: ir.Value, on_the_right: bool) -> str | None:
    """Why a product with a constant is no linear that can be quantized."""
    if node.op_type == "Gemm":
        return f"a Gemm that scales its operands, transposes x, or has its constant on the left: {_KEEPS}"
    if not on_the_right:
        return f"its weight is the left operand: {_KEEPS}"
    if len(weight.shape or ()) != 2:
        return f"its weight {list(weight.shape or ())} is no matrix: {_KEEPS}"
    return _type_reason(node.inputs[0], weight)


def _type_reason(x: ir.Value | None, weight: ir.Value) -> str | None:
    dtype = x.dtype if x is not None else None
    if dtype is None:
        return f"the type of its input is not known: {_KEEPS}"
    if dtype not in _FLOATS or weight.dtype != dtype:
        return f"it computes in {dtype}, not in FLOAT, FLOAT16 or BFLOAT16: {_KEEPS}"
    return None


def _constant(value: ir.Value | None) -> ir.Value | None:
    """The initializer that an operand is, transposed or not."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Transpose":
        value = node.inputs[0]
    return value if value is not None and value.is_initializer() else None


def _features(node: ir.Node, weight: ir.Value, on_the_right: bool) -> tuple[int, int]:
    """(in, out) of the matrix, however it is stored."""
    operand = node.inputs[1 if on_the_right else 0]
    rows, columns = (int(size) for size in weight.shape.numpy()[-2:]) if weight.shape is not None else (1, 1)
    transposed = operand is not weight
    flips = node.attributes.get_int("transB" if on_the_right else "transA", 0) if node.op_type == "Gemm" else 0
    if transposed != bool(flips):
        rows, columns = columns, rows
    return (rows, columns) if on_the_right else (columns, rows)


def _convolution(names: LayerNames, node: ir.Node, reason: str | None) -> Convolution:
    x, weight = node.inputs[:2]
    if x is None or weight is None:
        raise RuntimeError(f"{node.op_type} {node.name!r} lacks an input")
    return Convolution(
        path=names.path(node, weight if weight.is_initializer() else None),
        node=node.name or "",
        op_type=cast(Literal["Conv", "ConvTranspose"], node.op_type),
        weight=weight.name or "",
        weight_shape=tuple(_sizes(weight)),
        input=x.name or "",
        float_reason=reason or _convolution_reason(node, x, weight),
    )


def _convolution_reason(node: ir.Node, x: ir.Value, weight: ir.Value) -> str | None:
    if not weight.is_initializer():
        return f"its weight is computed in the graph: {_KEEPS}"
    groups = node.attributes.get_int("group", 1)
    if node.op_type == "ConvTranspose" and groups != 1:
        return f"a ConvTranspose in {groups} groups has no axis of output channels in its weight: {_KEEPS}"
    return _type_reason(x, weight)


def _sizes(value: ir.Value) -> Iterator[int]:
    """Its dimensions, nothing unless all are known."""
    dims = list(value.shape) if value.shape is not None else []
    if all(isinstance(dim, int) for dim in dims):
        yield from (int(dim) for dim in dims if isinstance(dim, int))
