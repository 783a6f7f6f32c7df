"""The model-local functions of domain `fptq`: what a W4A8 linear computes, in standard ONNX operators.

They make the file portable: `onnx.checker` accepts it, stock ONNX Runtime runs it, and TensorRT replaces the node by
the plugin of the same name where that is registered. The arithmetic is the numeric contract of `numerics.py`, with the
integer sums done in the graph's floating-point type.

The graph's element type T is FLOAT16, BFLOAT16 or FLOAT.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from fptq_export.numerics import INT8_MAX, INT8_MIN, PER_TOKEN_EPS

__all__ = [
    "DOMAIN",
    "ELEMENT_TYPES",
    "FRACTION",
    "PER_TOKEN_QDQ",
    "PLUGIN_ATTRIBUTES",
    "RANGE_MONITOR",
    "W4A8_PER_TOKEN",
    "W4A8_STATIC",
    "dequantized_int8_weight",
    "dequantized_per_token",
    "dequantized_weight",
    "per_token_codes",
    "per_token_fractions",
    "per_token_qdq_function",
    "range_monitor_function",
    "register_function",
    "rescaled",
    "scale_type",
    "static_qdq",
    "w4a8_function",
]

DOMAIN = "fptq"
_DOMAIN_VERSION = 1
_OPSET = 21
"""Of a body before it is registered."""
W4A8_STATIC = "FptqW4A8GemmStatic"
W4A8_PER_TOKEN = "FptqW4A8GemmPerToken"
PER_TOKEN_QDQ = "FptqQuantizeDequantizePerToken"
RANGE_MONITOR = "FptqRangeMonitor"
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
"""TensorRT >= 10.15 takes the plugin instead of the function body only if the node names the plugin's namespace."""

_LOWEST = {
    ir.DataType.FLOAT16: float(np.finfo(np.float16).min),
    ir.DataType.BFLOAT16: float(ml_dtypes.finfo(ml_dtypes.bfloat16).min),
    ir.DataType.FLOAT: float(np.finfo(np.float32).min),
}
ELEMENT_TYPES = frozenset(_LOWEST)
"""What T may be."""
FRACTION = np.float32(2.0**-7)
"""What an INT8 code counts for in `per_token_fractions`; a power of two, so that nothing is rounded."""


def register_function(model: ir.Model, function: ir.Function) -> None:
    """Add a function and the import of its domain to a model; one of that name that is there already stays.

    The body imports the opset of the model, which `onnx.checker` asks for; its operators mean the same from 21 to 24.
    """
    function.opset_imports[""] = model.graph.opset_imports[""]
    model.functions.setdefault(function.identifier(), function)
    model.graph.opset_imports[DOMAIN] = _DOMAIN_VERSION


def scale_type(dtype: ir.DataType) -> ir.DataType:
    """Type of the group scales in a graph of type T: FLOAT16, widened to FLOAT where T is, which is exact."""
    return ir.DataType.FLOAT if dtype == ir.DataType.FLOAT else ir.DataType.FLOAT16


def dequantized_weight(
    tape: Tape, codes: ir.Value, scales: ir.Value, group_size: int | ir.Attr, dtype: ir.DataType
) -> ir.Value:
    """INT4 codes [in, out] and group scales [in/group_size, out] -> weight [in, out] of type T."""
    return _to(
        tape,
        tape.op("DequantizeLinear", [codes, scales], {"axis": 0, "block_size": group_size}),
        scale_type(dtype),
        dtype,
    )


def dequantized_int8_weight(
    tape: Tape, codes: ir.Value, scales: ir.Value, dtype: ir.DataType, axis: int = 1
) -> ir.Value:
    """INT8 codes and FLOAT channel scales [out] -> weight of type T.

    Args:
        tape: Where the operators go.
        codes: [in, out] of a linear, or in the shape of a convolution's weight.
        scales: [out].
        dtype: T.
        axis: Axis of the codes that runs along output channels.
    """
    return _to(tape, tape.op("DequantizeLinear", [codes, scales], {"axis": axis}), ir.DataType.FLOAT, dtype)


