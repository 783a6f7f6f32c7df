from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from fptq_export.errors import PrecisionError
from fptq_export.graph_io import load_graph
from fptq_export.rewrite.fuse_w4a8_linears import FuseW4A8Linears
from fptq_export.rewrite.lint_precision import LintPrecision
from fptq_export.rewrite.lower_to_native import LowerToNative
from tests.rewrite.conftest import Rewritten
from tests.support.graphs import by_type, constant, linear_numbers, qdq_linear

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16


def _forbidden(dtype: ir.DataType = FLOAT) -> ir.Model:
    return qdq_linear(linear_numbers(), dtype, "static")


def _insert(model: ir.Model, op_type: str, others: list[ir.Value], attributes: list[ir.Attr], operand: int = 0) -> None:
    """Put an operator between the MatMul and one of its operands."""
    matmul = by_type(model, "MatMul")
    node = ir.Node("", op_type, [matmul.inputs[operand], *others], attributes, name=f"{op_type}_between")
    model.graph.insert_before(matmul, node)
    matmul.replace_input_with(operand, node.outputs[0])


def _one(model: ir.Model) -> ir.Value:
    return constant(model, "one", np.ones((1, 1), np.float32))


def _two_casts(model: ir.Model) -> None:
    for dtype in (FLOAT16, FLOAT):
        _insert(model, "Cast", [], [ir.AttrInt64("to", int(dtype))])


TRANSPARENT: dict[str, Callable[[ir.Model], None]] = {
    "directly": lambda model: None,
    "Identity": lambda model: _insert(model, "Identity", [], []),
    "Cast": lambda model: _insert(model, "Cast", [], [ir.AttrInt64("to", int(FLOAT))]),
    "two casts": _two_casts,
    "Reshape": lambda model: _insert(model, "Reshape", [constant(model, "shape", np.array([-1, 64]))], []),
    "Unsqueeze": lambda model: _insert(model, "Unsqueeze", [constant(model, "axes", np.array([0]))], []),
    "Mul by 1": lambda model: _insert(model, "Mul", [_one(model)], []),
    "Cast of the weight": lambda model: _insert(model, "Cast", [], [ir.AttrInt64("to", 1)], operand=1),
    "Transpose of the weight": lambda model: _insert(model, "Transpose", [], [], operand=1),
}


@pytest.mark.parametrize("between", TRANSPARENT)
def test_block_int4_times_int8_is_refused(between: str) -> None:
    """Nothing that TensorRT looks through hides the pattern it computes wrongly; the node is named."""
    model = _forbidden()
    TRANSPARENT[between](model)
    with pytest.raises(PrecisionError, match=r"1 operators[\s\S]*fc/MatMul[\s\S]*model\.w4a8\.onnx"):
        LintPrecision()(model)


def test_int8_blocks_are_refused_too() -> None:
    """Their scales differ along the summed channels as those of INT4 blocks do."""
    model = _forbidden()
    (use,) = model.graph.initializers["fc.weight_codes"].uses()
    use.node.replace_input_with(0, constant(model, "codes", np.ones((64, 8), np.int8)))
    with pytest.raises(PrecisionError, match="fc/MatMul"):
        LintPrecision()(model)


@pytest.mark.parametrize("op_type", ["Gemm", "Conv"])
def test_other_weighted_operators_are_refused_too(op_type: str) -> None:
    """Gemm and Conv go to the same kernels as MatMul."""
    model = _forbidden(FLOAT16)
    by_type(model, "MatMul").op_type = op_type
    with pytest.raises(PrecisionError, match="fc/MatMul"):
        LintPrecision()(model)


def test_operands_may_be_exchanged() -> None:
    """The weight on the left is the same trap."""
    model = _forbidden()
    matmul = by_type(model, "MatMul")
    left, right = matmul.inputs
    matmul.replace_input_with(0, right)
    matmul.replace_input_with(1, left)
    with pytest.raises(PrecisionError, match="fc/MatMul"):
        LintPrecision()(model)


def test_pattern_in_a_subgraph_is_refused() -> None:
    """A branch of an If is built like the rest."""
    inner = _forbidden()
    branch = inner.graph
    y = branch.outputs[0]
    condition = ir.Value(name="c", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    x = branch.inputs.pop()
    node = ir.Node("", "If", [condition], [ir.AttrGraph("then_branch", branch)], name="if")
    node.outputs[0].name, node.outputs[0].type = "z", y.type
    outer = ir.Model(
        ir.Graph([x, condition], node.outputs, nodes=[node], opset_imports={"": 21}, name="outer"), ir_version=10
    )
    with pytest.raises(PrecisionError, match="fc/MatMul"):
        LintPrecision()(outer)


def test_every_offender_is_listed(llama_rewritten: Rewritten) -> None:
    """The Q/DQ file is refused with the name of every static linear in it."""
    static = {path for path, layer in llama_rewritten.policy.quantized().items() if layer.activation_scale}
    with pytest.raises(PrecisionError) as error:
        LintPrecision()(load_graph(llama_rewritten.qdq))
    assert {line.strip() for line in str(error.value).splitlines() if line.endswith("/MatMul")} == {
        f"{path}/MatMul" for path in static
    }


def _lowered() -> ir.Model:
    model = _forbidden()
    FuseW4A8Linears()(model)
    LowerToNative()(model)
    return model


def _per_channel_weight() -> ir.Model:
    model = _forbidden()
    (use,) = model.graph.initializers["fc.weight_codes"].uses()
    use.node.replace_input_with(1, constant(model, "scales", np.ones(8, np.float32)))
    use.node.attributes["axis"] = ir.AttrInt64("axis", 1)
    del use.node.attributes["block_size"]
    return model


def _int8_weight() -> ir.Model:
    model = _per_channel_weight()
    (use,) = model.graph.initializers["fc.weight_codes"].uses()
    use.node.replace_input_with(0, constant(model, "codes", np.ones((64, 8), np.int8)))
    return model


def _mul_by(number: float) -> ir.Model:
    model = _forbidden()
    _insert(model, "Mul", [constant(model, "factor", np.float32(number))], [])
    return model


def _two_linears() -> ir.Model:
    """The INT8 tensor and the INT4 weight are multiplied, but by different MatMuls."""
    model = _forbidden()
    matmul = by_type(model, "MatMul")
    x = model.graph.inputs[0]
    other = ir.Node("", "MatMul", [matmul.inputs[0], constant(model, "float", np.ones((64, 8), np.float32))], name="o")
    matmul.replace_input_with(0, x)
    model.graph.append(other)
    model.graph.outputs.append(other.outputs[0])
    return model


FINE: dict[str, Callable[[], ir.Model]] = {
    "barrier": _lowered,
    "Mul by 2": lambda: _mul_by(2.0),
    "weight-only": lambda: qdq_linear(linear_numbers(), FLOAT, "float"),
    "per-token activation": lambda: qdq_linear(linear_numbers(), FLOAT, "per_token"),
    "per-channel INT4 weight": _per_channel_weight,
    "INT8 x INT8": _int8_weight,
    "two MatMuls": _two_linears,
}


@pytest.mark.parametrize("case", FINE)
def test_what_tensorrt_computes_rightly_passes(case: str) -> None:
    """The lint refuses one pattern and leaves the others, unchanged."""
    model = FINE[case]()
    before = ir.to_proto(model)
    assert not LintPrecision()(model).modified
    assert ir.to_proto(model) == before
