"""One quantized linear as a graph, to look at alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from fptq_export.packing import packed_from_int4
from fptq_export.rewrite.functions import (
    DOMAIN,
    PER_TOKEN_QDQ,
    dequantized_weight,
    per_token_qdq_function,
    register_function,
    scale_type,
    static_qdq,
)

__all__ = [
    "LinearNumbers",
    "by_type",
    "constant",
    "graph_from_text",
    "int4_constant",
    "linear_numbers",
    "qdq_linear",
]


@dataclass(frozen=True)
class LinearNumbers:
    """A random quantized linear; codes and scales as the policy stores them.

    Attributes:
        codes: INT4 codes, int8 [out, in].
        scales: Group scales, float16 [out, in/group_size].
        x_scale: Static activation scale.
        group_size: Input channels that share a scale.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    x_scale: np.float32
    group_size: int


def linear_numbers(in_features: int = 64, out_features: int = 8, group_size: int = 16, seed: int = 0) -> LinearNumbers:
    """Draw codes over the whole range and scales that differ by a factor of 50 from group to group."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-8, 8, (out_features, in_features)).astype(np.int8)
    scales = np.exp(rng.uniform(-6, -2, (out_features, in_features // group_size))).astype(np.float16)
    return LinearNumbers(codes, scales, np.float32(0.021), group_size)


def graph_from_text(text: str, opset: int = 24) -> ir.Model:
    """A graph in ONNX's text form, with the shapes of all its values."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def constant(model_or_graph: ir.Model, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
    """Add an initializer."""
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(np.shape(array)), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model_or_graph.graph.register_initializer(value)
    return value


def int4_constant(model: ir.Model, name: str, codes: NDArray[np.int8]) -> ir.Value:
    """Add an INT4 initializer."""
    packed = packed_from_int4(codes.reshape(-1))
    tensor = ir.PackedTensor(packed, ir.DataType.INT4, shape=list(codes.shape), name=name)
    value = ir.Value(name=name, shape=ir.Shape(codes.shape), type=ir.TensorType(ir.DataType.INT4), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def qdq_linear(numbers: LinearNumbers, dtype: ir.DataType, activation: str) -> ir.Model:
    """`MatMul(QDQ(x), DQ(codes))` of a type, named as InsertQdq does; x is [tokens, in], y is [tokens, out].

    Args:
        numbers: Weight and scale.
        dtype: FLOAT16 or FLOAT.
        activation: `static`, `per_token` or `float`.
    """
    outputs, inputs = numbers.codes.shape
    x = ir.Value(name="x", shape=ir.Shape(["tokens", inputs]), type=ir.TensorType(dtype))
    model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="linear"), ir_version=10)
    codes = int4_constant(model, "fc.weight_codes", numbers.codes.T)
    scales = constant(model, "fc.weight_scales", numbers.scales.T.astype(scale_type(dtype).numpy()))
    tape = Tape()
    left = x
    if activation == "static":
        scale = constant(model, "fc.activation_scale", numbers.x_scale)
        left = static_qdq(tape, x, scale, constant(model, "zero", np.int8(0)), dtype)
    elif activation == "per_token":
        register_function(model, per_token_qdq_function(dtype))
        left = tape.op(PER_TOKEN_QDQ, [x], domain=DOMAIN)
    left.dtype, left.shape = dtype, x.shape
    weight = dequantized_weight(tape, codes, scales, numbers.group_size, dtype)
    y = tape.op("MatMul", [left, weight])
    y.name, y.dtype, y.shape = "y", dtype, ir.Shape(["tokens", outputs])
    model.graph.extend(tape.nodes)
    model.graph.outputs.append(y)
    for index, node in enumerate(model.graph):
        node.name = f"fc/{node.op_type}" if node.op_type == "MatMul" else f"fc/{node.op_type}_{index}"
    return model


def by_type(model: ir.Model, op_type: str) -> ir.Node:
    """The only node of a type."""
    (node,) = (node for node in model.graph if node.op_type == op_type)
    return node
