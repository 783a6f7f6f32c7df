from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from fptq_export.graph_io import load_graph, save_graph
from fptq_export.rewrite.functions import DOMAIN, W4A8_PER_TOKEN, W4A8_STATIC
from fptq_export.rewrite.fuse_w4a8_linears import FuseW4A8Linears
from fptq_export.rewrite.lint_precision import LintPrecision
from fptq_export.rewrite.lower_to_native import LowerToNative
from tests.rewrite.conftest import Rewritten
from tests.support.graphs import linear_numbers, qdq_linear
from tests.support.traced import run

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
REWRITTEN = ("llama_rewritten", "llama_rewritten_fp16", "opt_rewritten")


def _fused(activation: str, dtype: ir.DataType = FLOAT16) -> ir.Model:
    model = qdq_linear(linear_numbers(), dtype, activation)
    FuseW4A8Linears()(model)
    return model


@pytest.mark.parametrize("fixture", REWRITTEN)
def test_no_function_is_left_and_names_are_unique(request: pytest.FixtureRequest, fixture: str) -> None:
    """TensorRT-RTX refuses a function that is called twice, and a node name that is there twice."""
    rewritten: Rewritten = request.getfixturevalue(fixture)
    proto = onnx.load(rewritten.lowered, load_external_data=False)
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} == {""}
    assert {entry.domain for entry in proto.opset_import} == {""}
    names = [node.name for node in proto.graph.node]
    assert len(names) == len(set(names))
    outputs = [name for node in proto.graph.node for name in node.output]
    assert len(outputs) == len(set(outputs))


@pytest.mark.parametrize("fixture", REWRITTEN)
def test_nodes_are_named_after_their_linear(request: pytest.FixtureRequest, fixture: str) -> None:
    """Engine layers are matched by `<torch path>/<OpType>`: each linear has MatMul and weight under that name."""
    rewritten: Rewritten = request.getfixturevalue(fixture)
    nodes = {node.name: node for node in load_graph(rewritten.lowered).graph}
    for path in rewritten.policy.quantized():
        assert nodes[f"{path}/MatMul"].op_type == "MatMul"
        weights = [node for name, node in nodes.items() if name and name.startswith(f"{path}/DequantizeLinear")]
        assert any(node.inputs[0] and node.inputs[0].name == f"{path}.weight_codes" for node in weights)
    assert not any("fptq.linear" in key for node in nodes.values() for key in node.metadata_props)


@pytest.mark.parametrize("fixture", REWRITTEN)
def test_a_barrier_stands_before_every_quantized_matmul(request: pytest.FixtureRequest, fixture: str) -> None:
    """Without `Max` TensorRT fuses INT8 activations and block-INT4 weights into a wrong GEMM."""
    rewritten: Rewritten = request.getfixturevalue(fixture)
    model = load_graph(rewritten.lowered)
    nodes = {node.name: node for node in model.graph}
    for path in rewritten.policy.quantized():
        left = nodes[f"{path}/MatMul"].inputs[0]
        assert left is not None
        barrier = left.producer()
        assert barrier is not None
        assert barrier.op_type == "Max"
    LintPrecision()(model)


def test_projections_share_one_quantization(llama_rewritten: Rewritten) -> None:
    """q, k and v quantize the same tensor with the same scale: inlining makes three copies, one is left."""
    model = load_graph(llama_rewritten.lowered)
    nodes = {node.name: node for node in model.graph}
    for layer in (0, 1):
        lefts = {nodes[f"model.layers.{layer}.self_attn.{name}_proj/MatMul"].inputs[0] for name in "qkv"}
        assert len(lefts) == 1
    sites, policy = llama_rewritten.traced.sites, llama_rewritten.policy
    static = {sites.linear(path).input for path, layer in policy.quantized().items() if layer.activation_scale}
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == len(static)


@pytest.mark.parametrize("activation", ["static", "per_token"])
def test_lowered_linear_gives_the_same_bits(tmp_path: Path, activation: str) -> None:
    """Inlining changes no number."""
    model = _fused(activation, FLOAT)
    save_graph(model, tmp_path / "fused.onnx")
    assert LowerToNative()(model).modified
    save_graph(model, tmp_path / "lowered.onnx")
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    fused, lowered = (run(tmp_path / name, {"x": x})["y"] for name in ("fused.onnx", "lowered.onnx"))
    np.testing.assert_array_equal(lowered, fused)


@pytest.mark.parametrize(("activation", "op_type"), [("static", W4A8_STATIC), ("per_token", W4A8_PER_TOKEN)])
def test_weight_is_read_by_dequantize_linear_alone(activation: str, op_type: str) -> None:
    """A 4-bit constant may feed nothing else, and stays 4 bits."""
    model = _fused(activation)
    assert model.graph[0].op_type == op_type
    LowerToNative()(model)
    codes = model.graph.initializers["fc.weight_codes"]
    assert codes.dtype == ir.DataType.INT4
    assert [use.node.op_type for use in codes.uses()] == ["DequantizeLinear"]


def test_names_that_are_taken_are_not_given_again() -> None:
    """A node of the model that is called like one of ours keeps its name; ours gets another."""
    model = _fused("static")
    y = model.graph.outputs[0]
    other = ir.Node("", "Relu", [y], name="fc/MatMul")
    other.outputs[0].name, other.outputs[0].dtype, other.outputs[0].shape = "z", FLOAT16, y.shape
    model.graph.append(other)
    model.graph.outputs.append(other.outputs[0])
    LowerToNative()(model)
    names = [node.name for node in model.graph]
    assert len(names) == len(set(names))
    assert other.name == "fc/MatMul"
    assert "fc/MatMul_1" in names


@pytest.mark.parametrize("activation", ["float"])
def test_graph_without_our_nodes_is_left_alone(activation: str) -> None:
    """A weight-only graph has nothing to lower, and equal nodes in it stay two."""
    model = qdq_linear(linear_numbers(), FLOAT16, activation)
    before = ir.to_proto(model)
    assert not LowerToNative()(model).modified
    assert ir.to_proto(model) == before


def test_second_run_changes_nothing() -> None:
    """Lowering twice is lowering once."""
    model = _fused("static")
    LowerToNative()(model)
    before = ir.to_proto(model)
    assert not LowerToNative()(model).modified
    assert ir.to_proto(model) == before


def test_the_domain_is_no_longer_imported() -> None:
    """A builder that does not know the domain must not stumble over its import."""
    model = _fused("static")
    LowerToNative()(model)
    assert DOMAIN not in model.graph.opset_imports