def static_qdq(tape: Tape, x: ir.Value, scale: ir.Value, zero_point: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Quantize and dequantize per tensor; x of type T -> T.

    The division runs in float32 whatever T is: QuantizeLinear computes in the type of its inputs, and the contract asks
    for float32. The result is rounded to T once.
    """
    codes = tape.op("QuantizeLinear", [_to(tape, x, dtype, ir.DataType.FLOAT), scale, zero_point])
    return _to(tape, tape.op("DequantizeLinear", [codes, scale, zero_point]), ir.DataType.FLOAT, dtype)


def _per_token_scale(tape: Tape, wide: ir.Value) -> ir.Value:
    last_axis = _constant(tape, np.array([-1], np.int64))
    absmax = tape.op("ReduceMax", [tape.op("Abs", [wide]), last_axis], {"keepdims": 1})
    guarded = tape.op("Max", [absmax, _constant(tape, PER_TOKEN_EPS)])
    return tape.op("Div", [guarded, _constant(tape, np.float32(INT8_MAX))])


def per_token_codes(tape: Tape, x: ir.Value, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """INT8 codes with one scale a token, where Q/DQ operators may only have constant scales.

    Args:
        tape: Where the operators go.
        x: [..., in] of type T.
        dtype: T.

    Returns:
        Codes INT8 [..., in], those of the contract: x / scale is quantized with the constant scale 1; scale FLOAT
        [..., 1].
    """
    wide = _to(tape, x, dtype, ir.DataType.FLOAT)
    scale = _per_token_scale(tape, wide)
    ratio = tape.op("Div", [wide, scale])
    zero = _constant(tape, np.int8(0))
    return tape.op("QuantizeLinear", [ratio, _constant(tape, np.float32(1)), zero]), scale


def dequantized_per_token(tape: Tape, codes: ir.Value, scale: ir.Value, dtype: ir.DataType) -> ir.Value:
    """INT8 codes [..., in] x scale FLOAT [..., 1] in float32 -> T."""
    numbers = tape.op("DequantizeLinear", [codes, _constant(tape, np.float32(1)), _constant(tape, np.int8(0))])
    return _to(tape, tape.op("Mul", [numbers, scale]), ir.DataType.FLOAT, dtype)


def per_token_fractions(tape: Tape, x: ir.Value, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """`per_token_codes` as numbers that T holds exactly.

    Args:
        tape: Where the operators go.
        x: [..., in] of type T.
        dtype: T.

    Returns:
        code x `FRACTION`, in [-1, 1), of type T, exact; and scale / `FRACTION`, FLOAT [..., 1], which `rescaled` takes.
    """
    codes, scale = per_token_codes(tape, x, dtype)
    fractions = tape.op("DequantizeLinear", [codes, _constant(tape, FRACTION), _constant(tape, np.int8(0))])
    factor = tape.op("Mul", [scale, _constant(tape, np.float32(1) / FRACTION)])
    return _to(tape, fractions, ir.DataType.FLOAT, dtype), factor


def rescaled(tape: Tape, product: ir.Value, factor: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Fractions W^T of type T times `factor`, in float32 -> T."""
    wide = _to(tape, product, dtype, ir.DataType.FLOAT)
    return _to(tape, tape.op("Mul", [wide, factor]), ir.DataType.FLOAT, dtype)


def _per_token_qdq(tape: Tape, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Quantize and dequantize with one scale a token, in float32; x [..., in] of type T -> T."""
    wide = _to(tape, x, dtype, ir.DataType.FLOAT)
    scale = _per_token_scale(tape, wide)
    bounds = [_constant(tape, np.float32(bound)) for bound in (INT8_MIN, INT8_MAX)]
    codes = tape.op("Clip", [tape.op("Round", [tape.op("Div", [wide, scale])]), *bounds])
    return _to(tape, tape.op("Mul", [codes, scale]), ir.DataType.FLOAT, dtype)


def per_token_qdq_function(dtype: ir.DataType) -> ir.Function:
    """`FptqQuantizeDequantizePerToken(x) -> y`, x and y of type T; used by the Q/DQ form."""
    x = ir.Value(name="x")
    tape = Tape()
    return _function(PER_TOKEN_QDQ, [x], _per_token_qdq(tape, x, dtype), tape, {})


def range_monitor_function(dtype: ir.DataType) -> ir.Function:
    """`FptqRangeMonitor(x, scale) -> y`: what the static quantization of x clips.

    Args:
        dtype: T, the type of x, of any shape; scale is FLOAT, one number.

    y is FLOAT [1, 3]: the share of values with rint(x / scale) outside [-128, 127], ties to even as in QuantizeLinear,
    so x / scale >= 127.5 or < -128.5, or NaN; the largest |x / scale| over 127; how many values there are. The values
    that are clipped are summed along the last axis first: exact in float32 up to 2^24 of them in a call, and beyond
    that within (size of the other axes) x 2^-24, relative.
    """
    x, scale = (ir.Value(name=name) for name in ("x", "scale"))
    tape = Tape()
    ratio = tape.op("Div", [_to(tape, x, dtype, ir.DataType.FLOAT), scale])
    low, high = (_constant(tape, np.float32(bound)) for bound in (INT8_MIN - 0.5, INT8_MAX + 0.5))
    inside = tape.op("And", [tape.op("GreaterOrEqual", [ratio, low]), tape.op("Less", [ratio, high])])
    clipped = tape.op("Cast", [tape.op("Not", [inside])], {"to": int(ir.DataType.FLOAT)})
    along_last = tape.op("ReduceSum", [clipped, _constant(tape, np.array([-1], np.int64))], {"keepdims": 1})
    values = tape.op("Cast", [tape.op("Size", [x])], {"to": int(ir.DataType.FLOAT)})
    rate = tape.op("Div", [tape.op("ReduceSum", [along_last], {"keepdims": 0}), values])
    peak = tape.op("ReduceMax", [tape.op("Abs", [ratio])], {"keepdims": 0})
    over_range = tape.op("Div", [peak, _constant(tape, np.float32(INT8_MAX))])
    cell = _constant(tape, np.array([1, 1], np.int64))
    cells = [tape.op("Reshape", [number, cell]) for number in (rate, over_range, values)]
    return _function(RANGE_MONITOR, [x, scale], tape.op("Concat", cells, {"axis": 1}), tape, {})


def w4a8_function(op_type: str, dtype: ir.DataType) -> ir.Function:
    """The W4A8 linear without its bias.

    `FptqW4A8GemmStatic(x, weight_codes, weight_scales, x_scale) -> y`
    `FptqW4A8GemmPerToken(x, weight_codes, weight_scales) -> y`

    Args:
        op_type: `W4A8_STATIC` or `W4A8_PER_TOKEN`.
        dtype: T, the type of x [..., in] and y [..., out]; codes are INT4 [in, out], scales [in/group_size, out].

    The body starts with DequantizeLinear because TensorRT lets a 4-bit constant feed nothing else. `Max(x, lowest)`
    changes no value: it keeps TensorRT from fusing the INT8 activation and the block-quantized weight into one INT8
    GEMM over all input channels, which applies the group scales after the sum and is wrong (see `lint_precision`).
    """
    names = ["x", "weight_codes", "weight_scales", *(["x_scale"] if op_type == W4A8_STATIC else [])]
    inputs = [ir.Value(name=name) for name in names]
    x, codes, scales = inputs[:3]
    tape = Tape()
    group_size = ir.RefAttr("block_size", "group_size", ir.AttributeType.INT)
    weight = dequantized_weight(tape, codes, scales, group_size, dtype)
    if op_type == W4A8_STATIC:
        dequantized = static_qdq(tape, x, inputs[3], _constant(tape, np.int8(0)), dtype)
    else:
        dequantized = _per_token_qdq(tape, x, dtype)
    lowest = _constant(tape, np.array(_LOWEST[dtype], dtype.numpy()))
    y = tape.op("MatMul", [tape.op("Max", [dequantized, lowest]), weight])
    attributes = {name: ir.AttrString(name, value) for name, value in PLUGIN_ATTRIBUTES.items()}
    return _function(op_type, inputs, y, tape, {**attributes, "group_size": ir.AttrInt64("group_size", 128)})


def _constant(tape: Tape, array: NDArray[np.generic] | np.generic) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.asarray(array))})


def _to(tape: Tape, value: ir.Value, source: ir.DataType, target: ir.DataType) -> ir.Value:
    return value if source == target else tape.op("Cast", [value], {"to": int(target)})


def _function(
    name: str, inputs: list[ir.Value], output: ir.Value, tape: Tape, attributes: dict[str, ir.Attr]
) -> ir.Function:
    output.name = "y"
    graph = ir.Graph(inputs, [output], nodes=tape.nodes, opset_imports={"": _OPSET}, name=name)
    return ir.Function(DOMAIN, name, graph=graph, attributes=attributes)
