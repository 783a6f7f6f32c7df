from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fptq_export.graph_io import load_graph, save_graph
from fptq_export.rewrite.functions import DOMAIN, PER_TOKEN_QDQ, W4A8_PER_TOKEN, W4A8_STATIC
from fptq_export.rewrite.fuse_w4a8_linears import FuseW4A8Linears
from tests.rewrite.conftest import Rewritten
from tests.support.graphs import by_type, constant, int4_constant, linear_numbers, qdq_linear
from tests.support.traced import run

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
NUMBERS = linear_numbers()


@pytest.mark.parametrize("fixture", ["llama_rewritten", "llama_rewritten_fp16", "opt_rewritten"])
def test_every_quantized_linear_is_one_node(request: pytest.FixtureRequest, fixture: str) -> None:
    """As many `fptq` nodes as quantized layers, named after them, of the type that their tier says."""
    rewritten: Rewritten = request.getfixturevalue(fixture)
    model = load_graph(rewritten.w4a8)
    fused = {node.name: node.op_type for node in model.graph if node.domain == DOMAIN}
    types = {
        path: W4A8_PER_TOKEN if layer.activation == "per_token" else W4A8_STATIC
        for path, layer in rewritten.policy.quantized().items()
    }
    assert fused == {f"{path}/{op_type}": op_type for path, op_type in types.items()}
    assert {node.op_type for node in model.graph}.isdisjoint({"QuantizeLinear", "DequantizeLinear", PER_TOKEN_QDQ})
    assert {key[1] for key in model.functions} == {W4A8_STATIC, W4A8_PER_TOKEN}


def test_plugin_attributes_are_on_the_node_and_declared_on_the_function(llama_rewritten_fp16: Rewritten) -> None:
    """TensorRT takes the plugin only if the node names its namespace; the checker wants it declared on the function."""
    proto = onnx.load(llama_rewritten_fp16.w4a8, load_external_data=False)
    nodes = [node for node in proto.graph.node if node.domain == DOMAIN]
    for node in nodes:
        values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert values == {"plugin_namespace": b"fptq", "plugin_version": b"1", "group_size": 32}
    for function in proto.functions:
        declared = {*function.attribute, *(attribute.name for attribute in function.attribute_proto)}
        assert declared == {"plugin_namespace", "plugin_version", "group_size"}
        assert {entry.domain for entry in function.opset_import} == {""}


@pytest.mark.parametrize("activation", ["static", "per_token"])
def test_fused_linear_gives_the_same_bits(tmp_path: Path, activation: str) -> None:
    """The function body holds the nodes it replaces, so the file before and after computes the same numbers.

    In FP32: for FP16 ONNX Runtime computes in FP32 between casts and drops pairs of them, other ones in either form.
    """
    model = qdq_linear(NUMBERS, FLOAT, activation)
    save_graph(model, tmp_path / "before.onnx")
    assert FuseW4A8Linears()(model).modified
    save_graph(model, tmp_path / "after.onnx")
    (node,) = model.graph
    assert node.op_type == (W4A8_STATIC if activation == "static" else W4A8_PER_TOKEN)
    assert node.outputs[0].name == "y"
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    before, after = (run(tmp_path / name, {"x": x})["y"] for name in ("before.onnx", "after.onnx"))
    np.testing.assert_array_equal(before, after)
    onnx.checker.check_model(str(tmp_path / "after.onnx"), full_check=True)


@pytest.mark.parametrize("activation", ["static", "per_token"])
def test_saved_graph_can_be_fused(tmp_path: Path, activation: str) -> None:
    """Types survive the file, so the Q/DQ form written by one run is fused by another."""
    save_graph(qdq_linear(NUMBERS, FLOAT16, activation), tmp_path / "model.onnx")
    assert FuseW4A8Linears()(load_graph(tmp_path / "model.onnx")).modified


