"""The quantized linears of a graph: where each reads and writes, and the numbers it multiplies by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.policy import LayerPolicy, Policy
from fptq_export.rewrite.functions import DOMAIN

__all__ = ["GraphLinear", "GraphWeight", "linears_of_graph"]

_HINT = "fptq-export rewrite DIR makes the graph anew"


@dataclass(frozen=True)
class GraphWeight:
    """A quantized weight as the graph holds it."""

    codes: NDArray[np.int8]
    """[in, out]."""
    scales: NDArray[np.float32]
    """[groups, out]; one group where INT8 codes have a scale an output channel."""

    def dequantized(self, codes: NDArray[np.int8] | None = None, shift: int = 0) -> NDArray[np.float32]:
        """Float32 [in, out]: other codes in place of its own, or the scales of a group `shift` before it."""
        numbers = (self.codes if codes is None else codes).astype(np.float32)
        scales = np.roll(self.scales, shift, axis=0) if shift else self.scales
        grouped = numbers.reshape(len(scales), -1, numbers.shape[1])
        return (grouped * scales[:, None]).reshape(numbers.shape)


@dataclass(frozen=True)
class GraphLinear:
    """One quantized linear: everything between x and y is its own."""

    path: str
    layer: LayerPolicy
    x: ir.Value
    """What it reads, before it is quantized; [..., in]."""
    y: ir.Value
    """Its product, before a bias is added; [..., out]."""
    codes: ir.Value
    scales: ir.Value
    x_scale: ir.Value | None
    """The static INT8 scale; None where there is none."""

    @property
    def dtype(self) -> ir.DataType:
        """Type of what it reads and writes."""
        assert self.x.dtype is not None, "the rewrites give linears' inputs a type"
        return self.x.dtype

    def weight(self) -> GraphWeight:
        """Codes and scales, read from the graph's data file."""
        scales = _array(self.scales).astype(np.float32)
        return GraphWeight(_array(self.codes).astype(np.int8), scales if scales.ndim == 2 else scales[None])

    def activation_scale(self) -> float | None:
        """The static INT8 scale."""
        return None if self.x_scale is None else float(_array(self.x_scale).reshape(()))


def linears_of_graph(model: ir.Model, policy: Policy) -> dict[str, GraphLinear]:
    """Every quantized linear of the policy, by path.

    Raises:
        UserError: The graph has no such linear.
    """
    return {path: _linear(model, path, layer) for path, layer in policy.quantized().items()}


def _linear(model: ir.Model, path: str, layer: LayerPolicy) -> GraphLinear:
    codes = model.graph.initializers.get(f"{path}.weight_codes")
    scales = model.graph.initializers.get(f"{path}.weight_scales")
    nodes = [] if codes is None else list(_multiplying(codes))
    if codes is None or scales is None or len(nodes) != 1:
        raise UserError(f"layer {path}", "model.w4a8.onnx does not multiply by its weight once", _HINT)
    (node,) = nodes
    x, x_scale = _activation(node, layer)
    if x is None or x.dtype is None:
        raise UserError(f"layer {path}", "model.w4a8.onnx does not say what it reads", _HINT)
    return GraphLinear(path, layer, x, _product(node, path), codes, scales, x_scale)


def _multiplying(codes: ir.Value) -> Iterator[ir.Node]:
    for use in codes.uses():
        if use.node.op_type in ("DequantizeLinear", "Cast"):
            yield from _multiplying(use.node.outputs[0])
        else:
            yield use.node


def _activation(node: ir.Node, layer: LayerPolicy) -> tuple[ir.Value | None, ir.Value | None]:
    """What a linear reads before it is quantized, and the constant scale of a static quantization."""
    value = node.inputs[0]
    if node.domain == DOMAIN:
        return value, (node.inputs[3] if len(node.inputs) > 3 else None)
    if layer.activation is None or value is None:
        return value, None
    dequantize = _producer(value, "Cast") or _producer(value, "DequantizeLinear")
    if dequantize is not None and dequantize.op_type == "Cast":
        dequantize = _producer(dequantize.inputs[0], "DequantizeLinear")
    quantize = _producer(dequantize.inputs[0], "QuantizeLinear") if dequantize is not None else None
    if quantize is None:
        return None, None
    if layer.activation != "per_token":
        return _before_widening(quantize.inputs[0], value.dtype), quantize.inputs[1]
    divide = _producer(quantize.inputs[0], "Div")
    return (None if divide is None else _before_widening(divide.inputs[0], value.dtype)), None


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _before_widening(value: ir.Value | None, dtype: ir.DataType | None) -> ir.Value | None:
    """What is cast to `value`, if that is of type `dtype`; else `value` itself."""
    cast = _producer(value, "Cast")
    source = cast.inputs[0] if cast is not None else None
    return source if source is not None and source.dtype == dtype else value


def _product(node: ir.Node, path: str) -> ir.Value:
    """The output of a linear, after it was scaled by its tokens where that follows the product."""
    value = node.outputs[0]
    while True:
        readers = [use.node for use in value.uses()]
        if len(readers) != 1 or readers[0].op_type not in ("Cast", "Mul") or not _belongs(readers[0], path):
            return value
        value = readers[0].outputs[0]


def _belongs(node: ir.Node, path: str) -> bool:
    return (node.name or "").rpartition("/")[0] == path


def _array(value: ir.Value) -> NDArray[Any]:
    tensor = value.const_value
    if tensor is None:
        raise UserError(f"initializer {value.name}", "has no value", _HINT)
    return tensor.numpy()