def _zero_point(kind: str) -> Callable[[ir.Model], None]:
    arrays: dict[str, np.generic] = {
        "INT8 3": np.int8(3),
        "UINT8 0": np.uint8(0),
        "INT16 0": np.int16(0),
    }

    def change(model: ir.Model) -> None:
        value = constant(model, "other", arrays[kind])
        for op_type in ("QuantizeLinear", "DequantizeLinear"):
            for node in model.graph:
                if node.op_type == op_type and len(node.inputs) == 3:
                    node.replace_input_with(2, value)

    return change


def _without_zero_points(model: ir.Model) -> None:
    for node in list(model.graph):
        if len(node.inputs) == 3 and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.resize_inputs(2)


def _two_zero_points(model: ir.Model) -> None:
    by_type(model, "QuantizeLinear").replace_input_with(2, constant(model, "other", np.int8(3)))


def _scale_for_each_channel(model: ir.Model) -> None:
    scale = constant(model, "scales", np.full(64, 0.02, np.float32))
    for node in model.graph:
        if len(node.inputs) == 3:
            node.replace_input_with(1, scale)


def _two_scales(model: ir.Model) -> None:
    by_type(model, "QuantizeLinear").replace_input_with(1, constant(model, "other", np.float32(0.5)))


def _weight(model: ir.Model) -> ir.Node:
    (node,) = (use.node for use in model.graph.initializers["fc.weight_codes"].uses())
    return node


def _weight_zero_point(model: ir.Model) -> None:
    node = _weight(model)
    node.resize_inputs(3)
    node.replace_input_with(2, int4_constant(model, "zeros", np.full((4, 8), 1, np.int8)))


def _weight_by_columns(model: ir.Model) -> None:
    node = _weight(model)
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
    node.replace_input_with(1, constant(model, "scales", np.ones((64, 1), np.float16)))
    node.attributes["block_size"] = ir.AttrInt64("block_size", 8)


def _weight_by_channel(model: ir.Model) -> None:
    node = _weight(model)
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
    del node.attributes["block_size"]
    node.replace_input_with(1, constant(model, "scales", np.ones(8, np.float16)))


def _int8_weight(model: ir.Model) -> None:
    _weight(model).replace_input_with(0, constant(model, "codes", np.ones((64, 8), np.int8)))


def _int8_blocks(model: ir.Model) -> None:
    _int8_weight(model)
    assert _weight_axis(model) == 0


def _weight_axis(model: ir.Model) -> int:
    (node,) = (use.node for use in model.graph.initializers["codes"].uses())
    return node.attributes.get_int("axis", 1)


def _float32_matmul_of_a_half_activation(model: ir.Model) -> None:
    """FP16 x -> FP32 -> Q/DQ -> FP32 MatMul, as another tool may write it."""
    cast = next(node for node in model.graph if node.op_type == "Cast" and node.outputs[0].dtype == FLOAT16)
    wide = cast.inputs[0]
    assert wide is not None
    matmul = by_type(model, "MatMul")
    widened = by_type(model, "QuantizeLinear").inputs[0]
    assert widened is not None
    wide.dtype = widened.dtype = FLOAT
    matmul.replace_input_with(0, wide)
    weight = ir.Node("", "Cast", [matmul.inputs[1]], [ir.AttrInt64("to", int(FLOAT))], name="wide_weight")
    model.graph.insert_before(matmul, weight)
    matmul.replace_input_with(1, weight.outputs[0])
    matmul.outputs[0].dtype = FLOAT


def _untyped(model: ir.Model) -> None:
    model.graph.inputs[0].type = None


STATIC_MUST_LEAVE: dict[str, Callable[[ir.Model], None]] = {
    "INT8 zero point 3": _zero_point("INT8 3"),
    "UINT8 activation": _zero_point("UINT8 0"),
    "INT16 activation": _zero_point("INT16 0"),
    "UINT8 activation by default": _without_zero_points,
    "two zero points": _two_zero_points,
    "a scale for each channel": _scale_for_each_channel,
    "two scales": _two_scales,
    "weight zero point": _weight_zero_point,
    "weight blocks along the outputs": _weight_by_columns,
    "weight by channel": _weight_by_channel,
    "INT8 weight": _int8_blocks,
    "FP32 MatMul by FP16 scales": _float32_matmul_of_a_half_activation,
    "activation of unknown type": _untyped,
}


@pytest.mark.parametrize("case", STATIC_MUST_LEAVE)
def test_other_quantizations_are_left_alone(case: str) -> None:
    """A node that computes something else than the contract stays as it is: fused, it would give other numbers."""
    model = qdq_linear(NUMBERS, FLOAT16, "static")
    STATIC_MUST_LEAVE[case](model)
    before = [node.op_type for node in model.graph]
    assert not FuseW4A8Linears()(model).modified
    assert [node.op_type for node in model.graph] == before


def test_weight_only_linear_is_left_alone() -> None:
    """INT4 weights with float activations are no W4A8 linear."""
    assert not FuseW4A8Linears()(qdq_linear(NUMBERS, FLOAT16, "float")).modified


@pytest.mark.parametrize("activation", ["static", "per_token"])
def test_activation_only_linear_is_left_alone(activation: str) -> None:
    """INT8 activations with a float weight are no W4A8 linear."""
    model = qdq_linear(NUMBERS, FLOAT16, activation)
    by_type(model, "MatMul").replace_input_with(1, constant(model, "float_weight", np.ones((64, 8), np.float16)))
    assert not FuseW4A8Linears()(model).modified


def test_activation_that_the_model_widens_keeps_its_cast(tmp_path: Path) -> None:
    """FP16 x, FP32 linear: the fused node is of type FP32 and the model's own Cast stays before it."""
    model = qdq_linear(NUMBERS, FLOAT, "static")
    save_graph(model, tmp_path / "before.onnx")
    x = model.graph.inputs[0]
    half = ir.Value(name="half", shape=x.shape, type=ir.TensorType(FLOAT16))
    model.graph.inputs[0] = half
    cast = ir.Node("", "Cast", [half], [ir.AttrInt64("to", int(FLOAT))], name="widen")
    cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = "wide", FLOAT, x.shape
    model.graph.insert_before(model.graph[0], cast)
    ir.convenience.replace_all_uses_with(x, cast.outputs[0])
    assert FuseW4A8Linears()(model).modified
    assert [node.op_type for node in model.graph] == ["Cast", W4A8_STATIC]
    save_graph(model, tmp_path / "after.onnx")
    values = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float16)
    before = run(tmp_path / "before.onnx", {"x": values.astype(np.float32)})["y"]
    np.testing.assert_array_equal(run(tmp_path / "after.onnx", {"half": values})["y"], before)


def test_second_run_changes_nothing() -> None:
    """A fused graph has nothing left to fuse."""
    model = qdq_linear(NUMBERS, FLOAT16, "static")
    FuseW4A8Linears()(model)
    before = ir.to_proto(model)
    assert not FuseW4A8Linears()(model).modified
    assert ir.to_proto(model) == before


def test_shared_quantization_stays_for_its_other_readers(tmp_path: Path) -> None:
    """A quantized tensor that something else reads too keeps its Q/DQ nodes."""
    model = qdq_linear(NUMBERS, FLOAT, "static")
    left = by_type(model, "MatMul").inputs[0]
    assert left is not None
    relu = ir.Node("", "Relu", [left], name="relu")
    relu.outputs[0].name, relu.outputs[0].dtype = "z", FLOAT
    relu.outputs[0].shape = ir.Shape(["tokens", 64])
    model.graph.append(relu)
    model.graph.outputs.append(relu.outputs[0])
    assert FuseW4A8Linears()(model).modified
    assert {node.op_type for node in model.graph} == {W4A8_STATIC, "QuantizeLinear", "DequantizeLinear", "Relu"}
    save_graph(model, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
